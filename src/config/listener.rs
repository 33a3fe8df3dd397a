//! Where callers reach the broker and how that is encrypted: `listen`, `plaintext_beyond_loopback` and `[tls]`; and what
//! `[limits]` says of connections.
//!
//! Files are named here and read by who listens. Invariant: nothing is spoken in plain text beyond this machine unless
//! the operator says so.

use std::fmt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use humantime::format_duration;

use super::ConfigError;
use super::section::Section;
use crate::acceptor::{Address, ClientTrust, Clients, Limits, Tls};

/// Where to listen where nothing else is said: this machine only, at the port that gRPC's examples use.
const DEFAULT_ADDRESS: &str = "127.0.0.1:50051";

/// Where to listen, and how.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ListenConfig {
    /// At least one.
    pub addresses: Vec<Address>,
    /// How TCP is encrypted; `None`: not at all.
    pub tls: Option<Tls>,
    /// Whether plain text may leave this machine.
    pub plaintext_beyond_loopback: bool,
}

/// Whether clients must show a certificate.
#[derive(Clone, Copy)]
enum Demand {
    Required,
    Optional,
}

impl Demand {
    const WORDS: &[(&str, Self)] = &[("required", Self::Required), ("optional", Self::Optional)];
}

impl ListenConfig {
    /// The same at another address and at no other, as a command line may have it.
    ///
    /// # Errors
    /// [`ConfigError`] if that would be plain text beyond this machine.
    pub fn at(self, address: Address) -> Result<Self, ConfigError> {
        let moved = Self { addresses: vec![address], ..self };
        match moved.problem() {
            None => Ok(moved),
            Some(problem) => Err(ConfigError::Problems(vec![format!("--listen: {problem}")])),
        }
    }

    /// Whether clients are asked for certificates.
    pub(super) fn asks_for_certificates(&self) -> bool {
        self.tls.as_ref().is_some_and(|tls| tls.clients != Clients::Unasked)
    }

    /// What is wrong with speaking as it says where it says.
    fn problem(&self) -> Option<String> {
        if self.tls.is_some() || self.plaintext_beyond_loopback {
            return None;
        }
        let address = self.addresses.iter().find(|address| !address.is_local())?;
        Some(format!(
            "{address} would be plain text beyond loopback: add a [tls] section, or set \
             plaintext_beyond_loopback = true where something else encrypts, such as a service mesh"
        ))
    }

    /// The keys of the root, as they are read.
    pub(super) fn write_keys(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { addresses, tls: _, plaintext_beyond_loopback } = self;
        let addresses: Vec<_> = addresses.iter().map(ToString::to_string).collect();
        match addresses.as_slice() {
            [address] => writeln!(f, "listen = {address:?}")?,
            addresses => writeln!(f, "listen = {addresses:?}")?,
        }
        writeln!(f, "plaintext_beyond_loopback = {plaintext_beyond_loopback}")
    }

    /// The section, as it is read.
    pub(super) fn write_tls(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Some(Tls { certificate, key, clients }) = &self.tls else { return Ok(()) };
        let text = |path: &Path| path.display().to_string();
        writeln!(f, "\n[tls]\ncertificate = {:?}\nkey = {:?}", text(certificate), text(key))?;
        let (word, ClientTrust { authority, revoked }) = match clients {
            Clients::Unasked => return Ok(()),
            Clients::Optional(trust) => ("optional", trust),
            Clients::Required(trust) => ("required", trust),
        };
        writeln!(f, "client_ca = {:?}\nclient_certificates = {word:?}", text(authority))?;
        match revoked {
            None => Ok(()),
            Some(revoked) => writeln!(f, "client_crl = {:?}", text(revoked)),
        }
    }
}

/// What the root says.
pub(super) fn read(root: &mut Section<'_>) -> ListenConfig {
    let addresses = addresses(root);
    let plaintext_beyond_loopback = root.flag("plaintext_beyond_loopback", false);
    let encrypted = root.has("tls");
    // Asked for even where there is none: a slip in the section's name is seen then.
    let section = root.section("tls");
    let tls = encrypted.then(|| tls(section)).flatten();
    let config = ListenConfig { addresses, tls, plaintext_beyond_loopback };
    let is_unix = |address: &Address| matches!(address, Address::Unix(_));
    if encrypted && !config.addresses.is_empty() && config.addresses.iter().all(is_unix) {
        root.problem("tls", "has no effect: Unix sockets are not encrypted");
    }
    if encrypted && plaintext_beyond_loopback {
        root.problem("plaintext_beyond_loopback", "has no effect beside [tls]: remove one of them");
    }
    // A section with a problem of its own would have encrypted.
    if !encrypted && let Some(problem) = config.problem() {
        root.problem("listen", &problem);
    }
    config
}

