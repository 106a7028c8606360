//! Masquerading through nf_tables, by netlink (libnftnl): no process is started.

use std::collections::HashSet;
use std::ffi::{CStr, CString};
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::ptr::NonNull;

use anyhow::Context;
use ipnetwork::IpNetwork;
use nftnl::expr::Expression;
use nftnl::nftnl_sys::{self as sys, libc};
use nftnl::set::Set;
use nftnl::{
    Batch, Chain, ChainType, FinalizedBatch, Hook, MsgType, Policy, ProtoFamily, Rule, Table, nft_expr,
};

use super::Masquerade;
use crate::netfilter::wire::{Netfilter, Rules};

/// The table that is owned here, of the family `inet`.
pub const TABLE: &str = match NAME.to_str() {
    Ok(name) => name,
    Err(_) => unreachable!(),
};
const NAME: &CStr = c"sluice-egress";
const CHAIN: &CStr = c"postrouting";
/// `NF_IP_PRI_NAT_SRC` (include/uapi/linux/netfilter_ipv4.h).
const SOURCE_NAT_PRIORITY: i32 = 100;

/// Replaces the table by what `wanted` says, in one transaction; an empty `wanted` leaves no table.
///
/// # Errors
/// The kernel's answer; the old table is then still in force.
pub fn apply(wanted: &Masquerade) -> anyhow::Result<()> {
    send(&batch(wanted)).with_context(|| {
        format!("writing the nftables table inet {TABLE}; is CONFIG_NF_TABLES with NFT_MASQ there?")
    })
}

/// What the kernel shows of the table: its rules. What others change in it is seen by that, for its sets are constant.
///
/// # Errors
/// The kernel's answer to listing rules.
pub fn shown() -> anyhow::Result<Rules> {
    Netfilter::open()?
        .rules(TABLE)
        .context("listing the rules of egress")
}

/// Whether the table is there.
///
/// # Errors
/// The kernel's answer to listing tables.
pub fn present() -> anyhow::Result<bool> {
    let tables = tables().context("listing nftables tables")?;
    Ok(tables.contains(&CString::from(NAME)))
}

/// Whether [`present`] or [`shown`] failed because the kernel has no nf_tables (net/netfilter/nfnetlink.c: a message to a subsystem
/// that is not there is invalid), or no nfnetlink at all.
pub fn is_missing(error: &anyhow::Error) -> bool {
    let error = error
        .downcast_ref::<io::Error>()
        .and_then(io::Error::raw_os_error);
    matches!(error, Some(libc::EINVAL | libc::EPROTONOSUPPORT))
}

/// Removes the table; says whether it was there.
///
/// # Errors
/// The kernel's answer.
pub fn remove() -> anyhow::Result<bool> {
    let there = match present() {
        Err(error) if is_missing(&error) => false,
        result => result?,
    };
    if there {
        apply(&Masquerade::default())?;
    }
    Ok(there)
}

fn batch(wanted: &Masquerade) -> FinalizedBatch {
    let mut batch = Batch::new();
    let table = Table::new(NAME, ProtoFamily::Inet);
    // Deleting what may not be there is an error; adding it first, in the same transaction, is not.
    batch.add(&table, MsgType::Add);
    batch.add(&table, MsgType::Del);
    if wanted.sources.is_empty() {
        return batch.finalize();
    }
    batch.add(&table, MsgType::Add);
    let mut chain = Chain::new(CHAIN, &table);
    chain.set_type(ChainType::Nat);
    chain.set_hook(Hook::PostRouting, SOURCE_NAT_PRIORITY);
    chain.set_policy(Policy::Accept);
    batch.add(&chain, MsgType::Add);

    for network in &wanted.exempt_networks {
        let mut rule = Rule::new(&chain);
        match_network(&mut rule, network, Side::Destination);
        rule.add_expr(&nft_expr!(verdict accept));
        batch.add(&rule, MsgType::Add);
    }
    let v4: Vec<Ipv4Addr> = wanted.exempt_addresses.iter().filter_map(|a| ipv4(*a)).collect();
    let v6: Vec<Ipv6Addr> = wanted.exempt_addresses.iter().filter_map(|a| ipv6(*a)).collect();
    if !v4.is_empty() {
        let mut set = Set::<Ipv4Addr>::new(c"nodes-v4", 1, &table, ProtoFamily::Inet);
        v4.iter().for_each(|address| set.add(address));
        batch.add(&set, MsgType::Add);
        batch.add_iter(set.elems_iter(), MsgType::Add);
        let mut rule = Rule::new(&chain);
        match_family(&mut rule, libc::NFPROTO_IPV4);
        rule.add_expr(&nft_expr!(payload ipv4 daddr));
        rule.add_expr(&nft_expr!(lookup & set));
        rule.add_expr(&nft_expr!(verdict accept));
        batch.add(&rule, MsgType::Add);
    }
    if !v6.is_empty() {
        let mut set = Set::<Ipv6Addr>::new(c"nodes-v6", 2, &table, ProtoFamily::Inet);
        v6.iter().for_each(|address| set.add(address));
        batch.add(&set, MsgType::Add);
        batch.add_iter(set.elems_iter(), MsgType::Add);
        let mut rule = Rule::new(&chain);
        match_family(&mut rule, libc::NFPROTO_IPV6);
        rule.add_expr(&nft_expr!(payload ipv6 daddr));
        rule.add_expr(&nft_expr!(lookup & set));
        rule.add_expr(&nft_expr!(verdict accept));
        batch.add(&rule, MsgType::Add);
    }
    for network in &wanted.sources {
        let mut rule = Rule::new(&chain);
        match_network(&mut rule, network, Side::Source);
        rule.add_expr(&MasqueradeFullyRandom);
        batch.add(&rule, MsgType::Add);
    }
    batch.finalize()
}

