//! Who has an address that several Services claim: the oldest of them, on every node and after every restart the same. Pure.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use super::objects::{ObjectName, Service};
use super::service_port::Protocol;

/// An address that leads to one Service alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Claim {
    /// The address.
    pub address: IpAddr,
    /// The port.
    pub port: u16,
    /// Its protocol.
    pub protocol: Protocol,
}

impl Claim {
    /// The claim to `address` under `protocol`.
    pub fn new(address: SocketAddr, protocol: Protocol) -> Self {
        Self {
            address: address.ip(),
            port: address.port(),
            protocol,
        }
    }
}

/// A Service as one of several that claim an address; the lesser has it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Claimant {
    /// When it was created, in seconds since 1970. What does not say so is younger than all that does.
    created: i64,
    /// Its name: of two as old as each other the first by name has what both claim.
    pub name: ObjectName,
}

impl Claimant {
    /// The rank of `service`.
    pub fn new(service: &Service) -> Self {
        Self {
            created: service.created.unwrap_or(i64::MAX),
            name: service.name.clone(),
        }
    }

    /// Why it has what `name` claims too.
    pub fn reason(&self, other: Option<&Service>) -> &'static str {
        match other.map(Self::new) {
            Some(other) if other.created > self.created => "which is older",
            _ => "which is first by name",
        }
    }
}

/// All claims. Nearly all have one claimant; the others have room of their own.
#[derive(Debug, Default)]
pub struct Claims {
    holders: HashMap<Claim, Arc<Claimant>>,
    rivals: BTreeMap<Claim, BTreeSet<Arc<Claimant>>>,
}

impl Claims {
    /// Makes a claim for `who`. Says whose the address was until now, if it was another's.
    pub fn make(&mut self, claim: Claim, who: &Arc<Claimant>) -> Option<Arc<Claimant>> {
        let Some(holder) = self.holders.get_mut(&claim) else {
            self.holders.insert(claim, Arc::clone(who));
            return None;
        };
        if holder.name == who.name {
            return None;
        }
        let rivals = self.rivals.entry(claim).or_default();
        // One made anew under its old name ranks as what it is now.
        rivals.retain(|rival| rival.name != who.name);
        if who > holder {
            rivals.insert(Arc::clone(who));
            return None;
        }
        let former = std::mem::replace(holder, Arc::clone(who));
        rivals.insert(Arc::clone(&former));
        Some(former)
    }

    /// Gives up what the Service called `who` claims. Says whose the address is from now on, if it is another's only now.
    pub fn give_up(&mut self, claim: Claim, who: &ObjectName) -> Option<Arc<Claimant>> {
        if self.holder(claim) != Some(who) {
            if let Some(rivals) = self.rivals.get_mut(&claim) {
                rivals.retain(|rival| rival.name != *who);
                self.forget_if_alone(claim);
            }
            return None;
        }
        let Some(next) = self.rivals.get_mut(&claim).and_then(BTreeSet::pop_first) else {
            self.holders.remove(&claim);
            return None;
        };
        self.holders.insert(claim, Arc::clone(&next));
        self.forget_if_alone(claim);
        Some(next)
    }

    /// Who has the address.
    pub fn holder(&self, claim: Claim) -> Option<&ObjectName> {
        self.claimant(claim).map(|claimant| &claimant.name)
    }

    /// Who has the address, with its rank.
    pub fn claimant(&self, claim: Claim) -> Option<&Claimant> {
        self.holders.get(&claim).map(Arc::as_ref)
    }

    fn forget_if_alone(&mut self, claim: Claim) {
        if self.rivals.get(&claim).is_some_and(BTreeSet::is_empty) {
            self.rivals.remove(&claim);
        }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    fn claim() -> Claim {
        Claim::new("192.0.2.1:80".parse().unwrap(), Protocol::Tcp)
    }

    /// A Service that does not say how old it is.
    pub fn claimant(namespace: &str, name: &str) -> Arc<Claimant> {
        created(i64::MAX, namespace, name)
    }

    fn created(created: i64, namespace: &str, name: &str) -> Arc<Claimant> {
        let name = ObjectName::new(namespace, name);
        Arc::new(Claimant { created, name })
    }

    /// S19
    #[test]
    fn whatever_the_order_of_coming_and_going_the_oldest_has_it() {
        let all = [
            created(5, "shop", "c"),
            created(5, "shop", "d"),
            created(3, "shop", "z"),
            claimant("a", "a"),
        ];
        // Every order of coming: the indices of `all` as digits of a number to the base of four.
        for order in 0..256 {
            let order = [order % 4, order / 4 % 4, order / 16 % 4, order / 64];
            if order.iter().collect::<BTreeSet<_>>().len() < 4 {
                continue;
            }
            let mut claims = Claims::default();
            let mut there = BTreeSet::new();
            for who in order.map(|i: usize| &all[i]) {
                let before = claims.claimant(claim()).cloned();
                let displaced = claims.make(claim(), who);
                there.insert(Arc::clone(who));
                let oldest = there.first().unwrap();
                assert_eq!(claims.claimant(claim()), Some(oldest.as_ref()));
                let taken = before.filter(|before| before != oldest.as_ref());
                assert_eq!(displaced.as_deref(), taken.as_ref());
            }
            for who in order.map(|i| &all[i]) {
                let held = claims.holder(claim()) == Some(&who.name);
                let next = claims.give_up(claim(), &who.name);
                there.remove(who);
                assert_eq!(next.is_some(), held && !there.is_empty());
                assert_eq!(
                    claims.claimant(claim()),
                    there.first().map(|oldest| oldest.as_ref())
                );
            }
            assert!(claims.holders.is_empty() && claims.rivals.is_empty());
        }
    }
}
