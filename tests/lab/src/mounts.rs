//! A node's own file systems: what it must not share with the machine is covered by something of its own.
//!
//! Runs as process 1 of a fresh node and never outside one: its first act cuts mount propagation.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use nix::mount::{MntFlags, MsFlags, mount, umount2};

use crate::init::Spec;
use crate::state;

/// Folders a node may write to without the machine seeing it.
const OWN_COPIES: [&str; 4] = ["/etc", "/opt", "/var", "/usr/local"];

/// The binaries a node finds in its `PATH`.
pub const BINARIES: [&str; 4] = ["sluice-lab", "sluice", "sluiced", "sluicectl"];

/// Gives the calling process's namespaces their file systems, host name and loopback.
pub fn furnish(spec: &Spec) -> Result<()> {
    mount_at(None, "/", None, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None)?;
    let copies = spec.directory.join("copies");
    fs::create_dir_all(&copies).with_context(|| format!("creating {}", copies.display()))?;
    mount_at(Some("tmpfs"), &copies, Some("tmpfs"), MsFlags::empty(), None)?;
    for place in OWN_COPIES {
        overlay(place, &copies)?;
    }
    lab_folders(spec)?;
    kernel_file_systems()?;
    if spec.is_node {
        for empty in ["/etc/cni", "/opt/cni/bin"] {
            make_directory(empty)?;
            mount_at(Some("tmpfs"), empty, Some("tmpfs"), MsFlags::empty(), None)?;
        }
        make_directory("/etc/cni/net.d")?;
    }
    fs::write("/etc/hostname", format!("{}\n", spec.member)).context("writing /etc/hostname")?;
    fs::write("/etc/hosts", &spec.hosts).context("writing /etc/hosts")?;
    nix::unistd::sethostname(&spec.member).with_context(|| format!("naming the host {}", spec.member))?;
    // Last, as it hides the lab's folder.
    own_run()?;
    loopback_up()
}

fn overlay(place: &str, copies: &Path) -> Result<()> {
    let name = place.trim_start_matches('/').replace('/', "-");
    let (upper, work) = (
        copies.join(format!("{name}.upper")),
        copies.join(format!("{name}.work")),
    );
    for directory in [&upper, &work] {
        fs::create_dir_all(directory).with_context(|| format!("creating {}", directory.display()))?;
    }
    let layers = format!(
        "lowerdir={place},upperdir={},workdir={}",
        upper.display(),
        work.display()
    );
    mount_at(
        Some("overlay"),
        place,
        Some("overlay"),
        MsFlags::empty(),
        Some(&layers),
    )
}

/// Binds what the lab shares with the node: its log, the manifests, the binaries.
fn lab_folders(spec: &Spec) -> Result<()> {
    bind(&state::logs(&spec.lab, &spec.member), Path::new("/var/log"))?;
    if spec.is_node {
        make_directory("/etc/sluice/manifests")?;
        bind(&state::manifests(&spec.lab), Path::new("/etc/sluice/manifests"))?;
    }
    make_directory("/usr/local/bin")?;
    for name in BINARIES {
        let source = spec.binaries.join(name);
        if source.is_file() {
            let target = Path::new("/usr/local/bin").join(name);
            // A copy the machine has installed there is covered, not written to.
            File::options()
                .create(true)
                .append(true)
                .open(&target)
                .with_context(|| format!("creating {}", target.display()))?;
            bind(&source, &target)?;
        }
    }
    Ok(())
}

/// proc for the PID namespace, sysfs for the network namespace, cgroup v2 rooted at the node's cgroup, BPF pins.
fn kernel_file_systems() -> Result<()> {
    mount_at(Some("proc"), "/proc", Some("proc"), MsFlags::empty(), None)?;
    // All of the machine's cgroup trees hang below: a mount table that names none of them cannot mislead.
    umount2("/sys", MntFlags::MNT_DETACH).context("unmounting the machine's /sys")?;
    mount_at(Some("sysfs"), "/sys", Some("sysfs"), MsFlags::empty(), None)?;
    mount_at(
        Some("cgroup2"),
        "/sys/fs/cgroup",
        Some("cgroup2"),
        MsFlags::empty(),
        None,
    )?;
    mount_at(Some("bpf"), "/sys/fs/bpf", Some("bpf"), MsFlags::empty(), None)
}

fn own_run() -> Result<()> {
    for place in mounts_below("/run")? {
        umount2(&place, MntFlags::MNT_DETACH).with_context(|| format!("unmounting {}", place.display()))?;
    }
    mount_at(Some("tmpfs"), "/run", Some("tmpfs"), MsFlags::empty(), None)
}

/// Mount points at and below `top`, as far as this mount namespace has any, the innermost first.
pub fn mounts_below(top: &str) -> Result<Vec<PathBuf>> {
    let table = fs::read_to_string("/proc/self/mountinfo").context("reading /proc/self/mountinfo")?;
    let mut places: Vec<PathBuf> = table
        .lines()
        .filter_map(|line| line.split(' ').nth(4))
        .map(PathBuf::from)
        .filter(|place| place.starts_with(top))
        .collect();
    places.reverse();
    Ok(places)
}

fn bind(source: &Path, target: &Path) -> Result<()> {
    mount(Some(source), target, None::<&str>, MsFlags::MS_BIND, None::<&str>)
        .with_context(|| format!("binding {} to {}", source.display(), target.display()))
}

fn mount_at(
    source: Option<&str>,
    target: impl AsRef<Path>,
    kind: Option<&str>,
    flags: MsFlags,
    data: Option<&str>,
) -> Result<()> {
    let target = target.as_ref();
    mount(source, target, kind, flags, data).with_context(|| {
        format!(
            "mounting {} on {} ({})",
            kind.unwrap_or("private propagation"),
            target.display(),
            data.unwrap_or("no options")
        )
    })
}

fn make_directory(path: &str) -> Result<()> {
    fs::create_dir_all(path).with_context(|| format!("creating {path}"))
}

fn loopback_up() -> Result<()> {
    let output = Command::new("ip")
        .args(["link", "set", "lo", "up"])
        .output()
        .context("running ip (package iproute2)")?;
    if !output.status.success() {
        bail!(
            "ip link set lo up: {}",
            String::from_utf8_lossy(&output.stderr).trim()
        );
    }
    Ok(())
}
