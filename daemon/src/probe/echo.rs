//! ICMP echo (RFC 792, RFC 4443) over raw sockets: one round to many targets at once.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::time::{Duration, Instant};

use anyhow::Context;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, SockaddrStorage, bind, recv, sendto, socket,
};

use super::{Answers, Target};

/// How often a probe is sent before it counts as lost.
const TRIES: usize = 3;

/// How long answers to one sending are waited for.
const WAIT: Duration = Duration::from_millis(300);

/// Length of the ICMP header of an echo, bytes.
const HEADER: usize = 8;

/// Size of the small probe, bytes, IP header included.
const SMALL: usize = 64;

/// How many targets are asked at once: all their answers find room in a socket's buffer (net.core.rmem_default).
const AT_ONCE: usize = 32;

/// Sends a small and a full-size echo to each of `targets` and says which were answered. Blocks for up to a second for
/// every [`AT_ONCE`] of them.
///
/// # Errors
/// A raw socket cannot be had.
pub fn round(targets: &[Target]) -> anyhow::Result<Vec<(Target, Answers)>> {
    let mut answers = Vec::new();
    let mut sequence: u16 = 0;
    for batch in targets.chunks(AT_ONCE) {
        answers.extend(ask(batch, sequence)?);
        // Late answers to one batch are none to the next.
        sequence = sequence.wrapping_add(2 * AT_ONCE as u16);
    }
    Ok(answers)
}

fn ask(targets: &[Target], first: u16) -> anyhow::Result<Vec<(Target, Answers)>> {
    let mut sockets: BTreeMap<IpAddr, OwnedFd> = BTreeMap::new();
    for target in targets {
        if let Entry::Vacant(entry) = sockets.entry(target.from)
            && let Some(socket) = open(target.from)?
        {
            entry.insert(socket);
        }
    }
    let identifier = std::process::id() as u16;
    let numbers = |place: usize| {
        let small = first.wrapping_add(2 * place as u16);
        [small, small.wrapping_add(1)]
    };
    // By the sequence number that goes out and comes back.
    let mut answered: BTreeSet<u16> = BTreeSet::new();
    let mut wanted: BTreeSet<u16> = BTreeSet::new();
    for _ in 0..TRIES {
        for (place, target) in targets.iter().enumerate() {
            let Some(socket) = sockets.get(&target.from) else {
                continue;
            };
            for (sequence, size) in numbers(place).into_iter().zip([SMALL, target.mtu as usize]) {
                wanted.insert(sequence);
                if !answered.contains(&sequence) {
                    let echo = request(target.to, identifier, sequence, size);
                    // What cannot be sent is not answered, and that is what is said of it.
                    let _ = sendto(socket.as_raw_fd(), &echo, &address(target.to), MsgFlags::empty());
                }
            }
        }
        hear(&sockets, identifier, &wanted, &mut answered)?;
        if answered.is_superset(&wanted) {
            break;
        }
    }
    let answers = targets.iter().enumerate().map(|(place, target)| {
        // An address that no device holds any more belonged to a tunnel that went: nothing is known, nothing is said.
        let answers = if sockets.contains_key(&target.from) {
            let [small, full] = numbers(place).map(|sequence| answered.contains(&sequence));
            Answers { small, full }
        } else {
            Answers::ALL
        };
        (target.clone(), answers)
    });
    Ok(answers.collect())
}

/// A raw socket bound to `from`; nothing if no device holds that address now.
fn open(from: IpAddr) -> anyhow::Result<Option<OwnedFd>> {
    let (family, protocol) = match from {
        IpAddr::V4(_) => (AddressFamily::Inet, SockProtocol::Icmp),
        IpAddr::V6(_) => (AddressFamily::Inet6, SockProtocol::IcmpV6),
    };
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let socket = socket(family, SockType::Raw, flags, protocol)
        .context("opening a raw socket for ICMP; is CAP_NET_RAW there?")?;
    match bind(socket.as_raw_fd(), &address(from)) {
        Ok(()) => Ok(Some(socket)),
        Err(Errno::EADDRNOTAVAIL) => Ok(None),
        Err(error) => Err(error).with_context(|| format!("binding a raw socket to {from}")),
    }
}

