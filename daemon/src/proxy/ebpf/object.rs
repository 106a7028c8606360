//! The built object: loads it, adopting the maps a former daemon pinned.

use std::fs;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use anyhow::{Context, Result};
use aya::programs::{CgroupSockAddr, Program, ProgramError, SchedClassifier};
use aya::{Ebpf, EbpfLoader};

use super::link::Hook;
use super::tables::Tables;

static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/sluice.bpf.o"));

/// Programs at the sockets: name, which is that of their pinned link as well, and hook.
pub(super) const SOCKET_PROGRAMS: [(&str, Hook); 8] = [
    ("connect4", Hook::Connect4),
    ("connect6", Hook::Connect6),
    ("sendmsg4", Hook::Sendmsg4),
    ("sendmsg6", Hook::Sendmsg6),
    ("recvmsg4", Hook::Recvmsg4),
    ("recvmsg6", Hook::Recvmsg6),
    ("getpeername4", Hook::Getpeername4),
    ("getpeername6", Hook::Getpeername6),
];

/// The programs of one kind of device.
pub(super) struct DevicePrograms {
    pub incoming: OwnedFd,
    pub outgoing: OwnedFd,
}

/// What the object came to in the kernel.
pub(super) struct Loaded {
    pub tables: Tables,
    /// In the order of [`SOCKET_PROGRAMS`].
    pub sockets: Vec<OwnedFd>,
    /// For devices with Ethernet headers.
    pub ethernet: DevicePrograms,
    /// For devices without link-layer header.
    pub raw: DevicePrograms,
    /// For the devices of pods.
    pub pod: DevicePrograms,
}

/// Loads the object; its maps are pinned in `maps`, and taken from there if they are there already.
pub(super) fn load(maps: &Path) -> Result<Loaded> {
    fs::create_dir_all(maps).with_context(|| {
        format!(
            "creating {}: is a bpf file system mounted there? (mount -t bpf bpf /sys/fs/bpf)",
            maps.display()
        )
    })?;
    let mut ebpf = EbpfLoader::new()
        .default_map_pin_directory(maps)
        .load(OBJECT)
        .context("loading the eBPF object")?;
    let sockets = SOCKET_PROGRAMS
        .iter()
        .map(|(name, _)| socket_program(&mut ebpf, name))
        .collect::<Result<_>>()?;
    let mut both = |incoming, outgoing| -> Result<DevicePrograms> {
        Ok(DevicePrograms {
            incoming: device_program(&mut ebpf, incoming)?,
            outgoing: device_program(&mut ebpf, outgoing)?,
        })
    };
    let ethernet = both("device_in", "device_out")?;
    let raw = both("raw_device_in", "raw_device_out")?;
    let pod = both("pod_in", "pod_out")?;
    let tables = Tables::take(&mut ebpf)?;
    Ok(Loaded {
        tables,
        sockets,
        ethernet,
        raw,
        pod,
    })
}

fn program<'a>(ebpf: &'a mut Ebpf, name: &str) -> Result<&'a mut Program> {
    ebpf.program_mut(name)
        .with_context(|| format!("the eBPF object has no program {name}"))
}

fn socket_program(ebpf: &mut Ebpf, name: &str) -> Result<OwnedFd> {
    let program: &mut CgroupSockAddr = program(ebpf, name)?.try_into()?;
    program.load().map_err(|error| explain(name, error))?;
    Ok(program.fd()?.as_fd().try_clone_to_owned()?)
}

fn device_program(ebpf: &mut Ebpf, name: &str) -> Result<OwnedFd> {
    let program: &mut SchedClassifier = program(ebpf, name)?.try_into()?;
    program.load().map_err(|error| explain(name, error))?;
    Ok(program.fd()?.as_fd().try_clone_to_owned()?)
}

/// The verifier's whole log: without it a refusal is a riddle.
fn explain(name: &str, error: ProgramError) -> anyhow::Error {
    match error {
        ProgramError::LoadError {
            io_error,
            verifier_log,
        } => {
            anyhow::anyhow!("the kernel refuses the program {name}: {io_error}\n{verifier_log}")
        }
        other => anyhow::Error::new(other).context(format!("loading the program {name}")),
    }
}
