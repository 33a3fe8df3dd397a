//! One engine's section: a `postgresql://` URL, or its parts, or both; and its pool.
//!
//! A URL is only another way to write the parts: it is taken apart into the same keys, which are then read once.
//! Invariant: a key given twice is a problem, and so is one that would be ignored.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

use humantime::format_duration;

use super::section::{Section, is_setting_name};
use super::url;
use crate::postgres::engine::{PoolOptions, ResetMode, TableName};
use crate::postgres::options::{
    ChannelBinding, ConnectOptions, Host, KEYED_SETTINGS, Keepalives, LoadBalanceHosts, OVERRIDABLE, Password, SslMode,
    SslNegotiation, TargetSessionAttrs, Tls, is_keepalive_time, quoted_path,
};
use crate::secret::Secret;

/// One PostgreSQL target.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EngineConfig {
    /// How to connect.
    pub connect: ConnectOptions,
    /// How many connections, and how long they live.
    pub pool: PoolOptions,
    /// What callers may ask to be otherwise.
    pub overridable: BTreeSet<String>,
    /// Where idempotency keys are kept.
    pub idempotency_table: Option<TableName>,
}

/// Run-time parameters that are durations.
const TIMEOUTS: [&str; 4] =
    ["statement_timeout", "lock_timeout", "idle_in_transaction_session_timeout", "transaction_timeout"];

const DEFAULT_PORT: u16 = 5432;
const SECOND: Duration = Duration::from_secs(1);
const MILLISECOND: Duration = Duration::from_millis(1);
const DAY: Duration = Duration::from_hours(24);

impl EngineConfig {
    pub(super) fn read(mut section: Section<'_>) -> Option<Self> {
        if let Some(text) = section.text("url") {
            match url::parts(&text) {
                Ok(parts) => {
                    for (key, value) in parts {
                        section.add(key, value);
                    }
                }
                Err(problem) => section.problem("url", &problem),
            }
        }
        let pool = pool(&mut section);
        let overridable = overridable(&mut section);
        let idempotency_table = idempotency_table(&mut section);
        let connect = connect(&mut section);
        section.finish();
        Some(Self { connect: connect?, pool, overridable, idempotency_table })
    }
}

fn pool(section: &mut Section<'_>) -> PoolOptions {
    let default = PoolOptions::default();
    let timeout_max = Duration::from_mins(10);
    PoolOptions {
        size: section.number("pool_size", default.size, 1..=10_000),
        overflow_max: section.number("max_overflow", default.overflow_max, 0..=10_000),
        timeout: section.duration("pool_timeout", default.timeout, MILLISECOND..=timeout_max),
        waiters_max: section.number("pool_waiters_max", default.waiters_max, 1..=1_000_000),
        principal_share_percent: section.number("principal_share_percent", default.principal_share_percent, 1..=100),
        recycle: section.duration("pool_recycle", default.recycle, SECOND..=DAY),
        idle_timeout: section.duration("pool_idle_timeout", default.idle_timeout, MILLISECOND..=DAY),
        idle_min: section.number("pool_idle_min", default.idle_min, 0..=10_000),
        pre_ping_after: section.duration("pool_pre_ping_after", default.pre_ping_after, Duration::ZERO..=DAY),
        sub_pools_max: section.number("sub_pools_max", default.sub_pools_max, 1..=1000),
        statement_cache_size: section.number("statement_cache_size", default.statement_cache_size, 0..=100_000),
        sql_comment: section.flag("sql_comment", default.sql_comment),
        reset: section.word("pool_reset", ResetMode::WORDS, default.reset),
    }
}

fn idempotency_table(section: &mut Section<'_>) -> Option<TableName> {
    let text = section.text("idempotency_table")?;
    let name = TableName::parse(&text);
    if name.is_none() {
        section.problem("idempotency_table", "must be TABLE or SCHEMA.TABLE, without quotes");
    }
    name
}

/// What callers may ask for.
fn overridable(section: &mut Section<'_>) -> BTreeSet<String> {
    let names = section.list("overridable");
    for name in &names {
        let setting = name.strip_prefix("server_settings.").is_some_and(is_setting_name);
        if !setting && !OVERRIDABLE.contains(&name.as_str()) {
            let known = OVERRIDABLE.join(", ");
            section.problem("overridable", &format!("names {name:?}: known are {known} and server_settings.NAME"));
        }
    }
    names.into_iter().collect()
}

