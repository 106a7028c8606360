//! Types shared by the kernel-side programs and the daemon.
#![no_std]
