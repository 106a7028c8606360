//! A netlink socket used synchronously: sends a batch of requests in one write, reads the kernel's answers.
//!
//! Knows nothing of pods: what to ask for is `requests`' matter. The kernel carries out each request before the write
//! returns, so a reader never waits.

use std::fmt;
use std::io;

use netlink_packet_core::{
    Emitable, NLM_F_ACK, NLM_F_ACK_TLVS, NLM_F_CREATE, NLM_F_DUMP, NLM_F_EXCL, NLM_F_REPLACE, NLM_F_REQUEST,
    NLMSG_DONE, NLMSG_ERROR, NetlinkBuffer, NetlinkHeader, NetlinkMessage, NetlinkPayload,
};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_sys::protocols::NETLINK_ROUTE;
use netlink_sys::{Socket, SocketAddr};

/// Larger than any datagram the kernel builds for a dump.
const RECEIVE_BUFFER: usize = 64 * 1024;

/// Type of the attribute of an acknowledgement that holds the kernel's own words (`NLMSGERR_ATTR_MSG`).
const ATTRIBUTE_MESSAGE: u16 = 1;

/// One thing asked of the kernel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Request {
    /// What it does, for an error: "adding the route to 10.244.1.5/32 via sluice0123abcde".
    pub doing: String,
    /// The message.
    pub message: RouteNetlinkMessage,
    /// How it is meant.
    pub kind: Kind,
    /// Answers (`errno`) that are as good as success.
    pub tolerated: &'static [i32],
}

/// How a request is meant.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Make it; fails if it exists.
    Create,
    /// Make it, or make it so.
    Put,
    /// Change or remove what exists.
    Act,
    /// Ask for one thing: the answer is confirmation enough.
    Ask,
    /// Ask for one thing for what the kernel does before it answers: what it answers is not looked at.
    Await,
    /// Ask for all of a sort.
    List,
}

impl Kind {
    /// Whether success is told by an answer.
    fn is_answered(self) -> bool {
        matches!(self, Self::Ask | Self::Await)
    }

    fn flags(self) -> u16 {
        NLM_F_REQUEST
            | match self {
                Self::Create => NLM_F_CREATE | NLM_F_EXCL,
                Self::Put => NLM_F_CREATE | NLM_F_REPLACE,
                Self::Act | Self::Ask | Self::Await => 0,
                Self::List => NLM_F_DUMP,
            }
    }
}

/// A request the kernel refused.
#[derive(Debug)]
pub struct NetlinkError {
    /// Which of the batch.
    pub position: usize,
    /// What it was to do.
    pub doing: String,
    /// The kernel's answer.
    pub source: io::Error,
    /// The kernel's explanation, often empty.
    pub hint: String,
}

impl NetlinkError {
    /// Whether the kernel answered with this `errno`.
    pub fn is(&self, errno: i32) -> bool {
        self.source.raw_os_error() == Some(errno)
    }
}

impl fmt::Display for NetlinkError {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}: {}", self.doing, self.source)?;
        if self.hint.is_empty() {
            return Ok(());
        }
        write!(formatter, " ({})", self.hint)
    }
}

impl std::error::Error for NetlinkError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        Some(&self.source)
    }
}

/// A socket into one network namespace: the one the thread was in when it was opened.
pub struct Netlink {
    socket: Socket,
    sequence: u32,
    buffer: Vec<u8>,
}

impl Netlink {
    /// Opens the socket in the calling thread's network namespace.
    ///
    /// # Errors
    /// The kernel's answer.
    pub fn open() -> Result<Self, NetlinkError> {
        let opened = Socket::new(NETLINK_ROUTE).and_then(|socket| {
            socket.connect(&SocketAddr::new(0, 0))?;
            // Kernels that lack one of these (before 4.20) still do what is asked; they only say less.
            let _ = socket.set_ext_ack(true);
            let _ = socket.set_cap_ack(true);
            let _ = socket.set_netlink_get_strict_chk(true);
            Ok(socket)
        });
        let socket = opened.map_err(|source| failed(0, "opening a netlink socket", source))?;
        Ok(Self {
            socket,
            sequence: 0,
            buffer: Vec::with_capacity(RECEIVE_BUFFER),
        })
    }

    /// Sends all of `requests` in one write and returns what the kernel answered with besides acknowledgements.
    ///
    /// # Errors
    /// The first request refused. The kernel tries the later ones all the same, so undo must look at what is there.
    pub fn batch(&mut self, requests: &[Request]) -> Result<Vec<RouteNetlinkMessage>, NetlinkError> {
        let mut answers = Vec::new();
        self.exchange(requests, |answer| {
            if let NetlinkPayload::InnerMessage(answer) = read(answer)?.payload {
                answers.push(answer);
            }
            Ok(())
        })?;
        Ok(answers)
    }

