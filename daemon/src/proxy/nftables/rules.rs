//! The chains and rules that are made as they are needed, by netlink, in the same transaction as the elements that lead there: one
//! chain for each number of endpoints there are, one for each of those that asks who the client is first, and one rule for each
//! time-out of session affinity.
//!
//! nft 1.0 can write neither of them: it takes the first for a rule about TCP once the map is there, and runs out of
//! registers for the second.

use super::elements::{SetKind, digit};
use super::skeleton::TABLE;
use crate::netfilter::wire::{Attributes, Batch};
use crate::state::service_port::Family;

/// `NFT_MSG_NEWCHAIN`, `NFT_MSG_NEWRULE`, `NFT_MSG_NEWSET`.
const NEW_CHAIN: u16 = 3;
const NEW_RULE: u16 = 6;
const NEW_SET: u16 = 9;
/// `enum nft_chain_attributes`, `enum nft_rule_attributes`.
const CHAIN_TABLE: u16 = 1;
const CHAIN_NAME: u16 = 3;
const CHAIN_HOOK: u16 = 4;
const CHAIN_POLICY: u16 = 5;
const CHAIN_TYPE: u16 = 7;
/// `enum nft_hook_attributes`.
const HOOK_NUMBER: u16 = 1;
const HOOK_PRIORITY: u16 = 2;
const RULE_TABLE: u16 = 1;
const RULE_CHAIN: u16 = 2;
const RULE_EXPRESSIONS: u16 = 4;
/// `NFTA_LIST_ELEM`, `enum nft_expr_attributes`, `NFTA_DATA_VALUE`.
const LIST_ELEMENT: u16 = 1;
const NAME: u16 = 1;
const DATA: u16 = 2;
const VALUE: u16 = 1;
/// `NFTA_DATA_VERDICT`, `enum nft_verdict_attributes`.
pub const VERDICT: u16 = 2;
pub const VERDICT_CODE: u16 = 1;
pub const VERDICT_CHAIN: u16 = 2;

/// `NF_ACCEPT`, `NF_IP_PRI_MANGLE`.
const ACCEPT: u32 = 1;
const MANGLE: i32 = -150;
/// `NFT_JUMP`, `NFT_GOTO`.
const JUMP: i32 = -3;
pub const GOTO: i32 = -4;

/// The chains that take down which endpoint a client was given, and their hooks: `NF_INET_POST_ROUTING` and, for what the node
/// itself answers, `NF_INET_LOCAL_IN`. Every packet passes them, so they are there only once a Service has session affinity.
pub const LEARN: [(&str, u32); 2] = [("learn", 4), ("learn-here", 1)];

/// `NFT_REG_1`, which is the four words from `NFT_REG32_00` on.
const FIRST: u32 = 1;
const FIRST_WORD: u32 = 8;

/// `NFT_META_NFPROTO`, `NFT_META_L4PROTO`.
const NETWORK_PROTOCOL: u32 = 15;
const TRANSPORT_PROTOCOL: u32 = 16;
/// `NFT_PAYLOAD_NETWORK_HEADER`, `NFT_PAYLOAD_TRANSPORT_HEADER`.
const NETWORK: u32 = 1;
const TRANSPORT: u32 = 2;
/// `NFT_NG_RANDOM`, `NFT_NAT_DNAT`, `NFT_DYNSET_OP_UPDATE`.
const RANDOM: u32 = 1;
const DESTINATION: u32 = 1;
const UPDATE: u32 = 1;
/// `NFT_CMP_EQ`, `NFT_CMP_NEQ`.
const EQUAL: u32 = 0;
const UNEQUAL: u32 = 1;
/// `enum nft_ct_keys`, and `IP_CT_DIR_ORIGINAL`.
const CT_STATE: u32 = 0;
const CT_STATUS: u32 = 2;
const CT_PORT: u32 = 12;
const CT_ADDRESS_V4: u32 = 20;
const CT_ADDRESS_V6: u32 = 22;
const ORIGINAL: u8 = 0;
/// The bit of `IP_CT_NEW` in the state, `IPS_DST_NAT` in the status.
const STATE_NEW: u32 = 8;
const STATUS_TRANSLATED: u32 = 0x20;
/// nft(8)'s numbers for `ipv4_addr`, `ipv6_addr`, `inet_proto`, `inet_service`, for itself to show the set by.
const TYPES: [u32; 4] = [7, 8, 12, 13];

