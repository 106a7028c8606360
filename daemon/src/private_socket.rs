//! A unix socket that root alone can open, where a killed predecessor's is in nobody's way.

use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;

/// Listens at `path`, mode 0600, making its folder if need be.
///
/// # Errors
/// The kernel's answer, or that another daemon listens there.
pub fn bind(path: &Path) -> io::Result<UnixListener> {
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder)?;
    }
    if UnixStream::connect(path).is_ok() {
        let reason = "another sluiced answers there, and two would undo each other's work; stop it first";
        return Err(io::Error::new(io::ErrorKind::AddrInUse, reason));
    }
    // Bound under another name and renamed: a killed predecessor's socket is in nobody's way, and nobody can connect
    // before the mode is set.
    let temporary = path.with_extension(format!("sock.{}", std::process::id()));
    let _ = fs::remove_file(&temporary);
    let listener = UnixListener::bind(&temporary)?;
    fs::set_permissions(&temporary, fs::Permissions::from_mode(0o600))?;
    fs::rename(&temporary, path)?;
    Ok(listener)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dead_predecessors_socket_is_replaced_and_a_living_ones_is_not() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("sluiced.sock");
        drop(bind(&path).unwrap());
        let living = bind(&path).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        let refused = bind(&path).unwrap_err();
        assert!(
            refused.to_string().contains("another sluiced answers"),
            "{refused}"
        );
        drop(living);
        assert_eq!(
            fs::read_dir(folder.path()).unwrap().count(),
            1,
            "no temporary name is left"
        );
    }
}