#[derive(Clone, Copy)]
enum Side {
    Source,
    Destination,
}

fn match_family(rule: &mut Rule<'_>, family: i32) {
    rule.add_expr(&nft_expr!(meta nfproto));
    // NFPROTO_* are below 256 (include/uapi/linux/netfilter.h).
    rule.add_expr(&nft_expr!(cmp == family as u8));
}

fn match_network(rule: &mut Rule<'_>, network: &IpNetwork, side: Side) {
    match network {
        IpNetwork::V4(v4) => {
            match_family(rule, libc::NFPROTO_IPV4);
            match side {
                Side::Source => rule.add_expr(&nft_expr!(payload ipv4 saddr)),
                Side::Destination => rule.add_expr(&nft_expr!(payload ipv4 daddr)),
            }
            rule.add_expr(&nft_expr!(bitwise mask v4.mask(), xor 0u32));
            rule.add_expr(&nft_expr!(cmp == v4.network()));
        }
        IpNetwork::V6(v6) => {
            match_family(rule, libc::NFPROTO_IPV6);
            match side {
                Side::Source => rule.add_expr(&nft_expr!(payload ipv6 saddr)),
                Side::Destination => rule.add_expr(&nft_expr!(payload ipv6 daddr)),
            }
            rule.add_expr(&nft_expr!(bitwise mask v6.mask(), xor &[0u16; 8][..]));
            rule.add_expr(&nft_expr!(cmp == v6.network()));
        }
    }
}

/// `masquerade fully-random`: source ports are chosen at random, so that two nodes' pods that race for a port on one
/// address do not collide in the kernel's clash resolution (the 63 second DNS stalls).
struct MasqueradeFullyRandom;

impl Expression for MasqueradeFullyRandom {
    fn to_expr(&self, _rule: &Rule<'_>) -> NonNull<sys::nftnl_expr> {
        /// `NF_NAT_RANGE_PROTO_RANDOM_FULLY` (include/uapi/linux/netfilter/nf_nat.h).
        const FULLY_RANDOM: u32 = 1 << 4;
        // SAFETY: the name is a C string that lives for ever; libnftnl returns an owned expression or null.
        let expression = unsafe { sys::nftnl_expr_alloc(c"masq".as_ptr()) };
        let Some(expression) = NonNull::new(expression) else {
            panic!("libnftnl is out of memory")
        };
        // SAFETY: the expression was just allocated as "masq", which has this attribute as a u32.
        unsafe {
            sys::nftnl_expr_set_u32(
                expression.as_ptr(),
                sys::NFTNL_EXPR_MASQ_FLAGS as u16,
                FULLY_RANDOM,
            );
        }
        expression
    }
}

fn ipv4(address: IpAddr) -> Option<Ipv4Addr> {
    match address {
        IpAddr::V4(v4) => Some(v4),
        IpAddr::V6(_) => None,
    }
}

fn ipv6(address: IpAddr) -> Option<Ipv6Addr> {
    match address {
        IpAddr::V6(v6) => Some(v6),
        IpAddr::V4(_) => None,
    }
}

fn send(batch: &FinalizedBatch) -> io::Result<()> {
    let socket = mnl::Socket::new(mnl::Bus::Netfilter)?;
    let port = socket.portid();
    socket.send_all(batch)?;
    let mut buffer = vec![0; nftnl::nft_nlmsg_maxsize() as usize];
    let mut expected = batch.sequence_numbers();
    while !expected.is_empty() {
        for message in socket.recv(&mut buffer[..])? {
            let Some(sequence) = expected.next() else {
                return Err(io::Error::other(
                    "the kernel acknowledged more messages than were sent",
                ));
            };
            mnl::cb_run(message?, sequence, port)?;
        }
    }
    Ok(())
}

fn tables() -> io::Result<HashSet<CString>> {
    let socket = mnl::Socket::new(mnl::Bus::Netfilter)?;
    socket.send(&nftnl::table::get_tables_nlmsg(0))?;
    let port = socket.portid();
    let mut buffer = vec![0; nftnl::nft_nlmsg_maxsize() as usize];
    let mut tables = HashSet::new();
    loop {
        for message in socket.recv(&mut buffer[..])? {
            let outcome = mnl::cb_run2(message?, 0, port, nftnl::table::get_tables_cb, &mut tables)?;
            if matches!(outcome, mnl::CbResult::Stop) {
                return Ok(tables);
            }
        }
    }
}
