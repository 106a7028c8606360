//! Calls killed at every system call, and stores on filesystems that refuse.

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use nix::sys::ptrace::{self, Options};
use nix::sys::signal::Signal;
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::Pid;
use serde_json::json;

use crate::node::{Namespace, Node, device_of};

/// Room for all that a test gives, since what is freed rests.
const ROOMY: [&str; 2] = ["10.244.0.0/16", "fd00:244::/64"];

/// More system calls than any call makes: a test that comes here would never end.
const TOO_MANY: usize = 2000;

/// Carries out a call with this config and kills it as it enters its system call number `fatal`, from 0, which is then not carried out.
/// Whether it came that far.
#[expect(
    clippy::zombie_processes,
    reason = "a traced process is waited for by its number"
)]
fn killed_at(node: &Node, verb: &str, netns: &Path, config: &str, fatal: usize) -> bool {
    let variables = [
        ("CNI_COMMAND", verb),
        ("CNI_CONTAINERID", "a"),
        ("CNI_NETNS", netns.to_str().unwrap()),
        ("CNI_IFNAME", "eth0"),
    ];
    // Who starts a process to be traced must be who traces it: one thread does all.
    node.namespace.run(|| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_sluice"));
        command.env_clear().envs(variables);
        command
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        // SAFETY: between fork and exec only a system call is made, which is safe there.
        unsafe {
            command.pre_exec(|| Ok(ptrace::traceme()?));
        }
        let mut child = command.spawn().unwrap();
        let pid = Pid::from_raw(child.id().try_into().unwrap());
        child.stdin.take().unwrap().write_all(config.as_bytes()).unwrap();
        assert_eq!(waitpid(pid, None), Ok(WaitStatus::Stopped(pid, Signal::SIGTRAP)));
        ptrace::setoptions(pid, Options::PTRACE_O_TRACESYSGOOD | Options::PTRACE_O_EXITKILL).unwrap();
        // It stops as it leaves `execve`, and from then on as it enters and leaves each call.
        let mut stops = 0;
        loop {
            ptrace::syscall(pid, None).unwrap();
            match waitpid(pid, None).unwrap() {
                WaitStatus::PtraceSyscall(_) => stops += 1,
                WaitStatus::Exited(_, status) => {
                    assert_eq!(status, 0, "{verb} failed though nobody disturbed it");
                    return false;
                }
                other => panic!("{verb} at system call {}: {other:?}", stops / 2),
            }
            if stops == 2 * (fatal + 1) {
                child.kill().unwrap();
                assert_eq!(
                    waitpid(pid, None),
                    Ok(WaitStatus::Signaled(pid, Signal::SIGKILL, false))
                );
                return true;
            }
        }
    })
}

// C9 C5 C8
#[test]
fn an_add_killed_at_any_system_call_is_put_right_by_gc_or_by_del_and_the_next_add() {
    let node = Node::new(&ROOMY);
    let pod = Namespace::new();
    let mut at = 0;
    while killed_at(&node, "ADD", &pod.path(), &node.with(json!({})), at) {
        let held = node.store().list().unwrap().len();
        assert!(
            node.devices().len() <= held,
            "at {at}: a device without an address"
        );
        if at % 2 == 0 {
            node.gc(&[]).succeeded();
        } else {
            // As runtimes do after an ADD of which they know no end; some ask again first, which must do no harm.
            let again = node.add("a", &pod);
            assert!(
                again.success != (held > 0),
                "at {at}: {}{}",
                again.stdout,
                again.stderr
            );
            node.del("a").succeeded();
        }
        node.assert_empty();
        assert!(!pod.ip("-o link show").contains("eth0"), "at {at}");
        // That the same pod can be had again is seen often enough on every tenth, and costs a removal.
        if at % 10 == 0 {
            let result = node.add("a", &pod).succeeded();
            assert!(node.check("a", &pod, &result).success, "at {at}");
            node.del("a").succeeded();
            node.assert_empty();
        }
        at += 1;
        assert!(at < TOO_MANY);
    }
    assert!(at > 20, "only {at} system calls were seen");
    // The last one was not killed.
    assert_eq!(node.devices(), [device_of("a")]);
    node.del("a").succeeded();
    node.assert_empty();
    assert_eq!(node.store().repair().unwrap(), []);
}

