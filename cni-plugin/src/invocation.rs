//! What the runtime says through the environment: the verb, and which container it is about.
//!
//! Runtimes set all six variables on every verb, empty where they do not apply: empty counts as not set. `CNI_PATH`
//! is of no use here and is not looked at.

use std::ffi::OsString;
use std::path::PathBuf;

use sluice_ipam::{Attachment, InvalidName};

use crate::arguments::Arguments;
use crate::error::{Code, Failure};

/// A call, its variables checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Invocation {
    /// Wire a pod.
    Add(Target),
    /// Unwire it; its namespace may be gone, so no path is taken.
    Del(Attachment),
    /// See whether it is wired as it was.
    Check(Target),
    /// Collect what dead containers left.
    Gc,
    /// Could a pod be wired now?
    Status,
    /// Which versions are spoken?
    Version,
}

/// An interface of a container and where it lives.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Target {
    /// Which.
    pub attachment: Attachment,
    /// Path of its network namespace.
    pub netns: PathBuf,
    /// What the runtime asks for in `CNI_ARGS`.
    pub arguments: Arguments,
}

impl Invocation {
    /// Reads the variables through `variable`. Nothing when `CNI_COMMAND` is not set: a human called.
    ///
    /// # Errors
    /// Code 4, naming every variable that is missing or wrong.
    pub fn read(variable: impl Fn(&str) -> Option<OsString>) -> Result<Option<Self>, Failure> {
        let text = |name: &str| match variable(name).map(OsString::into_string) {
            None => Ok(None),
            Some(Ok(value)) => Ok(Some(value).filter(|value| !value.is_empty())),
            Some(Err(_)) => Err(Failure::new(Code::Environment, format!("{name}: is not UTF-8"))),
        };
        let Some(command) = text("CNI_COMMAND")? else {
            return Ok(None);
        };
        let names: &[&str] = match command.as_str() {
            "ADD" | "CHECK" => &["CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME"],
            "DEL" => &["CNI_CONTAINERID", "CNI_IFNAME"],
            "GC" => return Ok(Some(Self::Gc)),
            "STATUS" => return Ok(Some(Self::Status)),
            "VERSION" => return Ok(Some(Self::Version)),
            _ => {
                let message =
                    format!("CNI_COMMAND {command:?}: is none of ADD, DEL, CHECK, GC, STATUS, VERSION");
                return Err(Failure::new(Code::Environment, message));
            }
        };
        let mut missing = Vec::new();
        for name in names {
            if text(name)?.is_none() {
                missing.push(*name);
            }
        }
        if !missing.is_empty() {
            let message = format!("{}: not set, but {command} needs it", missing.join(", "));
            return Err(Failure::new(Code::Environment, message));
        }
        let required = |name: &str| Ok::<_, Failure>(text(name)?.unwrap_or_default());
        let attachment = Attachment::new(&required("CNI_CONTAINERID")?, &required("CNI_IFNAME")?);
        let attachment = attachment.map_err(|error| {
            let name = match error {
                InvalidName::Ifname(_) => "CNI_IFNAME",
                _ => "CNI_CONTAINERID",
            };
            Failure::new(Code::Environment, format!("{name}: {error}"))
        })?;
        if command == "DEL" {
            return Ok(Some(Self::Del(attachment)));
        }
        let netns = PathBuf::from(required("CNI_NETNS")?);
        let arguments = Arguments::new(text("CNI_ARGS")?.unwrap_or_default());
        let target = Target {
            attachment,
            netns,
            arguments,
        };
        Ok(Some(if command == "ADD" {
            Self::Add(target)
        } else {
            Self::Check(target)
        }))
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::ffi::OsStringExt;

    use super::*;

    fn read(variables: &[(&str, &str)]) -> Result<Option<Invocation>, Failure> {
        Invocation::read(|name| {
            variables
                .iter()
                .find(|(key, _)| *key == name)
                .map(|(_, value)| (*value).into())
        })
    }

    // C15
    #[test]
    fn empty_counts_as_not_set_where_it_does_not_apply() {
        let mut variables =
            ["CONTAINERID", "NETNS", "IFNAME", "ARGS", "PATH"].map(|name| format!("CNI_{name}"));
        variables.sort();
        for (verb, expected) in [
            ("GC", Invocation::Gc),
            ("STATUS", Invocation::Status),
            ("VERSION", Invocation::Version),
        ] {
            let mut all: Vec<_> = variables.iter().map(|name| (name.as_str(), "")).collect();
            all.push(("CNI_COMMAND", verb));
            assert_eq!(read(&all), Ok(Some(expected)));
        }
        assert_eq!(read(&[("CNI_COMMAND", "")]), Ok(None));
        assert_eq!(read(&[]), Ok(None));
    }

    // C12
    #[test]
    fn what_is_no_text_is_refused() {
        let failure = Invocation::read(|name| match name {
            "CNI_COMMAND" => Some("ADD".into()),
            _ => Some(OsString::from_vec(vec![0xff])),
        });
        assert_eq!(failure.unwrap_err().message, "CNI_CONTAINERID: is not UTF-8");
    }
}
