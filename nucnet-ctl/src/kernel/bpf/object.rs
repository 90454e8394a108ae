//! The BPF object inside this program, and how it gets into the kernel.

use std::{path::Path, thread};

use aya::{
    Ebpf, EbpfError, EbpfLoader,
    maps::MapError,
    programs::{Program, ProgramError, ProgramType},
    sys::{BpfHelper, is_helper_supported},
    util::KernelVersion,
};
use nix::{
    libc,
    sys::resource::{RLIM_INFINITY, Resource, setrlimit},
};
use nucnet_common::abi::map;

use super::{
    error::{BpfError, Reasons, errno},
    sys,
};

/// The compiled programs, an ELF file.
pub static OBJECT: &[u8] = aya::include_bytes_aligned!(env!("NUCNET_BPF_OBJECT"));

/// SHA-256 of [`OBJECT`], hexadecimal.
pub const OBJECT_HASH: &str = env!("NUCNET_BPF_SHA256");

/// Loads the object with maps of its own and no pins: what is loaded goes with the value.
/// For test runs of the programs.
///
/// # Errors
/// Those of the kernel and its verifier.
pub fn load_unpinned() -> Result<Ebpf, BpfError> {
    load(None)
}

/// Loads the object. With `maps`, a directory on a BPF filesystem, every map that is pinned
/// there is taken as it is, and every other one is made and pinned there.
pub(super) fn load(maps: Option<&Path>) -> Result<Ebpf, BpfError> {
    raise_memory_limit();
    let mut loader = EbpfLoader::new();
    // A kernel that cannot tell has no such helper either.
    let helper = BpfHelper::BPF_FUNC_set_retval;
    let chooses_error = is_helper_supported(ProgramType::CgroupSockAddr, helper).unwrap_or(false);
    let chooses_error = u8::from(chooses_error);
    loader.override_global("CHOOSES_ERROR", &chooses_error, true);
    if let Some(directory) = maps {
        for name in map::ALL {
            loader.map_pin_path(name, directory.join(name));
        }
    }
    sys::before_change().map_err(|error| object_error(EbpfError::ProgramError(error.into())))?;
    let mut object = loader.load(OBJECT).map_err(object_error)?;
    // The verifier walks through one program a processor at a time.
    thread::scope(|scope| {
        let loads: Vec<_> = object
            .programs_mut()
            .map(|(name, program)| scope.spawn(move || load_program(name, program)))
            .collect();
        loads.into_iter().try_for_each(|load| match load.join() {
            Ok(loaded) => loaded,
            Err(panic) => std::panic::resume_unwind(panic),
        })
    })?;
    Ok(object)
}

fn load_program(name: &str, program: &mut Program) -> Result<(), BpfError> {
    match program {
        Program::SchedClassifier(program) => program.load(),
        Program::CgroupSockAddr(program) => program.load(),
        _ => return Err(BpfError::NoProgram { name: name.into() }),
    }
    .map_err(|source| program_error(name, "loaded", source))
}

/// Before Linux 5.11 the memory of maps counts as locked memory of the process.
pub(super) fn raise_memory_limit() {
    if KernelVersion::current().is_ok_and(|version| version < KernelVersion::new(5, 11, 0)) {
        // When it is refused, and the limit is too low, making a map says so.
        let _ = setrlimit(Resource::RLIMIT_MEMLOCK, RLIM_INFINITY, RLIM_INFINITY);
    }
}

pub(super) fn object_error(source: EbpfError) -> BpfError {
    let object = match &source {
        EbpfError::MapError(MapError::CreateError { name, .. }) => format!("map {name}"),
        _ => "BPF object".into(),
    };
    if is_refusal(&source) {
        BpfError::NotPermitted {
            object,
            reasons: Reasons::gather(),
            source: source.into(),
        }
    } else {
        BpfError::Object {
            hash: OBJECT_HASH,
            source: Box::new(source),
        }
    }
}

pub(super) fn program_error(name: &str, action: &'static str, source: ProgramError) -> BpfError {
    if is_refusal(&source) {
        let object = format!("program {name}");
        BpfError::NotPermitted {
            object,
            reasons: Reasons::gather(),
            source: source.into(),
        }
    } else {
        BpfError::Program {
            name: name.into(),
            action,
            source: Box::new(source),
        }
    }
}

/// Not `EACCES`: that is what the verifier says of a program that it rejects.
fn is_refusal(error: &(dyn std::error::Error + 'static)) -> bool {
    errno(error) == Some(libc::EPERM)
}
