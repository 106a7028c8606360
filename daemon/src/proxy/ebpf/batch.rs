//! Many entries of a map in one call: `BPF_MAP_UPDATE_BATCH` and `BPF_MAP_LOOKUP_BATCH` (kernel 5.6;
//! kernel/bpf/hashtab.c), which aya does not offer.

use std::io;
use std::os::fd::{AsFd, AsRawFd};

use aya::Pod;

/// `enum bpf_cmd`, include/uapi/linux/bpf.h.
const BPF_MAP_LOOKUP_BATCH: libc::c_int = 24;
const BPF_MAP_UPDATE_BATCH: libc::c_int = 26;

/// How many entries one call brings. A bucket must fit: with as many buckets as entries, no hash fills one so far.
const CHUNK: usize = 4_096;

/// Where a walk is: room for the largest key of a map that is no hash table.
type Position = [u64; 8];

/// `union bpf_attr` as these commands read it; pointers are to this process's memory.
#[repr(C)]
#[derive(Default)]
struct Attributes {
    in_batch: u64,
    out_batch: u64,
    keys: u64,
    values: u64,
    count: u32,
    map_fd: u32,
    elem_flags: u64,
    flags: u64,
}

/// Creates or replaces all these entries; `keys` and `values` belong together by their place.
///
/// # Errors
/// The kernel's; then some of them may have been written.
pub(super) fn update<K: Pod, V: Pod>(map: impl AsFd, keys: &[K], values: &[V]) -> io::Result<()> {
    assert_eq!(keys.len(), values.len(), "every key has its value");
    for (keys, values) in keys.chunks(CHUNK).zip(values.chunks(CHUNK)) {
        let mut attributes = Attributes {
            keys: keys.as_ptr() as u64,
            values: values.as_ptr() as u64,
            count: keys.len() as u32,
            ..Attributes::default()
        };
        // SAFETY: both arrays hold `count` entries of the map's sizes (`K` and `V` are checked against them when the
        // table is made) and are only read.
        unsafe { call(BPF_MAP_UPDATE_BATCH, map.as_fd(), &mut attributes) }?;
    }
    Ok(())
}

/// Hands every entry to `each`. What changes meanwhile may or may not be seen; the walk goes by the map's buckets, so it
/// ends in any case and sees what stays put exactly once.
///
/// # Errors
/// The kernel's.
pub(super) fn walk<K: Pod, V: Pod>(map: impl AsFd, mut each: impl FnMut(K, V)) -> io::Result<()> {
    const { assert!(size_of::<K>() <= size_of::<Position>()) };
    let mut keys: Vec<K> = Vec::with_capacity(CHUNK);
    let mut values: Vec<V> = Vec::with_capacity(CHUNK);
    // A bucket's number; of a map that is no hash table, the last key.
    let mut position: Option<Position> = None;
    loop {
        let mut next = Position::default();
        let mut attributes = Attributes {
            in_batch: position
                .as_ref()
                .map_or(0, |bucket| std::ptr::from_ref(bucket) as u64),
            out_batch: std::ptr::from_mut(&mut next) as u64,
            keys: keys.as_mut_ptr() as u64,
            values: values.as_mut_ptr() as u64,
            count: CHUNK as u32,
            ..Attributes::default()
        };
        // SAFETY: both arrays have room for `count` entries of the map's sizes (`K` and `V` are checked against them when
        // the table is made), and so has a position for 32 bits or a key.
        let result = unsafe { call(BPF_MAP_LOOKUP_BATCH, map.as_fd(), &mut attributes) };
        let ended = match result {
            Ok(()) => false,
            // The last of them, or none at all.
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => true,
            Err(error) => return Err(error),
        };
        let count = (attributes.count as usize).min(CHUNK);
        // SAFETY: the kernel has written the first `count` entries of both, and any bytes are a `Pod`.
        unsafe {
            keys.set_len(count);
            values.set_len(count);
        }
        for (key, value) in keys.drain(..).zip(values.drain(..)) {
            each(key, value);
        }
        if ended {
            return Ok(());
        }
        position = Some(next);
    }
}

/// # Safety
/// The pointers in `attributes` are good for what `command` does with them.
unsafe fn call(command: libc::c_int, map: impl AsFd, attributes: &mut Attributes) -> io::Result<()> {
    attributes.map_fd = map.as_fd().as_raw_fd() as u32;
    // SAFETY: the attributes are as large as said, and the caller answers for what they point to.
    let result = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            command,
            std::ptr::from_mut(attributes),
            size_of::<Attributes>(),
        )
    };
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}
