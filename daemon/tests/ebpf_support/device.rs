//! The programs at a device, run on crafted packets (`BPF_PROG_TEST_RUN`).

use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;

use aya::programs::links::{FdLink, PinnedLink};
use aya::programs::loaded_programs;

use super::packet::Packet;

/// `TCX_NEXT`: pass on to whoever comes next.
const NEXT: u32 = u32::MAX;
/// `TCX_DROP`.
const DROP: u32 = 2;
/// `BPF_PROG_TEST_RUN`, `enum bpf_cmd`.
const TEST_RUN: i32 = 10;

/// `bpf_attr` of `BPF_PROG_TEST_RUN`.
#[repr(C)]
#[derive(Default)]
struct TestRun {
    program: u32,
    result: u32,
    size_in: u32,
    size_out: u32,
    data_in: u64,
    data_out: u64,
    repeat: u32,
    duration: u32,
    context: [u64; 3],
    flags: [u32; 4],
}

/// Both ends of a device.
pub struct Device {
    incoming: OwnedFd,
    outgoing: OwnedFd,
}

fn program(pin: &Path) -> OwnedFd {
    let id = FdLink::from(PinnedLink::from_pin(pin).unwrap())
        .info()
        .unwrap()
        .program_id();
    // Programs of other tests come and go meanwhile.
    let program = loaded_programs()
        .filter_map(Result::ok)
        .find(|program| program.id() == id)
        .unwrap();
    program.fd().unwrap().as_fd().try_clone_to_owned().unwrap()
}

/// Runs the program; what becomes of the frame, `None` if it is dropped.
fn run(program: &OwnedFd, frame: &[u8]) -> Option<Vec<u8>> {
    let mut out = vec![0_u8; frame.len() + 256];
    let mut request = TestRun {
        program: program.as_raw_fd() as u32,
        size_in: frame.len() as u32,
        size_out: out.len() as u32,
        data_in: frame.as_ptr() as u64,
        data_out: out.as_mut_ptr() as u64,
        repeat: 1,
        ..TestRun::default()
    };
    // SAFETY: the request is laid out as the command wants, and the buffers it points to are of the sizes it says and
    // outlive the call.
    let result = unsafe { libc::syscall(libc::SYS_bpf, TEST_RUN, &raw mut request, size_of::<TestRun>()) };
    assert_eq!(
        result,
        0,
        "BPF_PROG_TEST_RUN: {}",
        std::io::Error::last_os_error()
    );
    out.truncate(request.size_out as usize);
    match request.result {
        NEXT => Some(out),
        DROP => None,
        other => panic!("the program answers {other}"),
    }
}

impl Device {
    /// The programs attached to the device called `name`, by their pins.
    pub fn attached(pins: &Path, name: &str) -> Self {
        let pin = |end: &str| program(&pins.join(format!("devices/{end}-{name}")));
        Self {
            incoming: pin("in"),
            outgoing: pin("out"),
        }
    }

    /// A frame comes in.
    pub fn frame_in(&self, frame: &[u8]) -> Option<Vec<u8>> {
        run(&self.incoming, frame)
    }

    /// A frame goes out.
    pub fn frame_out(&self, frame: &[u8]) -> Option<Vec<u8>> {
        run(&self.outgoing, frame)
    }

    /// A packet comes in; `None` if it is dropped.
    pub fn packet_in(&self, packet: &Packet) -> Option<Packet> {
        run(&self.incoming, &packet.bytes()).map(|frame| Packet::parse(&frame))
    }

    /// A packet goes out; `None` if it is dropped.
    pub fn packet_out(&self, packet: &Packet) -> Option<Packet> {
        run(&self.outgoing, &packet.bytes()).map(|frame| Packet::parse(&frame))
    }
}