fn connect(section: &mut Section<'_>) -> Option<ConnectOptions> {
    let hosts = hosts(section);
    let user = section.text("user");
    if user.is_none() {
        section.problem("user", "is missing: give it here or in the url, postgresql://USER@HOST/DATABASE");
    }
    let database = section.text("database").or_else(|| user.clone());
    let application_name =
        section.text("application_name").unwrap_or_else(|| ConnectOptions::APPLICATION_NAME.to_owned());
    let connect_timeout = section.duration(
        "connect_timeout",
        ConnectOptions::CONNECT_TIMEOUT,
        Duration::from_millis(10)..=10 * 60 * SECOND,
    );
    let tcp_user_timeout = section.duration("tcp_user_timeout", ConnectOptions::TCP_USER_TIMEOUT, Duration::ZERO..=DAY);
    let local = hosts.iter().all(Host::is_local);
    let sockets = !hosts.is_empty() && hosts.iter().all(|host| matches!(host, Host::Unix(_)));
    Some(ConnectOptions {
        password: password(section),
        keepalives: keepalives(section),
        // Zero is the kernel's own, as in libpq.
        tcp_user_timeout: (!tcp_user_timeout.is_zero()).then_some(tcp_user_timeout),
        target_session_attrs: section.word("target_session_attrs", TargetSessionAttrs::WORDS, TargetSessionAttrs::Any),
        load_balance_hosts: section.word("load_balance_hosts", LoadBalanceHosts::WORDS, LoadBalanceHosts::Disable),
        channel_binding: section.word("channel_binding", ChannelBinding::WORDS, ChannelBinding::Prefer),
        tls: tls(section, local, sockets),
        settings: settings(section),
        hosts: (!hosts.is_empty()).then_some(hosts)?,
        user: user?,
        database: database?,
        application_name,
        connect_timeout,
        nets: None,
    })
}

/// `host`, `hostaddr` and `port`, each a list as in libpq, paired up.
fn hosts(section: &mut Section<'_>) -> Vec<Host> {
    let names = section.list("host");
    let addresses = section.list("hostaddr");
    let ports = section.list("port");
    let count = names.len().max(addresses.len());
    if count == 0 {
        section.problem("host", "is missing: give it here or in the url, postgresql://USER@HOST/DATABASE");
    }
    for (key, list) in [("host", &names), ("hostaddr", &addresses), ("port", &ports)] {
        if !list.is_empty() && list.len() != count && !(key == "port" && list.len() == 1) {
            section.problem(key, &format!("has {} entries for {count} hosts", list.len()));
            return Vec::new();
        }
    }
    (0..count).filter_map(|index| host(section, index, &names, &addresses, &ports)).collect()
}

fn host(
    section: &mut Section<'_>,
    index: usize,
    names: &[String],
    addresses: &[String],
    ports: &[String],
) -> Option<Host> {
    let port = match ports.get(index).or(ports.first()).map(|port| port.parse()) {
        None => DEFAULT_PORT,
        Some(Ok(port)) if port > 0 => port,
        Some(_) => {
            section.problem("port", "must be a number from 1 to 65535");
            return None;
        }
    };
    let address: Option<IpAddr> = match addresses.get(index).map(|address| address.parse()).transpose() {
        Ok(address) => address,
        Err(_) => {
            section.problem("hostaddr", "must be an IP address");
            return None;
        }
    };
    match names.get(index) {
        Some(name) if name.starts_with('/') => Some(Host::Unix(PathBuf::from(name).join(format!(".s.PGSQL.{port}")))),
        Some(name) if name.is_empty() || name.contains(['@', ':', '/', ' ']) && name.parse::<IpAddr>().is_err() => {
            // What looks like no host may be the tail of a password: not to be repeated.
            section
                .problem("host", "is no host name: in a url, write %40 for an @ and %3A for a : in user and password");
            None
        }
        Some(name) => Some(Host::Tcp { name: name.clone(), address, port }),
        None => address.map(|address| Host::Tcp { name: address.to_string(), address: Some(address), port }),
    }
}

fn password(section: &mut Section<'_>) -> Option<Password> {
    match (section.text("password"), section.text("password_file")) {
        (Some(_), Some(_)) => {
            section.problem("password_file", "stands beside password: give one of them");
            None
        }
        (Some(password), None) => Some(Password::Given(Secret::new(password))),
        (None, Some(path)) => Some(Password::File(path.into())),
        (None, None) => None,
    }
}

fn keepalives(section: &mut Section<'_>) -> Option<Keepalives> {
    let default = Keepalives::default();
    let on = section.flag("keepalives", true);
    let keepalives = Keepalives {
        idle: section.duration("keepalives_idle", default.idle, SECOND..=DAY),
        interval: section.duration("keepalives_interval", default.interval, SECOND..=DAY),
        retries: section.number("keepalives_retries", default.retries, 1..=127),
    };
    for (key, time) in [("keepalives_idle", keepalives.idle), ("keepalives_interval", keepalives.interval)] {
        if !is_keepalive_time(time) {
            section.problem(key, "must be whole seconds from 1 to 32767");
        }
    }
    if !on && keepalives != default {
        section.problem("keepalives", "is false, so keepalives_idle, _interval and _retries have no effect");
    }
    on.then_some(keepalives)
}

