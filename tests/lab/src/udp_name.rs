//! A UDP service that answers every datagram with a name, so that who answered is visible.

use std::net::UdpSocket;

use anyhow::{Context, Result};

/// Answers on `port` of all addresses until killed.
///
/// # Errors
/// The port is taken, or the socket fails.
pub fn serve(port: u16, name: &str) -> Result<()> {
    let socket = UdpSocket::bind(("::", port)).with_context(|| format!("binding UDP port {port}"))?;
    let mut buffer = [0; 2048];
    loop {
        match socket.recv_from(&mut buffer) {
            Ok((_, sender)) => {
                // The sender may be gone again, which is no reason to stop answering others.
                let _ = socket.send_to(format!("{name}\n").as_bytes(), sender);
            }
            // An ICMP error about an earlier answer.
            Err(error) if error.kind() == std::io::ErrorKind::ConnectionRefused => {}
            Err(error) => return Err(error).context("receiving"),
        }
    }
}
