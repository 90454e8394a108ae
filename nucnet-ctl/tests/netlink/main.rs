//! Links, addresses, routes and neighbours in network namespaces that each test makes.

mod address;
mod bridge;
mod deletion;
mod lab;
mod link;
mod neighbour;
mod netns;
mod request;
mod route;
mod sysctl;
