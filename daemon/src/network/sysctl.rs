//! Kernel switches that pod traffic needs: looked at, changed only where they stand in the way, read back.

use std::fs;
use std::path::{Path, PathBuf};

/// Lets the node forward packets of both families, and replies arrive where the route back is another.
///
/// Returns what could not be done, one sentence each.
pub fn ensure_forwarding(uplink: &str, v6: bool) -> Vec<String> {
    let mut problems = Vec::new();
    note(&mut problems, ensure("net/ipv4/ip_forward", "1"));
    if v6 {
        // A host that forwards ignores router advertisements unless told otherwise, and would lose its default route.
        let advertisements = format!("net/ipv6/conf/{uplink}/accept_ra");
        if read(&advertisements).as_deref() == Some("1") {
            note(&mut problems, ensure(&advertisements, "2"));
        }
        note(&mut problems, ensure("net/ipv6/conf/all/forwarding", "1"));
    }
    problems.extend(loosen_reverse_path(uplink));
    problems
}

/// Makes strict reverse path filtering loose on `device`: a pod's packet to a node comes in by the uplink, while the
/// way back to the pod may lead through the tunnel (RFC 3704, section 2.4).
pub fn loosen_reverse_path(device: &str) -> Option<String> {
    let own = format!("net/ipv4/conf/{device}/rp_filter");
    // The kernel takes the larger of the two (Documentation/networking/ip-sysctl.rst).
    let strict = read(&own).as_deref() == Some("1")
        || (read("net/ipv4/conf/all/rp_filter").as_deref() == Some("1")
            && read(&own).as_deref() == Some("0"));
    if strict { ensure(&own, "2").err() } else { None }
}

fn note(problems: &mut Vec<String>, result: Result<(), String>) {
    problems.extend(result.err());
}

/// Where the host's switches are in a container, whose own are read-only; deploy/sluice.yaml mounts them there.
const OF_THE_HOST: &str = "/host/proc/sys";

/// Whether this runs in a container of deploy/sluice.yaml, with the host's network and not its files.
pub fn in_container() -> bool {
    Path::new(OF_THE_HOST).exists()
}

/// Why switches cannot be set; nothing where they can.
pub fn read_only() -> Option<String> {
    let path = path("net/ipv4/ip_forward");
    let error = fs::OpenOptions::new().write(true).open(&path).err()?;
    Some(format!(
        "the kernel's switches cannot be set: opening {} to write: {error}; run as root, where /proc/sys is writable",
        path.display()
    ))
}

/// The file of a switch, named as below `/proc/sys`.
pub fn path(key: &str) -> PathBuf {
    let of_the_host = Path::new(OF_THE_HOST).join(key);
    if of_the_host.exists() {
        of_the_host
    } else {
        Path::new("/proc/sys").join(key)
    }
}

/// The value of a switch, named as below `/proc/sys`; nothing where there is none.
pub fn read(key: &str) -> Option<String> {
    fs::read_to_string(path(key))
        .ok()
        .map(|text| text.trim().to_owned())
}

fn ensure(key: &str, value: &str) -> Result<(), String> {
    if read(key).as_deref() == Some(value) {
        return Ok(());
    }
    let path = path(key);
    let failed = |reason: String| {
        let name = key.replace('/', ".");
        let path = path.display();
        format!("{name} must be {value}, but writing {path} failed: {reason}; run: sysctl -w {name}={value}")
    };
    fs::write(&path, value).map_err(|error| failed(error.to_string()))?;
    match read(key) {
        Some(now) if now == value => Ok(()),
        now => Err(failed(format!("it reads {now:?} afterwards"))),
    }
}
