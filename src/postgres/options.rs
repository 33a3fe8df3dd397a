//! How to reach a PostgreSQL server: typed, checked, with the password kept from every log.
//!
//! Invariant: what is accepted is honoured; an option that would be ignored is refused by name.

use std::fmt::Write;
use std::time::Duration;

use tokio_postgres::config::{Host as DriverHost, SslMode};

pub use super::net::Host;
use crate::secret::Secret;

/// Where and as whom to connect.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConnectOptions {
    /// Tried in order.
    pub hosts: Vec<Host>,
    /// The role to log in as.
    pub user: String,
    /// Its password, if it needs one.
    pub password: Option<Secret>,
    /// The database.
    pub database: String,
    /// What `pg_stat_activity` shows.
    pub application_name: String,
    /// `-c name=value` settings from the URL's `options`.
    pub server_options: Option<String>,
    /// One budget over resolving, connecting and logging in.
    pub connect_timeout: Duration,
}

impl ConnectOptions {
    /// What connections are called unless the URL says otherwise.
    pub const APPLICATION_NAME: &str = "session-broker";

    /// Long enough for a server across an ocean, short enough for a caller to wait for.
    pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

    /// What a URL may say behind its `?`.
    const URL_PARAMETERS: [&str; 9] =
        ["application_name", "connect_timeout", "dbname", "host", "options", "password", "port", "sslmode", "user"];

    /// Reads a `postgresql://` URL.
    ///
    /// # Errors
    /// What is wrong with it; never repeats the URL, which may hold a password.
    pub fn from_url(url: &str) -> Result<Self, String> {
        if !["postgresql://", "postgres://"].iter().any(|scheme| url.starts_with(scheme)) {
            return Err("must start with postgresql://".into());
        }
        let parameters = url.split_once('?').map_or("", |(_, parameters)| parameters);
        for parameter in parameters.split('&').filter(|parameter| !parameter.is_empty()) {
            let name = parameter.split('=').next().unwrap_or_default();
            if !Self::URL_PARAMETERS.contains(&name) {
                let known = Self::URL_PARAMETERS.join(", ");
                // What does not look like a name may be the tail of a password with a "?" in it.
                let like_a_name = name.bytes().all(|byte| byte.is_ascii_lowercase() || byte == b'_');
                return Err(if like_a_name {
                    format!("has the unknown parameter {name}: known are {known}")
                } else {
                    format!(
                        "has a ? that no parameter follows: write %3F in a user or password; parameters are {known}"
                    )
                });
            }
        }
        let read: tokio_postgres::Config = url.parse().map_err(|error: tokio_postgres::Error| {
            // The driver's own message names the option, and its cause the value's fault, neither the value itself.
            std::error::Error::source(&error).map_or_else(|| error.to_string(), ToString::to_string)
        })?;
        let hosts = hosts(&read)?;
        // The driver takes zero and less for no limit at all.
        if parameters.contains("connect_timeout=") && read.get_connect_timeout().is_none() {
            return Err("has a connect_timeout that is not positive".into());
        }
        check_plaintext(read.get_ssl_mode(), &hosts)?;
        let user = read.get_user().ok_or("names no user: postgresql://USER@HOST/DATABASE")?.to_owned();
        Ok(Self {
            hosts,
            database: read.get_dbname().unwrap_or(&user).to_owned(),
            user,
            password: read
                .get_password()
                .map(|password| String::from_utf8(password.to_vec()).map(Secret::new))
                .transpose()
                .map_err(|_| "has a password that is not UTF-8")?,
            application_name: read.get_application_name().unwrap_or(Self::APPLICATION_NAME).to_owned(),
            server_options: read.get_options().map(str::to_owned),
            connect_timeout: read.get_connect_timeout().copied().unwrap_or(Self::CONNECT_TIMEOUT),
        })
    }

    /// The URL these options would be read from, without the password.
    pub fn redacted_url(&self) -> String {
        let Self { hosts, user, password: _, database, application_name, server_options, connect_timeout } = self;
        let hosts: Vec<_> = hosts
            .iter()
            .map(|host| match host {
                Host::Tcp(name, port) if name.contains(':') => format!("[{name}]:{port}"),
                Host::Tcp(name, port) => format!("{}:{port}", escaped(name)),
                Host::Unix(path) => {
                    let directory = path.parent().map(|directory| directory.to_string_lossy()).unwrap_or_default();
                    let port = path.extension().map(|port| port.to_string_lossy()).unwrap_or_default();
                    format!("{}:{port}", escaped(&directory))
                }
            })
            .collect();
        let mut url = format!(
            "postgresql://{}@{}/{}?application_name={}&connect_timeout={}&sslmode=disable",
            escaped(user),
            hosts.join(","),
            escaped(database),
            escaped(application_name),
            connect_timeout.as_secs()
        );
        if let Some(options) = server_options {
            url.push_str("&options=");
            url.push_str(&escaped(options));
        }
        url
    }

