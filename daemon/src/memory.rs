//! Memory that was used for a moment goes back to the host.

/// Gives back what the allocator keeps: a list of all Services leaves more behind than it comes to.
pub fn give_back() {
    #[cfg(target_env = "gnu")]
    // SAFETY: malloc_trim(3) takes no memory of ours and may be called at any time, by any thread.
    unsafe {
        libc::malloc_trim(0);
    }
}
