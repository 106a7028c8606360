//! Address families, and networks and servers as people write them.

use std::net::{IpAddr, SocketAddr};

use http::Uri;
use ipnetwork::IpNetwork;
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

/// Address family.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Family {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

impl Family {
    /// The family of `address`.
    pub const fn of(address: IpAddr) -> Self {
        match address {
            IpAddr::V4(_) => Self::V4,
            IpAddr::V6(_) => Self::V6,
        }
    }
}

/// Networks, at most one per address family, without host bits.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
#[serde(transparent)]
pub struct Cidrs(Vec<IpNetwork>);

impl Cidrs {
    /// The one IPv4 network `address/prefix`, for defaults; a prefix over 32 is taken as 32.
    pub fn fixed(address: [u8; 4], prefix: u8) -> Self {
        Self(
            IpNetwork::new(address.into(), prefix.min(32))
                .into_iter()
                .collect(),
        )
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The networks, in the order they were written.
    pub fn iter(&self) -> impl Iterator<Item = &IpNetwork> {
        self.0.iter()
    }

    /// Whether there is one of this family.
    pub fn has(&self, family: Family) -> bool {
        self.0.iter().any(|cidr| Family::of(cidr.ip()) == family)
    }

    /// The one that shares addresses with `other`.
    pub fn overlapping(&self, other: &IpNetwork) -> Option<&IpNetwork> {
        self.0
            .iter()
            .find(|cidr| cidr.contains(other.network()) || other.contains(cidr.network()))
    }

    /// Whether `inner` lies wholly in one of them.
    pub fn contain(&self, inner: &IpNetwork) -> bool {
        self.0
            .iter()
            .any(|cidr| cidr.contains(inner.ip()) && cidr.prefix() <= inner.prefix())
    }
}

impl<'de> Deserialize<'de> for Cidrs {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let list = cidr_list(deserializer)?;
        for family in [Family::V4, Family::V6] {
            let of_family: Vec<_> = list
                .iter()
                .filter(|cidr| Family::of(cidr.ip()) == family)
                .map(ToString::to_string)
                .collect();
            if of_family.len() > 1 {
                return Err(de::Error::custom(format!(
                    "{} are of one address family; at most one network per family is wanted",
                    of_family.join(" and ")
                )));
            }
        }
        Ok(Self(list))
    }
}

/// A list of networks as people write them, of any family.
///
/// # Errors
/// The deserializer's, or the sentence of [`parse_cidr`] at the line of the network it is about.
pub fn cidr_list<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<IpNetwork>, D::Error> {
    Vec::<Cidr>::deserialize(deserializer).map(|list| list.into_iter().map(|cidr| cidr.0).collect())
}

/// One network as people write it; an element of its own so that an error points at its line.
struct Cidr(IpNetwork);

impl<'de> Deserialize<'de> for Cidr {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        parse_cidr(&text).map(Self).map_err(de::Error::custom)
    }
}

/// A list of networks or single addresses as people write them, of any family.
///
/// # Errors
/// As [`cidr_list`]'s.
pub fn network_list<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<IpNetwork>, D::Error> {
    Vec::<Network>::deserialize(deserializer).map(|list| list.into_iter().map(|network| network.0).collect())
}

/// One network or address as people write it.
struct Network(IpNetwork);

impl<'de> Deserialize<'de> for Network {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        if text.contains('/') {
            return parse_cidr(&text).map(Self).map_err(de::Error::custom);
        }
        let address: Result<IpAddr, _> = text.parse();
        address
            .map(|address| Self(IpNetwork::from(address)))
            .map_err(|_| {
                de::Error::custom(format!(
                    "{text:?} is neither an address nor a CIDR: write one as in 10.244.0.7 or 10.244.0.0/28"
                ))
            })
    }
}

/// Parses `address/length` and drops host bits.
///
/// # Errors
/// A sentence that quotes `text` and shows a right one.
pub fn parse_cidr(text: &str) -> Result<IpNetwork, String> {
    let wanted = "write an address and a prefix length, as in 10.244.0.0/16 or fd00:244::/48";
    if !text.contains('/') {
        return Err(format!("{text:?} is not a CIDR: {wanted}"));
    }
    let network: IpNetwork = text
        .parse()
        .map_err(|error| format!("{text:?} is not a CIDR ({error}): {wanted}"))?;
    IpNetwork::new(network.network(), network.prefix()).map_err(|error| format!("{text:?}: {error}"))
}

