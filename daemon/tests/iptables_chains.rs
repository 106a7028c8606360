//! What the iptables backend puts into the tables of either flavour, finds there again and leaves behind, in a network namespace of its
//! own.

#![allow(clippy::unwrap_used, reason = "a test says by failing what went wrong")]

mod ebpf_support;
mod variety;

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::os::unix::fs::PermissionsExt;
use std::process::Command;

use ebpf_support::{Desired, empty_folder, key, on_node, port};
use nix::fcntl::{Flock, FlockArg};
use nix::mount::{MsFlags, mount, umount};
use sluice_daemon::proxy::iptables::IptablesProxy;
use sluice_daemon::proxy::{Dirty, Proxy};
use sluice_daemon::state::service_port::{Family, FrontendKind, Protocol};
use variety::{adjusted, backends, sync, variety};

const CLUSTER_IP: FrontendKind = FrontendKind::ClusterIp;

/// Runs `test` on a node where this flavour is at work, in company: kube-proxy's leftovers and an operator's rules.
fn with(flavour: &'static str, test: impl FnOnce() + Send) {
    on_node(|_| {
        // The lock that all of the legacy flavour take is this node's own.
        empty_folder("/run");
        for family in ["iptables", "ip6tables"] {
            for rule in [
                "-t nat -N KUBE-SERVICES",
                "-t nat -A PREROUTING -j KUBE-SERVICES",
                "-A FORWARD -i virbr0 -j ACCEPT",
                "-N SLUICE-FORWARD",
            ] {
                run(&format!("{family}-{flavour}"), rule);
            }
        }
        test();
    });
}

fn run(program: &str, arguments: &str) -> String {
    let output = Command::new(program)
        .args(arguments.split_whitespace())
        .output()
        .unwrap();
    let wrong = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {arguments}: {wrong}");
    String::from_utf8(output.stdout).unwrap()
}

/// All tables of both families, without what changes by itself: the time of day, and what the chains counted.
fn saved(flavour: &str) -> String {
    let mut saved = String::new();
    for family in ["iptables", "ip6tables"] {
        for line in run(&format!("{family}-{flavour}-save"), "").lines() {
            let line = match line.split_once(" [") {
                Some((chain, _)) if chain.starts_with(':') => chain,
                _ => line,
            };
            if !line.starts_with('#') {
                saved.push_str(line);
                saved.push('\n');
            }
        }
    }
    saved
}

fn open() -> IptablesProxy {
    adjusted(IptablesProxy::open())
}

fn held_lock() -> Flock<File> {
    let file = File::create("/run/xtables.lock").unwrap();
    Flock::lock(file, FlockArg::LockExclusive).unwrap()
}

/// S18 S20: and what others have there is as it was.
#[test]
fn a_restart_writes_nothing_and_removal_leaves_nothing() {
    for flavour in ["legacy", "nft"] {
        with(flavour, || {
            let before = saved(flavour);
            let mut proxy = open();
            assert!(proxy.flavour().ends_with(flavour), "{}", proxy.flavour());
            sync(&mut proxy, &variety(), &Dirty::All);
            // What is drawn is what iptables-save writes, word by word.
            assert_eq!(proxy.audit().unwrap(), 0, "{}", saved(flavour));
            let made = saved(flavour);
            for wanted in [
                "-d 10.96.0.1/32 -p tcp -m tcp --dport 80 -j SLUICE-S-web-",
                "-d fd96::1/128 -p tcp -m tcp --dport 80 -j SLUICE-S-web-",
                "-s 192.0.2.0/24 -d 203.0.113.1/32 -p tcp -m tcp --dport 80 -j SLUICE-S-lb-",
                "-d 203.0.113.1/32 -p tcp -m tcp --dport 80 -j DROP",
                "-p udp -m recent --set --name SLUICE-E-dns-",
                "-d 10.96.0.4/32 -j SLUICE-REFUSE",
            ] {
                assert!(made.contains(wanted), "{wanted} is missing in {made}");
            }
            let programmed = proxy.programmed().unwrap();
            for (key, port) in variety() {
                let there = &programmed[&key];
                let frontends: Vec<_> = port.frontends.iter().map(|f| f.address).collect();
                let endpoints: Vec<_> = port.backends.iter().map(|b| b.address).collect();
                assert_eq!(
                    (&there.frontends, &there.backends),
                    (&frontends, &endpoints),
                    "{key}"
                );
            }
            drop(proxy);
            let mut proxy = open();
            {
                // Who wants to write would wait for the lock in vain; the nft flavour has none.
                let _held = held_lock();
                sync(&mut proxy, &variety(), &Dirty::All);
            }
            assert_eq!(saved(flavour), made);
            // What went while no daemon was there goes now.
            drop(proxy);
            let mut proxy = open();
            sync(&mut proxy, &Desired::new(), &Dirty::All);
            assert!(!saved(flavour).contains("10.96."), "{}", saved(flavour));
            assert!(IptablesProxy::remove().unwrap());
            assert!(!IptablesProxy::remove().unwrap());
            assert_eq!(saved(flavour), before);
        });
    }
}

