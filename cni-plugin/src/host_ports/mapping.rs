//! One host port as the runtime asks for it. Pure.

use std::fmt;
use std::net::IpAddr;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::error::{Code, Failure};

/// More are not taken from one pod: each is an entry of the dataplane's tables.
const MOST: usize = 1024;

/// Transport protocol of a host port.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
    /// SCTP.
    Sctp,
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
            Self::Sctp => "sctp",
        })
    }
}

/// A port of the node that leads to a port of the pod.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Mapping {
    /// Where it is open: on this address of the node; where it is `0.0.0.0` or `::`, on all of its family; on all
    /// addresses where there is none.
    #[serde(rename = "hostIP", default, skip_serializing_if = "Option::is_none")]
    pub host_ip: Option<IpAddr>,
    /// The node's port.
    pub host_port: u16,
    /// The pod's port.
    pub container_port: u16,
    /// Transport protocol of both.
    pub protocol: Protocol,
}

impl Mapping {
    /// Whether it is open in IPv4 (`v4`) or IPv6.
    pub fn serves(&self, v4: bool) -> bool {
        self.host_ip.is_none_or(|address| address.is_ipv4() == v4)
    }

    /// The one address it is open on; nothing when that is all of them, of one family or both.
    pub fn address(&self) -> Option<IpAddr> {
        self.host_ip.filter(|address| !address.is_unspecified())
    }

    /// Whether some address, port and protocol is in both.
    pub fn overlaps(&self, other: &Self) -> bool {
        let hosts = match (self.host_ip, other.host_ip) {
            (Some(one), Some(two)) => {
                let wild = one.is_unspecified() || two.is_unspecified();
                one == two || (wild && one.is_ipv4() == two.is_ipv4())
            }
            _ => true,
        };
        hosts && self.host_port == other.host_port && self.protocol == other.protocol
    }

    /// The mapping that `entry` of the list `key` asks for.
    fn read(key: &str, entry: &Value) -> Result<Self, Failure> {
        let wrong = |why: &str| Failure::new(Code::Config, format!("{key} {entry}: {why}"));
        let port = |name: &str| {
            let number = entry.get(name).and_then(Value::as_u64);
            let number = number.and_then(|number| u16::try_from(number).ok());
            number
                .filter(|number| *number != 0)
                .ok_or_else(|| wrong(&format!("{name} must be a port, 1 to 65535")))
        };
        let text = |name: &str| match entry.get(name) {
            None | Some(Value::Null) => Ok(""),
            Some(Value::String(text)) => Ok(text.as_str()),
            Some(_) => Err(wrong(&format!("{name} must be text"))),
        };
        let protocol = match text("protocol")?.to_ascii_lowercase().as_str() {
            "" | "tcp" => Protocol::Tcp,
            "udp" => Protocol::Udp,
            "sctp" => Protocol::Sctp,
            _ => return Err(wrong("protocol must be tcp, udp or sctp")),
        };
        let host_ip = match text("hostIP")? {
            "" => None,
            text => {
                let address: Result<IpAddr, _> = text.parse();
                Some(
                    address
                        .map_err(|_| wrong("hostIP must be an IP address"))?
                        .to_canonical(),
                )
            }
        };
        if host_ip.is_some_and(|address| address.is_multicast()) {
            return Err(wrong("hostIP must be an address of this node"));
        }
        Ok(Self {
            host_ip,
            host_port: port("hostPort")?,
            container_port: port("containerPort")?,
            protocol,
        })
    }
}

impl fmt::Display for Mapping {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.host_ip {
            None => write!(f, "*:{}", self.host_port)?,
            Some(IpAddr::V4(address)) => write!(f, "{address}:{}", self.host_port)?,
            Some(IpAddr::V6(address)) => write!(f, "[{address}]:{}", self.host_port)?,
        }
        write!(f, "/{}", self.protocol)
    }
}

