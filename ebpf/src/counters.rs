//! Per-CPU counters.

use sluice_ebpf_types::Counter;

use crate::maps::COUNTERS;

/// Adds one to `counter`.
#[inline(always)]
pub fn count(counter: Counter) {
    if let Some(value) = COUNTERS.get_ptr_mut(counter as u32) {
        // SAFETY: the pointer is a value of this CPU's, and programs are not preempted by others of their kind here; the
        // worst that could happen is one count lost.
        unsafe { *value = (*value).wrapping_add(1) };
    }
}