/// S18
#[test]
fn a_change_touches_what_it_changes_alone() {
    with("nft", || {
        let mut proxy = open();
        let mut desired = variety();
        sync(&mut proxy, &desired, &Dirty::All);
        // Rules that are written anew get another number.
        let rules = || -> BTreeSet<String> {
            let numbered = run("nft", "-a list ruleset");
            let lines = numbered.lines().filter(|line| line.contains("# handle"));
            lines.map(|line| line.trim().to_owned()).collect()
        };
        let web = key("web", Protocol::Tcp, Family::V4);
        for count in [4, 1, 0, 2, 100, 3] {
            let before = rules();
            desired.insert(
                web.clone(),
                port(&[("10.96.0.1:80", CLUSTER_IP)], &backends(count)),
            );
            let only = Dirty::Only(BTreeSet::from([web.clone()]));
            sync(&mut proxy, &desired, &only);
            assert_eq!(proxy.programmed().unwrap()[&web].backends, backends(count));
            assert_eq!(proxy.audit().unwrap(), 0);
            let gone: Vec<_> = before.difference(&rules()).cloned().collect();
            let others = ["10.96.0.2", "203.0.113.1", "fd96::1", "SLUICE-S-dns", "hook"];
            for rule in gone {
                // The chain that leads to it, while it is small, is everybody's.
                let leads = rule.contains("dport") || rule.contains("icmp");
                assert!(
                    leads || !others.iter().any(|other| rule.contains(other)),
                    "{rule} was written anew for {count} endpoints"
                );
            }
        }
    });
}

/// K4 S18
#[test]
fn what_others_take_away_is_told_and_put_back() {
    for flavour in ["legacy", "nft"] {
        with(flavour, || {
            let mut proxy = open();
            sync(&mut proxy, &variety(), &Dirty::All);
            let made = saved(flavour);
            for harm in [
                "-t nat -F SLUICE-SERVICES",
                "-t nat -D PREROUTING -j SLUICE-SERVICES",
                "-D FORWARD -m conntrack --ctstate NEW -j SLUICE-SERVICES",
                "-I SLUICE-CLUSTERIP -j ACCEPT",
                "-t nat -N SLUICE-S-stranger",
            ] {
                run(&format!("iptables-{flavour}"), harm);
                assert!(proxy.audit().unwrap() > 0, "{harm}");
                assert_eq!(proxy.audit().unwrap(), 0, "{harm}");
                // An entrance that comes back comes first.
                let lines = |text: &str| text.lines().map(str::to_owned).collect::<BTreeSet<_>>();
                assert_eq!(lines(&saved(flavour)), lines(&made), "{harm}");
            }
        });
    }
}

/// S18: and nothing is lost by it.
#[test]
fn a_lock_that_another_holds_is_named_and_waited_for_again() {
    with("legacy", || {
        let mut proxy = open();
        // More than the tool takes from a pipe without reading it.
        let mut desired = variety();
        let many = port(&[("10.96.0.1:80", CLUSTER_IP)], &backends(2000));
        desired.insert(key("web", Protocol::Tcp, Family::V4), many);
        {
            let _held = held_lock();
            let error = proxy.sync(&desired, &Dirty::All).unwrap_err();
            let said = format!("{error:#}");
            assert!(
                said.contains("iptables-legacy-restore --noflush --wait"),
                "{said}"
            );
            assert!(said.contains("lock"), "{said}");
        }
        sync(&mut proxy, &desired, &Dirty::All);
        assert_eq!(proxy.audit().unwrap(), 0);
    });
}

