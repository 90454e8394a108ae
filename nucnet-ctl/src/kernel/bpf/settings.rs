//! What the host's own network is like, as far as the programs must know.

use std::{
    fs, io,
    net::{Ipv4Addr, UdpSocket},
    ops::RangeInclusive,
    os::fd::AsRawFd,
    path::{Path, PathBuf},
};

use nix::libc;
use nucnet_common::abi::Settings;

use super::{BpfError, Datapath, pins::file_error};

/// A sixteenth of the table: one endpoint cannot take it all.
const FLOWS_PER_ENDPOINT: u32 = 32_768;

/// The host: the calling thread's network namespace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Host {
    /// Cookie of the network namespace, never given twice while the machine runs; 0 where the
    /// kernel does not tell (before Linux 5.14).
    pub netns_cookie: u64,
}

impl Host {
    /// That of the calling thread.
    ///
    /// # Errors
    /// None but those of making a socket.
    pub fn current() -> Result<Self, BpfError> {
        let error = |source| BpfError::NetnsCookie { source };
        let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).map_err(error)?;
        let mut netns_cookie = 0u64;
        let mut length = size_of::<u64>() as libc::socklen_t;
        // SAFETY: the option is a u64, and that much room is given.
        let result = unsafe {
            libc::getsockopt(
                socket.as_raw_fd(),
                libc::SOL_SOCKET,
                libc::SO_NETNS_COOKIE,
                std::ptr::from_mut(&mut netns_cookie).cast(),
                &mut length,
            )
        };
        if result == 0 {
            return Ok(Self { netns_cookie });
        }
        match io::Error::last_os_error() {
            source if source.raw_os_error() == Some(libc::ENOPROTOOPT) => {
                Ok(Self { netns_cookie: 0 })
            }
            source => Err(error(source)),
        }
    }
}

/// Which ports the host takes for connections of its own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostPorts {
    /// `net.ipv4.ip_local_port_range`.
    pub ephemeral: RangeInclusive<u16>,
    /// `net.ipv4.ip_local_reserved_ports`: never taken.
    pub reserved: Vec<RangeInclusive<u16>>,
}

impl HostPorts {
    /// Those of the calling thread's network namespace.
    ///
    /// # Errors
    /// Those of reading `/proc/sys`.
    pub fn read() -> Result<Self, BpfError> {
        let (path, text) = sysctl("net/ipv4/ip_local_port_range")?;
        let mut ends = text.split_whitespace().map(str::parse::<u16>);
        let (Some(Ok(first)), Some(Ok(last))) = (ends.next(), ends.next()) else {
            return Err(BpfError::Sysctl { path, text });
        };
        let (path, text) = sysctl("net/ipv4/ip_local_reserved_ports")?;
        let reserved = parse_ranges(&text).ok_or(BpfError::Sysctl { path, text })?;
        Ok(Self {
            ephemeral: first..=last,
            reserved,
        })
    }

    fn may_take(&self, port: u16) -> bool {
        self.ephemeral.contains(&port) && !self.reserved.iter().any(|range| range.contains(&port))
    }

    /// A block of ports for masquerade that the host never takes: the one before, if it still
    /// will do; else 16384-32767, other blocks of that size, smaller ones. The first port and
    /// the size less one; the size is a power of two.
    ///
    /// # Errors
    /// [`BpfError::NoDynamicPorts`].
    pub fn dynamic(&self, before: Option<(u16, u16)>) -> Result<(u16, u16), BpfError> {
        let is_free = |first: u16, mask: u16| {
            first
                .checked_add(mask)
                .is_some_and(|last| !(first..=last).any(|p| self.may_take(p)))
        };
        if let Some((first, mask)) = before.filter(|&(first, mask)| is_free(first, mask)) {
            return Ok((first, mask));
        }
        (10..=14)
            .rev()
            .flat_map(|bits| {
                let size = 1u32 << bits;
                // Block 0 has the well-known ports in it.
                (1..0x1_0000 / size).map(move |n| ((n * size) as u16, (size - 1) as u16))
            })
            .find(|&(first, mask)| is_free(first, mask))
            .ok_or(BpfError::NoDynamicPorts {
                first: *self.ephemeral.start(),
                last: *self.ephemeral.end(),
            })
    }
}

