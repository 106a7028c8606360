//! The one screen: a stranger reads it and knows what is wrong.

use std::fmt::Write;

use sluice_daemon::admin::report::{Pool, Status};

use crate::paint::Paint;

/// A pool that is fuller than this, in percent, is worth a word.
const NEARLY_FULL: u128 = 90;

/// The status as one screen of text.
pub fn screen(status: &Status) -> String {
    let paint = Paint::for_stdout();
    let mut text = String::new();
    // Writing to a string cannot fail.
    let _ = writeln!(text, "{}\n", headline(status, &paint));
    for (number, problem) in status.problems.iter().enumerate() {
        let _ = writeln!(text, "  {} {problem}", paint.red(&format!("{}.", number + 1)));
    }
    for awaited in &status.awaiting {
        let _ = writeln!(text, "  {} {awaited}", paint.yellow("waiting for"));
    }
    if !status.problems.is_empty() || !status.awaiting.is_empty() {
        text.push('\n');
    }
    for (name, value) in rows(status) {
        let _ = writeln!(text, "  {name:<11}{value}");
    }
    text
}

fn headline(status: &Status, paint: &Paint) -> String {
    let verdict = match (status.awaiting.len(), status.problems.len()) {
        (0, 0) => paint.green("healthy"),
        (0, 1) => paint.red("one problem"),
        (0, count) => paint.red(&format!("{count} problems")),
        (_, 0) => paint.yellow("not ready for pods yet"),
        (_, count) => paint.red(&format!("not ready for pods, {}", counted(count, "problem"))),
    };
    let uptime = duration(status.uptime_seconds);
    format!(
        "{}: {verdict}  (sluiced {}, up {uptime})",
        status.node, status.version
    )
}

fn rows(status: &Status) -> Vec<(&'static str, String)> {
    let store = &status.datastore;
    let network = &status.network;
    let proxy = &status.proxy;
    let mut rows = vec![
        (
            "datastore",
            format!(
                "{}: {}, {}, {}",
                store.source,
                counted(store.nodes, "node"),
                counted(store.services, "Service"),
                counted(store.pods, "pod")
            ),
        ),
        (
            "network",
            format!(
                "{} over {}, pod MTU {}; pod CIDRs elsewhere: {} by direct route, {} through vxlan",
                network.backend, network.uplink, network.pod_mtu, network.direct, network.tunnelled
            ),
        ),
    ];
    rows.extend(status.pools.iter().map(|pool| ("addresses", pool_row(pool))));
    let mode = if proxy.mode.is_empty() {
        "not programmed yet"
    } else {
        &proxy.mode
    };
    let reason = match proxy.reason.as_str() {
        "" => String::new(),
        reason => format!(" ({reason})"),
    };
    rows.push((
        "services",
        format!(
            "{mode}{reason}: {}, {}, {}",
            counted(proxy.service_ports, "Service port"),
            counted(proxy.frontends, "frontend"),
            counted(proxy.backends, "backend")
        ),
    ));
    let egress = if status.masquerade {
        "with the node's address"
    } else {
        "with their own address"
    };
    rows.push(("egress", format!("pods leave the cluster {egress}")));
    rows.push((
        "drift",
        format!(
            "{} repaired since start",
            counted_u64(status.drift_repaired, "kernel object")
        ),
    ));
    rows
}

fn pool_row(pool: &Pool) -> String {
    let warning = if pool.held.saturating_mul(100) >= pool.size.saturating_mul(NEARLY_FULL) {
        "; nearly full: give the node another pod CIDR"
    } else {
        ""
    };
    // Nobody counts an IPv6 subnet's addresses.
    let size = u32::try_from(pool.size)
        .map(|size| format!(" of {size}"))
        .unwrap_or_default();
    format!(
        "{}: {}{size} held, {} resting{warning}",
        pool.cidr, pool.held, pool.resting
    )
}

fn counted(count: usize, what: &str) -> String {
    counted_u64(count as u64, what)
}

fn counted_u64(count: u64, what: &str) -> String {
    if count == 1 {
        format!("1 {what}")
    } else {
        format!("{count} {what}s")
    }
}

/// A length of time as people say it.
pub fn duration(seconds: u64) -> String {
    match seconds {
        0..60 => format!("{seconds} s"),
        60..3600 => format!("{} min", seconds / 60),
        3600..86400 => format!("{} h {} min", seconds / 3600, seconds / 60 % 60),
        _ => format!("{} days", seconds / 86400),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// O1
    #[test]
    fn a_stranger_reads_what_is_wrong_first() {
        let mut status = Status {
            node: "node1".to_owned(),
            version: "0.1.0".to_owned(),
            ..Status::default()
        };
        assert!(screen(&status).starts_with("node1: healthy  (sluiced 0.1.0, up 0 s)"));
        status.problems = vec!["10.244.9.0/24 is claimed by node2 and node3".to_owned()];
        status.awaiting = vec!["a pod CIDR".to_owned()];
        let screen = screen(&status);
        assert!(
            screen.starts_with("node1: not ready for pods, 1 problem "),
            "{screen}"
        );
        assert!(screen.contains("  1. 10.244.9.0/24 is claimed"), "{screen}");
        assert!(screen.contains("  waiting for a pod CIDR"), "{screen}");
        assert!(!screen.contains('\x1b'), "colours are for terminals: {screen:?}");
    }

    /// I3
    #[test]
    fn a_nearly_full_pool_is_said() {
        let pool = |held| Pool {
            cidr: "10.244.1.0/24".to_owned(),
            size: 253,
            held,
            resting: 0,
        };
        assert!(pool_row(&pool(240)).contains("nearly full"));
        assert!(!pool_row(&pool(20)).contains("nearly full"));
    }
}
