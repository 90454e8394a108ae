//! `slot`.

use std::io::{self, Write};

use clap::{Args, Subcommand};
use nucnet_ctl::{
    Error, Host,
    kernel::account,
    model::{
        Invalid, Problem,
        slot::{Guest, SlotNumbers, SlotRanges, Tap},
    },
    verbs::{EndpointView, SlotRequest},
};

use super::{
    columns::Columns,
    egress::EgressArgs,
    endpoint,
    global::Global,
    output::{done, joined, show, show_plan, undone},
    value::{all, one, optional},
};

/// Create, show and remove slots for microVMs
///
/// A slot is a network namespace with a TAP in it, for a virtual machine monitor to open. Its
/// guest has the same address, gateway and link-layer address in every slot, so that machines
/// of one snapshot can run in any of them; the host knows it by an address of its slot's own, and
/// every other verb by the id slot-N.
///
/// Whatever its policy says, a guest reaches neither metadata services, nor the host, nor the
/// addresses of other slots, but for what --allow names among these (host:8080, 10.11.0.7:5432).
#[derive(Debug, Subcommand)]
pub(super) enum SlotVerb {
    /// Create slots
    ///
    /// What the virtual machine monitor needs is printed: start it in the namespace, have it open
    /// the TAP, and give its guest the address, the mask, the gateway and the link-layer address.
    /// The same again changes nothing.
    #[command(after_help = "Examples:\n  nucnet-ctl slot create 1 -p 8080:80\n  \
        nucnet-ctl slot create 1-100 --tap-owner firecracker\n  \
        ip netns exec $(nucnet-ctl slot create 7 -o json | jq -r .netns) firecracker ...")]
    Create(Box<CreateArgs>),
    /// Show all slots
    #[command(after_help = "Example:\n  nucnet-ctl slot list")]
    List,
    /// Remove slots
    ///
    /// Removing what is gone succeeds. A virtual machine that still runs has no network then.
    #[command(after_help = "Example:\n  nucnet-ctl slot remove 1-100")]
    Remove {
        /// Which ones: N, or A-B
        #[arg(required = true, value_name = "N")]
        slots: Vec<String>,
    },
}

#[derive(Debug, Args)]
pub(super) struct CreateArgs {
    /// Which ones: N, or A-B
    #[arg(value_name = "N")]
    slots: String,
    /// Forward a port of the host to the guest
    #[arg(short = 'p', long = "publish", value_name = "SPEC")]
    publishes: Vec<String>,
    #[command(flatten)]
    egress: EgressArgs,
    /// Largest IP packet in bytes [default: the smallest of the uplinks']
    #[arg(long, value_name = "BYTES", allow_negative_numbers = true)]
    mtu: Option<String>,
    /// Where the addresses are from by which slots are known; one for all [default: 10.11.0.0/16]
    #[arg(long, value_name = "CIDR")]
    hosts: Option<String>,
    /// Where the host's addresses on the links to slots are from [default: 10.12.0.0/16]
    #[arg(long, value_name = "CIDR")]
    links: Option<String>,
    /// The guest's own address and prefix [default: 169.254.0.21/30]
    #[arg(long, value_name = "ADDR/LENGTH")]
    guest_ip: Option<String>,
    /// Its gateway [default: 169.254.0.22, or the first other address of --guest-ip]
    #[arg(long, value_name = "ADDR")]
    guest_gateway: Option<String>,
    /// Its link-layer address [default: 02:fc:00:00:00:05]
    #[arg(long, value_name = "MAC")]
    guest_mac: Option<String>,
    /// Name of the TAP
    #[arg(long, value_name = "NAME", default_value = "tap0")]
    tap: String,
    /// Who may open the TAP without being root: a name or a number
    #[arg(long, value_name = "USER")]
    tap_owner: Option<String>,
    /// The same for the members of a group
    #[arg(long, value_name = "GROUP")]
    tap_group: Option<String>,
    /// Have a TAP of several queues
    #[arg(long)]
    tap_multi_queue: bool,
    /// Length of its transmit queue in packets
    #[arg(long, value_name = "N", default_value_t = 5000)]
    tap_queue_len: u32,
}

