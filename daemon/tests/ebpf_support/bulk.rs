//! A megabyte there and back: many segments, in which every byte counts.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::time::Duration;

pub const PATIENCE: Duration = Duration::from_secs(20);
const BULK: usize = 1 << 20;

/// Accepts one connection, sends back all it gets, and says who the client was.
pub fn echo(listener: &TcpListener) -> SocketAddr {
    let (mut stream, client) = listener.accept().unwrap();
    let mut data = vec![0; BULK];
    stream.read_exact(&mut data).unwrap();
    stream.write_all(&data).unwrap();
    client
}

/// Sends a megabyte and must get it back; the client's own address and whom it saw.
pub fn bulk(to: SocketAddr) -> (SocketAddr, SocketAddr) {
    let mut stream = TcpStream::connect_timeout(&to, PATIENCE).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let data: Vec<u8> = (0..BULK).map(|byte| (byte % 251) as u8).collect();
    let mut writer = stream.try_clone().unwrap();
    let sent = data.clone();
    let writing = std::thread::spawn(move || writer.write_all(&sent).unwrap());
    let mut back = vec![0; BULK];
    stream.read_exact(&mut back).unwrap();
    writing.join().unwrap();
    assert!(back == data, "what came back is not what was sent");
    (stream.local_addr().unwrap(), stream.peer_addr().unwrap())
}
