//! What the nftables backend puts into its table, finds there again and leaves behind, in a network namespace of its own.

#![allow(clippy::unwrap_used, reason = "a test says by failing what went wrong")]

mod ebpf_support;
mod variety;

use std::collections::BTreeSet;
use std::process::Command;

use ebpf_support::{Desired, empty_folder, key, on_node, port};
use sluice_daemon::netfilter::watch::{self, Watched};
use sluice_daemon::proxy::nftables::{self, NftablesProxy};
use sluice_daemon::proxy::{Dirty, Proxy};
use sluice_daemon::state::service_port::{Family, FrontendKind, Protocol};
use variety::{adjusted, backends, surroundings, sync, variety};

const CLUSTER_IP: FrontendKind = FrontendKind::ClusterIp;

fn nft(arguments: &str) -> String {
    let output = Command::new("nft").args(arguments.split(' ')).output().unwrap();
    let (said, wrong) = (
        output.stdout,
        String::from_utf8_lossy(&output.stderr).into_owned(),
    );
    assert!(output.status.success(), "nft {arguments}: {wrong}");
    String::from_utf8(said).unwrap()
}

/// The whole ruleset as text; what depends on time aside.
fn ruleset() -> String {
    nft("-s list ruleset")
}

fn open() -> NftablesProxy {
    adjusted(NftablesProxy::open())
}

/// S18 S20
#[test]
fn a_restart_writes_nothing_and_removal_leaves_nothing() {
    on_node(|_| {
        let before = ruleset();
        let mut proxy = open();
        sync(&mut proxy, &variety(), &Dirty::All);
        assert_eq!(proxy.audit().unwrap(), 0);
        let made = ruleset();
        for wanted in [
            "10.96.0.1 . tcp . 80 : goto cluster4-3",
            "fd96::1 . tcp . 80 : goto cluster6-3",
            "goto refuse",
        ] {
            assert!(made.contains(wanted), "{wanted} is missing in {made}");
        }
        let programmed = proxy.programmed().unwrap();
        let web = &programmed[&key("web", Protocol::Tcp, Family::V4)];
        assert_eq!(web.backends, backends(3));
        // Rules that were made anew would have other numbers.
        let handles = || {
            ["inside4", "cluster4-3", "learn"]
                .map(|chain| nft(&format!("-a list chain inet sluice-services {chain}")))
        };
        let numbers = handles();
        drop(proxy);
        let mut proxy = open();
        sync(&mut proxy, &variety(), &Dirty::All);
        assert_eq!(ruleset(), made);
        assert_eq!(handles(), numbers);
        assert_eq!(proxy.audit().unwrap(), 0);
        // What went while no daemon was there goes now.
        drop(proxy);
        let mut proxy = open();
        sync(&mut proxy, &Desired::new(), &Dirty::All);
        assert!(!ruleset().contains("10.96."), "{}", ruleset());
        assert!(NftablesProxy::remove().unwrap());
        assert!(!NftablesProxy::remove().unwrap());
        assert_eq!(ruleset(), before);
    });
}

/// S18 S26
#[test]
fn a_change_touches_what_it_changes_alone() {
    on_node(|_| {
        let mut proxy = open();
        let mut desired = variety();
        sync(&mut proxy, &desired, &Dirty::All);
        let (web, other) = (
            key("web", Protocol::Tcp, Family::V4),
            key("local", Protocol::Tcp, Family::V4),
        );
        for count in [4, 1, 0, 2, 3] {
            desired.insert(
                web.clone(),
                port(&[("10.96.0.1:80", CLUSTER_IP)], &backends(count)),
            );
            let only = Dirty::Only(BTreeSet::from([web.clone()]));
            sync(&mut proxy, &desired, &only);
            assert_eq!(proxy.programmed().unwrap()[&web].backends, backends(count));
            assert_eq!(proxy.programmed().unwrap()[&other].backends, backends(2));
            assert_eq!(proxy.audit().unwrap(), 0);
        }
        // The first of three goes: the last takes its number, and the one between keeps its own.
        let last_two = &backends(3)[1..];
        desired.insert(web.clone(), port(&[("10.96.0.1:80", CLUSTER_IP)], last_two));
        sync(&mut proxy, &desired, &Dirty::Only(BTreeSet::from([web.clone()])));
        let endpoints = nft("list map inet sluice-services endpoints4");
        assert!(
            endpoints.contains("10.96.0.1 . tcp . 80 . 1 : 10.244.1.1 . 8080"),
            "{endpoints}"
        );
        assert!(
            endpoints.contains("10.96.0.1 . tcp . 80 . 0 : 10.244.1.2 . 8080"),
            "{endpoints}"
        );
    });
}

