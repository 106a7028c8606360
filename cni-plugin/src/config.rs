//! The network config the runtime writes to stdin.
//!
//! Keys this plugin does not know are left alone, since runtimes add some. What only ADD and CHECK need is read only
//! for them ([`Config::wishes`]): a DEL must not fail over a wish it has no use for.

use std::io::Read;
use std::net::IpAddr;
use std::path::PathBuf;

use serde_json::{Map, Value};
use sluice_ipam::Attachment;

use crate::arguments::Arguments;
use crate::bandwidth::Bandwidth;
use crate::error::{Code, Failure};
use crate::host_ports::{HostPorts, Mapping, mappings};
use crate::mac::Mac;
use crate::names;
use crate::version::Version;

/// Largest config taken. Real ones are a few thousand bytes.
const MAX_BYTES: u64 = 1024 * 1024;

/// Pod annotation (handed over through the `io.kubernetes.cri.pod-annotations` capability) naming the addresses a pod
/// wants, separated by commas.
pub const IPS_ANNOTATION: &str = "sluice/ips";

/// A network config.
#[derive(Debug, Clone)]
pub struct Config {
    /// The version the runtime speaks.
    pub version: Version,
    /// The network's name.
    pub name: String,
    /// The node file, [`names::NODE_FILE`] unless `nodeFile` says otherwise.
    pub node_file: PathBuf,
    /// The address store, [`names::IPAM_DIRECTORY`] unless `ipamDirectory` says otherwise.
    pub ipam_directory: PathBuf,
    /// The daemon's socket for removals, [`names::REMOVALS_SOCKET`] unless `removalsSocket` says otherwise.
    pub removals_socket: PathBuf,
    keys: Map<String, Value>,
}

/// What a pod asks for beyond the usual.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Wishes {
    /// Its addresses, at most one per family.
    pub addresses: Vec<IpAddr>,
    /// Its MAC.
    pub mac: Option<Mac>,
    /// Ports of the node that lead to it.
    pub host_ports: Vec<Mapping>,
    /// How fast it may receive and send.
    pub bandwidth: Bandwidth,
}

impl Config {
    /// Reads and checks a config from `input`.
    ///
    /// # Errors
    /// Code 6 for what is no JSON, 1 for a version not spoken, 7 for a wrong value. The version is told where it could
    /// be read, for the error object.
    pub fn read(input: impl Read) -> Result<Self, (Option<Version>, Failure)> {
        let undecodable = |message: String| (None, Failure::new(Code::Decoding, message));
        let mut bytes = Vec::new();
        let read = input.take(MAX_BYTES + 1).read_to_end(&mut bytes);
        read.map_err(|error| undecodable(format!("reading the network config from stdin: {error}")))?;
        if bytes.len() as u64 > MAX_BYTES {
            return Err(undecodable(format!(
                "the network config on stdin is larger than {MAX_BYTES} bytes"
            )));
        }
        if bytes.trim_ascii().is_empty() {
            return Err(undecodable("there is no network config on stdin".to_owned()));
        }
        let keys = serde_json::from_slice::<Map<String, Value>>(&bytes).map_err(|error| {
            undecodable(format!("the network config on stdin is no JSON object: {error}"))
        })?;
        let version = match keys.get("cniVersion") {
            // The specification's first version had no such key.
            None => Some(Version::V0_1_0),
            Some(Value::String(text)) if text.is_empty() => Some(Version::V0_1_0),
            Some(Value::String(text)) => Version::parse(text),
            Some(_) => None,
        };
        let Some(version) = version else {
            let all = Version::ALL.map(Version::as_str).join(", ");
            let message = format!("cniVersion {}: is none of {all}", keys["cniVersion"]);
            return Err((None, Failure::new(Code::Version, message)));
        };
        Self::from_keys(version, keys).map_err(|failure| (Some(version), failure))
    }