fn addresses(root: &mut Section<'_>) -> Vec<Address> {
    let given = root.has("listen");
    let texts = root.list("listen");
    if !given {
        return vec![DEFAULT_ADDRESS.parse().expect("the default is an address")];
    }
    if texts.is_empty() {
        root.problem("listen", "names no address: name one, or leave the key out");
    }
    let mut addresses = Vec::with_capacity(texts.len());
    for text in texts {
        match text.parse() {
            Ok(address) => addresses.push(address),
            Err(error) => root.problem("listen", &format!("{text:?} {error}")),
        }
    }
    addresses
}

fn tls(mut section: Section<'_>) -> Option<Tls> {
    let certificate = file(&mut section, "certificate", "the server's certificate and those above it");
    let key = file(&mut section, "key", "the certificate's key");
    let clients = clients(&mut section);
    section.finish();
    Some(Tls { certificate: certificate?, key: key?, clients })
}

/// A file that must be named.
fn file(section: &mut Section<'_>, key: &str, what: &str) -> Option<PathBuf> {
    if !section.has(key) {
        section.problem(key, &format!("is missing: name a PEM file with {what}"));
    }
    section.text(key).map(PathBuf::from)
}

fn clients(section: &mut Section<'_>) -> Clients {
    let demanded = section.has("client_certificates");
    let asked = section.has("client_ca");
    let authority = section.text("client_ca").map(PathBuf::from);
    let demand = section.word("client_certificates", Demand::WORDS, Demand::Required);
    let revoked = section.text("client_crl").map(PathBuf::from);
    for (key, given) in [("client_certificates", demanded), ("client_crl", revoked.is_some())] {
        if given && !asked {
            section.problem(key, "has no effect without client_ca, which vouches for clients' certificates");
        }
    }
    match (authority, demand) {
        (None, _) => Clients::Unasked,
        (Some(authority), Demand::Required) => Clients::Required(ClientTrust { authority, revoked }),
        (Some(authority), Demand::Optional) => Clients::Optional(ClientTrust { authority, revoked }),
    }
}

/// The limits of connections, among the broker's.
pub(super) fn limits(section: &mut Section<'_>) -> Limits {
    const DAY: Duration = Duration::from_hours(24);
    let default = Limits::default();
    Limits {
        connections_max: section.number("connections_max", default.connections_max, 1..=1_000_000),
        handshake_timeout: section.duration(
            "connection_handshake_timeout",
            default.handshake_timeout,
            Duration::from_millis(100)..=Duration::from_mins(5),
        ),
        age_max: section.duration("connection_age_max", default.age_max, Duration::from_mins(1)..=DAY),
        idle_timeout: section.duration(
            "connection_idle_timeout",
            default.idle_timeout,
            Duration::from_millis(100)..=DAY,
        ),
    }
}

