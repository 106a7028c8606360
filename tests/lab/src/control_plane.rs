//! A real control plane on a host of the lab: etcd, kube-apiserver, and of kube-controller-manager what makes EndpointSlices.
//!
//! No kubelet runs on the nodes and no scheduler: the lab makes the pods, and its Node and Pod objects say so.

use std::fs;
use std::net::IpAddr;
use std::path::PathBuf;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::sys::signal::Signal;
use rcgen::{DnType, ExtendedKeyUsagePurpose, KeyPair, SanType};

use crate::options::Options;
use crate::pki::{self, Authority, Folder};
use crate::plan::{self, CONTROL, Host};
use crate::progress::Progress;
use crate::state::Record;
use crate::{api, etcd, objects, servers, token, up};

/// The release that is built, as `dev` builds it.
const RELEASE: &str = "1.34.2";

/// The release of [`Release::Newest`], as `dev` builds it.
const NEWEST: &str = "1.37.2";

/// Which kube-apiserver.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Release {
    /// The one that the rest of the control plane is of, or that of `$KUBEBUILDER_ASSETS`.
    Usual,
    /// The newest that there is.
    Newest,
}

/// Credentials of the cluster's administrator, on the control plane's host.
pub const ADMIN_KUBECONFIG: &str = "/etc/kubernetes/admin.kubeconfig";

/// Credentials of the daemon, on each node.
pub const NODE_KUBECONFIG: &str = "/etc/sluice/kubeconfig";

/// The token that they name.
pub const TOKEN: &str = "/etc/sluice/token";

/// Where all keys and certificates are, on the control plane's host.
const KEYS: &str = "/etc/kubernetes/pki";

/// How long the token is good for, in seconds.
const TOKEN_LIFE: i64 = 24 * 3600;

/// How long a server may take to be ready.
const PATIENCE: Duration = Duration::from_secs(60);

/// The controllers that are needed; others would miss kubelets and take the lab's nodes for dead. The collector takes the slices of Services
/// that are gone.
const CONTROLLERS: &str =
    "endpointslice-controller,endpointslice-mirroring-controller,garbage-collector-controller";

/// What Sluice may do, as users apply it.
const RBAC: &str = include_str!("../../../deploy/rbac.yaml");

/// The port of API server number `number`, from 1: all run on one host.
#[must_use]
pub fn port(number: u16) -> u16 {
    6442 + number
}

/// Where API server number `number` is reached from nodes.
#[must_use]
pub fn server(control: &Host, number: u16) -> String {
    let port = port(number);
    match control.addresses[0] {
        IpAddr::V4(address) => format!("https://{address}:{port}"),
        IpAddr::V6(address) => format!("https://[{address}]:{port}"),
    }
}

