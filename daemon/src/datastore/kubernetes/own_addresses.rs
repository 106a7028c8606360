//! The API servers' own addresses, learned from the slices of the `kubernetes` Service. Pure.

use std::collections::BTreeMap;
use std::net::SocketAddr;

use http::Uri;

use crate::datastore::Event;
use crate::state::objects::{EndpointSlice, Kind, Object, ObjectName};

/// What is known of them, by the slice that has them.
#[derive(Debug, Default)]
pub struct OwnAddresses(BTreeMap<ObjectName, Vec<Uri>>);

impl OwnAddresses {
    /// All of them.
    pub fn all(&self) -> Vec<Uri> {
        self.0.values().flatten().cloned().collect()
    }

    /// Takes them from an object, if it has them.
    pub fn learn(&mut self, object: &Object) {
        if let Object::EndpointSlice(slice) = object {
            self.learn_from(slice);
        }
    }

    /// Follows what became of objects.
    pub fn follow(&mut self, event: &Event) {
        match event {
            Event::Upsert(object) => self.learn(object),
            Event::Remove(Kind::EndpointSlice, name) => _ = self.0.remove(name),
            _ => {}
        }
    }

    fn learn_from(&mut self, slice: &EndpointSlice) {
        if (slice.name.namespace.as_str(), slice.service.as_str()) != ("default", "kubernetes") {
            return;
        }
        let port = slice.ports.iter().find(|port| port.name == "https");
        let addresses = slice.endpoints.iter().filter_map(|endpoint| {
            let address = SocketAddr::new(endpoint.address, port?.number);
            format!("https://{address}").parse().ok()
        });
        self.0.insert(slice.name.clone(), addresses.collect());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::objects::{Endpoint, NamedPort};
    use crate::state::service_port::{Family, Protocol};

    /// D2
    #[test]
    fn they_come_and_go_with_their_slices() {
        let endpoint = |address: &str| Endpoint {
            address: address.parse().unwrap(),
            ready: true,
            serving: true,
            terminating: false,
            node: None,
            hints: None,
        };
        let slice = EndpointSlice {
            name: ObjectName::new("default", "kubernetes"),
            service: "kubernetes".into(),
            family: Family::V4,
            ports: vec![NamedPort {
                name: "https".into(),
                protocol: Protocol::Tcp,
                number: 6443,
            }],
            endpoints: vec![endpoint("192.0.2.1"), endpoint("192.0.2.2")],
            triggered: None,
        };
        let mut own = OwnAddresses::default();
        let name = slice.name.clone();
        own.follow(&Event::Upsert(Object::EndpointSlice(slice)));
        let known: Vec<_> = own.all().iter().map(ToString::to_string).collect();
        assert_eq!(known, ["https://192.0.2.1:6443/", "https://192.0.2.2:6443/"]);
        own.follow(&Event::Remove(Kind::EndpointSlice, name));
        assert!(own.all().is_empty());
    }
}
