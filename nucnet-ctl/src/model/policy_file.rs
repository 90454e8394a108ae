//! Egress policies in files: JSON or TOML, with nucnet's own fields or a container runtime's.
//!
//! nucnet's own are those that it shows: `default`, `allow`, `deny` (lists of rules), `dns` (a
//! list of addresses). The runtime's are `allowed_cidrs`, `allowed_tcp_ports` and
//! `allowed_udp_ports`: every port of a list to every prefix; both lists empty: everything to
//! every prefix; one of them empty: nothing of that protocol, nor any other; no prefix: nothing.
//! `allow_dns` and `log_denied` go with either; a file that has nothing but these is the
//! runtime's, whose policies deny by default and allow the resolvers. So does `reject`, which the
//! runtime does not have.

use super::{
    Cidr, Invalid, Problem,
    policy::{Action, Policy, Resolver},
    ports::PortRange,
    rule::{Rule, RuleProtocol, Target},
};
use serde::{Deserialize, de::IgnoredAny};
use std::{fmt, path::Path};
use thiserror::Error;

/// What a policy is written in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// JSON.
    Json,
    /// TOML.
    Toml,
}

impl Format {
    /// TOML for what ends in `.toml`, else JSON.
    pub fn of(path: &Path) -> Self {
        match path.extension() {
            Some(extension) if extension == "toml" => Self::Toml,
            _ => Self::Json,
        }
    }
}

/// Why a file holds no policy. The message names field and place.
#[derive(Debug, Error)]
pub enum PolicyFileError {
    /// Its JSON is wrong, or a field is unknown, or has a value that it cannot have.
    #[error("{field}")]
    Json {
        /// The field, and the place in its list.
        field: Field,
        /// Why, and on which line.
        source: serde_json::Error,
    },
    /// The same of TOML.
    #[error("{field}: {message} at line {line}")]
    Toml {
        /// The field, and the place in its list.
        field: Field,
        /// Which line.
        line: usize,
        /// Why.
        message: String,
    },
    /// A value that no rule can have.
    #[error(transparent)]
    Invalid(#[from] Invalid),
    /// It has fields of both kinds.
    #[error("{ours} and {theirs} do not go together")]
    Mixed {
        /// One of nucnet's own fields.
        ours: &'static str,
        /// One of the container runtime's.
        theirs: &'static str,
    },
    /// It says nothing.
    #[error("no field is given")]
    Empty,
}

impl PolicyFileError {
    /// What would be acceptable.
    pub fn hint(&self) -> String {
        match self {
            Self::Invalid(invalid) => invalid.hint(),
            _ => "give default, allow, deny and dns; or allowed_cidrs, allowed_tcp_ports and \
                  allowed_udp_ports; with either, allow_dns, log_denied and reject"
                .to_owned(),
        }
    }
}

/// Where in a file something is wrong.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Field(String);

impl fmt::Display for Field {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // The path to the whole is a dot, and where the text breaks off nobody knows the path.
        f.write_str(match self.0.as_str() {
            "." | "?" => "no policy",
            path => path,
        })
    }
}

impl From<&serde_path_to_error::Path> for Field {
    fn from(path: &serde_path_to_error::Path) -> Self {
        Self(path.to_string())
    }
}

impl Field {
    fn whole() -> Self {
        Self(".".to_owned())
    }
}

/// All fields of either kind.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Fields {
    /// Of what `egress show` prints, so that it can be given back; it says nothing here.
    #[serde(rename = "id")]
    _id: Option<IgnoredAny>,
    /// Likewise: an endpoint has it or not.
    #[serde(rename = "guard")]
    _guard: Option<IgnoredAny>,
    default: Option<Action>,
    allow: Option<Vec<Rule>>,
    deny: Option<Vec<Rule>>,
    dns: Option<Vec<Resolver>>,
    allowed_cidrs: Option<Vec<Cidr>>,
    allowed_tcp_ports: Option<Vec<u16>>,
    allowed_udp_ports: Option<Vec<u16>>,
    allow_dns: Option<bool>,
    log_denied: Option<bool>,
    reject: Option<bool>,
}

