//! Handing a device's removal to the daemon: what is said over its socket, and the plugin's side of it.
//!
//! The kernel makes whoever removes a device wait (about 17 ms: grace periods of RCU), and those who come at the same
//! time wait one after the other. The daemon removes all that are asked for together as one group, says so as soon as they are gone, and has a
//! thread wait for the rest. It is only ever a help: whoever gets no answer removes the device itself.
//!
//! One line each way: `remove INDEX NAME`, answered with `gone` once the device is no longer there, else with `no` and
//! why.

use std::fmt;
use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::str::FromStr;
use std::time::Duration;

use nix::sys::socket::{
    AddressFamily, SockFlag, SockType, UnixAddr, connect, setsockopt, socket,
    sockopt::{ReceiveTimeout, SendTimeout},
};
use nix::sys::time::TimeVal;

use crate::mac::{is_host_device, is_rate_device};

/// Longest line either side takes, its end included, in bytes.
pub const MAX_LINE: usize = 128;

/// Answer to a request whose device is there no more.
pub const GONE: &str = "gone\n";

/// How long the daemon may take for each step of an exchange. A group of 250 takes it a tenth of that; a daemon that is
/// stopped or stuck keeps a DEL no longer.
const PATIENCE: Duration = Duration::from_secs(1);

/// Most devices asked for before the answers are read: each takes a file descriptor until then.
const MOST: usize = 256;

/// A request: which device to remove.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ask {
    /// Its index, which the kernel gives to no other device later.
    pub index: u32,
    /// Its name, which says that the index is meant in the same network namespace.
    pub name: String,
}

impl fmt::Display for Ask {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "remove {} {}", self.index, self.name)
    }
}

impl FromStr for Ask {
    type Err = String;

    /// Reads a line without its end.
    fn from_str(line: &str) -> Result<Self, Self::Err> {
        let wrong = || format!("{line:?} is not like \"remove 17 sluice0123abcde\"");
        let mut words = line.split(' ');
        let (Some("remove"), Some(index), Some(name), None) =
            (words.next(), words.next(), words.next(), words.next())
        else {
            return Err(wrong());
        };
        // The kernel's indices are positive and signed.
        let index = index
            .parse()
            .ok()
            .filter(|index| (1..=i32::MAX as u32).contains(index));
        let index = index.ok_or_else(wrong)?;
        if !is_host_device(name) && !is_rate_device(name) {
            return Err(format!("{name:?} is no pod's device"));
        }
        Ok(Self {
            index,
            name: name.to_owned(),
        })
    }
}

/// Asks the daemon that listens at `path` to remove these devices, all before its first answer, so that they go together. Whether it
/// says that all are gone; not so when there is no daemon or it does not answer in time, and then it may still remove them later.
pub fn ask(path: &Path, asks: &[Ask]) -> bool {
    let exchange = |gone, asks: &[Ask]| -> io::Result<bool> {
        let streams: Vec<_> = asks.iter().map(|ask| say(path, ask)).collect::<io::Result<_>>()?;
        // One that is refused is no reason not to wait for the others; one that is not answered is.
        streams
            .into_iter()
            .try_fold(gone, |gone, stream| Ok(hear(stream)? == GONE.as_bytes() && gone))
    };
    asks.chunks(MOST).try_fold(true, exchange).unwrap_or(false)
}

fn say(path: &Path, ask: &Ask) -> io::Result<UnixStream> {
    let socket = socket(
        AddressFamily::Unix,
        SockType::Stream,
        SockFlag::SOCK_CLOEXEC,
        None,
    )?;
    let patience = TimeVal::new(i64::try_from(PATIENCE.as_secs()).unwrap_or(i64::MAX), 0);
    // Before connecting: with a daemon that is stopped and has a full backlog, that waits too.
    setsockopt(&socket, SendTimeout, &patience)?;
    setsockopt(&socket, ReceiveTimeout, &patience)?;
    connect(socket.as_raw_fd(), &UnixAddr::new(path)?)?;
    let mut stream = UnixStream::from(socket);
    stream.write_all(format!("{ask}\n").as_bytes())?;
    Ok(stream)
}

fn hear(mut stream: UnixStream) -> io::Result<Vec<u8>> {
    let mut answer = vec![0; MAX_LINE];
    let length = stream.read(&mut answer)?;
    answer.truncate(length);
    Ok(answer)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// C6 C9
    #[test]
    fn only_a_pods_device_can_be_asked_for() {
        let ask = Ask {
            index: 17,
            name: "sluice0123abcde".to_owned(),
        };
        assert_eq!(ask.to_string().parse(), Ok(ask));
        assert!(
            "remove 17 sluicer0123abcd".parse::<Ask>().is_ok(),
            "what limits it is a pod's too"
        );
        for wrong in [
            "",
            "remove",
            "remove 17",
            "remove 17 eth0",
            "remove 17 sluice-vxlan",
            "remove 17 sluicer0123abc",
            "remove 17 sluice0123abcde again",
            "remove  17 sluice0123abcde",
            "remove 0 sluice0123abcde",
            "remove -1 sluice0123abcde",
            "remove 2147483648 sluice0123abcde",
            "remove 99999999999 sluice0123abcde",
            "Remove 17 sluice0123abcde",
        ] {
            assert!(wrong.parse::<Ask>().is_err(), "{wrong}");
        }
    }
}