    /// The driver's form. Hosts and the time budget stay with us: we connect the stream ourselves.
    pub(super) fn driver_config(&self) -> tokio_postgres::Config {
        /// Without it a dropped connection's statement runs on to its end. PostgreSQL 14 and later.
        const CHECK_CALLER: &str = "-c client_connection_check_interval=500ms";

        let Self { hosts: _, user, password, database, application_name, server_options, connect_timeout: _ } = self;
        let mut config = tokio_postgres::Config::new();
        config.user(user).dbname(database).application_name(application_name).ssl_mode(SslMode::Disable);
        if let Some(password) = password {
            config.password(password.expose());
        }
        match server_options {
            // Later settings win: the operator's come last.
            Some(own) => config.options(format!("{CHECK_CALLER} {own}")),
            None => config.options(CHECK_CALLER),
        };
        config
    }
}

/// `text` as a URL's part: everything but what RFC 3986 calls unreserved is percent-encoded.
fn escaped(text: &str) -> String {
    text.bytes().fold(String::new(), |mut url, byte| {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) {
            url.push(byte.into());
        } else {
            write!(url, "%{byte:02X}").expect("a String takes everything");
        }
        url
    })
}

fn hosts(read: &tokio_postgres::Config) -> Result<Vec<Host>, String> {
    const DEFAULT_PORT: u16 = 5432;
    let ports = read.get_ports();
    let hosts = read.get_hosts();
    if hosts.is_empty() {
        return Err("names no host: postgresql://USER@HOST/DATABASE".into());
    }
    if ports.len() > 1 && ports.len() != hosts.len() {
        return Err(format!(
            "names {} hosts but {} ports: give one port, or one for each host",
            hosts.len(),
            ports.len()
        ));
    }
    if hosts.iter().any(|host| matches!(host, DriverHost::Tcp(name) if name.contains('@'))) {
        // What stands before it is a user and perhaps the head of a password: not to be repeated.
        return Err("has an @ in its host: write %40 in a user or password".into());
    }
    let port = |index: usize| ports.get(index).or(ports.first()).copied().unwrap_or(DEFAULT_PORT);
    Ok(hosts
        .iter()
        .enumerate()
        .map(|(index, host)| match host {
            DriverHost::Tcp(name) => Host::Tcp(name.clone(), port(index)),
            DriverHost::Unix(directory) => Host::Unix(directory.join(format!(".s.PGSQL.{}", port(index)))),
        })
        .collect())
}

/// Without TLS, only this machine is reached without being asked for in so many words.
fn check_plaintext(mode: SslMode, hosts: &[Host]) -> Result<(), String> {
    match (mode, hosts.iter().find(|host| !host.is_local())) {
        (SslMode::Disable, _) | (SslMode::Prefer, None) => Ok(()),
        (SslMode::Prefer, Some(host)) => Err(format!(
            "names {host}, which is another machine, and this version cannot encrypt: \
             say sslmode=disable to connect in plain text"
        )),
        _ => Err("asks for TLS, which this version does not have: say sslmode=disable to connect in plain text".into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_url_is_read_whole() {
        let read = ConnectOptions::from_url(
            "postgresql://u:p%40ss@127.0.0.1:6543/db?application_name=billing&connect_timeout=7&options=-c%20a.b%3Dc",
        )
        .unwrap();
        let expected = ConnectOptions {
            hosts: vec![Host::Tcp("127.0.0.1".into(), 6543)],
            user: "u".into(),
            password: Some(Secret::new("p@ss".into())),
            database: "db".into(),
            application_name: "billing".into(),
            server_options: Some("-c a.b=c".into()),
            connect_timeout: Duration::from_secs(7),
        };
        assert_eq!(read, expected);
    }

    #[test]
    fn hosts_come_with_their_ports() {
        let read = ConnectOptions::from_url("postgresql://u@[::1]:1,127.0.0.1:2/db").unwrap();
        assert_eq!(read.hosts, [Host::Tcp("::1".into(), 1), Host::Tcp("127.0.0.1".into(), 2)]);
        let socket = ConnectOptions::from_url("postgresql://u@%2Frun%2Fpg:5/db").unwrap();
        assert_eq!(socket.hosts, [Host::Unix("/run/pg/.s.PGSQL.5".into())]);
    }

    #[test]
    fn what_would_be_ignored_is_refused_by_name_and_without_the_password() {
        for (url, named) in [
            ("host=localhost user=u", "postgresql://"),
            ("postgresql://u:hush@localhost/db?target_session_attrs=read-write", "target_session_attrs"),
            ("postgresql://u:hush@localhost/db?sslmode=verify-full", "sslmode"),
            ("postgresql://u:hush@localhost/db?sslmode=require", "sslmode=disable"),
            ("postgresql://u:hush@db.example/db", "db.example:5432"),
            ("postgresql://localhost/db", "user"),
            ("postgresql://u:hush@/db", "host"),
            ("postgresql://u:hush@localhost:x/db", "port"),
            ("postgresql://u:hush@localhost/db?connect_timeout=soon", "connect_timeout"),
            ("postgresql://u:hush@localhost/db?connect_timeout=0", "connect_timeout"),
            ("postgresql://u:se?hush@localhost/db", "%3F"),
            ("postgresql://u:se@hush@localhost/db", "%40"),
        ] {
            let problem = ConnectOptions::from_url(url).unwrap_err();
            assert!(problem.contains(named), "{url}: {problem}");
            assert!(!problem.contains("hush"), "{url}: {problem}");
        }
    }

    #[test]
    fn another_machine_is_reached_in_plain_text_only_when_asked() {
        assert!(ConnectOptions::from_url("postgresql://u@db.example/db?sslmode=disable").is_ok());
    }
}
