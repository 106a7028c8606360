//! The CNI plugin's process: environment and stdin in, one JSON document on stdout and an exit code out.

#![no_main]

use std::ffi::c_int;
use std::io::{self, Write};

use sluice_cni::arena::Arena;
use sluice_cni::call;

#[global_allocator]
static MEMORY: Arena = Arena::empty();

/// What the C library calls. The standard library's own beginning reads /proc/self/maps for the stack's end and makes a stack to tell of
/// an overflow on: 40 µs of an ADD.
#[unsafe(no_mangle)]
pub extern "C" fn main() -> c_int {
    // As the standard library has it: what nobody reads any more is an error of the write, not the end of the process.
    // SAFETY: this thread is the only one, and no handler is installed.
    unsafe { libc::signal(libc::SIGPIPE, libc::SIG_IGN) };
    let answer = call::run(|name| std::env::var_os(name), io::stdin());
    if let Some(line) = &answer.log {
        // Nothing better can be done about a closed stderr.
        let _ = writeln!(io::stderr(), "sluice: {line}");
    }
    let written = answer.stdout.as_ref().map_or(Ok(()), |value| {
        let mut out = io::stdout().lock();
        serde_json::to_writer(&mut out, value)?;
        writeln!(out).and_then(|()| out.flush())
    });
    match written {
        Ok(()) => c_int::from(!answer.success),
        Err(error) => {
            let _ = writeln!(io::stderr(), "sluice: writing the result: {error}");
            answer.take_back();
            1
        }
    }
}
