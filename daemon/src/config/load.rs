//! How the configuration is read, overridden and checked. Pure but for [`Config::load`].
//!
//! What is not understood is refused, with the line: an operator's typing slip must not become a default.

use std::path::{Path, PathBuf};

use serde::de;

use super::{Config, DEFAULT_PATH};
use crate::address::Family;
use crate::yaml;

/// Why the configuration was refused.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file could not be read.
    #[error("reading the configuration {path}: {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// The kernel's answer.
        source: std::io::Error,
    },
    /// The text is not a configuration.
    #[error("{path}: {error}")]
    Invalid {
        /// The file.
        path: PathBuf,
        /// Line, finding and remedy.
        error: yaml::YamlError,
    },
    /// An environment variable does not fit.
    #[error("the variable {name}={value:?}: {reason}")]
    Variable {
        /// Its name.
        name: &'static str,
        /// What it holds.
        value: String,
        /// What would be right.
        reason: String,
    },
    /// Each key is right, but not together.
    #[error("{path}: {reason}")]
    Inconsistent {
        /// The file.
        path: PathBuf,
        /// Which keys, and what would be right.
        reason: String,
    },
}

impl Config {
    /// Reads the file at `path`, applies the `SLUICE_*` variables, fills in the node's name.
    ///
    /// A file that is not there is an empty one, if `path` is the default one.
    ///
    /// # Errors
    /// [`ConfigError`]; nothing is half-applied.
    pub fn load(path: &Path, variable: impl Fn(&str) -> Option<String>) -> Result<Self, ConfigError> {
        let text = match std::fs::read_to_string(path) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound && path == Path::new(DEFAULT_PATH) => {
                String::new()
            }
            Err(source) => {
                return Err(ConfigError::Read {
                    path: path.to_owned(),
                    source,
                });
            }
        };
        let mut config = Self::written(path, &text)?;
        config.override_from(&variable)?;
        config.check(path)?;
        if config.node_name.is_empty() {
            let hostname = || {
                nix::unistd::gethostname()
                    .ok()
                    .and_then(|name| name.into_string().ok())
            };
            config.node_name = variable("NODE_NAME").or_else(hostname).unwrap_or_default();
        }
        Ok(config)
    }

    /// Parses `text`, the content of the file at `path`.
    ///
    /// # Errors
    /// [`ConfigError::Invalid`] with the line, or [`ConfigError::Inconsistent`].
    pub fn parse(path: &Path, text: &str) -> Result<Self, ConfigError> {
        let config = Self::written(path, text)?;
        config.check(path)?;
        Ok(config)
    }

    fn written(path: &Path, text: &str) -> Result<Self, ConfigError> {
        let empty = text
            .lines()
            .all(|line| line.trim().is_empty() || line.trim_start().starts_with('#'));
        if empty {
            return Ok(Self::default());
        }
        yaml::parse(text).map_err(|error| ConfigError::Invalid {
            path: path.to_owned(),
            error,
        })
    }

    fn check(&self, path: &Path) -> Result<(), ConfigError> {
        match self.inconsistency() {
            Some(reason) => Err(ConfigError::Inconsistent {
                path: path.to_owned(),
                reason,
            }),
            None => Ok(()),
        }
    }

    fn inconsistency(&self) -> Option<String> {
        if self.cluster_cidrs.is_empty() {
            return Some(
                "clusterCIDRs is empty; name at least one network, as in [10.244.0.0/16]".to_owned(),
            );
        }
        let orphan = self
            .service_cidrs
            .iter()
            .find(|cidr| !self.cluster_cidrs.has(Family::of(cidr.ip())));
        if let Some(cidr) = orphan {
            return Some(format!(
                "serviceCIDRs has {cidr}, but clusterCIDRs has no network of that address family; \
                 add one there or take {cidr} out"
            ));
        }
        let shared = self
            .service_cidrs
            .iter()
            .find_map(|services| Some((services, self.cluster_cidrs.overlapping(services)?)));
        if let Some((services, pods)) = shared {
            return Some(format!(
                "serviceCIDRs has {services}, which overlaps {pods} of clusterCIDRs: a Service could get a pod's address; \
                 write both as the cluster has them (kubeadm's serviceSubnet and podSubnet), or serviceCIDRs: [] if what gives out \
                 pod CIDRs there leaves those of Services out"
            ));
        }
        if self.network.vxlan.vni == 0 || self.network.vxlan.vni >= 1 << 24 {
            return Some(format!(
                "network.vxlan.vni is {}; 1 to 16777215 is wanted",
                self.network.vxlan.vni
            ));
        }
        if self.network.mtu != 0 && !(1280..=65535).contains(&self.network.mtu) {
            let mtu = self.network.mtu;
            return Some(format!(
                "network.mtu is {mtu}; 0 (found from the uplink) or 1280 to 65535 is wanted"
            ));
        }
        self.datastore.inconsistency(&self.cluster_cidrs)
    }

    fn override_from(&mut self, variable: impl Fn(&str) -> Option<String>) -> Result<(), ConfigError> {
        if let Some(value) = variable("SLUICE_NODE_NAME") {
            self.node_name = value;
        }
        if let Some(value) = variable("SLUICE_MANIFESTS_DIRECTORY") {
            self.datastore.manifests.directory = PathBuf::from(value);
        }
        if let Some(value) = variable("SLUICE_KUBECONFIG") {
            self.datastore.kubernetes.kubeconfig = PathBuf::from(value);
        }
        override_key(&variable, "SLUICE_DATASTORE_KIND", &mut self.datastore.kind)?;
        override_key(
            &variable,
            "SLUICE_API_SERVER",
            &mut self.datastore.kubernetes.api_server,
        )?;
        override_key(
            &variable,
            "SLUICE_ETCD_ENDPOINTS",
            &mut self.datastore.etcd.endpoints,
        )?;
        override_key(&variable, "SLUICE_NETWORK_BACKEND", &mut self.network.backend)?;
        override_key(&variable, "SLUICE_PROXY_MODE", &mut self.proxy.mode)?;
        override_key(&variable, "SLUICE_LOG_LEVEL", &mut self.log.level)?;
        override_key(&variable, "SLUICE_LOG_FORMAT", &mut self.log.format)
    }
}