    fn from_keys(version: Version, keys: Map<String, Value>) -> Result<Self, Failure> {
        let name = match keys.get("name") {
            Some(Value::String(name)) => name.clone(),
            Some(other) => return Err(wrong("name", other, "must be text")),
            None => return Err(Failure::new(Code::Config, "name: is missing")),
        };
        // The pattern is a container id's.
        if Attachment::new(&name, "eth0").is_err() {
            let why = "must begin with a letter or digit and hold only letters, digits, '_', '.', '-'";
            return Err(wrong("name", &Value::String(name), why));
        }
        let path = |key: &str, default: &str| match keys.get(key) {
            None => Ok(PathBuf::from(default)),
            Some(Value::String(path)) if path.starts_with('/') => Ok(PathBuf::from(path)),
            Some(other) => Err(wrong(key, other, "must be an absolute path")),
        };
        Ok(Self {
            version,
            name,
            node_file: path("nodeFile", names::NODE_FILE)?,
            ipam_directory: path("ipamDirectory", names::IPAM_DIRECTORY)?,
            removals_socket: path("removalsSocket", names::REMOVALS_SOCKET)?,
            keys,
        })
    }

    /// The host ports of this node's pods.
    pub fn host_ports(&self) -> HostPorts {
        HostPorts::beside(&self.ipam_directory)
    }

    /// Result of the plugins before, or of this pod's ADD.
    pub fn prev_result(&self) -> Option<&Value> {
        self.keys.get("prevResult").filter(|value| !value.is_null())
    }

    /// The `dns` key, for the result.
    pub fn dns(&self) -> Option<&Value> {
        self.keys.get("dns").filter(|value| value.is_object())
    }

    /// Whether the dataplane hangs its programs at a `clsact` qdisc of the pod's device, which is best made before anybody
    /// sends through it; not where the list has a plugin that wants that place itself.
    ///
    /// # Errors
    /// Code 7 for a wrong value.
    pub fn clsact(&self) -> Result<bool, Failure> {
        match self.keys.get("clsact") {
            None => Ok(false),
            Some(Value::Bool(wanted)) => Ok(*wanted),
            Some(other) => Err(wrong("clsact", other, "must be true or false")),
        }
    }

    /// The attachments GC must spare, under the key of the specification or the older one; nothing when neither is
    /// there.
    ///
    /// # Errors
    /// Code 7 for a list that is none.
    pub fn valid_attachments(&self) -> Result<Option<Vec<Attachment>>, Failure> {
        let found = ["cni.dev/valid-attachments", "cni.dev/attachments"]
            .into_iter()
            .find_map(|key| self.keys.get(key).map(|value| (key, value)));
        let Some((key, value)) = found else {
            return Ok(None);
        };
        // A runtime written in Go says `null` for an empty list.
        let entries = match value {
            Value::Null => &Vec::new(),
            Value::Array(entries) => entries,
            other => return Err(wrong(key, other, "must be a list")),
        };
        let mut attachments = Vec::new();
        for entry in entries {
            let part = |name: &str| entry.get(name).and_then(Value::as_str);
            let (Some(id), Some(ifname)) = (part("containerID"), part("ifname")) else {
                return Err(wrong(key, entry, "must have containerID and ifname"));
            };
            // Names that are refused on ADD cannot have been wired: nothing to spare.
            attachments.extend(Attachment::new(id, ifname));
        }
        Ok(Some(attachments))
    }