fn tls(section: &mut Section<'_>, local: bool, sockets: bool) -> Tls {
    // What leaves this machine proves where it goes, unless the operator says otherwise.
    let default = if local { SslMode::Disable } else { SslMode::VerifyFull };
    let mode = section.word("ssl_mode", SslMode::WORDS, default);
    let root_cert = section.text("ssl_root_cert").filter(|path| path != "system").map(PathBuf::from);
    let identity = match (section.text("ssl_cert"), section.text("ssl_key")) {
        (Some(cert), Some(key)) => Some((cert.into(), key.into())),
        (None, None) => None,
        (Some(_), None) => {
            section.problem("ssl_key", "is missing beside ssl_cert");
            None
        }
        (None, Some(_)) => {
            section.problem("ssl_cert", "is missing beside ssl_key");
            None
        }
    };
    let negotiation = section.word("ssl_negotiation", SslNegotiation::WORDS, SslNegotiation::Postgres);
    if sockets && mode != SslMode::Disable {
        section.problem("ssl_mode", "has no effect: Unix sockets are not encrypted");
    }
    let tls = Tls { mode, root_cert, identity, negotiation };
    for (key, useless) in [
        ("ssl_root_cert", tls.root_cert.is_some() && matches!(mode, SslMode::Disable | SslMode::Require)),
        ("ssl_cert", tls.identity.is_some() && mode == SslMode::Disable),
        ("ssl_negotiation", negotiation == SslNegotiation::Direct && mode == SslMode::Disable),
    ] {
        if useless {
            section.problem(key, &format!("has no effect with ssl_mode {}", mode.word()));
        }
    }
    tls
}

/// The run-time parameters: those with keys of their own, and `server_settings` for the rest.
fn settings(section: &mut Section<'_>) -> BTreeMap<String, String> {
    let mut settings = BTreeMap::new();
    let check = section.duration(
        "client_connection_check_interval",
        ConnectOptions::CLIENT_CONNECTION_CHECK_INTERVAL,
        Duration::ZERO..=DAY,
    );
    settings.insert("client_connection_check_interval".to_owned(), check.as_millis().to_string());
    for name in TIMEOUTS {
        if let Some(timeout) = section.optional_duration(name, MILLISECOND..=DAY) {
            settings.insert(name.to_owned(), timeout.as_millis().to_string());
        }
    }
    let search_path = section.list("search_path");
    if !search_path.is_empty() {
        settings.insert("search_path".into(), quoted_path(&search_path));
    }
    if let Some(zone) = section.text("time_zone") {
        settings.insert("TimeZone".into(), zone);
    }
    let mut others = section.section("server_settings");
    for name in others.keys() {
        let Some(value) = others.text(&name) else { continue };
        if !is_setting_name(&name) {
            others.problem(&name, "is no name of a run-time parameter");
        } else if name.eq_ignore_ascii_case("client_encoding") {
            others.problem(&name, "cannot be set: the broker speaks UTF8");
        } else if KEYED_SETTINGS.iter().any(|keyed| keyed.eq_ignore_ascii_case(&name)) {
            others.problem(&name, "has a key of its own in the engine's section: use that");
        } else if value.contains(char::is_control) {
            others.problem(&name, "holds a control character");
        } else {
            settings.insert(name, value);
        }
    }
    others.finish();
    settings
}

