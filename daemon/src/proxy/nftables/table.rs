//! The table in the kernel: its fixed part through nft(8), its elements by netlink, read back the same way.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, Write};
use std::net::SocketAddr;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

use super::elements::{
    Changes, Data, Element, LOCAL_OFFSET, SetKind, Verdict, endpoint_bytes, key_bytes, key_of,
};
use super::rules::{self, GOTO, VERDICT, VERDICT_CHAIN, VERDICT_CODE};
use super::skeleton::{self, LAYOUT, TABLE};
use crate::netfilter::parts::Parts;
use crate::netfilter::wire::{Attributes, Batch, INET, NFTABLES, Netfilter, attribute, attributes, string};
use crate::proxy::Surroundings;
use crate::state::service_port::{Family, Protocol};

/// `enum nf_tables_msg_types`.
const GET_CHAIN: u16 = 4;
const GET_RULE: u16 = 7;
const GET_SET: u16 = 10;
const NEW_ELEMENT: u16 = 12;
const GET_ELEMENT: u16 = 13;
const DELETE_ELEMENT: u16 = 14;
/// The table's name in all of these; a chain's name, a set's, and a rule's chain and handle.
const OBJECT_TABLE: u16 = 1;
const CHAIN_NAME: u16 = 3;
const SET_NAME: u16 = 2;
const RULE_CHAIN: u16 = 2;
const RULE_HANDLE: u16 = 3;
/// `enum nft_set_elem_list_attributes`.
const LIST_TABLE: u16 = 1;
const LIST_SET: u16 = 2;
const LIST_ELEMENTS: u16 = 3;
const LIST_ELEMENT: u16 = 1;
/// `enum nft_set_elem_attributes`.
const ELEMENT_KEY: u16 = 1;
const ELEMENT_DATA: u16 = 2;
const ELEMENT_KEY_END: u16 = 10;
/// `NFTA_DATA_VALUE`, `NF_DROP`.
const DATA_VALUE: u16 = 1;
const DROP: i32 = 0;

/// An attribute's length has 16 bits: more elements than this many bytes go in another message.
const MESSAGE_FULL: usize = 48 << 10;

const FAMILIES: [Family; 2] = [Family::V4, Family::V6];

/// The table.
pub struct Table {
    netfilter: Netfilter,
    /// Chains that pick, and sets of frontends with affinity, that are there.
    made: BTreeSet<String>,
    /// The rules, by chain and handle, as they are when all is well.
    rules: BTreeSet<(String, Vec<u8>)>,
    /// Whether the table is another build's, of another layout.
    outdated: bool,
}

impl Table {
    /// Opens the table that is there, or makes it; true if it was there. One of another layout is not taken for it, but serves until
    /// [`Table::adjust`] makes it anew.
    ///
    /// # Errors
    /// nft(8) is missing or refuses, or the kernel has no nf_tables.
    pub fn open() -> Result<(Self, bool)> {
        let netfilter = Netfilter::open()?;
        let mut table = Self {
            netfilter,
            made: BTreeSet::new(),
            rules: BTreeSet::new(),
            outdated: false,
        };
        let chains = table.names(GET_CHAIN)?;
        let there = chains.contains(LAYOUT);
        if there {
            table.made = chains;
            table.made.extend(table.names(GET_SET)?);
            table.rules = table.rules()?;
        } else if chains.is_empty() {
            table.make()?;
        } else {
            table.outdated = true;
        }
        Ok((table, there))
    }

    /// Makes the table anew, empty.
    ///
    /// # Errors
    /// As [`Table::open`].
    pub fn make(&mut self) -> Result<()> {
        nft(&skeleton::table())?;
        self.outdated = false;
        self.made.clear();
        self.rules = self.rules()?;
        Ok(())
    }

    /// Fits the table to the node.
    ///
    /// # Errors
    /// nft(8)'s.
    pub fn adjust(&mut self, surroundings: &Surroundings) -> Result<()> {
        if self.outdated {
            self.make()?;
        }
        nft(&skeleton::surroundings(surroundings))?;
        self.rules = self.rules()?;
        Ok(())
    }

