//! The configuration: a TOML file, environment variables over it, checked as a whole.
//!
//! Every problem is found before any is reported. Invariants: an unknown key is a problem, never ignored; a password
//! is shown by nothing here.

mod authentication;
mod engine;
mod explain;
mod listener;
mod profiles;
mod section;
mod url;

pub use engine::EngineConfig;
pub use listener::ListenConfig;

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use humantime::format_duration;

use crate::acceptor::{Address, Limits as ConnectionLimits};
use crate::broker::commit::CommitTokens;
use crate::broker::profile::{Limits, Profiles, ReaperMode};
use crate::identity::Authentication;
use crate::secret::Secret;
use crate::telemetry::{LogFilter, TelemetryOptions};
use section::{Problems, Section, key};

/// What environment variables start with: `SESSION_BROKER__ENGINES__MAIN__URL` is `engines.main.url`.
const ENVIRONMENT_PREFIX: &str = "SESSION_BROKER__";

/// Everything `session-broker serve` needs to know.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// Where to listen for gRPC, and how it is encrypted.
    pub listen: ListenConfig,
    /// Where callers reach this broker; `None`: where it listens.
    pub endpoint: Option<String>,
    /// This replica's name, part of every session token.
    pub owner: String,
    /// The engine of sessions that name none.
    pub default_engine: String,
    /// By what callers prove who they are.
    pub authentication: Authentication,
    /// What commit tokens are sealed with; brokers that share it open each other's. `None`: a random one.
    pub commit_token_key: Option<Secret>,
    /// Where probes are answered, in plain text; `None`: nowhere but where callers are.
    pub operations: Option<Address>,
    /// What the broker tells of itself.
    pub telemetry: TelemetryOptions,
    /// How long the broker goes on as before once it has said that it is not ready.
    pub drain_notice: Duration,
    /// How long live transactions may take to finish when the broker stops.
    pub drain_grace: Duration,
    /// The limits of sessions.
    pub profiles: Profiles,
    /// The limits of the broker.
    pub limits: Limits,
    /// The limits of connections.
    pub connections: ConnectionLimits,
    /// The PostgreSQL targets, by name; at least one.
    pub engines: BTreeMap<String, EngineConfig>,
}

/// Why there is no configuration.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read or is not TOML.
    #[error("{}: {cause}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What reading it said.
        cause: String,
    },
    /// What it says is wrong, all of it.
    #[error("{}", .0.join("\n"))]
    Problems(Vec<String>),
}

impl Config {
    /// With the bounds on what comes after it, cancelling, rolling back, resetting and stopping the transport, a replica
    /// is gone within the 30 s after which Kubernetes kills.
    const DRAIN_GRACE: Duration = Duration::from_secs(20);

    /// Reads `file`, if there is one, with `environment` over it.
    ///
    /// # Errors
    /// [`ConfigError`] with every problem found.
    pub fn load(
        file: Option<&Path>,
        environment: impl IntoIterator<Item = (String, String)>,
    ) -> Result<Self, ConfigError> {
        let mut table = match file {
            None => toml::Table::new(),
            Some(path) => read(path)?,
        };
        let mut problems = Problems::default();
        overlay(&mut table, environment, &mut problems);
        let config = Self::from_section(Section::new(String::new(), table, &mut problems));
        match config {
            Some(config) if problems.is_empty() => Ok(config),
            _ => Err(ConfigError::Problems(problems.into_vec())),
        }
    }