/// S13: for TCP too: who asks again, or asks from that port, is served.
#[test]
fn what_was_begun_before_anybody_served_it_is_forgotten() {
    with("nft", || {
        let mut proxy = open();
        sync(&mut proxy, &Desired::new(), &Dirty::All);
        variety::ask_in_vain("10.96.0.1:80");
        assert_eq!(variety::unanswered("10.96.0.1"), 1);
        sync(&mut proxy, &variety(), &Dirty::All);
        assert_eq!(variety::unanswered("10.96.0.1"), 0);
    });
}

/// S18: who asked while the rules were gone is served when they are back.
#[test]
fn what_was_begun_while_the_rules_were_gone_is_forgotten() {
    with("nft", || {
        let mut proxy = open();
        sync(&mut proxy, &variety(), &Dirty::All);
        // Connections are followed while anybody has rules that ask for it: egress has, on a node.
        run("iptables-nft", "-t raw -A OUTPUT -m conntrack --ctstate NEW");
        for table in ["nat", "filter"] {
            run("iptables-nft", &format!("-t {table} -F"));
        }
        variety::ask_in_vain("10.96.0.1:80");
        assert_eq!(variety::unanswered("10.96.0.1"), 1);
        assert!(proxy.audit().unwrap() > 0);
        assert_eq!(variety::unanswered("10.96.0.1"), 0);
    });
}

/// S13: what a sync that failed changed is looked for once it is made good.
#[test]
fn after_a_failure_datagrams_go_where_somebody_is() {
    with("legacy", || {
        let mut proxy = open();
        let (mut desired, dns) = (variety(), key("dns", Protocol::Udp, Family::V4));
        sync(&mut proxy, &desired, &Dirty::All);
        variety::send_in_vain("10.96.0.2:53");
        assert_eq!(variety::unanswered("10.96.0.2"), 1);
        desired.remove(&dns);
        {
            let _held = held_lock();
            proxy.sync(&desired, &Dirty::Only([dns].into())).unwrap_err();
        }
        assert_eq!(variety::unanswered("10.96.0.2"), 1);
        sync(&mut proxy, &desired, &Dirty::All);
        assert_eq!(variety::unanswered("10.96.0.2"), 0);
    });
}

/// A tool that writes the first table of what it is given and then fails, in place of iptables' legacy flavour, until this goes.
struct HalfWay;

impl HalfWay {
    const TOOL: &str = "/usr/sbin/xtables-legacy-multi";

    fn begin() -> Self {
        let script = "#!/bin/sh\n\
                      name=$(basename \"$0\" | sed s/-legacy//)\n\
                      case $name in\n\
                      *-restore) sed /^COMMIT/q | /run/multi \"$name\" \"$@\"; echo interrupted >&2; exit 4 ;;\n\
                      esac\n\
                      exec /run/multi \"$name\" \"$@\"\n";
        fs::copy(Self::TOOL, "/run/multi").unwrap();
        fs::write("/run/half-way", script).unwrap();
        fs::set_permissions("/run/half-way", fs::Permissions::from_mode(0o755)).unwrap();
        let none: Option<&str> = None;
        mount(Some("/run/half-way"), Self::TOOL, none, MsFlags::MS_BIND, none).unwrap();
        Self
    }
}

impl Drop for HalfWay {
    fn drop(&mut self) {
        umount(Self::TOOL).unwrap();
    }
}

/// S18
#[test]
fn what_a_tool_did_by_half_is_told_and_made_whole() {
    with("legacy", || {
        let mut proxy = open();
        let desired = variety();
        let half_way = HalfWay::begin();
        let said = format!("{:#}", proxy.sync(&desired, &Dirty::All).unwrap_err());
        assert!(said.contains("iptables-legacy-restore"), "{said}");
        assert!(said.contains("interrupted"), "{said}");
        drop(half_way);
        let half = saved("legacy");
        assert!(
            half.contains("SLUICE-SERVICES"),
            "nothing was written at all: {half}"
        );
        sync(&mut proxy, &desired, &Dirty::All);
        assert_ne!(saved("legacy"), half);
        assert_eq!(proxy.audit().unwrap(), 0);
    });
}

/// S20: who chooses it is told what is missing.
#[test]
fn without_the_tool_it_says_which_package_has_it() {
    with("legacy", || {
        empty_folder("/usr/sbin");
        let error = IptablesProxy::open().err().expect("there is no tool");
        let said = format!("{error:#}");
        assert!(said.contains("package iptables"), "{said}");
    });
}
