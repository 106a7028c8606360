//! Translation at the socket: `connect`, `sendmsg`, `recvmsg` and `getpeername` of every socket in the cgroup.
//!
//! After `connect` a Service connection is a direct one: no packet of it is touched again. An IPv6 socket with a
//! mapped IPv4 destination asks for the same frontends, because IPv4 addresses are kept mapped in all tables.

use aya_ebpf::bindings::bpf_sock_addr;
use aya_ebpf::helpers::generated::{bpf_get_netns_cookie, bpf_get_socket_cookie, bpf_set_retval};
use aya_ebpf::macros::cgroup_sock_addr;
use aya_ebpf::programs::SockAddrContext;
use sluice_ebpf_types::{
    Address, Backend, Choice, ChoiceKey, Counter, Frontend, FrontendKey, Peer, PeerKey, TCP, frontend_flag,
};

use crate::balance::{By, choose, member};
use crate::counters::count;
use crate::maps::{ADDRESSES, FRONTENDS, NODE, SOCKET_CHOICES, SOCKET_PEERS};

const REFUSE: i32 = 0;
const ALLOW: i32 = 1;
const ECONNREFUSED: i32 = 111;

/// Which address family a program's context speaks.
trait Family {
    fn address(ctx: *mut bpf_sock_addr) -> Address;
    fn set_address(ctx: *mut bpf_sock_addr, address: &Address);
}

struct V4;
struct V6;

// The verifier knows the context by fixed offset and width: volatile keeps the compiler from narrowing or merging.
macro_rules! field {
    ($ctx:expr, $($field:tt)+) => {{
        // SAFETY: the kernel hands the program a valid context.
        unsafe { (&raw const (*$ctx).$($field)+).read_volatile() }
    }};
}
macro_rules! set_field {
    ($ctx:expr, $value:expr, $($field:tt)+) => {{
        // SAFETY: the kernel hands the program a valid context, and this field may be written.
        unsafe { (&raw mut (*$ctx).$($field)+).write_volatile($value) }
    }};
}

impl Family for V4 {
    #[inline(always)]
    fn address(ctx: *mut bpf_sock_addr) -> Address {
        Address::v4(field!(ctx, user_ip4))
    }

    #[inline(always)]
    fn set_address(ctx: *mut bpf_sock_addr, address: &Address) {
        set_field!(ctx, address.words[3], user_ip4);
    }
}

impl Family for V6 {
    #[inline(always)]
    fn address(ctx: *mut bpf_sock_addr) -> Address {
        Address {
            words: [
                field!(ctx, user_ip6[0]),
                field!(ctx, user_ip6[1]),
                field!(ctx, user_ip6[2]),
                field!(ctx, user_ip6[3]),
            ],
        }
    }

    #[inline(always)]
    fn set_address(ctx: *mut bpf_sock_addr, address: &Address) {
        set_field!(ctx, address.words[0], user_ip6[0]);
        set_field!(ctx, address.words[1], user_ip6[1]);
        set_field!(ctx, address.words[2], user_ip6[2]);
        set_field!(ctx, address.words[3], user_ip6[3]);
    }
}

#[inline(always)]
fn cookie(ctx: *mut bpf_sock_addr) -> u64 {
    // SAFETY: the context is valid.
    unsafe { bpf_get_socket_cookie(ctx.cast()) }
}

#[inline(always)]
fn netns_cookie(ctx: *mut bpf_sock_addr) -> u64 {
    // SAFETY: the context is valid.
    unsafe { bpf_get_netns_cookie(ctx.cast()) }
}

#[inline(always)]
fn refuse() -> i32 {
    count(Counter::SocketRefused);
    // SAFETY: takes a number; what it sets is the errno the caller of connect or sendmsg gets.
    unsafe { bpf_set_retval(-ECONNREFUSED) };
    REFUSE
}

