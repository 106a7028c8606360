//! Whatever is asked in whatever order, killed where it may be: the store agrees with a model of a few lines.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::net::IpAddr;

use proptest::prelude::*;
use sluice_ipam::Error;
use tempfile::tempdir;

use crate::{cidrs, give, open, pod};

#[derive(Debug, Clone)]
enum Step {
    Give(u8),
    Ask(u8, u8),
    Free(u8),
    /// A giving cut short after so many of its links.
    CutGive(u8, usize),
    /// A freeing cut short after so many of its renames.
    CutFree(u8, usize),
    /// The file of an owner is cut short.
    Damage(u8, u64),
    /// The file of an owner vanishes.
    Lose(u8),
    Repair,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        6 => (0_u8..12).prop_map(Step::Give),
        2 => (0_u8..12, 0_u8..16).prop_map(|(id, last)| Step::Ask(id, last)),
        4 => (0_u8..12).prop_map(Step::Free),
        1 => (0_u8..12, 0_usize..2).prop_map(|(id, links)| Step::CutGive(id, links)),
        1 => (0_u8..12, 0_usize..2).prop_map(|(id, renames)| Step::CutFree(id, renames)),
        1 => (0_u8..12, 0_u64..40).prop_map(|(id, length)| Step::Damage(id, length)),
        1 => (0_u8..12).prop_map(Step::Lose),
        1 => Just(Step::Repair),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    // C9 I1 I2 I5
    #[test]
    fn no_address_twice_and_nothing_leaked(steps in prop::collection::vec(step(), 1..60)) {
        let directory = tempdir().unwrap();
        let store = open(directory.path(), 0);
        let root = directory.path().join("ipam");
        let pools = cidrs(&["10.1.0.0/28", "fd00::/124"]);
        // Wired pods and their addresses: those of killed calls and lost files are nobody's.
        let mut model: BTreeMap<u8, Vec<IpAddr>> = BTreeMap::new();
        for step in steps {
            match step {
                Step::Give(id) | Step::CutGive(id, _) | Step::Ask(id, _) => {
                    let asked: Vec<IpAddr> = match step {
                        Step::Ask(_, last) => vec![format!("10.1.0.{last}").parse().unwrap()],
                        _ => Vec::new(),
                    };
                    match give(&store, id, &pools, &asked) {
                        Ok(given) => {
                            prop_assert!(!model.contains_key(&id));
                            prop_assert_eq!(given.len(), 2);
                            prop_assert!(asked.iter().all(|asked| given.contains(asked)));
                            for address in &given {
                                prop_assert!(model.values().all(|held| !held.contains(address)), "{} twice", address);
                            }
                            if let Step::CutGive(_, links) = step {
                                for address in &given[links..] {
                                    fs::remove_file(root.join(format!("held/{address}"))).unwrap();
                                }
                            } else {
                                model.insert(id, given);
                            }
                        }
                        Err(Error::AlreadyHeld { .. } | Error::Full { .. }) => {}
                        Err(Error::Conflict { .. } | Error::OutsidePools { .. }) => prop_assert!(!asked.is_empty()),
                        Err(error) => return Err(TestCaseError::fail(error.to_string())),
                    }
                }
                Step::Free(id) => {
                    let freed = store.free(&pod(id)).unwrap();
                    if let Some(held) = model.remove(&id) {
                        let freed: BTreeSet<_> = freed.unwrap().addresses.into_iter().collect();
                        prop_assert_eq!(freed, held.into_iter().collect());
                    }
                }
                Step::CutFree(id, renames) => {
                    for address in model.remove(&id).into_iter().flatten().take(renames) {
                        let at = |place: &str| root.join(format!("{place}/{address}"));
                        fs::rename(at("held"), at("resting")).unwrap();
                    }
                }
                Step::Damage(id, length) => {
                    // Of wired pods only: a call never cuts its own file, for it has no name until it is whole.
                    if model.contains_key(&id) {
                        let owner = root.join(format!("owners/{id}@eth0"));
                        fs::OpenOptions::new().write(true).open(owner).unwrap().set_len(length).unwrap();
                    }
                }
                Step::Lose(id) => {
                    if model.remove(&id).is_some() {
                        fs::remove_file(root.join(format!("owners/{id}@eth0"))).unwrap();
                    }
                }
                Step::Repair => {
                    store.repair().unwrap();
                    prop_assert_eq!(store.repair().unwrap(), []);
                }
            }
            for (id, held) in &model {
                let found: BTreeSet<_> = store.get(&pod(id)).unwrap().unwrap().addresses.into_iter().collect();
                prop_assert_eq!(found, held.iter().copied().collect());
            }
        }
        // GC: everything not in the model goes, and nothing else.
        store.repair().unwrap();
        for held in store.list().unwrap() {
            let id: u8 = held.attachment.container_id().parse().unwrap();
            if !model.contains_key(&id) {
                store.free(&held.attachment).unwrap();
            }
        }
        let held: BTreeSet<IpAddr> = fs::read_dir(root.join("held")).unwrap()
            .map(|entry| entry.unwrap().file_name().to_str().unwrap().parse().unwrap())
            .collect();
        prop_assert_eq!(held, model.values().flatten().copied().collect());
        prop_assert_eq!(store.list().unwrap().len(), model.len());
    }
}
