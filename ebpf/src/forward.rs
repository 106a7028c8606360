//! The fast path: packets from pod to pod go past the host's stack, straight into the pod's namespace on this node, or out
//! by the device that the routing table names, to the next hop it names.
//!
//! Only packets that the stack would forward as they are, and in both directions alike, so that connection tracking sees
//! all of a connection or nothing. Whatever is out of the ordinary is left to the stack, which has the right answer:
//! options, a time to live that ends, a packet too large, a source that is not the pod's own, pods behind a queue.

use aya_ebpf::bindings::{
    BPF_FIB_LKUP_RET_SUCCESS, BPF_FIB_LOOKUP_SKIP_NEIGH, bpf_fib_lookup as FibLookup,
    bpf_redir_neigh as NextHop,
};
use aya_ebpf::helpers::generated::{bpf_fib_lookup, bpf_redirect_neigh, bpf_redirect_peer};
use aya_ebpf::programs::TcContext;
use sluice_ebpf_types::{
    Address, Counter, Endpoint, EndpointSlot, Node, direction, endpoint_flag, node_flag,
};

use crate::connections::find;
use crate::counters::count;
use crate::maps::{ENDPOINT_SLOTS, ENDPOINTS, NODE};
use crate::packet::{ETHERNET, Packet, ipv4_at, ipv6_at, network_protocol};

const AF_INET: u8 = 2;
const AF_INET6: u8 = 10;
/// Version 4 and a header without options.
const PLAIN_V4: u8 = 0x45;
/// Next header that every hop must look at (RFC 8200, section 4.3).
const HOP_BY_HOP: u8 = 0;
/// Traffic class and flow label in an IPv6 header's first word (`IPV6_FLOWINFO_MASK`, include/net/ipv6.h).
const FLOW_INFO: u32 = 0x0fff_ffff_u32.to_be();
/// Where an IPv4 header's time to live stands with the protocol behind it, and its checksum; bytes.
const TTL_V4: u32 = ETHERNET + 8;
const CHECKSUM_V4: u32 = ETHERNET + 10;
/// Where an IPv6 header's hop limit stands, bytes.
const HOPS_V6: u32 = ETHERNET + 7;

/// What forwarding goes by.
struct Hop {
    source: Address,
    destination: Address,
    v4: bool,
    /// Time to live, or hop limit.
    ttl: u8,
    /// What the IP header says follows.
    protocol: u8,
    /// Type of service, or the header's first word without its version: what a routing rule may ask for.
    class: u32,
}

/// What a pod sends; `None`: the way through translation and the host's stack.
#[inline(always)]
pub fn from_pod(ctx: &TcContext) -> Option<i32> {
    let node = fast_path()?;
    let hop = Hop::read(ctx)?;
    let from = endpoint(&hop.source)?;
    // SAFETY: the kernel hands the program a valid context.
    let device = unsafe { (&raw const (*ctx.skb.skb).ifindex).read_volatile() };
    if from.device != device || from.flags & endpoint_flag::QUEUED != 0 {
        return None;
    }
    if let Some(to) = endpoint(&hop.destination) {
        return hop.deliver(ctx, to);
    }
    // The node's own address among the pods' stands in for clients: replies to it are translated.
    if !in_pod_networks(node, &hop.destination)
        || hop.destination.is(&node.pod_network_v4)
        || hop.destination.is(&node.pod_network_v6)
    {
        return None;
    }
    hop.send_on(ctx, device)
}

/// What comes from another host; `None`: the way through translation and the host's stack. Pods alone: what others send
/// may be answered by way of translation or masquerading, which must see both directions.
#[inline(always)]
pub fn from_network(ctx: &TcContext) -> Option<i32> {
    let node = fast_path()?;
    let hop = Hop::read(ctx)?;
    let to = endpoint(&hop.destination)?;
    if !in_pod_networks(node, &hop.source) {
        return None;
    }
    hop.deliver(ctx, to)
}

/// Remembers that packets of this pod are translated on their way, and packets to it may have to be.
#[inline(always)]
pub fn note_translated(pod: &Address) {
    if let Some(endpoint) = place(pod) {
        // SAFETY: the pointer is into a value of a map; the field is one word, and only ever set.
        unsafe { (&raw mut (*endpoint).translated).write_volatile(1) };
    }
}