/// The frontend the socket names, if it is one and serves this socket.
#[inline(always)]
fn frontend(ctx: *mut bpf_sock_addr, key: &FrontendKey) -> Option<Frontend> {
    // SAFETY: the map's elements are replaced, never rewritten in place.
    let found = *unsafe { FRONTENDS.get(key) }?;
    if found.flags & (frontend_flag::HOST_NETNS_ONLY | frontend_flag::RESTRICTED) != 0 {
        let host = NODE.get(0)?.host_netns_cookie;
        if netns_cookie(ctx) != host {
            return None;
        }
    }
    Some(found)
}

/// Whether the node itself is not among those who may connect; what is meant for pods never comes as far as here.
#[inline(always)]
fn is_forbidden(found: &Frontend) -> bool {
    let flags = found.flags & (frontend_flag::RESTRICTED | frontend_flag::HOST_ALLOWED);
    flags == frontend_flag::RESTRICTED
}

/// What a firewall's drop says to a sender on the same host: `EPERM`, the kernel's own answer to a program's 0.
#[inline(always)]
fn forbid() -> i32 {
    count(Counter::DroppedSource);
    REFUSE
}

/// There is no backend. Where the Service has some elsewhere, a pod's packets are dropped at its device, and the node is told
/// what a firewall's drop tells.
#[inline(always)]
fn none_for(ctx: *mut bpf_sock_addr, found: &Frontend) -> i32 {
    if found.flags & frontend_flag::DROP_WHEN_EMPTY == 0 {
        return refuse();
    }
    let host = NODE.get(0).map_or(0, |node| node.host_netns_cookie);
    if netns_cookie(ctx) != host {
        return ALLOW;
    }
    count(Counter::DroppedNoLocal);
    REFUSE
}

/// Whether the address belongs to a Service: at a port nobody serves there is nothing behind it.
#[inline(always)]
fn is_cluster_ip(address: &Address) -> bool {
    ADDRESSES.get_ptr(address).is_some()
}

#[inline(always)]
fn frontend_key<F: Family>(ctx: *mut bpf_sock_addr) -> FrontendKey {
    FrontendKey {
        address: F::address(ctx),
        port: field!(ctx, user_port) as u16,
        protocol: field!(ctx, protocol) as u8,
        zero: 0,
    }
}

/// Points the socket at the backend, and remembers what the client named.
#[inline(always)]
fn redirect<F: Family>(
    ctx: *mut bpf_sock_addr,
    cookie: u64,
    named: &FrontendKey,
    address: &Address,
    port: u16,
) {
    let key = PeerKey {
        cookie,
        address: *address,
        port,
        zero: [0; 3],
    };
    let peer = Peer {
        address: named.address,
        port: named.port,
        protocol: named.protocol,
        zero: 0,
    };
    // SAFETY: read field by field and compared alone; a torn read at worst writes the entry anew.
    let known = match unsafe { SOCKET_PEERS.get(&key) } {
        Some(known) => known.address == peer.address && known.port == peer.port,
        None => false,
    };
    if !known {
        // Full memory aside this cannot fail; then the client sees the backend's address, and all else works.
        let _ = SOCKET_PEERS.insert(&key, &peer, 0);
    }
    F::set_address(ctx, address);
    set_field!(ctx, u32::from(port), user_port);
}

#[inline(always)]
fn connect<F: Family>(ctx: *mut bpf_sock_addr) -> i32 {
    let named = frontend_key::<F>(ctx);
    let Some(found) = frontend(ctx, &named) else {
        // A UDP socket is connected for other ends than to send as well: ping(8) learns its own address so.
        return if named.protocol == TCP && is_cluster_ip(&named.address) {
            refuse()
        } else {
            ALLOW
        };
    };
    if is_forbidden(&found) {
        return forbid();
    }
    let Some(backend) = choose(
        found.socket_service,
        || Address::netns(netns_cookie(ctx)),
        By::Chance,
    ) else {
        return none_for(ctx, &found);
    };
    redirect::<F>(ctx, cookie(ctx), &named, &backend.address, backend.port);
    count(Counter::SocketConnections);
    ALLOW
}

