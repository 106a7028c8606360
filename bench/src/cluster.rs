//! Clusters of any size, as their datastore would tell them.

use std::fmt;
use std::net::{Ipv4Addr, SocketAddrV4};

use anyhow::{Result, anyhow, bail};
use sluice_daemon::datastore::Event;
use sluice_daemon::datastore::wire::{self, Document};

/// The node all is measured on.
pub const NODE: &str = "bench";
/// Its address.
pub const NODE_ADDRESS: &str = "172.30.0.11";
/// As many endpoints go into a slice as Kubernetes' controller puts there (`--max-endpoints-per-slice`, at most 1,000).
const SLICE: u32 = 1_000;

/// How large a cluster is.
#[derive(Debug, Clone, Copy)]
pub struct Shape {
    /// How many Services.
    pub services: u32,
    /// How many endpoints each has.
    pub endpoints: u32,
}

impl Shape {
    pub const fn of(services: u32, endpoints: u32) -> Self {
        Self { services, endpoints }
    }

    /// Where clients of a Service connect; later Services have higher addresses.
    pub fn frontend(self, service: u32) -> SocketAddrV4 {
        SocketAddrV4::new(
            Ipv4Addr::from(u32::from(Ipv4Addr::new(10, 96, 1, 0)) + service),
            80,
        )
    }

    /// Where one of a Service's endpoints is.
    pub fn endpoint(self, service: u32, number: u32) -> Ipv4Addr {
        Ipv4Addr::from(u32::from(Ipv4Addr::new(10, 128, 0, 1)) + service * self.endpoints + number)
    }

    /// The slice of a Service that begins with its endpoint `first`, whose first endpoint is `replaced` if given.
    fn slice(self, service: u32, first: u32, replaced: Option<Ipv4Addr>) -> Result<Vec<Event>> {
        let end = (first + SLICE).min(self.endpoints);
        let endpoints: Vec<String> = (first..end)
            .map(|number| match replaced.filter(|_| number == first) {
                Some(address) => address,
                None => self.endpoint(service, number),
            })
            .map(|address| {
                format!(
                    "{{\"addresses\": [\"{address}\"], \"nodeName\": \"node-{}\"}}",
                    service % 100
                )
            })
            .collect();
        objects(&format!(
            "{{\"apiVersion\": \"discovery.k8s.io/v1\", \"kind\": \"EndpointSlice\",\n\
             \"metadata\": {{\"name\": \"{name}-{first}\", \"namespace\": \"bench\",\n\
             \"labels\": {{\"kubernetes.io/service-name\": \"{name}\"}}}},\n\
             \"addressType\": \"IPv4\", \"ports\": [{{\"name\": \"http\", \"port\": 8080, \"protocol\": \"TCP\"}}],\n\
             \"endpoints\": [{}]}}",
            endpoints.join(",\n"),
            name = name(service),
        ))
    }
}

impl fmt::Display for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} × {}", self.services, self.endpoints)
    }
}

/// Names sort as numbers do: the daemon programs Services in the order of their names.
fn name(service: u32) -> String {
    format!("service-{service:06}")
}

/// The node and all Services with their endpoints.
pub fn everything(shape: Shape) -> Result<Vec<Event>> {
    let mut events = objects(&format!(
        "apiVersion: v1\nkind: Node\nmetadata: {{name: {NODE}}}\nspec: {{podCIDRs: [10.244.1.0/24]}}\n\
         status: {{addresses: [{{type: InternalIP, address: {NODE_ADDRESS}}}]}}\n"
    ))?;
    for service in 0..shape.services {
        let (name, address) = (name(service), *shape.frontend(service).ip());
        events.extend(objects(&format!(
            "{{\"apiVersion\": \"v1\", \"kind\": \"Service\",\n\
             \"metadata\": {{\"name\": \"{name}\", \"namespace\": \"bench\"}},\n\
             \"spec\": {{\"clusterIP\": \"{address}\", \"selector\": {{\"app\": \"{name}\"}},\n\
             \"ports\": [{{\"name\": \"http\", \"port\": 80, \"targetPort\": 8080, \"protocol\": \"TCP\"}}]}}}}"
        ))?);
        for first in (0..shape.endpoints).step_by(SLICE as usize) {
            events.extend(shape.slice(service, first, None)?);
        }
    }
    Ok(events)
}

/// One endpoint of a Service gives way to another: what is sent, and the newcomer.
pub fn changed(shape: Shape, service: u32, round: usize) -> Result<(Event, SocketAddrV4)> {
    let newcomer = Ipv4Addr::from(u32::from(Ipv4Addr::new(10, 200, 0, 1)) + u32::try_from(round)?);
    let slice = shape.slice(service, 0, Some(newcomer))?;
    let event = slice.into_iter().next().ok_or_else(|| anyhow!("no slice"))?;
    Ok((event, SocketAddrV4::new(newcomer, 8080)))
}

/// What Kubernetes YAML says, as a datastore would tell it.
pub fn objects(text: &str) -> Result<Vec<Event>> {
    match wire::parse(text).map_err(|error| anyhow!("{text}: {error}"))? {
        Document::Objects { objects, .. } => Ok(objects.into_iter().map(Event::Upsert).collect()),
        Document::Other => bail!("{text}: nothing of Sluice's"),
    }
}
