//! Limits on what a pod receives and sends: token buckets on devices of the host, where the pod cannot reach them.
//!
//! What goes into the pod leaves the host by the host's end of its pair: a `tbf` there limits it. What comes out of the
//! pod comes in at that end, where the kernel cannot queue: it is led through a device of its own (`ifb`) whose `tbf`
//! limits it, and goes on as if nothing had been. The buckets go with their devices; the `ifb` is removed with the
//! pair.

use netlink_packet_core::DefaultNla;
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::tc::{
    TcAction, TcActionAttribute, TcActionGeneric, TcActionMirrorOption, TcActionOption, TcActionType,
    TcAttribute, TcFilterU32Option, TcHandle, TcMessage, TcMirror, TcMirrorActionType, TcOption, TcU32Key,
    TcU32Selector, TcU32SelectorFlags,
};
use sluice_ipam::Attachment;

use crate::bandwidth::{Bandwidth, Limit};
use crate::error::{Code, Failure};
use crate::mac::{host_device, rate_device};
use crate::netlink::{Kind, Netlink, NetlinkError, Request};
use crate::requests;
use crate::wiring::{look_up, remove_with};

/// Attributes of a `tbf` and the link layer it counts in, include/uapi/linux/pkt_sched.h.
const TCA_TBF_PARMS: u16 = 1;
const TCA_TBF_RATE64: u16 = 4;
const TCA_TBF_BURST: u16 = 6;
const TC_LINKLAYER_ETHERNET: u8 = 1;

/// Where packets come in, below a `clsact`.
const WAY_IN: TcHandle = TcHandle {
    major: u16::MAX,
    minor: TcHandle::MIN_INGRESS,
};
/// The filter's priority: after the dataplane's programs, which have 1.
const PRIORITY: u32 = 100;

/// Limits the pod of `attachment`, whose pair is there, with `mtu` bytes. Makes all or says what failed; taking away
/// what was made is the caller's, with [`remove`] and the pair.
///
/// # Errors
/// Code 100 with the kernel's answer.
pub fn make(attachment: &Attachment, bandwidth: &Bandwidth, mtu: u32) -> Result<(), Failure> {
    if bandwidth.is_none() {
        return Ok(());
    }
    let mut host = Netlink::open()?;
    let name = host_device(attachment);
    let index = index_of(&mut host, &name)?;
    if let Some(limit) = &bandwidth.ingress {
        host.batch(&[bucket(&name, index, limit)])?;
    }
    let Some(limit) = &bandwidth.egress else {
        return Ok(());
    };
    let (own, alias) = (rate_device(attachment), attachment.to_string());
    // A device of its name is what a killed call left: whoever holds the addresses is alone at work for them.
    remove_with(&mut host, &own, &alias)?;
    host.batch(&[requests::make_ifb(&own, mtu)]).map_err(explain)?;
    host.batch(&[
        requests::set_alias(&own, &alias),
        requests::no_own_addresses(&own),
        requests::set_up(&own),
    ])?;
    let through = index_of(&mut host, &own)?;
    host.batch(&[
        bucket(&own, through, limit),
        // The dataplane's programs hang there as well.
        requests::make_clsact(&name, index),
        lead_through(&name, index, &own, through),
    ])
    .map_err(explain)?;
    Ok(())
}

/// Removes what [`make`] made beside the pair, if anything; says whether there was.
///
/// # Errors
/// Code 100 with the kernel's answer.
pub fn remove(host: &mut Netlink, attachment: &Attachment) -> Result<bool, Failure> {
    remove_with(host, &rate_device(attachment), &attachment.to_string())
}

/// What of `bandwidth` the kernel does not hold for `attachment`, whose pair is there; a line each.
///
/// # Errors
/// Code 100 with the kernel's answer.
pub fn differences(
    host: &mut Netlink,
    attachment: &Attachment,
    bandwidth: &Bandwidth,
) -> Result<Vec<String>, Failure> {
    let mut differences = Vec::new();
    let name = host_device(attachment);
    let index = index_of(host, &name)?;
    if let Some(limit) = &bandwidth.ingress {
        differences.extend(bucket_difference(host, &name, index, limit)?);
    }
    if let Some(limit) = &bandwidth.egress {
        let own = rate_device(attachment);
        let Some(link) = look_up(host, &own)? else {
            differences.push(format!(
                "the device {own}, which limits what the pod sends, is gone"
            ));
            return Ok(differences);
        };
        if !link.up {
            differences.push(format!("{own} is switched off"));
        }
        differences.extend(bucket_difference(host, &own, link.index, limit)?);
        let filters = host.batch(&[list_filters(&name, index)])?;
        if !filters.iter().any(|filter| leads_to(filter, index, link.index)) {
            differences.push(format!("what comes in at {name} is not led through {own}"));
        }
    }
    Ok(differences)
}

