//! Checksums of a frame, summed up from scratch: nothing here knows what was changed, or how.

use nucnet_common::packet::{ICMP, ICMPV6, TCP, UDP};

/// The one's complement sum of RFC 1071 over some bytes; an odd last byte counts as high.
pub(super) fn sum(start: u32, bytes: &[u8]) -> u32 {
    bytes.chunks(2).fold(start, |sum, pair| {
        let word = u32::from(pair[0]) << 8 | u32::from(pair.get(1).copied().unwrap_or(0));
        let sum = sum + word;
        (sum & 0xffff) + (sum >> 16)
    })
}

/// What is wrong with the checksums of an IP packet that may have bytes after it; `None`: all
/// are right. Fragments and extension headers are not looked into.
pub fn wrong(packet: &[u8]) -> Option<String> {
    match packet.first()? >> 4 {
        4 => wrong_v4(packet),
        6 => wrong_v6(packet),
        version => Some(format!("IP version {version}")),
    }
}

fn wrong_v4(packet: &[u8]) -> Option<String> {
    let header_length = usize::from(packet[0] & 0x0f) * 4;
    let (header, _) = packet.split_at_checked(header_length)?;
    if sum(0, header) != 0xffff {
        return Some("IPv4 header checksum".into());
    }
    let length = usize::from(u16::from_be_bytes([header[2], header[3]]));
    if u16::from_be_bytes([header[6], header[7]]) & 0x3fff != 0 {
        return None;
    }
    wrong_l4(
        header[9],
        &header[12..20],
        packet.get(header_length..length)?,
    )
}

fn wrong_v6(packet: &[u8]) -> Option<String> {
    let (header, _) = packet.split_at_checked(40)?;
    let length = usize::from(u16::from_be_bytes([header[4], header[5]]));
    wrong_l4(header[6], &header[8..40], packet.get(40..40 + length)?)
}

fn wrong_l4(protocol: u8, addresses: &[u8], carried: &[u8]) -> Option<String> {
    let pseudo = sum(u32::from(protocol) + carried.len() as u32, addresses);
    let v6 = addresses.len() == 32;
    let (start, name) = match protocol {
        TCP => (pseudo, "TCP"),
        UDP if carried.get(6..8)? == [0, 0] => {
            return v6.then(|| "UDP over IPv6 without checksum".into());
        }
        UDP => (pseudo, "UDP"),
        ICMP if !v6 => (0, "ICMP"),
        ICMPV6 if v6 => (pseudo, "ICMPv6"),
        _ => return None,
    };
    (sum(start, carried) != 0xffff).then(|| format!("{name} checksum"))
}
