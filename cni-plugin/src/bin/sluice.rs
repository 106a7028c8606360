//! The CNI plugin's process: environment and stdin in, one JSON document on stdout and an exit code out.

use std::io::{self, Write};
use std::process::ExitCode;

use sluice_cni::call;

fn main() -> ExitCode {
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
        Ok(()) if answer.success => ExitCode::SUCCESS,
        Ok(()) => ExitCode::FAILURE,
        Err(error) => {
            let _ = writeln!(io::stderr(), "sluice: writing the result: {error}");
            answer.take_back();
            ExitCode::FAILURE
        }
    }
}
