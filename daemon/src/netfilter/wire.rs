//! nfnetlink: messages to nf_tables and conntrack, and what they answer. Owns the wire format of requests, batches and dumps
//! (include/uapi/linux/netfilter/nfnetlink.h); what the attributes mean is others'.

use std::io;
use std::os::fd::AsFd;

use anyhow::{Context, Result};
use netlink_packet_core::{NlaBuffer, NlasIterator};
use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_NETFILTER};
use nix::sys::socket::{setsockopt, sockopt};

/// `NFNL_SUBSYS_NFTABLES`.
pub const NFTABLES: u8 = 10;
/// `NFNL_SUBSYS_CTNETLINK`.
pub const CONNTRACK: u8 = 1;
/// `NFPROTO_INET`.
pub const INET: u8 = 1;

/// `NFNL_MSG_BATCH_BEGIN` and `NFNL_MSG_BATCH_END`.
const BATCH_BEGIN: u16 = 0x10;
const BATCH_END: u16 = 0x11;
/// `struct nlmsghdr`, then `struct nfgenmsg`, bytes.
const HEADER: usize = 16;
const GENERAL: usize = 4;
/// Room for a batch on its way: that of all Services at once.
const SEND_ROOM: usize = 64 << 20;
/// Room for answers on their way.
const RECEIVE_ROOM: usize = 4 << 20;

/// Attributes in the making.
#[derive(Debug, Default, Clone)]
pub struct Attributes(Vec<u8>);

impl Attributes {
    /// One of these bytes.
    pub fn put(&mut self, kind: u16, value: &[u8]) -> &mut Self {
        let at = self.begin(kind);
        self.0.extend_from_slice(value);
        self.end(at);
        self
    }

    /// A string, with its zero.
    pub fn put_str(&mut self, kind: u16, value: &str) -> &mut Self {
        let at = self.begin(kind);
        self.0.extend_from_slice(value.as_bytes());
        self.0.push(0);
        self.end(at);
        self
    }

    /// One that holds others.
    pub fn nest(&mut self, kind: u16, fill: impl FnOnce(&mut Self)) -> &mut Self {
        let at = self.begin(kind | libc::NLA_F_NESTED as u16);
        fill(self);
        self.end(at);
        self
    }

    /// All of these.
    pub fn append(&mut self, others: &Self) {
        self.0.extend_from_slice(&others.0);
    }

    /// Length so far, bytes.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    fn begin(&mut self, kind: u16) -> usize {
        let at = self.0.len();
        self.0.extend_from_slice(&[0, 0]);
        self.0.extend_from_slice(&kind.to_ne_bytes());
        at
    }

    fn end(&mut self, at: usize) {
        let length = (self.0.len() - at) as u16;
        self.0[at..at + 2].copy_from_slice(&length.to_ne_bytes());
        self.0.resize(self.0.len().next_multiple_of(4), 0);
    }
}

/// The attributes in `bytes`: kind without flags, and value. What is cut short is passed over.
pub fn attributes(bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    NlasIterator::new(bytes)
        .map_while(Result::ok)
        .map(|attribute: NlaBuffer<&[u8]>| {
            let kind = attribute.kind() & libc::NLA_TYPE_MASK as u16;
            let end = usize::from(attribute.length());
            // What it was made of goes on behind its end.
            let value = attribute.into_inner().get(4..end).unwrap_or_default();
            (kind, value)
        })
}

/// The first attribute of a kind.
pub fn attribute(bytes: &[u8], kind: u16) -> Option<&[u8]> {
    attributes(bytes)
        .find(|(found, _)| *found == kind)
        .map(|(_, value)| value)
}

/// A zero-ended string.
pub fn string(value: &[u8]) -> String {
    let end = value.iter().position(|byte| *byte == 0).unwrap_or(value.len());
    String::from_utf8_lossy(&value[..end]).into_owned()
}

/// Messages that nf_tables applies together, or none of them.
#[derive(Debug, Default)]
pub struct Batch {
    bytes: Vec<u8>,
}

impl Batch {
    /// Adds a message of nf_tables.
    pub fn push(&mut self, message: u16, flags: i32, attributes: &Attributes) {
        let kind = u16::from(NFTABLES) << 8 | message;
        append(&mut self.bytes, kind, flags, INET, 0, &attributes.0);
    }

    /// Whether there is nothing in it.
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }
}

