//! Opening connections: stream, TLS and login within one budget, on the first host that suits; and judging, later,
//! whether a connection is still good.
//!
//! Streams are opened here and not by the driver, so that their messages can be watched. Invariant: every wait has a
//! bound.

use std::future::poll_fn;
use std::num::NonZeroUsize;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use deadpool::managed::{Manager, Metrics, RecycleError, RecycleResult};
use deadpool_postgres::ClientWrapper;
use futures_util::join;
use lru::LruCache;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::lookup_host;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, timeout, timeout_at};
use tokio_postgres::tls::MakeTlsConnect;
use tokio_postgres::{AsyncMessage, NoTls, Notification, Statement as Prepared, config as driver};
use tokio_postgres_rustls::MakeRustlsConnect;

use super::begin::{BEGIN, LoginTimeouts};
use super::cancel::BackendCanceller;
use super::connection::{Checks, StatementKey, TRANSACTION_ID, first_row};
use super::error::pg_error;
use super::net::{Address, Host, Stream};
use super::options::{ConnectOptions, LoadBalanceHosts, Password, SslMode, TargetSessionAttrs};
use super::pool::PoolOptions;
use super::value::Delimiters;
use super::wire::{Watched, WatchedTls, Wire};
use super::{outcome, tls};
use crate::broker::commit::Cluster;
use crate::broker::engine::CheckoutError;
use crate::broker::error::PgError;
use crate::random::jittered;
use crate::random::random;
use crate::secret::Secret;

/// Opens connections for a sub-pool, and judges whether they are still good.
pub(super) struct Opener {
    options: ConnectOptions,
    recycle: Duration,
    pre_ping_after: Duration,
    statement_cache_size: NonZeroUsize,
    census: Arc<Census>,
    /// Who hears what is notified to its connections. Nobody where they listen to nothing, as in the pool.
    notified: Option<Notified>,
}

/// Is told what NOTIFY sent, by the connection's own task, which it must not hold up.
pub(super) type Notified = Arc<dyn Fn(&Notification) + Send + Sync>;

/// Counts connections, and bounds how many there are.
#[derive(Debug)]
pub(super) struct Census {
    /// One permit for each connection there may be.
    room: Arc<Semaphore>,
    total: usize,
    opened: AtomicU64,
}

impl Census {
    pub(super) fn new(total: usize) -> Self {
        Self { room: Arc::new(Semaphore::new(total)), total, opened: AtomicU64::new(0) }
    }

    /// How many are open, or being opened, now.
    pub(super) fn open(&self) -> usize {
        self.total - self.room.available_permits()
    }

    /// How many have been opened.
    pub(super) fn opened(&self) -> u64 {
        self.opened.load(Ordering::Relaxed)
    }
}

/// An open connection.
pub(super) struct Backend {
    /// Dropping it ends the connection's task and closes the socket.
    pub(super) client: ClientWrapper,
    pub(super) wire: Arc<Wire>,
    pub(super) canceller: Arc<BackendCanceller>,
    /// The server's address.
    pub(super) host: Arc<str>,
    pub(super) pid: i32,
    pub(super) login_timeouts: LoginTimeouts,
    pub(super) server_version: String,
    /// Where its transactions' ids mean something.
    pub(super) cluster: Option<Cluster>,
    /// The broker's own statements, if it is for transactions.
    pub(super) own: Option<OwnStatements>,
    /// The statements prepared on it, by their text and the types given for their parameters.
    pub(super) statements: Mutex<LruCache<StatementKey, Prepared>>,
    /// The pool's schema version at the last look.
    schema_version: AtomicU64,
    /// What is known of its types.
    pub(super) delimiters: Mutex<Arc<Delimiters>>,
    standing: Standing,
    /// When it is too old.
    expires: Instant,
    /// Since when nobody has used it.
    unused_since: Instant,
    /// How it was last cleaned.
    checks: Checks,
    /// Its place in the census.
    _room: Option<OwnedSemaphorePermit>,
}

/// Statements that every transaction runs.
pub(super) struct OwnStatements {
    pub(super) begin: Prepared,
    /// Asks for the transaction's id.
    pub(super) transaction_id: Prepared,
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
    /// As many are open as there may be.
    #[error("there is no room for another connection")]
    NoRoom,
}

