//! `CNI_ARGS`: what a runtime says in the oldest way, as `KEY=value;KEY=value`.
//!
//! Two keys count, `IP` and `MAC`: podman asks for them this way alone. All others are passed over, with or without
//! `IgnoreUnknown`, since runtimes put their own there.

/// The `CNI_ARGS` of a call.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Arguments(String);

impl Arguments {
    /// The variable as it stands.
    pub fn new(text: String) -> Self {
        Self(text)
    }

    /// The addresses asked for.
    pub fn addresses(&self) -> impl Iterator<Item = &str> {
        self.value("IP").into_iter().flat_map(|list| list.split(','))
    }

    /// The MAC asked for.
    pub fn mac(&self) -> Option<&str> {
        self.value("MAC")
    }

    /// The last one wins, as in the reference plugins; an empty one says nothing.
    fn value(&self, wanted: &str) -> Option<&str> {
        let mut pairs = self.0.split(';').rev().filter_map(|pair| pair.split_once('='));
        let last = pairs.find(|(key, _)| key.trim() == wanted);
        last.map(|(_, value)| value.trim())
            .filter(|value| !value.is_empty())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    // C12 C15
    #[test]
    fn ip_and_mac_are_found_among_whatever_else_is_said() {
        let arguments = |text: &str| Arguments::new(text.to_owned());
        let podman = arguments("IgnoreUnknown=1;K8S_POD_NAME=web;MAC=c2:11:22:33:44:55;IP=10.244.2.99");
        assert_eq!(podman.addresses().collect::<Vec<_>>(), ["10.244.2.99"]);
        assert_eq!(podman.mac(), Some("c2:11:22:33:44:55"));
        let both = arguments("IP=10.244.2.9,fd00::9");
        assert_eq!(both.addresses().collect::<Vec<_>>(), ["10.244.2.9", "fd00::9"]);
        for none in [
            "",
            ";",
            "=",
            "IP",
            "IP=;MAC=",
            "XIP=10.0.0.1;ip=10.0.0.1;K=IP=10.0.0.1",
        ] {
            assert_eq!(
                (arguments(none).addresses().count(), arguments(none).mac()),
                (0, None),
                "{none}"
            );
        }
        assert_eq!(arguments("MAC=a;MAC=b").mac(), Some("b"));
    }
}