/// The host ports that `list`, found under `key`, asks for: sorted, each once.
///
/// # Errors
/// Code 7 for what is no list of mappings, for two that claim the same host port, and for too many.
pub fn mappings(key: &str, list: &Value) -> Result<Vec<Mapping>, Failure> {
    let Value::Array(entries) = list else {
        let message = format!("{key}: must be a list of port mappings");
        return Err(Failure::new(Code::Config, message));
    };
    if entries.len() > MOST {
        let message = format!("{key}: has {} entries, {MOST} are taken at most", entries.len());
        return Err(Failure::new(Code::Config, message));
    }
    let mut mappings = Vec::new();
    for entry in entries {
        mappings.push(Mapping::read(key, entry)?);
    }
    mappings.sort_unstable();
    mappings.dedup();
    for (position, one) in mappings.iter().enumerate() {
        if let Some(two) = mappings[..position].iter().find(|two| two.overlaps(one)) {
            let message = format!("{key}: {two} and {one} claim the same port of the node");
            return Err(Failure::new(Code::Config, message));
        }
    }
    Ok(mappings)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn read(list: Value) -> Result<Vec<String>, String> {
        let mappings = mappings("portMappings", &list).map_err(|failure| failure.to_string())?;
        Ok(mappings
            .iter()
            .map(|mapping| format!("{mapping}->{}", mapping.container_port))
            .collect())
    }

    /// C10
    #[test]
    fn what_runtimes_write_is_read() {
        let found = read(json!([
            { "hostPort": 8080, "containerPort": 80, "protocol": "TCP", "hostIP": "" },
            { "hostPort": 8080, "containerPort": 80 },
            { "hostPort": 8080, "containerPort": 80, "protocol": "udp", "hostIP": "0.0.0.0" },
            { "hostPort": 8080, "containerPort": 81, "protocol": "udp", "hostIP": "::" },
            { "hostPort": 8080, "containerPort": 80, "protocol": "Sctp", "hostIP": "::ffff:10.0.0.1" },
            { "hostPort": 1, "containerPort": 65535, "hostIP": "fd00::1", "unknown": 1 },
        ]));
        let expected = [
            "*:8080/tcp->80",
            "0.0.0.0:8080/udp->80",
            "10.0.0.1:8080/sctp->80",
            "[::]:8080/udp->81",
            "[fd00::1]:1/tcp->65535",
        ];
        assert_eq!(found.unwrap(), expected);
    }

    /// C10
    #[test]
    fn what_is_no_mapping_is_refused_with_the_reason() {
        for (list, says) in [
            (json!({}), "must be a list"),
            (
                json!([{ "hostPort": 0, "containerPort": 80 }]),
                "hostPort must be a port",
            ),
            (
                json!([{ "hostPort": 80, "containerPort": 65536 }]),
                "containerPort must be a port",
            ),
            (
                json!([{ "hostPort": -1, "containerPort": 80 }]),
                "hostPort must be a port",
            ),
            (
                json!([{ "hostPort": "80", "containerPort": 80 }]),
                "hostPort must be a port",
            ),
            (json!([{ "hostPort": 80 }]), "containerPort must be a port"),
            (json!([5]), "must be a port"),
            (
                json!([{ "hostPort": 80, "containerPort": 80, "protocol": "icmp" }]),
                "tcp, udp or sctp",
            ),
            (
                json!([{ "hostPort": 80, "containerPort": 80, "hostIP": "node1" }]),
                "must be an IP address",
            ),
            (
                json!([{ "hostPort": 80, "containerPort": 80, "hostIP": "224.0.0.1" }]),
                "of this node",
            ),
            (
                json!([{ "hostPort": 80, "containerPort": 1 }, { "hostPort": 80, "containerPort": 2, "hostIP": "::1" }]),
                "claim the same port",
            ),
        ] {
            let said = read(list.clone()).unwrap_err();
            assert!(said.contains(says), "{list}: {said}");
        }
    }

    /// C10 S25
    #[test]
    fn only_what_shares_address_port_and_protocol_overlaps() {
        let one = |host_ip: &str, host_port, protocol| Mapping {
            host_ip: host_ip.parse().ok(),
            host_port,
            container_port: 80,
            protocol,
        };
        let tcp = |host_ip| one(host_ip, 8080, Protocol::Tcp);
        for (a, b, overlap) in [
            (tcp(""), tcp("10.0.0.1"), true),
            (tcp(""), tcp("::"), true),
            (tcp("0.0.0.0"), tcp("10.0.0.1"), true),
            (tcp("0.0.0.0"), tcp("fd00::1"), false),
            (tcp("0.0.0.0"), tcp("::"), false),
            (tcp("10.0.0.1"), tcp("10.0.0.1"), true),
            (tcp("10.0.0.1"), tcp("10.0.0.2"), false),
            (tcp("10.0.0.1"), one("10.0.0.1", 8081, Protocol::Tcp), false),
            (tcp("10.0.0.1"), one("10.0.0.1", 8080, Protocol::Udp), false),
        ] {
            assert_eq!(a.overlaps(&b), overlap, "{a} {b}");
            assert_eq!(b.overlaps(&a), overlap, "{b} {a}");
        }
    }
}
