//! How to reach a PostgreSQL server: every connection parameter of libpq that the driver can honour, each with its type.
//!
//! Knows what the options mean, not how they are written in a file: `config/` reads them. Invariant: what is accepted is
//! honoured; nothing here shows the password.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;
use std::path::PathBuf;
use std::time::Duration;

use tokio_postgres::config as driver;

use super::begin::{IDLE_TIMEOUT, LoginTimeout, LoginTimeouts, STATEMENT_TIMEOUT};
pub use super::net::Host;
use crate::broker::connect::ConnectOverrides;
pub use crate::broker::connect::{
    ChannelBinding, Keepalives, LoadBalanceHosts, SslMode, SslNegotiation, TargetSessionAttrs,
};
use crate::broker::engine::Nets;
use crate::broker::error::Error;
use crate::secret::Secret;

/// Where, as whom and how to connect. The names are libpq's, spelled out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConnectOptions {
    /// Tried in order, or at random; `load_balance_hosts`.
    pub hosts: Vec<Host>,
    /// The role to log in as.
    pub user: String,
    /// Its password, if it needs one.
    pub password: Option<Password>,
    /// The database.
    pub database: String,
    /// What `pg_stat_activity` shows.
    pub application_name: String,
    /// One budget over resolving, TCP, TLS and logging in, shared by the hosts.
    pub connect_timeout: Duration,
    /// Probes on idle TCP connections.
    pub keepalives: Option<Keepalives>,
    /// How long sent data may stay unacknowledged. Linux only.
    pub tcp_user_timeout: Option<Duration>,
    /// Which servers will do.
    pub target_session_attrs: TargetSessionAttrs,
    /// In which order the hosts are tried.
    pub load_balance_hosts: LoadBalanceHosts,
    /// Whether the login must be bound to the TLS connection.
    pub channel_binding: ChannelBinding,
    /// Encryption, and what it proves.
    pub tls: Tls,
    /// Run-time parameters set at login, which is also what a reset goes back to.
    pub settings: BTreeMap<String, String>,
    /// What most transactions want of PostgreSQL's own timeouts: set at login too, where `settings` do not, they need not
    /// be set in each.
    pub nets: Option<Nets>,
}

impl ConnectOptions {
    /// What connections are called unless configured.
    pub const APPLICATION_NAME: &str = "session-broker";

    /// Long enough for a server across an ocean, short enough for a caller to wait for.
    pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

    /// As long as a failover takes; an answer to COMMIT is not waited for any longer.
    pub const TCP_USER_TIMEOUT: Duration = Duration::from_secs(30);

    /// How soon PostgreSQL stops the statement of a connection that has gone; without it, the statement runs on.
    pub const CLIENT_CONNECTION_CHECK_INTERVAL: Duration = Duration::from_millis(500);

    /// These options with a caller's over them.
    pub(super) fn with(&self, overrides: &ConnectOverrides) -> Self {
        let ConnectOverrides {
            database,
            user,
            application_name,
            connect_timeout,
            ssl_mode,
            target_session_attrs,
            load_balance_hosts,
            channel_binding,
            keepalives,
            tcp_user_timeout,
            client_connection_check_interval,
            idle_in_transaction_session_timeout,
            search_path,
            time_zone,
            server_settings,
        } = overrides.clone();
        let mut options = self.clone();
        let set = &mut options.settings;
        let milliseconds = |duration: Duration| duration.as_millis().to_string();
        set.extend(server_settings);
        let keyed = [
            ("client_connection_check_interval", client_connection_check_interval.map(milliseconds)),
            ("idle_in_transaction_session_timeout", idle_in_transaction_session_timeout.map(milliseconds)),
            ("search_path", (!search_path.is_empty()).then(|| quoted_path(&search_path))),
            ("TimeZone", time_zone),
        ];
        set.extend(keyed.into_iter().filter_map(|(name, value)| Some((name.to_owned(), value?))));
        options.database = database.unwrap_or(options.database);
        options.user = user.unwrap_or(options.user);
        options.application_name = application_name.unwrap_or(options.application_name);
        options.connect_timeout = connect_timeout.unwrap_or(options.connect_timeout);
        options.tls.mode = ssl_mode.unwrap_or(options.tls.mode);
        options.target_session_attrs = target_session_attrs.unwrap_or(options.target_session_attrs);
        options.load_balance_hosts = load_balance_hosts.unwrap_or(options.load_balance_hosts);
        options.channel_binding = channel_binding.unwrap_or(options.channel_binding);
        options.keepalives = keepalives.unwrap_or(options.keepalives);
        options.tcp_user_timeout = tcp_user_timeout.or(options.tcp_user_timeout);
        options
    }