/// The limits as they are read.
pub(super) fn write_limits(f: &mut fmt::Formatter<'_>, limits: &Limits) -> fmt::Result {
    let Limits { connections_max, handshake_timeout, idle_timeout, age_max } = limits;
    writeln!(f, "connections_max = {connections_max}")?;
    writeln!(f, "connection_handshake_timeout = \"{}\"", format_duration(*handshake_timeout))?;
    writeln!(f, "connection_idle_timeout = \"{}\"", format_duration(*idle_timeout))?;
    writeln!(f, "connection_age_max = \"{}\"", format_duration(*age_max))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::tests::{load, problems};

    const ENGINE: &str = "[engines.main]\nurl = \"postgresql://u@localhost/db\"\n";
    const TLS: &str = "[tls]\ncertificate = \"tls.crt\"\nkey = \"tls.key\"\n";

    fn listen(root: &str, sections: &str) -> ListenConfig {
        load(&format!("{root}\n{ENGINE}{sections}"), &[]).unwrap().listen
    }

    fn refused(root: &str, sections: &str) -> Vec<String> {
        problems(&format!("{root}\n{ENGINE}{sections}"), &[])
    }

    fn address(text: &str) -> Address {
        text.parse().unwrap()
    }

    #[test]
    fn this_machine_only_unless_said_otherwise() {
        let config = listen("", "");
        assert_eq!(config.addresses, [address("127.0.0.1:50051")]);
        assert_eq!((config.tls, config.plaintext_beyond_loopback), (None, false));
    }

    #[test]
    fn one_address_or_a_list_of_them() {
        let both = [address("127.0.0.1:1"), address("unix:/run/broker.sock")];
        assert_eq!(listen("listen = \"127.0.0.1:1\"", "").addresses, both[..1]);
        assert_eq!(listen("listen = [\"127.0.0.1:1\", \"unix:/run/broker.sock\"]", "").addresses, both);
        let environment = [("SESSION_BROKER__LISTEN", "127.0.0.1:1, unix:/run/broker.sock")];
        assert_eq!(load(ENGINE, &environment).unwrap().listen.addresses, both);
    }

    #[test]
    fn plain_text_stays_on_this_machine_unless_said_otherwise() {
        for beyond in ["\"0.0.0.0:1\"", "\"[::]:1\"", "[\"127.0.0.1:1\", \"10.0.0.1:1\"]", "\"broker.example:1\""] {
            let root = format!("listen = {beyond}");
            let problems = refused(&root, "");
            assert_eq!(problems.len(), 1, "{problems:?}");
            assert!(problems[0].starts_with("listen: "), "{problems:?}");
            for remedy in ["[tls]", "plaintext_beyond_loopback = true"] {
                assert!(problems[0].contains(remedy), "{problems:?}");
            }
            listen(&root, TLS);
            listen(&format!("{root}\nplaintext_beyond_loopback = true"), "");
        }
        listen("listen = [\"localhost:1\", \"127.0.0.2:1\", \"[::1]:1\", \"unix:/run/broker.sock\"]", "");
    }

    #[test]
    fn another_address_passes_the_same_rule() {
        let (near, beyond) = (address("127.0.0.1:2"), address("0.0.0.0:2"));
        let plain = listen("listen = \"127.0.0.1:1\"", "");
        assert_eq!(plain.clone().at(near.clone()).unwrap().addresses, [near]);
        let Err(ConfigError::Problems(problems)) = plain.at(beyond.clone()) else { panic!("it is taken") };
        assert!(problems[0].starts_with("--listen: 0.0.0.0:2 "), "{problems:?}");
        assert_eq!(listen("", TLS).at(beyond.clone()).unwrap().addresses, std::slice::from_ref(&beyond));
        listen("plaintext_beyond_loopback = true", "").at(beyond).unwrap();
    }

    #[test]
    fn what_clients_must_show() {
        let clients = |more: &str| listen("", &format!("{TLS}{more}")).tls.unwrap().clients;
        let trust =
            |revoked: Option<&str>| ClientTrust { authority: "ca.crt".into(), revoked: revoked.map(PathBuf::from) };
        assert_eq!(clients(""), Clients::Unasked);
        assert_eq!(clients("client_ca = \"ca.crt\""), Clients::Required(trust(None)));
        let optional = "client_ca = \"ca.crt\"\nclient_certificates = \"optional\"\nclient_crl = \"crl.pem\"";
        assert_eq!(clients(optional), Clients::Optional(trust(Some("crl.pem"))));
    }

    #[test]
    fn every_problem_of_listening_is_reported_at_once_with_its_path() {
        let root = r#"
            listen = ["127.0.0.1", "unix:run/broker.sock", "127.0.0.1:1"]
            plaintext_beyond_loopback = true
        "#;
        let sections = r#"
            [tls]
            key = "tls.key"
            client_certificates = "maybe"
            client_crl = "crl.pem"
            ca = "x"
            [limits]
            connections_max = 0
            connection_handshake_timeout = "0s"
            connection_idle_timeout = 1
        "#;
        let problems = refused(root, sections);
        for (expected, times) in [
            ("listen: ", 2),
            ("plaintext_beyond_loopback: ", 1),
            ("tls.certificate: is missing", 1),
            ("tls.client_certificates: ", 2),
            ("tls.client_crl: ", 1),
            ("tls.ca: unknown key", 1),
            ("limits.connections_max: ", 1),
            ("limits.connection_handshake_timeout: ", 1),
            ("limits.connection_idle_timeout: ", 1),
        ] {
            let reported = problems.iter().filter(|problem| problem.starts_with(expected)).count();
            assert_eq!(reported, times, "{expected:?} among\n{}", problems.join("\n"));
        }
        assert_eq!(problems.len(), 11, "{}", problems.join("\n"));
    }

    #[test]
    fn what_would_have_no_effect_or_is_misspelt_is_a_problem() {
        let only = |root: &str, sections: &str, expected: &str| {
            let problems = refused(root, sections);
            assert!(problems.len() == 1 && problems[0].starts_with(expected), "{problems:?}");
        };
        only("listen = \"unix:/run/broker.sock\"", TLS, "tls: ");
        only("listen = []", "", "listen: ");
        only("", "[tlss]\nkey = \"tls.key\"", "tlss: unknown key: did you mean tls?");
    }

    #[test]
    fn listening_is_printed_as_it_is_read() {
        for (root, sections) in [
            ("", String::new()),
            ("listen = [\"0.0.0.0:1\", \"unix:/run/b r.sock\"]\nplaintext_beyond_loopback = true", String::new()),
            ("listen = \"0.0.0.0:1\"", TLS.to_owned()),
            ("", format!("{TLS}client_ca = \"ca.crt\"")),
            ("", format!("{TLS}client_ca = \"a\"\nclient_certificates = \"optional\"\nclient_crl = \"c\"")),
            ("", "[limits]\nconnections_max = 5\nconnection_idle_timeout = \"3m\"".to_owned()),
        ] {
            let config = load(&format!("{root}\n{ENGINE}{sections}"), &[]).unwrap();
            let printed = config.to_string();
            assert_eq!(load(&printed, &[]).unwrap(), config, "{printed}");
        }
    }
}