/// The engine's keys as TOML, passwords left out.
impl fmt::Display for EngineConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { connect, pool, overridable, idempotency_table } = self;
        let ConnectOptions {
            hosts,
            user,
            password,
            database,
            application_name,
            connect_timeout,
            keepalives,
            tcp_user_timeout,
            target_session_attrs,
            load_balance_hosts,
            channel_binding,
            tls,
            settings,
            nets: _,
        } = connect;
        write_hosts(f, hosts)?;
        writeln!(f, "user = {user:?}\ndatabase = {database:?}\napplication_name = {application_name:?}")?;
        match password {
            None => {}
            Some(Password::Given(_)) => writeln!(f, "password = \"<redacted>\"")?,
            Some(Password::File(path)) => writeln!(f, "password_file = {:?}", path.display().to_string())?,
        }
        writeln!(f, "connect_timeout = \"{}\"", format_duration(*connect_timeout))?;
        match keepalives {
            None => writeln!(f, "keepalives = false")?,
            Some(Keepalives { idle, interval, retries }) => {
                writeln!(f, "keepalives_idle = \"{}\"", format_duration(*idle))?;
                writeln!(f, "keepalives_interval = \"{}\"", format_duration(*interval))?;
                writeln!(f, "keepalives_retries = {retries}")?;
            }
        }
        writeln!(f, "tcp_user_timeout = \"{}\"", format_duration(tcp_user_timeout.unwrap_or_default()))?;
        writeln!(f, "target_session_attrs = \"{}\"", target_session_attrs.word())?;
        writeln!(f, "load_balance_hosts = \"{}\"", load_balance_hosts.word())?;
        writeln!(f, "channel_binding = \"{}\"", channel_binding.word())?;
        let Tls { mode, root_cert, identity, negotiation } = tls;
        writeln!(f, "ssl_mode = \"{}\"", mode.word())?;
        if let Some(path) = root_cert {
            writeln!(f, "ssl_root_cert = {:?}", path.display().to_string())?;
        }
        if let Some((cert, key)) = identity {
            writeln!(f, "ssl_cert = {:?}\nssl_key = {:?}", cert.display().to_string(), key.display().to_string())?;
        }
        writeln!(f, "ssl_negotiation = \"{}\"", negotiation.word())?;
        write_pool(f, pool)?;
        if !overridable.is_empty() {
            writeln!(f, "overridable = {:?}", overridable.iter().collect::<Vec<_>>())?;
        }
        if let Some(table) = idempotency_table {
            writeln!(f, "idempotency_table = {:?}", table.to_string())?;
        }
        write_settings(f, settings)
    }
}

fn write_pool(f: &mut fmt::Formatter<'_>, pool: &PoolOptions) -> fmt::Result {
    let PoolOptions {
        size,
        overflow_max,
        timeout,
        waiters_max,
        principal_share_percent,
        recycle,
        idle_timeout,
        idle_min,
        pre_ping_after,
        sub_pools_max,
        statement_cache_size,
        sql_comment,
        reset,
    } = pool;
    writeln!(f, "pool_size = {size}\nmax_overflow = {overflow_max}")?;
    writeln!(f, "pool_timeout = \"{}\"\npool_waiters_max = {waiters_max}", format_duration(*timeout))?;
    writeln!(f, "principal_share_percent = {principal_share_percent}")?;
    writeln!(f, "pool_recycle = \"{}\"", format_duration(*recycle))?;
    writeln!(f, "pool_idle_timeout = \"{}\"\npool_idle_min = {idle_min}", format_duration(*idle_timeout))?;
    writeln!(f, "pool_pre_ping_after = \"{}\"", format_duration(*pre_ping_after))?;
    writeln!(f, "sub_pools_max = {sub_pools_max}\nstatement_cache_size = {statement_cache_size}")?;
    writeln!(f, "sql_comment = {sql_comment}")?;
    writeln!(f, "pool_reset = \"{}\"", reset.word())
}

fn write_hosts(f: &mut fmt::Formatter<'_>, hosts: &[Host]) -> fmt::Result {
    let mut names = Vec::new();
    let mut addresses = Vec::new();
    let mut ports = Vec::new();
    for host in hosts {
        match host {
            Host::Tcp { name, address, port } => {
                names.push(name.clone());
                addresses.extend(address.map(|address| address.to_string()));
                ports.push(port.to_string());
            }
            Host::Unix(path) => {
                names.push(path.parent().map(|directory| directory.display().to_string()).unwrap_or_default());
                let name = path.to_string_lossy();
                ports.push(name.rsplit('.').next().unwrap_or_default().to_owned());
            }
        }
    }
    writeln!(f, "host = {names:?}")?;
    if !addresses.is_empty() {
        writeln!(f, "hostaddr = {addresses:?}")?;
    }
    writeln!(f, "port = {ports:?}")
}

/// As the keys they are read from; the rest under `server_settings`, which comes last because it is a section.
fn write_settings(f: &mut fmt::Formatter<'_>, settings: &BTreeMap<String, String>) -> fmt::Result {
    let mut others = Vec::new();
    for (name, value) in settings {
        let has_key = name == "client_connection_check_interval" || TIMEOUTS.contains(&name.as_str());
        match name.as_str() {
            _ if has_key => writeln!(f, "{name} = \"{value}ms\"")?,
            "search_path" => {
                let schemas: Vec<_> =
                    value.split(", ").map(|schema| schema[1..schema.len() - 1].replace("\"\"", "\"")).collect();
                writeln!(f, "search_path = {schemas:?}")?;
            }
            "TimeZone" => writeln!(f, "time_zone = {value:?}")?,
            _ => others.push(format!("{name:?} = {value:?}")),
        }
    }
    if others.is_empty() { Ok(()) } else { writeln!(f, "server_settings = {{ {} }}", others.join(", ")) }
}
