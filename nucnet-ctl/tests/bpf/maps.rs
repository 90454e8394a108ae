//! Entries of maps, in bulk and of one endpoint.

use std::fs;
use std::time::Instant;

use nucnet_common::abi::{
    Binding, DropCount, DropKey, Endpoint, Flow, FlowKey, OutsideKey, PolicyCidrKey, PolicyClass,
    Publish, PublishKey, Usage,
};
use nucnet_ctl::kernel::bpf::{Host, Prefix};

use super::lab::{in_private_namespaces, load};

#[test]
fn settings_follow_the_sysctls_of_the_host() {
    in_private_namespaces(|root| {
        let mut datapath = load(&root.join("nucnet"));
        let host = Host::current().expect("host");
        let settings = datapath.settings().expect("settings");
        assert_eq!(settings.netns_cookie, host.netns_cookie);
        assert_eq!(
            (settings.dynamic_port_first, settings.dynamic_port_mask),
            (16384, 0x3fff)
        );
        assert_eq!(
            (settings.host_port_first, settings.host_port_last),
            (32768, 60999)
        );
        fs::write("/proc/sys/net/ipv4/ip_local_port_range", "20000 40001").expect("write");
        let settings = datapath.refresh_settings(&host).expect("refresh");
        assert_eq!(
            (settings.dynamic_port_first, settings.dynamic_port_mask),
            (49152, 0x3fff)
        );
        assert_eq!(datapath.settings().expect("settings"), settings);
    });
}

#[test]
fn entries_are_written_listed_and_removed_in_bulk() {
    in_private_namespaces(|root| {
        let mut datapath = load(&root.join("nucnet"));
        let policies: Vec<_> = (0..10_000u32)
            .map(|n| {
                let mut address = [0; 16];
                address[..4].copy_from_slice(&n.to_be_bytes());
                let key = PolicyCidrKey {
                    policy: 7u32.to_be_bytes(),
                    address,
                };
                (Prefix::new(32 + 32, key), PolicyClass { class: n + 1 })
            })
            .collect();
        datapath.policy_cidrs.insert_all(&policies).expect("insert");
        assert_eq!(
            datapath.policy_cidrs.count().expect("count"),
            policies.len()
        );
        let longer = Prefix::new(160, policies[1234].0.data());
        let class = datapath.policy_cidrs.get(&longer).expect("get");
        assert_eq!(class, Some(PolicyClass { class: 1235 }));
        let keys: Vec<_> = policies.iter().map(|(key, _)| *key).collect();
        // One that is not there is passed over.
        datapath.policy_cidrs.remove(&keys[5000]).expect("remove");
        let mut removed = Vec::new();
        datapath
            .policy_cidrs
            .remove_all(&keys, |index| removed.push(index))
            .expect("remove");
        assert_eq!(removed.len(), policies.len() - 1);
        assert!(!removed.contains(&5000));
        assert_eq!(datapath.policy_cidrs.entries().expect("entries").len(), 0);

        let key = PublishKey {
            address: [0; 16],
            protocol: 6,
            kind: 0,
            port: 80u16.to_be_bytes(),
        };
        let key = Prefix::new(PublishKey::BITS, key);
        let publish = Publish {
            link: 1,
            endpoint: 2,
            host_port: 80,
            port: 8080,
            mapping: 0,
        };
        datapath.publishes.insert(&key, &publish).expect("insert");
        assert_eq!(datapath.publishes.get(&key).expect("get"), Some(publish));
        assert!(datapath.publishes.remove(&key).expect("remove"));
        assert!(!datapath.publishes.remove(&key).expect("remove"));
    });
}

/// Flow number `n` of an endpoint, as it stands in the tables.
fn flow(endpoint: u32, n: u32) -> (FlowKey, Flow, OutsideKey) {
    let mut peer = [0; 16];
    peer[..4].copy_from_slice(&n.to_be_bytes());
    let key = FlowKey {
        endpoint,
        protocol: 6,
        peer,
        peer_port: 443,
        ..FlowKey::default()
    };
    let external_port = n as u16;
    let flow = Flow {
        external: [9; 16],
        external_port,
        peer,
        peer_port: 443,
        ..Flow::default()
    };
    let outside = OutsideKey {
        protocol: 6,
        external: [9; 16],
        peer,
        external_port,
        peer_port: 443,
    };
    (key, flow, outside)
}

/// As many flows as make a host busy.
const FLOWS: u32 = 262_144;

