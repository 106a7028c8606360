//! The result of ADD, written in whichever version the runtime speaks, and read back from `prevResult`.
//!
//! Pure: turns values into JSON and back.

use std::net::IpAddr;

use ipnetwork::IpNetwork;
use serde_json::{Map, Value, json};

use crate::error::{Code, Failure};
use crate::mac::Mac;
use crate::requests::full_length;
use crate::version::Version;
use crate::wiring::Plan;

/// One interface of a result.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Interface {
    /// Its name.
    pub name: String,
    /// Its MAC, if told.
    pub mac: Option<Mac>,
    /// Its MTU, if told.
    pub mtu: Option<u32>,
    /// The namespace it is in; empty for the host's.
    pub sandbox: String,
}

/// What a `prevResult` says about a pod.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PrevResult {
    /// Interfaces, in order.
    pub interfaces: Vec<Interface>,
    /// Addresses and the position of the interface that holds each.
    pub ips: Vec<(IpAddr, Option<usize>)>,
}

/// The result of wiring `plan`, in `version`.
pub fn to_json(plan: &Plan, netns: &str, dns: Option<&Value>, version: Version) -> Value {
    let dns = dns.cloned().unwrap_or_else(|| json!({}));
    if version < Version::V0_3_0 {
        return oldest(plan, dns, version);
    }
    let interface = |name: &str, mac: Mac| {
        let mut interface = Map::new();
        interface.insert("name".to_owned(), json!(name));
        interface.insert("mac".to_owned(), json!(mac.to_string()));
        if version >= Version::V1_1_0 {
            interface.insert("mtu".to_owned(), json!(plan.mtu));
        }
        interface
    };
    let host = interface(&plan.host_device, plan.host_mac);
    let mut pod = interface(&plan.ifname, plan.pod_mac);
    pod.insert("sandbox".to_owned(), json!(netns));
    let ips = plan.addresses.iter().map(|address| {
        let mut ip = Map::new();
        if version < Version::V1_0_0 {
            ip.insert(
                "version".to_owned(),
                json!(if address.is_ipv4() { "4" } else { "6" }),
            );
        }
        ip.insert("address".to_owned(), json!(alone(*address)));
        ip.insert("gateway".to_owned(), json!(plan.gateway(*address)));
        ip.insert("interface".to_owned(), json!(1));
        Value::Object(ip)
    });
    json!({
        "cniVersion": version.as_str(),
        "interfaces": [host, pod],
        "ips": ips.collect::<Vec<_>>(),
        "routes": plan.addresses.iter().map(|address| route(plan, *address)).collect::<Vec<_>>(),
        "dns": dns,
    })
}

/// The shape before interfaces: one address per family.
fn oldest(plan: &Plan, dns: Value, version: Version) -> Value {
    let mut result = Map::new();
    result.insert("cniVersion".to_owned(), json!(version.as_str()));
    for address in &plan.addresses {
        let key = if address.is_ipv4() { "ip4" } else { "ip6" };
        let ip = json!({
            "ip": alone(*address),
            "gateway": plan.gateway(*address),
            "routes": [route(plan, *address)],
        });
        result.insert(key.to_owned(), ip);
    }
    result.insert("dns".to_owned(), dns);
    Value::Object(result)
}

fn alone(address: IpAddr) -> String {
    format!("{address}/{}", full_length(address))
}

fn route(plan: &Plan, address: IpAddr) -> Value {
    let dst = if address.is_ipv4() { "0.0.0.0/0" } else { "::/0" };
    json!({ "dst": dst, "gw": plan.gateway(address) })
}

impl PrevResult {
    /// Reads a result in the shape of 0.3.0 or newer.
    ///
    /// # Errors
    /// Code 7, naming the part that is wrong.
    pub fn read(value: &Value) -> Result<Self, Failure> {
        let wrong =
            |part: &str| Failure::new(Code::Config, format!("prevResult.{part}: is missing or wrong"));
        let list = |key: &str| match value.get(key) {
            None | Some(Value::Null) => Ok(Vec::new()),
            Some(Value::Array(items)) => Ok(items.clone()),
            Some(_) => Err(wrong(key)),
        };
        let mut result = Self::default();
        for item in list("interfaces")? {
            let text = |key: &str| item.get(key).and_then(Value::as_str).unwrap_or_default();
            if text("name").is_empty() {
                return Err(wrong("interfaces[].name"));
            }
            let mac = match text("mac") {
                "" => None,
                mac => Some(mac.parse().map_err(|_| wrong("interfaces[].mac"))?),
            };
            let mtu = item
                .get("mtu")
                .and_then(Value::as_u64)
                .and_then(|mtu| u32::try_from(mtu).ok());
            result.interfaces.push(Interface {
                name: text("name").to_owned(),
                mac,
                mtu: mtu.filter(|mtu| *mtu != 0),
                sandbox: text("sandbox").to_owned(),
            });
        }
        for item in list("ips")? {
            let address = item
                .get("address")
                .and_then(Value::as_str)
                .and_then(|text| text.parse().ok());
            let address: IpNetwork = address.ok_or_else(|| wrong("ips[].address"))?;
            let interface = match item.get("interface") {
                None | Some(Value::Null) => None,
                Some(position) => {
                    let position = position
                        .as_u64()
                        .and_then(|position| usize::try_from(position).ok());
                    let within = position.filter(|position| *position < result.interfaces.len());
                    Some(within.ok_or_else(|| wrong("ips[].interface"))?)
                }
            };
            result.ips.push((address.ip(), interface));
        }
        Ok(result)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    // C7
    #[test]
    fn results_of_other_plugins_too_are_read() {
        let value = json!({
            "cniVersion": "1.0.0",
            "interfaces": [
                { "name": "cni0", "mac": "c2:00:00:00:00:01" },
                { "name": "eth0", "mtu": 1400, "sandbox": "/run/netns/a", "socketPath": "/x" },
            ],
            "ips": [{ "address": "10.1.0.5/24", "interface": 1 }, { "address": "fd00::5/128" }],
            "routes": null,
        });
        let result = PrevResult::read(&value).unwrap();
        assert_eq!(result.interfaces[0].mac, "c2:00:00:00:00:01".parse().ok());
        assert_eq!(
            (result.interfaces[1].mac, result.interfaces[1].mtu),
            (None, Some(1400))
        );
        assert_eq!(result.ips[0], ("10.1.0.5".parse().unwrap(), Some(1)));
        assert_eq!(result.ips[1], ("fd00::5".parse().unwrap(), None));
    }

    // C2 C7
    #[test]
    fn what_is_wrong_in_a_result_is_named() {
        for (value, part) in [
            (json!({ "interfaces": 1 }), "interfaces"),
            (json!({ "interfaces": [{}] }), "interfaces[].name"),
            (
                json!({ "interfaces": [{ "name": "a", "mac": "x" }] }),
                "interfaces[].mac",
            ),
            (json!({ "ips": [{}] }), "ips[].address"),
            (json!({ "ips": [{ "address": "10.1.0.5/33" }] }), "ips[].address"),
            (
                json!({ "ips": [{ "address": "10.1.0.5/32", "interface": 0 }] }),
                "ips[].interface",
            ),
            (
                json!({ "ips": [{ "address": "10.1.0.5/32", "interface": -1 }] }),
                "ips[].interface",
            ),
        ] {
            let failure = PrevResult::read(&value).unwrap_err();
            assert_eq!(failure.code, Code::Config);
            assert!(failure.message.contains(part), "{failure}");
        }
    }
}
