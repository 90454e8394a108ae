//! The verbs by way of the program, on hosts that each test makes.

mod datapath;
mod egress;
mod endpoints;
mod faults;
mod flows;
mod ip6tables;
mod lab;
mod nat;
mod repair;
mod resolv;
mod router;
mod status;
