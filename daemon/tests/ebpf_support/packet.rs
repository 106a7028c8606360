//! Crafted packets, and what became of them.

use std::net::{IpAddr, SocketAddr};

/// TCP flags.
pub const FIN: u8 = 1;
pub const SYN: u8 = 2;
pub const RST: u8 = 4;
pub const ACK: u8 = 16;

const TCP: u8 = 6;
const UDP: u8 = 17;
const ETHERNET: usize = 14;

/// Types of IPv6's headers of options.
const HOP_BY_HOP: u8 = 0;
const DESTINATION_OPTIONS: u8 = 60;

/// An Ethernet frame with a TCP or UDP packet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Packet {
    pub source: SocketAddr,
    pub destination: SocketAddr,
    /// TCP flags; `None` makes it UDP.
    pub tcp: Option<u8>,
    /// IPv4: options, whole words. IPv6: what is in the header for every hop, and again in that for the destination; six bytes, or
    /// eights of bytes more.
    pub options: Vec<u8>,
    /// IPv4 flags and fragment offset, as in the header.
    pub fragment: u16,
    /// Whether a UDP packet has its checksum; only IPv4 may go without.
    pub checksum: bool,
    pub payload: Vec<u8>,
}

/// A TCP packet.
pub fn tcp(source: &str, destination: &str, flags: u8) -> Packet {
    Packet {
        tcp: Some(flags),
        ..udp(source, destination)
    }
}

/// A UDP packet.
pub fn udp(source: &str, destination: &str) -> Packet {
    Packet {
        source: source.parse().unwrap(),
        destination: destination.parse().unwrap(),
        tcp: None,
        options: Vec::new(),
        fragment: 0,
        checksum: true,
        payload: b"odd number of bytes".to_vec(),
    }
}

/// The Internet checksum (RFC 1071) over all parts, each of even length but the last.
pub fn checksum(parts: &[&[u8]]) -> u16 {
    let mut sum = 0_u32;
    for part in parts {
        for pair in part.chunks(2) {
            sum += u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0));
        }
    }
    while sum > 0xffff {
        sum = (sum >> 16) + (sum & 0xffff);
    }
    !(sum as u16)
}

pub fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(v4) => v4.octets().to_vec(),
        IpAddr::V6(v6) => v6.octets().to_vec(),
    }
}

/// What TCP, UDP and ICMPv6 add to their checksums.
pub fn pseudo_header(source: IpAddr, destination: IpAddr, protocol: u8, length: usize) -> Vec<u8> {
    let mut bytes = [octets(source), octets(destination)].concat();
    bytes.extend((length as u32).to_be_bytes());
    bytes.extend([0, 0, 0, protocol]);
    bytes
}

impl Packet {
    fn protocol(&self) -> u8 {
        if self.tcp.is_some() { TCP } else { UDP }
    }

    fn is_v4(&self) -> bool {
        self.source.is_ipv4()
    }

    fn transport(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        bytes.extend(self.source.port().to_be_bytes());
        bytes.extend(self.destination.port().to_be_bytes());
        let at = if let Some(flags) = self.tcp {
            bytes.extend([0, 0, 0, 1, 0, 0, 0, 2, 0x50, flags, 0x20, 0, 0, 0, 0, 0]);
            16
        } else {
            bytes.extend(((8 + self.payload.len()) as u16).to_be_bytes());
            bytes.extend([0, 0]);
            6
        };
        bytes.extend(&self.payload);
        if self.checksum {
            let pseudo = pseudo_header(
                self.source.ip(),
                self.destination.ip(),
                self.protocol(),
                bytes.len(),
            );
            let sum = match checksum(&[&pseudo, &bytes]) {
                0 if self.tcp.is_none() => 0xffff,
                sum => sum,
            };
            bytes[at..at + 2].copy_from_slice(&sum.to_be_bytes());
        }
        bytes
    }

    /// IPv6: the type of the first header behind the first, and those with options.
    fn extensions(&self) -> (u8, Vec<u8>) {
        if self.options.is_empty() {
            return (self.protocol(), Vec::new());
        }
        let header = |next: u8| [&[next, (self.options.len() / 8) as u8], &self.options[..]].concat();
        let headers = [header(DESTINATION_OPTIONS), header(self.protocol())];
        (HOP_BY_HOP, headers.concat())
    }

