//! Sockets of this network namespace that are connected already when a Service changes.
//!
//! A connected UDP socket sends wherever it was connected to, without asking again. One that talks to an endpoint its
//! Service has lost, or to a frontend from before it was one, is destroyed: its next call fails, and the client connects
//! anew. Sockets of other network namespaces (pods) are out of reach from here.

use std::collections::BTreeSet;
use std::io;
use std::os::fd::AsRawFd;

use anyhow::{Context, Result};
use bytemuck::{Pod, Zeroable};
use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_SOCK_DIAG};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};
use sluice_ebpf_types::{Address, FrontendKey, PeerKey, UDP};

use super::services::{Services, Upheaval};
use super::tables::Tables;

/// Message types of sock_diag(7).
const SOCK_DIAG_BY_FAMILY: u16 = 20;
const SOCK_DESTROY: u16 = 21;
/// `TCP_ESTABLISHED`, which a connected UDP socket is said to be in, as a bit.
const CONNECTED: u32 = 1 << 1;

/// `struct nlmsghdr`, include/uapi/linux/netlink.h; host order.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct Header {
    length: u32,
    kind: u16,
    flags: u16,
    sequence: u32,
    port: u32,
}

/// `struct inet_diag_sockid`, include/uapi/linux/inet_diag.h; ports and addresses in network order.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct SocketId {
    source_port: u16,
    destination_port: u16,
    source: [u32; 4],
    destination: [u32; 4],
    interface: u32,
    cookie: [u32; 2],
}

/// `struct inet_diag_req_v2`, behind its header.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct Request {
    header: Header,
    family: u8,
    protocol: u8,
    extensions: u8,
    zero: u8,
    states: u32,
    id: SocketId,
}

/// The head of `struct inet_diag_msg`.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct Message {
    family: u8,
    state: u8,
    timer: u8,
    retransmits: u8,
    id: SocketId,
}

impl SocketId {
    fn peer(&self, family: u8) -> Address {
        if i32::from(family) == libc::AF_INET {
            Address::v4(self.destination[0])
        } else {
            Address {
                words: self.destination,
            }
        }
    }

    fn cookie(&self) -> u64 {
        u64::from(self.cookie[1]) << 32 | u64::from(self.cookie[0])
    }
}

/// The cookie of the network namespace this thread is in (`SO_NETNS_COOKIE`, Linux 5.14).
pub(super) fn netns_cookie() -> Result<u64> {
    let socket = socket(
        AddressFamily::Inet,
        SockType::Datagram,
        SockFlag::SOCK_CLOEXEC,
        None,
    )
    .context("opening a socket to ask for the network namespace's cookie")?;
    let mut cookie = 0_u64;
    let mut length = size_of::<u64>() as libc::socklen_t;
    // SAFETY: the kernel writes at most `length` bytes, the size of `cookie`, and both outlive the call.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_NETNS_COOKIE,
            (&raw mut cookie).cast(),
            &raw mut length,
        )
    };
    if result < 0 {
        return Err(io::Error::last_os_error()).context("asking for the network namespace's cookie");
    }
    Ok(cookie)
}

/// Destroys the connected UDP sockets a change has left talking to the wrong place.
pub(super) fn destroy_stale(tables: &Tables, services: &Services, upheaval: &Upheaval) -> Result<()> {
    let mut doomed = Vec::new();
    for family in [libc::AF_INET, libc::AF_INET6] {
        for message in connected(family as u8)? {
            if is_stale(&message, tables, services, &upheaval.new_udp_frontends)? {
                doomed.push(message);
            }
        }
    }
    for message in doomed {
        match destroy(&message) {
            Ok(()) => {
                tracing::info!(peer = %message.id.peer(message.family).to_ip(), "UDP socket closed: its endpoint went")
            }
            // Gone by itself meanwhile.
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => {}
            // A kernel without CONFIG_INET_DIAG_DESTROY: the client's own time-out must do.
            Err(error) => tracing::warn!(%error, "cannot close a UDP socket whose endpoint went"),
        }
    }
    Ok(())
}

