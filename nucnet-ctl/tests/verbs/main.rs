//! The verbs by way of the program, on hosts that each test makes.

mod by_rules;
mod commands;
mod datapath;
mod egress;
mod endpoints;
mod explain;
mod faults;
mod flows;
mod forwarding;
mod ip6tables;
mod lab;
mod nat;
mod networks;
mod recovery;
mod repair;
mod resolv;
mod router;
mod status;