/// Adds the chain `name`, which picks one of `count` endpoints whose numbers begin at `offset`. As text:
/// `dnat ip to ip daddr . meta l4proto . th dport . numgen random mod COUNT offset OFFSET map @endpoints4`.
pub fn push_picker(batch: &mut Batch, name: &str, family: Family, count: u32, offset: u32) {
    push_chain(batch, name, |_| {});
    push_rule(batch, name, |list| {
        let words = Words::of(family);
        let (protocol, port, index) = (words.at(1), words.at(1) + 1, words.at(1) + 2);
        list.only(words);
        list.destination(FIRST, words);
        list.with("meta", &[(1, protocol), (2, TRANSPORT_PROTOCOL)]);
        list.port(port);
        list.with("numgen", &[(1, index), (2, count), (3, RANDOM), (4, offset)]);
        list.add("lookup", &[(2, FIRST), (3, FIRST)], |data| {
            data.put_str(1, &SetKind::Endpoints.name(family));
        });
        // What is found is an address and, behind it, a port.
        let found = words.at(1);
        let to = [(3, FIRST), (4, FIRST), (5, found), (6, found)];
        list.add("nat", &[(1, DESTINATION), (2, words.number)], |data| {
            put_numbers(data, &to)
        });
    });
}

/// Adds the chain `name`, which asks who the client is and goes on to `behind`. As text: `jump check4`, `goto BEHIND`.
pub fn push_checked(batch: &mut Batch, name: &str, family: Family, behind: &str) {
    push_chain(batch, name, |_| {});
    push_rule(batch, name, |list| {
        list.lead(JUMP, &format!("check{}", digit(family)))
    });
    push_rule(batch, name, |list| list.lead(GOTO, behind));
}

/// Adds one of [`LEARN`]. As text: `type filter hook HOOK priority mangle; policy accept;`.
pub fn push_learning(batch: &mut Batch, name: &str, hook: u32) {
    push_chain(batch, name, |chain| {
        chain.nest(CHAIN_HOOK, |attributes| {
            put_numbers(attributes, &[(HOOK_NUMBER, hook), (HOOK_PRIORITY, MANGLE as u32)]);
        });
        put_numbers(chain, &[(CHAIN_POLICY, ACCEPT)]);
        chain.put_str(CHAIN_TYPE, "filter");
    });
}

fn push_chain(batch: &mut Batch, name: &str, fill: impl FnOnce(&mut Attributes)) {
    let mut chain = Attributes::default();
    chain.put_str(CHAIN_TABLE, TABLE).put_str(CHAIN_NAME, name);
    fill(&mut chain);
    batch.push(NEW_CHAIN, libc::NLM_F_CREATE, &chain);
}

/// Adds the set `name` of frontends whose clients stay for `seconds`, and the rules that take down where they are. As text:
/// `ct state new ct status dnat ct original ip daddr . meta l4proto . ct original proto-dst @NAME
/// update @affinity4 { ip saddr . ct original ip daddr . meta l4proto . ct original proto-dst timeout SECONDSs : ip daddr . th dport }`.
pub fn push_sticky(batch: &mut Batch, name: &str, family: Family, seconds: u32, id: u32) {
    let words = Words::of(family);
    let [v4, v6, protocol, port] = TYPES;
    let address = if family == Family::V4 { v4 } else { v6 };
    let mut set = Attributes::default();
    set.put_str(1, TABLE).put_str(2, name);
    put_numbers(
        &mut set,
        &[
            (3, 0),
            (4, address << 12 | protocol << 6 | port),
            (5, 4 * (words.address + 2)),
            (10, id),
        ],
    );
    batch.push(NEW_SET, libc::NLM_F_CREATE, &set);
    for (chain, _) in LEARN {
        push_rule(batch, chain, |list| {
            list.only(words);
            list.bit(CT_STATE, STATE_NEW);
            list.bit(CT_STATUS, STATUS_TRANSLATED);
            list.original(FIRST_WORD, words);
            list.add("lookup", &[(2, FIRST_WORD)], |data| _ = data.put_str(1, name));
            let (asked, given) = (words.at(1), words.at(2) + 2);
            list.with(
                "payload",
                &[
                    (1, FIRST),
                    (2, NETWORK),
                    (3, words.source),
                    (4, 4 * words.address),
                ],
            );
            list.original(asked, words);
            list.with(
                "payload",
                &[
                    (1, given),
                    (2, NETWORK),
                    (3, words.destination),
                    (4, 4 * words.address),
                ],
            );
            list.port(given + words.address);
            list.add("dynset", &[(3, UPDATE), (4, FIRST), (5, given)], |data| {
                data.put_str(1, &format!("affinity{}", digit(family)));
                data.put(6, &(u64::from(seconds) * 1000).to_be_bytes());
            });
        });
    }
}

