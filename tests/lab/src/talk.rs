//! Servers that say who they are and whom they see, and clients that say what became of their asking: one line each.
//!
//! A server answers `NAME ADDRESS`, the address being the client's as the server sees it: at once over TCP and again for
//! every byte that follows, and for every datagram over UDP.

use std::io::{ErrorKind, Read, Write, stdout};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::str::FromStr;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};
use nix::errno::Errno;

/// How long a conversation waits for its first answer; far more than one takes.
const PATIENCE: Duration = Duration::from_secs(1);

/// How often a kept conversation says something.
const PAUSE: Duration = Duration::from_millis(20);

/// Transport protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
}

impl FromStr for Protocol {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "TCP" => Ok(Self::Tcp),
            "UDP" => Ok(Self::Udp),
            other => Err(format!("{other:?} is no protocol; TCP or UDP is wanted")),
        }
    }
}

/// Answers on all `ports`, over both protocols and both families, until killed.
///
/// # Errors
/// A port is taken.
pub fn serve(name: &str, ports: &[u16]) -> Result<()> {
    let mut threads = Vec::new();
    for port in ports {
        let listener =
            TcpListener::bind(("::", *port)).with_context(|| format!("binding TCP port {port}"))?;
        let socket = UdpSocket::bind(("::", *port)).with_context(|| format!("binding UDP port {port}"))?;
        let (tcp, udp) = (name.to_owned(), name.to_owned());
        threads.push(thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let name = tcp.clone();
                // Whoever hangs up ends its own conversation alone.
                thread::spawn(move || _ = converse(stream, &name));
            }
        }));
        threads.push(thread::spawn(move || {
            let mut buffer = vec![0; 1 << 16];
            loop {
                // Errors here are about earlier answers.
                if let Ok((_, sender)) = socket.recv_from(&mut buffer) {
                    let _ = socket.send_to(answer(&udp, sender).as_bytes(), sender);
                }
            }
        }));
    }
    for thread in threads {
        let _ = thread.join();
    }
    Ok(())
}

fn converse(mut stream: TcpStream, name: &str) -> std::io::Result<()> {
    let said = answer(name, stream.peer_addr()?);
    let mut byte = [0];
    loop {
        stream.write_all(said.as_bytes())?;
        if stream.read(&mut byte)? == 0 {
            return Ok(());
        }
    }
}

fn answer(name: &str, client: SocketAddr) -> String {
    format!("{name} {}\n", client.ip().to_canonical())
}

/// Asks `times` times, each with a socket of its own, and prints a line for each: the answer, or `refused`, `silent`,
/// `unreachable`, `reset`. A datagram has `size` bytes. An answer is waited for as long as `patience`: one of up to a second is shorter
/// than TCP takes to send a lost SYN again. A datagram is sent once.
///
/// # Errors
/// The socket fails in another way.
pub fn ask(
    protocol: Protocol,
    asked: SocketAddr,
    times: usize,
    size: usize,
    patience: Duration,
) -> Result<()> {
    for _ in 0..times {
        let answer = match protocol {
            Protocol::Tcp => ask_tcp(asked, patience),
            Protocol::Udp => ask_udp(asked, size, patience),
        };
        match answer {
            Ok(line) => println!("{line}"),
            Err(error) => println!("{}", outcome(error).with_context(|| format!("asking {asked}"))?),
        }
    }
    Ok(())
}

fn outcome(error: std::io::Error) -> std::io::Result<&'static str> {
    match error.kind() {
        ErrorKind::ConnectionRefused => Ok("refused"),
        ErrorKind::TimedOut | ErrorKind::WouldBlock => Ok("silent"),
        ErrorKind::HostUnreachable | ErrorKind::NetworkUnreachable => Ok("unreachable"),
        ErrorKind::ConnectionReset | ErrorKind::ConnectionAborted | ErrorKind::UnexpectedEof => Ok("reset"),
        _ if error.raw_os_error() == Some(Errno::EPERM as i32) => Ok("forbidden"),
        _ => Err(error),
    }
}

fn ask_tcp(asked: SocketAddr, patience: Duration) -> std::io::Result<String> {
    let mut stream = TcpStream::connect_timeout(&asked, patience)?;
    stream.set_read_timeout(Some(patience))?;
    line_of(&mut stream)
}

fn line_of(stream: &mut TcpStream) -> std::io::Result<String> {
    let (mut line, mut byte) = (Vec::new(), [0]);
    loop {
        stream.read_exact(&mut byte)?;
        if byte[0] == b'\n' {
            return Ok(String::from_utf8_lossy(&line).into_owned());
        }
        line.push(byte[0]);
    }
}

fn ask_udp(asked: SocketAddr, size: usize, patience: Duration) -> std::io::Result<String> {
    let socket = connected(asked, patience)?;
    socket.send(&vec![b'x'; size])?;
    received(&socket)
}

fn connected(asked: SocketAddr, patience: Duration) -> std::io::Result<UdpSocket> {
    let any: IpAddr = match asked {
        SocketAddr::V4(_) => [0; 4].into(),
        SocketAddr::V6(_) => [0; 16].into(),
    };
    let socket = UdpSocket::bind((any, 0))?;
    socket.set_read_timeout(Some(patience))?;
    socket.connect(asked)?;
    Ok(socket)
}

fn received(socket: &UdpSocket) -> std::io::Result<String> {
    let mut buffer = [0; 256];
    let length = socket.recv(&mut buffer)?;
    Ok(String::from_utf8_lossy(&buffer[..length]).trim().to_owned())
}

/// Keeps one conversation up and prints every answer, until killed. A TCP connection that ends is told with a last line,
/// `ended`. Over UDP only a socket that the kernel aborts is replaced by another, which a line `aborted` tells.
///
/// # Errors
/// There is no answer in the first place.
pub fn keep(protocol: Protocol, asked: SocketAddr) -> Result<()> {
    let say = |line: &str| -> Result<()> {
        println!("{line}");
        stdout().flush().context("printing")
    };
    match protocol {
        Protocol::Tcp => {
            let mut stream = TcpStream::connect_timeout(&asked, PATIENCE)
                .with_context(|| format!("connecting to {asked}"))?;
            stream.set_read_timeout(Some(5 * PATIENCE))?;
            loop {
                match line_of(&mut stream).and_then(|line| stream.write_all(b"x").map(|()| line)) {
                    Ok(line) => say(&line)?,
                    Err(_) => return say("ended"),
                }
                thread::sleep(PAUSE);
            }
        }
        Protocol::Udp => loop {
            let socket = connected(asked, PATIENCE / 5).with_context(|| format!("connecting to {asked}"))?;
            loop {
                match socket.send(b"x").and_then(|_| received(&socket)) {
                    Ok(line) => say(&line)?,
                    // EDESTADDRREQ: aborted while nobody waited for an answer, so connected nowhere.
                    Err(error)
                        if error.kind() == ErrorKind::ConnectionAborted
                            || error.raw_os_error() == Some(Errno::EDESTADDRREQ as i32) =>
                    {
                        break;
                    }
                    // Silence and refusals are sat through, as a resolver that lives long does.
                    Err(_) => {}
                }
                thread::sleep(PAUSE);
            }
            say("aborted")?;
        },
    }
}