impl Manager for Opener {
    type Type = Backend;
    type Error = OpenError;

    async fn create(&self) -> Result<Backend, OpenError> {
        // Apart, for it is large and rare, and would be moved about with every checkout.
        Box::pin(self.open()).await
    }

    async fn recycle(&self, backend: &mut Backend, _: &Metrics) -> RecycleResult<OpenError> {
        if !backend.is_usable() {
            return Err(RecycleError::message("the server closed it, or it is too old"));
        }
        let attrs = self.options.target_session_attrs;
        // What a server was a moment ago says nothing of what it is.
        if backend.idle_for() < self.pre_ping_after && attrs == TargetSessionAttrs::Any {
            return Ok(());
        }
        let standing = Box::pin(backend.ask()).await.map_err(RecycleError::message)?;
        // What is only preferred is no reason to give up a connection.
        if standing.suits(attrs) || attrs == TargetSessionAttrs::PreferStandby {
            Ok(())
        } else {
            Err(RecycleError::message("its server is not what is asked for any more"))
        }
    }
}

impl Opener {
    pub(super) fn new(options: ConnectOptions, pool: &PoolOptions, census: Arc<Census>) -> Self {
        Self {
            options,
            recycle: pool.recycle,
            pre_ping_after: pool.pre_ping_after,
            // None at all is the connection's business: it keeps none.
            statement_cache_size: NonZeroUsize::new(pool.statement_cache_size).unwrap_or(NonZeroUsize::MIN),
            census,
            notified: None,
        }
    }

    /// The same, whose connections tell what is notified to them.
    pub(super) fn telling(self, notified: Notified) -> Self {
        Self { notified: Some(notified), ..self }
    }

    /// Opens a connection, within the options' budget.
    pub(super) async fn open(&self) -> Result<Backend, OpenError> {
        let room = self.census.room.clone().try_acquire_owned().map_err(|_| OpenError::NoRoom)?;
        let until = Instant::now() + self.options.connect_timeout;
        let hosts = timeout_at(until, self.hosts()).await.map_err(|_| {
            let budget = humantime::format_duration(self.options.connect_timeout);
            OpenError::Failed(format!("host names not resolved within the connect_timeout of {budget}"))
        })?;
        let opened = match self.options.target_session_attrs {
            // Half of the budget is for finding a standby, the other half for doing without.
            TargetSessionAttrs::PreferStandby => {
                let half = until - self.options.connect_timeout / 2;
                match self.open_any(&hosts, TargetSessionAttrs::Standby, half).await {
                    Ok(backend) => Ok(backend),
                    Err(_) => self.open_any(&hosts, TargetSessionAttrs::Any, until).await,
                }
            }
            attrs => self.open_any(&hosts, attrs, until).await,
        };
        opened.map(|backend| Backend { _room: Some(room), ..backend })
    }

    /// Opens a connection to the server that was found at `address` before, within the options' budget.
    pub(super) async fn open_found(&self, address: &str) -> Result<Backend, OpenError> {
        let opening = async {
            let hosts = self.hosts().await;
            let host = hosts.iter().find(|host| host.address().as_deref() == Some(address));
            self.open_at(host.ok_or_else(|| OpenError::Failed(format!("{address} is not there any more")))?).await
        };
        let budget = self.options.connect_timeout;
        timeout(budget, opening).await.unwrap_or_else(|_| {
            let budget = humantime::format_duration(budget);
            Err(OpenError::Failed(format!("not logged in within the connect_timeout of {budget}")))
        })
    }

    /// The hosts in the order to try them, each of a name's addresses as a host of its own.
    async fn hosts(&self) -> Vec<Host> {
        let mut hosts = Vec::new();
        for host in &self.options.hosts {
            let found = match host {
                Host::Tcp { name, address: None, port } => lookup_host((name.as_str(), *port)).await.ok(),
                Host::Tcp { .. } | Host::Unix(_) => None,
            };
            let before = hosts.len();
            for address in found.into_iter().flatten() {
                hosts.push(host.at(address.ip()));
            }
            if hosts.len() == before {
                // Connecting will say what is wrong with the name.
                hosts.push(host.clone());
            }
        }
        if self.options.load_balance_hosts == LoadBalanceHosts::Random {
            hosts.sort_by_cached_key(|_| random::<8>());
        }
        hosts
    }

