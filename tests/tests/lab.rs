//! The lab itself: that it is what the other tests take it for, and that it goes away.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;
use std::path::Path;
use std::process::Command;

use nix::sys::signal::Signal;
use sluice_lab::down::{down, leftovers};
use sluice_lab::state::{self, Record};
use sluice_lab::{Lab, Options, cgroup, wait_until};
use sluice_tests::PATIENCE;

fn bare(name: &str) -> Options {
    Options {
        name: format!("{name}-{}", std::process::id()),
        nodes: 2,
        bare: true,
        ..Options::default()
    }
}

fn traces(lab: &str) -> Vec<String> {
    let all = leftovers().unwrap();
    all.into_iter().filter(|line| line.contains(lab)).collect()
}

#[test]
fn hosts_reach_each_other_and_nothing_is_left() {
    let options = Options {
        subnets: 2,
        ..bare("reach")
    };
    let own_addresses = || {
        Command::new("ip")
            .args(["-o", "address"])
            .output()
            .unwrap()
            .stdout
    };
    let before = own_addresses();
    let lab = Lab::up(options.clone()).unwrap();
    for from in ["node1", "node2", "client"] {
        for to in ["node1", "node2", "client"] {
            for address in &lab.host(to).unwrap().addresses {
                let ping = ["ping", "-c", "1", "-W", "2", &address.to_string()];
                lab.node(from).run(&ping).unwrap();
            }
        }
    }
    let node = lab.node("node1");
    assert_eq!(node.sh("hostname").unwrap(), "node1\n");
    assert_eq!(
        node.sh("ls /opt/cni/bin /etc/cni/net.d /sys/fs/bpf")
            .unwrap()
            .matches(".conf")
            .count(),
        0
    );
    assert_eq!(
        node.sh("cat /proc/self/cgroup").unwrap().lines().last().unwrap(),
        "0::/"
    );
    node.sh("echo 1 > /etc/of-the-node; echo 1 > /opt/of-the-node; echo 1 > /run/of-the-node")
        .unwrap();
    for path in ["/etc/of-the-node", "/opt/of-the-node", "/run/of-the-node"] {
        assert!(!Path::new(path).exists(), "{path} is the machine's");
        assert!(lab.node("node2").sh(&format!("test ! -e {path}")).is_ok());
    }
    drop(lab);
    assert_eq!(traces(&options.name), [""; 0]);
    assert_eq!(
        own_addresses(),
        before,
        "the machine's own interfaces are as before"
    );
}

#[test]
fn exec_passes_what_goes_in_and_out() {
    let lab = Lab::up(bare("exec")).unwrap();
    let node = lab.node("node1");
    assert_eq!(node.exec(&["sh", "-c", "exit 7"]).unwrap().status.code(), Some(7));
    let killed = node.exec(&["sh", "-c", "kill -TERM $$"]).unwrap();
    assert_eq!(killed.status.code(), Some(128 + Signal::SIGTERM as i32));
    let failed = node.exec(&["no-such-program"]).unwrap();
    let said = String::from_utf8(failed.stderr).unwrap();
    assert!(
        said.contains("no-such-program") && said.contains("node1"),
        "{said}"
    );
    let said = lab.node("node9").exec(&["true"]).unwrap().stderr;
    let said = String::from_utf8(said).unwrap();
    assert!(said.contains("node9") && said.contains("node2"), "{said}");

    // Whoever kills the caller means the command.
    let sleeping = node.spawn(&["busybox", "sleep", "1000"]).unwrap();
    // By its own name, which it has only once it is tied to its caller's life.
    let sleeps = || {
        Ok(node
            .sh("busybox ps -o args | grep -c '^busybox [s]leep 1000' || true")?
            .trim()
            != "0")
    };
    wait_until("it sleeps", PATIENCE, sleeps).unwrap();
    drop(sleeping);
    wait_until("it is gone", PATIENCE, || Ok(!sleeps()?)).unwrap();
}

#[test]
fn a_name_is_taken_while_its_lab_lives() {
    let options = bare("twice");
    let lab = Lab::up(options.clone()).unwrap();
    let error = format!("{:#}", Lab::up(options.clone()).unwrap_err());
    assert!(error.contains("down --name"), "{error}");
    lab.node("node1").run(&["true"]).unwrap();

    // Dead: the holders are killed, the rest lies about.
    for member in &lab.record().members {
        let pid = nix::unistd::Pid::from_raw(member.init.pid);
        nix::sys::signal::kill(pid, Signal::SIGKILL).unwrap();
    }
    let group = cgroup::of_lab(lab.name()).unwrap();
    wait_until("it is dead", PATIENCE, || Ok(!cgroup::is_populated(&group))).unwrap();
    let again = Lab::up(options).unwrap();
    again.node("node1").run(&["true"]).unwrap();
    // One folder, two values: the first must not take it down under the second.
    let mut lab = lab;
    lab.keep();
}

#[test]
fn down_removes_whatever_it_finds() {
    let name = bare("half").name;
    assert!(!down(&name).unwrap(), "nothing there is fine");

    // Half-made: a folder with a mount, a record that is none, a cgroup below a cgroup with a process in it.
    let folder = state::directory(&name);
    let mounted = folder.join("hosts/node1/copies");
    fs::create_dir_all(&mounted).unwrap();
    fs::write(folder.join("lab.json"), "{ cut sho").unwrap();
    let mount = ["-t", "tmpfs", "none", mounted.to_str().unwrap()];
    assert!(Command::new("mount").args(mount).status().unwrap().success());
    let group = cgroup::of_lab(&name).unwrap().join("node1/pods/a");
    fs::create_dir_all(&group).unwrap();
    let mut sleeping = Command::new("sleep").arg("1000").spawn().unwrap();
    fs::write(group.join("cgroup.procs"), sleeping.id().to_string()).unwrap();
    assert!(Record::load(&name).is_err());

    assert!(down(&name).unwrap());
    assert!(!sleeping.wait().unwrap().success(), "it was killed");
    assert_eq!(traces(&name), [""; 0]);
    assert!(!down(&name).unwrap());
}
