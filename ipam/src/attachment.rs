//! What an allocation belongs to: one interface of one container.
//!
//! Names come from the runtime and become file names here, so nothing else in this workspace builds an [`Attachment`]
//! from text that was not checked.

use std::fmt;

/// Longest container id accepted: with `@` and the longest interface name it still is a file name (`NAME_MAX`, 255),
/// and with `/` it still fits the kernel's interface alias.
const MAX_CONTAINER_ID: usize = 239;

/// `IFNAMSIZ` less its terminating zero.
const MAX_IFNAME: usize = 15;

/// One interface of one container, both names checked against the CNI specification.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Attachment {
    container_id: String,
    ifname: String,
}

/// Why a container id or an interface name is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum InvalidName {
    /// The container id.
    #[error(
        "container id {0:?}: must begin with a letter or digit and hold only letters, digits, '_', '.', '-'"
    )]
    ContainerId(String),
    /// The container id, for its length.
    #[error("container id of {0} bytes: at most {MAX_CONTAINER_ID} are taken")]
    ContainerIdTooLong(usize),
    /// The interface name.
    #[error(
        "interface name {0:?}: must be 1 to {MAX_IFNAME} bytes, not '.' or '..', without '/', ':', blanks or \
         control characters"
    )]
    Ifname(String),
}

impl Attachment {
    /// Checks both names.
    ///
    /// # Errors
    /// [`InvalidName`], naming the one at fault.
    pub fn new(container_id: &str, ifname: &str) -> Result<Self, InvalidName> {
        if container_id.len() > MAX_CONTAINER_ID {
            return Err(InvalidName::ContainerIdTooLong(container_id.len()));
        }
        let mut bytes = container_id.bytes();
        let first = bytes.next().is_some_and(|byte| byte.is_ascii_alphanumeric());
        if !first || !bytes.all(|byte| byte.is_ascii_alphanumeric() || b"_.-".contains(&byte)) {
            return Err(InvalidName::ContainerId(container_id.to_owned()));
        }
        let refused =
            |letter: char| letter == '/' || letter == ':' || letter.is_whitespace() || letter.is_control();
        if ifname.is_empty()
            || ifname.len() > MAX_IFNAME
            || ifname == "."
            || ifname == ".."
            || ifname.contains(refused)
        {
            return Err(InvalidName::Ifname(ifname.to_owned()));
        }
        Ok(Self {
            container_id: container_id.to_owned(),
            ifname: ifname.to_owned(),
        })
    }

    /// The container's id, as the runtime names it.
    pub fn container_id(&self) -> &str {
        &self.container_id
    }

    /// The interface's name inside the container.
    pub fn ifname(&self) -> &str {
        &self.ifname
    }

    /// Its name in `owners/`. A container id holds no `@`, so the first one divides the two.
    pub fn file_name(&self) -> String {
        format!("{}@{}", self.container_id, self.ifname)
    }

    /// The reverse of [`Self::file_name`]; nothing for a name this crate would not have written.
    pub fn from_file_name(name: &str) -> Option<Self> {
        let (container_id, ifname) = name.split_once('@')?;
        Self::new(container_id, ifname).ok()
    }
}

impl fmt::Display for Attachment {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}/{}", self.container_id, self.ifname)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    // C12
    #[test]
    fn names_that_could_leave_the_directory_are_refused() {
        for id in ["", "..", ".", "-a", "_a", "a/b", "a b", "a@b", "a\n", "é", "a\0"] {
            assert!(Attachment::new(id, "eth0").is_err(), "{id:?}");
        }
        for ifname in [
            "",
            ".",
            "..",
            "a/b",
            "a:b",
            "a b",
            "a\tb",
            "a\u{7f}",
            "sixteen-bytes-xx",
        ] {
            assert!(Attachment::new("a", ifname).is_err(), "{ifname:?}");
        }
        assert!(Attachment::new(&"a".repeat(240), "eth0").is_err());
    }

    // C12
    #[test]
    fn the_longest_names_taken_still_are_a_file_name_and_come_back() {
        for (id, ifname) in [
            ("a", "eth0"),
            ("a.b_c-9", "x@y"),
            (&*"a".repeat(239), "fifteen-bytes-x"),
        ] {
            let attachment = Attachment::new(id, ifname).unwrap();
            assert!(attachment.file_name().len() <= 255);
            assert_eq!(
                Attachment::from_file_name(&attachment.file_name()),
                Some(attachment)
            );
        }
    }
}
