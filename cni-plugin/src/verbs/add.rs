//! ADD: gives a pod its addresses and wires it, or changes nothing.

use serde_json::Value;
use sluice_ipam::{DEFAULT_REST, Origin, Store};

use crate::config::Config;
use crate::error::{Code, Failure};
use crate::invocation::Target;
use crate::netns::Netns;
use crate::node_file::NodeFile;
use crate::wiring::{self, Plan};
use crate::{result, verbs::del};

/// Wires `target` and returns the result.
///
/// # Errors
/// Whatever step failed; everything before it is undone.
pub fn add(target: &Target, config: &Config) -> Result<Value, Failure> {
    let wishes = config.wishes(&target.arguments)?;
    if config.prev_result().is_some() {
        let message = "prevResult: this plugin must be the first of its chain, but another ran before it";
        return Err(Failure::new(Code::Config, message));
    }
    let node = NodeFile::read(&config.node_file)?;
    if !node.not_ready.is_empty() {
        return Err(Failure::new(
            Code::TryAgain,
            format!("the node is not ready: {}", node.not_ready),
        ));
    }
    let netns = Netns::open(&target.netns)?;
    let store = Store::open(&config.ipam_directory, DEFAULT_REST)?;
    let origin = Origin {
        network: &config.name,
        netns: &target.netns,
    };
    let claim = store.allocate(&target.attachment, &node.pod_cidrs, &wishes.addresses, origin)?;
    let plan = Plan::new(
        &target.attachment,
        &node,
        &claim.allocation().addresses,
        wishes.mac,
    )?;
    wiring::make(&plan, &netns)?;
    if let Err(error) = claim.keep() {
        // A DEL ran meanwhile and may have looked for the device before it was there.
        del::remove_device(&target.attachment)?;
        return Err(error.into());
    }
    Ok(result::to_json(
        &plan,
        &target.netns.to_string_lossy(),
        config.dns(),
        config.version,
    ))
}