/// Starts all of it on the host `control`, and makes what nodes need to ask it.
///
/// # Errors
/// What failed, with the end of its log.
pub(crate) fn start(record: &Record, progress: &Progress) -> Result<()> {
    let control = record.member(CONTROL)?;
    progress.step("making the cluster's keys");
    make_keys(control.init.root(KEYS), &control.host, &record.options)?;
    let kubeconfig = |authority: &str, user: &str| kubeconfig(&server(&control.host, 1), authority, user);
    let pki = |name: &str| format!("{KEYS}/{name}");
    let user = format!(
        "client-certificate: {}, client-key: {}",
        pki("admin.crt"),
        pki("admin.key")
    );
    fs::write(
        control.init.root(ADMIN_KUBECONFIG),
        kubeconfig(&pki("ca.crt"), &user),
    )?;
    progress.step("starting etcd");
    start_etcd(record)?;
    progress.step("starting kube-apiserver");
    start_api_server(record, 1, Release::Usual, &[])?;
    // Namespaces are made after the server is ready.
    let deadline = Instant::now() + PATIENCE;
    while let Err(error) = objects::apply_text(&record.options.name, RBAC, "deploy/rbac.yaml") {
        if Instant::now() > deadline {
            return Err(error);
        }
        sleep(Duration::from_millis(100));
    }
    progress.step("starting kube-controller-manager");
    let options = &record.options;
    let mut arguments = vec![
        format!("--kubeconfig={ADMIN_KUBECONFIG}"),
        "--leader-elect=false".to_owned(),
        // Endpoints that change are told at once.
        "--kube-api-qps=1000".to_owned(),
        "--kube-api-burst=1000".to_owned(),
        "--concurrent-service-endpoint-syncs=20".to_owned(),
    ];
    if options.kubelets {
        arguments.extend([
            "--controllers=*".to_owned(),
            "--allocate-node-cidrs".to_owned(),
            // A node that is dead is taken for it after this time; a kubelet of the lab says every two seconds that it lives.
            "--node-monitor-grace-period=20s".to_owned(),
            format!(
                "--cluster-cidr={}",
                plan::cluster_cidrs(options.families).join(",")
            ),
            format!(
                "--service-cluster-ip-range={}",
                plan::service_cidrs(options.families).join(",")
            ),
            format!("--service-account-private-key-file={}", pki("accounts.key")),
            format!("--root-ca-file={}", pki("ca.crt")),
        ]);
    } else {
        arguments.push(format!("--controllers={CONTROLLERS}"));
    }
    let manager = "kube-controller-manager";
    launch(record, manager, &program(manager, Release::Usual)?, &arguments)?;
    if options.kubelets {
        progress.step("starting kube-scheduler");
        let arguments = [
            format!("--kubeconfig={ADMIN_KUBECONFIG}"),
            "--leader-elect=false".to_owned(),
        ];
        launch(
            record,
            "kube-scheduler",
            &program("kube-scheduler", Release::Usual)?,
            &arguments,
        )?;
    }
    Ok(())
}

/// Gives a node's kubelet its credentials, in `folder` on the node.
///
/// # Errors
/// The file system's.
pub(crate) fn introduce_kubelet(record: &Record, node: &str, folder: &str) -> Result<()> {
    let control = record.member(CONTROL)?;
    let init = record.member(node)?.init;
    fs::create_dir_all(init.root(folder))?;
    for (from, to) in [
        ("ca.crt", "ca.crt"),
        (&format!("{node}.crt"), "kubelet.crt"),
        (&format!("{node}.key"), "kubelet.key"),
    ] {
        fs::write(
            init.root(&format!("{folder}/{to}")),
            fs::read(control.init.root(&format!("{KEYS}/{from}")))?,
        )?;
    }
    let user = format!("client-certificate: {folder}/kubelet.crt, client-key: {folder}/kubelet.key");
    let text = kubeconfig(&server(&control.host, 1), &format!("{folder}/ca.crt"), &user);
    fs::write(init.root(&format!("{folder}/kubelet.kubeconfig")), text)?;
    Ok(())
}

/// Gives a node's daemon its credentials.
///
/// # Errors
/// The server's.
pub(crate) fn introduce(record: &Record, node: &str) -> Result<()> {
    let control = record.member(CONTROL)?;
    let node = record.member(node)?;
    let authority = fs::read(control.init.root(&format!("{KEYS}/ca.crt")))?;
    fs::write(node.init.root("/etc/sluice/ca.crt"), authority)?;
    renew_token(record, &node.host.name, None)?;
    let user = format!("tokenFile: {TOKEN}");
    let text = kubeconfig(&server(&control.host, 1), "/etc/sluice/ca.crt", &user);
    fs::write(node.init.root(NODE_KUBECONFIG), text)?;
    Ok(())
}

/// Gives a node's daemon a token, good for a day, or for `lasts` if that is said.
///
/// # Errors
/// The server's, or the file system's.
pub(crate) fn renew_token(record: &Record, node: &str, lasts: Option<Duration>) -> Result<()> {
    let control = record.member(CONTROL)?;
    let mut token = api::token(record, "sluice", TOKEN_LIFE)?;
    if let Some(lasts) = lasts {
        let key = fs::read_to_string(control.init.root(&format!("{KEYS}/accounts.key")))?;
        token = token::shortened(&token, &key, lasts)?;
    }
    fs::write(record.member(node)?.init.root(TOKEN), token).context("writing the token")
}

