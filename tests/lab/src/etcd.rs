//! An etcd of three members, each on a host of its own, with TLS and users: Debian's, as operators of plain hosts have it.

use std::fs;
use std::io::Write;
use std::process::{Output, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use nix::sys::signal::Signal;
use rcgen::ExtendedKeyUsagePurpose;
use serde_json::Value;

use crate::objects::{Id, Item};
use crate::options::Options;
use crate::pki::{self, Authority, Folder};
use crate::plan::{self, Host};
use crate::progress::Progress;
use crate::state::Record;
use crate::{servers, up};

/// How many members there are.
pub const MEMBERS: u8 = 3;

/// Where a member's keys are, on its host.
const KEYS: &str = "/etc/etcd/pki";

/// The configuration with which the lab writes objects, on the first member's host.
const OPERATOR_CONFIG: &str = "/etc/sluice/operator.yaml";

/// The authority of the members' certificates, and the password of the nodes' user, on each node.
const NODE_AUTHORITY: &str = "/etc/sluice/etcd-ca.crt";
const NODE_PASSWORD: &str = "/etc/sluice/etcd-password";

/// The user that nodes are, and the two passwords.
const USER: &str = "sluice";
const PASSWORD: &str = "lab";
const ROOT_PASSWORD: &str = "lab-root";

/// How long the members may take to find each other.
const PATIENCE: Duration = Duration::from_secs(30);

/// Where member number `number` is reached.
#[must_use]
pub fn member_url(options: &Options, number: u8) -> String {
    url(&plan::etcd(options, number), 2379)
}

fn url(host: &Host, port: u16) -> String {
    format!("https://{}", std::net::SocketAddr::new(host.addresses[0], port))
}

/// Starts all members on their hosts, and gives nodes a user.
///
/// # Errors
/// What failed, with the end of a member's log.
pub(crate) fn start(record: &Record, progress: &Progress) -> Result<()> {
    progress.step("making etcd's keys");
    let authority = Authority::new("lab-etcd")?;
    for number in 1..=MEMBERS {
        let member = record.member(&plan::etcd(&record.options, number).name)?;
        let folder = Folder::new(member.init.root(KEYS))?;
        folder.write("ca.crt", &authority.certificate())?;
        let mut params = pki::named(&member.host.name);
        // Members are each other's clients.
        params.extended_key_usages = vec![
            ExtendedKeyUsagePurpose::ServerAuth,
            ExtendedKeyUsagePurpose::ClientAuth,
        ];
        params.subject_alt_names = pki::addresses_of(&member.host);
        folder.write_pair("member", &authority.sign(params)?)?;
    }
    progress.step("starting etcd");
    for number in 1..=MEMBERS {
        start_member(record, number)?;
    }
    let deadline = Instant::now() + PATIENCE;
    while !ctl(record, "endpoint health --cluster", false)?.status.success() {
        if Instant::now() > deadline {
            let first = plan::etcd(&record.options, 1).name;
            bail!(
                "etcd is not ready; the end of a member's log:\n{}",
                servers::log_end(record, &first, "etcd", 15)
            );
        }
        sleep(Duration::from_millis(50));
    }
    progress.step("giving nodes a user of etcd");
    for command in [
        format!("user add root:{ROOT_PASSWORD}"),
        "user grant-role root root".to_owned(),
        format!("role add {USER}"),
        format!("role grant-permission {USER} --prefix=true readwrite /sluice/"),
        format!("user add {USER}:{PASSWORD}"),
        format!("user grant-role {USER} {USER}"),
        "auth enable".to_owned(),
    ] {
        must(ctl(record, &command, false)?, &command)?;
    }
    let operator = record.member(&plan::etcd(&record.options, 1).name)?;
    fs::create_dir_all(operator.init.root("/etc/sluice"))?;
    let password = format!("{KEYS}/password");
    fs::write(operator.init.root(&password), PASSWORD)?;
    let config = format!(
        "datastore:\n  {}\n",
        datastore_config(&record.options, &format!("{KEYS}/ca.crt"), &password)
    );
    fs::write(operator.init.root(OPERATOR_CONFIG), config)?;
    Ok(())
}

/// What a daemon's configuration says of its datastore, without the key.
pub(crate) fn node_config(options: &Options) -> String {
    datastore_config(options, NODE_AUTHORITY, NODE_PASSWORD)
}

fn datastore_config(options: &Options, authority: &str, password: &str) -> String {
    let members: Vec<_> = (1..=MEMBERS)
        .map(|number| format!("{:?}", member_url(options, number)))
        .collect();
    format!(
        "kind: etcd\n  etcd: {{ endpoints: [{}], caFile: {authority}, username: {USER}, passwordFile: {password} }}",
        members.join(", ")
    )
}

/// Gives a node what its daemon needs to be known to etcd.
///
/// # Errors
/// The file system's.
pub(crate) fn introduce(record: &Record, node: &str) -> Result<()> {
    let first = record.member(&plan::etcd(&record.options, 1).name)?;
    let node = record.member(node)?;
    let authority = fs::read(first.init.root(&format!("{KEYS}/ca.crt")))?;
    fs::write(node.init.root(NODE_AUTHORITY), authority)?;
    fs::write(node.init.root(NODE_PASSWORD), PASSWORD)?;
    Ok(())
}

/// Starts member number `number`, with what it had before if it ran before.
///
/// # Errors
/// There is no etcd, or it cannot be started.
pub(crate) fn start_member(record: &Record, number: u8) -> Result<()> {
    let host = plan::etcd(&record.options, number);
    let pki = |name: &str| format!("{KEYS}/{name}");
    let peers: Vec<_> = (1..=MEMBERS)
        .map(|number| plan::etcd(&record.options, number))
        .map(|peer| format!("{}={}", peer.name, url(&peer, 2380)))
        .collect();
    let arguments = [
        format!("--name={}", host.name),
        "--data-dir=/var/lib/etcd".to_owned(),
        format!("--listen-client-urls=https://127.0.0.1:2379,{}", url(&host, 2379)),
        format!("--advertise-client-urls={}", url(&host, 2379)),
        format!("--listen-peer-urls={}", url(&host, 2380)),
        format!("--initial-advertise-peer-urls={}", url(&host, 2380)),
        format!("--initial-cluster={}", peers.join(",")),
        format!("--cert-file={}", pki("member.crt")),
        format!("--key-file={}", pki("member.key")),
        format!("--peer-cert-file={}", pki("member.crt")),
        format!("--peer-key-file={}", pki("member.key")),
        format!("--peer-trusted-ca-file={}", pki("ca.crt")),
        "--peer-client-cert-auth".to_owned(),
        // A lab's passwords are no secret worth a tenth of a second at every login.
        "--bcrypt-cost=4".to_owned(),
        "--logger=zap".to_owned(),
        "--log-level=warn".to_owned(),
    ];
    servers::launch(record, &host.name, "etcd", &program("etcd")?, &arguments)
}

/// Sends a signal to member number `number`, and after SIGKILL waits for its end.
///
/// # Errors
/// It does not run.
pub(crate) fn signal_member(record: &Record, number: u8, signal: Signal) -> Result<()> {
    let name = plan::etcd(&record.options, number).name;
    servers::signal(record, &name, &format!("--name={name}"), signal)
}

/// Debian's, where `./dev setup` unpacks it, else from `PATH`.
///
/// # Errors
/// There is none.
pub(crate) fn program(name: &str) -> Result<String> {
    let unpacked = servers::cache().map(|cache| cache.join("etcd/usr/bin"));
    let path = std::env::var_os("PATH").unwrap_or_default();
    servers::program(name, unpacked.into_iter().chain(std::env::split_paths(&path)))
        .context("./dev setup fetches it")
}

/// Runs `etcdctl` on the first member's host, as root where users are told apart already.
pub(crate) fn ctl(record: &Record, command: &str, as_root: bool) -> Result<Output> {
    let options = &record.options;
    let program = program("etcdctl")?;
    let authority = format!("--cacert={KEYS}/ca.crt");
    let user = format!("--user=root:{ROOT_PASSWORD}");
    let members: Vec<_> = (1..=MEMBERS).map(|number| member_url(options, number)).collect();
    let endpoints = format!("--endpoints={}", members.join(","));
    let mut words = vec![program.as_str(), &authority, &endpoints];
    if as_root {
        words.push(&user);
    }
    words.extend(command.split(' '));
    let host = plan::etcd(options, 1).name;
    Ok(up::exec_command(record, &host, &[], &words).output()?)
}

/// The number of the member that leads, from 1.
///
/// # Errors
/// None does, or none answers.
pub(crate) fn leader(record: &Record) -> Result<u8> {
    // It fails when one of them is away, and still tells of the others.
    let output = ctl(record, "endpoint status -w json", true)?;
    let members: Value = serde_json::from_slice(&output.stdout).context("reading the members' status")?;
    let leads = |member: &&Value| {
        let status = &member["Status"];
        status["leader"] == status["header"]["member_id"]
    };
    let leader = members.as_array().into_iter().flatten().find(leads);
    let leader = leader.and_then(|member| member["Endpoint"].as_str());
    let urls = |number: &u8| leader == Some(&member_url(&record.options, *number));
    (1..=MEMBERS)
        .find(urls)
        .ok_or_else(|| anyhow!("no member of etcd leads: {members}"))
}

/// What a successful `etcdctl` printed.
///
/// # Errors
/// What a failed one said.
pub(crate) fn must(output: Output, command: &str) -> Result<String> {
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    Err(anyhow!("etcdctl {command}: {}", said.trim()))
}

/// Applies items through `sluicectl`, and says what that did, a line for each.
///
/// # Errors
/// What it said.
pub(crate) fn apply(record: &Record, items: &[Item]) -> Result<Vec<String>> {
    let texts: Vec<&str> = items.iter().map(|item| item.text.as_str()).collect();
    let said = sluicectl(record, "apply", &texts.join("---\n"))?;
    Ok(said.lines().map(str::to_owned).collect())
}

/// Deletes objects through `sluicectl`; says which were there.
///
/// # Errors
/// What it said.
pub(crate) fn delete(record: &Record, ids: &[Id]) -> Result<Vec<bool>> {
    let version = |kind: &str| {
        if kind == "EndpointSlice" {
            "discovery.k8s.io/v1"
        } else {
            "v1"
        }
    };
    let texts: Vec<_> = ids
        .iter()
        .map(|id| {
            let Id {
                kind,
                namespace,
                name,
            } = id;
            format!(
                "{{apiVersion: {}, kind: {kind}, metadata: {{namespace: {namespace}, name: {name}}}}}\n",
                version(kind)
            )
        })
        .collect();
    let said = sluicectl(record, "delete", &texts.join("---\n"))?;
    Ok(said.lines().map(|line| line.ends_with(" deleted")).collect())
}

fn sluicectl(record: &Record, verb: &str, text: &str) -> Result<String> {
    let host = plan::etcd(&record.options, 1).name;
    let command = ["sluicectl", "--config", OPERATOR_CONFIG, verb, "-f", "-"];
    let mut child = up::exec_command(record, &host, &[], &command)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .context("running sluicectl")?;
    if let Some(mut input) = child.stdin.take() {
        input.write_all(text.as_bytes()).context("writing to sluicectl")?;
    }
    let output = child.wait_with_output().context("waiting for sluicectl")?;
    // That something to delete was not there is said, and no failure here.
    let said_all = verb == "delete" && output.stderr.is_empty();
    if !output.status.success() && !said_all {
        return Err(up::failure(&host, &command, &output));
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
