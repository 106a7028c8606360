//! The programs at this node's pods: what they send comes in at the host's end of their veth pair, what they get leaves there.
//!
//! By `cls_bpf` filters below a `clsact` qdisc, which are part of the device and go with it, and not by links like at the
//! other devices: the kernel waits for an RCU grace period, under the lock that all of its network configuration
//! takes, when such a link is made and when its device goes (kernel/bpf/tcx.c, `tcx_entry_sync`). A node's pods would
//! come and go one by one, 30 ms each.
//!
//! Owns the filters called [`INCOMING`] and [`OUTGOING`] at devices of pods.

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::{AsFd, AsRawFd};

use anyhow::{Context, Result};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::InfoKind;
use netlink_packet_route::tc::{
    TcAttribute, TcBpfFlags, TcFilterBpf, TcFilterBpfOption, TcHandle, TcMessage, TcOption,
};
use sluice_cni::names::DEVICE_PREFIX;
use sluice_cni::netlink::{Kind, Netlink, NetlinkError, Request};
use sluice_cni::requests;

use super::object::DevicePrograms;
use crate::network::Device;
use crate::network::messages::device_of;
use crate::network::pods::PodDevice;

/// What the filters are called, for people who look.
const INCOMING: &str = "sluice/pod_in";
const OUTGOING: &str = "sluice/pod_out";
/// Before whatever else looks at a pod's packets: priority 1, and in the lower half the protocol in network order, any.
const FIRST: u32 = 1 << 16 | (libc::ETH_P_ALL as u16).to_be() as u32;
/// The filter's own number below its priority.
const HANDLE: TcHandle = TcHandle { major: 0, minor: 1 };
const WAY_IN: TcHandle = TcHandle {
    major: u16::MAX,
    minor: TcHandle::MIN_INGRESS,
};
const WAY_OUT: TcHandle = TcHandle {
    major: u16::MAX,
    minor: TcHandle::MIN_EGRESS,
};

/// The programs, and the devices they run at.
pub(super) struct PodDevices {
    programs: DevicePrograms,
    /// By index; each was given the programs by this daemon.
    attached: BTreeMap<u32, Device>,
}

impl PodDevices {
    /// At none yet.
    pub fn new(programs: DevicePrograms) -> Self {
        Self {
            programs,
            attached: BTreeMap::new(),
        }
    }

    /// Those for devices where they have to be linked like at other devices.
    pub fn programs(&self) -> &DevicePrograms {
        &self.programs
    }

    /// Sees to it that the programs run at these devices. Those that are gone took theirs along.
    ///
    /// # Errors
    /// The kernel's, of the first device where that failed; the others are seen to all the same.
    pub fn attach(&mut self, pods: &[&PodDevice]) -> Result<()> {
        let wanted: BTreeSet<u32> = pods.iter().map(|pod| pod.device.index).collect();
        self.attached.retain(|index, _| wanted.contains(index));
        let new: Vec<_> = pods
            .iter()
            .map(|pod| &pod.device)
            .filter(|device| self.attached.get(&device.index) != Some(device))
            .cloned()
            .collect();
        if new.is_empty() {
            return Ok(());
        }
        let mut netlink = Netlink::open()?;
        let mut result = Ok(());
        for device in new {
            match self.attach_one(&mut netlink, &device) {
                Ok(()) => {
                    self.attached.insert(device.index, device);
                }
                // It went meanwhile: the next look at the node will not find it.
                Err(error) if error.is(libc::ENODEV) => {}
                Err(error) => {
                    let error = anyhow::Error::new(error).context(format!("device {}", device.name));
                    result = result.and(Err(error));
                }
            }
        }
        result
    }

    fn attach_one(&self, netlink: &mut Netlink, device: &Device) -> Result<(), NetlinkError> {
        let DevicePrograms { incoming, outgoing } = &self.programs;
        netlink.batch(&[
            requests::make_clsact(&device.name, device.index),
            filter(device, WAY_IN, INCOMING, incoming.as_fd().as_raw_fd()),
            filter(device, WAY_OUT, OUTGOING, outgoing.as_fd().as_raw_fd()),
        ])?;
        Ok(())
    }

    /// Puts the programs back where somebody took them away; says at how many devices.
    ///
    /// # Errors
    /// The kernel's.
    pub fn audit(&mut self) -> Result<usize> {
        let mut netlink = Netlink::open()?;
        let mut mended = 0;
        for device in self.attached.values() {
            match filters(&mut netlink, device) {
                Ok([true, true]) => {}
                Ok(_) => match self.attach_one(&mut netlink, device) {
                    Ok(()) => mended += 1,
                    Err(error) if error.is(libc::ENODEV) => {}
                    Err(error) => return Err(error).context(format!("device {}", device.name)),
                },
                Err(error) if error.is(libc::ENODEV) => {}
                Err(error) => return Err(error).context(format!("device {}", device.name)),
            }
        }
        Ok(mended)
    }
}

