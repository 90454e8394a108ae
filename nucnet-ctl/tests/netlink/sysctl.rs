//! Sysctls of one interface.

use nucnet_ctl::kernel::netns::run_in;
use nucnet_ctl::kernel::sysctl;
use nucnet_ctl::kernel::sysctl::{Family, LinkKey, Sysctl};

use super::lab::{host, need_root};

#[test]
fn sysctls_of_an_interface_with_dots_in_its_name() {
    need_root!();
    let host = host();
    host.ip("link add eth0.5 type bridge");
    run_in(&host.netns, || {
        for (family, key, value) in [
            (Family::Ipv4, LinkKey::Forwarding, "1"),
            (Family::Ipv6, LinkKey::Forwarding, "1"),
            (Family::Ipv6, LinkKey::AcceptRa, "0"),
            (Family::Ipv6, LinkKey::AcceptDad, "0"),
            (Family::Ipv6, LinkKey::Autoconf, "0"),
            (Family::Ipv6, LinkKey::AddrGenMode, "1"),
            (Family::Ipv6, LinkKey::DisableIpv6, "1"),
        ] {
            let sysctl = Sysctl::link(family, "eth0.5", key);
            let before = sysctl.read().unwrap();
            assert_ne!(before, value, "{sysctl}");
            assert_eq!(sysctl.write(value).unwrap(), before);
            assert_eq!(sysctl.write(value).unwrap(), value);
            let of_lo = Sysctl::link(family, "lo", key);
            assert_ne!(of_lo.read().unwrap(), value, "{of_lo}");
        }
        let range = Sysctl::IpLocalPortRange.read().unwrap();
        assert_eq!(range.split_whitespace().count(), 2, "{range}");
        for family in [Family::Ipv4, Family::Ipv6] {
            assert_eq!(Sysctl::IpNonlocalBind(family).read().unwrap(), "0");
        }
    })
    .unwrap();
}

#[test]
fn sysctl_errors_name_what_is_missing() {
    let absent = Sysctl::link(Family::Ipv4, "absent0", LinkKey::Forwarding);
    let error = absent.write("1").unwrap_err();
    assert_eq!(
        error.to_string(),
        "sysctl net/ipv4/conf/absent0/forwarding does not exist"
    );
    for name in ["", ".", "..", "../all", "a/b"] {
        let error = Sysctl::link(Family::Ipv4, name, LinkKey::Forwarding)
            .read()
            .unwrap_err();
        assert!(matches!(error, sysctl::Error::Interface { .. }), "{error}");
    }
}