    /// The frame.
    pub fn bytes(&self) -> Vec<u8> {
        let transport = self.transport();
        let mut frame = vec![2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2];
        if self.is_v4() {
            let length = 20 + self.options.len();
            let mut header = vec![0x40 | (length / 4) as u8, 0];
            header.extend(((length + transport.len()) as u16).to_be_bytes());
            header.extend([0, 7]);
            header.extend(self.fragment.to_be_bytes());
            header.extend([64, self.protocol(), 0, 0]);
            header.extend(octets(self.source.ip()));
            header.extend(octets(self.destination.ip()));
            header.extend(&self.options);
            let sum = checksum(&[&header]);
            header[10..12].copy_from_slice(&sum.to_be_bytes());
            frame.extend([0x08, 0x00]);
            frame.extend(header);
        } else {
            frame.extend([0x86, 0xdd, 0x60, 0, 0, 0]);
            let (next, extensions) = self.extensions();
            frame.extend(((extensions.len() + transport.len()) as u16).to_be_bytes());
            frame.extend([next, 64]);
            frame.extend(octets(self.source.ip()));
            frame.extend(octets(self.destination.ip()));
            frame.extend(extensions);
        }
        frame.extend(transport);
        frame
    }

    /// Reads a frame back; all its checksums must be right.
    pub fn parse(frame: &[u8]) -> Self {
        let ip = &frame[ETHERNET..];
        let v4 = ip[0] >> 4 == 4;
        let mut header = if v4 { usize::from(ip[0] & 15) * 4 } else { 40 };
        let (mut protocol, addresses, width) = if v4 { (ip[9], 12, 4) } else { (ip[6], 8, 16) };
        let mut options = if v4 { ip[20..header].to_vec() } else { Vec::new() };
        while !v4 && [HOP_BY_HOP, DESTINATION_OPTIONS].contains(&protocol) {
            let end = header + (usize::from(ip[header + 1]) + 1) * 8;
            options = ip[header + 2..end].to_vec();
            (protocol, header) = (ip[header], end);
        }
        let address = |at: usize| -> IpAddr {
            let bytes = &ip[at..at + width];
            if v4 {
                <[u8; 4]>::try_from(bytes).unwrap().into()
            } else {
                <[u8; 16]>::try_from(bytes).unwrap().into()
            }
        };
        let (source, destination) = (address(addresses), address(addresses + width));
        let transport = &ip[header..];
        let port = |at: usize| u16::from_be_bytes([transport[at], transport[at + 1]]);
        if v4 {
            assert_eq!(checksum(&[&ip[..header]]), 0, "IPv4 header checksum");
        }
        let has_checksum = protocol == TCP || transport[6..8] != [0, 0];
        if has_checksum {
            let pseudo = pseudo_header(source, destination, protocol, transport.len());
            assert_eq!(checksum(&[&pseudo, transport]), 0, "transport checksum");
        }
        Self {
            source: SocketAddr::new(source, port(0)),
            destination: SocketAddr::new(destination, port(2)),
            tcp: (protocol == TCP).then(|| transport[13]),
            options,
            fragment: if v4 { u16::from_be_bytes([ip[6], ip[7]]) } else { 0 },
            checksum: has_checksum,
            payload: transport[if protocol == TCP { 20 } else { 8 }..].to_vec(),
        }
    }

    /// The same packet from elsewhere.
    pub fn from(&self, source: impl Into<SocketAddr>) -> Self {
        Self {
            source: source.into(),
            ..self.clone()
        }
    }

    /// The same packet to elsewhere.
    pub fn to(&self, destination: impl Into<SocketAddr>) -> Self {
        Self {
            destination: destination.into(),
            ..self.clone()
        }
    }

    /// An answer to this packet, with other TCP flags if it is one.
    pub fn reply(&self, flags: u8) -> Self {
        Self {
            source: self.destination,
            destination: self.source,
            tcp: self.tcp.map(|_| flags),
            ..self.clone()
        }
    }

    /// The same packet with other TCP flags.
    pub fn flags(&self, flags: u8) -> Self {
        Self {
            tcp: Some(flags),
            ..self.clone()
        }
    }
}