    /// The timeouts set at login that transactions set too.
    pub(super) fn login_timeouts(&self) -> LoginTimeouts {
        let timeout = |name, usual: Option<Duration>| match self.settings.get(name) {
            Some(own) => own.parse().ok().map(Duration::from_millis).map(LoginTimeout::Engine),
            None => usual.map(LoginTimeout::Usual),
        };
        LoginTimeouts {
            statement: timeout(STATEMENT_TIMEOUT, self.nets.map(|nets| nets.statement)),
            idle: timeout(IDLE_TIMEOUT, self.nets.map(|nets| nets.idle)),
        }
    }

    /// The driver's form. Hosts, TLS and the time budget stay with us: we connect the stream ourselves.
    pub(super) fn driver_config(&self, password: Option<&str>) -> tokio_postgres::Config {
        let mut config = tokio_postgres::Config::new();
        config.user(&self.user).dbname(&self.database).application_name(&self.application_name);
        config.channel_binding(match self.channel_binding {
            ChannelBinding::Disable => driver::ChannelBinding::Disable,
            ChannelBinding::Prefer => driver::ChannelBinding::Prefer,
            ChannelBinding::Require => driver::ChannelBinding::Require,
        });
        config.ssl_mode(match self.tls.mode {
            SslMode::Disable => driver::SslMode::Disable,
            SslMode::Require | SslMode::VerifyCa | SslMode::VerifyFull => driver::SslMode::Require,
        });
        config.ssl_negotiation(match self.tls.negotiation {
            SslNegotiation::Postgres => driver::SslNegotiation::Postgres,
            SslNegotiation::Direct => driver::SslNegotiation::Direct,
        });
        if let Some(password) = password {
            config.password(password);
        }
        // As text is printed here too; what is set below comes later, and goes over them.
        let mut options =
            String::from(" -c DateStyle=ISO -c IntervalStyle=postgres -c bytea_output=hex -c extra_float_digits=1");
        for (name, value) in &self.settings {
            write!(options, " -c {name}=").expect("a String takes everything");
            for c in value.chars() {
                // PostgreSQL splits at what its isspace() takes for white space, and a backslash is harmless before
                // anything: so all but letters and digits get one.
                if !c.is_ascii_alphanumeric() {
                    options.push('\\');
                }
                options.push(c);
            }
        }
        let LoginTimeouts { statement, idle } = self.login_timeouts();
        for (name, timeout) in [(STATEMENT_TIMEOUT, statement), (IDLE_TIMEOUT, idle)] {
            if let Some(LoginTimeout::Usual(usual)) = timeout {
                write!(options, " -c {name}={}", usual.as_millis()).expect("a String takes everything");
            }
        }
        config.options(options);
        config
    }
}

/// The names under which an engine's `overridable` list may name what callers may ask for; run-time parameters are
/// named `server_settings.NAME`.
pub const OVERRIDABLE: [&str; 14] = [
    "application_name",
    "channel_binding",
    "client_connection_check_interval",
    "connect_timeout",
    "database",
    "idle_in_transaction_session_timeout",
    "keepalives",
    "load_balance_hosts",
    "search_path",
    "ssl_mode",
    "target_session_attrs",
    "tcp_user_timeout",
    "time_zone",
    "user",
];

/// Run-time parameters that are set by options of their own, and only by them.
pub const KEYED_SETTINGS: [&str; 8] = [
    "application_name",
    "client_connection_check_interval",
    "idle_in_transaction_session_timeout",
    "lock_timeout",
    "search_path",
    "statement_timeout",
    "TimeZone",
    "transaction_timeout",
];

