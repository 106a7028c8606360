//! Builds the kernel-side programs (`../ebpf`) and leaves the object in `OUT_DIR/sluice.bpf.o`.
//!
//! Two toolchains will do: Debian's, which ships a ready-made `core` for `bpfel-unknown-none`, or rustup's nightly with
//! `rust-src`. Both link with `bpf-linker`.

use std::env;
use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::Command;

const TARGET: &str = "bpfel-unknown-none";
const DEBIAN_RUSTC: &str = "/usr/bin/rustc";

fn main() {
    if let Err(reason) = build() {
        // Read by whoever runs cargo, on a machine that may never have built this before.
        eprintln!("cannot build the eBPF programs: {reason}\n`./dev setup` installs what is needed");
        std::process::exit(1);
    }
}

fn build() -> Result<(), String> {
    let manifest = PathBuf::from(variable("CARGO_MANIFEST_DIR")?);
    let out = PathBuf::from(variable("OUT_DIR")?);
    let source = manifest.join("../ebpf");
    for watched in ["src", "Cargo.toml", "Cargo.lock"] {
        println!("cargo:rerun-if-changed={}", source.join(watched).display());
    }
    for watched in ["src", "Cargo.toml"] {
        println!(
            "cargo:rerun-if-changed={}",
            manifest.join("../ebpf-types").join(watched).display()
        );
    }
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-env-changed=PATH");

    let linker = linker()?;
    let target_dir = out.join("ebpf-target");
    let mut cargo = Command::new(variable("CARGO")?);
    // What cargo, clippy or the user set for the daemon's own build is wrong for this one.
    for (name, _) in env::vars_os() {
        let inherited = name.to_str().is_some_and(|name| {
            name.starts_with("CARGO_TARGET_")
                || name.starts_with("CARGO_BUILD_")
                || name.starts_with("CARGO_PROFILE_")
                || matches!(
                    name,
                    "RUSTC"
                        | "RUSTC_WRAPPER"
                        | "RUSTC_WORKSPACE_WRAPPER"
                        | "RUSTFLAGS"
                        | "CARGO_ENCODED_RUSTFLAGS"
                        | "RUSTUP_TOOLCHAIN"
                        | "RUSTDOCFLAGS"
                        | "CARGO_INCREMENTAL"
                        | "TARGET"
                )
        });
        if inherited {
            cargo.env_remove(&name);
        }
    }
    cargo
        .current_dir(&source)
        .args([
            "build",
            "--release",
            "--locked",
            "--target",
            TARGET,
            "--target-dir",
        ])
        .arg(&target_dir)
        .env(
            "CARGO_ENCODED_RUSTFLAGS",
            format!(
                "-Clinker={}\u{1f}-Cdebuginfo=2\u{1f}-Clink-arg=--btf",
                linker.display()
            ),
        );
    if has_bpf_core(DEBIAN_RUSTC) {
        // Only for `#![feature]`s the eBPF crates ask for; the library is ready-made.
        cargo.env("RUSTC", DEBIAN_RUSTC).env("RUSTC_BOOTSTRAP", "1");
    } else if let Some(rustc) = nightly_with_source() {
        cargo
            .env("RUSTC", rustc)
            .args(["-Z", "build-std=core"])
            .env("RUSTC_BOOTSTRAP", "1");
    } else {
        return Err(format!(
            "no compiler for {TARGET}: neither {DEBIAN_RUSTC} with that target's library, nor rustup's nightly with \
             rust-src"
        ));
    }
    let status = cargo
        .status()
        .map_err(|error| format!("cannot run cargo: {error}"))?;
    if !status.success() {
        return Err(format!("cargo ended with {status}"));
    }
    let built = target_dir.join(TARGET).join("release/sluice-ebpf");
    let object = out.join("sluice.bpf.o");
    std::fs::copy(&built, &object)
        .map_err(|error| format!("cannot copy {} to {}: {error}", built.display(), object.display()))?;
    Ok(())
}

fn variable(name: &str) -> Result<String, String> {
    env::var(name).map_err(|error| format!("{name}: {error}"))
}

/// `bpf-linker` from `PATH`, else from where `cargo install` puts it.
fn linker() -> Result<PathBuf, String> {
    let path = env::var_os("PATH").unwrap_or_default();
    let home = env::var_os("CARGO_HOME")
        .map(PathBuf::from)
        .or_else(|| env::var_os("HOME").map(|home| Path::new(&home).join(".cargo")));
    env::split_paths(&path)
        .chain(home.map(|home| home.join("bin")))
        .map(|directory| directory.join("bpf-linker"))
        .find(|candidate| candidate.is_file())
        .ok_or_else(|| "bpf-linker is neither in PATH nor in ~/.cargo/bin".to_owned())
}

fn sysroot(rustc: impl AsRef<OsStr>) -> Option<PathBuf> {
    let output = Command::new(rustc).args(["--print", "sysroot"]).output().ok()?;
    let text = String::from_utf8(output.stdout).ok()?;
    output.status.success().then(|| PathBuf::from(text.trim()))
}

fn has_bpf_core(rustc: &str) -> bool {
    sysroot(rustc).is_some_and(|root| root.join("lib/rustlib").join(TARGET).is_dir())
}

/// The compiler of rustup's nightly, if its library sources are there to build `core` from.
fn nightly_with_source() -> Option<PathBuf> {
    let output = Command::new("rustup")
        .args(["which", "--toolchain", "nightly", "rustc"])
        .output()
        .ok()?;
    let rustc = PathBuf::from(String::from_utf8(output.stdout).ok()?.trim());
    let source = sysroot(&rustc)?.join("lib/rustlib/src/rust/library/core");
    (output.status.success() && source.is_dir()).then_some(rustc)
}
