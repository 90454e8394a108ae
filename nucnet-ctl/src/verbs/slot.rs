//! `slot create|list|remove`: places for microVMs, each with a network namespace, a TAP and a
//! guest that is the same in all of them.
//!
//! To everything else a slot is an endpoint, `slot-N`, of a network of its own kind.

use super::{
    Attachment, Error, Host, Step,
    attach::{AttachRequest, Attached, Container, SlotWish},
    detach::Detached,
    gc,
    host::Session,
    network,
    view::EndpointView,
};
use crate::{
    kernel::{
        netns::{self, NetnsFd},
        resolv,
    },
    model::{
        EndpointId, Mtu,
        plan::Plan,
        policy::{Policy, Resolver},
        preset::Preset,
        publish::PublishSpec,
        record::{DatapathKind, EndpointRecord},
        resolv::{Composed, Families},
        rule::Rule,
        slot::{self, Guest, Slot, SlotNumber, SlotRanges, Tap},
    },
};
use std::{
    net::IpAddr,
    path::{Path, PathBuf},
    time::Instant,
};

/// What is wanted of a slot. [`SlotRequest::new`] asks for the default in everything.
#[derive(Clone, Debug)]
pub struct SlotRequest {
    /// Its number.
    pub number: SlotNumber,
    /// Where its addresses are from; none: as for the slots that there are, or the default.
    pub ranges: Option<SlotRanges>,
    /// What its guest has itself.
    pub guest: Guest,
    /// Its TAP.
    pub tap: Tap,
    /// MTU; none: that of the smallest uplink.
    pub mtu: Option<Mtu>,
    /// Ports to publish.
    pub publishes: Vec<PublishSpec>,
    /// Egress policy, besides the guard that every slot has.
    pub egress: Policy,
}

impl SlotRequest {
    /// A slot with nothing published and no policy but the guard.
    pub fn new(number: SlotNumber) -> Self {
        Self {
            number,
            ranges: None,
            guest: Guest::default(),
            tap: Tap::default(),
            mtu: None,
            publishes: Vec::new(),
            egress: Policy::default(),
        }
    }

    /// The attach that it comes to, with its namespace there.
    fn wish(&self, ranges: SlotRanges, netns: &Path) -> Result<SlotWish, Error> {
        let (address, link) = ranges.addresses(self.number)?;
        let mut request = AttachRequest::new(Container::Netns(netns.to_owned()));
        request.id = Some(self.number.id());
        request.network = slot::network();
        request.addresses = vec![IpAddr::V4(address)];
        request.mac = Some(self.guest.mac());
        request.mtu = self.mtu;
        request.publishes = self.publishes.clone();
        request.egress = guarded(self.egress.clone(), ranges);
        let slot = Slot {
            number: self.number,
            address,
            link,
            guest: self.guest,
            tap: self.tap.clone(),
        };
        Ok(SlotWish::new(request, slot, ranges))
    }
}

/// A slot reaches neither metadata services, nor the host, nor its neighbours, unless a rule says
/// so in so many words.
pub(super) fn guarded(policy: Policy, ranges: SlotRanges) -> Policy {
    let guard = [
        Rule::of_preset(Preset::Metadata),
        Rule::of_preset(Preset::Host),
        Rule::of_cidr(ranges.hosts()),
    ];
    policy.with_guard(guard.into())
}

/// The host's resolvers as far as a guest can ask them; none is no error.
pub(super) fn host_resolvers() -> Result<Vec<Resolver>, Error> {
    let families = Families {
        v4: true,
        v6: false,
    };
    match Composed::new(&[], &resolv::host_files()?, families) {
        Ok(composed) => Ok(composed.resolvers),
        Err(error) => {
            tracing::debug!(error = &error as &dyn std::error::Error, "no resolvers");
            Ok(Vec::new())
        }
    }
}

/// Where the namespaces of slots are named.
fn directory(state_dir: &Path) -> PathBuf {
    state_dir.join("netns")
}

/// The namespaces of slots that are named.
pub(super) fn namespaces(state_dir: &Path) -> Result<Vec<PathBuf>, Error> {
    Ok(netns::named_in(&directory(state_dir))?)
}

/// Names a namespace for a slot that has none on record. What an earlier call left there is not
/// used again.
fn name_namespace(session: &Session, id: &EndpointId) -> Result<(NetnsFd, PathBuf), Error> {
    let directory = directory(session.state.path());
    netns::make_directory(&directory)?;
    let path = directory.join(id.as_str());
    netns::remove_named(&path)?;
    Ok((netns::create_named(&path)?, path))
}

