//! Where everything is below the prefix. Pure.
//!
//! | key | value | lives |
//! |---|---|---|
//! | `services/NAMESPACE/NAME`, and so for `endpointslices`, `endpoints` and `pods` | the Kubernetes object, in JSON | until deleted |
//! | `nodes/NAME` | the Node, in JSON | until deleted, or as long as the lease of its pod CIDRs |
//! | `podcidrs/ADDRESS-LENGTH` | the name of the node that holds it | as long as its lease |
//! | `podcidr-lengths/FAMILY` | the length of all pod CIDRs of that family | for ever |
//! | `registrations/NAME` | which host has that name, in JSON | as long as it is heard from |

use ipnetwork::IpNetwork;

use crate::address::Family;
use crate::state::objects::ObjectName;

/// The kinds of objects that are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Stored {
    /// A machine of the cluster.
    Node,
    /// A Service.
    Service,
    /// Endpoints of a Service.
    EndpointSlice,
    /// The same in its older form.
    Endpoints,
    /// A pod.
    Pod,
}

impl Stored {
    /// All of them.
    pub const ALL: [Self; 5] = [
        Self::Node,
        Self::Service,
        Self::EndpointSlice,
        Self::Endpoints,
        Self::Pod,
    ];

    /// As Kubernetes has it in `kind`.
    pub fn kind(self) -> &'static str {
        match self {
            Self::Node => "Node",
            Self::Service => "Service",
            Self::EndpointSlice => "EndpointSlice",
            Self::Endpoints => "Endpoints",
            Self::Pod => "Pod",
        }
    }

    /// As Kubernetes has it in addresses and people on command lines.
    pub fn plural(self) -> &'static str {
        match self {
            Self::Node => "nodes",
            Self::Service => "services",
            Self::EndpointSlice => "endpointslices",
            Self::Endpoints => "endpoints",
            Self::Pod => "pods",
        }
    }
}

/// The names of all keys.
#[derive(Debug, Clone)]
pub struct Keys {
    prefix: String,
}

impl Keys {
    /// Those below `prefix`, which has no slash at its end.
    pub fn new(prefix: &str) -> Self {
        Self {
            prefix: prefix.to_owned(),
        }
    }

    /// What all of them begin with.
    pub fn all(&self) -> String {
        format!("{}/", self.prefix)
    }

    /// What the objects of a kind begin with, those of one namespace if it is given.
    pub fn objects(&self, kind: Stored, namespace: Option<&str>) -> String {
        let namespace = namespace.map_or_else(String::new, |namespace| format!("{namespace}/"));
        format!("{}/{}/{namespace}", self.prefix, kind.plural())
    }

    /// An object.
    pub fn object(&self, kind: Stored, name: &ObjectName) -> String {
        let namespace = (kind != Stored::Node).then_some(name.namespace.as_str());
        self.objects(kind, namespace) + &name.name
    }

    /// Which object a key is of; none if it is of something else.
    pub fn object_of(&self, key: &[u8]) -> Option<(Stored, ObjectName)> {
        let rest = self.below(key)?;
        let (plural, rest) = rest.split_once('/')?;
        let kind = Stored::ALL.into_iter().find(|kind| kind.plural() == plural)?;
        let (namespace, name) = match kind {
            Stored::Node => ("", rest),
            _ => rest.split_once('/')?,
        };
        (!name.is_empty() && !name.contains('/')).then(|| (kind, ObjectName::new(namespace, name)))
    }

    /// What all claims of pod CIDRs begin with.
    pub fn claims(&self) -> String {
        format!("{}/podcidrs/", self.prefix)
    }

    /// The claim of a pod CIDR.
    pub fn claim(&self, cidr: &IpNetwork) -> String {
        format!("{}{}-{}", self.claims(), cidr.network(), cidr.prefix())
    }

    /// Which pod CIDR a key claims.
    pub fn claim_of(&self, key: &[u8]) -> Option<IpNetwork> {
        let written = self.below(key)?.strip_prefix("podcidrs/")?;
        let (address, length) = written.rsplit_once('-')?;
        IpNetwork::new(address.parse().ok()?, length.parse().ok()?).ok()
    }

    /// How long the pod CIDRs of a family are.
    pub fn claim_length(&self, family: Family) -> String {
        let family = match family {
            Family::V4 => "ipv4",
            Family::V6 => "ipv6",
        };
        format!("{}/podcidr-lengths/{family}", self.prefix)
    }

    /// Which host has a node's name.
    pub fn registration(&self, node: &str) -> String {
        format!("{}/registrations/{node}", self.prefix)
    }

    fn below<'k>(&self, key: &'k [u8]) -> Option<&'k str> {
        let key = std::str::from_utf8(key).ok()?;
        key.strip_prefix(&self.prefix)?.strip_prefix('/')
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// D3
    #[test]
    fn keys_are_read_as_they_are_written() {
        let keys = Keys::new("/sluice");
        for (kind, name, wanted) in [
            (Stored::Node, ObjectName::new("", "n1"), "/sluice/nodes/n1"),
            (
                Stored::Pod,
                ObjectName::new("shop", "web-1"),
                "/sluice/pods/shop/web-1",
            ),
        ] {
            let key = keys.object(kind, &name);
            assert_eq!(key, wanted);
            assert_eq!(keys.object_of(key.as_bytes()), Some((kind, name)));
        }
        for other in [
            "/sluice/nodes/",
            "/sluice/services/web",
            "/sluice/services/shop/web/x",
            "/sluice/podcidrs/10.244.1.0-24",
            "/sluicer/nodes/n1",
            "/sluice/things/shop/web",
        ] {
            assert_eq!(keys.object_of(other.as_bytes()), None, "{other}");
        }
        for cidr in ["10.244.1.0/24", "fd00:244:0:1::/64"] {
            let cidr: IpNetwork = cidr.parse().unwrap();
            assert_eq!(keys.claim_of(keys.claim(&cidr).as_bytes()), Some(cidr));
        }
        assert_eq!(keys.claim_of(b"/sluice/podcidrs/all-of-it"), None);
    }
}
