//! From what the watches of a remote datastore hear to its events: what is gone, when the first list is whole, what is wrong. Pure.

use std::collections::{BTreeMap, BTreeSet};

use super::kept::Kept;
use super::{Event, wire};
use crate::last_known::Saved;
use crate::state::objects::{Kind, ObjectName};

/// How often a watch fails before that is told: one that another server takes over at once is nobody's trouble.
const PATIENCE: u32 = 2;

/// What the watch of a kind heard.
pub struct Heard(pub Kind, pub What);

/// What was heard.
pub enum What {
    /// A list begins: all there is follows.
    ListBegins,
    /// An object is there, new or changed, and what it came to.
    There(ObjectName, Box<Result<wire::Sent, String>>),
    /// An object is gone.
    Gone(ObjectName),
    /// The list is whole.
    ListEnds,
    /// The watch failed and will be tried again; what the server said, if it said anything.
    Failed(Option<String>),
}

/// What is known of the cluster, by name.
pub struct Keeper {
    /// What problems call the datastore.
    subject: &'static str,
    /// All that is listed and watched.
    kinds: &'static [Kind],
    kept: BTreeMap<Kind, Kept>,
    /// The kinds that were listed to the end.
    listed: BTreeSet<Kind>,
    loaded: bool,
    /// When the state was saved that is served until all kinds are listed.
    fallen_back: Option<String>,
    /// How often in a row the watch of a kind failed, and why it did last.
    failures: BTreeMap<Kind, (u32, Option<String>)>,
    /// What is wrong with objects.
    nonsense: BTreeMap<(Kind, ObjectName), String>,
    /// What else is wrong, by what it is wrong with.
    notes: BTreeMap<&'static str, String>,
    /// What was last told to be wrong.
    told: BTreeMap<String, String>,
}

impl Keeper {
    /// One that knows nothing yet of these `kinds`; problems call the datastore `subject`.
    pub fn new(subject: &'static str, kinds: &'static [Kind]) -> Self {
        Self {
            subject,
            kinds,
            kept: BTreeMap::new(),
            listed: BTreeSet::new(),
            loaded: false,
            fallen_back: None,
            failures: BTreeMap::new(),
            nonsense: BTreeMap::new(),
            notes: BTreeMap::new(),
            told: BTreeMap::new(),
        }
    }

    /// Whether there is a whole state to act on.
    pub fn loaded(&self) -> bool {
        self.loaded
    }

    /// Takes in what a watch heard; `unreachable` says why no server answers.
    pub fn fold(&mut self, Heard(kind, what): Heard, unreachable: &[String]) -> Vec<Event> {
        let mut events = Vec::new();
        match what {
            What::Failed(reason) => {
                let (times, last) = self.failures.entry(kind).or_default();
                *times += 1;
                *last = reason;
            }
            heard => {
                // Every try to list begins as if it would come to something.
                if !matches!(heard, What::ListBegins) {
                    self.failures.remove(&kind);
                }
                self.take(kind, heard, &mut events);
            }
        }
        if !self.loaded && self.listed.len() == self.kinds.len() {
            self.loaded = true;
            events.push(Event::Loaded);
        }
        if self.listed.len() == self.kinds.len() {
            self.fallen_back = None;
        }
        events.extend(self.problems(unreachable));
        events
    }

    /// Takes in that the watches of these kinds go on, though nothing was heard of them yet.
    pub fn recovered(&mut self, kinds: impl Iterator<Item = Kind>, unreachable: &[String]) -> Vec<Event> {
        for kind in kinds {
            self.failures.remove(&kind);
        }
        self.problems(unreachable).into_iter().collect()
    }

    /// Takes in what is wrong with something else, or that it no longer is.
    pub fn note(
        &mut self,
        place: &'static str,
        reason: Option<String>,
        unreachable: &[String],
    ) -> Vec<Event> {
        match reason {
            Some(reason) => _ = self.notes.insert(place, reason),
            None => _ = self.notes.remove(place),
        }
        self.problems(unreachable).into_iter().collect()
    }

    /// Serves what was saved, of the kinds that are not listed yet.
    pub fn fall_back(&mut self, saved: Saved) -> Vec<Event> {
        let mut events = Vec::new();
        for object in saved.objects {
            let (kind, name) = object.id();
            if !self.listed.contains(&kind) && self.kept.entry(kind).or_default().add_older(&name) {
                events.push(Event::Upsert(object));
            }
        }
        tracing::warn!(
            saved = saved.at,
            "the cluster could not be listed yet: the state last known is served until it is"
        );
        self.fallen_back = Some(saved.at);
        self.loaded = true;
        events.push(Event::Loaded);
        events.extend(self.problems(&[]));
        events
    }

