//! This node in etcd: that it is there, at which addresses, and which pod CIDRs are its own.
//!
//! Two leases. A short one says that this host is alive and has the node's name, so that no other takes the name. A long one holds the
//! Node and its pod CIDRs: a daemon that is stopped, or a node that is cut off, loses neither before that lease has run out, and
//! learns when it comes back whether they are still its own. Until it has, it gives no pod an address.
//!
//! A claim is one transaction that wants each claim to be free or ours, the name to be nobody else's, and the Node to be as it was read.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use anyhow::Result;
use etcd_client::{Client, Compare, CompareOp, GetOptions, KeyValue, PutOptions, Txn, TxnOp, TxnOpResponse};
use ipnetwork::IpNetwork;
use serde::{Deserialize, Serialize};
use tokio::time::Instant;

use super::claims::{self, Held};
use super::keys::{Keys, Stored};
use super::leases::{keep_alive, lease};
use super::members::{Members, answer, because};
use super::node_object::{node_object, pod_cidrs};
use super::record::Record;
use crate::address::{Cidrs, Family};
use crate::config::Config;
use crate::network::own_addresses::own_addresses;
use crate::state::objects::ObjectName;

/// How long a host's name is kept for it after it was last heard from, in seconds; the lease of its pod CIDRs may be shorter.
const NAME_LEASE: u32 = 60;

/// How often a claim is tried again when others were quicker.
const TRIES: u32 = 100;

/// What was granted.
#[derive(Debug, Clone)]
pub struct Granted {
    /// This node's pod CIDRs.
    pub cidrs: Vec<IpNetwork>,
    /// The addresses that it is registered with.
    pub addresses: Vec<IpAddr>,
    /// Until when nobody else can be granted them.
    pub until: Instant,
    /// Why they are not those that were asked for.
    pub remarks: Vec<String>,
    leases: Leases,
}

/// What came of a try to register.
pub type Outcome = Result<Granted, String>;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Leases {
    /// Of the Node and its pod CIDRs.
    long: i64,
    /// Of the name.
    short: i64,
}

/// Which host has a name.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Host {
    id: String,
    addresses: Vec<IpAddr>,
}

/// Registers this node.
pub struct Registrar {
    members: Members,
    keys: Keys,
    node: String,
    cluster_cidrs: Cidrs,
    interface: String,
    /// What tells this host from another that has its name.
    id: String,
    /// The pod CIDRs it had last.
    previous: Vec<IpNetwork>,
    /// Those it had before and lost to others.
    lost: Vec<IpNetwork>,
}

/// What etcd has of this node and of all claims, at one revision.
struct Seen {
    node: Option<KeyValue>,
    registration: Option<KeyValue>,
    held: Held,
    /// The lease of each claim of this node's.
    own: Vec<(IpNetwork, i64)>,
    lengths: Vec<(Family, Option<u8>)>,
}

impl Registrar {
    /// One for the node that `config` describes, on the host that `record` is of.
    pub fn new(members: Members, config: &Config, record: &Record) -> Self {
        Self {
            keys: Keys::new(&members.config().prefix),
            members,
            node: config.node_name.clone(),
            cluster_cidrs: config.cluster_cidrs.clone(),
            interface: config.network.interface.clone(),
            id: record.id.clone(),
            previous: record.pod_cidrs.clone(),
            lost: Vec::new(),
        }
    }

    /// Registers, or confirms that nothing of the registration was lost; writes nothing if nothing changed.
    ///
    /// # Errors
    /// etcd cannot be asked. What it answers is no error.
    pub async fn register(&mut self, client: &Client) -> Result<Outcome> {
        let addresses = match self.addresses().await {
            Ok(addresses) => addresses,
            Err(error) => return Ok(Err(format!("{error:#}"))),
        };
        for attempt in 0..TRIES {
            let seen = self.look(client).await?;
            self.note_lost(&seen);
            let (cidrs, remarks) = match self.choose(&seen) {
                Ok(chosen) => chosen,
                Err(refusal) => return Ok(Err(refusal)),
            };
            let leases = self.leases(client, &seen).await?;
            let until = Instant::now() + Duration::from_secs(self.members.config().lease_seconds.into());
            if self.claim(client, &seen, &cidrs, &addresses, leases).await? {
                self.previous.clone_from(&cidrs);
                return Ok(Ok(Granted {
                    cidrs,
                    addresses,
                    until,
                    remarks,
                    leases,
                }));
            }
            // Whoever was in the way is through by then; not everybody tries again at the same time.
            let spread = sluice_cni::stable_hash::stable_hash(&[&self.id, &attempt.to_string()]) % 20;
            tokio::time::sleep(Duration::from_millis(5 + spread)).await;
        }
        Ok(Err(format!(
            "others changed the claims of pod CIDRs {TRIES} times while one was made; it is tried again"
        )))
    }

