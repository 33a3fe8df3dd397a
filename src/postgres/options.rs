//! How to reach a PostgreSQL server: every connection parameter of libpq that the driver can honour, each with its type.
//!
//! Knows what the options mean, not how they are written in a file: `config/` reads them. Invariant: what is accepted is
//! honoured; nothing here shows the password.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::PathBuf;
use std::time::Duration;

use tokio_postgres::config as driver;

use super::connection::Nets;
pub use super::net::Host;
pub use crate::broker::connect::{
    ChannelBinding, Keepalives, LoadBalanceHosts, SslMode, SslNegotiation, TargetSessionAttrs,
};
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

    /// The timeouts among the run-time parameters that transactions set too.
    pub(super) fn nets(&self) -> Nets {
        let timeout = |name| self.settings.get(name)?.parse().ok().map(Duration::from_millis);
        Nets { statement: timeout("statement_timeout"), idle: timeout("idle_in_transaction_session_timeout") }
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
        let mut options = String::new();
        for (name, value) in &self.settings {
            write!(options, " -c {name}=").expect("a String takes everything");
            for c in value.chars() {
                // PostgreSQL splits at white space, and takes a backslash for an escape.
                if c.is_ascii_whitespace() || c == '\\' {
                    options.push('\\');
                }
                options.push(c);
            }
        }
        config.options(options);
        config
    }
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
