//! Those who ask: takes connections, reads a line from each and hands the requests over in heaps.
//!
//! A caller who says nothing, too much or the wrong thing costs the others no time.

use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, ppoll};
use nix::sys::time::TimeSpec;
use sluice_cni::removals::{Ask, GONE, MAX_LINE};

/// Most devices in a heap, so that none waits long for the others' share.
const MOST: usize = 256;

/// How long a caller may take for its line.
const SILENCE: Duration = Duration::from_secs(1);

/// Most connections that have not said anything yet. More wait in the kernel.
const MOST_SILENT: usize = 512;

/// A pause after the kernel refused a connection, most likely for want of file descriptors.
const BREATHER: Duration = Duration::from_millis(20);

/// A request and who waits for its answer.
pub struct Asked {
    pub ask: Ask,
    stream: UnixStream,
}

impl Asked {
    /// Says that the device is gone, or why it may not be.
    pub fn answer(mut self, outcome: Result<(), &str>) {
        // Who has hung up sees for itself.
        let _ = match outcome {
            Ok(()) => self.stream.write_all(GONE.as_bytes()),
            Err(why) => refuse(&mut self.stream, why),
        };
    }
}

fn refuse(stream: &mut UnixStream, why: &str) -> io::Result<()> {
    let mut line = format!("no {}", why.replace('\n', " ")).into_bytes();
    line.truncate(MAX_LINE - 1);
    line.push(b'\n');
    stream.write_all(&line)
}

/// A connection whose line is not complete.
struct Silent {
    stream: UnixStream,
    said: Vec<u8>,
    since: Instant,
}

/// All who are connected.
pub struct Callers {
    listener: UnixListener,
    silent: Vec<Silent>,
}

impl Callers {
    /// Callers at `listener`, which must not block.
    pub fn new(listener: UnixListener) -> Self {
        let silent = Vec::new();
        Self { listener, silent }
    }

    /// Waits for requests: those that came while the last were carried out, or the first that comes.
    pub fn gather(&mut self) -> Vec<Asked> {
        let mut heap = Vec::new();
        while heap.is_empty() {
            let patience = (!self.silent.is_empty()).then_some(SILENCE);
            let ready = self.wait(patience);
            self.listen(&ready, &mut heap);
        }
        heap
    }

    /// Waits until somebody comes or speaks: for the listener and each silent one, in order, whether it is they.
    fn wait(&self, patience: Option<Duration>) -> Vec<bool> {
        // With too many silent ones nobody more is let in.
        let accepting = self.silent.len() < MOST_SILENT;
        let door = if accepting {
            PollFlags::POLLIN
        } else {
            PollFlags::empty()
        };
        let mut fds = vec![PollFd::new(self.listener.as_fd(), door)];
        let silent = self.silent.iter().map(|one| one.stream.as_fd());
        fds.extend(silent.map(|fd| PollFd::new(fd, PollFlags::POLLIN)));
        match ppoll(&mut fds, patience.map(TimeSpec::from_duration), None) {
            Ok(_) => fds.iter().map(|fd| fd.any().unwrap_or(true)).collect(),
            // Interrupted: nobody came.
            Err(_) => vec![false; fds.len()],
        }
    }

    fn listen(&mut self, ready: &[bool], heap: &mut Vec<Asked>) {
        let mut speaks = ready.iter().skip(1);
        let now = Instant::now();
        for one in std::mem::take(&mut self.silent) {
            let speaks = *speaks.next().unwrap_or(&false);
            self.hear(one, speaks, now, heap);
        }
        if ready.first() != Some(&true) {
            return;
        }
        while self.silent.len() < MOST_SILENT && heap.len() < MOST {
            match self.listener.accept() {
                Ok((stream, _)) if stream.set_nonblocking(true).is_ok() => {
                    let said = Vec::new();
                    let one = Silent {
                        stream,
                        said,
                        since: now,
                    };
                    // Most have spoken by the time they are let in.
                    self.hear(one, true, now, heap);
                }
                Ok(_) => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => return,
                Err(error) => {
                    tracing::warn!(%error, "accepting a request to remove a device; the plugin removes it itself");
                    std::thread::sleep(BREATHER);
                    return;
                }
            }
        }
    }

    /// Reads what `one` says, and keeps it if there is more to come.
    fn hear(&mut self, mut one: Silent, speaks: bool, now: Instant, heap: &mut Vec<Asked>) {
        if speaks {
            match read_line(&mut one) {
                Ok(Some(line)) => {
                    match line.parse() {
                        Ok(ask) => heap.push(Asked {
                            ask,
                            stream: one.stream,
                        }),
                        Err(why) => drop(refuse(&mut one.stream, &why)),
                    }
                    return;
                }
                Ok(None) => {}
                // Has hung up, or said too much.
                Err(_) => return,
            }
        }
        if now.duration_since(one.since) < SILENCE {
            self.silent.push(one);
        }
    }
}

/// The line, once its end is there.
fn read_line(one: &mut Silent) -> io::Result<Option<String>> {
    let mut buffer = [0; MAX_LINE];
    let room = MAX_LINE - one.said.len();
    match one.stream.read(&mut buffer[..room]) {
        // Also when there is no room left.
        Ok(0) => Err(ErrorKind::UnexpectedEof.into()),
        Ok(length) => {
            one.said.extend_from_slice(&buffer[..length]);
            let end = one.said.iter().position(|byte| *byte == b'\n');
            Ok(end.map(|end| String::from_utf8_lossy(&one.said[..end]).into_owned()))
        }
        Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => Ok(None),
        Err(error) => Err(error),
    }
}
