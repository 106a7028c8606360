//! Connected UDP sockets of the calling thread's network namespace: listing and destroying them (sock_diag(7)).
//!
//! Owns the wire format alone; which sockets are to go is decided elsewhere.

use std::io;

use anyhow::{Context, Result};
use bytemuck::{Pod, Zeroable};
use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_SOCK_DIAG};
use sluice_ebpf_types::{Address, UDP};

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

/// A UDP socket that has a peer.
#[derive(Clone, Copy)]
pub(super) struct Connected(Message);

impl Connected {
    /// All of them, of both families.
    ///
    /// # Errors
    /// The kernel's: one without CONFIG_INET_UDP_DIAG cannot tell.
    pub fn all() -> Result<Vec<Self>> {
        let mut found = list(libc::AF_INET as u8)?;
        found.extend(list(libc::AF_INET6 as u8)?);
        Ok(found)
    }

    /// Its cookie (`SO_COOKIE`).
    pub fn cookie(&self) -> u64 {
        let [low, high] = self.0.id.cookie;
        u64::from(high) << 32 | u64::from(low)
    }

    /// Its peer's address.
    pub fn peer(&self) -> Address {
        if i32::from(self.0.family) == libc::AF_INET {
            Address::v4(self.0.id.destination[0])
        } else {
            Address {
                words: self.0.id.destination,
            }
        }
    }

    /// Its peer's port, network order.
    pub fn peer_port(&self) -> u16 {
        self.0.id.destination_port
    }

    /// Destroys the socket: whatever is asked of it next fails with `ECONNABORTED`. False if it is gone already.
    ///
    /// # Errors
    /// The kernel's: one without CONFIG_INET_DIAG_DESTROY cannot.
    pub fn destroy(&self) -> io::Result<bool> {
        let socket = diag()?;
        let order = request(SOCK_DESTROY, libc::NLM_F_ACK, self.0.family, self.0.id);
        socket.send(bytemuck::bytes_of(&order), 0)?;
        let (answer, _) = socket.recv_from_full()?;
        let (_, body) = split(&answer).ok_or_else(|| io::Error::other("no answer to SOCK_DESTROY"))?;
        let error = error_of(body);
        match error.raw_os_error() {
            Some(0) => Ok(true),
            Some(libc::ENOENT) => Ok(false),
            _ => Err(error),
        }
    }
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

fn list(family: u8) -> Result<Vec<Connected>> {
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
                    found.push(Connected(bytemuck::pod_read_unaligned(
                        &body[..size_of::<Message>()],
                    )));
                }
                _ => {}
            }
            rest = rest
                .get((header.length as usize).next_multiple_of(4)..)
                .unwrap_or_default();
        }
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