/// Whether the packet, on its way into a pod, goes to one that [`note_translated`] knows.
#[inline(always)]
pub fn is_for_translated_pod(ctx: &TcContext) -> bool {
    let destination = match network_protocol(ctx) {
        Some(true) => ipv4_at(ctx, ETHERNET).map(|header| Address::v4(header.destination)),
        Some(false) => ipv6_at(ctx, ETHERNET).map(|header| header.destination()),
        None => None,
    };
    destination
        .and_then(|address| endpoint(&address))
        .is_some_and(|endpoint| endpoint.translated != 0)
}

#[inline(always)]
fn fast_path() -> Option<&'static Node> {
    NODE.get(0).filter(|node| node.flags & node_flag::FAST_PATH != 0)
}

#[inline(always)]
fn endpoint(address: &Address) -> Option<&'static Endpoint> {
    // SAFETY: the pointer is into a value of a map, which is there as long as the program runs. What the daemon writes meanwhile
    // are numbers, of which the old and the new are values.
    place(address).map(|endpoint| unsafe { &*endpoint })
}

/// Where the endpoint is: in its slot, or in the table.
#[inline(always)]
fn place(address: &Address) -> Option<*mut Endpoint> {
    let slot = ENDPOINT_SLOTS.get_ptr_mut(EndpointSlot::number(address))?;
    // SAFETY: the pointer is a value of the map. An address that is being written is nobody's yet: see the daemon's endpoints.rs.
    if unsafe { (*slot).address }.is(address) {
        // SAFETY: the field is in the value.
        return Some(unsafe { &raw mut (*slot).endpoint });
    }
    ENDPOINTS.get_ptr_mut(address)
}

#[inline(always)]
fn in_pod_networks(node: &Node, address: &Address) -> bool {
    let [a, b, c, d] = &node.pod_networks;
    a.contains(address) || b.contains(address) || c.contains(address) || d.contains(address)
}

impl Hop {
    /// Reads the packet; `None` if its header asks for more than to be forwarded.
    #[inline(always)]
    fn read(ctx: &TcContext) -> Option<Self> {
        // Two bytes at a time: the header is aligned to no more. On the little-endian machines this is for, the first of two is the
        // lower, and the first two of four as well.
        let low = |half: u16| half as u8;
        let high = |half: u16| (half >> 8) as u8;
        let word = |halves: [u16; 2]| u32::from(halves[0]) | u32::from(halves[1]) << 16;
        if network_protocol(ctx)? {
            let [first, _, _, _, ttl, _, s0, s1, d0, d1] = *in_place::<[u16; 10]>(ctx, ETHERNET)?;
            (low(first) == PLAIN_V4 && low(ttl) > 1).then_some(Self {
                source: Address::v4(word([s0, s1])),
                destination: Address::v4(word([d0, d1])),
                v4: true,
                ttl: low(ttl),
                protocol: high(ttl),
                class: u32::from(high(first)),
            })
        } else {
            let [f0, f1, _, next] = *in_place::<[u16; 4]>(ctx, ETHERNET)?;
            let address = |at| {
                let [a, b, c, d, e, f, g, h] = *in_place::<[u16; 8]>(ctx, ETHERNET + at)?;
                Some(Address {
                    words: [word([a, b]), word([c, d]), word([e, f]), word([g, h])],
                })
            };
            let (source, destination) = (address(8)?, address(24)?);
            // Mapped addresses do not belong on a wire, and would pass for IPv4 in the tables.
            let forwardable = low(next) != HOP_BY_HOP && high(next) > 1;
            (forwardable && !source.is_v4() && !destination.is_v4()).then_some(Self {
                source,
                destination,
                v4: false,
                ttl: high(next),
                protocol: low(next),
                class: word([f0, f1]) & FLOW_INFO,
            })
        }
    }

    /// Into a pod of this node.
    #[inline(always)]
    fn deliver(&self, ctx: &TcContext, to: &Endpoint) -> Option<i32> {
        if to.flags & endpoint_flag::QUEUED != 0 || self.source.is(&self.destination) {
            return None;
        }
        if to.translated != 0 {
            // What Packet cannot read may be an error about such a packet.
            let packet = Packet::read(ctx, ETHERNET)?;
            if find(&packet.key(direction::OUT)).is_some() {
                return None;
            }
        }
        self.age(ctx)?;
        let [a, b, c, d, e, f, g, h, i, j, k, l] = to.ethernet;
        let halves = [[a, b], [c, d], [e, f], [g, h], [i, j], [k, l]];
        *in_place(ctx, 0)? = halves.map(u16::from_ne_bytes);
        count(Counter::FastLocal);
        // SAFETY: takes numbers; the kernel looks the device up, and drops the packet if it is gone.
        Some(unsafe { bpf_redirect_peer(to.device, 0) } as i32)
    }

