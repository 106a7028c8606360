//! An object as the API server sends it, checked and trimmed while it is read: nothing of its full size is kept.

use std::borrow::Cow;
use std::fmt;
use std::marker::PhantomData;

use kube::api::ObjectMeta;
use serde::{Deserialize, Deserializer};
use serde_json::Value;

use crate::datastore::wire;
use crate::state::objects::{Kind, ObjectName};

/// A kind of object that is watched.
pub trait Watched: kube::Resource<DynamicType = ()> + 'static {
    /// What it is called here.
    const KIND: Kind;
}

impl Watched for k8s_openapi::api::core::v1::Node {
    const KIND: Kind = Kind::Node;
}

impl Watched for k8s_openapi::api::core::v1::Service {
    const KIND: Kind = Kind::Service;
}

impl Watched for k8s_openapi::api::discovery::v1::EndpointSlice {
    const KIND: Kind = Kind::EndpointSlice;
}

/// An object of kind `K`.
pub struct Sent<K> {
    /// Name, namespace and resource version alone.
    meta: ObjectMeta,
    /// What it came to, or why it is refused.
    pub checked: Result<wire::Sent, String>,
    kind: PhantomData<fn() -> K>,
}

impl<K> Sent<K> {
    /// Its name.
    pub fn name(&self) -> ObjectName {
        ObjectName::new(
            self.meta.namespace.clone().unwrap_or_default(),
            self.meta.name.clone().unwrap_or_default(),
        )
    }
}

impl<'de, K: Watched> Deserialize<'de> for Sent<K> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        // By way of a value, so that one object of nonsense does not take a list with it.
        let object = Value::deserialize(deserializer)?;
        let text = |key| object["metadata"][key].as_str().map(str::to_owned);
        let meta = ObjectMeta {
            name: text("name"),
            namespace: text("namespace"),
            resource_version: text("resourceVersion"),
            ..ObjectMeta::default()
        };
        Ok(Self {
            meta,
            checked: wire::check_sent(K::KIND, object),
            kind: PhantomData,
        })
    }
}

// Derived, both would want `K` to be what it never is: a value.
impl<K> Clone for Sent<K> {
    fn clone(&self) -> Self {
        Self {
            meta: self.meta.clone(),
            checked: self.checked.clone(),
            kind: PhantomData,
        }
    }
}

impl<K> fmt::Debug for Sent<K> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.checked.fmt(f)
    }
}

impl<K: Watched> kube::Resource for Sent<K> {
    type DynamicType = ();
    type Scope = K::Scope;

    fn kind((): &()) -> Cow<'_, str> {
        K::kind(&())
    }

    fn group((): &()) -> Cow<'_, str> {
        K::group(&())
    }

    fn version((): &()) -> Cow<'_, str> {
        K::version(&())
    }

    fn plural((): &()) -> Cow<'_, str> {
        K::plural(&())
    }

    fn meta(&self) -> &ObjectMeta {
        &self.meta
    }

    fn meta_mut(&mut self) -> &mut ObjectMeta {
        &mut self.meta
    }
}