    /// Opens a connection to the first host that takes one and suits. Each host gets its share of what is left of the
    /// time, so that a silent one leaves some for the next.
    async fn open_any(&self, hosts: &[Host], attrs: TargetSessionAttrs, until: Instant) -> Result<Backend, OpenError> {
        let mut failures = Vec::new();
        let mut starting = None;
        for (host, hosts_left) in hosts.iter().zip((1..=u32::try_from(hosts.len()).unwrap_or(u32::MAX)).rev()) {
            let share = until.saturating_duration_since(Instant::now()) / hosts_left;
            let cause = match timeout(share, self.identified(host)).await {
                Ok(Ok(backend)) if backend.standing.suits(attrs) => return Ok(backend),
                Ok(Ok(backend)) => format!("is not {}: {:?}", attrs.word(), backend.standing),
                Ok(Err(OpenError::Refused(error))) if error.sqlstate == CANNOT_CONNECT_NOW => {
                    starting = Some(error);
                    continue;
                }
                // The server is there and says no, for good: another host would be asked to say the same.
                Ok(Err(OpenError::Refused(error))) => return Err(OpenError::Refused(error)),
                Ok(Err(error)) => error.to_string(),
                Err(_) => {
                    let budget = humantime::format_duration(self.options.connect_timeout);
                    format!("not logged in within its part of the connect_timeout of {budget}")
                }
            };
            failures.push(format!("{host}: {cause}"));
        }
        // One that starts up may be there in a moment, which is worth more to know than what the others said.
        Err(starting.map_or_else(|| OpenError::Failed(failures.join("; ")), OpenError::Refused))
    }

    /// Opens a connection, asks once where its transactions' ids mean something, and prepares what every transaction needs.
    async fn identified(&self, host: &Host) -> Result<Backend, OpenError> {
        let mut backend = self.open_at(host).await?;
        let client = &backend.client;
        let (cluster, begin, transaction_id) =
            join!(outcome::cluster(client), client.prepare(BEGIN), client.prepare(TRANSACTION_ID));
        backend.cluster = cluster;
        backend.own = begin.and_then(|begin| Ok(OwnStatements { begin, transaction_id: transaction_id? })).ok();
        Ok(backend)
    }

    async fn open_at(&self, host: &Host) -> Result<Backend, OpenError> {
        let options = &self.options;
        let password = options.password.as_ref().map(Password::read).transpose().map_err(OpenError::Failed)?;
        let mut config = options.driver_config(password.as_ref().map(Secret::expose));
        let (address, stream) = host.connect(options).await.map_err(|error| OpenError::Failed(error.to_string()))?;
        let wire = Wire::new();
        if options.tls.mode == SslMode::Disable || matches!(host, Host::Unix(_)) {
            // Nobody listens in on a Unix socket; libpq does not encrypt there either.
            config.ssl_mode(driver::SslMode::Disable);
            let watched = Watched::new(stream, wire.clone());
            let (client, connection) = config.connect_raw(watched, NoTls).await.map_err(|error| open_error(&error))?;
            return self.start(client, connection, wire, address, None);
        }
        let name = host.certificate_name();
        let connector = tls::connector(&options.tls).map_err(OpenError::Failed)?;
        let tls = MakeTlsConnect::<Stream>::make_tls_connect(&mut connector.clone(), name)
            .map_err(|error| OpenError::Failed(error.to_string()))?;
        let tls = WatchedTls { tls, wire: wire.clone() };
        let (client, connection) = config.connect_raw(stream, tls).await.map_err(|error| open_error(&error))?;
        self.start(client, connection, wire, address, Some((connector, name.to_owned())))
    }

