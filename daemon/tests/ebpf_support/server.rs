//! Servers that say who they are, and clients that ask.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use nix::sys::socket::{Shutdown, shutdown};

use super::ip;

/// How long an answer may take before it is missing.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// A server that tells each client its own address; it ends with this.
pub struct Server {
    /// Where it listens.
    pub address: SocketAddr,
    socket: OwnedFd,
    over: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    fn new(
        address: SocketAddr,
        socket: OwnedFd,
        serve: impl FnMut() -> io::Result<()> + Send + 'static,
    ) -> Self {
        let over = Arc::new(AtomicBool::new(false));
        let mut serve = serve;
        let ending = Arc::clone(&over);
        let thread = std::thread::spawn(move || {
            while !ending.load(Ordering::Acquire) {
                // A client that has gone already is none of the server's business.
                let _ = serve();
            }
        });
        Self {
            address,
            socket,
            over,
            thread: Some(thread),
        }
    }

    /// Sends its address to whoever connects.
    pub fn tcp(address: &str) -> Self {
        let listener = TcpListener::bind(address).unwrap();
        let address = listener.local_addr().unwrap();
        let socket = listener.try_clone().unwrap().into();
        Self::new(address, socket, move || {
            listener.accept()?.0.write_all(address.to_string().as_bytes())
        })
    }

    /// Answers each datagram with its address.
    pub fn udp(address: &str) -> Self {
        let server = UdpSocket::bind(address).unwrap();
        let address = server.local_addr().unwrap();
        let socket = server.try_clone().unwrap().into();
        Self::new(address, socket, move || {
            let (_, client) = server.recv_from(&mut [0; 16])?;
            server.send_to(address.to_string().as_bytes(), client).map(drop)
        })
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Release);
        // Wakes whoever waits on the socket; ENOTCONN is all a UDP socket has to say to it.
        let _ = shutdown(self.socket.as_raw_fd(), Shutdown::Both);
        let _ = self.thread.take().map(JoinHandle::join);
    }
}

/// Several servers, and where they listen.
pub fn servers<const N: usize>(
    start: fn(&str) -> Server,
    addresses: [&str; N],
) -> (Vec<Server>, [SocketAddr; N]) {
    let servers = addresses.map(start);
    let addresses = std::array::from_fn(|index| servers[index].address);
    (servers.into(), addresses)
}

/// Addresses for them on this host, and a route for all others.
pub fn addresses() {
    for last in 1..=5 {
        ip(&format!("addr add 10.1.0.{last}/32 dev lo"));
        ip(&format!("addr add fd01::{last}/128 dev lo nodad"));
    }
    // What is not local must have a route, or connect() gives up before anybody is asked.
    ip("route add default dev lo");
    ip("-6 route add default dev lo");
}

/// Which backend answers a connection.
pub fn ask_tcp(address: &str) -> io::Result<SocketAddr> {
    let mut stream = TcpStream::connect(address.parse::<SocketAddr>().unwrap())?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(answer.parse().unwrap())
}

/// Which backend answers a datagram, and who the answer seems to come from.
pub fn ask_udp(socket: &UdpSocket, address: &str) -> io::Result<(SocketAddr, SocketAddr)> {
    socket.set_read_timeout(Some(PATIENCE))?;
    socket.send_to(b"?", address.parse::<SocketAddr>().unwrap())?;
    let mut buffer = [0; 64];
    let (length, from) = socket.recv_from(&mut buffer)?;
    Ok((
        std::str::from_utf8(&buffer[..length]).unwrap().parse().unwrap(),
        from,
    ))
}
