//! A UDP service that answers every datagram with a name, so that who answered is visible, and the one who asks it.

use std::io::{ErrorKind, Write, stdout};
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::thread::sleep;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use nix::errno::Errno;

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

/// Asks the service at `host` once and gives the name it answered with.
///
/// With `connected` the kernel picks the peer once, at connect(2); without, each sendto(2) names it, and the answer has
/// to come from the very address that was asked.
///
/// # Errors
/// No answer within two seconds, or one from somewhere else.
pub fn ask(host: IpAddr, port: u16, connected: bool) -> Result<String> {
    let any = if host.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
    let asked = SocketAddr::new(host, port);
    let socket = UdpSocket::bind(any).context("opening a UDP socket")?;
    socket
        .set_read_timeout(Some(Duration::from_secs(2)))
        .context("limiting the wait")?;
    let mut buffer = [0; 2048];
    let length = if connected {
        socket
            .connect(asked)
            .with_context(|| format!("connecting to {asked}"))?;
        socket.send(b"x").with_context(|| format!("sending to {asked}"))?;
        socket
            .recv(&mut buffer)
            .with_context(|| format!("waiting for {asked}"))?
    } else {
        socket
            .send_to(b"x", asked)
            .with_context(|| format!("sending to {asked}"))?;
        let (length, sender) = socket
            .recv_from(&mut buffer)
            .with_context(|| format!("waiting for {asked}"))?;
        if sender != asked {
            bail!("{asked} was asked, {sender} answered");
        }
        length
    };
    Ok(String::from_utf8_lossy(&buffer[..length]).trim().to_owned())
}

/// What [`keep`] prints when the kernel told its socket that it leads nowhere any more.
pub const ABORTED: &str = "aborted";

/// Asks again and again over one connected socket, as a resolver that lives long does, and prints every answer, until
/// killed. Only when the kernel aborts the socket is another one made; silence and refusals are sat through.
///
/// # Errors
/// The socket fails in another way.
pub fn keep(host: IpAddr, port: u16) -> Result<()> {
    let asked = SocketAddr::new(host, port);
    let any = if host.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
    let mut buffer = [0; 2048];
    loop {
        let socket = UdpSocket::bind(any).context("opening a UDP socket")?;
        socket
            .set_read_timeout(Some(Duration::from_millis(200)))
            .context("limiting the wait")?;
        socket
            .connect(asked)
            .with_context(|| format!("connecting to {asked}"))?;
        loop {
            let answer = socket.send(b"x").and_then(|_| socket.recv(&mut buffer));
            match answer {
                Ok(length) => print!("{}", String::from_utf8_lossy(&buffer[..length])),
                Err(error) if error.kind() == ErrorKind::ConnectionAborted => break,
                // Aborted while nobody waited for an answer: the socket is connected nowhere now, which sending says first.
                Err(error) if error.raw_os_error() == Some(Errno::EDESTADDRREQ as i32) => break,
                Err(error)
                    if matches!(
                        error.kind(),
                        ErrorKind::WouldBlock
                            | ErrorKind::TimedOut
                            | ErrorKind::ConnectionRefused
                            | ErrorKind::HostUnreachable
                            | ErrorKind::NetworkUnreachable
                    ) => {}
                Err(error) => return Err(error).with_context(|| format!("asking {asked}")),
            }
            stdout().flush().context("printing")?;
            sleep(Duration::from_millis(20));
        }
        println!("{ABORTED}");
        sleep(Duration::from_millis(20));
    }
}
