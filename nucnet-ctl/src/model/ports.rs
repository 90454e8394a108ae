//! Ranges of ports, and ranges as prefixes, which is how longest-prefix-match tries hold them.

use serde::{Deserialize, Serialize};
use std::fmt;

/// First to last port, both included.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct PortRange {
    first: u16,
    last: u16,
}

/// A block of `2^n` ports whose first is a multiple of its size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PortPrefix {
    /// The first port.
    pub first: u16,
    /// How many leading bits of a port are fixed: 0 (every port) to 16 (one port).
    pub length: u8,
}

impl PortRange {
    /// Every port.
    pub const ALL: Self = Self {
        first: 0,
        last: u16::MAX,
    };

    /// A range; none if it ends before it begins.
    pub fn new(first: u16, last: u16) -> Option<Self> {
        (first <= last).then_some(Self { first, last })
    }

    /// One port.
    pub fn one(port: u16) -> Self {
        Self {
            first: port,
            last: port,
        }
    }

    /// The first port.
    pub fn first(self) -> u16 {
        self.first
    }

    /// The last port.
    pub fn last(self) -> u16 {
        self.last
    }

    /// How many ports: 1 to 65,536.
    pub fn count(self) -> u32 {
        u32::from(self.last) - u32::from(self.first) + 1
    }

    /// Each port in turn.
    pub fn iter(self) -> impl Iterator<Item = u16> {
        self.first..=self.last
    }

    /// Whether a port is one of them.
    pub fn contains(self, port: u16) -> bool {
        (self.first..=self.last).contains(&port)
    }

    /// Whether the two have a port in common.
    pub fn overlaps(self, other: Self) -> bool {
        self.first <= other.last && other.first <= self.last
    }

    /// The same ports as at most 30 disjoint prefixes, in ascending order.
    pub fn prefixes(self) -> impl Iterator<Item = PortPrefix> {
        let mut next = Some(u32::from(self.first));
        let last = u32::from(self.last);
        std::iter::from_fn(move || {
            let first = next?;
            // The largest block that begins here and does not reach beyond the end.
            let aligned = if first == 0 {
                16
            } else {
                first.trailing_zeros()
            };
            let bits = aligned.min((last - first + 1).ilog2());
            next = Some(first + (1 << bits)).filter(|next| *next <= last);
            Some(PortPrefix {
                first: first as u16,
                length: (16 - bits) as u8,
            })
        })
    }
}

impl fmt::Display for PortRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.first)?;
        if self.last != self.first {
            write!(f, "-{}", self.last)?;
        }
        Ok(())
    }
}

/// A port without sign, white space or leading zeros, which the integer parser would take.
pub(crate) fn parse_port(text: &str) -> Option<u16> {
    let digits = text.bytes().all(|byte| byte.is_ascii_digit());
    let plain = text == "0" || !text.starts_with('0');
    if digits && plain {
        text.parse().ok()
    } else {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn prefixes_are_the_range_exactly(a: u16, b: u16) {
            let range = PortRange::new(a.min(b), a.max(b)).unwrap();
            let prefixes: Vec<_> = range.prefixes().collect();
            prop_assert!(prefixes.len() <= 30);
            let mut next = u32::from(range.first());
            for prefix in prefixes {
                let size = 1u32 << (16 - prefix.length);
                prop_assert_eq!(u32::from(prefix.first), next);
                prop_assert_eq!(next % size, 0);
                next += size;
            }
            prop_assert_eq!(next, u32::from(range.last()) + 1);
        }
    }

    #[test]
    fn every_port_is_one_prefix_and_the_worst_range_is_thirty() {
        assert_eq!(PortRange::ALL.prefixes().count(), 1);
        assert_eq!(PortRange::new(1, 65_534).unwrap().prefixes().count(), 30);
    }

    #[test]
    fn ports_are_plain_numbers() {
        assert_eq!(parse_port("65535"), Some(65_535));
        assert_eq!(parse_port("0"), Some(0));
        for bad in ["", "+80", "-1", "080", "65536", " 80", "8o"] {
            assert_eq!(parse_port(bad), None, "{bad:?}");
        }
    }
}
