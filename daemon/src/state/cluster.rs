//! All objects of the cluster, folded from a datastore's events, and which Services each event touches.

use std::borrow::Borrow;
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Bound;

use litemap::LiteMap;

use super::objects::{EndpointSlice, Kind, Node, Object, ObjectName, Pod, Service};

/// What a change of an object touches.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Touched {
    /// Whether nodes changed: routes, tunnels, node addresses.
    pub nodes: bool,
    /// Services whose frontends or backends may have changed.
    pub services: BTreeSet<ObjectName>,
}

/// The cluster as its datastore describes it.
#[derive(Debug, Default)]
pub struct Cluster {
    nodes: BTreeMap<String, Node>,
    services: BTreeMap<ObjectName, Service>,
    /// By Service, then by the slice's own name; most have one, for which a tree would take the room of eleven.
    slices: BTreeMap<ObjectName, LiteMap<ObjectName, Box<EndpointSlice>>>,
    slice_owner: BTreeMap<ObjectName, ObjectName>,
    pods: BTreeMap<ObjectName, Pod>,
}

/// Where an object stands among all: by kind, then by name; a slice where its Service stands among those that have slices.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place(Kind, ObjectName);

/// Where in the order of names the objects of `kind` behind `place` begin; nothing where none of them is.
fn after(place: Option<&Place>, kind: Kind) -> Option<Bound<&ObjectName>> {
    match place {
        Some(Place(of, _)) if *of > kind => None,
        Some(Place(of, name)) if *of == kind => Some(Bound::Excluded(name)),
        _ => Some(Bound::Unbounded),
    }
}

fn rest<'a, K, Q, V>(
    map: &'a BTreeMap<K, V>,
    begin: Option<Bound<&Q>>,
) -> impl Iterator<Item = (&'a K, &'a V)>
where
    K: Borrow<Q> + Ord,
    Q: Ord + ?Sized,
{
    let range = begin.map(|begin| map.range((begin, Bound::Unbounded)));
    range.into_iter().flatten()
}

impl Cluster {
    /// Adds `object`, or replaces its older self. The same again touches nothing.
    pub fn upsert(&mut self, object: Object) -> Touched {
        match object {
            Object::Node(node) => {
                let zone = node.zone.clone();
                let old = self.nodes.insert(node.name.clone(), node.clone());
                let moved = old.as_ref().and_then(|old| old.zone.as_ref()) != zone.as_ref();
                Touched {
                    nodes: old != Some(node),
                    services: if moved {
                        self.followers_of_zones()
                    } else {
                        BTreeSet::new()
                    },
                }
            }
            Object::Service(service) => {
                let name = service.name.clone();
                if self.services.get(&name) == Some(&service) {
                    return Touched::default();
                }
                self.services.insert(name.clone(), service);
                Touched {
                    nodes: false,
                    services: BTreeSet::from([name]),
                }
            }
            Object::EndpointSlice(slice) => {
                if self.slice(&slice.name) == Some(&slice) {
                    return Touched::default();
                }
                let mut touched = self.remove_slice(&slice.name);
                let owner = ObjectName::new(slice.name.namespace.clone(), slice.service.clone());
                self.slice_owner.insert(slice.name.clone(), owner.clone());
                self.slices
                    .entry(owner.clone())
                    .or_default()
                    .insert(slice.name.clone(), Box::new(slice));
                touched.services.insert(owner);
                touched
            }
            Object::Pod(pod) => {
                let mut services = self.selecting(&pod);
                let name = pod.name.clone();
                if let Some(old) = self.pods.insert(name, pod) {
                    services.extend(self.selecting(&old));
                }
                Touched {
                    nodes: false,
                    services,
                }
            }
        }
    }

    /// Removes an object; one that is not there touches nothing.
    pub fn remove(&mut self, kind: Kind, name: &ObjectName) -> Touched {
        match kind {
            Kind::Node => match self.nodes.remove(name.name.as_str()) {
                None => Touched::default(),
                Some(old) => Touched {
                    nodes: true,
                    services: old.zone.map_or_else(BTreeSet::new, |_| self.followers_of_zones()),
                },
            },
            Kind::Service => {
                let services = self
                    .services
                    .remove(name)
                    .map(|service| service.name)
                    .into_iter()
                    .collect();
                Touched {
                    nodes: false,
                    services,
                }
            }
            Kind::EndpointSlice => self.remove_slice(name),
            Kind::Pod => {
                let services = self
                    .pods
                    .remove(name)
                    .map(|pod| self.selecting(&pod))
                    .unwrap_or_default();
                Touched {
                    nodes: false,
                    services,
                }
            }
        }
    }

