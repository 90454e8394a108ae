//! What the programs would do with a packet: the object loaded once more on the pinned maps, in a
//! form that writes nothing, and run on a packet that nobody gets.

use std::path::Path;

use aya::{
    Ebpf, EbpfLoader,
    maps::Array,
    programs::{SchedClassifier, TestRun as _, TestRunOptions},
};
use nucnet_common::abi::{Explained, map};

use super::{
    BpfError, Datapath,
    object::{OBJECT, object_error, program_error, raise_memory_limit},
    table::open_error,
};

/// The map in which a dry run leaves its result.
const RESULT: &str = "explained";

/// Where `ifindex` is in `struct __sk_buff` (linux/bpf.h).
const INTERFACE: std::ops::Range<usize> = 40..44;

/// A program that says what it would do.
pub struct DryRun {
    name: &'static str,
    object: Ebpf,
}

impl Datapath {
    /// What a program would do with a frame that comes in by the interface of an index.
    ///
    /// # Errors
    /// The object cannot be loaded, or this kernel cannot run a program for a test.
    pub fn dry_run(
        &self,
        program: &'static str,
        link: u32,
        frame: &[u8],
    ) -> Result<Explained, BpfError> {
        DryRun::load(&self.pins.maps(), program)?.run(link, frame)
    }
}

impl DryRun {
    /// Loads a program on the maps that are pinned in a directory. Of the programs on them, one
    /// at a time may run.
    ///
    /// # Errors
    /// The object cannot be loaded.
    pub fn load(maps: &Path, name: &'static str) -> Result<Self, BpfError> {
        raise_memory_limit();
        let mut loader = EbpfLoader::new();
        loader.override_global("DRY_RUN", &1u8, true);
        for name in map::ALL {
            let pin = maps.join(name);
            // What is not there would be pinned.
            if pin.exists() {
                loader.map_pin_path(name, pin);
            }
        }
        let object = loader.load(OBJECT).map_err(object_error)?;
        let mut this = Self { name, object };
        let loaded = this.program()?.load();
        loaded.map_err(|source| program_error(name, "loaded", source))?;
        Ok(this)
    }

    /// What it would do with a frame that comes in by the interface of an index.
    ///
    /// # Errors
    /// This kernel cannot run a program for a test.
    pub fn run(&mut self, link: u32, frame: &[u8]) -> Result<Explained, BpfError> {
        // `struct __sk_buff`, all zero but the interface that has the program. What the frame came
        // in by, `ingress_ifindex`, matters to frames that leave, and Linux 5.10 does not take it.
        let mut context = [0; 192];
        context[INTERFACE].copy_from_slice(&link.to_ne_bytes());
        let options = TestRunOptions {
            data_in: Some(frame),
            ctx_in: Some(&context),
            ..TestRunOptions::new()
        };
        let run = self.program()?.test_run(options);
        run.map_err(|source| program_error(self.name, "run", source))?;
        let result = self.object.map(RESULT).ok_or_else(|| self.missing())?;
        let result: Array<_, Explained> = result.try_into().map_err(open_error(RESULT))?;
        result.get(&0, 0).map_err(open_error(RESULT))
    }

    fn program(&mut self) -> Result<&mut SchedClassifier, BpfError> {
        let (name, missing) = (self.name, self.missing());
        let program = self.object.program_mut(name).ok_or(missing)?;
        program
            .try_into()
            .map_err(|source| program_error(name, "opened", source))
    }

    fn missing(&self) -> BpfError {
        BpfError::NoProgram {
            name: self.name.into(),
        }
    }
}