fn explain(error: NetlinkError) -> Failure {
    let missing = [libc::EOPNOTSUPP, libc::ENOENT]
        .iter()
        .any(|errno| error.is(*errno));
    let failure = Failure::from(error);
    if missing {
        return failure.with_details(
            "egressRate needs the kernel's ifb device, clsact qdisc, u32 filter and mirred action \
             (CONFIG_IFB, CONFIG_NET_SCH_INGRESS, CONFIG_NET_CLS_U32, CONFIG_NET_ACT_MIRRED)",
        );
    }
    failure
}

fn index_of(host: &mut Netlink, name: &str) -> Result<u32, Failure> {
    let link = look_up(host, name)?;
    link.map(|link| link.index)
        .ok_or_else(|| Failure::new(Code::Kernel, format!("looking for the device {name}: it is gone")))
}

fn message(index: u32, parent: TcHandle, handle: TcHandle, kind: &str) -> TcMessage {
    let mut message = TcMessage::with_index(i32::try_from(index).unwrap_or(i32::MAX));
    message.header.parent = parent;
    message.header.handle = handle;
    message.attributes = vec![TcAttribute::Kind(kind.to_owned())];
    message
}

/// Puts a token bucket where packets leave by the device.
fn bucket(name: &str, index: u32, limit: &Limit) -> Request {
    let handle = TcHandle { major: 1, minor: 0 };
    let mut message = message(index, TcHandle::ROOT, handle, "tbf");
    let options = tbf_options(limit).map(|(kind, value)| TcOption::Other(DefaultNla::new(kind, value)));
    message.attributes.push(TcAttribute::Options(options.into()));
    Request {
        doing: format!("limiting {name} to {} bytes/s", limit.rate),
        message: RouteNetlinkMessage::NewQueueDiscipline(message),
        kind: Kind::Put,
        tolerated: &[],
    }
}

/// `struct tc_tbf_qopt` and, beside it, what does not fit it; all in host order.
fn tbf_options(limit: &Limit) -> [(u16, Vec<u8>); 3] {
    let rate = u32::try_from(limit.rate).unwrap_or(u32::MAX);
    // struct tc_ratespec: cell_log, linklayer, overhead, cell_align, mpu, rate. Without a link layer the kernel would
    // want a table of times.
    let mut parameters = vec![0, TC_LINKLAYER_ETHERNET, 0, 0, 0, 0, 0, 0];
    parameters.extend(rate.to_ne_bytes());
    // No peak rate.
    parameters.extend([0; 12]);
    for word in [limit.queue(), limit.ticks(), 0] {
        parameters.extend(word.to_ne_bytes());
    }
    [
        (TCA_TBF_PARMS, parameters),
        (TCA_TBF_RATE64, limit.rate.to_ne_bytes().to_vec()),
        (TCA_TBF_BURST, limit.burst.to_ne_bytes().to_vec()),
    ]
}

