//! `cargo xtask demo`: nucnet at work, told as a short story on machines of its own.

mod bars;
mod bpftool;
mod interrupt;
mod race;
mod stage;
mod story;

use anyhow::{Context as _, Result, ensure};

use crate::{
    apt::{self, Consent, tool},
    demo::{interrupt::Interrupt, stage::Stage, story::Story},
    workspace::Workspace,
};

/// Show nucnet at work: published ports, NAT, egress rules, a race against iptables
///
/// Everything happens in namespaces of its own and is gone afterwards. Needs root.
#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// Leave out the race at the end
    #[arg(long)]
    without_race: bool,
}

/// Runs the verb.
pub(crate) fn main(workspace: &Workspace, consent: Consent, arguments: &Arguments) -> Result<()> {
    ensure!(
        apt::is_root(),
        "network namespaces need root: sudo env \"PATH=$PATH\" cargo xtask demo"
    );
    let tools = [tool::CURL, tool::IP, tool::IPTABLES, tool::PING];
    apt::ensure_tools(&tools, "the demo", consent)?;
    let programs = workspace.build_for_lab()?;

    let interrupt = Interrupt::watch()?;
    let mut story = Story::new(interrupt.clone(), &programs);
    let told = tell(&mut story, arguments).with_context(|| story.place());
    // Here all machines are gone, whatever has become of the story.
    interrupt.obey();
    told
}

fn tell(story: &mut Story, arguments: &Arguments) -> Result<()> {
    stage::introduce(story)?;
    {
        let mut stage = Stage::build()?;
        stage.attach(story)?;
        stage.publish(story)?;
        stage.flow(story)?;
        stage.localhost(story)?;
        stage.masquerade(story)?;
        stage.neighbours(story)?;
        stage.egress(story)?;
        stage.downloads(story)?;
        stage.leave(story)?;
    }
    if !arguments.without_race {
        race::run(story)?;
    }
    Ok(())
}