#[inline(always)]
fn sendmsg<F: Family>(ctx: *mut bpf_sock_addr) -> i32 {
    let named = frontend_key::<F>(ctx);
    let Some(found) = frontend(ctx, &named) else {
        return if is_cluster_ip(&named.address) {
            refuse()
        } else {
            ALLOW
        };
    };
    if is_forbidden(&found) {
        return forbid();
    }
    let cookie = cookie(ctx);
    let key = ChoiceKey {
        cookie,
        address: named.address,
        port: named.port,
        zero: [0; 3],
    };
    // SAFETY: one socket's entry is written by that socket's sends alone; a torn read fails the member check.
    if let Some(choice) = unsafe { SOCKET_CHOICES.get(&key) } {
        let choice = *choice;
        if member(found.socket_service, &choice.address, choice.port).is_some() {
            redirect::<F>(ctx, cookie, &named, &choice.address, choice.port);
            return ALLOW;
        }
    }
    let Some(Backend { address, port, .. }) = choose(
        found.socket_service,
        || Address::netns(netns_cookie(ctx)),
        By::Chance,
    ) else {
        return none_for(ctx, &found);
    };
    let _ = SOCKET_CHOICES.insert(
        &key,
        &Choice {
            address,
            port,
            zero: 0,
        },
        0,
    );
    redirect::<F>(ctx, cookie, &named, &address, port);
    count(Counter::SocketConnections);
    ALLOW
}

/// Shows the frontend where the kernel is about to show the backend.
#[inline(always)]
fn show_frontend<F: Family>(ctx: *mut bpf_sock_addr) {
    let key = PeerKey {
        cookie: cookie(ctx),
        address: F::address(ctx),
        port: field!(ctx, user_port) as u16,
        zero: [0; 3],
    };
    // SAFETY: an entry never changes its frontend but by a new send of the same socket.
    if let Some(peer) = unsafe { SOCKET_PEERS.get(&key) } {
        let peer = *peer;
        F::set_address(ctx, &peer.address);
        set_field!(ctx, u32::from(peer.port), user_port);
    }
}

#[cgroup_sock_addr(connect4)]
fn connect4(ctx: SockAddrContext) -> i32 {
    connect::<V4>(ctx.sock_addr)
}

#[cgroup_sock_addr(connect6)]
fn connect6(ctx: SockAddrContext) -> i32 {
    connect::<V6>(ctx.sock_addr)
}

#[cgroup_sock_addr(sendmsg4)]
fn sendmsg4(ctx: SockAddrContext) -> i32 {
    sendmsg::<V4>(ctx.sock_addr)
}

#[cgroup_sock_addr(sendmsg6)]
fn sendmsg6(ctx: SockAddrContext) -> i32 {
    sendmsg::<V6>(ctx.sock_addr)
}

// The kernel wants 1 from the four below, whatever happens.

#[cgroup_sock_addr(recvmsg4)]
fn recvmsg4(ctx: SockAddrContext) -> i32 {
    show_frontend::<V4>(ctx.sock_addr);
    ALLOW
}

#[cgroup_sock_addr(recvmsg6)]
fn recvmsg6(ctx: SockAddrContext) -> i32 {
    show_frontend::<V6>(ctx.sock_addr);
    ALLOW
}

#[cgroup_sock_addr(getpeername4)]
fn getpeername4(ctx: SockAddrContext) -> i32 {
    show_frontend::<V4>(ctx.sock_addr);
    ALLOW
}

#[cgroup_sock_addr(getpeername6)]
fn getpeername6(ctx: SockAddrContext) -> i32 {
    show_frontend::<V6>(ctx.sock_addr);
    ALLOW
}
