//! An engine: one PostgreSQL target behind a deadpool pool.
//!
//! Connections are opened here, stream and all, so that one budget covers resolving, connecting and logging in, and
//! their messages can be watched. Invariant: every wait has a bound.

use std::fmt;
use std::future::poll_fn;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use deadpool::Runtime;
use deadpool::managed::{
    Manager, Metrics, Object, Pool, PoolError, RecycleError, RecycleResult, TimeoutType, Timeouts,
};
use deadpool_postgres::ClientWrapper;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::time::{Instant, timeout};
use tokio_postgres::tls::MakeTlsConnect;
use tokio_postgres::{AsyncMessage, NoTls, config as driver};
use tokio_postgres_rustls::MakeRustlsConnect;

use super::connection::{Nets, PooledConnection};
use super::error::pg_error;
use super::net::{Address, Host, Stream};
use super::options::{ConnectOptions, LoadBalanceHosts, Password, SslMode, TargetSessionAttrs};
use super::tls;
use super::wire::{Watched, WatchedTls, Wire};
use crate::broker::engine::{CheckoutError, Connection, Engine, EngineInfo};
use crate::broker::error::PgError;
use crate::secret::Secret;

/// How large a pool is and how long it makes callers wait.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PoolOptions {
    /// The most connections.
    pub size: usize,
    /// The longest wait for one when all are in use.
    pub timeout: Duration,
}

impl Default for PoolOptions {
    fn default() -> Self {
        Self {
            // What SQLAlchemy's pool_size 5 with max_overflow 10 comes to.
            size: 15,
            // A caller that waits longer is better off with an error it can act on.
            timeout: Duration::from_secs(2),
        }
    }
}

/// A PostgreSQL target and its pool.
pub struct PostgresEngine {
    name: String,
    pool: Pool<Opener>,
    pool_timeout: Duration,
    server_version: Mutex<String>,
}

impl PostgresEngine {
    /// An engine that opens its first connection when it is needed. Call it on a tokio runtime.
    pub fn new(name: String, options: ConnectOptions, pool: &PoolOptions) -> Self {
        /// Our opener keeps its own budget; this only stops one that fails to.
        const OPENER_SLACK: Duration = Duration::from_secs(5);
        /// Recycling looks at a flag.
        const RECYCLE: Duration = Duration::from_secs(1);

        let create = options.connect_timeout + OPENER_SLACK;
        let timeouts = Timeouts { wait: Some(pool.timeout), create: Some(create), recycle: Some(RECYCLE) };
        let pool_timeout = pool.timeout;
        let pool = Pool::builder(Opener { options })
            .max_size(pool.size)
            .timeouts(timeouts)
            .runtime(Runtime::Tokio1)
            .build()
            .expect("a pool with timeouts has a runtime");
        Self { name, pool, pool_timeout, server_version: Mutex::default() }
    }

    async fn connection(&self) -> Result<PooledConnection, CheckoutError> {
        let backend: Object<Opener> = self.pool.get().await.map_err(|error| match error {
            PoolError::Timeout(TimeoutType::Wait) => CheckoutError::Wait(self.pool_timeout),
            PoolError::Backend(error) => error.into(),
            error => CheckoutError::Unreachable(error.to_string()),
        })?;
        self.server_version.lock().unwrap_or_else(PoisonError::into_inner).clone_from(&backend.server_version);
        Ok(PooledConnection::new(backend))
    }
}

#[async_trait]
impl Engine for PostgresEngine {
    fn info(&self) -> EngineInfo {
        let options = &self.pool.manager().options;
        EngineInfo {
            name: self.name.clone(),
            database: options.database.clone(),
            user: options.user.clone(),
            server_version: self.server_version.lock().unwrap_or_else(PoisonError::into_inner).clone(),
        }
    }

    async fn checkout(&self) -> Result<Box<dyn Connection>, CheckoutError> {
        Ok(Box::new(self.connection().await?))
    }

    async fn probe(&self) -> Result<(), CheckoutError> {
        // A connection of its own: a busy pool says nothing about the server, and callers need all of it.
        match self.pool.manager().create().await {
            Ok(_) => Ok(()),
            // All the server's connections are in use: it is there.
            Err(OpenError::Refused(error)) if error.sqlstate == TOO_MANY_CONNECTIONS => Ok(()),
            Err(error) => Err(error.into()),
        }
    }
}