    /// What the pod asks for: `runtimeConfig` goes before `CNI_ARGS`, that before `args.cni`, and that before its
    /// annotations.
    ///
    /// # Errors
    /// Code 7 for a wrong value.
    pub fn wishes(&self, arguments: &Arguments) -> Result<Wishes, Failure> {
        let object = |key: &str, value: Option<&Value>| match value {
            None | Some(Value::Null) => Ok(Map::new()),
            Some(Value::Object(map)) => Ok(map.clone()),
            Some(other) => Err(wrong(key, other, "must be an object")),
        };
        let runtime = object("runtimeConfig", self.keys.get("runtimeConfig"))?;
        let args = object("args", self.keys.get("args"))?;
        let args = object("args.cni", args.get("cni"))?;
        let key = "io.kubernetes.cri.pod-annotations";
        let annotations = object(key, runtime.get(key))?;

        let mut wishes = Wishes::default();
        let old_list: Vec<&str> = arguments.addresses().collect();
        let (old_list, old_mac) = (Value::from(old_list), arguments.mac().map(Value::from));
        let lists = [
            ("runtimeConfig.ips", runtime.get("ips")),
            ("CNI_ARGS IP", Some(&old_list)),
            ("args.cni.ips", args.get("ips")),
        ];
        let annotated = annotations.get(IPS_ANNOTATION);
        if let Some((key, list)) = lists
            .into_iter()
            .find_map(|(key, list)| Some((key, list.filter(some)?)))
        {
            let Value::Array(list) = list else {
                return Err(wrong(key, list, "must be a list of addresses"));
            };
            for item in list {
                let text = item
                    .as_str()
                    .ok_or_else(|| wrong(key, item, "must be an address"))?;
                wishes.addresses.push(address(key, text)?);
            }
        } else if let Some(Value::String(list)) = annotated {
            for text in list.split(',') {
                wishes.addresses.push(address(IPS_ANNOTATION, text)?);
            }
        }
        let macs = [
            ("runtimeConfig.mac", runtime.get("mac")),
            ("CNI_ARGS MAC", old_mac.as_ref()),
            ("args.cni.mac", args.get("mac")),
        ];
        if let Some((key, value)) = macs
            .into_iter()
            .find_map(|(key, mac)| Some((key, mac.filter(some)?)))
        {
            let text = value
                .as_str()
                .ok_or_else(|| wrong(key, value, "must be a MAC address"))?;
            let mac = text
                .parse()
                .map_err(|why: String| Failure::new(Code::Config, format!("{key}: {why}")))?;
            wishes.mac = Some(mac);
        }
        // What the runtime says goes before what the args say; an empty wish is none.
        let wish = |key: &str| {
            [("runtimeConfig", &runtime), ("args.cni", &args)]
                .into_iter()
                .find_map(|(place, keys)| Some((format!("{place}.{key}"), keys.get(key).filter(some)?)))
        };
        if let Some((key, list)) = wish("portMappings") {
            wishes.host_ports = mappings(&key, list)?;
        }
        if let Some((key, limits)) = wish("bandwidth") {
            wishes.bandwidth = Bandwidth::read(&key, limits)?;
        }
        Ok(wishes)
    }
}

/// The value under `name`, else under a name that differs in case only: containerd writes the fields of capabilities
/// as its Go structures have them (`HostPort`, `IngressRate`), and Go's reader does not mind.
pub(crate) fn field<'a>(map: &'a Map<String, Value>, name: &str) -> Option<&'a Value> {
    let alike = || map.iter().find(|(key, _)| key.eq_ignore_ascii_case(name));
    map.get(name).or_else(|| alike().map(|(_, value)| value))
}

/// Neither absent nor empty.
fn some(value: &&Value) -> bool {
    match value {
        Value::Null => false,
        Value::String(text) => !text.is_empty(),
        Value::Array(items) => !items.is_empty(),
        _ => true,
    }
}

fn address(key: &str, text: &str) -> Result<IpAddr, Failure> {
    // Runtimes write a prefix length behind it, which says nothing here: a pod's address stands alone.
    let bare = text.split_once('/').map_or(text, |(address, _)| address).trim();
    let parsed = bare.parse();
    parsed.map_err(|_| Failure::new(Code::Config, format!("{key} {text:?}: is not an IP address")))
}

fn wrong(key: &str, value: &Value, why: &str) -> Failure {
    let mut shown = value.to_string();
    if let Some((cut, _)) = shown.char_indices().nth(200) {
        shown.truncate(cut);
        shown.push('…');
    }
    Failure::new(Code::Config, format!("{key} {shown}: {why}"))
}
