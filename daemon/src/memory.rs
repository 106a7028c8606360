//! Memory that was used for a moment goes back to the host.

use std::fs;

/// Gives back what was used for a moment: what the allocator keeps, since a list of all Services leaves more behind than it comes
/// to, and the program's own pages, most of which are of its start or of such a list.
pub fn give_back() {
    #[cfg(target_env = "gnu")]
    // SAFETY: malloc_trim(3) takes no memory of ours and may be called at any time, by any thread.
    unsafe {
        libc::malloc_trim(0);
    }
    // Without /proc they stay, and nothing is wrong.
    for (start, length) in text(&fs::read_to_string("/proc/self/maps").unwrap_or_default()) {
        // SAFETY: pages of a file mapped privately that nobody can have written to hold what the file holds, so they may be
        // dropped at any time: whoever touches them next has them read from the file, or from its pages in memory.
        unsafe {
            libc::madvise(start as *mut libc::c_void, length, libc::MADV_DONTNEED);
        }
    }
}

/// Where the mappings of programs' code are, and how long each is in bytes, by proc_pid_maps(5). Code is never written to: it
/// is position-independent, and its relocations are elsewhere.
fn text(maps: &str) -> impl Iterator<Item = (usize, usize)> {
    maps.lines().filter_map(|line| {
        let mut fields = line.split_whitespace();
        let (range, flags) = (fields.next()?, fields.next()?);
        // Behind offset, device and inode comes the file's path; the kernel's own pages have a name in brackets.
        let path = fields.nth(3)?;
        if flags != "r-xp" || !path.starts_with('/') {
            return None;
        }
        let (start, end) = range.split_once('-')?;
        let [start, end] = [start, end].map(|at| usize::from_str_radix(at, 16));
        let (start, end) = (start.ok()?, end.ok()?);
        Some((start, end.checked_sub(start)?))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_code_of_files_is_given_back() {
        let maps = "\
5581c0000000-5581c049b000 r--p 00000000 08:01 77 /usr/local/bin/sluiced
5581c049b000-5581c1155000 r-xp 0049a000 08:01 77 /usr/local/bin/sluiced
5581c1156000-5581c11fc000 r--p 01154000 08:01 77 /usr/local/bin/sluiced
5581c11fd000-5581c1201000 rw-p 011fa000 08:01 77 /usr/local/bin/sluiced
7f0000000000-7f0000021000 rwxp 00000000 00:00 0
7ffd7a5f0000-7ffd7a5f2000 r-xp 00000000 00:00 0 [vdso]
";
        let code: Vec<_> = text(maps).collect();
        assert_eq!(code, [(0x5581_c049_b000, 0xcb_a000)]);
    }
}