/// S18: what asks who a client is, or takes down what it was given, is passed by those alone that need it.
#[test]
fn only_who_has_affinity_or_source_ranges_pays_for_them() {
    on_node(|_| {
        let mut proxy = open();
        let (mut all, web) = (variety(), key("web", Protocol::Tcp, Family::V4));
        let plain = Desired::from([(web.clone(), all[&web].clone())]);
        sync(&mut proxy, &plain, &Dirty::All);
        let made = ruleset();
        assert!(made.contains("10.96.0.1 . tcp . 80 : goto cluster4-3"), "{made}");
        for unwanted in ["chain learn", "checked"] {
            assert!(!made.contains(unwanted), "{unwanted} is in {made}");
        }
        // Nobody may connect, and nobody is there.
        let lb = key("lb", Protocol::Tcp, Family::V4);
        all.get_mut(&lb).unwrap().backends.clear();
        sync(&mut proxy, &all, &Dirty::All);
        let made = ruleset();
        for wanted in [
            "10.96.0.1 . tcp . 80 : goto cluster4-3",
            "10.96.0.2 . udp . 53 : goto checked4-cluster4-2",
            "203.0.113.1 . tcp . 80 : goto checked4-refuse",
            "type filter hook postrouting priority mangle",
            "type filter hook input priority mangle",
        ] {
            assert!(made.contains(wanted), "{wanted} is missing in {made}");
        }
        for (chain, behind) in [
            ("checked4-cluster4-2", "cluster4-2"),
            ("checked4-refuse", "refuse"),
        ] {
            let chain = nft(&format!("list chain inet sluice-services {chain}"));
            let rules: Vec<&str> = chain.lines().map(str::trim).collect();
            let wanted = ["jump check4", &format!("goto {behind}")];
            assert!(rules.windows(2).any(|rules| rules == wanted), "{chain}");
        }
        assert_eq!(proxy.audit().unwrap(), 0);
    });
}

/// S19
#[test]
fn an_address_changes_hands_in_one_transaction() {
    on_node(|_| {
        let mut proxy = open();
        let shared = ("203.0.113.1:80", FrontendKind::ExternalIp);
        let (a, b) = (
            key("a", Protocol::Tcp, Family::V4),
            key("b", Protocol::Tcp, Family::V4),
        );
        let held_by = |first: bool| -> Desired {
            let frontends = |own, has| {
                if has {
                    vec![(own, CLUSTER_IP), shared]
                } else {
                    vec![(own, CLUSTER_IP)]
                }
            };
            Desired::from([
                (a.clone(), port(&frontends("10.96.0.1:80", first), &backends(1))),
                (b.clone(), port(&frontends("10.96.0.2:80", !first), &backends(2))),
            ])
        };
        sync(&mut proxy, &held_by(true), &Dirty::All);
        for first in [false, true, false] {
            let both = Dirty::Only(BTreeSet::from([a.clone(), b.clone()]));
            sync(&mut proxy, &held_by(first), &both);
            let map = nft("list map inet sluice-services outside4");
            let wanted = if first { "cluster4-1" } else { "cluster4-2" };
            assert!(
                map.contains(&format!("203.0.113.1 . tcp . 80 : goto {wanted}")),
                "{map}"
            );
            assert_eq!(proxy.audit().unwrap(), 0);
        }
    });
}

/// K4 S18
#[test]
fn what_others_take_away_is_told_and_put_back() {
    on_node(|_| {
        let mut proxy = open();
        sync(&mut proxy, &variety(), &Dirty::All);
        let made = ruleset();
        let (sender, mut changes) = tokio::sync::mpsc::channel(1);
        let watched = Watched {
            table: nftables::TABLE,
            changed: sender,
        };
        watch::start(vec![watched]).unwrap();
        for (harm, told) in [
            ("delete table inet sluice-services", true),
            ("flush chain inet sluice-services inside4", true),
            ("flush map inet sluice-services endpoints4", false),
            (
                "delete element inet sluice-services inside4 { 10.96.0.1 . tcp . 80 }",
                false,
            ),
            (
                "add element inet sluice-services clusterips4 { 192.0.2.77 }",
                false,
            ),
        ] {
            nft(harm);
            if told {
                changes.blocking_recv().unwrap();
            }
            assert!(proxy.audit().unwrap() > 0, "{harm}");
            assert_eq!(proxy.audit().unwrap(), 0, "{harm}");
            // Sets list their elements in whatever order; lines are compared.
            let lines = |text: &str| {
                text.split([',', '\n'])
                    .map(|part| part.trim().to_owned())
                    .collect::<BTreeSet<_>>()
            };
            assert_eq!(lines(&ruleset()), lines(&made), "{harm}");
            while changes.try_recv().is_ok() {}
        }
    });
}

