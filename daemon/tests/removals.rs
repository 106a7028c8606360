//! Gathered removals against the real kernel, in a network namespace that ends with the test.

#![allow(clippy::unwrap_used, reason = "a test that panics says what failed")]

use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::Command;
use std::slice;
use std::sync::{Arc, Barrier};
use std::thread;

use nix::net::if_::if_nametoindex;
use nix::sched::{CloneFlags, unshare};
use sluice_cni::mac::host_device;
use sluice_cni::removals::{self, Ask};
use sluice_daemon::removals::{Counts, serve};
use sluice_ipam::Attachment;

struct Node {
    folder: tempfile::TempDir,
    counts: Arc<Counts>,
}

impl Node {
    fn socket(&self) -> PathBuf {
        self.folder.path().join("removals.sock")
    }

    fn say(&self, what: &[u8]) -> String {
        let mut stream = UnixStream::connect(self.socket()).unwrap();
        stream.write_all(what).unwrap();
        let mut answer = String::new();
        // Hung up upon with words unread is an error, and as good an end.
        let _ = stream.read_to_string(&mut answer);
        answer
    }

    fn remove(&self, asks: &[Ask]) -> Vec<bool> {
        let (barrier, socket) = (&Barrier::new(asks.len()), &self.socket());
        thread::scope(|scope| {
            let ask = |ask| {
                scope.spawn(move || {
                    barrier.wait();
                    removals::ask(socket, slice::from_ref(ask))
                })
            };
            let asked: Vec<_> = asks.iter().map(ask).collect();
            asked.into_iter().map(|asked| asked.join().unwrap()).collect()
        })
    }
}

/// Runs `test` on a thread in a namespace of its own, with the removals' thread there too.
fn on_a_node(test: impl FnOnce(&Node) + Send + 'static) {
    let ran = thread::spawn(|| {
        unshare(CloneFlags::CLONE_NEWNET).expect("these tests need the right to make network namespaces");
        let folder = tempfile::tempdir().unwrap();
        let counts = serve(&folder.path().join("removals.sock")).unwrap();
        test(&Node { folder, counts });
    });
    ran.join()
        .unwrap_or_else(|panic| std::panic::resume_unwind(panic));
}

