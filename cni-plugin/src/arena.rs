//! Memory for a process that ends within a millisecond: given from one piece, and taken back only from its end. Keeping order in what is
//! given back, and giving it to the kernel, took a tenth of an ADD.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::UnsafeCell;
use std::ptr;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Bytes; an ADD takes a sixth. They cost nothing until they are touched.
const SIZE: usize = 1 << 20;

/// One piece of memory, and the C library's where that is full.
pub struct Arena {
    piece: UnsafeCell<[u8; SIZE]>,
    /// How much of the piece is given.
    used: AtomicUsize,
}

// SAFETY: what is given of the piece is counted atomically, so that no two have any of it, and nothing else here touches it.
unsafe impl Sync for Arena {}

impl Arena {
    /// One that has given nothing.
    pub const fn empty() -> Self {
        Self {
            piece: UnsafeCell::new([0; SIZE]),
            used: AtomicUsize::new(0),
        }
    }

    fn begin(&self) -> *mut u8 {
        self.piece.get().cast()
    }

    /// Where in the piece `memory` is; `None` if it is the C library's.
    fn offset(&self, memory: *mut u8) -> Option<usize> {
        let offset = memory.addr().checked_sub(self.begin().addr())?;
        (offset < SIZE).then_some(offset)
    }
}

// SAFETY: what is given has the size and the alignment asked for, and is nobody else's until it is given back.
unsafe impl GlobalAlloc for Arena {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let mut used = self.used.load(Ordering::Relaxed);
        loop {
            let aligned = (self.begin().addr() + used).next_multiple_of(layout.align()) - self.begin().addr();
            let end = aligned.saturating_add(layout.size());
            if end > SIZE {
                // SAFETY: the caller's promises are the same.
                return unsafe { System.alloc(layout) };
            }
            let given = self
                .used
                .compare_exchange_weak(used, end, Ordering::Relaxed, Ordering::Relaxed);
            match given {
                // SAFETY: it is within the piece.
                Ok(_) => return unsafe { self.begin().add(aligned) },
                Err(now) => used = now,
            }
        }
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        match self.offset(memory) {
            // Only at the end can it be given again; elsewhere it stays.
            Some(offset) => {
                let end = offset + layout.size();
                _ = self
                    .used
                    .compare_exchange(end, offset, Ordering::Relaxed, Ordering::Relaxed);
            }
            // SAFETY: it is not of the piece, so it came from there.
            None => unsafe { System.dealloc(memory, layout) },
        }
    }

    unsafe fn realloc(&self, memory: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        let Some(offset) = self.offset(memory) else {
            // SAFETY: it is not of the piece, so it came from there.
            return unsafe { System.realloc(memory, layout, size) };
        };
        let (end, new_end) = (offset + layout.size(), offset.saturating_add(size));
        let at_the_end = new_end <= SIZE
            && self
                .used
                .compare_exchange(end, new_end, Ordering::Relaxed, Ordering::Relaxed)
                .is_ok();
        if at_the_end || size <= layout.size() {
            return memory;
        }
        // SAFETY: the caller promises that this size can be asked for with this alignment.
        let new = unsafe { self.alloc(Layout::from_size_align_unchecked(size, layout.align())) };
        if !new.is_null() {
            // SAFETY: both are at least as long, since it grows, and the new one is nobody else's.
            unsafe { ptr::copy_nonoverlapping(memory, new, layout.size()) };
            // What it was stays: it is not at the end.
        }
        new
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layout(size: usize, align: usize) -> Layout {
        Layout::from_size_align(size, align).unwrap()
    }

    /// C9: whatever is asked for and given back, nobody has what another has.
    #[test]
    fn what_is_given_is_aligned_and_nobody_elses_until_it_is_given_back() {
        static ARENA: Arena = Arena::empty();
        let arena = &ARENA;
        let mut given: Vec<(*mut u8, Layout, u8)> = Vec::new();
        let mut from_libc = 0;
        for round in 0..20_000_usize {
            let layout = layout(1 + round * 7919 % 400, 1 << (round % 7));
            let mark = round as u8;
            // SAFETY: the size is not 0.
            let memory = unsafe { arena.alloc(layout) };
            assert!(!memory.is_null() && memory.addr() % layout.align() == 0);
            from_libc += usize::from(arena.offset(memory).is_none());
            // SAFETY: it was just given, and has this size.
            unsafe { memory.write_bytes(mark, layout.size()) };
            given.push((memory, layout, mark));
            match round % 3 {
                // The last: what is at the end.
                0 => {
                    let (memory, layout, mark) = given.pop().unwrap();
                    let grown = layout.size() * 2;
                    // SAFETY: it was given with this layout.
                    let memory = unsafe { arena.realloc(memory, layout, grown) };
                    let layout = self::layout(grown, layout.align());
                    // SAFETY: it has this size now.
                    unsafe { memory.add(grown / 2).write_bytes(mark, grown / 2) };
                    given.push((memory, layout, mark));
                }
                1 => {
                    let (memory, layout, mark) = given.swap_remove(round * 31 % given.len());
                    assert_marked(memory, layout, mark);
                    // SAFETY: it was given with this layout, and is used no more.
                    unsafe { arena.dealloc(memory, layout) };
                }
                _ => {}
            }
        }
        assert!(arena.used.load(Ordering::Relaxed) <= SIZE && from_libc > 0);
        for (memory, layout, mark) in given {
            assert_marked(memory, layout, mark);
            // SAFETY: it was given with this layout, and is used no more.
            unsafe { arena.dealloc(memory, layout) };
        }
    }

    #[track_caller]
    fn assert_marked(memory: *mut u8, layout: Layout, mark: u8) {
        // SAFETY: it was given with this layout, and written all over.
        let bytes = unsafe { std::slice::from_raw_parts(memory, layout.size()) };
        assert!(bytes.iter().all(|byte| *byte == mark));
    }

    /// C9: what is taken back at the end is given again, and grows where it is.
    #[test]
    fn the_end_is_given_again() {
        static ARENA: Arena = Arena::empty();
        let arena = &ARENA;
        let layout = layout(100, 8);
        // SAFETY: each is used as it was given.
        unsafe {
            let first = arena.alloc(layout);
            arena.dealloc(first, layout);
            assert_eq!(arena.alloc(layout), first);
            assert_eq!(arena.realloc(first, layout, 10_000), first);
            let second = arena.alloc(layout);
            assert!(second.addr() >= first.addr() + 10_000);
            arena.dealloc(second, layout);
            // More than there is left.
            let large = self::layout(SIZE, 8);
            let third = arena.alloc(large);
            assert!(!third.is_null() && arena.offset(third).is_none());
            arena.dealloc(third, large);
        }
    }
}