    fn start<S, T>(
        &self,
        client: tokio_postgres::Client,
        connection: tokio_postgres::Connection<S, T>,
        wire: Arc<Wire>,
        address: Address,
        tls: Option<(MakeRustlsConnect, String)>,
    ) -> Result<Backend, OpenError>
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
        T: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let is_on = |name| connection.parameter(name) == Some("on");
        let standing =
            Standing { in_recovery: is_on("in_hot_standby"), read_only: is_on("default_transaction_read_only") };
        let server_version = connection.parameter("server_version").unwrap_or_default().to_owned();
        let pid = wire.backend_pid().ok_or_else(|| OpenError::Failed("the server named no process id".into()))?;
        let driver = tokio::spawn(drive(connection, wire.clone(), self.notified.clone()));
        let client = ClientWrapper::new(client, driver);
        self.census.opened.fetch_add(1, Ordering::Relaxed);
        let now = Instant::now();
        Ok(Backend {
            cluster: None,
            own: None,
            host: address.to_string().into(),
            canceller: Arc::new(BackendCanceller::new(client.cancel_token(), address, tls, wire.clone())),
            client,
            wire,
            pid,
            login_timeouts: self.options.login_timeouts(),
            server_version,
            statements: Mutex::new(LruCache::new(self.statement_cache_size)),
            delimiters: Mutex::default(),
            standing,
            // Jittered, so that connections opened together do not all have to be opened again together.
            expires: now + self.recycle.mul_f64(0.4) + jittered(self.recycle.mul_f64(0.8)),
            unused_since: now,
            checks: Checks::All,
            schema_version: AtomicU64::new(0),
            _room: None,
        })
    }
}

impl Backend {
    /// Whether nothing is known to be against using it.
    pub(super) fn is_usable(&self) -> bool {
        !self.wire.is_lost() && !self.client.is_closed() && Instant::now() < self.expires
    }

    /// For how long nobody has used it.
    pub(super) fn idle_for(&self) -> Duration {
        self.unused_since.elapsed()
    }

    /// Whether its pool has another schema version than at the last look, as of now.
    pub(super) fn outdated_by(&self, schema_version: u64) -> bool {
        self.schema_version.swap(schema_version, Ordering::Relaxed) != schema_version
    }

    /// Notes that it has been used until now.
    pub(super) fn used(&mut self) {
        self.unused_since = Instant::now();
    }

    /// Notes how it has been cleaned.
    pub(super) fn cleaned(&mut self, checks: Checks) {
        self.checks = checks;
    }

    /// Whether it is clean only for the principal that used it last.
    pub(super) fn is_for_one_principal(&self) -> bool {
        self.checks == Checks::Trusting
    }

    /// Asks the server whether it is there, and what it is.
    async fn ask(&self) -> Result<Standing, String> {
        const STANDING: &str =
            "SELECT pg_catalog.pg_is_in_recovery(), pg_catalog.current_setting('default_transaction_read_only')";
        let answers = self.client.simple_query(STANDING).await.map_err(|error| error.to_string())?;
        let row = first_row(&answers).ok_or("the server did not say what it is")?;
        Ok(Standing { in_recovery: row.get(0) == Some("t"), read_only: row.get(1) == Some("on") })
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
pub(super) const CANNOT_CONNECT_NOW: &str = "57P03";

/// SQLSTATE of a server whose connections are all in use.
pub(super) const TOO_MANY_CONNECTIONS: &str = "53300";

impl From<OpenError> for CheckoutError {
    fn from(error: OpenError) -> Self {
        match error {
            OpenError::Refused(error) => Self::Refused(error),
            error @ (OpenError::Failed(_) | OpenError::NoRoom) => Self::Unreachable(error.to_string()),
        }
    }
}

/// Moves a connection's messages until it ends, notes its notices and its end, and tells its notifications.
async fn drive<S, T>(mut connection: tokio_postgres::Connection<S, T>, wire: Arc<Wire>, notified: Option<Notified>)
where
    S: AsyncRead + AsyncWrite + Unpin,
    T: AsyncRead + AsyncWrite + Unpin,
{
    loop {
        match poll_fn(|cx| connection.poll_message(cx)).await {
            Some(Ok(AsyncMessage::Notice(notice))) => wire.notice(pg_error(&notice)),
            Some(Ok(AsyncMessage::Notification(notification))) => {
                if let Some(notified) = &notified {
                    notified(&notification);
                }
            }
            // The enum may grow.
            Some(Ok(_)) => {}
            Some(Err(error)) => {
                return wire.lose(error.as_db_error().map_or_else(|| error.to_string(), ToString::to_string));
            }
            None => return wire.lose("connection closed".into()),
        }
    }
}
