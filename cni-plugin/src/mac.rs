//! MAC addresses and device names of a pod's two ends: derived from who the pod is, so that no call need ask or
//! remember, and the same call repeated makes the same.

use std::fmt;
use std::str::FromStr;

use sluice_ipam::Attachment;

use crate::names::DEVICE_PREFIX;
use crate::stable_hash::stable_hash;

/// An Ethernet address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mac([u8; 6]);

impl Mac {
    /// The address of these bytes.
    pub const fn from_bytes(bytes: [u8; 6]) -> Self {
        Self(bytes)
    }

    /// Its bytes.
    pub fn bytes(&self) -> &[u8; 6] {
        &self.0
    }

    /// MAC of the end on the host.
    pub fn of_host_end(attachment: &Attachment) -> Self {
        Self::derived("host", attachment)
    }

    /// MAC of the end in the pod, unless the runtime asks for another.
    pub fn of_pod_end(attachment: &Attachment) -> Self {
        Self::derived("pod", attachment)
    }

    fn derived(end: &str, attachment: &Attachment) -> Self {
        let [a, b, c, d, e, f, ..] =
            stable_hash(&[end, attachment.container_id(), attachment.ifname()]).to_be_bytes();
        // Locally administered, for one station.
        Self([a & 0xfc | 0x02, b, c, d, e, f])
    }
}

impl fmt::Display for Mac {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, f] = self.0;
        write!(formatter, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{f:02x}")
    }
}

impl FromStr for Mac {
    type Err = String;

    /// Six bytes in hexadecimal between colons or dashes, of one station.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let wrong = || format!("{text:?} is not a MAC address like 0a:58:0a:f4:00:05");
        let mut bytes = [0; 6];
        let mut parts = text.split([':', '-']);
        for byte in &mut bytes {
            let part = parts.next().filter(|part| part.len() == 2).ok_or_else(wrong)?;
            if !part.bytes().all(|digit| digit.is_ascii_hexdigit()) {
                return Err(wrong());
            }
            *byte = u8::from_str_radix(part, 16).map_err(|_| wrong())?;
        }
        if parts.next().is_some() {
            return Err(wrong());
        }
        if bytes[0] & 1 != 0 || bytes == [0; 6] {
            return Err(format!("{text:?} is a MAC address of no single station"));
        }
        Ok(Self(bytes))
    }
}

/// Name of the device at the host's end.
pub fn host_device(attachment: &Attachment) -> String {
    let hash = stable_hash(&["name", attachment.container_id(), attachment.ifname()]);
    format!("{DEVICE_PREFIX}{:09x}", hash >> 28)
}

/// Name of the device that limits what the pod sends.
pub fn rate_device(attachment: &Attachment) -> String {
    let hash = stable_hash(&["rate", attachment.container_id(), attachment.ifname()]);
    // `r` is no digit of a host end's name: the two never meet.
    format!("{DEVICE_PREFIX}r{:08x}", hash >> 32)
}

/// Whether a device of this name is the host's end of some pod.
pub fn is_host_device(name: &str) -> bool {
    let rest = name.strip_prefix(DEVICE_PREFIX);
    rest.is_some_and(|rest| rest.len() == 9 && is_hexadecimal(rest))
}

/// Whether a device of this name limits what some pod sends.
pub fn is_rate_device(name: &str) -> bool {
    let rest = name
        .strip_prefix(DEVICE_PREFIX)
        .and_then(|rest| rest.strip_prefix('r'));
    rest.is_some_and(|rest| rest.len() == 8 && is_hexadecimal(rest))
}

/// As the names are written.
fn is_hexadecimal(text: &str) -> bool {
    text.bytes()
        .all(|digit| matches!(digit, b'0'..=b'9' | b'a'..=b'f'))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    fn attachment(id: &str) -> Attachment {
        Attachment::new(id, "eth0").unwrap()
    }

    // C6
    #[test]
    fn names_and_macs_never_change_between_releases() {
        let pod = attachment("0123456789abcdef");
        assert_eq!(host_device(&pod), "sluiceca5e2e289");
        assert_eq!(rate_device(&pod), "sluicerc462d3b8");
        assert_eq!(Mac::of_host_end(&pod).to_string(), "5e:04:41:0b:82:93");
        assert_eq!(Mac::of_pod_end(&pod).to_string(), "de:3d:6e:01:69:79");
    }

    // C6 C12
    #[test]
    fn names_are_devices_and_differ() {
        let mut names = BTreeSet::new();
        for number in 0..20_000 {
            let name = host_device(&attachment(&format!("pod{number}")));
            assert!(name.len() == 15 && name.starts_with(DEVICE_PREFIX), "{name}");
            names.insert(name.clone());
            let rate = rate_device(&attachment(&format!("pod{number}")));
            assert!(rate.len() == 15 && names.insert(rate.clone()), "{rate}");
            assert!(is_host_device(&name) && !is_host_device(&rate), "{name} {rate}");
            assert!(is_rate_device(&rate) && !is_rate_device(&name), "{name} {rate}");
        }
        assert_eq!(names.len(), 40_000);
        let other = Attachment::new("pod0", "eth1").unwrap();
        assert_ne!(host_device(&other), host_device(&attachment("pod0")));
    }

    // C4
    #[test]
    fn macs_are_local_unicast_and_the_two_ends_differ() {
        for number in 0..1_000 {
            let pod = attachment(&format!("pod{number}"));
            let (host, inside) = (Mac::of_host_end(&pod), Mac::of_pod_end(&pod));
            assert_ne!(host, inside);
            assert!(host.bytes()[0] & 3 == 2 && inside.bytes()[0] & 3 == 2);
            assert_eq!(host.to_string().parse(), Ok(host));
        }
    }

    // C10
    #[test]
    fn only_macs_of_a_station_are_read() {
        assert!("C2-11-22-33-44-FF".parse::<Mac>().is_ok());
        for wrong in [
            "",
            "c2:11:22:33:44",
            "c2:11:22:33:44:55:66",
            "c2:11:22:33:44:5",
            "c2:11:22:33:44:+5",
            "c2:11:22:33:44:gg",
            "00:00:00:00:00:00",
            "ff:ff:ff:ff:ff:ff",
            "01:00:5e:00:00:01",
        ] {
            assert!(wrong.parse::<Mac>().is_err(), "{wrong}");
        }
    }
}