// C9 C6 C8 I2
#[test]
fn a_del_killed_at_any_system_call_is_finished_by_the_next_or_by_gc() {
    let node = Node::new(&ROOMY);
    let pod = Namespace::new();
    let mut at = 0;
    loop {
        let given = node.add("a", &pod).succeeded();
        let killed = killed_at(&node, "DEL", Path::new(""), &node.with(json!({})), at);
        let held = node.store().list().unwrap();
        if !node.devices().is_empty() {
            assert_eq!(held.len(), 1, "at {at}: freed while the device is there");
            assert_eq!(held[0].addresses.len(), 2, "at {at}: {given}");
        }
        if !killed {
            break;
        }
        if at % 2 == 0 {
            node.gc(&[]).succeeded();
        } else {
            node.del("a").succeeded();
        }
        node.assert_empty();
        assert!(!pod.ip("-o link show").contains("eth0"), "at {at}");
        at += 1;
        assert!(at < TOO_MANY);
    }
    assert!(at > 20, "only {at} system calls were seen");
    node.assert_empty();
    assert_eq!(node.store().repair().unwrap(), []);
}

// C9 C8
#[test]
fn a_gc_killed_at_any_system_call_is_finished_by_the_next_or_by_del() {
    let mut at = 0;
    loop {
        // A new one each time: the more addresses rest, the more system calls a GC makes.
        let node = Node::new(&ROOMY);
        let (dead, alive) = (Namespace::new(), Namespace::new());
        let result = node.add("lives", &alive).succeeded();
        node.add("a", &dead).succeeded();
        let killed = killed_at(&node, "GC", Path::new(""), &node.gc_config(&["lives"]), at);
        if killed && at % 2 == 0 {
            node.gc(&["lives"]).succeeded();
        } else if killed {
            node.del("a").succeeded();
        }
        assert_eq!(node.devices(), [device_of("lives")], "at {at}");
        assert_eq!(node.store().list().unwrap().len(), 1, "at {at}");
        assert_eq!(node.store().repair().unwrap(), [], "at {at}");
        assert!(node.check("lives", &alive, &result).success, "at {at}");
        if !killed {
            break;
        }
        at += 1;
        assert!(at < TOO_MANY);
    }
    assert!(at > 20, "only {at} system calls were seen");
}

/// A filesystem of the test's own, gone when dropped.
struct Mounted(PathBuf);

impl Mounted {
    fn new(path: PathBuf, options: &str) -> Self {
        fs::create_dir_all(&path).unwrap();
        mount(
            Some("test"),
            &path,
            Some("tmpfs"),
            MsFlags::empty(),
            Some(options),
        )
        .unwrap();
        Self(path)
    }

    fn set_read_only(&self, read_only: bool) {
        let flag = if read_only {
            MsFlags::MS_RDONLY
        } else {
            MsFlags::empty()
        };
        let nothing = None::<&str>;
        mount(nothing, &self.0, nothing, MsFlags::MS_REMOUNT | flag, nothing).unwrap();
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = umount2(&self.0, MntFlags::MNT_DETACH);
    }
}

/// Runs `test` on a node in a mount namespace of its own.
fn with_own_mounts(test: impl FnOnce(&Node) + Send + 'static) {
    let ran = thread::spawn(|| {
        unshare(CloneFlags::CLONE_NEWNS).expect("these tests need the right to make mount namespaces");
        let nothing = None::<&str>;
        mount(
            nothing,
            "/",
            nothing,
            MsFlags::MS_REC | MsFlags::MS_PRIVATE,
            nothing,
        )
        .unwrap();
        test(&Node::new(&ROOMY));
    });
    ran.join()
        .unwrap_or_else(|panic| std::panic::resume_unwind(panic));
}