    fn take(&mut self, kind: Kind, heard: What, events: &mut Vec<Event>) {
        let kept = self.kept.entry(kind).or_default();
        match heard {
            What::ListBegins => kept.begin(),
            What::There(name, checked) => {
                kept.add(name.clone());
                match *checked {
                    Ok(sent) => {
                        self.note_nonsense(kind, &name, sent.passed_over);
                        events.push(match sent.object {
                            Some(object) => Event::Upsert(object),
                            None => Event::Remove(kind, name),
                        });
                    }
                    Err(reason) => {
                        let reason = format!("{reason}; what it said before stands");
                        self.note_nonsense(kind, &name, Some(reason));
                    }
                }
            }
            What::Gone(name) => {
                kept.remove(&name);
                self.forget(kind, name, events);
            }
            What::ListEnds => {
                for name in kept.end() {
                    self.forget(kind, name, events);
                }
                self.listed.insert(kind);
            }
            What::Failed(_) => {}
        }
    }

    fn forget(&mut self, kind: Kind, name: ObjectName, events: &mut Vec<Event>) {
        self.nonsense.remove(&(kind, name.clone()));
        events.push(Event::Remove(kind, name));
    }

    fn note_nonsense(&mut self, kind: Kind, name: &ObjectName, reason: Option<String>) {
        let id = (kind, name.clone());
        match reason {
            Some(reason) => {
                let object = format!("{kind} {name}");
                let rest = reason.strip_prefix(&object).unwrap_or(&reason);
                let rest = rest.trim_start_matches([':', ' ']).to_owned();
                self.nonsense.insert(id, rest);
            }
            None => _ = self.nonsense.remove(&id),
        }
    }

