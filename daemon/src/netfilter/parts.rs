//! Values as netfilter has them in its sets: one after the other, each padded to a multiple of four bytes.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use crate::state::service_port::{Family, Protocol};

/// Reads parts of a key, or of data, one after the other.
pub struct Parts<'a>(pub &'a [u8]);

impl Parts<'_> {
    /// The next so many bytes.
    pub fn take<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (head, rest) = self.0.split_first_chunk::<N>()?;
        self.0 = rest.get(N.next_multiple_of(4) - N..)?;
        Some(*head)
    }

    /// An address.
    pub fn address(&mut self, family: Family) -> Option<IpAddr> {
        match family {
            Family::V4 => self.take::<4>().map(|octets| Ipv4Addr::from(octets).into()),
            Family::V6 => self.take::<16>().map(|octets| Ipv6Addr::from(octets).into()),
        }
    }

    /// A protocol.
    pub fn protocol(&mut self) -> Option<Protocol> {
        let [number] = self.take::<1>()?;
        [Protocol::Tcp, Protocol::Udp, Protocol::Sctp]
            .into_iter()
            .find(|protocol| protocol.number() == number)
    }

    /// A port.
    pub fn port(&mut self) -> Option<u16> {
        self.take::<2>().map(u16::from_be_bytes)
    }

    /// An address and a port that follow each other.
    pub fn endpoint(&mut self, family: Family) -> Option<SocketAddr> {
        let address = self.address(family)?;
        Some(SocketAddr::new(address, self.port()?))
    }

    /// An address, a protocol and a port.
    pub fn frontend(&mut self, family: Family) -> Option<(SocketAddr, Protocol)> {
        let address = self.address(family)?;
        let protocol = self.protocol()?;
        Some((SocketAddr::new(address, self.port()?), protocol))
    }
}