impl Policy {
    /// The policy of a file. Without resolvers, the endpoint's are meant.
    pub fn from_text(text: &str, format: Format) -> Result<Self, PolicyFileError> {
        match format {
            Format::Json => from_json(text)?,
            Format::Toml => from_toml(text)?,
        }
        .policy()
    }
}

fn from_json(text: &str) -> Result<Fields, PolicyFileError> {
    let mut json = serde_json::Deserializer::from_str(text);
    let fields =
        serde_path_to_error::deserialize(&mut json).map_err(|error| PolicyFileError::Json {
            field: error.path().into(),
            source: error.into_inner(),
        })?;
    json.end().map_err(|source| PolicyFileError::Json {
        field: Field::whole(),
        source,
    })?;
    Ok(fields)
}

fn from_toml(text: &str) -> Result<Fields, PolicyFileError> {
    let failed = |field: Field, error: &toml::de::Error| {
        let before = error.span().and_then(|span| text.get(..span.start));
        PolicyFileError::Toml {
            field,
            line: before.unwrap_or_default().matches('\n').count() + 1,
            message: error.message().to_owned(),
        }
    };
    let toml = toml::Deserializer::parse(text).map_err(|error| failed(Field::whole(), &error))?;
    serde_path_to_error::deserialize(toml)
        .map_err(|error| failed(error.path().into(), error.inner()))
}