    /// What is wrong now, if that is not what was last told.
    fn problems(&mut self, unreachable: &[String]) -> Option<Event> {
        let mut problems: BTreeMap<_, _> = self
            .nonsense
            .iter()
            .map(|((kind, name), reason)| (format!("{kind} {name}"), reason.clone()))
            .collect();
        let mut kinds_by_reason: BTreeMap<&str, Vec<String>> = BTreeMap::new();
        let mut reasons: BTreeSet<String> = BTreeSet::new();
        for (kind, (times, said)) in &self.failures {
            if *times < PATIENCE && self.loaded && self.fallen_back.is_none() {
                continue;
            }
            match said {
                Some(said) => kinds_by_reason.entry(said).or_default().push(format!("{kind}s")),
                // What keeps servers from answering is the same for all kinds.
                None => reasons.extend(unreachable.iter().cloned()),
            }
        }
        for (said, kinds) in kinds_by_reason {
            reasons.insert(format!("watching {}: {said}", kinds.join(", ")));
        }
        if let Some(at) = &self.fallen_back {
            reasons.insert(format!("what was known at {at} is served"));
        }
        if !reasons.is_empty() {
            let reasons: Vec<_> = reasons.into_iter().collect();
            problems.insert(self.subject.to_owned(), reasons.join("; "));
        }
        let notes = self.notes.iter();
        problems.extend(notes.map(|(place, reason)| ((*place).to_owned(), reason.clone())));
        (problems != self.told).then(|| {
            self.told.clone_from(&problems);
            Event::Problems(problems)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::objects::{Node, Object};

    const KINDS: [Kind; 3] = [Kind::Node, Kind::Service, Kind::EndpointSlice];

    fn keeper() -> Keeper {
        Keeper::new("the API servers", &KINDS)
    }

    fn node(name: &str) -> Object {
        Object::Node(Node {
            name: name.to_owned(),
            addresses: Vec::new(),
            pod_cidrs: Vec::new(),
            zone: None,
            created: None,
        })
    }

    fn there(object: Object) -> Heard {
        let (kind, name) = object.id();
        let sent = wire::Sent {
            object: Some(object),
            passed_over: None,
        };
        Heard(kind, What::There(name, Box::new(Ok(sent))))
    }

    fn list(keeper: &mut Keeper, kind: Kind, objects: &[Object]) -> Vec<Event> {
        let mut events = keeper.fold(Heard(kind, What::ListBegins), &[]);
        for object in objects {
            events.extend(keeper.fold(there(object.clone()), &[]));
        }
        events.extend(keeper.fold(Heard(kind, What::ListEnds), &[]));
        events
    }

    fn removed(events: &[Event]) -> Vec<String> {
        let name = |event: &Event| match event {
            Event::Remove(_, name) => Some(name.to_string()),
            _ => None,
        };
        events.iter().filter_map(name).collect()
    }

    fn problems(events: &[Event]) -> Option<String> {
        match events.last() {
            Some(Event::Problems(problems)) => Some(format!("{problems:?}")),
            _ => None,
        }
    }

    /// D1
    #[test]
    fn nothing_is_whole_before_every_kind_was_listed_and_only_a_whole_list_removes() {
        let mut keeper = keeper();
        let mut events = list(&mut keeper, Kind::Node, &[node("n1"), node("n2")]);
        events.extend(list(&mut keeper, Kind::Service, &[]));
        assert!(!events.contains(&Event::Loaded));
        let events = list(&mut keeper, Kind::EndpointSlice, &[]);
        assert_eq!(events, [Event::Loaded]);

        // The server went away in the middle of a list, and another begins anew.
        keeper.fold(Heard(Kind::Node, What::ListBegins), &[]);
        let failed = Heard(Kind::Node, What::Failed(None));
        assert!(keeper.fold(failed, &[]).is_empty(), "once is nobody's trouble");
        let events = list(&mut keeper, Kind::Node, &[node("n2"), node("n3")]);
        assert_eq!(removed(&events), ["n1"]);
        assert!(!events.contains(&Event::Loaded), "that is said once");
    }

    /// D2
    #[test]
    fn what_was_saved_is_served_until_the_lists_are_whole_and_then_swept() {
        let mut keeper = keeper();
        keeper.fold(Heard(Kind::Node, What::ListBegins), &[]);
        keeper.fold(there(node("n1")), &[]);
        let saved = Saved {
            at: "2026-01-01T00:00:00Z".to_owned(),
            objects: vec![node("n1"), node("n2")],
        };
        let events = keeper.fall_back(saved);
        let Some(Event::Upsert(object)) = events.first() else {
            panic!("{events:?}")
        };
        assert_eq!(object.id().1.name, "n2", "what is listed already is newer");
        assert!(events.contains(&Event::Loaded));
        assert!(
            problems(&events)
                .unwrap()
                .contains("2026-01-01T00:00:00Z is served")
        );
        let events = keeper.fold(Heard(Kind::Node, What::ListEnds), &[]);
        assert_eq!(removed(&events), ["n2"]);
        list(&mut keeper, Kind::Service, &[]);
        let events = list(&mut keeper, Kind::EndpointSlice, &[]);
        assert_eq!(problems(&events).unwrap(), "{}");
    }

    /// D1 D5
    #[test]
    fn what_fails_again_and_what_makes_no_sense_is_told_and_over_when_it_is() {
        let mut keeper = keeper();
        for kind in KINDS {
            list(&mut keeper, kind, &[]);
        }
        let forbidden = || {
            Heard(
                Kind::Service,
                What::Failed(Some("services is forbidden".to_owned())),
            )
        };
        keeper.fold(forbidden(), &[]);
        keeper.fold(Heard(Kind::Service, What::ListBegins), &[]);
        let told = problems(&keeper.fold(forbidden(), &[])).unwrap();
        assert!(
            told.contains("watching Services: services is forbidden"),
            "{told}"
        );
        let events = keeper.recovered([Kind::Service].into_iter(), &[]);
        assert_eq!(problems(&events).unwrap(), "{}");
        let refused = ["https://192.0.2.1:6443/: refused".to_owned()];
        for _ in 0..2 {
            keeper.fold(Heard(Kind::Service, What::Failed(None)), &refused);
        }
        assert!(keeper.told.values().any(|told| told == &refused[0]));
        let events = keeper.fold(Heard(Kind::Node, What::ListBegins), &[]);
        assert_eq!(problems(&events).unwrap(), "{}", "another server answers");

        let name = ObjectName::new("shop", "web");
        let refused = Err("Service shop/web: spec.type: \"Nonsense\" is unknown".to_owned());
        let told = problems(&keeper.fold(
            Heard(Kind::Service, What::There(name.clone(), Box::new(refused))),
            &[],
        ));
        assert_eq!(
            told.unwrap(),
            r#"{"Service shop/web": "spec.type: \"Nonsense\" is unknown; what it said before stands"}"#
        );
        let events = keeper.fold(Heard(Kind::Service, What::Gone(name)), &[]);
        assert_eq!(problems(&events).unwrap(), "{}");
    }
}
