//! Fields that several kinds of objects have, checked one by one.

use std::net::IpAddr;

use ipnetwork::IpNetwork;

use super::passed_over::PassedOver;
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

/// Those of a list of IP addresses that `check` lets through; empty strings in it are no addresses, the others that are not are `passed`.
pub fn addresses(
    field: &str,
    written: &[String],
    check: fn(&str) -> Result<IpAddr, String>,
    passed: &mut PassedOver,
) -> Vec<IpAddr> {
    let written = written.iter().enumerate().filter(|(_, text)| !text.is_empty());
    written
        .filter_map(|(i, text)| passed.keep(format_args!("{field}[{i}]"), check(text)))
        .collect()
}

/// Those of a list that are networks, host bits cleared; spaces around them are no fault, as the API server does not mind
/// them either.
pub fn networks(field: &str, written: &[String], passed: &mut PassedOver) -> Vec<IpNetwork> {
    let parse = |(i, text): (usize, &String)| {
        let found: Option<IpNetwork> = text.trim().parse().ok();
        let network = found
            .and_then(|network| IpNetwork::new(network.network(), network.prefix()).ok())
            .ok_or_else(|| format!("{text:?} is not a network; something like 192.0.2.0/24 is wanted"));
        passed.keep(format_args!("{field}[{i}]"), network)
    };
    written.iter().enumerate().filter_map(parse).collect()
}

/// The address of a Service. One that means another host to every host, or none, or many, can lead nowhere: the
/// API server does not take it either, and in the tables it would take the node's own traffic.
///
/// # Errors
/// What was found.
pub fn service_address(text: &str) -> Result<IpAddr, String> {
    let address = parse_address(text)?;
    match unfit(address) {
        Some(what) => Err(format!("{address} is {what} and cannot be a Service's")),
        None => Ok(address),
    }
}

/// The address of an endpoint.
///
/// # Errors
/// What was found. Refused is what the API server refuses too: an endpoint there would let a Service's author reach the
/// node itself or the cloud's metadata service through the proxy.
pub fn endpoint_address(text: &str) -> Result<IpAddr, String> {
    let address = parse_address(text)?;
    match unfit(address) {
        Some(what) => Err(format!("{address} is {what} and cannot be an endpoint's")),
        None => Ok(address),
    }
}

/// Why `address` stands for no host in particular.
fn unfit(address: IpAddr) -> Option<&'static str> {
    let (link_local, broadcast, mapped) = match address {
        IpAddr::V4(v4) => (v4.is_link_local(), v4.is_broadcast(), false),
        IpAddr::V6(v6) => (v6.is_unicast_link_local(), false, v6.to_ipv4_mapped().is_some()),
    };
    let kinds = [
        (address.is_loopback(), "a loopback address"),
        (address.is_unspecified(), "the unspecified address"),
        (address.is_multicast(), "a multicast address"),
        (broadcast, "the broadcast address"),
        (link_local, "a link-local address"),
        (mapped, "an IPv4 address in IPv6 clothes"),
    ];
    kinds.into_iter().find(|(is, _)| *is).map(|(_, what)| what)
}