fn ip(arguments: &str) -> String {
    let output = Command::new("ip").args(arguments.split(' ')).output().unwrap();
    assert!(
        output.status.success(),
        "ip {arguments}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout).unwrap()
}

fn make(name: &str, alias: &str) -> Ask {
    // The other end's name: of no matter, but it must be another one.
    let end = name.replace("sluice", "end");
    ip(&format!("link add {name} up type veth peer name {end}"));
    if !alias.is_empty() {
        ip(&format!("link set {name} alias {alias}"));
    }
    Ask {
        index: if_nametoindex(name).unwrap(),
        name: name.to_owned(),
    }
}

fn pod(id: &str) -> Ask {
    let attachment = Attachment::new(id, "eth0").unwrap();
    make(&host_device(&attachment), &attachment.to_string())
}

fn is_there(name: &str) -> bool {
    if_nametoindex(name).is_ok()
}

/// C6 C9
#[test]
fn many_at_once_go_in_fewer_groups_and_nothing_else_goes() {
    on_a_node(|node| {
        let asks: Vec<Ask> = (0..40).map(|at| pod(&format!("pod{at}"))).collect();
        let stays = pod("stays");
        make("sluice-other", "");
        assert!(node.remove(&asks).into_iter().all(|gone| gone));
        for ask in &asks {
            assert!(!is_there(&ask.name), "{}", ask.name);
        }
        assert!(is_there(&stays.name) && is_there("sluice-other"));
        assert_eq!(node.counts.devices(), 40);
        assert!(node.counts.groups() < 40, "{:?}", node.counts);
        // Asked for again, as by a repeated DEL: they are gone.
        assert!(node.remove(&asks[..3]).into_iter().all(|gone| gone));
        assert_eq!(node.counts.devices(), 40);
    });
}

/// C6
#[test]
fn whoever_is_told_that_a_device_is_gone_finds_nothing_of_it_and_can_make_it_again() {
    on_a_node(|node| {
        for _ in 0..5 {
            let a = pod("a");
            let end = a.name.replace("sluice", "end");
            ip(&format!("link set {end} up"));
            ip(&format!("route add 10.1.0.1/32 dev {}", a.name));
            ip(&format!(
                "neigh add 10.1.0.1 dev {} lladdr 02:00:00:00:00:01",
                a.name
            ));
            assert_eq!(node.remove(std::slice::from_ref(&a)), [true]);
            assert!(!is_there(&a.name) && !is_there(&end));
            assert_eq!(ip("route show 10.1.0.1"), "");
            assert_eq!(ip("neigh show 10.1.0.1"), "");
        }
    });
}

/// Threads of this process that wait for the kernel to be done with devices.
fn waiting() -> usize {
    let tasks = fs::read_dir("/proc/self/task").unwrap();
    // One that has ended since has no name.
    let names = tasks.filter_map(|task| fs::read_to_string(task.unwrap().path().join("comm")).ok());
    names.filter(|name| name == "removal\n").count()
}

/// C6
#[test]
fn a_device_is_said_to_be_gone_when_it_is_and_the_kernel_may_take_its_time() {
    on_a_node(|node| {
        // More than the kernel is waited for at the same time.
        let pods: Vec<Ask> = (0..40).map(|at| pod(&format!("pod{at}"))).collect();
        let mut most = 0;
        for one in &pods {
            assert_eq!(node.remove(std::slice::from_ref(one)), [true]);
            most = most.max(waiting());
            assert!(!is_there(&one.name), "{}", one.name);
        }
        assert!(most > 0, "each was waited for to its end");
        assert_eq!(node.counts.groups(), 40);
    });
}

/// C6 C9
#[test]
fn what_is_not_a_pods_device_by_name_alias_and_index_is_left_alone() {
    on_a_node(|node| {
        let (a, b) = (pod("a"), pod("b"));
        let nobodys = make("sluice0123abcde", "");
        let strangers = make("sluice0123abcdf", "a/eth0");
        let mixed = Ask {
            index: a.index,
            name: b.name.clone(),
        };
        assert_eq!(node.remove(&[nobodys, strangers, mixed]), [false; 3]);
        assert!(
            ["sluice0123abcde", "sluice0123abcdf", &a.name, &b.name]
                .into_iter()
                .all(is_there)
        );
        assert_eq!(node.counts.devices(), 0);
    });
}

/// C6 C9
#[test]
fn whatever_its_group_what_was_not_asked_for_stays() {
    on_a_node(|node| {
        let pods: Vec<Ask> = (0..40).map(|at| pod(&format!("pod{at}"))).collect();
        let stays = pod("stays");
        make("sluice-other", "");
        // All are of groups that others use, too.
        for (at, ask) in pods.iter().chain([&stays]).enumerate() {
            ip(&format!("link set dev {} group {}", ask.name, at % 3));
        }
        ip("link set dev sluice-other group 2");
        for some in pods.chunks(8) {
            assert_eq!(node.remove(some), [true; 8]);
        }
        assert!(node.counts.groups() < 40, "{:?}", node.counts);
        assert!(pods.iter().all(|ask| !is_there(&ask.name)));
        assert!(is_there(&stays.name) && is_there("sluice-other") && is_there("lo"));
    });
}

/// C6 C9
#[test]
fn callers_who_say_nothing_or_nonsense_keep_nobody_waiting() {
    on_a_node(|node| {
        assert_eq!(
            fs::metadata(node.socket()).unwrap().permissions().mode() & 0o777,
            0o600
        );
        let silent: Vec<_> = (0..20)
            .map(|_| UnixStream::connect(node.socket()).unwrap())
            .collect();
        assert!(node.say(b"remove 1 lo\n").starts_with("no "));
        assert!(node.say(b"\xff\xfe\n").starts_with("no "));
        assert_eq!(node.say(&[b'x'; 100_000]), "");
        let mut slow = UnixStream::connect(node.socket()).unwrap();
        let a = pod("a");
        let line = format!("{a}\n");
        let (begin, end) = line.split_at(9);
        slow.write_all(begin.as_bytes()).unwrap();
        assert_eq!(node.remove(&[pod("b")]), [true]);
        slow.write_all(end.as_bytes()).unwrap();
        let mut answer = String::new();
        slow.read_to_string(&mut answer).unwrap();
        assert_eq!(answer, removals::GONE);
        assert!(!is_there(&a.name));
        drop(silent);
    });
}
