//! Desired versus observed: the one generic difference every driver plans with.
//!
//! Pure. A driver lists what should be and what is, keyed the same way; [`plan`] says what to do, in the order in
//! which it is safe to do it: what others may rely on is made before what is stale goes.

use std::collections::BTreeMap;

/// One step from observed to desired.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change<K, V> {
    /// Wanted, and not there.
    Create(K, V),
    /// There, but different: `from` is what was found.
    Update {
        /// Which one.
        key: K,
        /// What was found.
        from: V,
        /// What is wanted.
        to: V,
    },
    /// There, and not wanted: the value is what was found.
    Delete(K, V),
}

/// The steps that make `observed` equal to `desired`: creations and updates in key order, then deletions.
pub fn plan<K, V>(desired: &BTreeMap<K, V>, observed: &BTreeMap<K, V>) -> Vec<Change<K, V>>
where
    K: Ord + Clone,
    V: PartialEq + Clone,
{
    let wanted = desired.iter().filter_map(|(key, to)| match observed.get(key) {
        None => Some(Change::Create(key.clone(), to.clone())),
        Some(from) if from == to => None,
        Some(from) => Some(Change::Update {
            key: key.clone(),
            from: from.clone(),
            to: to.clone(),
        }),
    });
    let stale = observed
        .iter()
        .filter(|(key, _)| !desired.contains_key(key))
        .map(|(key, found)| Change::Delete(key.clone(), found.clone()));
    wanted.chain(stale).collect()
}

/// Keys with their values, in the order of the plan.
pub type Entries<K, V> = Vec<(K, V)>;

/// A plan as two lists: what to set (created or updated), and what to delete with the value found.
///
/// For drivers whose kernel has a "replace", where creating and updating are one call.
pub fn split<K, V>(plan: Vec<Change<K, V>>) -> (Entries<K, V>, Entries<K, V>) {
    let (mut set, mut delete) = (Vec::new(), Vec::new());
    for change in plan {
        match change {
            Change::Create(key, value) | Change::Update { key, to: value, .. } => set.push((key, value)),
            Change::Delete(key, value) => delete.push((key, value)),
        }
    }
    (set, delete)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn creates_and_updates_come_before_deletes() {
        let desired = BTreeMap::from([(1, "a"), (2, "b"), (4, "d")]);
        let observed = BTreeMap::from([(0, "z"), (2, "x"), (4, "d")]);
        assert_eq!(
            plan(&desired, &observed),
            vec![
                Change::Create(1, "a"),
                Change::Update {
                    key: 2,
                    from: "x",
                    to: "b"
                },
                Change::Delete(0, "z")
            ]
        );
    }

    #[test]
    fn equal_sides_need_nothing() {
        let side = BTreeMap::from([(1, 1)]);
        assert!(plan(&side, &side).is_empty());
    }
}
