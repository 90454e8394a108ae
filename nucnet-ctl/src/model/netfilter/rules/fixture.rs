//! A network, an endpoint, and what is wanted of them, for tests.

use super::{SourcePorts, Wanted, WantedEndpoint};
use crate::model::{
    ports::PortRange,
    record::{DatapathKind, EndpointRecord, NetworkRecord, fixture},
};
use serde_json::Value;

pub(in crate::model::netfilter) use crate::model::record::fixture::open;

pub(in crate::model::netfilter) fn network(isolate: bool, uplinks: &[&str]) -> NetworkRecord {
    let mut record = fixture::network();
    record.isolate = isolate;
    if let Some(wish) = &mut record.wish {
        wish.uplinks = uplinks.iter().map(|name| name.parse().unwrap()).collect();
    }
    record
}

pub(in crate::model::netfilter) fn endpoint(publishes: &[&str], egress: Value) -> EndpointRecord {
    EndpointRecord {
        publishes: publishes.iter().map(|spec| spec.parse().unwrap()).collect(),
        egress: serde_json::from_value(egress).unwrap(),
        datapath: DatapathKind::Iptables,
        ..fixture::endpoint()
    }
}

pub(in crate::model::netfilter) fn wanted<'a>(
    network: &'a NetworkRecord,
    record: &'a EndpointRecord,
) -> Wanted<'a> {
    Wanted {
        networks: vec![network],
        endpoints: vec![WantedEndpoint {
            record,
            publishes: &record.publishes,
            egress: &record.egress,
            keeps_open: false,
        }],
        mappings: Vec::new(),
        ports: PortRange::new(16384, 32767)
            .zip(PortRange::new(32768, 60999))
            .map(|(drawn, host)| SourcePorts { drawn, host }),
    }
}
