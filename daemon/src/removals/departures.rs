//! Waiting until devices are gone, and not for what the kernel does after that.
//!
//! Who removes a device gets his answer when all its memory may be freed, after grace periods of RCU: 16 to 20 ms. The device itself is gone
//! after a tenth of that: it is closed, in no list, without routes and neighbours, all that were just using it have ended, and the kernel has told
//! who listens (`RTM_DELLINK`). The rest happens without the lock on network configuration and is of no matter to anybody
//! (net/core/dev.c, `unregister_netdevice_many_notify`, then `netdev_run_todo`); a thread waits for it here.

use std::collections::BTreeSet;
use std::io::{self, ErrorKind, PipeReader};
use std::os::fd::AsFd;
use std::sync::{Arc, mpsc};
use std::thread;

use netlink_packet_core::NetlinkBuffer;
use netlink_packet_route::AddressFamily;
use netlink_packet_route::link::LinkHeader;
use netlink_sys::Socket;
use netlink_sys::protocols::NETLINK_ROUTE;
use nix::libc::{RTM_DELLINK, RTNLGRP_LINK};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use sluice_cni::netlink::{Netlink, NetlinkError, Request};

/// Most threads that wait for the kernel at the same time. With as many, what comes next is waited for to its end.
const MOST: usize = 16;

/// Larger than what the kernel says of one device.
const NEWS: usize = 64 * 1024;

type Outcome = Result<(), NetlinkError>;

/// Devices on their way out.
#[derive(Debug, Default)]
pub struct Departures {
    /// Each thread that waits for the kernel has a share of it.
    waiting: Arc<()>,
}

impl Departures {
    /// Carries out `request`, which removes `devices` (by index) in the calling thread's network namespace. When it returns, they are gone.
    ///
    /// # Errors
    /// The kernel refused something; any of them may be left.
    pub fn remove(&self, request: Request, mut devices: BTreeSet<u32>) -> Outcome {
        let crowded = Arc::strong_count(&self.waiting) > MOST;
        // Before anything is asked for, so that nothing is missed. Who cannot listen waits for the kernel.
        let news = if crowded { None } else { listen().ok() };
        let starting = |error| failed("starting a thread that removes devices", error);
        let (ended, end) = io::pipe().map_err(starting)?;
        let (sender, outcome) = mpsc::sync_channel(1);
        let share = Arc::clone(&self.waiting);
        let removing = move || {
            let done = Netlink::open().and_then(|mut socket| socket.batch(&[request]));
            // Nobody waits for it any more when all are gone.
            _ = sender.send(done.map(drop));
            drop((share, end));
        };
        let thread = thread::Builder::new().name("removal".to_owned());
        thread.spawn(removing).map_err(starting)?;
        if news.is_some_and(|news| see_off(&news, &ended, &mut devices).is_ok()) && devices.is_empty() {
            return Ok(());
        }
        outcome
            .recv()
            .unwrap_or_else(|error| Err(failed("removing devices", io::Error::other(error))))
    }
}

/// A socket on which the kernel tells of devices that come, change and go.
fn listen() -> io::Result<Socket> {
    let mut socket = Socket::new(NETLINK_ROUTE)?;
    socket.bind_auto()?;
    socket.add_membership(RTNLGRP_LINK)?;
    socket.set_non_blocking(true)?;
    Ok(socket)
}

/// Takes from `devices` what is gone, until all are or the other side of `ended` is closed.
///
/// # Errors
/// What the kernel said is lost, as when it said too much at once.
fn see_off(news: &Socket, ended: &PipeReader, devices: &mut BTreeSet<u32>) -> io::Result<()> {
    let mut said = Vec::with_capacity(NEWS);
    while !devices.is_empty() {
        let mut fds = [
            PollFd::new(news.as_fd(), PollFlags::POLLIN),
            PollFd::new(ended.as_fd(), PollFlags::empty()),
        ];
        match poll(&mut fds, PollTimeout::NONE) {
            Ok(_) | Err(nix::Error::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
        let is_over = fds[1].any().unwrap_or(true);
        loop {
            said.clear();
            match news.recv(&mut said, 0) {
                Ok(_) => departed(&said).for_each(|index| _ = devices.remove(&index)),
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) => return Err(error),
            }
        }
        if is_over {
            break;
        }
    }
    Ok(())
}

/// The devices that a datagram says are gone.
fn departed(mut said: &[u8]) -> impl Iterator<Item = u32> {
    std::iter::from_fn(move || {
        let header = NetlinkBuffer::new_checked(said).ok()?;
        let (kind, link) = (header.message_type(), LinkHeader::parse(header.payload()));
        let length = (header.length() as usize).next_multiple_of(4);
        said = said.get(length..).unwrap_or_default();
        Some(link.ok().filter(|link| {
            // Bridges say the same of ports that leave them.
            kind == RTM_DELLINK && link.interface_family == AddressFamily::Unspec
        }))
    })
    .flatten()
    .map(|link| link.index)
}

fn failed(doing: &str, source: io::Error) -> NetlinkError {
    NetlinkError {
        position: 0,
        doing: doing.to_owned(),
        source,
        hint: String::new(),
    }
}