/// Starts kube-proxy on a node, with the daemon's credentials, in the mode of kube-proxy's that is named.
///
/// # Errors
/// It cannot be started.
pub(crate) fn start_kube_proxy(record: &Record, node: &str, mode: &str) -> Result<()> {
    let arguments = [
        format!("--kubeconfig={NODE_KUBECONFIG}"),
        own_name(node),
        format!("--proxy-mode={mode}"),
        // Limits of connection tracking are the machine's.
        "--conntrack-max-per-core=0".to_owned(),
    ];
    let kube_proxy = "kube-proxy";
    let program = program(kube_proxy, Release::Usual)?;
    servers::launch(record, node, kube_proxy, &program, &arguments)
}

/// Kills a node's kube-proxy.
///
/// # Errors
/// It does not run.
pub(crate) fn kill_kube_proxy(record: &Record, node: &str) -> Result<()> {
    servers::signal(record, node, &own_name(node), Signal::SIGKILL)
}

/// kube-proxy's argument that says which node it is on.
fn own_name(node: &str) -> String {
    format!("--hostname-override={node}")
}

/// Runs `etcdctl` on the control plane's host for the etcd behind its API servers.
///
/// # Errors
/// What it said.
pub(crate) fn etcdctl(record: &Record, command: &str) -> Result<String> {
    let program = etcd::program("etcdctl")?;
    let mut words = vec![program.as_str(), "--endpoints=http://127.0.0.1:2379"];
    words.extend(command.split(' '));
    etcd::must(up::exec_command(record, CONTROL, &[], &words).output()?, command)
}

fn kubeconfig(server: &str, authority: &str, user: &str) -> String {
    format!(
        "apiVersion: v1\nkind: Config\ncurrent-context: lab\n\
         clusters: [{{name: lab, cluster: {{server: {server:?}, certificate-authority: {authority}}}}}]\n\
         users: [{{name: lab, user: {{{user}}}}}]\n\
         contexts: [{{name: lab, context: {{cluster: lab, user: lab}}}}]\n"
    )
}

/// Starts etcd.
///
/// # Errors
/// It cannot be started.
fn start_etcd(record: &Record) -> Result<()> {
    let arguments = [
        "--data-dir=/var/lib/etcd",
        "--listen-client-urls=http://127.0.0.1:2379",
        "--advertise-client-urls=http://127.0.0.1:2379",
        "--listen-peer-urls=http://127.0.0.1:2380",
        // Its disk is nothing that outlives the lab.
        "--unsafe-no-fsync",
        "--log-level=warn",
    ]
    .map(str::to_owned);
    launch(record, "etcd", &program("etcd", Release::Usual)?, &arguments)
}

/// Starts API server number `number` with `extra` arguments, and waits until it is ready.
///
/// # Errors
/// It is not ready in time; with the end of its log.
pub(crate) fn start_api_server(record: &Record, number: u16, release: Release, extra: &[&str]) -> Result<()> {
    let control = record.member(CONTROL)?;
    let options = &record.options;
    let pki = |name: &str| format!("{KEYS}/{name}");
    let mut arguments = vec![
        "--etcd-servers=http://127.0.0.1:2379".to_owned(),
        format!("--advertise-address={}", control.host.addresses[0]),
        format!("--secure-port={}", port(number)),
        format!("--tls-cert-file={}", pki("server.crt")),
        format!("--tls-private-key-file={}", pki("server.key")),
        format!("--client-ca-file={}", pki("ca.crt")),
        "--service-account-issuer=https://kubernetes.default.svc".to_owned(),
        format!("--service-account-signing-key-file={}", pki("accounts.key")),
        format!("--service-account-key-file={}", pki("accounts.pub")),
        format!(
            "--service-cluster-ip-range={}",
            plan::service_cidrs(options.families).join(",")
        ),
        "--authorization-mode=Node,RBAC".to_owned(),
    ];
    if options.kubelets {
        arguments.extend([
            format!("--kubelet-client-certificate={}", pki("admin.crt")),
            format!("--kubelet-client-key={}", pki("admin.key")),
        ]);
    } else {
        // The lab's pods have none.
        arguments.push("--disable-admission-plugins=ServiceAccount".to_owned());
    }
    arguments.extend(extra.iter().map(|argument| (*argument).to_owned()));
    let name = api_server(number);
    launch(record, &name, &program("kube-apiserver", release)?, &arguments)?;
    let address = format!("https://127.0.0.1:{}/readyz", port(number));
    let (certificate, key) = (pki("admin.crt"), pki("admin.key"));
    let ask = [
        "curl",
        "-sk",
        "-o",
        "/dev/null",
        "-w",
        "%{http_code}",
        "--cert",
        &certificate,
        "--key",
        &key,
        &address,
    ];
    let deadline = Instant::now() + PATIENCE;
    loop {
        let answer = up::exec_command(record, CONTROL, &[], &ask).output()?;
        if answer.stdout == b"200" {
            return Ok(());
        }
        if Instant::now() > deadline {
            bail!(
                "{name} is not ready; the end of its log:\n{}",
                servers::log_end(record, CONTROL, &name, 15)
            );
        }
        sleep(Duration::from_millis(50));
    }
}