    /// How often a registration must be renewed.
    pub fn period(&self) -> Duration {
        Duration::from_secs(u64::from(self.name_lease())) / 3
    }

    /// Renews both leases; none if one of them is over.
    ///
    /// # Errors
    /// etcd cannot be asked.
    pub async fn renew(&self, client: &Client, granted: &Granted) -> Result<Option<Instant>> {
        let asked = Instant::now();
        let mut lasts = None;
        for (lease, is_long) in [(granted.leases.short, false), (granted.leases.long, true)] {
            let Some(left) = keep_alive(client, lease).await? else {
                return Ok(None);
            };
            if is_long {
                lasts = Some(asked + left);
            }
        }
        Ok(lasts)
    }

    /// Whether this node has other addresses than it is registered with.
    pub async fn has_moved(&self, granted: &Granted) -> bool {
        self.addresses()
            .await
            .is_ok_and(|addresses| addresses != granted.addresses)
    }

    async fn addresses(&self) -> Result<Vec<IpAddr>> {
        let given = &self.members.config().node_addresses;
        if !given.is_empty() {
            return Ok(given.clone());
        }
        own_addresses(&self.interface, place_of(&self.members.current()).await).await
    }

    fn node_key(&self) -> String {
        self.keys
            .object(Stored::Node, &ObjectName::new("", self.node.as_str()))
    }

    async fn look(&self, client: &Client) -> Result<Seen> {
        let claims = self.keys.claims();
        let families = self.cluster_cidrs.iter().map(|cidr| Family::of(cidr.ip()));
        let families: Vec<Family> = families.collect();
        let mut asked = vec![
            TxnOp::get(self.node_key(), None),
            TxnOp::get(self.keys.registration(&self.node), None),
            TxnOp::get(claims, Some(GetOptions::new().with_prefix())),
        ];
        asked.extend(
            families
                .iter()
                .map(|family| TxnOp::get(self.keys.claim_length(*family), None)),
        );
        let doing = format!("reading the claims below {}", self.keys.all());
        let response = answer(&doing, client.kv_client().txn(Txn::new().and_then(asked))).await?;
        let mut answers = response.op_responses().into_iter().map(|answer| match answer {
            TxnOpResponse::Get(mut found) => found.take_kvs(),
            _ => Vec::new(),
        });
        let mut next = || answers.next().unwrap_or_default();
        let (node, registration) = (next().into_iter().next(), next().into_iter().next());
        let (mut held, mut own) = (Held::new(), Vec::new());
        for claim in next() {
            let Some(cidr) = self.keys.claim_of(claim.key()) else {
                continue;
            };
            let holder = String::from_utf8_lossy(claim.value()).into_owned();
            if holder == self.node {
                own.push((cidr, claim.lease()));
            }
            held.insert(cidr, holder);
        }
        let mut length = |_| next().first()?.value_str().ok()?.parse().ok();
        Ok(Seen {
            node,
            registration,
            held,
            own,
            lengths: families
                .into_iter()
                .map(|family| (family, length(family)))
                .collect(),
        })
    }

    /// The pod CIDRs to claim, and why they are not those that were asked for.
    fn choose(&self, seen: &Seen) -> Result<(Vec<IpNetwork>, Vec<String>), String> {
        if let Some(other) = self.namesake(seen) {
            let at: Vec<_> = other.addresses.iter().map(ToString::to_string).collect();
            return Err(format!(
                "another host is node {}, at {}, and was heard from less than {} s ago; give this one another nodeName",
                self.node,
                at.join(", "),
                self.name_lease()
            ));
        }
        let asked_for = seen
            .node
            .as_ref()
            .map(|node| pod_cidrs(node.value()))
            .unwrap_or_default();
        let has = seen.own.iter().map(|(cidr, _)| *cidr);
        let had: Vec<_> = has.chain(self.previous.iter().copied()).collect();
        let (mut cidrs, mut remarks) = (Vec::new(), Vec::new());
        for cidr in &self.lost {
            if let Some(holder) = seen.held.get(cidr).filter(|holder| **holder != self.node) {
                remarks.push(format!(
                    "node {holder} was given {cidr} after the lease of this node had run out; pods here that have addresses of it must be \
                     restarted"
                ));
            }
        }
        for pool in self.cluster_cidrs.iter() {
            let family = Family::of(pool.ip());
            let length = self.members.config().mask_size(family);
            let common = seen
                .lengths
                .iter()
                .find(|(of, _)| *of == family)
                .and_then(|(_, length)| *length);
            if let Some(common) = common.filter(|common| *common != length) {
                let version = if family == Family::V4 { "4" } else { "6" };
                return Err(format!(
                    "the pod CIDRs of this cluster in {pool} are of length {common}, and datastore.etcd.nodeCIDRMaskSizeIPv{version} is \
                     {length} here; it must be the same on all nodes"
                ));
            }
            let choice = claims::choose(pool, length, &self.node, &asked_for, &had, &seen.held)?;
            remarks.extend(choice.remark);
            cidrs.push(choice.cidr);
        }
        Ok((cidrs, remarks))
    }