fn override_key<T: de::DeserializeOwned>(
    variable: impl Fn(&str) -> Option<String>,
    name: &'static str,
    key: &mut T,
) -> Result<(), ConfigError> {
    if let Some(value) = variable(name) {
        *key = yaml::parse(&value).map_err(|error| ConfigError::Variable {
            name,
            value,
            reason: error.message,
        })?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::ProxyMode;
    use super::*;

    fn parse(text: &str) -> Result<Config, String> {
        Config::parse(Path::new("config.yaml"), text).map_err(|error| error.to_string())
    }

    #[test]
    fn nothing_written_is_all_defaults() {
        assert_eq!(parse("# nothing\n").unwrap(), Config::default());
    }

    #[test]
    fn defaults_survive_a_round_trip() {
        let text = serde_json::to_string(&Config::default()).unwrap();
        assert_eq!(parse(&text).unwrap(), Config::default());
    }

    #[test]
    fn refusals_name_the_line_the_finding_and_the_remedy() {
        for (text, wanted) in [
            (
                "nodeName: a\nclusterCIDR: []\n",
                "config.yaml: line 2: unknown key \"clusterCIDR\"; did you mean \"clusterCIDRs\"?",
            ),
            (
                "clusterCIDRs:\n- 10.244.0.0/16\n- 10.244.0.0/160\n",
                "config.yaml: line 3: \"10.244.0.0/160\" is not a CIDR",
            ),
            (
                "clusterCIDRs: [10.244.0.0]\n",
                "\"10.244.0.0\" is not a CIDR: write an address and a prefix length",
            ),
            (
                "clusterCIDRs: [10.1.0.0/16, 10.2.0.0/16]\n",
                "10.1.0.0/16 and 10.2.0.0/16 are of one address family",
            ),
            (
                "serviceCIDRs: ['fd00:96::/112']\n",
                "no network of that address family",
            ),
            (
                "clusterCIDRs: [10.96.0.0/16]\n",
                "serviceCIDRs has 10.96.0.0/12, which overlaps 10.96.0.0/16 of clusterCIDRs",
            ),
            (
                "serviceCIDRs: [10.244.128.0/20]\n",
                "serviceCIDRs has 10.244.128.0/20, which overlaps 10.244.0.0/16 of clusterCIDRs",
            ),
            (
                "network:\n  backend: vxlam\n",
                "line 2: unknown value \"vxlam\"; did you mean \"vxlan\"?",
            ),
            (
                "network:\n\tbackend: vxlan\n",
                "line 2: a tab is used for indentation",
            ),
            (
                "ipam:\n  reserved:\n  - 10.244.0.7\n  - 10.244.0.0/33\n",
                "line 4: \"10.244.0.0/33\" is not a CIDR",
            ),
            (
                "ipam: { reserved: [ten] }\n",
                "\"ten\" is neither an address nor a CIDR: write one as in 10.244.0.7 or 10.244.0.0/28",
            ),
            ("network: { mtu: 70000 }\n", "network.mtu is 70000"),
            (
                "datastore: { kind: etcd }\n",
                "datastore.kind is etcd, but datastore.etcd.endpoints is empty",
            ),
            (
                "datastore:\n  kind: etcd\n  etcd: { endpoints: [etcd1] }\n",
                "line 3: \"etcd1\" is not a member of etcd; something like https://192.0.2.1:2379 is wanted",
            ),
            (
                "datastore: { kind: etcd, etcd: { endpoints: [https://192.0.2.1:2379] } }\n",
                "datastore.etcd.caFile is empty",
            ),
            (
                "datastore: { kind: etcd, etcd: { endpoints: [http://192.0.2.1:2379], username: sluice } }\n",
                "datastore.etcd.username is set and passwordFile is not",
            ),
            (
                "datastore: { kind: etcd, etcd: { endpoints: [http://192.0.2.1:2379], nodeCIDRMaskSizeIPv4: 12 } }\n",
                "datastore.etcd.nodeCIDRMaskSizeIPv4 is 12; 16 to 30 fit into 10.244.0.0/16",
            ),
        ] {
            let error = parse(text).unwrap_err();
            assert!(
                error.contains(wanted),
                "{text:?} gave {error:?}, wanted {wanted:?}"
            );
        }
    }

    /// I5
    #[test]
    fn single_addresses_can_be_reserved_as_well_as_networks() {
        let config = parse("ipam: { reserved: [10.244.0.7, 'fd00::9', 10.244.1.17/28] }\n").unwrap();
        let reserved: Vec<_> = config.ipam.reserved.iter().map(ToString::to_string).collect();
        assert_eq!(reserved, ["10.244.0.7/32", "fd00::9/128", "10.244.1.16/28"]);
    }

    #[test]
    fn host_bits_are_dropped() {
        let config = parse("clusterCIDRs: [10.244.3.4/16]\n").unwrap();
        assert_eq!(config.cluster_cidrs, Config::default().cluster_cidrs);
    }

    #[test]
    fn variables_override_and_are_checked() {
        let mut config = Config::default();
        config
            .override_from(|name| (name == "SLUICE_PROXY_MODE").then(|| "off".to_owned()))
            .unwrap();
        assert_eq!(config.proxy.mode, ProxyMode::Off);
        let error = config
            .override_from(|name| (name == "SLUICE_PROXY_MODE").then(|| "epbf".to_owned()))
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("SLUICE_PROXY_MODE") && error.contains("did you mean \"ebpf\""),
            "{error}"
        );
    }
}