fn api_server(number: u16) -> String {
    format!("kube-apiserver-{number}")
}

/// Sends a signal to API server number `number`, and after SIGKILL waits for its end.
///
/// # Errors
/// It does not run.
pub(crate) fn signal_api_server(record: &Record, number: u16, signal: Signal) -> Result<()> {
    let mark = format!("--secure-port={}", port(number));
    servers::signal(record, CONTROL, &mark, signal).with_context(|| api_server(number))
}

fn launch(record: &Record, name: &str, program: &str, arguments: &[String]) -> Result<()> {
    servers::launch(record, CONTROL, name, program, arguments)
}

/// Where `helm` is.
///
/// # Errors
/// Nowhere.
pub fn helm() -> Result<String> {
    program("helm", Release::Usual)
}

/// One of the control plane's programs: from `$KUBEBUILDER_ASSETS`, else from where `./dev setup` builds them.
pub(crate) fn program(name: &str, release: Release) -> Result<String> {
    let (assets, release) = match release {
        Release::Usual => (std::env::var_os("KUBEBUILDER_ASSETS").map(PathBuf::from), RELEASE),
        Release::Newest => (None, NEWEST),
    };
    let built = servers::cache().map(|cache| cache.join(format!("kubernetes-{release}")));
    servers::program(name, assets.into_iter().chain(built))
        .with_context(|| "./dev setup builds it, or name a folder that has it in KUBEBUILDER_ASSETS")
}

/// An authority, and what it signs: the servers' certificate, the administrator's and the kubelets'; and the key that signs tokens.
fn make_keys(folder: PathBuf, control: &Host, options: &Options) -> Result<()> {
    let authority = Authority::new("lab")?;
    let folder = Folder::new(folder)?;
    folder.write("ca.crt", &authority.certificate())?;
    let mut server = pki::named("kube-apiserver");
    server.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
    server.subject_alt_names = pki::addresses_of(control);
    let service = plan::api_service(options.families);
    server.subject_alt_names.push(SanType::IpAddress(service));
    for name in ["kubernetes", "kubernetes.default", "kubernetes.default.svc"] {
        server.subject_alt_names.push(SanType::DnsName(name.try_into()?));
    }
    let mut admin = pki::named("admin");
    // Whoever is of this group may do everything.
    admin
        .distinguished_name
        .push(DnType::OrganizationName, "system:masters");
    admin.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
    folder.write_pair("server", &authority.sign(server)?)?;
    folder.write_pair("admin", &authority.sign(admin)?)?;
    for number in 1..=options.nodes {
        let node = plan::node(options, number).name;
        // How the API server knows whose kubelet it is (Node authorization).
        let mut kubelet = pki::named(&format!("system:node:{node}"));
        kubelet
            .distinguished_name
            .push(DnType::OrganizationName, "system:nodes");
        kubelet.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        folder.write_pair(&node, &authority.sign(kubelet)?)?;
    }
    let accounts = KeyPair::generate()?;
    folder.write("accounts.pub", &accounts.public_key_pem())?;
    folder.write("accounts.key", &accounts.serialize_pem())
}
