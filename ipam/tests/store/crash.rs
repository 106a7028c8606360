//! Killed processes, damaged files, a full disk.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, OpenOptions};
use std::io::Write;
use std::net::IpAddr;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread::{self, sleep};
use std::time::Duration;

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use sluice_ipam::{Error, Mended, Store, Usage};
use tempfile::tempdir;

use crate::{cidrs, give, ip, open, pod};

/// Frees what all still hold and mends the rest; then nothing may be left.
#[track_caller]
fn collect_all(store: &Store, root: &Path) {
    store.repair().unwrap();
    for held in store.list().unwrap() {
        store.free(&held.attachment).unwrap();
    }
    assert_eq!(store.list().unwrap(), []);
    assert_eq!(fs::read_dir(root.join("owners")).unwrap().count(), 0);
    assert_eq!(fs::read_dir(root.join("held")).unwrap().count(), 0);
    assert_eq!(store.repair().unwrap(), []);
}

/// Every guard belongs to one owner that names it.
#[track_caller]
fn assert_guarded_once(store: &Store, root: &Path) {
    let mut owners: BTreeMap<u64, BTreeSet<IpAddr>> = BTreeMap::new();
    for held in store.list().unwrap() {
        let path = root.join(format!("owners/{}@eth0", held.attachment.container_id()));
        owners.insert(
            fs::metadata(path).unwrap().ino(),
            held.addresses.into_iter().collect(),
        );
    }
    for entry in fs::read_dir(root.join("held")).unwrap() {
        let entry = entry.unwrap();
        let address: IpAddr = entry.file_name().to_str().unwrap().parse().unwrap();
        let owner = owners.get(&entry.metadata().unwrap().ino());
        assert!(
            owner.is_some_and(|addresses| addresses.contains(&address)),
            "{address} has no owner"
        );
    }
}

/// The example `churn`, which cargo builds for tests too, beside their own folder.
fn start_worker(root: &Path, name: &str) -> Child {
    let own = std::env::current_exe().unwrap();
    let churn = own.parent().unwrap().with_file_name("examples").join("churn");
    Command::new(churn)
        .arg(root)
        .arg(name)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap()
}

// C9 I1
#[test]
fn processes_killed_at_any_instant_leave_nothing_that_cannot_be_mended() {
    let directory = tempdir().unwrap();
    let store = open(directory.path(), 0);
    let root = directory.path().join("ipam");
    for round in 0..25_u64 {
        let mut workers: Vec<_> = (0..3)
            .map(|at| start_worker(&root, &format!("w{at}r{round}")))
            .collect();
        for at in 0..3 {
            while !root.join(format!("w{at}r{round}.started")).exists() {
                sleep(Duration::from_micros(500));
            }
        }
        sleep(Duration::from_micros(round * 731));
        for worker in &mut workers {
            worker.kill().unwrap();
        }
        for worker in &mut workers {
            worker.wait().unwrap();
        }
        assert_guarded_once(&store, &root);
        if round % 5 == 4 {
            collect_all(&store, &root);
        }
    }
    collect_all(&store, &root);
}

// C9 I6
#[test]
fn whatever_step_an_add_was_killed_at_the_store_is_mended() {
    let pools = cidrs(&["10.1.0.0/29", "fd00::/64"]);
    for step in 0..4 {
        let directory = tempdir().unwrap();
        let store = open(directory.path(), 120);
        let root = directory.path().join("ipam");
        let addresses = give(&store, "a", &pools, &[]).unwrap();
        let owner = root.join("owners/a@eth0");
        fs::hard_link(&owner, root.join("new")).unwrap();
        // Back to what there was after each step of the giving.
        if step < 3 {
            fs::remove_file(root.join(format!("held/{}", addresses[1]))).unwrap();
        }
        if step < 2 {
            fs::remove_file(root.join(format!("held/{}", addresses[0]))).unwrap();
        }
        if step < 1 {
            fs::remove_file(&owner).unwrap();
        }
        let mended = store.repair().unwrap();
        assert_eq!(mended.len(), [0, 2, 1, 0][step], "{mended:?}");
        assert!(
            mended
                .iter()
                .all(|mended| matches!(mended, Mended::Guarded { .. }))
        );
        assert_eq!(store.free(&pod("a")).unwrap().is_some(), step > 0);
        give(&store, "b", &pools, &[]).unwrap();
        collect_all(&store, &root);
    }
}