    fn from_section(mut root: Section<'_>) -> Option<Self> {
        let (limits, connections) = limits(root.section("limits"));
        let listen = listener::read(&mut root);
        let endpoint = root.text("endpoint");
        let owner = root.text("owner").unwrap_or_else(hostname);
        if owner.is_empty() || owner.len() > 253 || owner.contains(char::is_whitespace) {
            root.problem("owner", "must be 1 to 253 bytes without white space");
        }
        let authentication = authentication::read(&mut root);
        let commit_token_key = commit_token_key(&mut root);
        let operations = operations(root.section("operations"));
        let telemetry = telemetry(root.section("telemetry"));
        let drain_notice = root.duration("drain_notice", Duration::ZERO, Duration::ZERO..=Duration::from_mins(5));
        let drain_grace = root.duration("drain_grace", Self::DRAIN_GRACE, Duration::ZERO..=Duration::from_hours(1));
        let default_engine = root.text("default_engine");
        let (named, engines) = engines(root.section("engines"));
        let default_engine = match (default_engine, engines.keys().next()) {
            (Some(name), _) if engines.contains_key(&name) => Some(name),
            (Some(name), _) => {
                root.problem("default_engine", &format!("names {name:?}, which is not among the engines"));
                None
            }
            (None, Some(only)) if engines.len() == 1 => Some(only.clone()),
            (None, Some(_)) => {
                root.problem("default_engine", "is missing, and there is more than one engine: name one of them");
                None
            }
            (None, None) if named == 0 => {
                root.problem("engines", "is empty: add [engines.main] with url = \"postgresql://USER@HOST/DATABASE\"");
                None
            }
            // Each of those named has its own problem.
            (None, None) => None,
        };
        if !root.has("principals") {
            let add =
                "add [principals.NAME] for each caller, [principals.anonymous] for those who do not say who they are";
            root.problem("principals", &format!("is empty, so nobody may do anything: {add}"));
        }
        let profiles = profiles::read(&mut root, &engines, &limits, &authentication);
        if authentication.certificate.is_some() && !listen.asks_for_certificates() {
            root.problem("authentication.certificate", "has no effect without tls.client_ca, which vouches for them");
        }
        root.finish();
        Some(Self {
            listen,
            endpoint,
            owner,
            default_engine: default_engine?,
            authentication,
            commit_token_key,
            operations,
            telemetry,
            drain_notice,
            drain_grace,
            profiles,
            limits,
            connections,
            engines,
        })
    }
}

/// The key as it stands here, or in a file of its own.
fn commit_token_key(root: &mut Section<'_>) -> Option<Secret> {
    let (key, file) = (root.text("commit_token_key"), root.text("commit_token_key_file"));
    let (field, key) = match (key, file) {
        (None, None) => return None,
        (Some(_), Some(_)) => {
            root.problem("commit_token_key", "is given twice, here and as commit_token_key_file");
            return None;
        }
        (Some(key), None) => ("commit_token_key", key),
        (None, Some(file)) => match std::fs::read_to_string(&file) {
            Ok(key) => ("commit_token_key_file", key.trim_end_matches(['\r', '\n']).to_owned()),
            Err(error) => {
                root.problem("commit_token_key_file", &format!("cannot be read: {file}: {error}"));
                return None;
            }
        },
    };
    if key.len() < CommitTokens::KEY_BYTES_MIN {
        let problem = format!("must have at least {} bytes, drawn at random", CommitTokens::KEY_BYTES_MIN);
        root.problem(field, &problem);
    }
    Some(Secret::new(key))
}

/// Where probes are answered. What they are told is nobody's secret: any address will do.
fn operations(mut section: Section<'_>) -> Option<Address> {
    let address = section.text("listen").and_then(|text| match text.parse() {
        Ok(address) => Some(address),
        Err(error) => {
            section.problem("listen", &format!("{text:?} {error}"));
            None
        }
    });
    section.finish();
    address
}

/// What is logged is said here, or by the variable that Rust's programs have for it.
fn telemetry(mut section: Section<'_>) -> TelemetryOptions {
    let stated = section.text("log").map(|text| LogFilter::parse(&text));
    let log = match stated {
        Some(Ok(filter)) => filter,
        Some(Err(problem)) => {
            section.problem("log", &problem);
            LogFilter::default()
        }
        None => LogFilter::from_rust_log().unwrap_or_else(|problem| {
            section.problem("log", &problem);
            LogFilter::default()
        }),
    };
    let query_text = section.flag("query_text", false);
    section.finish();
    TelemetryOptions { log, query_text }
}