    /// The way to talk to the kernel about it.
    pub fn netfilter(&self) -> &Netfilter {
        &self.netfilter
    }

    /// Applies changes, all of them at once or none.
    ///
    /// # Errors
    /// The kernel's, or nft(8)'s.
    pub fn apply(&mut self, changes: &Changes) -> Result<()> {
        if changes.is_empty() {
            return Ok(());
        }
        let mut batch = Batch::default();
        let made = self.push_missing(&mut batch, changes);
        push(
            &mut batch,
            DELETE_ELEMENT,
            0,
            changes.removed.iter().map(|element| (*element, Data::None)),
        );
        push(
            &mut batch,
            NEW_ELEMENT,
            libc::NLM_F_CREATE,
            changes.added.iter().copied(),
        );
        self.netfilter.apply(batch).with_context(|| {
            let (removed, added) = (changes.removed.len(), changes.added.len());
            format!("changing {removed} and {added} elements of the nftables table inet {TABLE}")
        })?;
        if !made.is_empty() {
            self.made.extend(made);
            self.rules = self.rules()?;
        }
        Ok(())
    }

    /// Adds the chains and sets that changes want and that are not there yet; says which.
    fn push_missing(&self, batch: &mut Batch, changes: &Changes) -> BTreeSet<String> {
        let mut made = BTreeSet::new();
        let mut missing =
            |name: String| (!self.made.contains(&name) && made.insert(name.clone())).then_some(name);
        let mut id = 0;
        for (element, data) in &changes.added {
            let family = element.family();
            if let Some((verdict, Some(chain))) = data.verdict(family)
                && let Some(behind) = verdict.chain(family)
            {
                let pick = match verdict {
                    Verdict::Cluster(count) => Some((count, 0)),
                    Verdict::Local(count) => Some((count, LOCAL_OFFSET)),
                    Verdict::Refuse | Verdict::Drop => None,
                };
                if let Some((count, offset)) = pick
                    && let Some(name) = missing(behind.clone())
                {
                    rules::push_picker(batch, &name, family, count, offset);
                }
                if matches!(data, Data::Checked(_))
                    && let Some(name) = missing(chain)
                {
                    rules::push_checked(batch, &name, family, &behind);
                }
            }
            if let SetKind::Sticky(seconds) = element.set
                && let Some(name) = missing(element.set.name(family))
            {
                for (chain, hook) in rules::LEARN {
                    if let Some(name) = missing(chain.to_owned()) {
                        rules::push_learning(batch, &name, hook);
                    }
                }
                // Tells the sets of one transaction apart.
                id += 1;
                rules::push_sticky(batch, &name, family, seconds, id);
            }
        }
        made
    }

    /// All elements, read back.
    ///
    /// # Errors
    /// The kernel's; `ENOENT` somewhere in it if the table is gone.
    pub fn elements(&self) -> Result<BTreeMap<Element, Data>> {
        let mut found = BTreeMap::new();
        let sticky = self.made.iter().filter_map(|name| {
            let (_, seconds) = name.strip_prefix("sticky")?.split_once('-')?;
            seconds.parse().ok().map(SetKind::Sticky)
        });
        let sets: BTreeSet<SetKind> = SetKind::FIXED.into_iter().chain(sticky).collect();
        for (set, family) in sets.iter().flat_map(|set| FAMILIES.map(|family| (*set, family))) {
            let name = set.name(family);
            if matches!(set, SetKind::Sticky(_)) && !self.made.contains(&name) {
                continue;
            }
            self.each_element(&name, |element| {
                let value = |kind| attribute(attribute(element, kind)?, DATA_VALUE);
                let key = value(ELEMENT_KEY).and_then(|key| key_of(set, family, key, value(ELEMENT_KEY_END)));
                if let Some(key) = key {
                    found.insert(Element { set, key }, data_of(set, family, element));
                }
            })?;
        }
        Ok(found)
    }