/// Takes the programs off every pod's device. The qdisc stays: taking it away would stop the device for a moment, and it
/// goes with the device.
///
/// # Errors
/// The kernel's.
pub(super) fn detach_all() -> Result<()> {
    let mut netlink = Netlink::open()?;
    let links = netlink.batch(&[requests::list_links(InfoKind::Veth)])?;
    for link in links {
        let RouteNetlinkMessage::NewLink(link) = link else {
            continue;
        };
        let device = device_of(&link);
        if !device.name.starts_with(DEVICE_PREFIX) {
            continue;
        }
        let found = match filters(&mut netlink, &device) {
            Ok(found) => found,
            Err(error) if error.is(libc::ENODEV) => continue,
            Err(error) => return Err(error).context(format!("device {}", device.name)),
        };
        for (there, way) in found.into_iter().zip([WAY_IN, WAY_OUT]) {
            if there {
                gone_is_fine(netlink.batch(&[unfilter(&device, way)]))?;
            }
        }
    }
    Ok(())
}

fn gone_is_fine<T>(result: Result<T, NetlinkError>) -> Result<()> {
    match result {
        Err(error) if !error.is(libc::ENODEV) && !error.is(libc::ENOENT) && !error.is(libc::EINVAL) => {
            Err(error.into())
        }
        _ => Ok(()),
    }
}

/// Whether ours are there, on the way in and on the way out.
fn filters(netlink: &mut Netlink, device: &Device) -> Result<[bool; 2], NetlinkError> {
    let mut found = [false; 2];
    for ((way, name), found) in [(WAY_IN, INCOMING), (WAY_OUT, OUTGOING)]
        .into_iter()
        .zip(&mut found)
    {
        let listed = list(netlink, device, way)?;
        *found = listed.iter().any(|message| is_called(message, name));
    }
    Ok(found)
}

/// The filters on one way; none where there is no qdisc to have any.
fn list(netlink: &mut Netlink, device: &Device, way: TcHandle) -> Result<Vec<TcMessage>, NetlinkError> {
    let mut message = about(device);
    message.header.parent = way;
    let answers = netlink.batch(&[Request {
        doing: format!("listing the filters at {}", device.name),
        message: RouteNetlinkMessage::GetTrafficFilter(message),
        kind: Kind::List,
        tolerated: &[libc::EINVAL, libc::ENOENT],
    }])?;
    Ok(answers
        .into_iter()
        .filter_map(|answer| match answer {
            RouteNetlinkMessage::NewTrafficFilter(message) => Some(message),
            _ => None,
        })
        .filter(|message| message.header.handle != TcHandle::UNSPEC)
        .collect())
}

fn is_called(message: &TcMessage, name: &str) -> bool {
    message.attributes.iter().any(|attribute| {
        matches!(attribute, TcAttribute::Options(options)
        if options.iter().any(|option| {
            matches!(option, TcOption::Bpf(TcFilterBpfOption::ProgName(found)) if found == name)
        }))
    })
}

fn about(device: &Device) -> TcMessage {
    TcMessage::with_index(i32::try_from(device.index).unwrap_or(i32::MAX))
}

/// Runs the program on what takes this way, in place of a former one's.
fn filter(device: &Device, way: TcHandle, name: &str, program: i32) -> Request {
    let mut message = about(device);
    message.header.parent = way;
    message.header.handle = HANDLE;
    message.header.info = FIRST;
    let options = [
        TcFilterBpfOption::ProgFd(program.cast_unsigned()),
        TcFilterBpfOption::ProgName(name.to_owned()),
        // What the program returns is what becomes of the packet.
        TcFilterBpfOption::Flags(TcBpfFlags::DirectAction),
    ];
    message.attributes = vec![
        TcAttribute::Kind(TcFilterBpf::KIND.to_owned()),
        TcAttribute::Options(options.map(TcOption::Bpf).into()),
    ];
    Request {
        doing: format!("attaching {name} to {}", device.name),
        message: RouteNetlinkMessage::NewTrafficFilter(message),
        kind: Kind::Put,
        tolerated: &[],
    }
}

fn unfilter(device: &Device, way: TcHandle) -> Request {
    let mut message = about(device);
    message.header.parent = way;
    message.header.handle = HANDLE;
    message.header.info = FIRST;
    message.attributes = vec![TcAttribute::Kind(TcFilterBpf::KIND.to_owned())];
    Request {
        doing: format!("detaching a program from {}", device.name),
        message: RouteNetlinkMessage::DelTrafficFilter(message),
        kind: Kind::Act,
        tolerated: &[],
    }
}
