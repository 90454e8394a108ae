//! One frame through one program, by `BPF_PROG_TEST_RUN`.

use std::{
    io,
    os::fd::{AsFd as _, AsRawFd as _, BorrowedFd},
};

use anyhow::{Context as _, Result};
use aya::programs::SchedClassifier;
use nucnet_common::abi::program;

use super::Loaded;
use crate::packets::{engine::Hook, site};

/// Whether a program asks which interface a frame came in by, and it is one.
pub(super) fn asks_for_ingress(hook: Hook) -> bool {
    match hook {
        Hook::FromHost { ingress, .. } | Hook::FromLoopback { ingress, .. } => ingress != 0,
        Hook::FromEndpoint { .. }
        | Hook::FromGuest { .. }
        | Hook::ToGuest { .. }
        | Hook::FromUplink { .. }
        | Hook::FromUplinkL3 { .. } => false,
    }
}

impl Loaded {
    /// Whether frames of known sum can be had (Linux 6.11).
    pub(super) fn probe_sums(&self) -> Result<bool> {
        let hook = Hook::FromUplink { link: site::UPLINK };
        match self.test_run(hook, &[0; 64], true) {
            Ok(_) => Ok(true),
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => Ok(false),
            Err(error) => Err(error).context("probing for known sums"),
        }
    }

    /// Whether test runs take the interface that a frame came in by (Linux 5.10's do not).
    pub(super) fn probe_ingress(&self) -> Result<bool> {
        let hook = Hook::FromUplink { link: site::UPLINK };
        match self.test_run(hook, &[0; 64], false) {
            Ok(_) => Ok(true),
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => Ok(false),
            Err(error) => Err(error).context("probing for interfaces"),
        }
    }

    /// Whether the kernel checks that the programs keep the sums of frames.
    pub fn knows_sums(&self) -> bool {
        self.knows_sums
    }

    /// The mean time that a program takes for a frame, in nanoseconds, over many runs. Each run
    /// finds the frame as the one before left it: dropped frames stay as they are.
    ///
    /// # Errors
    /// The kernel refuses the run.
    pub fn nanoseconds(&self, hook: Hook, frame: &[u8], runs: u32) -> io::Result<u32> {
        let (_, _, nanoseconds) = self.test_runs(hook, frame, false, runs)?;
        Ok(nanoseconds)
    }

    /// The same over runs that all find the frame as it is given. A run's own time is less
    /// exact.
    ///
    /// # Errors
    /// The kernel refuses the run.
    pub fn nanoseconds_anew(&self, hook: Hook, frame: &[u8], runs: u32) -> io::Result<u32> {
        let mut sum = 0;
        for _ in 0..runs {
            sum += u64::from(self.nanoseconds(hook, frame, 1)?);
        }
        Ok((sum / u64::from(runs)) as u32)
    }

    /// Runs a frame whose sum is known, or not: what the program returns, and what it makes of
    /// the frame.
    pub(super) fn test_run(
        &self,
        hook: Hook,
        frame: &[u8],
        knows_sum: bool,
    ) -> io::Result<(i32, Vec<u8>)> {
        let (code, output, _) = self.test_runs(hook, frame, knows_sum, 1)?;
        Ok((code, output))
    }

    fn test_runs(
        &self,
        hook: Hook,
        frame: &[u8],
        knows_sum: bool,
        runs: u32,
    ) -> io::Result<(i32, Vec<u8>, u32)> {
        self.runner(hook)?.run(frame, knows_sum, runs)
    }

