//! One call from beginning to end: which verb, with what, and what the runtime gets to see of it.
//!
//! Does no work of its own and writes nowhere: the process around it does.

use std::ffi::OsString;
use std::io::Read;

use serde_json::Value;
use sluice_ipam::Attachment;

use crate::config::Config;
use crate::error::{Code, Failure};
use crate::invocation::Invocation;
use crate::verbs::{add, check, del, gc, status};
use crate::version::Version;

/// What the process must show.
#[derive(Debug, Default)]
pub struct Answer {
    /// Goes to stdout.
    pub stdout: Option<Value>,
    /// Goes to stderr as one line.
    pub log: Option<String>,
    /// Whether the exit code is 0.
    pub success: bool,
    /// What an ADD made, should nobody be there to read its result.
    made: Option<(Attachment, Config)>,
}

impl Answer {
    /// Takes back what the call made, when its answer could not be told: the runtime then knows of no pod.
    pub fn take_back(self) {
        if let Some((attachment, config)) = self.made {
            // Failing leaves what DEL and GC find.
            let _ = del::del(&attachment, &config);
        }
    }
}

/// Carries out the call that `variable` (the environment) and `stdin` describe.
pub fn run(variable: impl Fn(&str) -> Option<OsString>, stdin: impl Read) -> Answer {
    let invocation = match Invocation::read(variable) {
        Ok(Some(invocation)) => invocation,
        Ok(None) => return usage(),
        Err(failure) => return failed(&failure, Version::NEWEST),
    };
    if invocation == Invocation::Version {
        return succeeded(Some(Version::answer()));
    }
    let config = match Config::read(stdin) {
        Ok(config) => config,
        Err((version, failure)) => return failed(&failure, version.unwrap_or(Version::NEWEST)),
    };
    match carry_out(&invocation, &config) {
        Ok(stdout) => {
            let made = match invocation {
                Invocation::Add(target) => Some((target.attachment, config)),
                _ => None,
            };
            Answer {
                made,
                ..succeeded(stdout)
            }
        }
        Err(failure) => failed(&failure, config.version),
    }
}

fn carry_out(invocation: &Invocation, config: &Config) -> Result<Option<Value>, Failure> {
    let since = |verb: &str, least: Version| {
        if config.version < least {
            let message = format!("cniVersion {}: {verb} came with {least}", config.version);
            return Err(Failure::new(Code::Version, message));
        }
        Ok(())
    };
    match invocation {
        Invocation::Add(target) => add::add(target, config).map(Some),
        Invocation::Del(attachment) => del::del(attachment, config).map(|()| None),
        Invocation::Check(target) => {
            since("CHECK", Version::V0_4_0)?;
            check::check(target, config).map(|()| None)
        }
        Invocation::Gc => {
            since("GC", Version::V1_1_0)?;
            gc::gc(config).map(|()| None)
        }
        Invocation::Status => {
            since("STATUS", Version::V1_1_0)?;
            status::status(config).map(|()| None)
        }
        Invocation::Version => Ok(Some(Version::answer())),
    }
}

fn usage() -> Answer {
    let line = concat!(
        "CNI plugin, version ",
        env!("CARGO_PKG_VERSION"),
        ": called by container runtimes with CNI_COMMAND in the environment and a network config on stdin"
    );
    Answer {
        log: Some(line.to_owned()),
        ..Answer::default()
    }
}

fn succeeded(stdout: Option<Value>) -> Answer {
    Answer {
        stdout,
        success: true,
        ..Answer::default()
    }
}

fn failed(failure: &Failure, version: Version) -> Answer {
    // One line whatever the parts hold: a log is read by line.
    let line: String = failure
        .to_string()
        .chars()
        .map(|c| if c.is_control() { ' ' } else { c })
        .collect();
    Answer {
        stdout: Some(failure.to_json(version.as_str())),
        log: Some(format!("{line} (code {})", failure.code as u32)),
        ..Answer::default()
    }
}