impl fmt::Debug for PostgresEngine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PostgresEngine").field("name", &self.name).finish_non_exhaustive()
    }
}

/// Opens connections for the pool.
pub(super) struct Opener {
    options: ConnectOptions,
}

/// An open connection.
pub(super) struct Backend {
    /// Dropping it ends the connection's task and closes the socket.
    pub(super) client: ClientWrapper,
    pub(super) wire: Arc<Wire>,
    pub(super) address: Address,
    /// How it is encrypted, and for which name.
    pub(super) tls: Option<(MakeRustlsConnect, String)>,
    pub(super) pid: i32,
    pub(super) nets: Nets,
    server_version: String,
    standing: Standing,
}

/// What a server says of itself at login.
#[derive(Debug, Clone, Copy)]
struct Standing {
    in_recovery: bool,
    read_only: bool,
}

impl Standing {
    fn suits(self, attrs: TargetSessionAttrs) -> bool {
        match attrs {
            TargetSessionAttrs::Any => true,
            TargetSessionAttrs::ReadWrite => !self.in_recovery && !self.read_only,
            TargetSessionAttrs::ReadOnly => self.in_recovery || self.read_only,
            TargetSessionAttrs::Primary => !self.in_recovery,
            TargetSessionAttrs::Standby | TargetSessionAttrs::PreferStandby => self.in_recovery,
        }
    }
}

/// Why a connection was not opened.
#[derive(Debug, thiserror::Error)]
pub(super) enum OpenError {
    #[error("{0}")]
    Refused(Box<PgError>),
    #[error("{0}")]
    Failed(String),
}

impl From<OpenError> for CheckoutError {
    fn from(error: OpenError) -> Self {
        match error {
            OpenError::Refused(error) => Self::Refused(error),
            OpenError::Failed(cause) => Self::Unreachable(cause),
        }
    }
}

impl Manager for Opener {
    type Type = Backend;
    type Error = OpenError;

    async fn create(&self) -> Result<Backend, OpenError> {
        let until = Instant::now() + self.options.connect_timeout;
        let hosts = self.hosts();
        match self.options.target_session_attrs {
            // Half of the budget is for finding a standby, the other half for doing without.
            TargetSessionAttrs::PreferStandby => {
                let half = until - self.options.connect_timeout / 2;
                match self.open(&hosts, TargetSessionAttrs::Standby, half).await {
                    Ok(backend) => Ok(backend),
                    Err(_) => self.open(&hosts, TargetSessionAttrs::Any, until).await,
                }
            }
            attrs => self.open(&hosts, attrs, until).await,
        }
    }

    async fn recycle(&self, backend: &mut Backend, _: &Metrics) -> RecycleResult<OpenError> {
        if backend.wire.is_lost() || backend.client.is_closed() {
            return Err(RecycleError::message("the server closed it"));
        }
        Ok(())
    }
}

impl Opener {
    /// The hosts in the order to try them.
    fn hosts(&self) -> Vec<&Host> {
        let mut hosts: Vec<_> = self.options.hosts.iter().collect();
        if self.options.load_balance_hosts == LoadBalanceHosts::Random {
            let mut key = [0; 8];
            hosts.sort_by_cached_key(|_| {
                getrandom::fill(&mut key).expect("the operating system always has random bytes once it has booted");
                key
            });
        }
        hosts
    }

    /// Opens a connection to the first host that takes one and suits. Each host gets its share of what is left of the
    /// time, so that a silent one leaves some for the next.
    async fn open(&self, hosts: &[&Host], attrs: TargetSessionAttrs, until: Instant) -> Result<Backend, OpenError> {
        let mut failures = Vec::new();
        for (host, hosts_left) in hosts.iter().zip((1..=u32::try_from(hosts.len()).unwrap_or(u32::MAX)).rev()) {
            let share = until.saturating_duration_since(Instant::now()) / hosts_left;
            let cause = match timeout(share, self.open_at(host)).await {
                Ok(Ok(backend)) if backend.standing.suits(attrs) => return Ok(backend),
                Ok(Ok(backend)) => format!("is not {}: {:?}", attrs.word(), backend.standing),
                // The server is there and says no, for good: another host would be asked to say the same.
                Ok(Err(OpenError::Refused(error))) if error.sqlstate != CANNOT_CONNECT_NOW => {
                    return Err(OpenError::Refused(error));
                }
                Ok(Err(error)) => error.to_string(),
                Err(_) => format!("not logged in within {}", humantime::format_duration(share)),
            };
            failures.push(format!("{host}: {cause}"));
        }
        Err(OpenError::Failed(failures.join("; ")))
    }

