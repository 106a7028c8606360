//! Who may connect to a Service, and to which backend: session affinity first, else any: evenly at random, or for packets from
//! other hosts by a hash of who sent them.

use aya_ebpf::helpers::{bpf_get_prandom_u32, bpf_ktime_get_ns};
use aya_ebpf::maps::lpm_trie::Key;
use sluice_ebpf_types::{
    Address, Affinity, AffinityKey, Backend, BackendKey, Counter, Frontend, MAGLEV_PART, MaglevKey,
    MemberKey, SourceKey, frontend_flag, maglev_places,
};

use crate::counters::count;
use crate::maps::{AFFINITY, BACKENDS, MAGLEV, MEMBERS, SERVICES, SOURCES};

/// Nanoseconds of `CLOCK_MONOTONIC`.
#[inline(always)]
pub fn now() -> u64 {
    // SAFETY: takes nothing and cannot fail.
    unsafe { bpf_ktime_get_ns() }
}

/// A random number from 0 up to `limit`, without a division.
#[inline(always)]
pub fn below(limit: u32) -> u32 {
    // SAFETY: takes nothing and cannot fail.
    let random = unsafe { bpf_get_prandom_u32() };
    ((u64::from(random) * u64::from(limit)) >> 32) as u32
}

/// Whether the frontend's source ranges have this client.
#[inline(always)]
pub fn admits(frontend: &Frontend, client: &Address) -> bool {
    if frontend.flags & frontend_flag::RESTRICTED == 0 {
        return true;
    }
    let SourceKey { bits, source } = SourceKey::client(frontend.service, *client);
    SOURCES.get(Key::new(bits, source)).is_some()
}

/// The endpoint's place, if it belongs to set `service` now. `port` in network order.
#[inline(always)]
pub fn member(service: u32, address: &Address, port: u16) -> Option<u8> {
    let key = MemberKey {
        address: *address,
        service,
        port,
        zero: 0,
    };
    // SAFETY: a value of this map is one word, read at once.
    unsafe { MEMBERS.get(&key) }.map(|place| *place as u8)
}

/// How a backend is picked for whom nothing is remembered.
#[derive(Clone, Copy)]
pub enum By {
    /// At random.
    Chance,
    /// As every node would, by this hash of who connects.
    Hash(u32),
}

impl By {
    /// The hash of a client's address and port, both in network order, the port it asks for and its protocol: what stays the
    /// same whichever node a load balancer sends the packet to, as the node's own address does not.
    ///
    /// MurmurHash3_x86_32 (Appleby), which has no division and no table.
    #[inline(always)]
    pub fn hash(client: &Address, client_port: u16, port: u16, protocol: u8) -> Self {
        let [a, b, c, d] = client.words;
        let ports = u32::from(client_port) << 16 | u32::from(port);
        let mut hash = 0_u32;
        for word in [a, b, c, d, ports, u32::from(protocol)] {
            let mixed = word
                .wrapping_mul(0xcc9e_2d51)
                .rotate_left(15)
                .wrapping_mul(0x1b87_3593);
            hash = (hash ^ mixed)
                .rotate_left(13)
                .wrapping_mul(5)
                .wrapping_add(0xe654_6b64);
        }
        // The length in bytes, then every bit over all others.
        hash ^= 24;
        hash = (hash ^ hash >> 16).wrapping_mul(0x85eb_ca6b);
        hash = (hash ^ hash >> 13).wrapping_mul(0xc2b2_ae35);
        Self::Hash(hash ^ hash >> 16)
    }

    /// A slot of the set, which may be gone.
    #[inline(always)]
    fn slot(self, service: u32, count: u32) -> u32 {
        let places = maglev_places(count);
        if let Self::Hash(hash) = self
            && places != 0
        {
            let place = hash % places;
            let part = place / MAGLEV_PART as u32;
            // SAFETY: as in `choose`.
            if let Some(part) = unsafe { MAGLEV.get(&MaglevKey { service, part }) } {
                return u32::from(part.slots[place as usize % MAGLEV_PART]);
            }
        }
        below(count)
    }
}

/// A backend of set `service` for `client`, picked by `by`; `None` if there is none.
#[inline(always)]
pub fn choose(service: u32, client: impl FnOnce() -> Address, by: By) -> Option<Backend> {
    // SAFETY: the map's elements are replaced, not rewritten; one reused under our eyes yields numbers whose slots do
    // not exist, and `pick` reads them anew.
    let entry = unsafe { SERVICES.get(&service) }?;
    if entry.count == 0 {
        return None;
    }
    let seconds = entry.affinity_seconds;
    if seconds == 0 {
        return pick(service, by);
    }
    let key = AffinityKey {
        client: client(),
        service,
    };
    let now = now();
    if let Some(known) = AFFINITY.get_ptr_mut(&key) {
        // SAFETY: the pointer is a value of the map, and lives as long as the program runs; a racing writer of the same
        // client's entry leaves a backend that is checked below.
        let known = unsafe { &mut *known };
        if now.wrapping_sub(known.last_used) < u64::from(seconds) * 1_000_000_000
            && let Some(place) = member(service, &known.address, known.port)
        {
            known.last_used = now;
            return Some(Backend {
                address: known.address,
                port: known.port,
                place,
                zero: 0,
            });
        }
    }
    let backend = pick(service, by)?;
    let value = Affinity {
        last_used: now,
        address: backend.address,
        port: backend.port,
        zero: [0; 3],
    };
    // Without the entry the client is balanced anew next time: nothing better can be done here.
    let _ = AFFINITY.insert(&key, &value, 0);
    Some(backend)
}

/// Any backend of set `service`.
#[inline(always)]
fn pick(service: u32, mut by: By) -> Option<Backend> {
    // The daemon may switch generations, or shorten the set, between the two lookups: then look again.
    for _ in 0..3 {
        // SAFETY: as in `choose`.
        let entry = unsafe { SERVICES.get(&service) }?;
        let (generation, count) = (entry.generation, entry.count);
        if count == 0 {
            return None;
        }
        let key = BackendKey {
            service,
            generation,
            slot: by.slot(service, count),
        };
        // SAFETY: as in `choose`: an element is replaced, never rewritten in place.
        if let Some(backend) = unsafe { BACKENDS.get(&key) } {
            return Some(*backend);
        }
        // The table may be behind the set.
        by = By::Chance;
    }
    count(Counter::Raced);
    None
}
