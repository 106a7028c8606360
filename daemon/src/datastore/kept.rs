//! Which objects of one kind are known, so that a list which comes again tells what is gone. Pure.
//!
//! A list begins by marking nothing; what it names is marked; at its end what is not marked is gone. Nothing is buffered, so a
//! list costs no more memory than the names of what it names.

use std::collections::BTreeMap;

use crate::state::objects::ObjectName;

/// The names of one kind's objects, each with the list that named it last.
#[derive(Debug, Default)]
pub struct Kept {
    names: BTreeMap<ObjectName, u32>,
    list: u32,
}

impl Kept {
    /// A list begins; one that began before and did not end is forgotten.
    pub fn begin(&mut self) {
        self.list = self.list.wrapping_add(1);
    }

    /// The object is there.
    pub fn add(&mut self, name: ObjectName) {
        self.names.insert(name, self.list);
    }

    /// The object is gone.
    pub fn remove(&mut self, name: &ObjectName) {
        self.names.remove(name);
    }

    /// Takes in an object that the list under way has not named, as of an older time; says whether it was not known.
    pub fn add_older(&mut self, name: &ObjectName) -> bool {
        let unknown = !self.names.contains_key(name);
        if unknown {
            self.names.insert(name.clone(), self.list.wrapping_sub(1));
        }
        unknown
    }

    /// The list is through: those that it did not name, which are forgotten.
    pub fn end(&mut self) -> Vec<ObjectName> {
        let list = self.list;
        self.names
            .extract_if(.., |_, named| *named != list)
            .map(|(name, _)| name)
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(name: &str) -> ObjectName {
        ObjectName::new("shop", name)
    }

    /// D1
    #[test]
    fn what_a_list_does_not_name_is_gone_however_often_it_was_broken_off() {
        let mut kept = Kept::default();
        kept.begin();
        for object in ["a", "b", "c"] {
            kept.add(name(object));
        }
        assert!(kept.end().is_empty());
        kept.add(name("d"));
        kept.remove(&name("a"));
        // Broken off after one object: nothing is concluded from it.
        kept.begin();
        kept.add(name("c"));
        kept.begin();
        kept.add(name("b"));
        assert_eq!(kept.end(), [name("c"), name("d")]);
        assert!(kept.end().is_empty(), "what is gone is told once");
    }

    /// D2
    #[test]
    fn what_was_saved_yields_to_what_is_listed() {
        let mut kept = Kept::default();
        kept.begin();
        kept.add(name("new"));
        assert!(!kept.add_older(&name("new")), "the list has named it");
        assert!(kept.add_older(&name("old")));
        assert_eq!(kept.end(), [name("old")]);
    }
}
