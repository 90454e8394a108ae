//! Whether the caller may change anything at all: asked before anything is touched.

use super::{Error, Host};
use crate::kernel::capability::Lacks;

impl Host {
    /// Fails if the calling thread lacks a capability that every change needs
    /// ([`NEEDED`](crate::kernel::capability::NEEDED)).
    pub fn check_capabilities(&self) -> Result<(), Error> {
        let lacks = Lacks::of_caller();
        match lacks.is_empty() {
            true => Ok(()),
            false => Err(Error::NotPermitted(lacks)),
        }
    }
}
