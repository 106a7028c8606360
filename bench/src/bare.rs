//! The limit: a process that does the kernel work of one ADD or DEL and nothing else. It reads no config, keeps no
//! addresses, looks for no leftovers and undoes nothing.
//!
//! Started by the bench as itself with [`VERB`] as first argument.

use std::net::{IpAddr, Ipv4Addr};
use std::os::fd::AsFd;
use std::path::Path;
use std::process::ExitCode;

use sluice_cni::error::{Code, Failure};
use sluice_cni::mac::Mac;
use sluice_cni::names::GATEWAY_V4;
use sluice_cni::netlink::Netlink;
use sluice_cni::netns::Netns;
use sluice_cni::requests::{self, End};
use sluice_cni::wiring::only_link;

/// First argument of a process that is this contender.
pub const VERB: &str = "bare";

const MTU: u32 = 1450;
const HOST_MAC: Mac = Mac::from_bytes([0x02, 0, 0, 0, 0, 1]);
const POD_MAC: Mac = Mac::from_bytes([0x02, 0, 0, 0, 0, 2]);

/// Does the work if this process is to, as `bare add DEVICE NETNS ADDRESS`, `bare del DEVICE` or `bare nothing`.
pub fn process() -> Option<ExitCode> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let (VERB, rest) = arguments.split_first().map(|(verb, rest)| (*verb, rest))? else {
        return None;
    };
    let done = match rest {
        ["nothing"] => Ok(()),
        ["add", device, netns, address] => address
            .parse()
            .map_err(|_| Failure::new(Code::Environment, format!("{address:?} is no IPv4 address")))
            .and_then(|address| add(device, Path::new(netns), address)),
        ["del", device] => del(device),
        _ => Err(Failure::new(Code::Environment, "bare takes add, del or nothing")),
    };
    Some(match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            eprintln!("sluice-bench: {failure}");
            ExitCode::FAILURE
        }
    })
}

fn add(device: &str, netns: &Path, address: Ipv4Addr) -> Result<(), Failure> {
    let address = IpAddr::from(address);
    let netns = Netns::open(netns)?;
    let mut host = Netlink::open()?;
    let end = |name, mac| End { name, mac };
    let answers = host.batch(&[
        requests::make_pair(&end(device, HOST_MAC), &end("eth0", POD_MAC), netns.as_fd(), MTU),
        requests::set_up(device),
        requests::get_link(device),
    ])?;
    let link = only_link(&answers)
        .ok_or_else(|| Failure::new(Code::Kernel, format!("{device} was made but is not there")))?;
    let (index, peer) = (link.index, link.peer);
    let inside = netns.enter()?;
    let mut pod = Netlink::open()?;
    let gateway = IpAddr::from(GATEWAY_V4);
    pod.batch(&[
        requests::set_up("lo"),
        requests::set_up("eth0"),
        requests::add_address("eth0", peer, address),
        requests::add_neighbour("eth0", peer, gateway, HOST_MAC),
        requests::add_default_route("eth0", peer, gateway),
    ])?;
    drop(inside);
    host.batch(&[
        requests::add_neighbour(device, index, address, POD_MAC),
        requests::add_host_route(device, index, address),
    ])?;
    Ok(())
}

fn del(device: &str) -> Result<(), Failure> {
    Netlink::open()?.batch(&[requests::remove_link(device, None)])?;
    Ok(())
}