/// Rate in bytes per second and burst in ticks, from the options of a `tbf`.
fn read_tbf(options: &[u8]) -> Option<(u64, u32)> {
    let mut rest = options;
    let (mut parameters, mut rate64) = (None, None);
    while let [a, b, c, d, ..] = *rest {
        let length = usize::from(u16::from_ne_bytes([a, b]));
        let value = rest.get(4..length)?;
        match u16::from_ne_bytes([c, d]) {
            TCA_TBF_PARMS => parameters = Some(value),
            TCA_TBF_RATE64 => rate64 = value.try_into().ok().map(u64::from_ne_bytes),
            _ => {}
        }
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    let word = |at: usize| Some(u32::from_ne_bytes(parameters?.get(at..at + 4)?.try_into().ok()?));
    Some((rate64.unwrap_or(u64::from(word(8)?)), word(28)?))
}

/// How the bucket of a device differs from `limit`.
fn bucket_difference(
    host: &mut Netlink,
    name: &str,
    index: u32,
    limit: &Limit,
) -> Result<Option<String>, NetlinkError> {
    // Asking for one is answered in different ways by different kernels; listing all by all of them.
    let answers = host.batch(&[Request {
        doing: format!("looking for the limit of {name}"),
        message: RouteNetlinkMessage::GetQueueDiscipline(TcMessage::default()),
        kind: Kind::List,
        tolerated: &[],
    }])?;
    let found = answers.iter().find_map(|answer| {
        let RouteNetlinkMessage::NewQueueDiscipline(message) = answer else {
            return None;
        };
        let own = u32::try_from(message.header.index) == Ok(index) && message.header.parent == TcHandle::ROOT;
        if !own || !message.attributes.contains(&TcAttribute::Kind("tbf".to_owned())) {
            return None;
        }
        message.attributes.iter().find_map(|attribute| match attribute {
            TcAttribute::Options(options) => match options.first() {
                Some(TcOption::Other(options)) => read_tbf(netlink_value(options).as_slice()),
                _ => None,
            },
            _ => None,
        })
    });
    let Some((rate, ticks)) = found else {
        return Ok(Some(format!("{name} has no limit")));
    };
    if rate != limit.rate {
        let wanted = limit.rate;
        return Ok(Some(format!(
            "{name} is limited to {rate} bytes/s and not {wanted}"
        )));
    }
    // The kernel rounds on its way from bytes to time.
    let slack = limit.ticks() / 1000 + 2;
    if ticks.abs_diff(limit.ticks()) > slack {
        let burst = u128::from(ticks) * 64 * u128::from(rate) / 1_000_000_000;
        return Ok(Some(format!(
            "{name} has a burst of {burst} bytes and not {}",
            limit.burst
        )));
    }
    Ok(None)
}

fn netlink_value(attribute: &DefaultNla) -> Vec<u8> {
    use netlink_packet_core::Nla;
    let mut value = vec![0; attribute.value_len()];
    attribute.emit_value(&mut value);
    value
}

/// Leads every packet that comes in at the device through another, which gives it back when its turn has come.
fn lead_through(name: &str, index: u32, through: &str, through_index: u32) -> Request {
    let mut message = message(index, WAY_IN, TcHandle::UNSPEC, "u32");
    // Priority, and in the lower half the protocol in network order: all of them.
    let all = u16::try_from(libc::ETH_P_ALL).unwrap_or_default();
    message.header.info = PRIORITY << 16 | u32::from(all.to_be());
    let mut mirror = TcMirror::default();
    let mut generic = TcActionGeneric::default();
    generic.action = TcActionType::Stolen;
    mirror.generic = generic;
    mirror.eaction = TcMirrorActionType::EgressRedir;
    mirror.ifindex = through_index;
    let mut action = TcAction::default();
    action.attributes = vec![
        TcActionAttribute::Kind("mirred".to_owned()),
        TcActionAttribute::Options(vec![TcActionOption::Mirror(TcActionMirrorOption::Parms(mirror))]),
    ];
    // A key whose mask is empty fits everything.
    let mut selector = TcU32Selector::default();
    selector.flags = TcU32SelectorFlags::Terminal;
    selector.nkeys = 1;
    selector.keys = vec![TcU32Key::default()];
    message.attributes.push(TcAttribute::Options(vec![
        TcOption::U32(TcFilterU32Option::Selector(selector)),
        TcOption::U32(TcFilterU32Option::Action(vec![action])),
    ]));
    Request {
        doing: format!("leading what comes in at {name} through {through}"),
        message: RouteNetlinkMessage::NewTrafficFilter(message),
        kind: Kind::Create,
        tolerated: &[],
    }
}

fn list_filters(name: &str, index: u32) -> Request {
    let mut message = TcMessage::with_index(i32::try_from(index).unwrap_or(i32::MAX));
    message.header.parent = WAY_IN;
    Request {
        doing: format!("listing the filters where packets come in at {name}"),
        message: RouteNetlinkMessage::GetTrafficFilter(message),
        kind: Kind::List,
        tolerated: &[],
    }
}

/// Whether an answer is a filter at device `index` that leads through the device `through`.
fn leads_to(answer: &RouteNetlinkMessage, index: u32, through: u32) -> bool {
    let RouteNetlinkMessage::NewTrafficFilter(message) = answer else {
        return false;
    };
    let redirects = |attribute: &TcActionAttribute| match attribute {
        TcActionAttribute::Options(options) => options.iter().any(|option| {
            matches!(option, TcActionOption::Mirror(TcActionMirrorOption::Parms(mirror))
                if mirror.ifindex == through && mirror.eaction == TcMirrorActionType::EgressRedir)
        }),
        _ => false,
    };
    let acts = |option: &TcOption| match option {
        TcOption::U32(TcFilterU32Option::Action(actions)) => actions
            .iter()
            .any(|action| action.attributes.iter().any(redirects)),
        _ => false,
    };
    u32::try_from(message.header.index) == Ok(index)
        && message
            .attributes
            .iter()
            .any(|attribute| matches!(attribute, TcAttribute::Options(options) if options.iter().any(acts)))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// C10
    #[test]
    fn a_bucket_is_written_as_the_kernel_reads_it_and_read_back() {
        let limit = Limit {
            rate: 5_000_000_000,
            burst: 1_000_000,
        };
        let mut bytes = Vec::new();
        for (kind, value) in tbf_options(&limit) {
            assert_eq!(value.len(), [36, 8, 4][usize::from(kind / 3)], "attribute {kind}");
            bytes.extend(u16::try_from(value.len() + 4).unwrap().to_ne_bytes());
            bytes.extend(kind.to_ne_bytes());
            bytes.extend(value);
        }
        assert_eq!(read_tbf(&bytes), Some((limit.rate, limit.ticks())));
        for length in 0..bytes.len() {
            let _ = read_tbf(&bytes[..length]);
        }
    }
}
