//! Events that the programs tell: a ring buffer for each monitor.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use aya::maps::{Map, MapData, RingBuf};
use bytes::{Buf, TryGetError};
use nucnet_common::abi::{Address, Event, EventLimit, Lost, map, size};

use super::{BpfError, Cells, Datapath, reader::Claim, table::open_error};

/// Reads an event as the programs wrote it.
///
/// # Errors
/// There are fewer bytes than an event has.
pub fn decode(mut bytes: &[u8]) -> Result<Event, TryGetError> {
    let bytes = &mut bytes;
    // The order of the fields of `Event`.
    Ok(Event {
        time: bytes.try_get_u64_ne()?,
        suppressed: bytes.try_get_u64_ne()?,
        packets: bytes.try_get_u64_ne()?,
        bytes: bytes.try_get_u64_ne()?,
        source: address(bytes)?,
        destination: address(bytes)?,
        nat_source: address(bytes)?,
        nat_destination: address(bytes)?,
        source_port: bytes.try_get_u16_ne()?,
        destination_port: bytes.try_get_u16_ne()?,
        nat_source_port: bytes.try_get_u16_ne()?,
        nat_destination_port: bytes.try_get_u16_ne()?,
        kind: bytes.try_get_u32_ne()?,
        endpoint: bytes.try_get_u32_ne()?,
        reason: bytes.try_get_u32_ne()?,
        protocol: bytes.try_get_u32_ne()?,
        policy: bytes.try_get_u32_ne()?,
        rule: bytes.try_get_u32_ne()?,
    })
}

fn address(bytes: &mut &[u8]) -> Result<Address, TryGetError> {
    let mut address = Address::default();
    bytes.try_copy_to_slice(&mut address)?;
    Ok(address)
}

/// The reader of a ring. Nobody else reads it until the value goes.
pub struct EventReader {
    claim: Claim,
    ring: RingBuf<MapData>,
    lost: Cells<Lost>,
    /// What was lost by the time of the latest look.
    lost_before: u64,
}

impl Datapath {
    /// Takes a ring that nobody reads. What is left in it from before is thrown away.
    ///
    /// # Errors
    /// [`BpfError::MonitorsBusy`]: all are being read.
    pub fn read_events(&mut self) -> Result<EventReader, BpfError> {
        let at = |name| (self.pins.map(name), name);
        let lost = Cells::open(at(map::EVENTS_LOST), size::MONITORS, 0)?;
        let busy = |holders| BpfError::MonitorsBusy { holders };
        let (pins, limits) = (&self.pins, &mut self.event_limits);
        let (claim, ring) = Claim::take(pins, 0..size::MONITORS, busy, |index, is_only| {
            if is_only {
                // What others were told is news to this one.
                let mut told = Vec::new();
                limits.for_each(|endpoint, _: &EventLimit| told.push(*endpoint))?;
                limits.remove_all(&told, |_| {})?;
            }
            let name = map::EVENTS[index];
            let ring = MapData::from_pin(pins.map(name)).map_err(open_error(name))?;
            let mut ring: RingBuf<_> = Map::RingBuf(ring).try_into().map_err(open_error(name))?;
            while ring.next().is_some() {}
            Ok(ring)
        })?;
        let mut reader = EventReader {
            claim,
            ring,
            lost,
            lost_before: 0,
        };
        reader.take_lost()?;
        Ok(reader)
    }
}

impl EventReader {
    /// The next event, if there is one already.
    pub fn read(&mut self) -> Option<Event> {
        loop {
            // The programs write whole events only.
            if let Ok(event) = decode(&self.ring.next()?) {
                return Some(event);
            }
        }
    }

    /// Says that this reader is still there, which it must once in a few seconds, and before it
    /// reads on after a pause. `false`: somebody else took the ring meanwhile.
    ///
    /// # Errors
    /// Those of the maps.
    pub fn stay(&mut self) -> Result<bool, BpfError> {
        self.claim.stay()
    }

    /// How many events found no room since the last time.
    ///
    /// # Errors
    /// Those of the maps.
    pub fn take_lost(&mut self) -> Result<u64, BpfError> {
        let lost = self.lost.get(self.claim.index)?.events;
        let more = lost.saturating_sub(self.lost_before);
        self.lost_before = lost;
        Ok(more)
    }
}

impl AsFd for EventReader {
    /// Readable when there is something in the ring. Whoever waits for that is not woken: the
    /// programs write and go on.
    fn as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the ring lives as long as `self`.
        unsafe { BorrowedFd::borrow_raw(self.ring.as_raw_fd()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The bytes of an event as a program writes them.
    fn encode(event: &Event) -> Vec<u8> {
        let size = size_of::<Event>();
        // SAFETY: `Event` is integers without padding.
        unsafe { std::slice::from_raw_parts(std::ptr::from_ref(event).cast(), size) }.to_vec()
    }

    #[test]
    fn every_field_of_an_event_is_read_where_it_is_written() {
        let event = Event {
            time: 1,
            suppressed: 2,
            packets: 3,
            bytes: 4,
            source: [5; 16],
            destination: [6; 16],
            nat_source: [7; 16],
            nat_destination: [8; 16],
            source_port: 9,
            destination_port: 10,
            nat_source_port: 11,
            nat_destination_port: 12,
            kind: 13,
            endpoint: 14,
            reason: 15,
            protocol: 16,
            policy: 17,
            rule: 18,
        };
        let bytes = encode(&event);
        assert_eq!(decode(&bytes), Ok(event));
        assert!(decode(&bytes[..bytes.len() - 1]).is_err());
    }
}
