//! What the kernel's tables hold, compared with what was programmed: somebody else may have written there.

use std::collections::HashMap;
use std::hash::Hash;

use anyhow::Result;
use aya::Pod;

use super::services::Services;
use super::tables::{Table, Tables};

/// Puts right what differs in the tables that Services are in; says how many entries did.
///
/// What is missing comes before what leads to it, and no entry that is as it should be is touched.
///
/// # Errors
/// The kernel's.
pub(super) fn audit(services: &Services, tables: &mut Tables) -> Result<usize> {
    let mut mended = mend(&mut tables.members, services.sets().flat_map(|set| set.members()))?;
    mended += mend(&mut tables.backends, services.sets().flat_map(|set| set.slots()))?;
    let in_kernel = services.sets().filter_map(|set| Some((set.id, set.service()?)));
    mended += mend(&mut tables.services, in_kernel)?;
    mended += mend(&mut tables.maglev, services.maglev().entries(services.sets()))?;
    mended += mend(&mut tables.addresses, services.addresses().iter())?;
    mended += services.sources().audit(tables)?;
    mended += mend(&mut tables.frontends, services.frontends())?;
    Ok(mended)
}

/// Makes `table` hold what is `wanted` and nothing else; says how many entries had to be written or removed.
///
/// # Errors
/// The kernel's.
pub(super) fn mend<K, V>(table: &mut Table<K, V>, wanted: impl Iterator<Item = (K, V)>) -> Result<usize>
where
    K: Pod + Eq + Hash,
    V: Pod + PartialEq,
{
    let mut found: HashMap<K, V> = table.entries()?.into_iter().collect();
    let missing: Vec<(K, V)> = wanted
        .filter(|(key, value)| found.remove(key).as_ref() != Some(value))
        .collect();
    table.set_all(&missing)?;
    for stranger in found.keys() {
        table.remove(stranger)?;
    }
    Ok(missing.len() + found.len())
}
