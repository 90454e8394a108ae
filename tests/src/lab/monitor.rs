//! A `nucnet-ctl monitor` that runs meanwhile.

use std::{
    io::{BufRead as _, BufReader},
    process::{Child, Stdio},
    sync::{Arc, Mutex},
    thread,
};

use anyhow::{Context as _, Result};
use aya::maps::{Array, Map, MapData};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use nucnet_common::abi;
use nucnet_ctl::{
    kernel::{bpf::monotonic, netfilter::readers},
    model::netfilter::MONITOR_GROUPS,
};
use serde_json::Value;

use super::{
    Lab,
    wait::{self, SOON},
};

/// A monitor and what it has printed so far.
#[derive(Debug)]
pub struct Monitor {
    child: Child,
    lines: Arc<Mutex<Vec<String>>>,
    reader: Option<thread::JoinHandle<()>>,
}

impl Lab {
    /// Runs `nucnet-ctl -o json monitor` on the host, and waits until it reads events.
    ///
    /// # Errors
    /// It cannot be run, or ends at once.
    pub fn monitor(&self, arguments: &[&str]) -> Result<Monitor> {
        let mut all = vec!["-o", "json", "monitor"];
        all.extend(arguments);
        let mut command = self.program(&all)?;
        let mut child = command.stdout(Stdio::piped()).spawn()?;
        let stdout = child.stdout.take().context("no output")?;
        let lines = Arc::new(Mutex::new(Vec::new()));
        let seen = Arc::clone(&lines);
        let reader = thread::spawn(move || {
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                lock(&seen).push(line);
            }
        });
        let mut monitor = Monitor {
            child,
            lines,
            reader: Some(reader),
        };
        let own = monitor.child.id();
        wait::until("the monitor reads", SOON, || {
            if let Some(status) = monitor.child.try_wait()? {
                anyhow::bail!("the monitor ended: {status}");
            }
            Ok(self.monitors()?.contains(&own))
        })?;
        Ok(monitor)
    }

    /// The process ids of monitors that the datapath tells events to.
    ///
    /// # Errors
    /// There is no datapath.
    pub fn monitors(&self) -> Result<Vec<u32>> {
        if self.datapath == Some("iptables") {
            let readers = self.host.within(readers)??;
            let readers = readers.into_iter();
            let monitors = readers.filter(|(group, _)| MONITOR_GROUPS.contains(group));
            return Ok(monitors.map(|(_, process)| process).collect());
        }
        let map = MapData::from_pin(self.bpffs().join("maps").join(abi::map::MONITORS))?;
        let map: Array<_, abi::Monitor> = Map::Array(map).try_into()?;
        let now = monotonic()?;
        let readers = map.iter().take(abi::size::MONITORS);
        let readers = readers.collect::<Result<Vec<_>, _>>()?;
        let current = readers.into_iter().filter(|reader| reader.until > now);
        Ok(current.map(|reader| reader.process).collect())
    }
}

fn lock(lines: &Mutex<Vec<String>>) -> std::sync::MutexGuard<'_, Vec<String>> {
    lines.lock().unwrap_or_else(|poison| poison.into_inner())
}

impl Monitor {
    /// What it has printed so far, an object a line.
    ///
    /// # Errors
    /// A line is none.
    pub fn events(&self) -> Result<Vec<Value>> {
        let lines = lock(&self.lines);
        let parse =
            |line: &String| serde_json::from_str(line).with_context(|| format!("no JSON: {line}"));
        lines.iter().map(parse).collect()
    }

    /// Waits for an event with these values.
    ///
    /// # Errors
    /// None comes.
    pub fn wait_for(&self, what: &str, is_it: impl Fn(&Value) -> bool) -> Result<Value> {
        let mut found = None;
        wait::until(what, SOON, || {
            found = self.events()?.into_iter().find(&is_it);
            Ok(found.is_some())
        })
        .with_context(|| format!("monitor said {:?}", self.events()))?;
        found.context("nothing")
    }

    /// Ends it by a signal; its exit code.
    ///
    /// # Errors
    /// It cannot be ended.
    pub fn end(mut self, signal: Signal) -> Result<Option<i32>> {
        kill(Pid::from_raw(self.child.id().try_into()?), signal)?;
        Ok(self.child.wait()?.code())
    }
}

impl Drop for Monitor {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
        if let Some(reader) = self.reader.take() {
            let _ = reader.join();
        }
    }
}
