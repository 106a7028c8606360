//! Which addresses are given, in which order, and which requests are refused.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::thread::sleep;
use std::time::{Duration, SystemTime};

use sluice_ipam::{DEFAULT_REST, Error, Origin, Pool, Store, Usage};
use tempfile::tempdir;

use crate::{cidrs, give, ip, open, pod};

// I1 I7
#[test]
fn every_address_is_given_once_then_the_pool_is_full() {
    let directory = tempdir().unwrap();
    let store = open(directory.path(), 120);
    let pools = cidrs(&["10.1.0.0/28", "10.2.0.0/30", "fd00::/120"]);
    let mut given = BTreeSet::new();
    for id in 0..16 {
        let addresses = give(&store, id, &pools, &[]).unwrap();
        assert_eq!(addresses.len(), 2);
        for address in addresses {
            assert!(pools.iter().any(|pool| pool.contains(address)));
            assert!(given.insert(address), "{address} twice");
        }
    }
    for never in ["10.1.0.0", "10.1.0.15", "10.2.0.0", "10.2.0.3", "fd00::"] {
        assert!(!given.contains(&ip(never)));
    }
    let error = give(&store, "one-more", &pools, &[]).unwrap_err();
    let text = error.to_string();
    assert!(
        text.contains("10.1.0.0/28 has 14 for pods, 14 held, 0 resting"),
        "{text}"
    );
    assert!(
        text.contains("10.2.0.0/30 has 2 for pods, 2 held, 0 resting"),
        "{text}"
    );
    assert!(matches!(error, Error::Full { free_in: None, .. }));
    // All or nothing: the IPv6 address that was free was not taken.
    assert_eq!(store.usage(pools[2]).unwrap().held, 16);
    assert_eq!(store.get(&pod("one-more")).unwrap(), None);
}

// I2 I3
#[test]
fn a_freed_address_rests_also_over_a_restart_and_is_reused_last() {
    let directory = tempdir().unwrap();
    let pools = cidrs(&["10.1.0.0/29"]);
    let store = open(directory.path(), 120);
    let first = give(&store, "a", &pools, &[]).unwrap();
    assert_eq!(store.free(&pod("a")).unwrap().unwrap().addresses, first);
    assert_eq!(store.free(&pod("a")).unwrap(), None);
    drop(store);
    let store = open(directory.path(), 120);
    for id in 0..5 {
        assert_ne!(give(&store, id, &pools, &[]).unwrap(), first);
    }
    let error = give(&store, "late", &pools, &[]).unwrap_err();
    let Error::Full {
        pools: full,
        free_in: Some(wait),
    } = error
    else {
        panic!("{error}");
    };
    assert_eq!((full[0].size, full[0].held, full[0].resting), (6, 5, 1));
    assert!(
        wait > Duration::from_secs(60) && wait <= Duration::from_secs(120),
        "{wait:?}"
    );
    assert_eq!(store.usage(pools[0]).unwrap(), Usage { held: 5, resting: 1 });
}

// I2
#[test]
fn of_rested_addresses_the_one_freed_first_goes_first() {
    let directory = tempdir().unwrap();
    let pools = cidrs(&["10.1.0.0/29"]);
    let store = open(directory.path(), 0);
    let given: Vec<_> = (0..6).map(|id| give(&store, id, &pools, &[]).unwrap()).collect();
    for id in [4, 1, 3] {
        store.free(&pod(id)).unwrap();
        sleep(Duration::from_millis(2));
    }
    for id in [4, 1, 3] {
        assert_eq!(
            give(&store, format!("again{id}"), &pools, &[]).unwrap(),
            given[id]
        );
    }
}

// I2
#[test]
fn a_rest_from_before_the_last_boot_is_over() {
    let directory = tempdir().unwrap();
    let pools = cidrs(&["10.1.0.0/30"]);
    let store = open(directory.path(), 120);
    give(&store, "a", &pools, &[]).unwrap();
    give(&store, "b", &pools, &[]).unwrap();
    store.free(&pod("a")).unwrap();
    assert!(give(&store, "c", &pools, &[]).is_err());
    // The boot-time clock began anew: the end of the rest now seems years ahead.
    let resting = fs::File::open(directory.path().join("ipam/resting/10.1.0.1")).unwrap();
    resting.set_modified(SystemTime::now()).unwrap();
    assert_eq!(give(&store, "c", &pools, &[]).unwrap(), [ip("10.1.0.1")]);
}