/// Takes in answers until all are there or the time is up.
fn hear(
    sockets: &BTreeMap<IpAddr, OwnedFd>,
    identifier: u16,
    wanted: &BTreeSet<u16>,
    answered: &mut BTreeSet<u16>,
) -> anyhow::Result<()> {
    let end = Instant::now() + WAIT;
    let mut buffer = [0; 256];
    while !answered.is_superset(wanted) {
        let left = end.saturating_duration_since(Instant::now());
        let Ok(timeout) = PollTimeout::try_from(left) else {
            return Ok(());
        };
        let mut ready: Vec<_> = sockets
            .values()
            .map(|s| PollFd::new(s.as_fd(), PollFlags::POLLIN))
            .collect();
        match poll(&mut ready, timeout) {
            Ok(0) => return Ok(()),
            Ok(_) | Err(Errno::EINTR) => {}
            Err(error) => return Err(error).context("waiting for ICMP answers"),
        }
        for (from, socket) in sockets {
            // A packet longer than the buffer is cut: its first bytes say all that is looked at.
            while let Ok(length) = recv(socket.as_raw_fd(), &mut buffer, MsgFlags::empty()) {
                answered.extend(sequence_of(*from, &buffer[..length], identifier));
            }
        }
    }
    Ok(())
}

fn address(ip: IpAddr) -> SockaddrStorage {
    match SocketAddr::new(ip, 0) {
        SocketAddr::V4(v4) => SockaddrStorage::from(v4),
        SocketAddr::V6(v6) => SockaddrStorage::from(v6),
    }
}

/// An echo request that is `size` bytes long together with the IP header that the kernel puts before it. Numbers in
/// network order; for IPv6 the kernel fills in the checksum (RFC 3542, section 3.1).
fn request(to: IpAddr, identifier: u16, sequence: u16, size: usize) -> Vec<u8> {
    let (kind, ip_header) = if to.is_ipv4() { (8, 20) } else { (128, 40) };
    let mut message = vec![0; size.saturating_sub(ip_header).max(HEADER)];
    message[0] = kind;
    message[4..6].copy_from_slice(&identifier.to_be_bytes());
    message[6..8].copy_from_slice(&sequence.to_be_bytes());
    if to.is_ipv4() {
        let sum = checksum(&message);
        message[2..4].copy_from_slice(&sum.to_be_bytes());
    }
    message
}

/// The Internet checksum (RFC 1071).
fn checksum(message: &[u8]) -> u16 {
    let words = message
        .chunks(2)
        .map(|pair| u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0)));
    let mut sum: u32 = words.sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

/// The sequence number of an echo reply to `identifier`. An IPv4 raw socket shows the IP header too, an IPv6 one does
/// not.
fn sequence_of(own: IpAddr, packet: &[u8], identifier: u16) -> Option<u16> {
    let (reply, message) = match own {
        IpAddr::V4(_) => (0, packet.get(usize::from(packet.first()? & 15) * 4..)?),
        IpAddr::V6(_) => (129, packet),
    };
    let number = |at: usize| Some(u16::from_be_bytes([*message.get(at)?, *message.get(at + 1)?]));
    let fits = *message.first()? == reply && number(4)? == identifier;
    fits.then_some(number(6)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_is_as_long_as_asked_and_its_sum_is_right() {
        for (to, ip_header) in [("10.0.0.1", 20), ("fd00::1", 40)] {
            let message = request(to.parse().unwrap(), 7, 9, 1430);
            assert_eq!(message.len() + ip_header, 1430);
        }
        assert_eq!(checksum(&request("10.0.0.1".parse().unwrap(), 7, 9, 99)), 0);
    }

    #[test]
    fn only_answers_to_us_count_however_short_they_are() {
        let v4: IpAddr = "10.0.0.1".parse().unwrap();
        let mut packet = vec![0x45; 20];
        packet.extend([0, 0, 0, 0, 0, 7, 0, 9]);
        assert_eq!(sequence_of(v4, &packet, 7), Some(9));
        assert_eq!(sequence_of(v4, &packet, 8), None);
        for length in 0..packet.len() {
            assert_eq!(sequence_of(v4, &packet[..length], 7), None);
        }
        assert_eq!(
            sequence_of("fd00::1".parse().unwrap(), &[129, 0, 0, 0, 0, 7, 0, 3], 7),
            Some(3)
        );
    }
}