    /// Removes from the memory of affinity what `stays` does not know: a client's frontend, and its endpoint.
    ///
    /// # Errors
    /// The kernel's.
    pub fn forget_clients(&self, stays: impl Fn(SocketAddr, Protocol, SocketAddr) -> bool) -> Result<()> {
        for family in FAMILIES {
            let name = format!("affinity{}", super::elements::digit(family));
            let mut stale = Vec::new();
            self.each_element(&name, |element| {
                let value = |kind| attribute(attribute(element, kind)?, DATA_VALUE);
                let Some(key) = value(ELEMENT_KEY) else { return };
                let known = || {
                    let mut parts = Parts(key);
                    parts.address(family)?;
                    let address = parts.address(family)?;
                    let protocol = parts.protocol()?;
                    let frontend = SocketAddr::new(address, parts.port()?);
                    Some((frontend, protocol, Parts(value(ELEMENT_DATA)?).endpoint(family)?))
                };
                if known().is_some_and(|(frontend, protocol, endpoint)| !stays(frontend, protocol, endpoint))
                {
                    stale.push(key.to_vec());
                }
            })?;
            for key in stale {
                let mut batch = Batch::default();
                let mut elements = Attributes::default();
                put_element(&mut elements, &key, None, |_| {});
                push_message(&mut batch, DELETE_ELEMENT, 0, &name, &elements);
                match self.netfilter.apply(batch) {
                    // Its time was up.
                    Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                    result => result.context("forgetting a client whose endpoint went")?,
                }
            }
        }
        Ok(())
    }

    /// Whether the rules are as they were made.
    ///
    /// # Errors
    /// The kernel's.
    pub fn is_whole(&self) -> Result<bool> {
        Ok(self.rules()? == self.rules)
    }

    fn each_element(&self, set: &str, mut each: impl FnMut(&[u8])) -> Result<()> {
        let mut request = Attributes::default();
        request.put_str(LIST_TABLE, TABLE).put_str(LIST_SET, set);
        self.netfilter
            .dump(NFTABLES, GET_ELEMENT, INET, &request, |_, body| {
                let elements = attribute(body, LIST_ELEMENTS).unwrap_or_default();
                attributes(elements).for_each(|(_, element)| each(element));
            })
            .with_context(|| format!("reading the set {set} of the nftables table inet {TABLE}"))
    }

    /// The names of the table's chains or sets.
    fn names(&self, message: u16) -> Result<BTreeSet<String>> {
        let kind = if message == GET_CHAIN {
            CHAIN_NAME
        } else {
            SET_NAME
        };
        let mut names = BTreeSet::new();
        self.each_object(message, |body| {
            names.extend(attribute(body, kind).map(string));
        })?;
        Ok(names)
    }

    fn rules(&self) -> Result<BTreeSet<(String, Vec<u8>)>> {
        let mut rules = BTreeSet::new();
        self.each_object(GET_RULE, |body| {
            let chain = attribute(body, RULE_CHAIN).map(string).unwrap_or_default();
            let handle = attribute(body, RULE_HANDLE).unwrap_or_default().to_vec();
            rules.insert((chain, handle));
        })?;
        Ok(rules)
    }

    fn each_object(&self, message: u16, mut each: impl FnMut(&[u8])) -> Result<()> {
        let mut request = Attributes::default();
        request.put_str(OBJECT_TABLE, TABLE);
        let dumped = self.netfilter.dump(NFTABLES, message, INET, &request, |_, body| {
            // Older kernels give those of all tables.
            if attribute(body, OBJECT_TABLE).map(string).as_deref() == Some(TABLE) {
                each(body);
            }
        });
        match dumped {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            result => result.with_context(|| format!("reading the nftables table inet {TABLE}")),
        }
    }
}

/// Removes the table; says whether it was there.
///
/// # Errors
/// nft(8)'s.
pub fn remove() -> Result<bool> {
    // Where there is no nf_tables there is no table.
    let Ok(netfilter) = Netfilter::open() else {
        return Ok(false);
    };
    let table = Table {
        netfilter,
        made: BTreeSet::new(),
        rules: BTreeSet::new(),
        outdated: false,
    };
    match table.names(GET_CHAIN) {
        Ok(names) if !names.is_empty() => {}
        _ => return Ok(false),
    }
    nft(&format!("delete table inet {TABLE}\n"))?;
    Ok(true)
}