/// The namespace of that name; none: nothing is there, or something else.
fn existing(path: &Path) -> Result<Option<NetnsFd>, Error> {
    match NetnsFd::open(path) {
        Ok(netns) => Ok(Some(netns)),
        Err(netns::Error::NotFound { .. } | netns::Error::NotANetns { .. }) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// How many slots are created before others get to change the host.
const BATCH: usize = 256;

impl Host {
    /// Creates a slot. The same again changes nothing, or repairs what is missing of it; on
    /// failure nothing stays.
    pub fn create_slot(&self, request: &SlotRequest) -> Result<Attachment, Error> {
        let created = self.create_slots(std::slice::from_ref(request))?;
        Ok(created.into_iter().next().expect("a slot was asked for"))
    }

    /// Creates slots, in the order of the requests. On failure nothing stays of what is new.
    pub fn create_slots(&self, requests: &[SlotRequest]) -> Result<Vec<Attachment>, Error> {
        self.check_capabilities()?;
        let mut created = Vec::with_capacity(requests.len());
        let mut is_first = false;
        for batch in requests.chunks(BATCH) {
            if let Err(error) = self.create_batch(batch, &mut created, &mut is_first) {
                self.take_back(created, is_first);
                return Err(error);
            }
        }
        Ok(created)
    }

    /// `is_first` becomes true where nothing of nucnet's was on the host.
    fn create_batch(
        &self,
        requests: &[SlotRequest],
        created: &mut Vec<Attachment>,
        is_first: &mut bool,
    ) -> Result<(), Error> {
        let mut session = self.open()?;
        *is_first |= session.fresh;
        for request in requests {
            let start = Instant::now();
            match create(&mut session, request) {
                Ok(slot) => created.push(Attachment::of(self, slot, start)),
                Err(error) => {
                    session.abandon_if_fresh();
                    return Err(error);
                }
            }
        }
        Ok(())
    }

    /// Removes what is new, together; where it was the first, also what was made for it.
    fn take_back(&self, created: Vec<Attachment>, is_first: bool) {
        let new = created.iter().filter(|slot| slot.is_new);
        let new: Vec<_> = new.map(|slot| slot.endpoint.id.clone()).collect();
        let leave = |_| match self.open_existing()? {
            Some(session) if is_first && session.state.is_empty()? => gc::leave(self, session),
            _ => Ok(()),
        };
        if let Err(error) = self.detach(&new).and_then(leave) {
            tracing::warn!(
                error = &error as &dyn std::error::Error,
                "not all is gone of the slots that were created before one could not be"
            );
        }
        for slot in created {
            slot.keep();
        }
    }

    /// What creating a slot would do. Nothing is changed.
    pub fn plan_slot(&self, request: &SlotRequest) -> Result<Plan<Step>, Error> {
        let mut session = self.open()?;
        let planned = plan(&mut session, request);
        session.abandon_if_fresh();
        planned
    }

    /// All slots, in the order of their numbers.
    pub fn slots(&self) -> Result<Vec<EndpointView>, Error> {
        let mut slots = self.list()?;
        slots.retain(|view| view.guest.is_some());
        slots.sort_by_key(|view| view.guest.as_ref().map(|guest| guest.slot));
        Ok(slots)
    }

    /// Removes slots; those that are gone already are fine.
    pub fn remove_slots(
        &self,
        numbers: impl IntoIterator<Item = SlotNumber>,
    ) -> Result<Detached, Error> {
        let ids: Vec<EndpointId> = numbers.into_iter().map(SlotNumber::id).collect();
        self.detach(&ids)
    }
}

/// Guests of one address are told apart by programs only.
fn carried(session: &Session) -> Result<(), Error> {
    match session.coming_kind() {
        DatapathKind::Ebpf => Ok(()),
        DatapathKind::Iptables => Err(Error::NoSlots),
    }
}

fn create(session: &mut Session, request: &SlotRequest) -> Result<Attached, Error> {
    carried(session)?;
    let id = request.number.id();
    let ranges = network::slot_ranges(session, request.ranges)?;
    // What is wrong with the number is said before anything is made.
    ranges.addresses(request.number)?;
    if let Some(record) = session.state.sound_endpoint(&id)? {
        if record.slot().is_none() {
            return Err(Error::IdTaken { id });
        }
        // Its namespace is the one on record, as long as that is there.
        if let Some(netns) = existing(&record.netns)? {
            let wish = request.wish(ranges, &record.netns)?;
            if wish.is_there(session, &netns)? {
                return wish.attach(session, &netns, record.netns);
            }
        }
        super::detach::remove(session, record)?;
    }
    let (netns, path) = name_namespace(session, &id)?;
    let created = request
        .wish(ranges, &path)
        .and_then(|wish| wish.attach(session, &netns, path.clone()));
    if created.is_err() && session.state.sound_endpoint(&id)?.is_none() {
        // The error that led here is the one to report.
        let _ = netns::remove_named(&path);
    }
    created
}

fn plan(session: &mut Session, request: &SlotRequest) -> Result<Plan<Step>, Error> {
    carried(session)?;
    let id = request.number.id();
    let ranges = network::slot_ranges(session, request.ranges)?;
    let path = directory(session.state.path()).join(id.as_str());
    let wish = request.wish(ranges, &path)?;
    if let Some(netns) = existing(&path)?
        && wish.is_there(session, &netns)?
    {
        return Ok(Plan::default());
    }
    wish.plan(session, &netns::anonymous()?, path)
}

/// Namespaces of slots that no endpoint is recorded for.
pub(super) fn unrecorded(
    state_dir: &Path,
    recorded: &[EndpointRecord],
) -> Result<Vec<PathBuf>, Error> {
    let mut paths = namespaces(state_dir)?;
    paths.retain(|path| !recorded.iter().any(|endpoint| endpoint.netns == *path));
    Ok(paths)
}