// C9 I6 I2
#[test]
fn whatever_step_a_del_was_killed_at_it_is_finished() {
    let pools = cidrs(&["10.1.0.0/29", "fd00::/64"]);
    for (step, by_repair) in [(1, true), (2, true), (1, false), (2, false)] {
        let directory = tempdir().unwrap();
        let store = open(directory.path(), 120);
        let root = directory.path().join("ipam");
        let addresses = give(&store, "a", &pools, &[]).unwrap();
        for address in &addresses[..step] {
            fs::rename(
                root.join(format!("held/{address}")),
                root.join(format!("resting/{address}")),
            )
            .unwrap();
        }
        if by_repair {
            assert!(matches!(store.repair().unwrap()[..], [Mended::Freed { .. }]));
        } else {
            assert!(store.free(&pod("a")).unwrap().is_some());
        }
        assert_eq!(store.usage(pools[0]).unwrap(), Usage { held: 0, resting: 1 });
        assert_eq!(store.usage(pools[1]).unwrap(), Usage { held: 0, resting: 1 });
        collect_all(&store, &root);
    }
}

// C9 I6
#[test]
fn damaged_owners_keep_their_addresses_until_freed() {
    let pools = cidrs(&["10.1.0.0/29", "fd00::/64"]);
    for damage in [
        "",
        "{\"containerId\":",
        "null",
        "{\"containerId\":\"b\",\"ifname\":\"eth0\"}",
        "\u{0}\u{0}",
    ] {
        let directory = tempdir().unwrap();
        let store = open(directory.path(), 120);
        let root = directory.path().join("ipam");
        let addresses = give(&store, "a", &pools, &[]).unwrap();
        let owner = root.join("owners/a@eth0");
        let mut file = OpenOptions::new()
            .write(true)
            .truncate(true)
            .open(&owner)
            .unwrap();
        file.write_all(damage.as_bytes()).unwrap();
        let same = |store: &Store| {
            let held = store.get(&pod("a")).unwrap().unwrap();
            assert_eq!(
                held.addresses.into_iter().collect::<BTreeSet<_>>(),
                addresses.iter().copied().collect()
            );
        };
        same(&store);
        assert!(matches!(
            give(&store, "a", &pools, &[]),
            Err(Error::AlreadyHeld { .. })
        ));
        assert!(!give(&store, "b", &pools, &[]).unwrap().contains(&addresses[0]));
        assert!(matches!(store.repair().unwrap()[..], [Mended::Damaged { .. }]));
        assert_eq!(store.repair().unwrap(), []);
        same(&store);
        store.free(&pod("a")).unwrap().unwrap();
        assert_eq!(store.usage(pools[0]).unwrap(), Usage { held: 1, resting: 1 });
        collect_all(&store, &root);
    }
}