impl Datapath {
    /// What the programs were told.
    pub fn settings(&self) -> Result<Settings, BpfError> {
        self.settings.get(0)
    }

    /// Tells the programs from where to look routes up for mappings; 0: there are none.
    pub(super) fn set_mapping_link(&mut self, link: u32) -> Result<(), BpfError> {
        let before = self.settings()?;
        if before.mapping_link != link {
            let settings = Settings {
                mapping_link: link,
                ..before
            };
            self.settings.set(0, &settings)?;
        }
        Ok(())
    }

    /// Tells the programs what the host is like now.
    pub fn refresh_settings(&mut self, host: &Host) -> Result<Settings, BpfError> {
        let before = self.settings()?;
        let ports = HostPorts::read()?;
        let in_force = (before.dynamic_port_mask != 0)
            .then_some((before.dynamic_port_first, before.dynamic_port_mask));
        let (dynamic_port_first, dynamic_port_mask) = ports.dynamic(in_force)?;
        let settings = Settings {
            netns_cookie: host.netns_cookie,
            dynamic_port_first,
            dynamic_port_mask,
            host_port_first: *ports.ephemeral.start(),
            host_port_last: *ports.ephemeral.end(),
            flows_per_endpoint: FLOWS_PER_ENDPOINT,
            mapping_link: before.mapping_link,
        };
        if settings != before {
            self.settings.set(0, &settings)?;
        }
        Ok(settings)
    }
}

fn sysctl(name: &str) -> Result<(PathBuf, String), BpfError> {
    let path = Path::new("/proc/sys").join(name);
    let text = fs::read_to_string(&path).map_err(file_error(&path, "read"))?;
    Ok((path, text.trim().into()))
}

/// `1-4,7,9-10`, as the kernel prints sets of ports.
fn parse_ranges(text: &str) -> Option<Vec<RangeInclusive<u16>>> {
    text.split(',')
        .filter(|part| !part.is_empty())
        .map(|part| {
            let (first, last) = part.split_once('-').unwrap_or((part, part));
            Some(first.parse().ok()?..=last.parse().ok()?)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ports(ephemeral: RangeInclusive<u16>, reserved: &str) -> HostPorts {
        HostPorts {
            ephemeral,
            reserved: parse_ranges(reserved).expect("ranges"),
        }
    }

    #[test]
    fn dynamic_ports_are_below_the_usual_ephemeral_range() {
        assert_eq!(
            ports(32768..=60999, "").dynamic(None).unwrap(),
            (16384, 0x3fff)
        );
    }

    #[test]
    fn dynamic_ports_move_away_from_the_hosts() {
        assert_eq!(
            ports(10000..=32767, "").dynamic(None).unwrap(),
            (32768, 0x3fff)
        );
        assert_eq!(
            ports(15000..=65000, "").dynamic(None).unwrap(),
            (4096, 0xfff)
        );
        assert_eq!(
            ports(1024..=63487, "").dynamic(None).unwrap(),
            (63488, 0x7ff)
        );
    }

    #[test]
    fn dynamic_ports_stay_while_they_can() {
        let before = Some((32768, 0x1fff));
        assert_eq!(
            ports(50000..=60999, "").dynamic(before).unwrap(),
            (32768, 0x1fff)
        );
        assert_eq!(
            ports(40000..=60999, "").dynamic(before).unwrap(),
            (16384, 0x3fff)
        );
    }

    #[test]
    fn reserved_ports_are_not_the_hosts() {
        let greedy = ports(1024..=65535, "");
        assert!(matches!(
            greedy.dynamic(None),
            Err(BpfError::NoDynamicPorts { .. })
        ));
        assert_eq!(
            ports(1024..=65535, "22,16384-32767").dynamic(None).unwrap(),
            (16384, 0x3fff)
        );
    }

    #[test]
    fn port_sets_are_read_as_the_kernel_prints_them() {
        assert_eq!(parse_ranges(""), Some(vec![]));
        assert_eq!(
            parse_ranges("8080,9148-9150"),
            Some(vec![8080..=8080, 9148..=9150])
        );
        assert_eq!(parse_ranges("a"), None);
    }
}
