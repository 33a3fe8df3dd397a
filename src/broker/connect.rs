//! Connection options that callers may ask for, each with its own type: what libpq and SQLAlchemy call `connect_args`.
//!
//! Names libpq's words, no driver's. Invariant: hosts, passwords and files are not among them.

use std::collections::BTreeMap;
use std::time::Duration;

/// What a session asks its connections to be, over its engine's own options. Absent: the engine's.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
#[allow(missing_docs, reason = "the names are libpq's and PostgreSQL's")]
pub struct ConnectOverrides {
    pub database: Option<String>,
    pub user: Option<String>,
    pub application_name: Option<String>,
    pub connect_timeout: Option<Duration>,
    pub ssl_mode: Option<SslMode>,
    pub target_session_attrs: Option<TargetSessionAttrs>,
    pub load_balance_hosts: Option<LoadBalanceHosts>,
    pub channel_binding: Option<ChannelBinding>,
    /// `Some(None)` turns them off.
    pub keepalives: Option<Option<Keepalives>>,
    pub tcp_user_timeout: Option<Duration>,
    pub client_connection_check_interval: Option<Duration>,
    pub idle_in_transaction_session_timeout: Option<Duration>,
    /// Empty: the engine's.
    pub search_path: Vec<String>,
    pub time_zone: Option<String>,
    /// Further run-time parameters, each overridable under its own name.
    pub server_settings: BTreeMap<String, String>,
}

impl ConnectOverrides {
    /// Whether nothing is asked for.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// The names of the options that are asked for, by which they are allowed.
    pub fn names(&self) -> impl Iterator<Item = String> {
        let Self {
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
        } = self;
        let asked = [
            ("application_name", application_name.is_some()),
            ("channel_binding", channel_binding.is_some()),
            ("client_connection_check_interval", client_connection_check_interval.is_some()),
            ("connect_timeout", connect_timeout.is_some()),
            ("database", database.is_some()),
            ("idle_in_transaction_session_timeout", idle_in_transaction_session_timeout.is_some()),
            ("keepalives", keepalives.is_some()),
            ("load_balance_hosts", load_balance_hosts.is_some()),
            ("search_path", !search_path.is_empty()),
            ("ssl_mode", ssl_mode.is_some()),
            ("target_session_attrs", target_session_attrs.is_some()),
            ("tcp_user_timeout", tcp_user_timeout.is_some()),
            ("time_zone", time_zone.is_some()),
            ("user", user.is_some()),
        ];
        let settings = server_settings.keys().map(|name| format!("server_settings.{name}"));
        asked.into_iter().filter(|(_, asked)| *asked).map(|(name, _)| name.to_owned()).chain(settings)
    }
}

/// TCP keepalive.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Keepalives {
    /// Silence before the first probe.
    pub idle: Duration,
    /// Time between probes.
    pub interval: Duration,
    /// Probes without an answer before the connection counts as gone.
    pub retries: u32,
}

impl Default for Keepalives {
    fn default() -> Self {
        // A peer that has vanished is noticed after 25 seconds.
        Self { idle: Duration::from_secs(10), interval: Duration::from_secs(5), retries: 3 }
    }
}

/// An option that is one of a few words.
macro_rules! words {
    ($(#[$doc:meta])* $name:ident { $($(#[$variant_doc:meta])* $variant:ident = $word:literal,)* }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub enum $name { $($(#[$variant_doc])* $variant,)* }

        impl $name {
            /// Every value with its word.
            pub const WORDS: &[(&str, Self)] = &[$(($word, Self::$variant),)*];

            /// The value's word, as libpq spells it.
            pub fn word(self) -> &'static str {
                match self { $(Self::$variant => $word,)* }
            }
        }
    };
}

words! {
    /// `sslmode`, without libpq's modes that fall back to plain text.
    SslMode {
        /// Plain text.
        Disable = "disable",
        /// Encrypt, for whoever is at the other end.
        Require = "require",
        /// Encrypt for a server whose certificate an authority vouches for.
        VerifyCa = "verify-ca",
        /// Encrypt for a server whose certificate an authority vouches for and names the host.
        VerifyFull = "verify-full",
    }
}

words! {
    /// `sslnegotiation`.
    SslNegotiation {
        /// Ask the server first.
        Postgres = "postgres",
        /// Begin TLS at once; PostgreSQL 17 and later.
        Direct = "direct",
    }
}

words! {
    /// `target_session_attrs`.
    TargetSessionAttrs {
        /// Any server.
        Any = "any",
        /// One that takes writes.
        ReadWrite = "read-write",
        /// One that does not.
        ReadOnly = "read-only",
        /// One that is not in recovery.
        Primary = "primary",
        /// One that is in recovery.
        Standby = "standby",
        /// One that is in recovery if there is one, else any.
        PreferStandby = "prefer-standby",
    }
}

words! {
    /// `load_balance_hosts`.
    LoadBalanceHosts {
        /// In the order given.
        Disable = "disable",
        /// In a random order, anew for each connection.
        Random = "random",
    }
}

words! {
    /// `channel_binding`.
    ChannelBinding {
        /// Never.
        Disable = "disable",
        /// Where the server offers it.
        Prefer = "prefer",
        /// Or do not log in.
        Require = "require",
    }
}