fn limits(mut section: Section<'_>) -> (Limits, ConnectionLimits) {
    let default = Limits::default();
    let limits = Limits {
        sessions_max: section.number("sessions_max", default.sessions_max, 1..=10_000_000),
        calls_max: section.number("calls_max", default.calls_max, 1..=10_000_000),
        tombstones_max: section.number("tombstones_max", default.tombstones_max, 0..=10_000_000),
        tombstone_ttl: section.duration(
            "tombstone_ttl",
            default.tombstone_ttl,
            Duration::ZERO..=Duration::from_hours(24),
        ),
        reaper: section.word("reaper", ReaperMode::WORDS, default.reaper),
    };
    let connections = listener::limits(&mut section);
    section.finish();
    (limits, connections)
}

/// How many engines are named, and those of them that are right.
fn engines(mut section: Section<'_>) -> (usize, BTreeMap<String, EngineConfig>) {
    let mut engines = BTreeMap::new();
    let names = section.keys();
    let named = names.len();
    for name in names {
        if let Some(engine) = EngineConfig::read(section.section(&name)) {
            engines.insert(name, engine);
        }
    }
    section.finish();
    (named, engines)
}

fn read(path: &Path) -> Result<toml::Table, ConfigError> {
    let failed = |cause: String| ConfigError::File { path: path.to_owned(), cause };
    let text = std::fs::read_to_string(path).map_err(|error| failed(error.to_string()))?;
    text.parse().map_err(|error: toml::de::Error| {
        // The error's own display shows the line, which may hold a password.
        let line = error.span().map_or(0, |span| text[..span.start.min(text.len())].lines().count().max(1));
        failed(format!("line {line}: {}", error.message()))
    })
}

/// Puts the environment's settings over the file's.
fn overlay(table: &mut toml::Table, environment: impl IntoIterator<Item = (String, String)>, problems: &mut Problems) {
    for (name, value) in environment {
        let Some(path) = name.strip_prefix(ENVIRONMENT_PREFIX) else { continue };
        let path = path.to_ascii_lowercase();
        let mut keys: Vec<_> = path.split("__").collect();
        let last = keys.pop().expect("a split has at least one part");
        let mut place = &mut *table;
        for key in keys {
            let entry = place.entry(key).or_insert_with(|| toml::Table::new().into());
            match entry {
                toml::Value::Table(next) => place = next,
                other => {
                    problems.add(&name, "sets a key inside of what is no section");
                    *other = toml::Table::new().into();
                    place = other.as_table_mut().expect("it was made one");
                }
            }
        }
        place.insert(last.into(), value.into());
    }
}

fn hostname() -> String {
    std::fs::read_to_string("/proc/sys/kernel/hostname")
        .map(|name| name.trim().to_owned())
        .ok()
        .filter(|name| !name.is_empty())
        .unwrap_or_else(|| "broker".into())
}

