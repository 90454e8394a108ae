//! The BPF object: built, stripped, checked, compared with the committed one.
//!
//! The committed object lies in `nucnet-ctl/bpf`, so that stable Rust alone builds a working
//! `nucnet-ctl`. Beside it is a record of what it was built with: the same tools give the
//! same bytes, on every machine and in every directory.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, bail, ensure};
use aya_obj::{Map, Object, btf::BtfKind};
use nucnet_common::abi;
use object::{
    Object as _, ObjectSection as _, ObjectSymbol as _, SymbolKind,
    build::elf::{Builder, SectionData},
    elf,
};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use crate::{
    loops, run, stack,
    toolchain::{LINKER_VERSION, TARGET, Toolchain},
    workspace::Workspace,
};

/// What an object was built with, and its hash.
#[derive(Debug, Deserialize, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(crate) struct Record {
    /// `rustc --version`.
    pub(crate) rustc: String,
    /// Version of LLVM.
    pub(crate) llvm: String,
    /// Version of `bpf-linker`.
    pub(crate) bpf_linker: String,
    /// Of the object, in hexadecimal.
    pub sha256: String,
}

impl Record {
    /// Whether both objects come from the same tools.
    pub(crate) fn same_tools(&self, other: &Self) -> bool {
        (&self.rustc, &self.llvm, &self.bpf_linker)
            == (&other.rustc, &other.llvm, &other.bpf_linker)
    }
}

/// How the rebuilt object and the committed one stand to each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Agreement {
    /// The same bytes.
    Same,
    /// The same tools gave other bytes: the sources have moved on.
    Stale,
    /// Other tools gave other bytes, which proves nothing.
    OtherTools,
}

/// The object that `nucnet-ctl` embeds.
pub(crate) fn committed(workspace: &Workspace) -> PathBuf {
    workspace.root.join("nucnet-ctl/bpf/nucnet.o")
}

/// The object that [`build`] leaves.
pub(crate) fn built(workspace: &Workspace) -> PathBuf {
    workspace.target.join("bpf/nucnet.o")
}

/// Builds the object from source to [`built`], without its debug sections, and checks it.
pub(crate) fn build(workspace: &Workspace, toolchain: &Toolchain) -> Result<Record> {
    run::step(
        "building the BPF object",
        &mut toolchain.cargo(workspace, "build"),
    )?;
    let linked = workspace
        .target
        .join("bpf-build")
        .join(TARGET)
        .join("release/nucnet");
    let linked = fs::read(&linked).with_context(|| format!("cannot read {}", linked.display()))?;
    let object = finish(&linked).context("cannot finish the BPF object")?;
    let path = built(workspace);
    write_if_changed(&path, &object)?;
    verify(workspace, &path)?;
    Ok(Record {
        rustc: toolchain.rustc_version().to_owned(),
        llvm: toolchain.llvm_version().to_owned(),
        bpf_linker: LINKER_VERSION.to_owned(),
        sha256: sha256(&object),
    })
}

/// Compares what [`build`] has left with the committed object.
pub(crate) fn compare(workspace: &Workspace, built: &Record) -> Result<Agreement> {
    let committed = committed(workspace);
    let bytes =
        fs::read(&committed).with_context(|| format!("cannot read {}", committed.display()))?;
    let record = record_of(&committed);
    let record = fs::read_to_string(&record)
        .map_err(anyhow::Error::from)
        .and_then(|text| Ok(toml::from_str::<Record>(&text)?))
        .with_context(|| format!("cannot read {}", record.display()))?;
    ensure!(
        sha256(&bytes) == record.sha256,
        "{} is not the object that its record describes",
        committed.display()
    );
    Ok(if record.sha256 == built.sha256 {
        Agreement::Same
    } else if record.same_tools(built) {
        Agreement::Stale
    } else {
        Agreement::OtherTools
    })
}

/// Makes what [`build`] has left the committed object.
pub(crate) fn commit(workspace: &Workspace, record: &Record) -> Result<()> {
    let committed = committed(workspace);
    write_if_changed(&committed, &fs::read(built(workspace))?)?;
    let text = format!(
        "# What nucnet.o was built with. Written by `cargo xtask build --update-object`.\n{}",
        toml::to_string(record)?
    );
    write_if_changed(&record_of(&committed), text.as_bytes())
}

/// Checks what can be checked of an object without loading it.
pub(crate) fn verify(workspace: &Workspace, path: &Path) -> Result<()> {
    let bytes = fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    verify_bytes(workspace, &bytes).with_context(|| format!("{} is not sound", path.display()))
}