/// Says what is wrong with options that a caller asks for.
///
/// # Errors
/// [`Error::Invalid`] naming the field of `connect_options`.
pub(super) fn check(
    overrides: &ConnectOverrides,
    engine: &ConnectOptions,
    overridable: &BTreeSet<String>,
) -> Result<(), Error> {
    const TEXT_BYTES_MAX: usize = 63;
    const SETTING_BYTES_MAX: usize = 1024;
    const ENTRIES_MAX: usize = 16;
    const TIMEOUT_MAX: Duration = Duration::from_hours(24);

    let invalid = |field: &str, problem: String| Err(Error::invalid(format!("connect_options.{field}"), problem));
    let o = overrides;
    for name in o.names() {
        if !overridable.contains(&name) {
            return invalid(&name, "is not for callers to choose on this engine: leave it out".into());
        }
    }
    let texts = [
        ("application_name", &o.application_name),
        ("database", &o.database),
        ("time_zone", &o.time_zone),
        ("user", &o.user),
    ];
    for (name, text) in texts {
        if text.as_ref().is_some_and(|text| text.is_empty() || text.len() > TEXT_BYTES_MAX || has_control(text)) {
            return invalid(name, format!("must be 1 to {TEXT_BYTES_MAX} bytes without control characters"));
        }
    }
    if o.search_path.len() > ENTRIES_MAX
        || o.search_path.iter().any(|schema| schema.is_empty() || schema.len() > TEXT_BYTES_MAX || has_control(schema))
    {
        let problem =
            format!("must be up to {ENTRIES_MAX} schemas of 1 to {TEXT_BYTES_MAX} bytes without control characters");
        return invalid("search_path", problem);
    }
    for (name, value) in &o.server_settings {
        if KEYED_SETTINGS.iter().any(|keyed| keyed.eq_ignore_ascii_case(name)) {
            return invalid(&format!("server_settings.{name}"), "has an option of its own: use that".into());
        }
        if value.len() > SETTING_BYTES_MAX || has_control(value) {
            let problem = format!("must be up to {SETTING_BYTES_MAX} bytes without control characters");
            return invalid(&format!("server_settings.{name}"), problem);
        }
    }
    let durations = [
        ("connect_timeout", o.connect_timeout),
        ("tcp_user_timeout", o.tcp_user_timeout),
        ("client_connection_check_interval", o.client_connection_check_interval),
        ("idle_in_transaction_session_timeout", o.idle_in_transaction_session_timeout),
    ];
    for (name, duration) in durations {
        if duration.is_some_and(|duration| duration < Duration::from_millis(1) || duration > TIMEOUT_MAX) {
            return invalid(name, "must lie between 1ms and 1day".into());
        }
    }
    if o.connect_timeout.is_some_and(|timeout| timeout > engine.connect_timeout) {
        let most = humantime::format_duration(engine.connect_timeout);
        return invalid("connect_timeout", format!("must not be longer than the engine's {most}"));
    }
    let keepalives = o.keepalives.flatten();
    for (name, duration) in [
        ("keepalives.idle", keepalives.map(|keepalives| keepalives.idle)),
        ("keepalives.interval", keepalives.map(|keepalives| keepalives.interval)),
    ] {
        if duration.is_some_and(|duration| !is_keepalive_time(duration)) {
            return invalid(name, "must be whole seconds from 1 to 32767".into());
        }
    }
    // The engine's password goes nowhere less safe than the engine says.
    if o.ssl_mode.is_some_and(|mode| mode < engine.tls.mode) {
        return invalid("ssl_mode", format!("must be as strict as the engine's, {}", engine.tls.mode.word()));
    }
    if o.channel_binding.is_some_and(|binding| binding < engine.channel_binding) {
        let least = engine.channel_binding.word();
        return invalid("channel_binding", format!("must be as strict as the engine's, {least}"));
    }
    if keepalives.is_some_and(|keepalives| !(1..=127).contains(&keepalives.retries)) {
        return invalid("keepalives.retries", "must lie between 1 and 127".into());
    }
    Ok(())
}

fn has_control(text: &str) -> bool {
    text.contains(char::is_control)
}

/// What Linux takes for a keepalive's time.
pub(crate) fn is_keepalive_time(duration: Duration) -> bool {
    duration.subsec_nanos() == 0 && (1..=32_767).contains(&duration.as_secs())
}

/// A `search_path` in which every schema is quoted.
pub(crate) fn quoted_path(schemas: &[String]) -> String {
    let quoted: Vec<_> = schemas.iter().map(|schema| format!("\"{}\"", schema.replace('"', "\"\""))).collect();
    quoted.join(", ")
}

/// A password, or where it is kept.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Password {
    /// The password itself.
    Given(Secret),
    /// A file that holds it, read again for every connection, so that it can be changed without a restart.
    File(PathBuf),
}

impl Password {
    /// The password as it is now; a line end behind it is not part of it.
    pub(super) fn read(&self) -> Result<Secret, String> {
        match self {
            Self::Given(secret) => Ok(secret.clone()),
            Self::File(path) => match std::fs::read_to_string(path) {
                Ok(text) => Ok(Secret::new(text.trim_end_matches(['\r', '\n']).to_owned())),
                Err(error) => Err(format!("cannot read the password file {}: {error}", path.display())),
            },
        }
    }
}

