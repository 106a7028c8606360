//! Attachments that outlive the daemon: BPF links, pinned, and given a new program in place.
//!
//! Raw system calls, because `aya` 0.14 cannot update a pinned cgroup link. Owns attaching, updating, pinning and
//! detaching; which programs go where is decided elsewhere.

use std::ffi::CString;
use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use anyhow::{Context, Result};
use bytemuck::{NoUninit, Pod, Zeroable};

/// Commands of bpf(2): `enum bpf_cmd`, include/uapi/linux/bpf.h.
#[derive(Clone, Copy)]
#[repr(i32)]
enum Command {
    ObjectPin = 6,
    ObjectGet = 7,
    ObjectInfo = 15,
    LinkCreate = 28,
    LinkUpdate = 29,
    LinkDetach = 34,
}

/// Where a program can be attached: `enum bpf_attach_type`, include/uapi/linux/bpf.h.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub(super) enum Hook {
    Connect4 = 10,
    Connect6 = 11,
    Sendmsg4 = 14,
    Sendmsg6 = 15,
    Recvmsg4 = 19,
    Recvmsg6 = 20,
    Getpeername4 = 29,
    Getpeername6 = 30,
    TcxIngress = 46,
    TcxEgress = 47,
}

/// What a link is attached to.
#[derive(Debug, Clone, Copy)]
pub(super) enum Target<'a> {
    /// A cgroup v2 directory, open, and its id.
    Cgroup(BorrowedFd<'a>, u64),
    /// A device of this network namespace, by its index.
    Device(u32),
}

impl Target<'_> {
    fn raw(self) -> u32 {
        match self {
            Self::Cgroup(fd, _) => raw(fd),
            Self::Device(index) => index,
        }
    }
}

/// `bpf_attr` of `BPF_OBJ_PIN` and `BPF_OBJ_GET`.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct Object {
    path: u64,
    fd: u32,
    flags: u32,
}

/// `bpf_attr` of `BPF_OBJ_GET_INFO_BY_FD`.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct Info {
    fd: u32,
    length: u32,
    address: u64,
}

/// `bpf_attr` of `BPF_LINK_CREATE`, up to the flags.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct Create {
    program: u32,
    target: u32,
    hook: u32,
    flags: u32,
}

/// `bpf_attr` of `BPF_LINK_UPDATE`.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct Update {
    link: u32,
    program: u32,
    flags: u32,
    old_program: u32,
}

/// The head of `struct bpf_link_info`. `target` is the cgroup's id (u64) of a cgroup link; for a tcx link, the
/// interface index in the first four bytes and the attach type behind it.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct LinkInfo {
    kind: u32,
    id: u32,
    program: u32,
    zero: u32,
    target: [u32; 2],
    rest: [u32; 2],
}

fn raw(fd: BorrowedFd<'_>) -> u32 {
    // File descriptors are never negative.
    fd.as_raw_fd().cast_unsigned()
}

fn bpf<T: NoUninit>(command: Command, attributes: &T) -> io::Result<i64> {
    // SAFETY: `attributes` is plain data of the size given, laid out as the command wants, and what it points to outlives
    // the call.
    let result = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            command as i32,
            &raw const *attributes,
            size_of::<T>(),
        )
    };
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}

fn owned(fd: i64) -> io::Result<OwnedFd> {
    let fd = i32::try_from(fd).map_err(io::Error::other)?;
    // SAFETY: the kernel has just returned this descriptor to us, and to nobody else.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn c_path(path: &Path) -> io::Result<CString> {
    CString::new(path.as_os_str().as_bytes()).map_err(io::Error::other)
}

fn pinned(path: &Path) -> io::Result<OwnedFd> {
    let path = c_path(path)?;
    let request = Object {
        path: path.as_ptr() as u64,
        fd: 0,
        flags: 0,
    };
    owned(bpf(Command::ObjectGet, &request)?)
}

fn info(link: BorrowedFd<'_>) -> io::Result<LinkInfo> {
    let mut answer = LinkInfo::zeroed();
    let request = Info {
        fd: raw(link),
        length: size_of::<LinkInfo>() as u32,
        address: &raw mut answer as u64,
    };
    bpf(Command::ObjectInfo, &request)?;
    Ok(answer)
}

/// Whether the link is attached to `target` still: a device or cgroup that went leaves 0 behind.
fn is_at(link: BorrowedFd<'_>, target: Target<'_>) -> io::Result<bool> {
    let LinkInfo { target: found, .. } = info(link)?;
    Ok(match target {
        Target::Cgroup(_, id) => bytemuck::cast::<[u32; 2], u64>(found) == id,
        Target::Device(index) => found[0] == index,
    })
}

/// Sees to it that `program` runs at `target` by a link pinned at `pin`.
///
/// A link that is there already is given the program in place, so not one packet or call goes without; one whose target
/// is gone, or another by now, is dropped and attached anew.
pub(super) fn ensure(pin: &Path, program: BorrowedFd<'_>, target: Target<'_>, hook: Hook) -> Result<()> {
    match pinned(pin) {
        Ok(link) => {
            let update = Update {
                link: raw(link.as_fd()),
                program: raw(program),
                flags: 0,
                old_program: 0,
            };
            let at =
                is_at(link.as_fd(), target).with_context(|| format!("asking about {}", pin.display()))?;
            if at {
                match bpf(Command::LinkUpdate, &update) {
                    Ok(_) => return Ok(()),
                    Err(error) if error.raw_os_error() == Some(libc::ENOLINK) => {}
                    Err(error) => {
                        return Err(error).with_context(|| format!("updating {}", pin.display()));
                    }
                }
            }
            remove(pin)?;
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(error).with_context(|| format!("opening {}", pin.display())),
    }
    let create = Create {
        program: raw(program),
        target: target.raw(),
        hook: hook as u32,
        flags: 0,
    };
    let link = bpf(Command::LinkCreate, &create)
        .and_then(owned)
        .with_context(|| format!("attaching {hook:?} to {target:?}"))?;
    let path = c_path(pin)?;
    let request = Object {
        path: path.as_ptr() as u64,
        fd: raw(link.as_fd()),
        flags: 0,
    };
    bpf(Command::ObjectPin, &request).with_context(|| format!("pinning {}", pin.display()))?;
    Ok(())
}

/// Detaches the link pinned at `pin` and removes the pin. One that is gone already is fine.
pub(super) fn remove(pin: &Path) -> Result<()> {
    match pinned(pin) {
        Ok(link) => {
            // Someone else may hold the link open, so removing the pin alone might not detach it. Older kernels cannot
            // be told to; neither can a link whose target is gone.
            let _ = bpf(Command::LinkDetach, &raw(link.as_fd()));
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error).with_context(|| format!("opening {}", pin.display())),
    }
    match fs::remove_file(pin) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("removing {}", pin.display()))
        }
        _ => Ok(()),
    }
}