/// The effective configuration as TOML, passwords left out.
impl fmt::Display for Config {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            listen,
            endpoint,
            owner,
            default_engine,
            authentication,
            commit_token_key: _,
            operations,
            telemetry: TelemetryOptions { log, query_text },
            drain_notice,
            drain_grace,
            profiles,
            limits,
            connections,
            engines,
        } = self;
        listen.write_keys(f)?;
        if let Some(endpoint) = endpoint {
            writeln!(f, "endpoint = {endpoint:?}")?;
        }
        writeln!(f, "owner = {owner:?}\ndefault_engine = {default_engine:?}")?;
        writeln!(f, "drain_notice = \"{}\"", format_duration(*drain_notice))?;
        writeln!(f, "drain_grace = \"{}\"", format_duration(*drain_grace))?;
        write!(f, "{}", authentication::Shown(authentication))?;
        write!(f, "{}", profiles::Shown(profiles))?;
        let Limits { sessions_max, calls_max, tombstones_max, tombstone_ttl, reaper } = limits;
        listen.write_tls(f)?;
        if let Some(operations) = operations {
            writeln!(f, "\n[operations]\nlisten = {:?}", operations.to_string())?;
        }
        writeln!(f, "\n[telemetry]\nlog = {:?}\nquery_text = {query_text}", log.to_string())?;
        writeln!(f, "\n[limits]")?;
        listener::write_limits(f, connections)?;
        writeln!(f, "sessions_max = {sessions_max}\ncalls_max = {calls_max}")?;
        writeln!(f, "tombstones_max = {tombstones_max}")?;
        writeln!(f, "tombstone_ttl = \"{}\"\nreaper = {:?}", format_duration(*tombstone_ttl), reaper.word())?;
        for (name, engine) in engines {
            writeln!(f, "\n[engines.{}]\n{engine}", key(name))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::broker::profile::Profile;
    use crate::postgres::engine::PoolOptions;
    use crate::postgres::options::{Password, SslMode};
    use crate::secret::Secret;

    pub(super) fn load(text: &str, environment: &[(&str, &str)]) -> Result<Config, ConfigError> {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("broker.toml");
        std::fs::write(&file, text).unwrap();
        // What most tests are not about: everybody may call.
        let anonymous = ("SESSION_BROKER__PRINCIPALS__ANONYMOUS__PROFILES", "default");
        let environment = environment.iter().chain((!text.contains("[principals")).then_some(&anonymous));
        let unasked = ("SESSION_BROKER__AUTHENTICATION__ANONYMOUS", "true");
        let environment = environment.chain((!text.contains("[authentication")).then_some(&unasked));
        Config::load(Some(&file), environment.map(|(name, value)| ((*name).into(), (*value).into())))
    }

    pub(super) fn problems(text: &str, environment: &[(&str, &str)]) -> Vec<String> {
        match load(text, environment) {
            Err(ConfigError::Problems(problems)) => problems,
            other => panic!("no problems but {other:?}"),
        }
    }

    proptest! {
        #[test]
        fn whatever_a_file_and_the_environment_say_is_read_or_reported(
            line in 0..40_usize,
            key in "[a-z_.\"]{0,12}|tls|limits|principals|engines|authentication",
            value in "\\PC{0,20}|-?[0-9]{1,20}|\"[^\"]{0,20}\"|\\[.{0,10}\\]|true",
            name in "(ENGINES|PROFILES|PRINCIPALS|AUTHENTICATION|TLS|LIMITS)(__[A-Z_]{0,8}){0,4}",
        ) {
            let mut lines: Vec<_> = EVERYTHING.lines().map(str::to_owned).collect();
            let line = line % lines.len();
            lines.insert(line, format!("{key} = {value}"));
            let variable = format!("{ENVIRONMENT_PREFIX}{name}");
            for text in [lines.join("\n"), lines[line..].join("\n"), value.clone()] {
                match load(&text, &[(&variable, &value)]) {
                    Err(ConfigError::Problems(problems)) => prop_assert!(!problems.is_empty()),
                    Err(ConfigError::File { cause, .. }) => prop_assert!(!cause.is_empty()),
                    Ok(config) => prop_assert_eq!(load(&config.to_string(), &[]).map(|again| again.profiles), Ok(config.profiles)),
                }
            }
        }
    }

    /// A key of each kind.
    const EVERYTHING: &str = r#"
        listen = ["127.0.0.1:0", "unix:/tmp/broker.sock"]
        drain_notice = "5s"
        operations = { listen = "127.0.0.1:0" }
        drain_grace = "5s"
        [engines.main]
        url = "postgresql://u@localhost/db"
        overridable = ["search_path"]
        pool_size = 3
        [profiles.default]
        lease_ttl = "20s"
        [profiles.report]
        engines = ["main"]
        connect_options = ["search_path"]
        roles = ["reader"]
        [profiles.report.classes.quick]
        statement_timeout = "1s"
        [principals."ops/*"]
        admin = true
        calls_per_second = 10
        [principals.anonymous]
        profiles = ["report"]
        [authentication]
        anonymous = true
        [authentication.jwt]
        issuer = "i"
        audience = "a"
        jwks_file = "keys.json"
        [limits]
        sessions_max = 10
        connections_max = 10
    "#;

    #[test]
    fn one_engine_is_all_it_takes() {
        let config = load("[engines.main]\nurl = \"postgresql://u@localhost/db\"", &[]).unwrap();
        assert_eq!(config.default_engine, "main");
        assert_eq!(config.profiles.profiles, Profiles::from(Profile::default()).profiles);
        assert_eq!(config.engines["main"].pool, PoolOptions::default());
    }

    #[test]
    fn the_environment_wins_over_the_file() {
        let text = "[engines.main]\nurl = \"postgresql://u@localhost/db\"\npool_size = 3";
        let environment = [
            ("SESSION_BROKER__ENGINES__MAIN__PASSWORD", "hush"),
            ("SESSION_BROKER__ENGINES__MAIN__POOL_SIZE", "7"),
            ("SESSION_BROKER__PROFILES__DEFAULT__LEASE_TTL", "45s"),
            ("UNRELATED", "x"),
        ];
        let config = load(text, &environment).unwrap();
        assert_eq!(config.engines["main"].pool.size, 7);
        assert_eq!(config.engines["main"].connect.password, Some(Password::Given(Secret::new("hush".into()))));
        assert_eq!(config.profiles.profiles["default"].lease_ttl, Duration::from_secs(45));
    }

    #[test]
    fn every_problem_is_reported_at_once_with_its_path() {
        let text = r#"
            lisen = "127.0.0.1:1"
            drain_grace = 20
            default_engine = "other"
            [profiles.default]
            lease_ttl = "1h"
            result_rows_max = 0
            [limits]
            sessions_max = "many"
            [engines.main]
            url = "postgresql://u:hush@db.example/db?sslmode=prefer"
            pool_sise = 3
            ssl_cert = "cert.pem"
            server_settings = { search_path = "x", "no name" = "y", client_encoding = "z" }
            search_path = ["a"]
            [engines.second]
            user = "u"
        "#;
        let problems = problems(text, &[("SESSION_BROKER__ENGINES__MAIN__POOL_TIMEOUT", "soon")]).join("\n");
        for expected in [
            "lisen: unknown key: did you mean listen?",
            "drain_grace: ",
            "default_engine: ",
            "profiles.default.lease_ttl: ",
            "profiles.default.result_rows_max: ",
            "limits.sessions_max: ",
            "engines.main.ssl_mode: must be one of disable, require, verify-ca, verify-full",
            "engines.main.ssl_key: ",
            "engines.main.server_settings.search_path: ",
            "engines.main.server_settings.no name: ",
            "engines.main.server_settings.client_encoding: ",
            "engines.main.pool_sise: unknown key: did you mean pool_size?",
            "engines.main.pool_timeout: ",
            "engines.second.host: is missing",
        ] {
            assert!(problems.contains(expected), "{expected:?} is not among\n{problems}");
        }
        assert!(!problems.contains("hush"), "{problems}");
    }

    #[test]
    fn a_file_that_is_no_toml_is_named_with_its_line_and_without_its_text() {
        let error = load("listen = \"x\"\npassword = hush", &[]).unwrap_err().to_string();
        assert!(error.contains("line 2"), "{error}");
        assert!(!error.contains("hush"), "{error}");
    }

    #[test]
    fn what_check_prints_is_the_configuration_without_the_passwords() {
        let text = r#"
            [engines.main]
            url = "postgresql://u:hush@127.0.0.1:1,%2Frun%2Fpg:2/db?options=-c%20a.b%3Dc%5C%20d&connect_timeout=7"
            search_path = ["a b", 'c"d']
            lock_timeout = "3s"
            keepalives = false
            ssl_mode = "verify-ca"
            ssl_root_cert = "ca.pem"
            [engines."odd name"]
            host = "db.example"
            hostaddr = "::1"
            user = "u"
            password_file = "secret"
            time_zone = "UTC"
        "#;
        let config = load(&format!("default_engine = \"main\"\n{text}"), &[]).unwrap();
        let printed = config.to_string();
        assert!(!printed.contains("hush"), "{printed}");
        let mut read = load(&printed, &[]).unwrap();
        let engine = read.engines.get_mut("main").unwrap();
        let password = |text: &str| Some(Password::Given(Secret::new(text.into())));
        assert_eq!(engine.connect.password, password("<redacted>"));
        engine.connect.password = password("hush");
        assert_eq!(read, config);
    }

    #[test]
    fn a_url_says_what_its_parts_would() {
        let url = "url = \"postgresql://u%40x:p%3Ass@[::1]:1,db.example:2/d%2Fb?application_name=billing&sslmode=require\
                   &connect_timeout=7&tcp_user_timeout=1500&keepalives_count=4&options=--work_mem%3D1MB%20-c%20a.b%3Dc\"";
        let parts = r#"
            host = ["::1", "db.example"]
            port = [1, 2]
            user = "u@x"
            password = "p:ss"
            database = "d/b"
            application_name = "billing"
            ssl_mode = "require"
            connect_timeout = "7s"
            tcp_user_timeout = "1500ms"
            keepalives_retries = 4
            server_settings = { work_mem = "1MB", "a.b" = "c" }
        "#;
        let read = |engine: &str| load(&format!("[engines.main]\n{engine}"), &[]).unwrap();
        assert_eq!(read(url), read(parts));
    }

    #[test]
    fn a_url_that_is_wrong_is_refused_by_name_and_without_the_password() {
        for (url, named) in [
            ("host=localhost user=u", "postgresql://"),
            ("postgresql://u:hush@localhost/db?no_such=1", "no_such"),
            ("postgresql://u:hush@localhost/db?sslmode=prefer", "ssl_mode"),
            ("postgresql://localhost/db", "user"),
            ("postgresql://u:hush@/db", "host"),
            ("postgresql://u:hush@localhost:x/db", "port"),
            ("postgresql://u:hush@localhost:0/db", "port"),
            ("postgresql://u:hush@localhost/db?connect_timeout=soon", "connect_timeout"),
            ("postgresql://u:hush@localhost/db?connect_timeout=0", "connect_timeout"),
            ("postgresql://u:se?hush@localhost/db", "%3F"),
            ("postgresql://u:se@hush@localhost/db", "%40"),
            ("postgresql://u:%zzhush@localhost/db", "%25"),
            ("postgresql://u:hush@localhost/db?options=-h%20x", "options"),
            ("postgresql://u:hush@localhost/db?options=-c%20a%3D1%20-c%20a%3D2", "twice"),
            ("postgresql://u:hush@localhost/db?user=v", "twice"),
            ("postgresql://u:hush@localhost/db?sslnegotiation=direct", "ssl_negotiation"),
        ] {
            let problems = problems(&format!("[engines.main]\nurl = {url:?}"), &[]).join("\n");
            assert!(problems.contains(named), "{url}: {problems}");
            assert!(!problems.contains("hush"), "{url}: {problems}");
        }
    }

    #[test]
    fn what_leaves_this_machine_is_encrypted_and_verified_unless_said_otherwise() {
        let mode = |host: &str| {
            let config = load(&format!("[engines.main]\nurl = \"postgresql://u@{host}/db\""), &[]).unwrap();
            config.engines["main"].connect.tls.mode
        };
        assert_eq!(mode("localhost"), SslMode::Disable);
        assert_eq!(mode("%2Frun"), SslMode::Disable);
        assert_eq!(mode("localhost,db.example"), SslMode::VerifyFull);
    }
}