fn verify_bytes(workspace: &Workspace, bytes: &[u8]) -> Result<()> {
    let elf = object::File::parse(bytes)?;
    // The verifier rejects what may panic with "last insn is not an exit or jmp", which
    // names nothing.
    let panics: Vec<_> = elf
        .symbols()
        .filter_map(|symbol| symbol.name().ok())
        .filter(|name| name.contains("9panicking"))
        .map(|name| format!("{:#}", rustc_demangle::demangle(name)))
        .collect();
    ensure!(
        panics.is_empty(),
        "code that may panic is left in it: {}",
        panics.join(", ")
    );

    for symbol in elf
        .symbols()
        .filter(|symbol| symbol.kind() == SymbolKind::Text)
    {
        let Some(section) = symbol.section_index() else {
            continue;
        };
        let section = elf.section_by_index(section)?;
        let Some(code) = section.data_range(symbol.address(), symbol.size())? else {
            continue;
        };
        ensure!(
            loops::refused(code).is_empty(),
            "Linux 6.1 will refuse a loop in {:#}: its end lies before its head",
            rustc_demangle::demangle(symbol.name()?)
        );
    }
    stack::check(&elf)?;

    let root = workspace.root.as_os_str().as_encoded_bytes();
    ensure!(
        !bytes.windows(root.len()).any(|window| window == root),
        "it names the directory that it was built in"
    );

    let object = Object::parse(bytes)?;
    ensure!(
        object.license.as_bytes() == b"GPL",
        "its licence is {:?}",
        object.license
    );
    for name in abi::map::ALL {
        match object.maps.get(name) {
            None => bail!("the map {name} is missing"),
            Some(Map::Legacy(_)) => bail!("the map {name} has no BTF"),
            Some(Map::Btf(_)) => {}
        }
    }
    for name in PROGRAMS {
        ensure!(
            object.programs.contains_key(name),
            "the program {name} is missing"
        );
        let btf = object.btf.as_ref().context("it has no BTF")?;
        btf.id_by_type_name_kind(name, BtfKind::Func)
            .with_context(|| format!("the program {name} has no BTF"))?;
    }
    Ok(())
}

/// Every program of the object.
const PROGRAMS: [&str; 9] = [
    abi::program::FROM_ENDPOINT,
    abi::program::FROM_GUEST,
    abi::program::TO_GUEST,
    abi::program::FROM_UPLINK,
    abi::program::FROM_UPLINK_L3,
    abi::program::FROM_HOST,
    abi::program::FROM_LOOPBACK,
    abi::program::BIND4,
    abi::program::BIND6,
];

/// What the names of functions begin with that the kernel is to verify by themselves
/// (`nucnet-ebpf/src/step.rs`).
const STEP: &str = "step_";

/// Takes out of an object what only debuggers and linkers read. BTF, which the kernel and
/// bpftool read, stays; its relocations do not, because this object is final.
fn finish(bytes: &[u8]) -> Result<Vec<u8>> {
    let mut builder = Builder::read(bytes)?;
    for section in builder.sections.iter_mut() {
        let name = section.name.as_slice();
        if [".debug_", ".rel.debug_", ".rel.BTF"]
            .iter()
            .any(|it| name.starts_with(it.as_bytes()))
        {
            section.delete = true;
        }
    }
    builder.delete_orphans();
    // libbpf takes visible functions of `.text` for an interface, which the kernel verifies apart
    // from its callers. The steps are made for that; anything else (`memset`) it would reject.
    let text = builder
        .sections
        .iter()
        .find(|it| it.name.as_slice() == b".text")
        .map(|it| it.id());
    for symbol in builder.symbols.iter_mut() {
        let is_step = symbol.name.starts_with(STEP.as_bytes());
        if symbol.section == text && symbol.st_bind() != elf::STB_LOCAL && !is_step {
            symbol.st_other = elf::STV_HIDDEN;
        }
    }
    // LLVM keeps names of sections and of symbols in one table; the writer wants two.
    let names = builder.sections.add();
    names.name = b".shstrtab".as_slice().into();
    names.sh_type = elf::SHT_STRTAB;
    names.sh_addralign = 1;
    names.data = SectionData::SectionString;
    let mut stripped = Vec::new();
    builder.write(&mut stripped)?;
    Ok(stripped)
}

fn record_of(object: &Path) -> PathBuf {
    object.with_extension("o.toml")
}

fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes)
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect()
}

/// A file that is not written again does not make cargo build again.
fn write_if_changed(path: &Path, content: &[u8]) -> Result<()> {
    if fs::read(path).is_ok_and(|present| present == content) {
        return Ok(());
    }
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent)?;
    }
    fs::write(path, content).with_context(|| format!("cannot write {}", path.display()))
}