fn append(bytes: &mut Vec<u8>, kind: u16, flags: i32, family: u8, resource: u16, body: &[u8]) {
    let length = (HEADER + GENERAL + body.len()) as u32;
    bytes.extend_from_slice(&length.to_ne_bytes());
    bytes.extend_from_slice(&kind.to_ne_bytes());
    bytes.extend_from_slice(&((libc::NLM_F_REQUEST | flags) as u16).to_ne_bytes());
    // Sequence and port: the answers to one request at a time need no telling apart.
    bytes.extend_from_slice(&[0; 8]);
    bytes.extend_from_slice(&[family, 0]);
    bytes.extend_from_slice(&resource.to_be_bytes());
    bytes.extend_from_slice(body);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
}

/// A table's rules as the kernel shows them, in order, each with a number that no later one has again.
pub type Rules = Vec<Vec<u8>>;

/// A way to talk to netfilter.
pub struct Netfilter(Socket);

impl Netfilter {
    /// Opens it.
    ///
    /// # Errors
    /// The kernel has no nfnetlink, or no room.
    pub fn open() -> Result<Self> {
        let mut socket = Socket::new(NETLINK_NETFILTER).context("opening a netlink socket to netfilter")?;
        socket
            .bind_auto()
            .context("binding a netlink socket to netfilter")?;
        socket
            .connect(&SocketAddr::new(0, 0))
            .context("connecting a netlink socket to netfilter")?;
        let descriptor = socket.as_fd();
        setsockopt(&descriptor, sockopt::SndBufForce, &SEND_ROOM).context("making room for batches")?;
        setsockopt(&descriptor, sockopt::RcvBufForce, &RECEIVE_ROOM).context("making room for answers")?;
        Ok(Self(socket))
    }

