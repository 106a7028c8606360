//! STATUS: could a pod be wired now?

use sluice_ipam::{DEFAULT_REST, Pool, Store};

use crate::config::Config;
use crate::error::{Code, Failure};
use crate::node_file::NodeFile;

/// Succeeds when ADD would.
///
/// # Errors
/// Code 50 with the reason; 51 when pods already wired may suffer too.
pub fn status(config: &Config) -> Result<(), Failure> {
    let node = NodeFile::read(&config.node_file);
    let node = node.map_err(|error| Failure::new(Code::NotReady, error.to_string()))?;
    if !node.impaired.is_empty() {
        return Err(Failure::new(Code::Impaired, node.impaired).with_details(node.not_ready));
    }
    if !node.not_ready.is_empty() {
        return Err(Failure::new(Code::NotReady, node.not_ready));
    }
    if node.pod_cidrs.is_empty() {
        return Err(Failure::new(Code::NotReady, "the node has no pod CIDR"));
    }
    let store = Store::open_existing(&config.ipam_directory, DEFAULT_REST)
        .map(|store| store.with_reserved(&node.reserved));
    if let Some(store) = &store {
        let room = store.check_room();
        room.map_err(|error| Failure::new(Code::NotReady, error.to_string()))?;
    }
    for v4 in [true, false] {
        let family: Vec<_> = node
            .pod_cidrs
            .iter()
            .copied()
            .filter(|cidr| cidr.is_ipv4() == v4)
            .collect();
        let mut full = Vec::new();
        for cidr in &family {
            let usage = match &store {
                Some(store) => store.usage(*cidr)?,
                None => Default::default(),
            };
            let size = Pool::new(*cidr, &node.reserved).size();
            if usage.held + usage.resting >= size {
                let (held, resting) = (usage.held, usage.resting);
                full.push(format!(
                    "{cidr} has {size} for pods, {held} held, {resting} resting"
                ));
            }
        }
        if !family.is_empty() && full.len() == family.len() {
            return Err(Failure::new(
                Code::NotReady,
                format!("no free address: {}", full.join(", ")),
            ));
        }
    }
    Ok(())
}
