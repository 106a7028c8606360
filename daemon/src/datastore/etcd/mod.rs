//! An etcd of one's own as a datastore: Kubernetes' objects in JSON below a prefix, and this node registered there.
//!
//! One member is asked at a time. A session with it first registers this node, then tells what changed, and renews the registration
//! meanwhile; when it ends, for whatever reason, the next member is asked, and the watch goes on where it was. What the daemon knows does
//! not shrink while no member answers.
//!
//! Endpoints come from Pods where a Service has no slices of its own: there is no endpoint controller.

use std::time::Duration;

use anyhow::Result;
use etcd_client::Client;
use jiff::{SignedDuration, Timestamp};
use sluice_cni::stable_hash::stable_hash;
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, sleep, sleep_until, timeout_at};

use self::following::{Following, KINDS};
use self::keys::Keys;
pub use self::keys::Stored;
pub use self::members::Members;
use self::record::Record;
use self::registration::{Granted, Outcome, Registrar};
use super::keeper::{Heard, Keeper, What};
use super::{Event, GRACE};
use crate::config::Config;
use crate::last_known::{self, Saved};
use crate::state::objects::{Kind, Node, Object, ObjectName};

mod claims;
mod following;
mod keys;
mod leases;
mod members;
mod node_object;
pub mod objects;
mod pages;
pub mod record;
pub mod registration;

/// How soon a refused registration is tried again.
const AGAIN: Duration = Duration::from_secs(5);

/// How long all members are left alone after none of them answered, at first and at most.
const RESPITE: [Duration; 2] = [Duration::from_millis(500), Duration::from_secs(15)];

/// What the problems with the registration are told of.
const REGISTRATION: &str = "the registration of this node in etcd";

/// What sessions tell.
enum Told {
    /// Of objects.
    Heard(Heard),
    /// Everything was told; from here on changes are.
    Follows,
    /// What came of registering this node.
    Registered(Outcome),
    /// The lease of this node's pod CIDRs lasts until then.
    Renewed(Instant),
    /// The session ended.
    Ended,
}

/// Registers this node, follows what is in etcd, and sends it into `events`, until the receiver is gone.
///
/// # Errors
/// This host cannot keep who it is.
pub async fn run(members: Members, config: Config, events: mpsc::Sender<Event>) -> Result<()> {
    let record = Record::open()?;
    let registrar = Registrar::new(members.clone(), &config, &record);
    let (teller, heard) = mpsc::channel(64);
    let (own_sender, own) = watch::channel(None);
    let sessions = Sessions {
        members: members.clone(),
        registrar,
        following: Following::new(Keys::new(&members.config().prefix)),
        own,
        spread: Duration::from_millis(stable_hash(&[&config.node_name]) % 500),
        teller,
    };
    let telling = Telling {
        keeper: Keeper::new("etcd", &KINDS),
        members,
        node: config.node_name,
        lease: Duration::from_secs(config.datastore.etcd.lease_seconds.into()),
        record,
        held_until: None,
        awaited: None,
        own: own_sender,
        events,
    };
    tokio::select! {
        () = telling.run(heard) => Ok(()),
        () = sessions.run() => Ok(()),
    }
}

/// One session after the other.
struct Sessions {
    members: Members,
    registrar: Registrar,
    following: Following,
    /// This node's Node as it was heard of last.
    own: watch::Receiver<Option<Node>>,
    /// What this node waits longer than others, so that not all come back at the same time.
    spread: Duration,
    teller: mpsc::Sender<Told>,
}

impl Sessions {
    async fn run(mut self) {
        let mut respite = RESPITE[0];
        loop {
            let ended = match self.members.connect().await {
                Ok(client) => self.session(&client).await,
                Err(error) => Err(error),
            };
            let Err(error) = ended else { return };
            if self.members.answering().is_some() {
                respite = RESPITE[0];
            }
            let member = self.members.current();
            tracing::debug!(member, "{error:#}");
            let all_failed = self.members.give_up(format!("{error:#}"));
            if self.teller.send(Told::Ended).await.is_err() {
                return;
            }
            if all_failed {
                sleep(respite + self.spread).await;
                respite = (respite * 2).min(RESPITE[1]);
            }
        }
    }

    /// Ends without an error when nobody listens any more.
    async fn session(&mut self, client: &Client) -> Result<()> {
        // First, so that a first list is not acted on before it is known whether the pod CIDRs in it are still this node's.
        let registered = self.registrar.register(client).await?;
        let Self {
            members,
            registrar,
            following,
            own,
            teller,
            ..
        } = self;
        if teller.send(Told::Registered(registered.clone())).await.is_err() {
            return Ok(());
        }
        tokio::select! {
            ended = following.follow(client, members, teller) => ended,
            ended = stay_registered(registrar, client, registered, own, teller) => ended,
        }
    }
}

/// Renews the registration, and makes it anew when it is lost, when this node's addresses change or when its Node is changed by others.
async fn stay_registered(
    registrar: &mut Registrar,
    client: &Client,
    mut registered: Outcome,
    own: &mut watch::Receiver<Option<Node>>,
    teller: &mpsc::Sender<Told>,
) -> Result<()> {
    // What was heard before the registration was made says nothing of it.
    own.mark_unchanged();
    let mut due = Instant::now() + registrar.period();
    loop {
        let changed = timeout_at(due, own.changed()).await.is_ok();
        if !changed {
            due = Instant::now()
                + if registered.is_ok() {
                    registrar.period()
                } else {
                    AGAIN
                };
        }
        let seen = own.borrow_and_update().clone();
        if let Ok(granted) = &registered {
            let stands = if changed {
                seen.as_ref().is_some_and(|node| is_as_granted(node, granted))
            } else {
                match registrar.renew(client, granted).await? {
                    Some(until) => {
                        if teller.send(Told::Renewed(until)).await.is_err() {
                            return Ok(());
                        }
                        !registrar.has_moved(granted).await
                    }
                    None => false,
                }
            };
            if stands {
                continue;
            }
        }
        registered = registrar.register(client).await?;
        if teller.send(Told::Registered(registered.clone())).await.is_err() {
            return Ok(());
        }
    }
}