// C5
#[test]
fn a_claim_not_kept_gives_back_without_a_rest() {
    let directory = tempdir().unwrap();
    let pools = cidrs(&["10.1.0.0/30", "fd00::/64"]);
    let store = open(directory.path(), 120);
    let origin = Origin {
        network: "test",
        netns: Path::new("/none"),
    };
    drop(store.allocate(&pod("a"), &pools, &[], origin).unwrap());
    assert_eq!(store.list().unwrap(), []);
    assert_eq!(store.usage(pools[0]).unwrap(), Usage::default());
    assert_eq!(store.repair().unwrap(), []);
    give(&store, "b", &pools, &[]).unwrap();
    give(&store, "c", &pools, &[]).unwrap();
}

// C5 C9
#[test]
fn a_claim_freed_by_another_cannot_be_kept_and_takes_nothing_back() {
    let directory = tempdir().unwrap();
    let pools = cidrs(&["10.1.0.0/29"]);
    let store = open(directory.path(), 120);
    let origin = Origin {
        network: "test",
        netns: Path::new("/none"),
    };
    let claim = store.allocate(&pod("a"), &pools, &[], origin).unwrap();
    store.free(&pod("a")).unwrap();
    let again = give(&store, "a", &pools, &[]).unwrap();
    assert!(matches!(claim.keep(), Err(Error::Overtaken { .. })));
    assert_eq!(store.get(&pod("a")).unwrap().unwrap().addresses, again);
}

// C5
#[test]
fn an_attachment_that_holds_is_refused_and_keeps_what_it_has() {
    let directory = tempdir().unwrap();
    let pools = cidrs(&["10.1.0.0/29"]);
    let store = open(directory.path(), 120);
    let held = give(&store, "a", &pools, &[]).unwrap();
    let error = give(&store, "a", &pools, &[]).unwrap_err();
    assert_eq!(error.to_string(), "a/eth0 holds 10.1.0.1 already; DEL frees it");
    assert_eq!(store.get(&pod("a")).unwrap().unwrap().addresses, held);
    assert_eq!(store.usage(pools[0]).unwrap().held, 1);
}

// I5
#[test]
fn asked_for_addresses_are_given_or_refused_with_the_reason() {
    let directory = tempdir().unwrap();
    let pools = cidrs(&["10.1.0.0/24", "fd00::/64"]);
    let store = open(directory.path(), 120);
    let asked = [ip("fd00::9"), ip("10.1.0.9")];
    assert_eq!(
        give(&store, "a", &pools, &asked).unwrap(),
        [ip("10.1.0.9"), ip("fd00::9")]
    );
    let error = give(&store, "b", &pools, &asked[1..]).unwrap_err();
    assert_eq!(
        error.to_string(),
        "address 10.1.0.9 was asked for by b/eth0 but a/eth0 holds it"
    );
    for outside in ["10.1.1.1", "10.1.0.0", "10.1.0.255", "fd01::1", "fd00::"] {
        let error = give(&store, "b", &pools, &[ip(outside)]).unwrap_err();
        assert!(matches!(error, Error::OutsidePools { .. }), "{error}");
    }
    let error = give(&store, "b", &pools, &[ip("10.1.0.3"), ip("10.1.0.4")]).unwrap_err();
    assert!(matches!(error, Error::RequestedTwice { .. }), "{error}");
    assert_eq!(store.list().unwrap().len(), 1);
    // Going round steps over it; who asks for it by name may have it while it rests.
    store.free(&pod("a")).unwrap();
    for id in 0..10 {
        assert!(!give(&store, id, &pools, &[]).unwrap().contains(&ip("10.1.0.9")));
    }
    assert_eq!(give(&store, "b", &pools, &asked[1..]).unwrap()[0], ip("10.1.0.9"));
}

// I4 I7
#[test]
fn pools_come_and_go_while_addresses_stay() {
    let directory = tempdir().unwrap();
    let store = open(directory.path(), 120);
    let old = give(&store, "a", &cidrs(&["10.1.0.0/31"]), &[]).unwrap();
    let grown = cidrs(&["10.1.0.0/29"]);
    assert_ne!(give(&store, "b", &grown, &[]).unwrap(), old);
    let other = cidrs(&["10.9.0.0/24"]);
    assert_eq!(give(&store, "c", &other, &[]).unwrap(), [ip("10.9.0.1")]);
    assert_eq!(store.get(&pod("a")).unwrap().unwrap().addresses, old);
    assert_eq!(store.usage(grown[0]).unwrap().held, 2);
    assert!(matches!(give(&store, "d", &[], &[]), Err(Error::NoPools)));
    let none = give(&store, "d", &cidrs(&["10.1.0.1/32"]), &[]).unwrap_err();
    assert!(none.to_string().contains("has 0 for pods"), "{none}");
}

