//! An entry of a hash map read and removed in one: `BPF_MAP_LOOKUP_AND_DELETE_ELEM` (kernel 5.14; kernel/bpf/hashtab.c), which aya offers
//! of queues alone.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd};

use aya::Pod;

/// `enum bpf_cmd`, include/uapi/linux/bpf.h.
const BPF_MAP_LOOKUP_AND_DELETE_ELEM: libc::c_int = 21;

/// `union bpf_attr` as this command reads it; pointers are to this process's memory.
#[repr(C)]
struct Attributes {
    map_fd: u32,
    zero: u32,
    key: u64,
    value: u64,
    flags: u64,
}

/// Removes `key` and gives what it had; `None` if it was not there.
///
/// # Errors
/// The kernel's.
pub(super) fn take<K: Pod, V: Pod>(map: impl AsFd, key: &K) -> io::Result<Option<V>> {
    let mut value = MaybeUninit::<V>::uninit();
    let attributes = Attributes {
        map_fd: map.as_fd().as_raw_fd() as u32,
        zero: 0,
        key: std::ptr::from_ref(key) as u64,
        value: value.as_mut_ptr() as u64,
        flags: 0,
    };
    // SAFETY: key and value are of the map's sizes (`K` and `V` are checked against them when the table is made) and outlive the call.
    let result = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            BPF_MAP_LOOKUP_AND_DELETE_ELEM,
            &raw const attributes,
            size_of::<Attributes>(),
        )
    };
    if result == 0 {
        // SAFETY: the kernel has written all of the value.
        return Ok(Some(unsafe { value.assume_init() }));
    }
    match io::Error::last_os_error() {
        error if error.kind() == io::ErrorKind::NotFound => Ok(None),
        error => Err(error),
    }
}