fn is_as_granted(node: &Node, granted: &Granted) -> bool {
    node.pod_cidrs == granted.cidrs && node.addresses == granted.addresses
}

/// Makes the datastore's events of what sessions tell.
struct Telling {
    keeper: Keeper,
    members: Members,
    node: String,
    /// How long the lease of the pod CIDRs is.
    lease: Duration,
    record: Record,
    /// Until when this node's pod CIDRs are nobody else's; none while that is not known.
    held_until: Option<Instant>,
    /// What was last told to be waited for.
    awaited: Option<String>,
    own: watch::Sender<Option<Node>>,
    events: mpsc::Sender<Event>,
}

impl Telling {
    async fn run(mut self, mut heard: mpsc::Receiver<Told>) {
        let mut saved = last_known::read_or_warn();
        let grace = sleep(GRACE);
        tokio::pin!(grace);
        loop {
            let out = tokio::select! {
                told = heard.recv() => {
                    let Some(told) = told else { return };
                    self.take(told)
                }
                () = &mut grace, if saved.is_some() && !self.keeper.loaded() => {
                    saved.take().map(|saved| self.fall_back(saved)).unwrap_or_default()
                }
                () = until(self.held_until) => {
                    self.held_until = None;
                    self.wait_for(Some(format!(
                        "etcd to confirm this node's pod CIDRs: it was not heard from for {} s, and they may be another's",
                        self.lease.as_secs()
                    )))
                }
            };
            if self.keeper.loaded() {
                saved = None;
            }
            for event in out {
                self.note_own(&event);
                if self.events.send(event).await.is_err() {
                    return;
                }
            }
        }
    }

    fn take(&mut self, told: Told) -> Vec<Event> {
        let failures = self.members.failures();
        match told {
            Told::Heard(heard) => self.keeper.fold(heard, &failures),
            Told::Follows => self.keeper.recovered([Kind::Node].into_iter(), &failures),
            Told::Ended => self.keeper.fold(Heard(Kind::Node, What::Failed(None)), &failures),
            Told::Renewed(until) => {
                self.held_until = Some(until);
                self.remember(until);
                self.wait_for(None)
            }
            Told::Registered(Ok(granted)) => {
                let remarks = (!granted.remarks.is_empty()).then(|| granted.remarks.join("; "));
                if self.record.pod_cidrs != granted.cidrs {
                    self.record.held_until = Timestamp::UNIX_EPOCH;
                    self.record.pod_cidrs.clone_from(&granted.cidrs);
                    let cidrs: Vec<_> = granted.cidrs.iter().map(ToString::to_string).collect();
                    tracing::info!(podCIDRs = cidrs.join(","), "this node is registered in etcd");
                }
                self.held_until = Some(granted.until);
                self.remember(granted.until);
                let mut events = self.keeper.note(REGISTRATION, remarks, &failures);
                events.extend(self.wait_for(None));
                events
            }
            Told::Registered(Err(refusal)) => {
                let mut events = self.keeper.note(REGISTRATION, Some(refusal.clone()), &failures);
                events.extend(self.wait_for(Some(format!("{REGISTRATION}: {refusal}"))));
                events
            }
        }
    }

    /// Serves what was saved; this node's pod CIDRs only as long as nobody else can have them.
    fn fall_back(&mut self, saved: Saved) -> Vec<Event> {
        let own = saved.objects.iter().find_map(|object| match object {
            Object::Node(node) if node.name == self.node => Some(node.pod_cidrs.clone()),
            _ => None,
        });
        let holds = own.is_some_and(|cidrs| self.record.holds(&cidrs, Timestamp::now()));
        let mut events = Vec::new();
        if self.held_until.is_none() && !holds {
            events.extend(
                self.wait_for(Some(
                    "etcd to confirm this node's pod CIDRs: their lease may have run out while it was down"
                        .to_owned(),
                )),
            );
        }
        events.extend(self.keeper.fall_back(saved));
        events
    }

    /// Keeps for a start without etcd how long this node's pod CIDRs are its own; not more often than it makes a difference.
    fn remember(&mut self, until: Instant) {
        let left = until.saturating_duration_since(Instant::now());
        let Ok(left) = SignedDuration::try_from(left) else {
            return;
        };
        let until = Timestamp::now() + left;
        let known = self.record.held_until.duration_since(Timestamp::now());
        if known.unsigned_abs() > self.lease * 3 / 4 && known.is_positive() {
            return;
        }
        self.record.held_until = until;
        if let Err(error) = self.record.save() {
            tracing::warn!("{error:#}");
        }
    }

    fn wait_for(&mut self, what: Option<String>) -> Vec<Event> {
        if what == self.awaited {
            return Vec::new();
        }
        self.awaited.clone_from(&what);
        vec![Event::Await(what)]
    }

    fn note_own(&self, event: &Event) {
        let seen = match event {
            Event::Upsert(Object::Node(node)) if node.name == self.node => Some(node.clone()),
            Event::Remove(Kind::Node, name) if *name == ObjectName::new("", self.node.as_str()) => None,
            _ => return,
        };
        self.own.send_replace(seen);
    }
}

async fn until(moment: Option<Instant>) {
    match moment {
        Some(moment) => sleep_until(moment).await,
        None => std::future::pending().await,
    }
}
