//! The cluster's API servers as a datastore: Nodes, Services and EndpointSlices, each listed and watched.
//!
//! What the daemon knows does not shrink while a server cannot be reached, nor while a list is under way: only what a whole list does
//! not name is gone. When the first lists are not whole in time, as when no server answers, the state last known is served until they are.
//!
//! Endpoints come from EndpointSlices alone, which a controller keeps for every Service; pods are not watched.

use std::time::Duration;

use anyhow::Result;
use futures_util::StreamExt;
use k8s_openapi::api::core::v1::{Node, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::runtime::{WatchStreamExt, watcher};
use kube::{Api, Client, Resource};
use tokio::sync::mpsc;

use self::own_addresses::OwnAddresses;
use self::sent::{Sent, Watched};
pub use self::servers::Servers;
use super::keeper::{Heard, Keeper, What};
use super::{Event, GRACE};
use crate::last_known;
use crate::state::objects::Kind;

pub mod node_status;
mod own_addresses;
mod sent;
mod servers;

/// All that is listed and watched.
const KINDS: [Kind; 3] = [Kind::Node, Kind::Service, Kind::EndpointSlice];

/// How long a watch goes on before it is begun again where it ended, in seconds. Long, because a dead connection is found by
/// other means.
const WATCH: u32 = 280;

/// How many objects a server that cannot stream a list sends at once.
const PAGE: u32 = 250;

/// How soon a list is begun again after the server would not go on with a watch.
const AGAIN: Duration = Duration::from_secs(1);

/// Watches all that Sluice uses and sends it into `events`, until the receiver is gone.
///
/// # Errors
/// None: a server that fails is a problem to be told, and tried again.
pub async fn run(servers: Servers, events: mpsc::Sender<Event>) -> Result<()> {
    let client = servers.client();
    let (teller, heard) = mpsc::channel(64);
    tokio::select! {
        () = keep(servers, heard, events) => Ok(()),
        () = watch::<Node>(client.clone(), "", teller.clone()) => Ok(()),
        () = watch::<Service>(client.clone(), "", teller.clone()) => Ok(()),
        () = watch::<EndpointSlice>(client, SLICES, teller) => Ok(()),
    }
}

/// The slices that belong to Services which a proxy serves, as kube-proxy chooses them.
const SLICES: &str = "kubernetes.io/service-name,!service.kubernetes.io/headless";

async fn keep(servers: Servers, mut heard: mpsc::Receiver<Heard>, events: mpsc::Sender<Event>) {
    let mut keeper = Keeper::new("the API servers", &KINDS);
    let mut own_addresses = OwnAddresses::default();
    let mut saved = last_known::read_or_warn();
    for object in saved.iter().flat_map(|saved| &saved.objects) {
        own_addresses.learn(object);
    }
    servers.know(own_addresses.all());
    let paths = [
        (Kind::Node, Node::url_path(&(), None)),
        (Kind::Service, Service::url_path(&(), None)),
        (Kind::EndpointSlice, EndpointSlice::url_path(&(), None)),
    ];
    let grace = tokio::time::sleep(GRACE);
    tokio::pin!(grace);
    loop {
        let out = tokio::select! {
            said = heard.recv() => {
                let Some(said) = said else { return };
                keeper.fold(said, &servers.failures())
            }
            () = servers.success() => {
                let kinds = paths.iter().filter(|(_, path)| !servers.is_failing(path));
                keeper.recovered(kinds.map(|(kind, _)| *kind), &servers.failures())
            }
            () = &mut grace, if saved.is_some() && !keeper.loaded() => {
                saved.take().map(|saved| keeper.fall_back(saved)).unwrap_or_default()
            }
        };
        if keeper.loaded() {
            saved = None;
        }
        for event in out {
            own_addresses.follow(&event);
            if events.send(event).await.is_err() {
                return;
            }
        }
        servers.know(own_addresses.all());
    }
}

/// Lists and watches one kind for ever.
async fn watch<K: Watched>(client: Client, selector: &str, teller: mpsc::Sender<Heard>) {
    let mut streams = true;
    loop {
        let mut config = watcher::Config::default().timeout(WATCH);
        if !selector.is_empty() {
            config = config.labels(selector);
        }
        config = if streams {
            config.streaming_lists()
        } else {
            config.page_size(PAGE)
        };
        let api: Api<Sent<K>> = Api::all(client.clone());
        let mut stream = std::pin::pin!(watcher(api, config).default_backoff());
        let mut listing = true;
        while let Some(event) = stream.next().await {
            match &event {
                Ok(watcher::Event::Init) => listing = true,
                Ok(watcher::Event::InitDone) => listing = false,
                _ => {}
            }
            let what = match event {
                Ok(watcher::Event::Init) => What::ListBegins,
                Ok(watcher::Event::InitApply(object) | watcher::Event::Apply(object)) => {
                    What::There(object.name(), Box::new(object.checked))
                }
                Ok(watcher::Event::Delete(object)) => What::Gone(object.name()),
                Ok(watcher::Event::InitDone) => What::ListEnds,
                Err(error) if streams && listing && cannot_stream(&error) => {
                    streams = false;
                    break;
                }
                Err(error) if is_gone(&error) => {
                    tokio::time::sleep(AGAIN).await;
                    break;
                }
                Err(error) => What::Failed(said(&error)),
            };
            if teller.send(Heard(K::KIND, what)).await.is_err() {
                return;
            }
        }
    }
}

/// Whether the server says that it will not stream this list: it does not know how to (the feature `WatchList`, on by default
/// since 1.34), or its storage does not (etcd before 3.4.25 and 3.5.8). In pages it will do, if it does at all.
fn cannot_stream(error: &watcher::Error) -> bool {
    let status = match error {
        watcher::Error::WatchStartFailed(kube::Error::Api(status)) => status,
        watcher::Error::WatchError(status) => status,
        _ => return false,
    };
    // Who is not known, may not, is late or too often here is no better off with pages.
    !matches!(status.code, 401 | 403 | 410 | 429)
}

/// Whether the server has forgotten where the watch was, and says so before the watch begins (410): the watcher would ask for
/// the same again for ever.
fn is_gone(error: &watcher::Error) -> bool {
    match error {
        watcher::Error::WatchStartFailed(kube::Error::Api(status)) => status.code == 410,
        _ => false,
    }
}

/// What the server said; nothing if what failed is the way to it.
fn said(error: &watcher::Error) -> Option<String> {
    match error {
        watcher::Error::InitialListFailed(error)
        | watcher::Error::WatchStartFailed(error)
        | watcher::Error::WatchFailed(error) => match error {
            kube::Error::Api(status) => Some(status.message.clone()),
            kube::Error::Service(_) | kube::Error::HyperError(_) | kube::Error::ReadEvents(_) => None,
            other => Some(other.to_string()),
        },
        watcher::Error::WatchError(status) => Some(status.message.clone()),
        watcher::Error::NoResourceVersion => Some(error.to_string()),
    }
}