fn push_rule(batch: &mut Batch, chain: &str, fill: impl FnOnce(&mut Expressions)) {
    let mut rule = Attributes::default();
    rule.put_str(RULE_TABLE, TABLE).put_str(RULE_CHAIN, chain);
    let mut list = Expressions(Attributes::default());
    fill(&mut list);
    rule.nest(RULE_EXPRESSIONS, |attributes| attributes.append(&list.0));
    batch.push(NEW_RULE, libc::NLM_F_CREATE | libc::NLM_F_APPEND, &rule);
}

/// What differs between the families.
#[derive(Clone, Copy)]
struct Words {
    /// `NFPROTO_IPV4`, `NFPROTO_IPV6`.
    number: u32,
    /// Of an address, in registers of four bytes.
    address: u32,
    /// Where addresses are in the header, bytes.
    source: u32,
    destination: u32,
    /// The key of connection tracking for the address first asked for.
    original: u32,
}

impl Words {
    fn of(family: Family) -> Self {
        match family {
            Family::V4 => Self {
                number: 2,
                address: 1,
                source: 12,
                destination: 16,
                original: CT_ADDRESS_V4,
            },
            Family::V6 => Self {
                number: 10,
                address: 4,
                source: 8,
                destination: 24,
                original: CT_ADDRESS_V6,
            },
        }
    }

    /// The register behind that many addresses.
    fn at(self, addresses: u32) -> u32 {
        FIRST_WORD + addresses * self.address
    }
}

/// The expressions of a rule.
struct Expressions(Attributes);

impl Expressions {
    /// Packets of this family alone.
    fn only(&mut self, words: Words) {
        self.with("meta", &[(1, FIRST), (2, NETWORK_PROTOCOL)]);
        self.compare(EQUAL, &[words.number as u8]);
    }

    /// Connections with this bit alone.
    fn bit(&mut self, key: u32, bit: u32) {
        self.with("ct", &[(1, FIRST), (2, key)]);
        self.add("bitwise", &[(1, FIRST), (2, FIRST), (3, 4)], |data| {
            data.nest(4, |mask| _ = mask.put(VALUE, &bit.to_ne_bytes()));
            data.nest(5, |toggle| _ = toggle.put(VALUE, &[0; 4]));
        });
        self.compare(UNEQUAL, &[0; 4]);
    }

    fn compare(&mut self, how: u32, with: &[u8]) {
        self.add("cmp", &[(1, FIRST), (2, how)], |data| {
            data.nest(3, |value| _ = value.put(VALUE, with));
        });
    }

    /// The packet's destination address.
    fn destination(&mut self, register: u32, words: Words) {
        let length = 4 * words.address;
        self.with(
            "payload",
            &[(1, register), (2, NETWORK), (3, words.destination), (4, length)],
        );
    }

    /// The packet's destination port.
    fn port(&mut self, register: u32) {
        self.with("payload", &[(1, register), (2, TRANSPORT), (3, 2), (4, 2)]);
    }

    /// The frontend that was asked for, from this register on: address, protocol, port.
    fn original(&mut self, register: u32, words: Words) {
        self.add("ct", &[(1, register), (2, words.original)], |data| {
            _ = data.put(3, &[ORIGINAL])
        });
        let behind = register + words.address;
        self.with("meta", &[(1, behind), (2, TRANSPORT_PROTOCOL)]);
        self.add("ct", &[(1, behind + 1), (2, CT_PORT)], |data| {
            _ = data.put(3, &[ORIGINAL])
        });
    }

    /// On to another chain.
    fn lead(&mut self, how: i32, chain: &str) {
        // `NFT_REG_VERDICT` is 0.
        self.add("immediate", &[(1, 0)], |data| {
            data.nest(2, |value| {
                value.nest(VERDICT, |verdict| {
                    put_numbers(verdict, &[(VERDICT_CODE, how as u32)]);
                    verdict.put_str(VERDICT_CHAIN, chain);
                });
            });
        });
    }

    fn with(&mut self, name: &str, numbers: &[(u16, u32)]) {
        self.add(name, numbers, |_| {});
    }

    /// An expression with these numbers, and what `more` adds.
    fn add(&mut self, name: &str, numbers: &[(u16, u32)], more: impl FnOnce(&mut Attributes)) {
        self.0.nest(LIST_ELEMENT, |expression| {
            expression.put_str(NAME, name);
            expression.nest(DATA, |data| {
                put_numbers(data, numbers);
                more(data);
            });
        });
    }
}

fn put_numbers(attributes: &mut Attributes, numbers: &[(u16, u32)]) {
    for (kind, number) in numbers {
        attributes.put(*kind, &number.to_be_bytes());
    }
}
