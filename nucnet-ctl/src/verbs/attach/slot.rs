//! Attaches that make slots.

use super::{
    super::{Error, host::Session, network, step::Step},
    AttachRequest, Attached, attach,
    intent::{Found, intend, look_up},
    steps,
};
use crate::{
    kernel::netns::NetnsFd,
    model::{
        plan::Plan,
        record::{AttachWish, DatapathKind},
        slot::{Slot, SlotRanges},
    },
};
use std::path::PathBuf;

/// A slot to be made of an attach to its namespace.
pub(in crate::verbs) struct SlotWish {
    request: AttachRequest,
    slot: Slot,
    ranges: SlotRanges,
}

impl SlotWish {
    pub(in crate::verbs) fn new(request: AttachRequest, slot: Slot, ranges: SlotRanges) -> Self {
        Self {
            request,
            slot,
            ranges,
        }
    }

    fn wish(&self) -> Result<AttachWish, Error> {
        Ok(AttachWish {
            slot: Some(self.slot.clone()),
            ..self.request.wish()?
        })
    }

    /// Whether the slot is there just as wanted.
    pub(in crate::verbs) fn is_there(
        &self,
        session: &Session,
        netns: &NetnsFd,
    ) -> Result<bool, Error> {
        let found = look_up(session, &self.slot.number.id(), &self.wish()?, netns)?;
        Ok(matches!(found, Found::Same(..)))
    }

    pub(in crate::verbs) fn attach(
        &self,
        session: &mut Session,
        netns: &NetnsFd,
        path: PathBuf,
    ) -> Result<Attached, Error> {
        let (id, wish) = (self.slot.number.id(), self.wish()?);
        attach(session, id, wish, Some(self.ranges), netns, path, None)
    }

    pub(in crate::verbs) fn plan(
        &self,
        session: &mut Session,
        netns: &NetnsFd,
        path: PathBuf,
    ) -> Result<Plan<Step>, Error> {
        let network = network::for_slot(session, self.ranges)?;
        let (id, wish) = (self.slot.number.id(), self.wish()?);
        let intent = intend(session, network, id, wish, netns, path, None)?;
        Ok(steps(session, &intent, DatapathKind::Ebpf)
            .into_iter()
            .collect())
    }
}