    /// Does the same, and hands the answers to `each` as the kernel wrote them, header (`struct nlmsghdr`) included: for who wants a word
    /// of an answer that has a hundred, each of which takes time to read.
    ///
    /// # Errors
    /// Those of [`batch`](Self::batch), and those of `each`.
    pub fn exchange(
        &mut self,
        requests: &[Request],
        each: impl FnMut(&[u8]) -> Result<(), NetlinkError>,
    ) -> Result<(), NetlinkError> {
        let first = self.sequence.wrapping_add(1);
        let mut bytes = Vec::new();
        for (position, request) in requests.iter().enumerate() {
            self.sequence = self.sequence.wrapping_add(1);
            let mut header = NetlinkHeader::default();
            header.message_type = request.message.message_type();
            header.flags = request.kind.flags();
            // A refusal is always answered; success need only be confirmed once, at the end.
            if position + 1 == requests.len() && !request.kind.is_answered() {
                header.flags |= NLM_F_ACK;
            }
            header.sequence_number = self.sequence;
            let length = header.buffer_len() + request.message.buffer_len();
            header.length = u32::try_from(length).map_err(unreadable)?;
            let begin = bytes.len();
            bytes.resize(begin + length.next_multiple_of(4), 0);
            let (head, body) = bytes[begin..].split_at_mut(header.buffer_len());
            header.emit(head);
            request.message.emit(body);
        }
        if requests.is_empty() {
            return Ok(());
        }
        let doing = |position: usize| {
            requests
                .get(position)
                .map_or("", |request| request.doing.as_str())
        };
        self.socket
            .send(&bytes, 0)
            .map_err(|source| failed(0, doing(0), source))?;
        self.read_answers(requests, first, each)
    }

    fn read_answers(
        &mut self,
        requests: &[Request],
        first: u32,
        mut each: impl FnMut(&[u8]) -> Result<(), NetlinkError>,
    ) -> Result<(), NetlinkError> {
        let mut refused: Option<NetlinkError> = None;
        let last = requests.len().saturating_sub(1);
        loop {
            self.buffer.clear();
            let received = self.socket.recv(&mut self.buffer, 0);
            received.map_err(|source| failed(0, "reading the kernel's answer", source))?;
            let mut rest = self.buffer.as_slice();
            while !rest.is_empty() {
                let header = NetlinkBuffer::new_checked(rest).map_err(unreadable)?;
                let length = (header.length() as usize)
                    .next_multiple_of(4)
                    .clamp(1, rest.len());
                let (position, kind) = (
                    header.sequence_number().wrapping_sub(first) as usize,
                    header.message_type(),
                );
                let (answer, behind) = rest.split_at(length);
                rest = behind;
                // An answer to an earlier batch that ended with an error.
                let Some(request) = requests.get(position) else {
                    continue;
                };
                let mut over = position == last && request.kind.is_answered();
                if kind == NLMSG_ERROR || kind == NLMSG_DONE {
                    over = position == last;
                    let message = read(answer)?;
                    if let NetlinkPayload::Error(error) = &message.payload {
                        let tolerated = request.tolerated.contains(&error.raw_code().abs());
                        if error.code.is_some() && !tolerated && refused.is_none() {
                            refused = Some(NetlinkError {
                                position,
                                doing: request.doing.clone(),
                                source: error.to_io(),
                                hint: hint(&error.header, message.header.flags),
                            });
                        }
                    }
                } else if request.kind != Kind::Await {
                    each(answer)?;
                }
                if over {
                    return refused.map_or(Ok(()), Err);
                }
            }
        }
    }
}

fn read(answer: &[u8]) -> Result<NetlinkMessage<RouteNetlinkMessage>, NetlinkError> {
    NetlinkMessage::deserialize(answer).map_err(unreadable)
}

fn unreadable(error: impl fmt::Display) -> NetlinkError {
    failed(
        0,
        "reading the kernel's answer",
        io::Error::other(error.to_string()),
    )
}

fn failed(position: usize, doing: &str, source: io::Error) -> NetlinkError {
    NetlinkError {
        position,
        doing: doing.to_owned(),
        source,
        hint: String::new(),
    }
}

/// The kernel's words in a refusal: attributes behind the 16 bytes of the refused message's header.
fn hint(payload: &[u8], flags: u16) -> String {
    let mut rest = match payload.get(16..) {
        Some(rest) if flags & NLM_F_ACK_TLVS != 0 => rest,
        _ => return String::new(),
    };
    while let [a, b, c, d, ..] = *rest {
        let length = usize::from(u16::from_ne_bytes([a, b]));
        let Some(value) = rest.get(4..length) else {
            break;
        };
        if u16::from_ne_bytes([c, d]) == ATTRIBUTE_MESSAGE {
            return String::from_utf8_lossy(value).trim_end_matches('\0').to_owned();
        }
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    String::new()
}

#[cfg(test)]
mod tests {
    use super::*;

    // C2
    #[test]
    fn the_kernels_words_are_found_and_cut_messages_do_no_harm() {
        let mut payload = vec![0; 16];
        // An offset attribute (type 2) first, then the message (type 1), padded.
        payload.extend([8, 0, 2, 0, 1, 2, 3, 4]);
        payload.extend([4 + 6, 0, 1, 0]);
        payload.extend(b"wrong\0\0\0");
        assert_eq!(hint(&payload, NLM_F_ACK_TLVS), "wrong");
        assert_eq!(hint(&payload, 0), "");
        for length in 0..payload.len() {
            let _ = hint(&payload[..length], NLM_F_ACK_TLVS);
        }
        assert_eq!(hint(&[&[0; 16][..], &[0, 0, 1, 0]].concat(), NLM_F_ACK_TLVS), "");
    }
}