// C9 I6
#[test]
fn addresses_whose_owner_was_lost_rest_and_come_back() {
    let directory = tempdir().unwrap();
    let pools = cidrs(&["10.1.0.0/30"]);
    let store = open(directory.path(), 0);
    let root = directory.path().join("ipam");
    give(&store, "a", &pools, &[]).unwrap();
    give(&store, "b", &pools, &[]).unwrap();
    fs::remove_file(root.join("owners/a@eth0")).unwrap();
    fs::write(root.join("owners/not an attachment"), "").unwrap();
    fs::write(root.join("held/not an address"), "").unwrap();
    // The pool looks full: giving mends it by itself.
    assert_eq!(give(&store, "c", &pools, &[]).unwrap(), [ip("10.1.0.1")]);
    assert_eq!(store.repair().unwrap(), []);
    fs::remove_file(root.join("owners/c@eth0")).unwrap();
    assert_eq!(
        store.repair().unwrap(),
        [Mended::Orphan {
            address: ip("10.1.0.1")
        }]
    );
    // Asked for by name, an ownerless address is mended too.
    fs::remove_file(root.join("owners/b@eth0")).unwrap();
    assert_eq!(
        give(&store, "d", &pools, &[ip("10.1.0.2")]).unwrap(),
        [ip("10.1.0.2")]
    );
}

// C9 I6
#[test]
fn a_store_copied_without_its_links_is_whole_again_after_repair() {
    let directory = tempdir().unwrap();
    let pools = cidrs(&["10.1.0.0/29", "fd00::/64"]);
    let original = open(directory.path(), 120);
    for id in ["a", "b"] {
        give(&original, id, &pools, &[]).unwrap();
    }
    let (from, root) = (directory.path().join("ipam"), directory.path().join("copy/ipam"));
    let store = open(&directory.path().join("copy"), 120);
    for place in ["owners", "held"] {
        for entry in fs::read_dir(from.join(place)).unwrap() {
            let name = entry.unwrap().file_name();
            fs::copy(from.join(place).join(&name), root.join(place).join(&name)).unwrap();
        }
    }
    // A DEL before any repair frees all the same.
    store.free(&pod("a")).unwrap().unwrap();
    assert_eq!(store.usage(pools[0]).unwrap(), Usage { held: 1, resting: 1 });
    assert_eq!(store.repair().unwrap().len(), 2);
    assert_eq!(store.repair().unwrap(), []);
    assert_guarded_once(&store, &root);
    assert_eq!(
        store.get(&pod("b")).unwrap().unwrap().addresses,
        [ip("10.1.0.2"), ip("fd00::2")]
    );
    collect_all(&store, &root);
}

// C9
#[test]
fn on_a_full_disk_giving_says_so_and_freeing_works() {
    let directory = tempdir().unwrap();
    let root = directory.path().to_path_buf();
    // In a mount namespace of its own, which ends with the thread and takes the disk along.
    let done = thread::spawn(move || {
        unshare(CloneFlags::CLONE_NEWNS).expect("this test needs the right to mount");
        let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
        mount(None::<&str>, "/", None::<&str>, private, None::<&str>).unwrap();
        mount(
            Some("tmpfs"),
            &root,
            Some("tmpfs"),
            MsFlags::empty(),
            Some("size=256k"),
        )
        .unwrap();
        let pools = cidrs(&["10.1.0.0/24", "fd00::/64"]);
        let store = open(&root, 120);
        let held = give(&store, "a", &pools, &[]).unwrap();
        let mut filler = fs::File::create(root.join("filler")).unwrap();
        while filler.write_all(&[0; 4096]).is_ok() {}
        for _ in 0..3 {
            let error = give(&store, "b", &pools, &[]).unwrap_err().to_string();
            assert!(
                error.contains("No space left on device") && error.contains("ipam/new"),
                "{error}"
            );
            assert_eq!(store.list().unwrap().len(), 1);
            assert_eq!(store.usage(pools[0]).unwrap(), Usage { held: 1, resting: 0 });
        }
        assert_eq!(store.free(&pod("a")).unwrap().unwrap().addresses, held);
        assert_eq!(store.usage(pools[0]).unwrap(), Usage { held: 0, resting: 1 });
        drop(filler);
        fs::remove_file(root.join("filler")).unwrap();
        assert_ne!(give(&store, "b", &pools, &[]).unwrap(), held);
        collect_all(&store, &root.join("ipam"));
    });
    done.join()
        .unwrap_or_else(|panic| std::panic::resume_unwind(panic));
}
