//! `cargo xtask build`: the BPF object from source, then `nucnet-ctl`.

use anyhow::Result;

use crate::{
    apt::Consent,
    object::{self, Agreement},
    toolchain::Toolchain,
    workspace::{Profile, Workspace},
};

/// Build the BPF object from source (target/bpf/nucnet.o) and nucnet-ctl
#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// Build nucnet-ctl optimised: target/release/nucnet-ctl
    #[arg(long, short)]
    release: bool,
    /// Write the rebuilt object and the record of its tools to nucnet-ctl/bpf, to be committed
    #[arg(long)]
    update_object: bool,
}

/// Runs the verb.
pub(crate) fn main(workspace: &Workspace, consent: Consent, arguments: &Arguments) -> Result<()> {
    let toolchain = Toolchain::ensure(workspace, consent)?;
    let record = object::build(workspace, &toolchain)?;
    if arguments.update_object {
        object::commit(workspace, &record)?;
    }
    let rebuilt = object::built(workspace);
    let embedded = match object::compare(workspace, &record)? {
        Agreement::Same => None,
        Agreement::Stale => {
            eprintln!(
                "The committed object is older than its sources; nucnet-ctl embeds the rebuilt one.\n\
                 To commit that: cargo xtask build --update-object"
            );
            Some(rebuilt.as_path())
        }
        Agreement::OtherTools => {
            eprintln!(
                "The committed object comes from another compiler (nucnet-ctl/bpf/nucnet.o.toml);\n\
                 nucnet-ctl embeds the rebuilt one, by {}.",
                record.rustc
            );
            Some(rebuilt.as_path())
        }
    };
    let profile = if arguments.release {
        Profile::Release
    } else {
        Profile::Debug
    };
    let ctl = workspace.build_ctl(profile, embedded)?;
    println!("{}\n{}", rebuilt.display(), ctl.display());
    Ok(())
}
