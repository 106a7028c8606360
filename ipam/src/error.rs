//! Everything that can go wrong, each saying what it was about and what would help.

use std::fmt;
use std::io;
use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

use ipnetwork::IpNetwork;

use crate::Attachment;

/// Why the store could not do what was asked. Nothing is changed then.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The kernel refused a step.
    #[error("{doing} {}: {source}", path.display())]
    Io {
        /// What was tried.
        doing: &'static str,
        /// On what.
        path: PathBuf,
        /// The kernel's answer.
        source: io::Error,
    },
    /// Other calls kept the store locked for too long.
    #[error("{} is still locked by another call after {} s; try again", path.display(), waited.as_secs())]
    Busy {
        /// The lock.
        path: PathBuf,
        /// How long it was waited for.
        waited: Duration,
    },
    /// The attachment holds addresses already.
    #[error("{attachment} holds {} already; DEL frees it", list(addresses))]
    AlreadyHeld {
        /// Who asked.
        attachment: Attachment,
        /// What it holds.
        addresses: Vec<IpAddr>,
    },
    /// A requested address is held by another.
    #[error("address {address} was asked for by {attachment} but {holder} holds it")]
    Conflict {
        /// The address.
        address: IpAddr,
        /// Who asked.
        attachment: Attachment,
        /// Who has it.
        holder: String,
    },
    /// A requested address is none that pods of this node may hold.
    #[error("address {address} was asked for but is not one for pods of {}", list(pools))]
    OutsidePools {
        /// The address.
        address: IpAddr,
        /// The node's pod CIDRs.
        pools: Vec<IpNetwork>,
    },
    /// A requested address is kept back by the operator.
    #[error(
        "address {address} was asked for by {attachment} but {network} is reserved by ipam.reserved in the daemon's \
         configuration"
    )]
    Reserved {
        /// The address.
        address: IpAddr,
        /// Who asked.
        attachment: Attachment,
        /// What it is reserved as.
        network: IpNetwork,
    },
    /// Two addresses of one family were requested.
    #[error("addresses {first} and {second} were both asked for: one per family at most")]
    RequestedTwice {
        /// The one named first.
        first: IpAddr,
        /// The other of its family.
        second: IpAddr,
    },
    /// No pod CIDR was given.
    #[error("the node has no pod CIDR")]
    NoPools,
    /// No address of a family is free.
    #[error("no free address: {}{}", list(pools), retry(*free_in))]
    Full {
        /// All pools of the family, each with its use.
        pools: Vec<PoolUse>,
        /// When the first resting address may be given again, if one rests.
        free_in: Option<Duration>,
    },
    /// What was claimed is no longer the claimant's: a DEL came in between.
    #[error("{attachment} was deleted while it was being added")]
    Overtaken {
        /// Whose claim it was.
        attachment: Attachment,
    },
}

/// One pool and how full it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PoolUse {
    /// The pod CIDR.
    pub cidr: IpNetwork,
    /// Addresses pods may hold in it.
    pub size: u128,
    /// Of these, held.
    pub held: u128,
    /// Of these, freed but resting.
    pub resting: u128,
}

impl fmt::Display for PoolUse {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            cidr,
            size,
            held,
            resting,
        } = self;
        write!(
            formatter,
            "{cidr} has {size} for pods, {held} held, {resting} resting"
        )
    }
}

fn list<T: fmt::Display>(items: &[T]) -> String {
    items.iter().map(T::to_string).collect::<Vec<_>>().join(", ")
}

fn retry(free_in: Option<Duration>) -> String {
    free_in.map_or_else(String::new, |wait| {
        format!(
            "; try again in {} s",
            wait.as_secs() + u64::from(wait.subsec_nanos() > 0)
        )
    })
}

/// Adds what was tried, and on what, to an answer of the kernel.
pub(crate) fn io_error(doing: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Error {
    let path = path.into();
    move |source| Error::Io { doing, path, source }
}