    async fn open_at(&self, host: &Host) -> Result<Backend, OpenError> {
        let options = &self.options;
        let password = options.password.as_ref().map(Password::read).transpose().map_err(OpenError::Failed)?;
        let mut config = options.driver_config(password.as_ref().map(Secret::expose));
        let (address, stream) = host.connect(options).await.map_err(|error| OpenError::Failed(error.to_string()))?;
        let wire = Wire::new();
        let nets = options.nets();
        if options.tls.mode == SslMode::Disable || matches!(host, Host::Unix(_)) {
            // Nobody listens in on a Unix socket; libpq does not encrypt there either.
            config.ssl_mode(driver::SslMode::Disable);
            let watched = Watched::new(stream, wire.clone());
            let (client, connection) = config.connect_raw(watched, NoTls).await.map_err(|error| open_error(&error))?;
            return Backend::start(client, connection, wire, address, None, nets);
        }
        let name = host.certificate_name();
        let connector = tls::connector(&options.tls).map_err(OpenError::Failed)?;
        let tls = MakeTlsConnect::<Stream>::make_tls_connect(&mut connector.clone(), name)
            .map_err(|error| OpenError::Failed(error.to_string()))?;
        let tls = WatchedTls { tls, wire: wire.clone() };
        let (client, connection) = config.connect_raw(stream, tls).await.map_err(|error| open_error(&error))?;
        Backend::start(client, connection, wire, address, Some((connector, name.to_owned())), nets)
    }
}

impl Backend {
    fn start<S, T>(
        client: tokio_postgres::Client,
        connection: tokio_postgres::Connection<S, T>,
        wire: Arc<Wire>,
        address: Address,
        tls: Option<(MakeRustlsConnect, String)>,
        nets: Nets,
    ) -> Result<Self, OpenError>
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
        T: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let is_on = |name| connection.parameter(name) == Some("on");
        let standing =
            Standing { in_recovery: is_on("in_hot_standby"), read_only: is_on("default_transaction_read_only") };
        let server_version = connection.parameter("server_version").unwrap_or_default().to_owned();
        let pid = wire.backend_pid().ok_or_else(|| OpenError::Failed("the server named no process id".into()))?;
        let driver = tokio::spawn(drive(connection, wire.clone()));
        let client = ClientWrapper::new(client, driver);
        Ok(Self { client, wire, address, tls, pid, nets, server_version, standing })
    }
}

fn open_error(error: &tokio_postgres::Error) -> OpenError {
    match error.as_db_error() {
        Some(refusal) => OpenError::Refused(Box::new(pg_error(refusal))),
        // The driver's own text is terse, "error performing TLS handshake": the cause says which certificate.
        None => OpenError::Failed(match std::error::Error::source(error) {
            Some(cause) => format!("{error}: {cause}"),
            None => error.to_string(),
        }),
    }
}

/// SQLSTATE of a server that starts, stops or recovers.
const CANNOT_CONNECT_NOW: &str = "57P03";

/// SQLSTATE of a server whose connections are all in use.
const TOO_MANY_CONNECTIONS: &str = "53300";

/// Moves a connection's messages until it ends, and notes its notices and its end.
async fn drive<S, T>(mut connection: tokio_postgres::Connection<S, T>, wire: Arc<Wire>)
where
    S: AsyncRead + AsyncWrite + Unpin,
    T: AsyncRead + AsyncWrite + Unpin,
{
    loop {
        match poll_fn(|cx| connection.poll_message(cx)).await {
            Some(Ok(AsyncMessage::Notice(notice))) => wire.notice(pg_error(&notice)),
            // Notifications have no listener; the enum may grow.
            Some(Ok(_)) => {}
            Some(Err(error)) => {
                return wire.lose(error.as_db_error().map_or_else(|| error.to_string(), ToString::to_string));
            }
            None => return wire.lose("connection closed".into()),
        }
    }
}