fn is_stale(
    message: &Message,
    tables: &Tables,
    services: &Services,
    new_frontends: &BTreeSet<FrontendKey>,
) -> Result<bool> {
    let address = message.id.peer(message.family);
    let port = message.id.destination_port;
    let key = PeerKey {
        cookie: message.id.cookie(),
        address,
        port,
        zero: [0; 3],
    };
    Ok(match tables.peers.get(&key)? {
        Some(named) => {
            let frontend = FrontendKey {
                address: named.address,
                port: named.port,
                protocol: named.protocol,
                zero: 0,
            };
            !services.leads_to(&frontend, address, port)
        }
        None => new_frontends.contains(&FrontendKey {
            address,
            port,
            protocol: UDP,
            zero: 0,
        }),
    })
}

fn request(kind: u16, flags: i32, family: u8, id: SocketId) -> Request {
    Request {
        header: Header {
            length: size_of::<Request>() as u32,
            kind,
            flags: (libc::NLM_F_REQUEST | flags) as u16,
            sequence: 1,
            port: 0,
        },
        family,
        protocol: UDP,
        extensions: 0,
        zero: 0,
        states: CONNECTED,
        id,
    }
}

fn diag() -> io::Result<Socket> {
    let mut socket = Socket::new(NETLINK_SOCK_DIAG)?;
    socket.bind_auto()?;
    socket.connect(&SocketAddr::new(0, 0))?;
    Ok(socket)
}

/// All connected UDP sockets of one family.
fn connected(family: u8) -> Result<Vec<Message>> {
    let socket = diag().context("opening a sock_diag socket")?;
    let dump = request(SOCK_DIAG_BY_FAMILY, libc::NLM_F_DUMP, family, SocketId::zeroed());
    socket
        .send(bytemuck::bytes_of(&dump), 0)
        .context("asking for UDP sockets")?;
    let mut found = Vec::new();
    loop {
        let (answer, _) = socket.recv_from_full().context("reading UDP sockets")?;
        let mut rest = answer.as_slice();
        while let Some((header, body)) = split(rest) {
            match i32::from(header.kind) {
                libc::NLMSG_DONE => return Ok(found),
                libc::NLMSG_ERROR => {
                    return Err(error_of(body))
                        .context("listing UDP sockets; has the kernel CONFIG_INET_UDP_DIAG?");
                }
                _ if body.len() >= size_of::<Message>() => {
                    found.push(bytemuck::pod_read_unaligned(&body[..size_of::<Message>()]));
                }
                _ => {}
            }
            rest = rest
                .get((header.length as usize).next_multiple_of(4)..)
                .unwrap_or_default();
        }
    }
}

fn destroy(message: &Message) -> io::Result<()> {
    let socket = diag()?;
    let order = request(SOCK_DESTROY, libc::NLM_F_ACK, message.family, message.id);
    socket.send(bytemuck::bytes_of(&order), 0)?;
    let (answer, _) = socket.recv_from_full()?;
    let (_, body) = split(&answer).ok_or_else(|| io::Error::other("no answer to SOCK_DESTROY"))?;
    let error = error_of(body);
    if error.raw_os_error() == Some(0) {
        Ok(())
    } else {
        Err(error)
    }
}

/// The first message's header, and what is behind it.
fn split(bytes: &[u8]) -> Option<(Header, &[u8])> {
    let head = bytes.get(..size_of::<Header>())?;
    let header: Header = bytemuck::pod_read_unaligned(head);
    let body = bytes.get(size_of::<Header>()..header.length as usize)?;
    Some((header, body))
}

/// What a `struct nlmsgerr` says; 0 is an acknowledgement.
fn error_of(body: &[u8]) -> io::Error {
    let code = body
        .get(..4)
        .map_or(-libc::EPROTO, bytemuck::pod_read_unaligned::<i32>);
    io::Error::from_raw_os_error(-code)
}
