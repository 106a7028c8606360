//! Failures as the runtime sees them: a code of the CNI specification, what happened, and what may help.
//!
//! Every error of this crate ends as a [`Failure`]; nothing else decides a code.

use serde_json::{Value, json};

use crate::netlink::NetlinkError;
use crate::node_file::NodeFileError;

/// Codes of the error object. Below 100 they are the specification's, from 100 on Sluice's own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum Code {
    /// The config's `cniVersion` is not one this plugin speaks, or too old for the verb.
    Version = 1,
    /// The config holds something this plugin does not do.
    Unsupported = 2,
    /// The container's network namespace is gone.
    UnknownContainer = 3,
    /// A `CNI_*` variable is missing or wrong.
    Environment = 4,
    /// Reading or writing a file failed.
    Io = 5,
    /// stdin could not be read or is not JSON.
    Decoding = 6,
    /// The network config is wrong.
    Config = 7,
    /// It may work in a moment.
    TryAgain = 11,
    /// STATUS: no pod could be wired now.
    NotReady = 50,
    /// STATUS: nor may pods already wired be well connected.
    Impaired = 51,
    /// The kernel refused to make or change something.
    Kernel = 100,
    /// No pod CIDR has a free address.
    PoolFull = 101,
    /// CHECK found something other than ADD made.
    Differs = 102,
    /// An address or host port asked for is another pod's, or is reserved.
    Conflict = 103,
    /// GC could not collect everything.
    Incomplete = 104,
}

/// Why a call failed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}{}{details}", if details.is_empty() { "" } else { ": " })]
pub struct Failure {
    /// What kind of failure it is.
    pub code: Code,
    /// What happened, naming the offending thing.
    pub message: String,
    /// More, where there is more; may be empty.
    pub details: String,
}

impl Failure {
    /// A failure without details.
    pub fn new(code: Code, message: impl Into<String>) -> Self {
        Self {
            code,
            message: message.into(),
            details: String::new(),
        }
    }

    /// The same with details.
    #[must_use]
    pub fn with_details(mut self, details: impl Into<String>) -> Self {
        self.details = details.into();
        self
    }

    /// The specification's error object.
    pub fn to_json(&self, version: &str) -> Value {
        json!({ "cniVersion": version, "code": self.code as u32, "msg": self.message, "details": self.details })
    }
}

impl From<sluice_ipam::Error> for Failure {
    fn from(error: sluice_ipam::Error) -> Self {
        use sluice_ipam::Error;
        let code = match &error {
            Error::Io { .. } => Code::Io,
            Error::Busy { .. } | Error::NoPools | Error::Overtaken { .. } => Code::TryAgain,
            Error::Full { free_in: Some(_), .. } => Code::TryAgain,
            Error::Full { free_in: None, .. } => Code::PoolFull,
            Error::AlreadyHeld { .. } => Code::Environment,
            Error::Conflict { .. } | Error::Reserved { .. } => Code::Conflict,
            Error::OutsidePools { .. } | Error::RequestedTwice { .. } => Code::Config,
        };
        let message = match &error {
            Error::AlreadyHeld { .. } => format!("CNI_CONTAINERID and CNI_IFNAME are wired already: {error}"),
            _ => error.to_string(),
        };
        Self::new(code, message)
    }
}

impl From<NodeFileError> for Failure {
    fn from(error: NodeFileError) -> Self {
        let code = match error {
            NodeFileError::Missing { .. } => Code::TryAgain,
            NodeFileError::Read { .. } => Code::Io,
            NodeFileError::Invalid { .. } => Code::Decoding,
        };
        Self::new(code, error.to_string())
    }
}

impl From<NetlinkError> for Failure {
    fn from(error: NetlinkError) -> Self {
        Self::new(Code::Kernel, error.to_string())
    }
}
