//! Kubernetes objects as they are written, and their checking into [`crate::state::objects`].
//!
//! The shapes are trimmed to what Sluice reads. A key that does not belong beside `spec` is refused, as `sepc` would
//! otherwise silently be an object without a spec; below that, unknown keys are newer Kubernetes' and pass.

use std::collections::BTreeMap;

use serde::Deserialize;

use crate::state::objects::{Object, ObjectName};
use crate::yaml::{self, YamlError};

mod endpoints;
mod fields;
mod node;
mod pod;
mod service;

/// What one YAML document came to.
pub enum Document {
    /// Objects Sluice uses; Endpoints may be several slices.
    Objects(Vec<Object>),
    /// Something Sluice does not look at.
    Other,
}

/// Parses and checks one document; line numbers in errors are those of `text`.
///
/// # Errors
/// What is wrong, where, and what would be right.
pub fn parse(text: &str) -> Result<Document, YamlError> {
    let head: Head = yaml::parse(text)?;
    let checked = match (head.api_version.as_str(), head.kind.as_str()) {
        ("v1", "Node") => yaml::parse::<node::RawNode>(text)?
            .check()
            .map(|node| vec![Object::Node(node)]),
        ("v1", "Service") => yaml::parse::<service::RawService>(text)?
            .check()
            .map(|service| vec![Object::Service(service)]),
        ("v1", "Pod") => yaml::parse::<pod::RawPod>(text)?
            .check()
            .map(|pod| vec![Object::Pod(pod)]),
        ("v1", "Endpoints") => yaml::parse::<endpoints::RawEndpoints>(text)?
            .check()
            .map(|slices| slices.into_iter().map(Object::EndpointSlice).collect()),
        ("discovery.k8s.io/v1", "EndpointSlice") => yaml::parse::<endpoints::RawEndpointSlice>(text)?
            .check()
            .map(|slice| vec![Object::EndpointSlice(slice)]),
        (version, kind @ ("Node" | "Service" | "Pod" | "Endpoints" | "EndpointSlice")) => {
            let wanted = if kind == "EndpointSlice" {
                "discovery.k8s.io/v1"
            } else {
                "v1"
            };
            Err(format!("{kind} with apiVersion {version:?}; {wanted} is wanted"))
        }
        (_, kind) => match yaml::likely(kind, ["Node", "Service", "Pod", "Endpoints", "EndpointSlice"]) {
            // Pods' controllers and the like share such folders: what resembles nothing of ours is not an error.
            Some(meant) => Err(format!("kind {kind:?} is unknown; did you mean {meant:?}?")),
            None => return Ok(Document::Other),
        },
    };
    checked
        .map(Document::Objects)
        .map_err(|message| YamlError { line: 0, message })
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Head {
    api_version: String,
    kind: String,
}

#[derive(Deserialize, Default)]
#[serde(default, rename_all = "camelCase")]
struct Metadata {
    name: String,
    namespace: Option<String>,
    labels: BTreeMap<String, String>,
    deletion_timestamp: Option<String>,
}

impl Metadata {
    fn checked_name(&self, kind: &str) -> Result<ObjectName, String> {
        let namespace = self.namespace.clone().unwrap_or_else(|| "default".to_owned());
        for (field, value) in [("name", &self.name), ("namespace", &namespace)] {
            let fits = !value.is_empty()
                && value.len() <= 253
                && value
                    .bytes()
                    .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b"-.".contains(&b));
            if !fits {
                return Err(format!(
                    "{kind}: metadata.{field} is {value:?}; lower-case letters, digits, '-' and '.' are wanted"
                ));
            }
        }
        Ok(ObjectName::new(namespace, self.name.clone()))
    }
}
