//! What the programs would do with a packet: the object loaded once more on the pinned maps, in a
//! form that writes nothing, and run on a packet that nobody gets.

use std::path::Path;

use aya::{
    EbpfLoader,
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

/// Offset of `ingress_ifindex` and `ifindex` in `struct __sk_buff` (linux/bpf.h).
const INTERFACES: std::ops::Range<usize> = 36..44;

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
        let mut object = load(&self.pins.maps())?;
        let missing = || BpfError::NoProgram {
            name: program.into(),
        };
        let error = |action| move |source| program_error(program, action, source);
        let loaded = object.program_mut(program).ok_or_else(missing)?;
        let loaded: &mut SchedClassifier = loaded.try_into().map_err(error("opened"))?;
        loaded.load().map_err(error("loaded"))?;
        // `struct __sk_buff`, all zero but the interfaces.
        let mut context = [0; 192];
        let interfaces = [link.to_ne_bytes(), link.to_ne_bytes()].concat();
        context[INTERFACES].copy_from_slice(&interfaces);
        let options = TestRunOptions {
            data_in: Some(frame),
            ctx_in: Some(&context),
            ..TestRunOptions::new()
        };
        loaded.test_run(options).map_err(error("run"))?;
        let result = object.map(RESULT).ok_or_else(missing)?;
        let result: Array<_, Explained> = result.try_into().map_err(open_error(RESULT))?;
        result.get(&0, 0).map_err(open_error(RESULT))
    }
}

fn load(maps: &Path) -> Result<aya::Ebpf, BpfError> {
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
    loader.load(OBJECT).map_err(object_error)
}
