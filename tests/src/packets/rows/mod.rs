//! The rows: what becomes of which packets, in which state. Each says the whole of every frame
//! that comes out.

use std::{cell::RefCell, net::IpAddr, panic::AssertUnwindSafe};

use super::{bench::Bench, engine::Engine, site};

mod errors;
mod events;
mod filtering;
mod fragments;
mod guard;
mod guest;
mod headers;
mod hold;
mod host;
mod life;
mod loopback;
mod mapping;
mod masquerade;
mod mtu;
mod neighbours;
mod places;
mod policy;
mod publish;
mod reject;
mod runtime;
mod siblings;
mod talk;
mod told;

pub use mapping::{lan, subnet};

/// What happens at a site, by the name of what must be true.
pub struct Row {
    name: &'static str,
    body: Body,
    /// Why the loaded programs cannot be put into this situation.
    logic_only: Option<&'static str>,
}

enum Body {
    Once(fn(&mut Bench<'_>)),
    EachFamily(fn(&mut Bench<'_>, &Family)),
}

/// The site's addresses of one family.
#[derive(Debug)]
pub struct Family {
    /// The host's.
    pub host: IpAddr,
    /// The network's own.
    pub gateway: IpAddr,
    /// The gateway beyond the uplink.
    pub router: IpAddr,
    /// Someone on the Internet.
    pub client: IpAddr,
    /// A server there.
    pub server: IpAddr,
    /// Someone beyond the stray interface.
    pub stranger: IpAddr,
    /// Where no route leads.
    pub nowhere: IpAddr,
    /// Nobody, in the network of the endpoints.
    pub nobody: IpAddr,
    /// Endpoint [`site::WEB`]'s.
    pub web: IpAddr,
    /// Endpoint [`site::APP`]'s.
    pub app: IpAddr,
    /// Endpoint [`site::SLOT`]'s.
    pub slot: IpAddr,
    /// Endpoint [`site::OTHER`]'s.
    pub other: IpAddr,
}

/// IPv4.
pub const V4: Family = Family {
    host: site::HOST4,
    gateway: site::GATEWAY4,
    router: site::ROUTER4,
    client: site::CLIENT4,
    server: site::SERVER4,
    stranger: site::STRANGER4,
    nowhere: site::NOWHERE4,
    nobody: site::NOBODY4,
    web: site::WEB.v4,
    app: site::APP.v4,
    slot: site::SLOT.v4,
    other: site::OTHER.v4,
};

/// IPv6.
pub const V6: Family = Family {
    host: site::HOST6,
    gateway: site::GATEWAY6,
    router: site::ROUTER6,
    client: site::CLIENT6,
    server: site::SERVER6,
    stranger: site::STRANGER6,
    nowhere: site::NOWHERE6,
    nobody: site::NOBODY6,
    web: site::WEB.v6,
    app: site::APP.v6,
    slot: site::SLOT.v6,
    other: site::OTHER.v6,
};

/// Why rows about places are about the logic alone.
const DRAWS: &str = "the kernel's random numbers, which choose the places, cannot be chosen";

/// A row that stands for itself.
macro_rules! row {
    ($name:ident) => {
        $crate::packets::rows::Row {
            name: stringify!($name),
            body: $crate::packets::rows::Body::Once($name),
            logic_only: None,
        }
    };
    ($name:ident, logic_only: $why:expr) => {
        $crate::packets::rows::Row {
            logic_only: Some($why),
            ..row!($name)
        }
    };
}

/// A row that is run for IPv4 and for IPv6.
macro_rules! each_family {
    ($name:ident) => {
        $crate::packets::rows::Row {
            name: stringify!($name),
            body: $crate::packets::rows::Body::EachFamily($name),
            logic_only: None,
        }
    };
    ($name:ident, logic_only: $why:expr) => {
        $crate::packets::rows::Row {
            logic_only: Some($why),
            ..each_family!($name)
        }
    };
}

use {each_family, row};

/// A row of one family, ready to run.
#[derive(Clone, Copy)]
pub struct Case {
    row: &'static Row,
    family: Option<&'static Family>,
}

/// Every row, for every family.
pub fn cases() -> Vec<Case> {
    [
        publish::ROWS,
        masquerade::ROWS,
        siblings::ROWS,
        host::ROWS,
        headers::ROWS,
        errors::ROWS,
        told::ROWS,
        fragments::ROWS,
        mtu::ROWS,
        filtering::ROWS,
        guard::ROWS,
        guest::ROWS,
        neighbours::ROWS,
        policy::ROWS,
        reject::ROWS,
        events::ROWS,
        runtime::ROWS,
        life::ROWS,
        places::ROWS,
        mapping::ROWS,
        hold::ROWS,
        loopback::ROWS,
    ]
    .into_iter()
    .flatten()
    .flat_map(|row| {
        let families = match row.body {
            Body::Once(_) => [None, None],
            Body::EachFamily(_) => [Some(&V4), Some(&V6)],
        };
        let twice = families[0].is_some();
        families
            .into_iter()
            .take(if twice { 2 } else { 1 })
            .map(move |family| Case { row, family })
    })
    .collect()
}

impl Case {
    /// Its name.
    pub fn name(&self) -> String {
        match self.family {
            None => self.row.name.to_owned(),
            Some(family) if family.host.is_ipv4() => format!("{}::ipv4", self.row.name),
            Some(_) => format!("{}::ipv6", self.row.name),
        }
    }

    /// Why the loaded programs cannot be put into this situation, if they cannot.
    pub fn logic_only(&self) -> Option<&'static str> {
        self.row.logic_only
    }

    /// Runs it on an engine whose tables are empty.
    ///
    /// # Errors
    /// What is not as it must be.
    pub fn run(&self, engine: &mut dyn Engine) -> Result<(), String> {
        let mut bench = Bench::new(engine);
        let body = AssertUnwindSafe(|| match self.row.body {
            Body::Once(body) => body(&mut bench),
            Body::EachFamily(body) => body(&mut bench, self.family.expect("family")),
        });
        std::panic::catch_unwind(body).map_err(|panic| {
            let text = panic.downcast_ref::<String>().map(String::as_str);
            let text = text.or(panic.downcast_ref::<&str>().copied());
            format!("{}: {}", PLACE.take(), text.unwrap_or("panic"))
        })
    }
}

thread_local! {
    /// Where the thread panicked last.
    static PLACE: RefCell<String> = const { RefCell::new(String::new()) };
}

/// Has panics kept for the result of [`Case::run`], which has the place in it, instead of
/// printed.
pub fn keep_panics() {
    std::panic::set_hook(Box::new(|panic| {
        let place = panic.location().map(ToString::to_string);
        PLACE.set(place.unwrap_or_default());
    }));
}
