//! What is done over a path, one connection at a time.

use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use nix::sys::socket::{setsockopt, sockopt};

use crate::hosts::Host;

/// Where servers listen.
pub const PORT: u16 = 7000;
const CHUNK: usize = 128 * 1024;
/// How long an answer may take before the path counts as broken.
const PATIENCE: Duration = Duration::from_secs(5);

/// What went over a path.
#[derive(Debug, Clone, Default)]
pub struct Rate {
    /// In the load's [unit](Load::unit).
    pub value: f64,
    /// What each took, in no order; none of a stream.
    pub took: Vec<Duration>,
}

/// A kind of load.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Load {
    /// A byte there and back on an open connection.
    Requests,
    /// A connection, a byte there and back, and its end.
    Connections,
    /// A datagram there and back.
    Datagrams,
    /// As much as one connection carries.
    Stream,
}

impl Load {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Requests, Self::Connections, Self::Datagrams, Self::Stream];

    /// What it is called in tables.
    pub fn name(self) -> &'static str {
        match self {
            Self::Requests => "TCP requests",
            Self::Connections => "TCP connect, request, close",
            Self::Datagrams => "UDP requests",
            Self::Stream => "TCP stream",
        }
    }

    /// What is counted.
    pub fn unit(self) -> &'static str {
        if self == Self::Stream { "Gbit/s" } else { "1/s" }
    }

    /// A value and its ratio to another, for tables.
    pub fn shown(self, value: f64, ratio: f64) -> String {
        let digits = usize::from(self == Self::Stream);
        format!("{value:.digits$} ({ratio:.2})")
    }

    /// How much goes from `client` to `to` in about `length`, where that leads to [`PORT`] of `server` at `listens`.
    pub fn measure(
        self,
        client: &Host,
        server: &Host,
        listens: IpAddr,
        to: SocketAddr,
        length: Duration,
    ) -> Result<Rate> {
        let listens = SocketAddr::new(listens, PORT);
        let over = Arc::new(AtomicBool::new(false));
        let (ready, listening) = std::sync::mpsc::channel();
        let (until, tell) = (Arc::clone(&over), ready);
        let serving = server.start(move || {
            self.serve(listens, &until, move || {
                // Somebody waits for it, or the bench has ended.
                let _ = tell.send(());
            })
        })?;
        // Without a listener its result says why.
        let _ = listening.recv();
        let measured = client.run(move || self.ask(to, length));
        over.store(true, Ordering::Relaxed);
        // Whoever waits for a connection looks up when there is one.
        if self == Self::Connections || measured.is_err() {
            let _ = client.run(move || Ok(TcpStream::connect_timeout(&to, PATIENCE).is_ok()));
        }
        serving.recv().context("the server's thread ended")??;
        measured.with_context(|| format!("{} to {to}", self.name()))
    }

    fn serve(self, at: SocketAddr, over: &AtomicBool, ready: impl FnOnce()) -> Result<()> {
        let mut byte = [0];
        if self == Self::Datagrams {
            let socket = UdpSocket::bind(at)?;
            socket.set_read_timeout(Some(Duration::from_millis(100)))?;
            ready();
            while !over.load(Ordering::Relaxed) {
                if let Ok((_, from)) = socket.recv_from(&mut byte) {
                    socket.send_to(&byte, from)?;
                }
            }
            return Ok(());
        }
        let listener = TcpListener::bind(at)?;
        ready();
        loop {
            let (mut stream, _) = listener.accept()?;
            stream.set_nodelay(true)?;
            match self {
                Self::Stream => {
                    let mut chunk = vec![0; CHUNK];
                    let mut received = 0_u64;
                    loop {
                        match stream.read(&mut chunk)? {
                            0 => break,
                            count => received += count as u64,
                        }
                    }
                    return stream.write_all(&received.to_ne_bytes()).map_err(Into::into);
                }
                Self::Requests => {
                    while stream.read(&mut byte)? != 0 {
                        stream.write_all(&byte)?;
                    }
                    return Ok(());
                }
                Self::Connections | Self::Datagrams => match stream.read(&mut byte) {
                    Ok(1) => stream.write_all(&byte)?,
                    _ if over.load(Ordering::Relaxed) => return Ok(()),
                    Ok(_) => {}
                    Err(error) if error.kind() == ErrorKind::ConnectionReset => {}
                    Err(error) => return Err(error.into()),
                },
            }
        }
    }

    fn ask(self, to: SocketAddr, length: Duration) -> Result<Rate> {
        let mut byte = [7];
        match self {
            Self::Requests => {
                let mut stream = connect(to)?;
                again(length, || {
                    stream.write_all(&byte)?;
                    Ok(stream.read_exact(&mut byte)?)
                })
            }
            Self::Connections => again(length, || {
                let mut stream = connect(to)?;
                stream.write_all(&byte)?;
                stream.read_exact(&mut byte)?;
                // Ends with a reset, so that no port is held by its past (TIME_WAIT).
                let now = nix::libc::linger {
                    l_onoff: 1,
                    l_linger: 0,
                };
                Ok(setsockopt(&stream, sockopt::Linger, &now)?)
            }),
            Self::Datagrams => {
                let socket = UdpSocket::bind("0.0.0.0:0")?;
                socket.set_read_timeout(Some(PATIENCE))?;
                socket.connect(to)?;
                again(length, || {
                    socket.send(&byte)?;
                    socket.recv(&mut byte)?;
                    Ok(())
                })
            }
            Self::Stream => {
                let began = Instant::now();
                let mut stream = connect(to)?;
                let chunk = vec![0; CHUNK];
                while began.elapsed() < length {
                    stream.write_all(&chunk)?;
                }
                stream.shutdown(std::net::Shutdown::Write)?;
                let mut received = [0; 8];
                stream.read_exact(&mut received)?;
                let bits = u64::from_ne_bytes(received) as f64 * 8.0;
                Ok(Rate {
                    value: bits / began.elapsed().as_secs_f64() / 1e9,
                    took: Vec::new(),
                })
            }
        }
    }
}

/// Does it again and again for `length`.
fn again(length: Duration, mut once: impl FnMut() -> Result<()>) -> Result<Rate> {
    let mut took = Vec::new();
    let began = Instant::now();
    let mut last = began;
    while last - began < length {
        once()?;
        let now = Instant::now();
        took.push(now - last);
        last = now;
    }
    Ok(Rate {
        value: took.len() as f64 / (last - began).as_secs_f64(),
        took,
    })
}

fn connect(to: SocketAddr) -> Result<TcpStream> {
    let stream = TcpStream::connect_timeout(&to, PATIENCE)?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    Ok(stream)
}