    /// Applies a batch, all of it or nothing.
    ///
    /// # Errors
    /// The kernel's: the first message's that it refused.
    pub fn apply(&self, batch: Batch) -> io::Result<()> {
        if batch.is_empty() {
            return Ok(());
        }
        let mut bytes = Vec::with_capacity(batch.bytes.len() + 2 * (HEADER + GENERAL));
        append(&mut bytes, BATCH_BEGIN, 0, 0, u16::from(NFTABLES), &[]);
        bytes.extend_from_slice(&batch.bytes);
        append(&mut bytes, BATCH_END, 0, 0, u16::from(NFTABLES), &[]);
        self.0.send(&bytes, 0)?;
        // What is wrong is said before sending returns; of what went well nothing is said.
        let mut refused = None;
        loop {
            match self.receive(libc::MSG_DONTWAIT) {
                Ok(answer) => {
                    for (kind, body) in messages(&answer) {
                        if i32::from(kind) == libc::NLMSG_ERROR {
                            let error = error_of(body);
                            if error.raw_os_error() != Some(0) {
                                refused.get_or_insert(error);
                            }
                        }
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) => return Err(error),
            }
        }
        refused.map_or(Ok(()), Err)
    }

    /// All objects that a dump gives, each as the family of its message and its attributes.
    ///
    /// # Errors
    /// The kernel's; an object that is not there is `ENOENT`.
    pub fn dump(
        &self,
        subsystem: u8,
        message: u16,
        family: u8,
        attributes: &Attributes,
        mut each: impl FnMut(u8, &[u8]),
    ) -> io::Result<()> {
        let kind = u16::from(subsystem) << 8 | message;
        // The tables may change in the middle of it: then it begins anew.
        for _ in 0..10 {
            let mut gathered: Vec<(u8, Vec<u8>)> = Vec::new();
            let mut request = Vec::new();
            append(&mut request, kind, libc::NLM_F_DUMP, family, 0, &attributes.0);
            self.0.send(&request, 0)?;
            if self.gather(&mut gathered)? {
                gathered.iter().for_each(|(family, body)| each(*family, body));
                return Ok(());
            }
        }
        Err(io::Error::other("the tables change faster than they can be read"))
    }

    /// Reads a dump's answers to their end; false if it was interrupted.
    fn gather(&self, gathered: &mut Vec<(u8, Vec<u8>)>) -> io::Result<bool> {
        let mut whole = true;
        loop {
            let answer = self.receive(0)?;
            for (kind, body) in messages(&answer) {
                match i32::from(kind) {
                    libc::NLMSG_DONE => return Ok(whole),
                    libc::NLMSG_ERROR => {
                        let error = error_of(body);
                        if error.raw_os_error() == Some(libc::EINTR) {
                            return Ok(false);
                        }
                        return Err(error);
                    }
                    _ => {
                        if let (Some(family), Some(rest)) = (body.first(), body.get(GENERAL..)) {
                            gathered.push((*family, rest.to_vec()));
                        }
                    }
                }
            }
            whole &= !is_interrupted(&answer);
        }
    }

    /// Makes one request and waits until it is done.
    ///
    /// # Errors
    /// The kernel's.
    pub fn request(
        &self,
        subsystem: u8,
        message: u16,
        family: u8,
        attributes: &Attributes,
    ) -> io::Result<()> {
        let mut request = Vec::new();
        let kind = u16::from(subsystem) << 8 | message;
        append(&mut request, kind, libc::NLM_F_ACK, family, 0, &attributes.0);
        self.0.send(&request, 0)?;
        let answer = self.receive(0)?;
        for (kind, body) in messages(&answer) {
            if i32::from(kind) == libc::NLMSG_ERROR {
                let error = error_of(body);
                return match error.raw_os_error() {
                    Some(0) => Ok(()),
                    _ => Err(error),
                };
            }
        }
        Err(io::Error::other("no acknowledgement"))
    }

    /// How often the namespace's nf_tables were changed, whoever did; it begins anew after all numbers (`NFT_MSG_GETGEN`).
    ///
    /// # Errors
    /// The kernel's.
    pub fn generation(&self) -> io::Result<u32> {
        /// `NFT_MSG_GETGEN`, `NFTA_GEN_ID`.
        const GET_GENERATION: u16 = 16;
        const ID: u16 = 1;
        let mut request = Vec::new();
        append(
            &mut request,
            u16::from(NFTABLES) << 8 | GET_GENERATION,
            0,
            0,
            0,
            &[],
        );
        self.0.send(&request, 0)?;
        let answer = self.receive(0)?;
        let (kind, body) = messages(&answer)
            .next()
            .ok_or_else(|| io::Error::other("an empty answer"))?;
        if i32::from(kind) == libc::NLMSG_ERROR {
            return Err(error_of(body));
        }
        let id = attribute(body.get(GENERAL..).unwrap_or_default(), ID);
        id.and_then(|id| id.try_into().ok())
            .map(u32::from_be_bytes)
            .ok_or_else(|| io::Error::other("an answer without a number"))
    }

    /// The rules of the table called `table`, of the family `inet`; none if there is no such table.
    ///
    /// # Errors
    /// The kernel's.
    pub fn rules(&self, table: &str) -> io::Result<Rules> {
        /// `NFT_MSG_GETRULE`, `NFTA_RULE_TABLE`.
        const GET_RULE: u16 = 7;
        const RULE_TABLE: u16 = 1;
        let mut of_table = Attributes::default();
        of_table.put_str(RULE_TABLE, table);
        let mut rules = Rules::new();
        self.dump(NFTABLES, GET_RULE, INET, &of_table, |_, rule| {
            rules.push(rule.to_vec())
        })?;
        Ok(rules)
    }

    fn receive(&self, flags: i32) -> io::Result<Vec<u8>> {
        let mut answer = Vec::with_capacity(1 << 16);
        self.0.recv(&mut answer, flags)?;
        Ok(answer)
    }
}

/// Kinds and bodies, behind `struct nlmsghdr`.
fn messages(bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    let mut rest = bytes;
    std::iter::from_fn(move || {
        let (length, kind, _) = head(rest)?;
        let body = rest.get(HEADER..length)?;
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, body))
    })
}

fn is_interrupted(bytes: &[u8]) -> bool {
    head(bytes).is_some_and(|(_, _, flags)| i32::from(flags) & libc::NLM_F_DUMP_INTR != 0)
}

fn head(bytes: &[u8]) -> Option<(usize, u16, u16)> {
    let length = u32::from_ne_bytes(bytes.get(..4)?.try_into().ok()?) as usize;
    let kind = u16::from_ne_bytes(bytes.get(4..6)?.try_into().ok()?);
    let flags = u16::from_ne_bytes(bytes.get(6..8)?.try_into().ok()?);
    Some((length, kind, flags))
}

/// What a `struct nlmsgerr` says; 0 is an acknowledgement.
fn error_of(body: &[u8]) -> io::Error {
    let code = body
        .get(..4)
        .and_then(|code| code.try_into().ok())
        .map_or(-libc::EPROTO, i32::from_ne_bytes);
    io::Error::from_raw_os_error(-code)
}
