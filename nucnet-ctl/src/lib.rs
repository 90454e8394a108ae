//! The control plane of nucnet, as a library for container runtimes to embed.
//!
//! ```no_run
//! use nucnet_ctl::{AttachRequest, Container, Host, Options};
//!
//! let host = Host::new(Options::default())?;
//! let mut request = AttachRequest::new(Container::Process(4711));
//! request.publishes = vec!["8080:80".parse()?];
//! // Detached when dropped, unless kept.
//! let endpoint = host.attach(&request)?.keep();
//! println!("{} has {:?}", endpoint.id, endpoint.addresses);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

pub mod kernel;
pub mod model;
pub mod verbs;

pub use kernel::bpf::OBJECT_HASH;
pub use model::Kind;
pub use verbs::{AttachRequest, Attachment, Container, Error, Host, Options};