/// What an option names, if it is given.
fn found(
    option: &Option<String>,
    look_up: impl Fn(&str) -> Option<u32>,
    field: &'static str,
    problem: Problem,
) -> Result<Option<u32>, Invalid> {
    let Some(text) = option else {
        return Ok(None);
    };
    let number = look_up(text).ok_or_else(|| Invalid {
        field,
        value: text.clone(),
        problem,
    })?;
    Ok(Some(number))
}

impl CreateArgs {
    fn requests(&self) -> Result<Vec<SlotRequest>, Error> {
        let numbers: SlotNumbers = one(&self.slots, "slot")?;
        let default = SlotRanges::default();
        let ranges = match (&self.hosts, &self.links) {
            (None, None) => None,
            (hosts, links) => Some(SlotRanges::new(
                optional(hosts.as_deref(), "--hosts")?.unwrap_or(default.hosts()),
                optional(links.as_deref(), "--links")?.unwrap_or(default.links()),
            )?),
        };
        let guest = Guest::new(
            self.guest_ip.as_deref(),
            self.guest_gateway.as_deref(),
            optional(self.guest_mac.as_deref(), "--guest-mac")?,
        )?;
        let tap = Tap {
            name: one(&self.tap, "--tap")?,
            owner: found(&self.tap_owner, account::user, "--tap-owner", Problem::User)?,
            group: found(
                &self.tap_group,
                account::group,
                "--tap-group",
                Problem::Group,
            )?,
            multi_queue: self.tap_multi_queue,
            queue_len: self.tap_queue_len,
        };
        let (mtu, publishes) = (
            optional(self.mtu.as_deref(), "--mtu")?,
            all(&self.publishes, "-p")?,
        );
        let egress = self.egress.policy()?;
        let request = |number| SlotRequest {
            ranges,
            guest,
            tap: tap.clone(),
            mtu,
            publishes: publishes.clone(),
            egress: egress.clone(),
            ..SlotRequest::new(number)
        };
        Ok(numbers.iter().map(request).collect())
    }
}

impl SlotVerb {
    pub(super) fn call(self, host: &Host, global: &Global) -> Result<(), Error> {
        match self {
            Self::Create(arguments) => create(&arguments, host, global),
            Self::List => {
                let slots = host.slots()?;
                show(global, &slots, |out| list(out, &slots))
            }
            Self::Remove { slots } => {
                let slots: Vec<SlotNumbers> = all(&slots, "slot")?;
                let numbers = || slots.iter().flat_map(|numbers| numbers.iter());
                if global.dry_run {
                    let mut lines = Vec::new();
                    for number in numbers() {
                        lines.extend(undone(&host.plan_detach(&number.id())?));
                    }
                    return show_plan(global, &lines);
                }
                let removed = host.remove_slots(numbers())?;
                let json = serde_json::json!({
                    "removed": removed.removed, "absent": removed.absent
                });
                show(global, &json, |out| {
                    for id in &removed.removed {
                        writeln!(out, "{id}: removed")?;
                    }
                    for id in &removed.absent {
                        writeln!(out, "{id}: was not there")?;
                    }
                    Ok(())
                })
            }
        }
    }
}

fn create(arguments: &CreateArgs, host: &Host, global: &Global) -> Result<(), Error> {
    let requests = arguments.requests()?;
    if global.dry_run {
        let mut lines = Vec::new();
        for request in &requests {
            lines.extend(done(&host.plan_slot(request)?));
        }
        return show_plan(global, &lines);
    }
    let created = host.create_slots(&requests)?;
    let slots: Vec<EndpointView> = created.into_iter().map(|slot| slot.keep()).collect();
    match slots.as_slice() {
        [slot] => show(global, slot, |out| {
            writeln!(out, "{}", slot.id)?;
            endpoint::show_details(out, slot)
        }),
        slots => show(global, &slots, |out| list(out, slots)),
    }
}

fn list(out: &mut dyn Write, slots: &[EndpointView]) -> io::Result<()> {
    let mut columns = Columns::new(["ID", "STATE", "ADDRESS", "NAMESPACE", "PUBLISHED"]);
    for slot in slots {
        let host_ip = slot.guest.as_ref().map(|guest| guest.host_ip);
        columns.line([
            &slot.id,
            &slot.state,
            &joined(host_ip),
            &slot.netns.display(),
            &joined(endpoint::published(slot)),
        ]);
    }
    columns.print(out)
}