#[test]
fn purge_removes_one_endpoint_among_many_flows_and_nobody_else() {
    in_private_namespaces(|root| {
        let mut datapath = load(&root.join("nucnet"));
        let (victim, other) = (7, 8);
        let all: Vec<_> = (0..FLOWS)
            .map(|n| flow(if n % 4 == 0 { victim } else { other }, n))
            .collect();
        let entries: Vec<_> = all.iter().map(|(key, flow, _)| (*key, *flow)).collect();
        datapath.flows.insert_all(&entries).expect("insert");
        let entries: Vec<_> = all
            .iter()
            .map(|(key, _, outside)| (*outside, *key))
            .collect();
        datapath.outside.insert_all(&entries).expect("insert");
        let bound = FlowKey {
            endpoint: victim,
            protocol: 17,
            ..FlowKey::default()
        };
        let binding = Binding {
            external: [9; 16],
            external_port: 20_000,
            ..Binding::default()
        };
        datapath.bindings.insert(&bound, &binding).expect("insert");
        let bound_outside = OutsideKey {
            protocol: 17,
            external: [9; 16],
            external_port: 20_000,
            ..OutsideKey::default()
        };
        datapath
            .outside
            .insert(&bound_outside, &bound)
            .expect("insert");
        let count = u64::from(FLOWS) / 4;
        let usage = Usage {
            flows: count,
            bindings: 1,
        };
        datapath.usage.insert(&victim, &usage).expect("insert");

        let start = Instant::now();
        let purged = datapath.purge_endpoint(victim).expect("purge");
        println!("{count} of {} flows purged in {:?}", FLOWS, start.elapsed());
        assert_eq!((purged.flows, purged.bindings), (count, 1));

        let rest = 3 * count as usize;
        assert_eq!(datapath.flows.count().expect("count"), rest);
        assert_eq!(datapath.outside.count().expect("count"), rest);
        assert_eq!(datapath.bindings.count().expect("count"), 0);
        assert!(datapath.usage.get(&victim).expect("get").is_none());
        let again = datapath.purge_endpoint(victim).expect("again");
        assert_eq!(again, Default::default());
    });
}

#[test]
fn purge_without_a_count_looks_for_itself() {
    in_private_namespaces(|root| {
        let mut datapath = load(&root.join("nucnet"));
        let (key, flow, outside) = flow(7, 1);
        datapath.flows.insert(&key, &flow).expect("insert");
        datapath.outside.insert(&outside, &key).expect("insert");
        assert_eq!(datapath.purge_endpoint(7).expect("purge").flows, 1);
        assert_eq!(datapath.outside.count().expect("count"), 0);
    });
}

#[test]
fn removed_endpoint_leaves_nothing_but_what_others_have_now() {
    in_private_namespaces(|root| {
        let mut datapath = load(&root.join("nucnet"));
        let endpoint = |number, last| Endpoint {
            number,
            address4: [last; 16],
            address6: [last + 1; 16],
            ..Endpoint::default()
        };
        datapath.put_endpoint(3, &endpoint(7, 40)).expect("put");
        let usage = Usage {
            flows: 1,
            bindings: 0,
        };
        datapath.usage.insert(&7, &usage).expect("insert");
        let (key, flow, outside) = flow(7, 1);
        datapath.flows.insert(&key, &flow).expect("insert");
        datapath.outside.insert(&outside, &key).expect("insert");
        // A change keeps the count.
        datapath.put_endpoint(3, &endpoint(7, 40)).expect("put");
        assert_eq!(datapath.usage.get(&7).expect("get"), Some(usage));
        // Its second address goes to somebody else.
        datapath.put_endpoint(4, &endpoint(8, 41)).expect("put");

        let purged = datapath.remove_endpoint(3).expect("remove");
        assert_eq!(purged.expect("was there").flows, 1);
        assert_eq!(datapath.remove_endpoint(3).expect("again"), None);
        assert_eq!(datapath.endpoints.count().expect("count"), 1);
        assert_eq!(datapath.usage.count().expect("count"), 1);
        assert_eq!(datapath.flows.count().expect("count"), 0);
        let owner = |address| datapath.addresses.get(&[address; 16]).expect("get");
        assert_eq!(owner(40), None);
        assert_eq!(owner(41).map(|owner| owner.endpoint), Some(8));
    });
}

#[test]
fn drops_are_summed_over_cpus() {
    in_private_namespaces(|root| {
        let bpffs = root.join("nucnet");
        let datapath = load(&bpffs);
        let key = DropKey {
            endpoint: 3,
            reason: 14,
        };
        let mut raw: aya::maps::PerCpuHashMap<_, DropKey, DropCount> =
            aya::maps::Map::PerCpuHashMap(
                aya::maps::MapData::from_pin(bpffs.join("maps/drops")).expect("map"),
            )
            .try_into()
            .expect("per-CPU map");
        let cpus = aya::util::nr_cpus().expect("CPUs");
        let counts = vec![
            DropCount {
                packets: 2,
                bytes: 100
            };
            cpus
        ];
        raw.insert(key, counts.try_into().expect("values"), 0)
            .expect("insert");
        let sum = DropCount {
            packets: 2 * cpus as u64,
            bytes: 100 * cpus as u64,
        };
        assert_eq!(datapath.drops.entries().expect("entries"), [(key, sum)]);
        let mut datapath = datapath;
        datapath.purge_endpoint(3).expect("purge");
        assert_eq!(datapath.drops.get(&key).expect("get"), DropCount::default());
    });
}