/// Servers' `https://` addresses, written as one text with commas between them.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ServerUrls(Vec<Uri>);

impl std::ops::Deref for ServerUrls {
    type Target = [Uri];

    fn deref(&self) -> &[Uri] {
        &self.0
    }
}

impl Serialize for ServerUrls {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let written: Vec<_> = self.iter().map(ToString::to_string).collect();
        serializer.serialize_str(&written.join(","))
    }
}

impl<'de> Deserialize<'de> for ServerUrls {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        let written = text.split(',').map(str::trim).filter(|server| !server.is_empty());
        let servers: Result<_, _> = written.map(parse_server).collect();
        servers.map(Self).map_err(de::Error::custom)
    }
}

/// An address and port to listen on, or none, which is written as an empty text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OptionalAddress(Option<SocketAddr>);

impl OptionalAddress {
    /// This one.
    pub const fn of(address: SocketAddr) -> Self {
        Self(Some(address))
    }

    /// The address, if there is one.
    pub fn get(&self) -> Option<SocketAddr> {
        self.0
    }
}

impl Serialize for OptionalAddress {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.0.map(|address| address.to_string()).unwrap_or_default())
    }
}

impl<'de> Deserialize<'de> for OptionalAddress {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        if text.is_empty() {
            return Ok(Self(None));
        }
        let wanted = "something like 0.0.0.0:10256 or [::]:10256 is wanted, or an empty text";
        let address = text
            .parse()
            .map_err(|_| de::Error::custom(format!("{text:?} is no address and port; {wanted}")))?;
        Ok(Self(Some(address)))
    }
}

/// Addresses of etcd's members, `http` or `https`; a list, or in a variable one text with commas between them.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
#[serde(transparent)]
pub struct MemberUrls(Vec<String>);

impl std::ops::Deref for MemberUrls {
    type Target = [String];

    fn deref(&self) -> &[String] {
        &self.0
    }
}

impl<'de> Deserialize<'de> for MemberUrls {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(MembersVisitor)
    }
}

struct MembersVisitor;

impl<'de> de::Visitor<'de> for MembersVisitor {
    type Value = MemberUrls;

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("a list of addresses, as in [https://192.0.2.1:2379]")
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<MemberUrls, E> {
        let written = text.split(',').map(str::trim).filter(|member| !member.is_empty());
        let members: Result<_, _> = written.map(parse_member).collect();
        members.map(MemberUrls).map_err(E::custom)
    }

    fn visit_seq<A: de::SeqAccess<'de>>(self, mut list: A) -> Result<MemberUrls, A::Error> {
        let mut members = Vec::new();
        while let Some(Member(member)) = list.next_element()? {
            members.push(member);
        }
        Ok(MemberUrls(members))
    }
}

/// One of a list, so that an error has its line.
struct Member(String);

impl<'de> Deserialize<'de> for Member {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        parse_member(&text).map(Self).map_err(de::Error::custom)
    }
}

fn parse_member(text: &str) -> Result<String, String> {
    let uri: Option<Uri> = text.parse().ok();
    uri.filter(|uri| is_bare(uri) && matches!(uri.scheme_str(), Some("http" | "https")))
        .map(|uri| uri.to_string().trim_end_matches('/').to_owned())
        .ok_or_else(|| {
            format!("{text:?} is not a member of etcd; something like https://192.0.2.1:2379 is wanted")
        })
}

/// Whether it is a host and nothing behind it.
fn is_bare(uri: &Uri) -> bool {
    uri.path_and_query().is_none_or(|path| path == "/") && uri.host().is_some_and(|host| !host.is_empty())
}

/// One server's address, without a path.
fn parse_server(text: &str) -> Result<Uri, String> {
    text.parse()
        .ok()
        .filter(|uri| is_bare(uri) && uri.scheme_str() == Some("https"))
        .ok_or_else(|| format!("{text:?} is not a server; something like https://192.0.2.1:6443 is wanted"))
}