    /// A program, for any thread to run.
    ///
    /// # Errors
    /// The program is not loaded.
    pub fn runner(&self, hook: Hook) -> io::Result<Runner<'_>> {
        let (name, link, ingress, mark) = match hook {
            Hook::FromEndpoint { link } => (program::FROM_ENDPOINT, link, 0, 0),
            Hook::FromGuest { link } => (program::FROM_GUEST, link, link, 0),
            Hook::ToGuest { link } => (program::TO_GUEST, link, link, 0),
            Hook::FromUplink { link } => (program::FROM_UPLINK, link, link, 0),
            Hook::FromUplinkL3 { link } => (program::FROM_UPLINK_L3, link, link, 0),
            Hook::FromHost { link, ingress } => (program::FROM_HOST, link, ingress, 0),
            Hook::FromLoopback { ingress, mark } => {
                (program::FROM_LOOPBACK, site::LOOPBACK, ingress, mark)
            }
        };
        let program: &SchedClassifier = self
            .object
            .program(name)
            .and_then(|program| program.try_into().ok())
            .expect("program");
        // Only programs of which `asks_for_ingress` says so read it.
        let ingress = if self.knows_ingress { ingress } else { 0 };
        // `struct __sk_buff` (linux/bpf.h): all zero but mark, interfaces and segments.
        let mut context = [0; 192];
        context[8..12].copy_from_slice(&mark.to_ne_bytes());
        context[36..40].copy_from_slice(&ingress.to_ne_bytes());
        context[40..44].copy_from_slice(&link.to_ne_bytes());
        context[176..180].copy_from_slice(&self.segment.to_ne_bytes());
        let program = program.fd().map_err(io::Error::other)?.as_fd();
        Ok(Runner { program, context })
    }
}

/// A program and where its frames come from.
#[derive(Debug)]
pub struct Runner<'l> {
    program: BorrowedFd<'l>,
    context: [u8; 192],
}

impl Runner<'_> {
    /// Runs the program on a frame, whatever becomes of it.
    ///
    /// # Errors
    /// The kernel refuses the run.
    pub fn send(&self, frame: &[u8]) -> io::Result<()> {
        self.run(frame, false, 1).map(drop)
    }

    fn run(&self, frame: &[u8], knows_sum: bool, runs: u32) -> io::Result<(i32, Vec<u8>, u32)> {
        let mut output = vec![0; frame.len() + 256];
        let mut attributes = TestRun {
            prog_fd: self.program.as_raw_fd() as u32,
            data_size_in: frame.len() as u32,
            data_size_out: output.len() as u32,
            data_in: frame.as_ptr() as u64,
            data_out: output.as_mut_ptr() as u64,
            repeat: runs,
            ctx_size_in: self.context.len() as u32,
            ctx_in: self.context.as_ptr() as u64,
            flags: if knows_sum {
                BPF_F_TEST_SKB_CHECKSUM_COMPLETE
            } else {
                0
            },
            ..TestRun::default()
        };
        // SAFETY: the attributes are those of BPF_PROG_TEST_RUN, and every buffer lives on and
        // has the size that is given with it.
        let result = unsafe {
            libc::syscall(
                libc::SYS_bpf,
                BPF_PROG_TEST_RUN,
                &raw mut attributes,
                size_of::<TestRun>(),
            )
        };
        if result != 0 {
            return Err(io::Error::last_os_error());
        }
        output.truncate(attributes.data_size_out as usize);
        Ok((attributes.retval as i32, output, attributes.duration))
    }
}

/// Command number of `bpf(2)`.
const BPF_PROG_TEST_RUN: libc::c_int = 10;
/// The kernel sums the frame up before the run and compares the sum it kept after it.
const BPF_F_TEST_SKB_CHECKSUM_COMPLETE: u32 = 1 << 2;

/// `union bpf_attr` for `BPF_PROG_TEST_RUN` (linux/bpf.h); aya's has no flags for frames.
#[repr(C)]
#[derive(Default)]
struct TestRun {
    prog_fd: u32,
    retval: u32,
    data_size_in: u32,
    data_size_out: u32,
    data_in: u64,
    data_out: u64,
    repeat: u32,
    duration: u32,
    ctx_size_in: u32,
    ctx_size_out: u32,
    ctx_in: u64,
    ctx_out: u64,
    flags: u32,
    cpu: u32,
    batch_size: u32,
    pad: u32,
}