/// Feeds `text` to nft(8), which applies all of it or nothing.
fn nft(text: &str) -> Result<()> {
    let mut child = Command::new("nft")
        .args(["-f", "-"])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .context("starting nft; the nftables dataplane needs it (package nftables)")?;
    if let Some(mut stdin) = child.stdin.take() {
        stdin.write_all(text.as_bytes()).context("writing to nft")?;
    }
    let answer = child.wait_with_output().context("waiting for nft")?;
    if !answer.status.success() {
        let said = String::from_utf8_lossy(&answer.stderr);
        bail!("nft -f: {}", said.trim());
    }
    Ok(())
}

/// Adds messages that name these elements, as few as hold them.
fn push(batch: &mut Batch, message: u16, flags: i32, elements: impl Iterator<Item = (Element, Data)>) {
    let mut by_set: BTreeMap<(SetKind, u8), Attributes> = BTreeMap::new();
    for (element, data) in elements {
        let family = element.family();
        let place = (element.set, super::elements::digit(family));
        let list = by_set.entry(place).or_default();
        let (key, last) = key_bytes(&element.key);
        put_element(list, &key, last.as_deref(), |attributes| {
            put_data(attributes, data, family)
        });
        if list.len() > MESSAGE_FULL {
            let full = std::mem::take(list);
            push_message(batch, message, flags, &element.set.name(family), &full);
        }
    }
    for ((set, digit), list) in by_set {
        let family = if digit == 4 { Family::V4 } else { Family::V6 };
        push_message(batch, message, flags, &set.name(family), &list);
    }
}

fn push_message(batch: &mut Batch, message: u16, flags: i32, set: &str, elements: &Attributes) {
    if elements.len() == 0 {
        return;
    }
    let mut attributes = Attributes::default();
    attributes.put_str(LIST_TABLE, TABLE).put_str(LIST_SET, set);
    attributes.nest(LIST_ELEMENTS, |list| list.append(elements));
    batch.push(message, flags, &attributes);
}

fn put_element(list: &mut Attributes, key: &[u8], last: Option<&[u8]>, data: impl FnOnce(&mut Attributes)) {
    list.nest(LIST_ELEMENT, |element| {
        element.nest(ELEMENT_KEY, |attribute| _ = attribute.put(DATA_VALUE, key));
        if let Some(last) = last {
            element.nest(ELEMENT_KEY_END, |attribute| _ = attribute.put(DATA_VALUE, last));
        }
        data(element);
    });
}

fn put_data(element: &mut Attributes, data: Data, family: Family) {
    match data {
        Data::None => {}
        Data::Endpoint(endpoint) => {
            element.nest(ELEMENT_DATA, |data| {
                _ = data.put(DATA_VALUE, &endpoint_bytes(endpoint))
            });
        }
        Data::Verdict(_) | Data::Checked(_) => {
            let chain = data.verdict(family).and_then(|(_, chain)| chain);
            element.nest(ELEMENT_DATA, |data| {
                data.nest(VERDICT, |attributes| {
                    let code = if chain.is_some() { GOTO } else { DROP };
                    attributes.put(VERDICT_CODE, &code.to_be_bytes());
                    if let Some(chain) = chain {
                        attributes.put_str(VERDICT_CHAIN, &chain);
                    }
                });
            });
        }
    }
}

fn data_of(set: SetKind, family: Family, element: &[u8]) -> Data {
    let Some(data) = attribute(element, ELEMENT_DATA) else {
        return Data::None;
    };
    let found = match set {
        SetKind::Endpoints => attribute(data, DATA_VALUE)
            .and_then(|value| Parts(value).endpoint(family))
            .map(Data::Endpoint),
        _ => attribute(data, VERDICT).and_then(|verdict| match attribute(verdict, VERDICT_CHAIN) {
            Some(chain) => Data::of_chain(&string(chain)),
            None => Some(Data::Verdict(Verdict::Drop)),
        }),
    };
    found.unwrap_or(Data::None)
}