/// Encryption.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tls {
    /// Whether to encrypt, and what the server must prove.
    pub mode: SslMode,
    /// The authorities that may vouch for the server; `None`: those the operating system trusts.
    pub root_cert: Option<PathBuf>,
    /// Our certificate and its key, for servers that ask for one.
    pub identity: Option<(PathBuf, PathBuf)>,
    /// How TLS begins.
    pub negotiation: SslNegotiation,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn overridden() -> ConnectOverrides {
        let second = Duration::from_secs(1);
        ConnectOverrides {
            database: Some("d".into()),
            user: Some("u".into()),
            application_name: Some("a".into()),
            connect_timeout: Some(2 * second),
            ssl_mode: Some(SslMode::VerifyCa),
            target_session_attrs: Some(TargetSessionAttrs::Standby),
            load_balance_hosts: Some(LoadBalanceHosts::Random),
            channel_binding: Some(ChannelBinding::Require),
            keepalives: Some(None),
            tcp_user_timeout: Some(3 * second),
            client_connection_check_interval: Some(4 * second),
            idle_in_transaction_session_timeout: Some(5 * second),
            search_path: vec!["s".into()],
            time_zone: Some("UTC".into()),
            server_settings: BTreeMap::from([("work_mem".into(), "1MB".into())]),
        }
    }

    fn engines() -> ConnectOptions {
        ConnectOptions {
            hosts: vec![Host::Unix("/run".into())],
            user: "engine".into(),
            password: None,
            database: "engine".into(),
            application_name: "engine".into(),
            connect_timeout: Duration::from_mins(1),
            keepalives: Some(Keepalives::default()),
            tcp_user_timeout: None,
            target_session_attrs: TargetSessionAttrs::Any,
            load_balance_hosts: LoadBalanceHosts::Disable,
            channel_binding: ChannelBinding::Prefer,
            tls: Tls { mode: SslMode::Disable, root_cert: None, identity: None, negotiation: SslNegotiation::Postgres },
            settings: BTreeMap::from([("work_mem".into(), "9MB".into()), ("jit".into(), "off".into())]),
            nets: None,
        }
    }

    #[test]
    fn a_caller_may_only_tighten_what_protects_the_engines_password() {
        let all = OVERRIDABLE.iter().map(|name| (*name).to_owned()).collect();
        let mut strict = engines();
        strict.tls.mode = SslMode::VerifyFull;
        strict.channel_binding = ChannelBinding::Require;
        for (loose, field) in [
            (ConnectOverrides { ssl_mode: Some(SslMode::VerifyCa), ..Default::default() }, "ssl_mode"),
            (
                ConnectOverrides { channel_binding: Some(ChannelBinding::Prefer), ..Default::default() },
                "channel_binding",
            ),
            (
                ConnectOverrides { connect_timeout: Some(Duration::from_mins(2)), ..Default::default() },
                "connect_timeout",
            ),
        ] {
            assert!(matches!(
                check(&loose, &strict, &all),
                Err(Error::Invalid { field: named, .. }) if named == format!("connect_options.{field}")
            ));
        }
    }

    #[test]
    fn every_option_a_caller_asks_for_goes_over_the_engines() {
        let engines = engines();
        assert_eq!(engines.with(&ConnectOverrides::default()), engines);
        let settings = [
            ("TimeZone", "UTC"),
            ("client_connection_check_interval", "4000"),
            ("idle_in_transaction_session_timeout", "5000"),
            ("jit", "off"),
            ("search_path", "\"s\""),
            ("work_mem", "1MB"),
        ];
        let expected = ConnectOptions {
            user: "u".into(),
            database: "d".into(),
            application_name: "a".into(),
            connect_timeout: Duration::from_secs(2),
            keepalives: None,
            tcp_user_timeout: Some(Duration::from_secs(3)),
            target_session_attrs: TargetSessionAttrs::Standby,
            load_balance_hosts: LoadBalanceHosts::Random,
            channel_binding: ChannelBinding::Require,
            tls: Tls { mode: SslMode::VerifyCa, ..engines.tls.clone() },
            settings: settings.map(|(name, value)| (name.to_owned(), value.to_owned())).into(),
            ..engines.clone()
        };
        assert_eq!(engines.with(&overridden()), expected);
    }

    #[test]
    fn every_option_is_refused_unless_it_is_listed() {
        let all: BTreeSet<String> =
            OVERRIDABLE.iter().map(|name| (*name).to_owned()).chain(["server_settings.work_mem".into()]).collect();
        assert_eq!(check(&overridden(), &engines(), &all), Ok(()));
        for missing in &all {
            let mut listed = all.clone();
            listed.remove(missing);
            let refused = check(&overridden(), &engines(), &listed).unwrap_err();
            assert!(
                matches!(&refused, Error::Invalid { field, .. } if *field == format!("connect_options.{missing}")),
                "{missing}: {refused}"
            );
        }
    }
}
