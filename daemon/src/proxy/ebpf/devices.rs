//! The programs at the devices by which other hosts' packets come and go.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};

use super::entries;
use super::link::{self, Hook, Target};
use super::object::DevicePrograms;
use crate::network::Device;

/// What to attach, and where its links are pinned.
pub(super) struct Devices {
    pins: PathBuf,
    ethernet: DevicePrograms,
    raw: DevicePrograms,
}

impl Devices {
    /// Links are to be pinned in `pins`.
    pub fn new(pins: PathBuf, ethernet: DevicePrograms, raw: DevicePrograms) -> Self {
        Self { pins, ethernet, raw }
    }

    /// Sees to it that the programs run at these devices, and those for pods at `pods`, and none at any other.
    ///
    /// # Errors
    /// The kernel's; the other devices are seen to all the same.
    pub fn attach(&self, devices: &[Device], pods: &[&Device], pod: &DevicePrograms) -> Result<()> {
        fs::create_dir_all(&self.pins).with_context(|| format!("creating {}", self.pins.display()))?;
        let mut wanted = BTreeSet::new();
        let mut result = Ok(());
        let own = devices.iter().map(|device| (device, self.programs(device)));
        let pods = pods.iter().map(|device| (*device, Ok(pod)));
        let all: Vec<_> = own.chain(pods).collect();
        // The ways out first, of all devices: what is translated as it comes in is answered by any of them, and each takes the kernel a while.
        for (end, hook) in [("out", Hook::TcxEgress), ("in", Hook::TcxIngress)] {
            for (device, programs) in &all {
                let pin = pin(&self.pins, end, &device.name);
                let attached = programs
                    .as_ref()
                    .map_err(|error| anyhow!("{error:#}"))
                    .and_then(|programs| {
                        let program = if hook == Hook::TcxIngress {
                            &programs.incoming
                        } else {
                            &programs.outgoing
                        };
                        link::ensure(&pin, program.as_fd(), Target::Device(device.index), hook)
                    });
                wanted.insert(pin);
                result = result.and(attached.with_context(|| format!("device {}", device.name)));
            }
        }
        for pin in entries(&self.pins)? {
            if !wanted.contains(&pin) {
                result = result.and(link::remove(&pin));
            }
        }
        result
    }

    fn programs(&self, device: &Device) -> Result<&DevicePrograms> {
        Ok(if is_ethernet(&device.name)? {
            &self.ethernet
        } else {
            &self.raw
        })
    }
}

/// A bpf file system takes no `.` in names, and a device's name has no `:`.
fn pin(directory: &Path, end: &str, device: &str) -> PathBuf {
    directory.join(format!("{end}-{}", device.replace('.', ":")))
}

/// Whether packets of the device have an Ethernet header.
fn is_ethernet(name: &str) -> Result<bool> {
    let socket: OwnedFd = socket(
        AddressFamily::Inet,
        SockType::Datagram,
        SockFlag::SOCK_CLOEXEC,
        None,
    )
    .context("opening a socket to ask about devices")?;
    // SAFETY: all zeroes are a valid `ifreq`.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    anyhow::ensure!(
        name.len() < request.ifr_name.len(),
        "{name:?} is no name of a device"
    );
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from.cast_signed();
    }
    // SAFETY: the request has a NUL-terminated name, as SIOCGIFHWADDR wants, and outlives the call.
    let result = unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCGIFHWADDR, &raw mut request) };
    if result < 0 {
        return Err(io::Error::last_os_error())
            .with_context(|| format!("asking what kind of device {name} is"));
    }
    // SAFETY: after success the kernel has filled in this member of the union.
    let family = unsafe { request.ifr_ifru.ifru_hwaddr.sa_family };
    // The loopback device carries an empty one.
    Ok(matches!(family, libc::ARPHRD_ETHER | libc::ARPHRD_LOOPBACK))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_with_dots_can_be_pinned() {
        assert_eq!(
            pin(Path::new("/p"), "in", "eth0.100"),
            Path::new("/p/in-eth0:100")
        );
    }
}
