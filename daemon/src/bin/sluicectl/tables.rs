//! Lists as tables without rulers: easy on the eye, easy on `grep` and `awk`.

use comfy_table::{Table, presets};
use sluice_daemon::admin::report::{Connection, Node, Route, Service};

use crate::allocations::Held;
use crate::status::duration;

/// One row per node.
pub fn nodes(nodes: &[Node]) -> String {
    let addresses = |node: &Node| joined(&node.addresses);
    let rows = nodes.iter().map(|n| {
        [
            n.name.clone(),
            addresses(n),
            n.pod_cidrs.join(","),
            n.path.clone(),
        ]
    });
    table(["NODE", "ADDRESSES", "POD CIDRS", "PODS REACHED BY"], rows)
}

/// One row per pod CIDR.
pub fn routes(routes: &[Route]) -> String {
    let rows = routes.iter().map(|route| {
        [
            route.pod_cidr.clone(),
            route.node.clone(),
            route.path.clone(),
            joined(route.via.as_slice()),
            route.device.clone(),
            joined(route.tunnel_end.as_slice()),
            route.failure.clone(),
        ]
    });
    table(
        ["POD CIDR", "NODE", "PATH", "VIA", "DEVICE", "TUNNEL END", "NOTE"],
        rows,
    )
}

/// One row per frontend.
pub fn services(services: &[Service]) -> String {
    let rows = services.iter().flat_map(|service| {
        service.frontends.iter().map(|frontend| {
            let endpoints = match service.backends.len() {
                0 => "none: connections are refused".to_owned(),
                count => count.to_string(),
            };
            let note = match (&service.failure, service.affinity_seconds) {
                (failure, _) if !failure.is_empty() => failure.clone(),
                (_, 0) => String::new(),
                (_, seconds) => format!("sticky for {seconds} s"),
            };
            [
                named(service),
                frontend.kind.clone(),
                frontend.address.to_string(),
                endpoints,
                note,
            ]
        })
    });
    table(["SERVICE PORT", "KIND", "ADDRESS", "ENDPOINTS", "NOTE"], rows)
}

/// One row per endpoint.
pub fn endpoints(services: &[Service]) -> String {
    let rows = services.iter().flat_map(|service| {
        service
            .backends
            .iter()
            .map(|backend| [named(service), backend.to_string()])
    });
    table(["SERVICE PORT", "ENDPOINT"], rows)
}

/// One row per connection.
pub fn connections(connections: &[Connection]) -> String {
    let rows = connections.iter().map(|connection| {
        [
            if connection.service.is_empty() {
                format!("none any more/{}", connection.protocol)
            } else {
                connection.service.clone()
            },
            connection.client.to_string(),
            connection.frontend.to_string(),
            connection.backend.to_string(),
            connection
                .stand_in
                .map_or_else(|| "the client's".to_owned(), |address| address.to_string()),
            connection.state.clone(),
            duration(connection.idle_seconds),
        ]
    });
    table(
        [
            "SERVICE PORT",
            "CLIENT",
            "FRONTEND",
            "ENDPOINT",
            "SOURCE SEEN",
            "STATE",
            "IDLE",
        ],
        rows,
    )
}

/// One row per pod interface.
pub fn allocations(held: &[Held]) -> String {
    let rows = held.iter().map(|h| {
        let since = duration(h.held_for_seconds);
        [
            joined(&h.addresses),
            h.container_id.clone(),
            h.ifname.clone(),
            h.netns.clone(),
            since,
        ]
    });
    table(
        ["ADDRESSES", "CONTAINER", "INTERFACE", "SANDBOX", "HELD FOR"],
        rows,
    )
}

fn named(service: &Service) -> String {
    let port = if service.port.is_empty() {
        String::new()
    } else {
        format!(":{}", service.port)
    };
    format!(
        "{}/{}{port}/{}",
        service.namespace, service.name, service.protocol
    )
}

fn joined<T: ToString>(list: &[T]) -> String {
    list.iter().map(ToString::to_string).collect::<Vec<_>>().join(",")
}

/// Columns under their heads.
pub fn table<const N: usize>(head: [&str; N], rows: impl Iterator<Item = [String; N]>) -> String {
    let mut table = Table::new();
    table.load_preset(presets::NOTHING).set_header(head);
    for row in rows {
        table.add_row(row);
    }
    for column in table.column_iter_mut() {
        column.set_padding((0, 3));
    }
    table
        .lines()
        .map(|line| format!("{}\n", line.trim_end()))
        .collect()
}
