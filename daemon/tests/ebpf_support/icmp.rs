//! ICMP errors, and what became of them.

use std::net::{IpAddr, SocketAddr};

use super::packet::{Packet, checksum, octets, pseudo_header};

const ETHERNET: usize = 14;
const ICMP: u8 = 1;
const ICMPV6: u8 = 58;

/// An error about a packet, with as much of it as is quoted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IcmpError {
    pub source: IpAddr,
    pub destination: IpAddr,
    /// The quoted packet's ends.
    pub quoted: (SocketAddr, SocketAddr),
    /// The quoted packet, IP header and all.
    quote: Vec<u8>,
}

impl IcmpError {
    /// What `reporter` says to the sender of `packet`: too big. `quoted`: how many bytes after the quoted IP header.
    pub fn too_big(reporter: &str, packet: &Packet, quoted: usize) -> Self {
        let ip = &packet.bytes()[ETHERNET..];
        let header = if packet.source.is_ipv4() {
            usize::from(ip[0] & 15) * 4
        } else {
            40
        };
        Self {
            source: reporter.parse().unwrap(),
            destination: packet.source.ip(),
            quoted: (packet.source, packet.destination),
            quote: ip[..ip.len().min(header + quoted)].to_vec(),
        }
    }

    /// The frame.
    pub fn bytes(&self) -> Vec<u8> {
        let v4 = self.source.is_ipv4();
        let mut message = if v4 { vec![3, 4] } else { vec![2, 0] };
        message.extend([0, 0, 0, 0, 0x05, 0x14]);
        message.extend(&self.quote);
        let pseudo = self.pseudo_header(message.len());
        let sum = checksum(&[&pseudo, &message]);
        message[2..4].copy_from_slice(&sum.to_be_bytes());
        let mut frame = vec![2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2];
        if v4 {
            let mut header = vec![0x45, 0];
            header.extend(((20 + message.len()) as u16).to_be_bytes());
            header.extend([0, 9, 0, 0, 64, ICMP, 0, 0]);
            header.extend(octets(self.source));
            header.extend(octets(self.destination));
            let sum = checksum(&[&header]);
            header[10..12].copy_from_slice(&sum.to_be_bytes());
            frame.extend([0x08, 0x00]);
            frame.extend(header);
        } else {
            frame.extend([0x86, 0xdd, 0x60, 0, 0, 0]);
            frame.extend((message.len() as u16).to_be_bytes());
            frame.extend([ICMPV6, 64]);
            frame.extend(octets(self.source));
            frame.extend(octets(self.destination));
        }
        frame.extend(message);
        frame
    }

    /// Reads a frame back; every checksum must be right, also those of what is quoted, where it is quoted whole.
    pub fn parse(frame: &[u8]) -> Self {
        let ip = &frame[ETHERNET..];
        let (source, destination, protocol, message) = header(ip);
        assert!(protocol == ICMP || protocol == ICMPV6);
        let (from, to, protocol, transport) = header(&message[8..]);
        let port = |at: usize| u16::from_be_bytes([transport[at], transport[at + 1]]);
        let error = Self {
            source,
            destination,
            quoted: (SocketAddr::new(from, port(0)), SocketAddr::new(to, port(2))),
            quote: message[8..].to_vec(),
        };
        let pseudo = error.pseudo_header(message.len());
        assert_eq!(checksum(&[&pseudo, message]), 0, "ICMP checksum");
        // UDP says how long it is; with TCP the tests quote 20 bytes or all.
        let whole = protocol == 17
            && transport.len() == usize::from(u16::from_be_bytes([transport[4], transport[5]]));
        let without = protocol == 17 && transport[6..8] == [0, 0];
        if (whole && !without) || (protocol == 6 && transport.len() > 20) {
            let pseudo = pseudo_header(from, to, protocol, transport.len());
            assert_eq!(checksum(&[&pseudo, transport]), 0, "the quoted packet's checksum");
        }
        error
    }

    /// ICMPv6 alone has one.
    fn pseudo_header(&self, length: usize) -> Vec<u8> {
        match self.source {
            IpAddr::V4(_) => Vec::new(),
            IpAddr::V6(_) => pseudo_header(self.source, self.destination, ICMPV6, length),
        }
    }
}

/// Source, destination, protocol and payload of the IP packet; the IPv4 header's checksum must be right.
fn header(ip: &[u8]) -> (IpAddr, IpAddr, u8, &[u8]) {
    let v4 = |at: usize| IpAddr::from(<[u8; 4]>::try_from(&ip[at..at + 4]).unwrap());
    let v6 = |at: usize| IpAddr::from(<[u8; 16]>::try_from(&ip[at..at + 16]).unwrap());
    if ip[0] >> 4 == 4 {
        let length = usize::from(ip[0] & 15) * 4;
        assert_eq!(checksum(&[&ip[..length]]), 0, "IPv4 header checksum");
        (v4(12), v4(16), ip[9], &ip[length..])
    } else {
        (v6(8), v6(24), ip[6], &ip[40..])
    }
}