    fn note_lost(&mut self, seen: &Seen) {
        for cidr in &self.previous {
            let is_lost = seen.held.get(cidr).is_some_and(|holder| *holder != self.node);
            if is_lost && !self.lost.contains(cidr) {
                self.lost.push(*cidr);
            }
        }
    }

    fn namesake(&self, seen: &Seen) -> Option<Host> {
        let registration = seen.registration.as_ref()?;
        let host: Host = serde_json::from_slice(registration.value()).ok()?;
        (host.id != self.id).then_some(host)
    }

    fn name_lease(&self) -> u32 {
        NAME_LEASE.min(self.members.config().lease_seconds)
    }

    /// The leases that hold what is there already, as long as they are good; new ones else.
    async fn leases(&self, client: &Client, seen: &Seen) -> Result<Leases> {
        let lease_of = |key_value: &Option<KeyValue>| key_value.as_ref().map_or(0, KeyValue::lease);
        let long = lease(client, lease_of(&seen.node), self.members.config().lease_seconds);
        let short = lease(client, lease_of(&seen.registration), self.name_lease());
        Ok(Leases {
            long: long.await?,
            short: short.await?,
        })
    }

    /// Writes what is not there yet; says whether all was as it was seen.
    async fn claim(
        &self,
        client: &Client,
        seen: &Seen,
        cidrs: &[IpNetwork],
        addresses: &[IpAddr],
        leases: Leases,
    ) -> Result<bool> {
        let (node_key, name_key) = (self.node_key(), self.keys.registration(&self.node));
        let host = serde_json::to_vec(&Host {
            id: self.id.clone(),
            addresses: addresses.to_vec(),
        })?;
        let existing = seen
            .node
            .as_ref()
            .and_then(|node| serde_json::from_slice(node.value()).ok());
        let object = serde_json::to_vec(&node_object(existing, &self.node, cidrs, addresses))?;
        let is_there = |there: &Option<KeyValue>, value: &[u8], lease| {
            there
                .as_ref()
                .is_some_and(|there| there.value() == value && there.lease() == lease)
        };
        let unchanged = is_there(&seen.node, &object, leases.long)
            && is_there(&seen.registration, &host, leases.short)
            && seen.own.len() == cidrs.len()
            && cidrs.iter().all(|cidr| seen.own.contains(&(*cidr, leases.long)));
        if unchanged {
            return Ok(true);
        }

        let as_seen = |key: &str, there: &Option<KeyValue>| {
            let revision = there.as_ref().map_or(0, KeyValue::mod_revision);
            Compare::mod_revision(key, CompareOp::Equal, revision)
        };
        let under = |lease| Some(PutOptions::new().with_lease(lease));
        let mut when = vec![
            as_seen(&node_key, &seen.node),
            as_seen(&name_key, &seen.registration),
        ];
        let mut then = vec![
            TxnOp::put(node_key, object, under(leases.long)),
            TxnOp::put(name_key, host, under(leases.short)),
        ];
        for (family, known) in &seen.lengths {
            let (key, length) = (
                self.keys.claim_length(*family),
                self.members.config().mask_size(*family),
            );
            match known {
                Some(_) => when.push(Compare::value(key, CompareOp::Equal, length.to_string())),
                None => {
                    when.push(Compare::create_revision(key.as_str(), CompareOp::Equal, 0));
                    then.push(TxnOp::put(key, length.to_string(), None));
                }
            }
        }
        for cidr in cidrs {
            let key = self.keys.claim(cidr);
            when.push(match seen.held.contains_key(cidr) {
                true => Compare::value(key.as_str(), CompareOp::Equal, self.node.as_str()),
                false => Compare::create_revision(key.as_str(), CompareOp::Equal, 0),
            });
            then.push(TxnOp::put(key, self.node.as_str(), under(leases.long)));
        }
        let given_up = seen.own.iter().filter(|(cidr, _)| !cidrs.contains(cidr));
        then.extend(given_up.map(|(cidr, _)| TxnOp::delete(self.keys.claim(cidr), None)));
        let doing = format!("claiming pod CIDRs below {}", self.keys.all());
        let asked = async {
            match client.kv_client().txn(Txn::new().when(when).and_then(then)).await {
                Ok(response) => Ok(response.succeeded()),
                // One of them ran out meanwhile.
                Err(error) if because(&error).contains("lease not found") => Ok(false),
                Err(error) => Err(error),
            }
        };
        answer(&doing, asked).await
    }
}

/// Where a member is, for the kernel.
async fn place_of(member: &str) -> Option<SocketAddr> {
    let uri: http::Uri = member.parse().ok()?;
    let host = uri.host()?.trim_matches(['[', ']']).to_owned();
    let found = tokio::net::lookup_host((host, uri.port_u16().unwrap_or(2379))).await;
    found.ok()?.next()
}