// I7 I2
#[test]
fn a_pool_of_65536_goes_round_and_finds_its_last_address() {
    let directory = tempdir().unwrap();
    let store = open(directory.path(), 0);
    let pools = cidrs(&["10.1.0.0/16"]);
    assert_eq!(Pool::new(pools[0], &[]).size(), 65_534);
    give(&store, "first", &pools, &[ip("10.1.255.250")]).unwrap();
    // All others held, as far as the directory shows, but for one before the cursor.
    for third in 0..=255 {
        for fourth in 0..=255 {
            let held = directory.path().join(format!("ipam/held/10.1.{third}.{fourth}"));
            if (third, fourth) != (77, 7) && !held.exists() {
                fs::write(held, "").unwrap();
            }
        }
    }
    assert_eq!(give(&store, "last", &pools, &[]).unwrap(), [ip("10.1.77.7")]);
}

// I6
#[test]
fn the_list_says_who_holds_what_since_when_for_which_namespace() {
    let directory = tempdir().unwrap();
    let store = open(directory.path(), 120);
    let pools = cidrs(&["10.1.0.0/29", "fd00::/64"]);
    let before = SystemTime::now() - Duration::from_secs(1);
    give(&store, "b", &pools, &[]).unwrap();
    give(&store, "a", &pools, &[]).unwrap();
    let list = store.list().unwrap();
    assert_eq!(
        list.iter()
            .map(|held| held.attachment.to_string())
            .collect::<Vec<_>>(),
        ["a/eth0", "b/eth0"]
    );
    assert_eq!(list[1].addresses, [ip("10.1.0.1"), ip("fd00::1")]);
    assert_eq!(
        (list[0].netns.as_str(), list[0].network.as_str()),
        ("/proc/self/ns/net", "test")
    );
    assert!(list[0].netns_inode != 0 && list[0].since >= before && list[0].since <= SystemTime::now());
    assert!(list[0].age() < Duration::from_secs(60));
}

// I6 C12
#[test]
fn opening_makes_a_private_directory_only_when_it_may() {
    let directory = tempdir().unwrap();
    let root = directory.path().join("deep/ipam");
    assert!(Store::open_existing(&root, DEFAULT_REST).is_none());
    assert!(!root.exists());
    Store::open(&root, DEFAULT_REST).unwrap();
    assert_eq!(fs::metadata(&root).unwrap().permissions().mode() & 0o777, 0o700);
    assert!(Store::open_existing(&root, DEFAULT_REST).is_some());
    let error = Store::open("/proc/none/ipam", DEFAULT_REST).unwrap_err();
    assert!(error.to_string().contains("/proc/none"), "{error}");
}

// C9
#[test]
fn a_store_that_stays_locked_is_busy() {
    let directory = tempdir().unwrap();
    let store = open(directory.path(), 120).with_patience(Duration::from_millis(20));
    let lock = fs::File::create(directory.path().join("ipam/lock")).unwrap();
    lock.lock().unwrap();
    let error = give(&store, "a", &cidrs(&["10.1.0.0/29"]), &[]).unwrap_err();
    assert!(matches!(error, Error::Busy { .. }), "{error}");
    assert!(matches!(store.free(&pod("a")), Err(Error::Busy { .. })));
    lock.unlock().unwrap();
    give(&store, "a", &cidrs(&["10.1.0.0/29"]), &[]).unwrap();
}

// I5 I3
#[test]
fn reserved_addresses_are_never_given_nor_counted() {
    let directory = tempdir().unwrap();
    let reserved = cidrs(&["10.1.2.0/30", "fd00::/65"]);
    let store = Store::open(directory.path(), Duration::ZERO).unwrap();
    let pools = cidrs(&["10.1.2.0/29", "fd00::/64"]);
    // Given before it was reserved: it stays until it is freed.
    assert_eq!(give(&store, "old", &pools, &[]).unwrap()[0], ip("10.1.2.1"));
    let store = store.with_reserved(&reserved);
    for (id, wanted) in [("a", "10.1.2.4"), ("b", "10.1.2.5"), ("c", "10.1.2.6")] {
        let given = give(&store, id, &pools, &[]).unwrap();
        assert_eq!(given[0], ip(wanted));
        assert!(!reserved[1].contains(given[1]), "{given:?}");
    }
    assert_eq!(store.pool(pools[0]).size(), 3);
    assert_eq!(store.usage(pools[0]).unwrap(), Usage { held: 3, resting: 0 });
    let full = give(&store, "d", &pools, &[]).unwrap_err();
    assert!(
        full.to_string().contains("10.1.2.0/29 has 3 for pods, 3 held"),
        "{full}"
    );
    let refused = give(&store, "d", &pools, &[ip("10.1.2.2")]).unwrap_err();
    assert!(matches!(refused, Error::Reserved { .. }));
    assert!(
        refused
            .to_string()
            .contains("10.1.2.0/30 is reserved by ipam.reserved"),
        "{refused}"
    );
    store.free(&pod("old")).unwrap();
    assert!(
        matches!(give(&store, "d", &pools, &[]), Err(Error::Full { .. })),
        "a freed one is not given again"
    );
}