    /// To another node, as the routing table says; it came in by `device`.
    #[inline(always)]
    fn send_on(&self, ctx: &TcContext, device: u32) -> Option<i32> {
        // SAFETY: all zeroes are a valid value of this struct of numbers.
        let mut lookup: FibLookup = unsafe { core::mem::zeroed() };
        lookup.ifindex = device;
        lookup.l4_protocol = self.protocol;
        if self.v4 {
            lookup.family = AF_INET;
            lookup.__bindgen_anon_2.tos = self.class as u8;
            lookup.__bindgen_anon_3.ipv4_src = self.source.words[3];
            lookup.__bindgen_anon_4.ipv4_dst = self.destination.words[3];
        } else {
            lookup.family = AF_INET6;
            lookup.__bindgen_anon_2.flowinfo = self.class;
            lookup.__bindgen_anon_3.ipv6_src = self.source.words;
            lookup.__bindgen_anon_4.ipv6_dst = self.destination.words;
        }
        // The next hop's Ethernet address is the business of the neighbour table, which also learns that it is in use.
        // SAFETY: the context is valid and `lookup` is of the size said.
        let found = unsafe {
            bpf_fib_lookup(
                ctx.skb.skb.cast(),
                &raw mut lookup,
                size_of::<FibLookup>() as i32,
                BPF_FIB_LOOKUP_SKIP_NEIGH,
            )
        };
        // No route, none that forwards, or too large for the device.
        if found != i64::from(BPF_FIB_LKUP_RET_SUCCESS) || lookup.ifindex == device {
            return None;
        }
        // SAFETY: all zeroes are a valid value of this struct of numbers.
        let mut hop: NextHop = unsafe { core::mem::zeroed() };
        hop.nh_family = u32::from(lookup.family);
        // SAFETY: what the lookup left is as the family in it says, an address of one word or of four.
        unsafe {
            if lookup.family == AF_INET {
                hop.__bindgen_anon_1.ipv4_nh = lookup.__bindgen_anon_4.ipv4_dst;
            } else {
                hop.__bindgen_anon_1.ipv6_nh = lookup.__bindgen_anon_4.ipv6_dst;
            }
        }
        self.age(ctx)?;
        count(Counter::FastRemote);
        // SAFETY: `hop` is of the size said.
        let sent =
            unsafe { bpf_redirect_neigh(lookup.ifindex, &raw mut hop, size_of::<NextHop>() as i32, 0) };
        Some(sent as i32)
    }

    /// One hop less to go, as a router must see to (RFC 1812, section 5.3.1).
    #[inline(always)]
    fn age(&self, ctx: &TcContext) -> Option<()> {
        if self.v4 {
            let ttl: &mut u8 = in_place(ctx, TTL_V4)?;
            *ttl = self.ttl - 1;
            // The header's word with the time to live in its upper byte is less by 0x0100, so the sum's complement is more by
            // that, with the carry brought round (RFC 1624).
            let sum: &mut u16 = in_place(ctx, CHECKSUM_V4)?;
            let more = u32::from(*sum) + u32::from(0x0100_u16.to_be());
            *sum = (more + (more >> 16)) as u16;
        } else {
            let hops: &mut u8 = in_place(ctx, HOPS_V6)?;
            *hops = self.ttl - 1;
        }
        Some(())
    }
}

/// Numbers: any bytes are a value.
trait Number: Copy {}
impl Number for u8 {}
impl Number for u16 {}
impl<const COUNT: usize> Number for [u16; COUNT] {}

/// What stands at `at` bytes of the frame, an even number for all but single bytes, to be read and written where it is: no helper is
/// called for it, and where a program writes so, the kernel has made the frame its own before (net/core/filter.c,
/// `bpf_unclone_prologue`). `None` if the frame's first part is shorter.
#[inline(always)]
fn in_place<T: Number>(ctx: &TcContext, at: u32) -> Option<&mut T> {
    let place = ctx.data() + at as usize;
    if place + size_of::<T>() > ctx.data_end() {
        return None;
    }
    // SAFETY: the frame reaches that far, and any bytes are a number. Frames begin at even addresses, since all that the kernel puts
    // before one is of an even length. Each reference is used up before the next is made.
    Some(unsafe { &mut *(place as *mut T) })
}
