//! Gives and frees addresses in one store until it is killed: the process that a test of killed calls needs, and a way
//! to watch a store at work.
//!
//! Usage: churn STORE NAME. Writes the empty file STORE/NAME.started once it begins.

use std::path::Path;
use std::time::Duration;

use ipnetwork::IpNetwork;
use sluice_ipam::{Attachment, Origin, Store};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().collect();
    let [_, root, name] = arguments.as_slice() else {
        return Err("usage: churn STORE NAME".into());
    };
    let store = Store::open(root, Duration::ZERO)?;
    let pools: [IpNetwork; 2] = ["10.1.0.0/27".parse()?, "fd00::/64".parse()?];
    let origin = Origin {
        network: "churn",
        netns: Path::new("/proc/self/ns/net"),
    };
    std::fs::write(Path::new(root).join(format!("{name}.started")), "")?;
    for round in 0_u64.. {
        let given = Attachment::new(&format!("{name}-{}", round % 4), "eth0")?;
        // Held already, or none left: the next rounds free some.
        if let Ok(claim) = store.allocate(&given, &pools, &[], origin) {
            let _ = claim.keep();
        }
        if round % 3 != 0 {
            let freed = Attachment::new(&format!("{name}-{}", (round + 2) % 4), "eth0")?;
            let _ = store.free(&freed);
        }
    }
    Ok(())
}