/// S13: for TCP too: who asks again, or asks from that port, is served.
#[test]
fn what_was_begun_before_anybody_served_it_is_forgotten() {
    on_node(|_| {
        let mut proxy = open();
        sync(&mut proxy, &Desired::new(), &Dirty::All);
        variety::ask_in_vain("10.96.0.1:80");
        assert_eq!(variety::unanswered("10.96.0.1"), 1);
        sync(&mut proxy, &variety(), &Dirty::All);
        assert_eq!(variety::unanswered("10.96.0.1"), 0);
    });
}

/// S18: who asked while the table was gone is served when it is back.
#[test]
fn what_was_begun_while_the_table_was_gone_is_forgotten() {
    on_node(|_| {
        let mut proxy = open();
        sync(&mut proxy, &variety(), &Dirty::All);
        // Connections are followed while anybody has rules that ask for it: egress has, on a node.
        nft("add table inet egress");
        nft("add chain inet egress output { type filter hook output priority 0; }");
        nft("add rule inet egress output ct state new");
        nft("delete table inet sluice-services");
        variety::ask_in_vain("10.96.0.1:80");
        assert_eq!(variety::unanswered("10.96.0.1"), 1);
        assert!(proxy.audit().unwrap() > 0);
        assert_eq!(variety::unanswered("10.96.0.1"), 0);
    });
}

/// S18: of another build's table none of this one's rules make sense, but it serves until there is something to put in its place.
#[test]
fn a_table_of_another_layout_serves_until_it_is_replaced() {
    on_node(|_| {
        nft("add table inet sluice-services");
        for chain in ["layout-0", "inside4"] {
            nft(&format!("add chain inet sluice-services {chain}"));
        }
        nft("add rule inet sluice-services inside4 counter");
        let former = ruleset();
        let mut proxy = NftablesProxy::open().unwrap();
        assert_eq!(ruleset(), former);
        proxy.adjust(&surroundings()).unwrap();
        sync(&mut proxy, &variety(), &Dirty::All);
        assert!(!ruleset().contains("layout-0"));
        assert!(ruleset().contains("10.96.0.1 . tcp . 80 : goto cluster4-3"));
        assert_eq!(proxy.audit().unwrap(), 0);
    });
}

/// S13 S18: the table is gone before anybody looked: the next sync makes it good, and looks for what the failed one left stale.
#[test]
fn after_a_failure_datagrams_go_where_somebody_is() {
    on_node(|_| {
        let mut proxy = open();
        let (mut desired, dns) = (variety(), key("dns", Protocol::Udp, Family::V4));
        sync(&mut proxy, &desired, &Dirty::All);
        variety::send_in_vain("10.96.0.2:53");
        assert_eq!(variety::unanswered("10.96.0.2"), 1);
        nft("delete table inet sluice-services");
        desired.remove(&dns);
        proxy.sync(&desired, &Dirty::Only([dns].into())).unwrap_err();
        assert_eq!(variety::unanswered("10.96.0.2"), 1);
        sync(&mut proxy, &desired, &Dirty::All);
        assert_eq!(variety::unanswered("10.96.0.2"), 0);
        assert_eq!(proxy.audit().unwrap(), 0);
        assert!(ruleset().contains("10.96.0.1 . tcp . 80 : goto cluster4-3"));
    });
}

/// S20: who chooses it is told what is missing.
#[test]
fn without_the_tool_it_says_which_package_has_it() {
    on_node(|_| {
        empty_folder("/usr/sbin");
        let error = NftablesProxy::open().err().expect("there is no tool");
        let said = format!("{error:#}");
        assert!(said.contains("package nftables"), "{said}");
    });
}