    /// All objects.
    pub fn objects(&self) -> impl Iterator<Item = Object> {
        self.objects_after(None).map(|(_, object)| object)
    }

    /// The objects behind a place in an order that does not change while objects come and go, each with its own place; all of them
    /// without one. Slices of one Service share a place.
    pub fn objects_after(&self, place: Option<&Place>) -> impl Iterator<Item = (Place, Object)> {
        let of_nodes = after(place, Kind::Node).map(|begin| begin.map(|name| name.name.as_str()));
        let nodes = rest(&self.nodes, of_nodes).map(|(name, node)| {
            let place = Place(Kind::Node, ObjectName::new("", name.as_str()));
            (place, Object::Node(node.clone()))
        });
        let services = rest(&self.services, after(place, Kind::Service)).map(|(name, service)| {
            let place = Place(Kind::Service, name.clone());
            (place, Object::Service(service.clone()))
        });
        let of_slices = after(place, Kind::EndpointSlice);
        let slices = rest(&self.slices, of_slices).flat_map(|(service, slices)| {
            slices.values().map(|slice| {
                let place = Place(Kind::EndpointSlice, service.clone());
                (place, Object::EndpointSlice(EndpointSlice::clone(slice)))
            })
        });
        let pods = rest(&self.pods, after(place, Kind::Pod)).map(|(name, pod)| {
            let place = Place(Kind::Pod, name.clone());
            (place, Object::Pod(pod.clone()))
        });
        nodes.chain(services).chain(slices).chain(pods)
    }

    /// All nodes, by name.
    pub fn nodes(&self) -> impl Iterator<Item = &Node> {
        self.nodes.values()
    }

    /// The node called `name`.
    pub fn node(&self, name: &str) -> Option<&Node> {
        self.nodes.get(name)
    }

    /// All Services, by name.
    pub fn services(&self) -> impl Iterator<Item = &Service> {
        self.services.values()
    }

    /// The Service called `name`.
    pub fn service(&self, name: &ObjectName) -> Option<&Service> {
        self.services.get(name)
    }

    /// The slices of the Service called `name`.
    pub fn slices(&self, name: &ObjectName) -> impl Iterator<Item = &EndpointSlice> {
        let slices = self.slices.get(name).into_iter().flat_map(LiteMap::values);
        slices.map(Box::as_ref)
    }

    /// The names that slices give as their Services', whether or not there are any.
    pub fn owners_of_slices(&self) -> impl Iterator<Item = &ObjectName> {
        self.slices.keys()
    }

    /// The pods that `service` selects; none if it has no selector.
    pub fn selected<'a>(&'a self, service: &'a Service) -> impl Iterator<Item = &'a Pod> {
        self.pods
            .range(ObjectName::new(service.name.namespace.clone(), "")..)
            .map(|(_, pod)| pod)
            .take_while(|pod| pod.name.namespace == service.name.namespace)
            .filter(|pod| selects(service, pod))
    }

    /// Number of pods known.
    pub fn pod_count(&self) -> usize {
        self.pods.len()
    }

    fn slice(&self, name: &ObjectName) -> Option<&EndpointSlice> {
        let slices = self.slices.get(self.slice_owner.get(name)?)?;
        slices.get(name).map(Box::as_ref)
    }

    fn remove_slice(&mut self, name: &ObjectName) -> Touched {
        let Some(owner) = self.slice_owner.remove(name) else {
            return Touched::default();
        };
        if let Some(slices) = self.slices.get_mut(&owner) {
            slices.remove(name);
            if slices.is_empty() {
                self.slices.remove(&owner);
            }
        }
        Touched {
            nodes: false,
            services: BTreeSet::from([owner]),
        }
    }

    /// The Services whose endpoints have their zones from nodes and not from an endpoint controller.
    fn followers_of_zones(&self) -> BTreeSet<ObjectName> {
        self.services
            .values()
            .filter(|service| service.distribution.is_some() && !self.slices.contains_key(&service.name))
            .map(|service| service.name.clone())
            .collect()
    }

    fn selecting(&self, pod: &Pod) -> BTreeSet<ObjectName> {
        self.services
            .range(ObjectName::new(pod.name.namespace.clone(), "")..)
            .map(|(_, service)| service)
            .take_while(|service| service.name.namespace == pod.name.namespace)
            .filter(|service| selects(service, pod))
            .map(|service| service.name.clone())
            .collect()
    }
}

fn selects(service: &Service, pod: &Pod) -> bool {
    !service.selector.is_empty()
        && service
            .selector
            .iter()
            .all(|(key, value)| pod.labels.get(key) == Some(value))
}