/// Nothing is held and no device is there, asked without changing the store.
#[track_caller]
fn assert_nothing_given(node: &Node, when: &str) {
    assert_eq!(node.devices(), Vec::<String>::new(), "{when}");
    for folder in ["held", "owners"] {
        if let Ok(entries) = fs::read_dir(node.ipam().join(folder)) {
            assert_eq!(entries.count(), 0, "{folder}, {when}");
        }
    }
}

// C9: whose turn it is is stopped in the middle.
#[test]
fn a_call_that_is_stopped_does_not_keep_others() {
    let node = Node::new(&ROOMY);
    let (a, b) = (Namespace::new(), Namespace::new());
    node.add("a", &a).succeeded();
    // What the first made is where the next ones wait.
    let turn = File::open(node.ipam().with_file_name("turn")).unwrap();
    turn.lock().unwrap();
    node.add("b", &b).succeeded();
    drop(turn);
    node.del("a").succeeded();
    node.del("b").succeeded();
    node.assert_empty();
}

// C9 C5 C6
#[test]
fn a_store_that_is_full_at_any_file_gives_all_or_nothing_and_can_free() {
    with_own_mounts(|node| {
        let pod = Namespace::new();
        let mut refused = 0;
        for inodes in 2..40 {
            let _store = Mounted::new(node.ipam(), &format!("size=64k,nr_inodes={inodes}"));
            let answer = node.add("a", &pod);
            let when = format!("{inodes} inodes: {}", answer.stdout);
            if answer.success {
                assert!(node.check("a", &pod, &answer.json).success, "{when}");
            } else {
                refused += 1;
                assert_eq!(answer.code(), 5, "{when}");
                assert!(answer.text().contains("No space left"), "{when}");
                assert_nothing_given(node, &when);
            }
            node.del("a").succeeded();
            assert_nothing_given(node, &when);
        }
        assert!((5..35).contains(&refused), "{refused} were refused");

        let _store = Mounted::new(node.ipam(), "size=64k");
        node.add("a", &pod).succeeded();
        let filler = node.ipam().join("filler");
        assert!(fs::write(&filler, [1; 128 * 1024]).is_err());
        let other = Namespace::new();
        let status = node.call("STATUS", "", Path::new(""), &node.with(json!({})));
        assert_eq!(status.code(), 50, "{}", status.text());
        let answer = node.add("b", &other);
        assert_eq!(answer.code(), 5, "{}", answer.text());
        assert_eq!(node.devices(), [device_of("a")]);
        node.del("b").succeeded();
        node.del("a").succeeded();
        node.assert_empty();
        fs::remove_file(filler).unwrap();
        node.add("b", &other).succeeded();
        node.del("b").succeeded();
        node.assert_empty();
    });
}

// C9 C5 C6 C8
#[test]
fn a_store_that_became_read_only_refuses_and_what_was_left_goes_when_it_is_writable() {
    with_own_mounts(|node| {
        let (a, b) = (Namespace::new(), Namespace::new());
        let store = Mounted::new(node.ipam(), "size=64k");
        let result = node.add("a", &a).succeeded();
        store.set_read_only(true);
        let status = node.call("STATUS", "", Path::new(""), &node.with(json!({})));
        assert_eq!(status.code(), 50, "{}", status.text());
        let answer = node.add("b", &b);
        assert_eq!(answer.code(), 5, "{}", answer.text());
        assert!(answer.text().contains("Read-only"), "{}", answer.text());
        assert!(node.check("a", &a, &result).success);
        assert_eq!(node.devices(), [device_of("a")]);
        // The pod is cut off; its address stays held, since it cannot be said that it rests.
        let answer = node.del("a");
        assert_eq!(answer.code(), 5, "{}", answer.text());
        assert_eq!(node.devices(), Vec::<String>::new());
        assert!(!node.gc(&[]).success);
        store.set_read_only(false);
        assert_eq!(node.store().list().unwrap().len(), 1);
        node.gc(&[]).succeeded();
        node.del("a").succeeded();
        node.assert_empty();
    });
}
