//! Fields that several kinds of objects have, checked one by one.

use std::net::IpAddr;

use ipnetwork::IpNetwork;

use crate::state::service_port::Protocol;
use crate::yaml;

/// Says that `found` is none of `wanted`, and which one was likely meant.
pub fn one_of(found: &str, wanted: &[&str]) -> String {
    match yaml::likely(found, wanted.iter().copied()) {
        Some(meant) => format!("{found:?} is unknown; did you mean {meant:?}?"),
        None => format!("{found:?} is unknown; one of {} is wanted", wanted.join(", ")),
    }
}

/// A protocol; TCP where none is written.
///
/// # Errors
/// What was found and what is wanted.
pub fn protocol(written: Option<&str>) -> Result<Protocol, String> {
    match written {
        None | Some("TCP") => Ok(Protocol::Tcp),
        Some("UDP") => Ok(Protocol::Udp),
        Some("SCTP") => Ok(Protocol::Sctp),
        Some(other) => Err(one_of(other, &["TCP", "UDP", "SCTP"])),
    }
}

/// A port, 1 to 65535.
///
/// # Errors
/// What was found and what is wanted.
pub fn port_number(number: i64) -> Result<u16, String> {
    match u16::try_from(number) {
        Ok(port) if port != 0 => Ok(port),
        _ => Err(format!("{number} is not a port; 1 to 65535 is wanted")),
    }
}

/// One IP address.
///
/// # Errors
/// What was found.
pub fn parse_address(text: &str) -> Result<IpAddr, String> {
    text.parse().map_err(|_| format!("{text:?} is not an IP address"))
}

/// A list of IP addresses; empty strings in it are passed over.
///
/// # Errors
/// The element of `field`, and what was found there.
pub fn addresses(field: &str, written: &[String]) -> Result<Vec<IpAddr>, (String, String)> {
    written
        .iter()
        .enumerate()
        .filter(|(_, text)| !text.is_empty())
        .map(|(i, text)| parse_address(text).map_err(|reason| (format!("{field}[{i}]"), reason)))
        .collect()
}

/// A list of networks, host bits cleared; spaces around them are passed over, as the API server does.
///
/// # Errors
/// The element of `field`, and what was found there.
pub fn networks(field: &str, written: &[String]) -> Result<Vec<IpNetwork>, (String, String)> {
    let parse = |(i, text): (usize, &String)| {
        let found: Option<IpNetwork> = text.trim().parse().ok();
        found
            .and_then(|network| IpNetwork::new(network.network(), network.prefix()).ok())
            .ok_or_else(|| {
                let reason = format!("{text:?} is not a network; something like 192.0.2.0/24 is wanted");
                (format!("{field}[{i}]"), reason)
            })
    };
    written.iter().enumerate().map(parse).collect()
}

/// The address of an endpoint.
///
/// # Errors
/// What was found. Refused is what the API server refuses too: an endpoint there would let a Service's author reach the
/// node itself or the cloud's metadata service through the proxy.
pub fn endpoint_address(text: &str) -> Result<IpAddr, String> {
    let address = parse_address(text)?;
    let link_local = match address {
        IpAddr::V4(v4) => v4.is_link_local(),
        IpAddr::V6(v6) => v6.is_unicast_link_local(),
    };
    if address.is_loopback() || address.is_multicast() || address.is_unspecified() || link_local {
        return Err(format!(
            "{address} cannot be an endpoint: loopback, link-local, multicast and unspecified are refused"
        ));
    }
    Ok(address)
}
