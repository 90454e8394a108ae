//! A real guest: QEMU boots a small Linux on the TAP of a slot, as a virtual machine monitor does,
//! and its shell is spoken to by the console.

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use nucnet_ctl::kernel::netns::{NetnsFd, run_in};

use super::{Lab, Slot, microvm_program};

/// How long a guest may say nothing. It is emulated, on a machine that has other things to do:
/// this only ends what hangs.
const PATIENCE: Duration = Duration::from_secs(300);

/// For the kernel: no word on the console but of its end, and no end because the machine that
/// emulates it is slow.
const KERNEL: &str = "console=ttyS0 panic=-1 loglevel=1 no_timer_check nowatchdog";

/// Starts the line with the status of a command.
const MARK: &str = "@@ ";

/// A guest.
#[derive(Debug)]
pub struct Microvm {
    name: String,
    qemu: Child,
    console: ChildStdin,
    said: Receiver<String>,
}

/// What a command in a guest came to.
#[derive(Debug)]
pub struct Said {
    /// Its exit code.
    pub status: i32,
    /// Its output and errors.
    pub text: String,
}

impl Said {
    /// What it printed, if it succeeded.
    ///
    /// # Errors
    /// It has not.
    pub fn ok(self) -> Result<String> {
        ensure!(self.status == 0, "status {}: {}", self.status, self.text);
        Ok(self.text)
    }
}

impl Lab {
    /// Starts a guest in a slot. It boots meanwhile: [`Microvm::booted`] waits.
    ///
    /// # Errors
    /// There is nothing to boot, or QEMU does not start.
    pub fn microvm(&self, name: &str, slot: &Slot) -> Result<Microvm> {
        let program = microvm_program().context("no microVM")?;
        let netns = NetnsFd::open(&self.host.path(slot.text("netns")?))?;
        let prefix = slot.text("netmask")?.parse::<std::net::Ipv4Addr>()?;
        let identity = format!(
            "nucnet_address={}/{} nucnet_gateway={} nucnet_mtu={}",
            slot.text("guest_ip")?,
            prefix.to_bits().count_ones(),
            slot.text("gateway")?,
            slot.json["mtu"],
        );
        let tap = slot.text("tap")?;
        let mut command = Command::new(program);
        command
            .arg("-append")
            .arg(format!("{KERNEL} {identity}"))
            .arg("-netdev")
            .arg(format!(
                "tap,id=tap,ifname={tap},script=no,downscript=no,vnet_hdr=on"
            ))
            .arg("-device")
            .arg(format!(
                "virtio-net-pci,netdev=tap,romfile=,mac={}",
                slot.text("guest_mac")?
            ))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped());
        let mut qemu = run_in(&netns, || command.spawn())?.context("starting QEMU")?;
        let console = qemu.stdin.take().context("no pipe")?;
        let output = BufReader::new(qemu.stdout.take().context("no pipe")?);
        let (sender, said) = channel();
        // Ends with QEMU.
        std::thread::spawn(move || {
            for line in output.split(b'\n').map_while(Result::ok) {
                let line = String::from_utf8_lossy(&line).replace('\r', "");
                if sender.send(line).is_err() {
                    return;
                }
            }
        });
        Ok(Microvm {
            name: name.to_owned(),
            qemu,
            console,
            said,
        })
    }
}

impl Microvm {
    /// Waits until its network is up and its shell listens.
    ///
    /// # Errors
    /// It does not boot.
    pub fn booted(&self) -> Result<()> {
        self.answer().context("it does not boot")?.ok().map(drop)
    }

    /// Runs a command of the guest's shell to its end.
    ///
    /// # Errors
    /// The guest is gone, or says nothing.
    pub fn run(&mut self, command: &str) -> Result<Said> {
        writeln!(self.console, "{command}")?;
        self.answer().with_context(|| format!("`{command}`"))
    }

    fn answer(&self) -> Result<Said> {
        let name = &self.name;
        let mut text = String::new();
        loop {
            match self.said.recv_timeout(PATIENCE) {
                Ok(line) => match line.strip_prefix(MARK) {
                    Some(status) => {
                        // The mark has a line of its own, whatever comes before it.
                        text.pop();
                        let status = status.trim().parse()?;
                        return Ok(Said { status, text });
                    }
                    None => text = text + &line + "\n",
                },
                Err(RecvTimeoutError::Timeout) => {
                    bail!("{name} says nothing for {PATIENCE:?}, after: {text}")
                }
                Err(RecvTimeoutError::Disconnected) => bail!("{name} ended, after: {text}"),
            }
        }
    }
}

impl Drop for Microvm {
    fn drop(&mut self) {
        let _ = self.qemu.kill();
        let _ = self.qemu.wait();
    }
}