impl Fields {
    fn policy(self) -> Result<Policy, PolicyFileError> {
        let ours = [
            ("default", self.default.is_some()),
            ("allow", self.allow.is_some()),
            ("deny", self.deny.is_some()),
            ("dns", self.dns.is_some()),
        ];
        let theirs = [
            ("allowed_cidrs", self.allowed_cidrs.is_some()),
            ("allowed_tcp_ports", self.allowed_tcp_ports.is_some()),
            ("allowed_udp_ports", self.allowed_udp_ports.is_some()),
        ];
        let first = |fields: &[(&'static str, bool)]| {
            let given = fields.iter().find(|(_, given)| *given);
            given.map(|(name, _)| *name)
        };
        let log_denied = self.log_denied.unwrap_or(true);
        let reject = self.reject.unwrap_or(false);
        let policy = match (first(&ours), first(&theirs)) {
            (Some(ours), Some(theirs)) => return Err(PolicyFileError::Mixed { ours, theirs }),
            (Some(_), None) => self.own(),
            (None, Some(_)) => self.runtime()?,
            (None, None) if self.allow_dns.is_none() && self.log_denied.is_none() => {
                return Err(PolicyFileError::Empty);
            }
            (None, None) => self.runtime()?,
        };
        Ok(policy
            .with_denied_logged(log_denied)
            .with_denied_rejected(reject))
    }

    fn own(self) -> Policy {
        // A list of what is allowed, be it empty, is meant to be all that is allowed.
        let implied = self.allow.is_some().then_some(Action::Deny);
        let policy = Policy::new(
            self.default.or(implied),
            self.allow.unwrap_or_default(),
            self.deny.unwrap_or_default(),
            self.dns.unwrap_or_default(),
        );
        match self.allow_dns {
            Some(allowed) => policy.with_dns_allowed(allowed),
            None => policy,
        }
    }

    fn runtime(self) -> Result<Policy, Invalid> {
        let ranges = |field, ports: Option<Vec<u16>>| -> Result<Vec<PortRange>, Invalid> {
            let ports = ports.unwrap_or_default();
            match ports.contains(&0) {
                true => Err(Invalid::new(field, 0, Problem::RulePort("0".to_owned()))),
                false => Ok(ports.into_iter().map(PortRange::one).collect()),
            }
        };
        let tcp = ranges("allowed_tcp_ports", self.allowed_tcp_ports)?;
        let udp = ranges("allowed_udp_ports", self.allowed_udp_ports)?;
        let mut allow = Vec::new();
        for cidr in self.allowed_cidrs.unwrap_or_default() {
            let target = Target::Cidr(cidr);
            if tcp.is_empty() && udp.is_empty() {
                allow.push(Rule::new(target, Vec::new(), None));
            }
            for (ports, protocol) in [(&tcp, RuleProtocol::Tcp), (&udp, RuleProtocol::Udp)] {
                if !ports.is_empty() {
                    allow.push(Rule::new(target, ports.clone(), Some(protocol)));
                }
            }
        }
        let policy = Policy::new(Some(Action::Deny), allow, Vec::new(), Vec::new());
        Ok(policy.with_dns_allowed(self.allow_dns.unwrap_or(true)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn json(text: &str) -> Result<Policy, PolicyFileError> {
        Policy::from_text(text, Format::Json)
    }

    fn shown(policy: &Policy) -> Vec<String> {
        let policy = policy
            .clone()
            .with_resolvers(vec!["9.9.9.9".parse().unwrap()]);
        policy
            .rules()
            .map(|(_, action, rule)| format!("{action} {rule}"))
            .collect()
    }

    #[test]
    fn nucnets_own_fields_say_what_the_flags_say() {
        let text = r#"{"allow": ["any:443/tcp", "private"], "deny": ["metadata"]}"#;
        let policy = json(text).unwrap();
        assert_eq!(policy.default_action(), Action::Deny);
        assert_eq!(
            shown(&policy),
            [
                "allow any:443/tcp",
                "allow private",
                "deny metadata",
                "allow 9.9.9.9/32:53"
            ]
        );
        let toml = "allow = [\"any:443/tcp\", \"private\"]\ndeny = [\"metadata\"]\n";
        assert_eq!(Policy::from_text(toml, Format::Toml).unwrap(), policy);
    }

    #[test]
    fn an_empty_list_of_what_is_allowed_allows_nothing() {
        let default = |text| json(text).unwrap().default_action();
        assert_eq!(default(r#"{"allow": []}"#), Action::Deny);
        assert_eq!(default(r#"{"deny": ["metadata"]}"#), Action::Allow);
        assert_eq!(
            default(r#"{"default": "allow", "allow": []}"#),
            Action::Allow
        );
    }

    #[test]
    fn what_is_shown_can_be_given_back() {
        for text in [
            r#"{"default": "allow", "deny": ["metadata"], "dns": ["9.9.9.9"]}"#,
            r#"{"allowed_cidrs": ["10.0.0.0/8"], "log_denied": false}"#,
            r#"{"default": "deny", "reject": true}"#,
            r#"{"allow_dns": false}"#,
        ] {
            let policy = json(text).unwrap();
            let shown = serde_json::to_string(&policy).unwrap();
            assert_eq!(json(&shown).unwrap(), policy, "{shown}");
        }
    }

    #[test]
    fn both_port_lists_empty_means_everything_to_the_prefix() {
        let policy = json(r#"{"allowed_cidrs": ["10.0.0.0/8", "fd00::/8"]}"#).unwrap();
        let rules = ["allow 10.0.0.0/8", "allow fd00::/8", "allow 9.9.9.9/32:53"];
        assert_eq!(shown(&policy), rules);
        assert_eq!(policy.default_action(), Action::Deny);
    }

    #[test]
    fn port_lists_are_multiplied_with_the_prefixes() {
        let text = r#"{"allowed_cidrs": ["10.0.0.0/8", "192.0.2.0/24"],
            "allowed_tcp_ports": [443, 80], "allowed_udp_ports": [123], "allow_dns": false}"#;
        assert_eq!(
            shown(&json(text).unwrap()),
            [
                "allow 10.0.0.0/8:80,443/tcp",
                "allow 10.0.0.0/8:123/udp",
                "allow 192.0.2.0/24:80,443/tcp",
                "allow 192.0.2.0/24:123/udp",
            ]
        );
    }

    #[test]
    fn one_empty_port_list_means_none_of_that_protocol() {
        let text = r#"{"allowed_cidrs": ["10.0.0.0/8"], "allowed_tcp_ports": [443],
            "allowed_udp_ports": [], "allow_dns": false}"#;
        assert_eq!(shown(&json(text).unwrap()), ["allow 10.0.0.0/8:443/tcp"]);
    }

    #[test]
    fn ports_without_a_prefix_allow_nothing_but_the_resolvers() {
        let policy = json(r#"{"allowed_tcp_ports": [443]}"#).unwrap();
        assert_eq!(shown(&policy), ["allow 9.9.9.9/32:53"]);
        assert_eq!(policy.default_action(), Action::Deny);
    }

    #[test]
    fn a_runtimes_defaults_allow_the_resolvers_and_log_denials() {
        let policy = json(r#"{"allow_dns": true}"#).unwrap();
        assert_eq!(shown(&policy), ["allow 9.9.9.9/32:53"]);
        assert!(policy.log_denied() && policy.is_in_force());
        let policy = json(r#"{"allow_dns": false, "log_denied": false}"#).unwrap();
        assert!(shown(&policy).is_empty() && !policy.log_denied() && policy.is_in_force());
    }

    #[test]
    fn what_is_denied_is_answered_only_where_a_file_says_so() {
        let rejects = |text| json(text).unwrap().rejects();
        assert!(!rejects(r#"{"default": "deny"}"#));
        assert!(!rejects(r#"{"allowed_cidrs": ["10.0.0.0/8"]}"#));
        assert!(rejects(r#"{"default": "deny", "reject": true}"#));
        assert!(rejects(r#"{"allowed_cidrs": [], "reject": true}"#));
        let toml = Policy::from_text("allow = []\nreject = true\n", Format::Toml).unwrap();
        assert!(toml.rejects() && toml.log_denied());
    }

    #[test]
    fn faults_are_named_with_field_and_place() {
        for (text, message) in [
            ("{}", "no field is given"),
            (r#"{"reject": true}"#, "no field is given"),
            (
                r#"{"allow": [], "allowed_cidrs": []}"#,
                "allow and allowed_cidrs do not go together",
            ),
            (
                "{\n \"alow\": []}",
                "alow: unknown field `alow`, expected one of",
            ),
            (
                "{\"allow\": [\"any\",\n \"10.0.0.0/33\"]}",
                "allow[1]: rule \"10.0.0.0/33\": is not an egress rule at line 2",
            ),
            (
                r#"{"allowed_tcp_ports": [80, 70000]}"#,
                "allowed_tcp_ports[1]: invalid value: integer `70000`, expected u16 at line 1",
            ),
            (
                r#"{"allowed_udp_ports": [0]}"#,
                "allowed_udp_ports \"0\": \"0\" is not a port",
            ),
            (r#"{"default": "drop"}"#, "default: unknown variant `drop`"),
            (
                r#"{"allow": []} {}"#,
                "no policy: trailing characters at line 1",
            ),
            (
                r#"{"allow": []"#,
                "no policy: EOF while parsing an object at line 1",
            ),
        ] {
            let error = crate::verbs::chain(&json(text).expect_err(text));
            assert!(error.starts_with(message), "{error}");
        }
        for (text, message) in [
            (
                "allow = [\"any\"]\nalow = []\n",
                "alow: unknown field `alow`",
            ),
            (
                "\nallow = [\"any\", \"all\"]",
                "allow[1]: rule \"all\": is not an egress rule",
            ),
            ("\nallow = ", "no policy: "),
        ] {
            let error = Policy::from_text(text, Format::Toml).expect_err(text);
            let text = error.to_string();
            assert!(
                text.starts_with(message) && text.ends_with("at line 2"),
                "{text}"
            );
        }
    }

    #[test]
    fn files_that_end_in_toml_are_toml() {
        assert_eq!(Format::of(Path::new("/etc/p.toml")), Format::Toml);
        for path in ["p.json", "p", "-"] {
            assert_eq!(Format::of(Path::new(path)), Format::Json);
        }
    }
}
