//! Operators' calls: who has which session, who stands in whose way, and the means to end one session or all.
//!
//! Knows no gRPC. An [`Operator`] is what a principal with the admin right is given, for one call. Invariants: a call,
//! allowed or refused, leaves one line in the audit log, whatever becomes of it; nothing shown here holds SQL, a
//! parameter's value or a token.

pub mod watch;

use std::cmp::Reverse;
use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use futures_util::future::join_all;
use tokio::task::yield_now;
use tokio::time::error::Elapsed;
use tokio::time::{Instant, timeout, timeout_at};
use tracing::field::display;
use tracing::info;

use super::Broker;
use super::engine::{Blocker, CheckoutError, Engine, EngineInfo};
use super::error::{EndReason, Error};
use super::principal::Principal;
use super::session::{BackendInfo, Glance, Session, TransactionState};
use super::token::SessionId;

/// The target of the audit log's lines.
pub const AUDIT: &str = "audit";

/// The sessions on a page when no number is given: what a person looks through.
const PAGE_SIZE: usize = 100;

/// The most sessions on a page.
const PAGE_SIZE_MAX: usize = 1000;

/// About how large a page gets, within the 4 MiB that gRPC clients accept by default; what blocks is on top.
const PAGE_BYTES_MAX: usize = 3 * 1024 * 1024;

/// What a session takes on a page beside its labels: names of at most 253 bytes, and numbers.
const SESSION_BYTES: usize = 1024;

/// How many sessions are looked at in one go before other tasks get their turn.
const SLICE: usize = 1024;

/// How many backends PostgreSQL is asked about for one page. Each is a question of its own.
const ASKED_MAX: usize = 20;

/// How long all those questions may take.
const ASKING: Duration = Duration::from_secs(2);

/// How long a terminated session is waited for: cancelling, rolling back and resetting have two seconds each.
const STOP: Duration = Duration::from_secs(6);

/// How long an engine may take to answer: as long as its connections may take to open, unless configured.
const PROBE: Duration = Duration::from_secs(5);

/// The longest text of why an engine does not answer.
const CAUSE_BYTES_MAX: usize = 512;

/// An operator's call, by its name in the protocol; the last two are the operations port's own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs, reason = "the names are the protocol's")]
pub enum AdminCall {
    ListSessions,
    TerminateSession,
    ListEngines,
    Drain,
    WatchSessions,
    DebugSessions,
}

impl fmt::Display for AdminCall {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::ListSessions => "ListSessions",
            Self::TerminateSession => "TerminateSession",
            Self::ListEngines => "ListEngines",
            Self::Drain => "Drain",
            Self::WatchSessions => "WatchSessions",
            Self::DebugSessions => "DebugSessions",
        })
    }
}

/// A principal with the admin right, for one call. Dropped, the call is in the audit log.
#[derive(Debug)]
pub struct Operator<'a> {
    broker: &'a Broker,
    principal: Principal,
    call: AdminCall,
    /// The session it is about.
    session: Option<SessionId>,
    /// Why it is made.
    reason: Option<TerminationReason>,
    /// How many sessions or engines it is about.
    count: Option<usize>,
}

/// Which live sessions to list: those that meet all that is given.
#[derive(Debug, Default)]
pub struct SessionFilter {
    /// The one of that id.
    pub id: Option<SessionId>,
    /// Its caller's name.
    pub principal: Option<String>,
    /// Its engine's name.
    pub engine: Option<String>,
    /// Its profile's name.
    pub profile: Option<String>,
    /// Where its transaction stands.
    pub transaction: Option<TransactionState>,
    /// Labels that it has, among others.
    pub labels: BTreeMap<String, String>,
    /// Not used for longer than this.
    pub idle_longer_than: Option<Duration>,
    /// With a transaction open for longer than this.
    pub transaction_longer_than: Option<Duration>,
}

/// Which page of them.
#[derive(Debug, Clone, Copy, Default)]
pub struct Page {
    /// The most sessions on it; `None`: a hundred. More than a thousand are a thousand.
    pub size: Option<usize>,
    /// It begins behind this session; `None`: with the first.
    pub after: Option<SessionId>,
}

/// A page of live sessions, in the order of their ids.
#[derive(Debug)]
pub struct SessionPage {
    /// The sessions.
    pub sessions: Vec<SessionOverview>,
    /// The session behind which the next page begins; `None` on the last.
    pub next: Option<SessionId>,
    /// Whether all whose statement runs were asked who stands in their way.
    pub blockers_complete: bool,
}

/// A live session, as operators see it.
#[derive(Debug)]
pub struct SessionOverview {
    /// Its loggable name.
    pub id: SessionId,
    /// Its caller.
    pub principal: Principal,
    /// Its engine's name.
    pub engine: String,
    /// Its profile's name.
    pub profile: String,
    /// The labels it was begun with.
    pub labels: BTreeMap<String, String>,
    /// It belongs to one call, and ends with it.
    pub one_shot: bool,
    /// What changes.
    pub glance: Glance,
    /// Who stands in its statement's way, as far as that could be asked.
    pub blocked_by: Vec<Blocking>,
}

/// A backend that stands in a statement's way.
#[derive(Debug)]
pub struct Blocking {
    /// The backend.
    pub backend: Blocker,
    /// The session that it works for, if it is one of this broker's.
    pub session: Option<SessionId>,
}

/// Why an operator ends a session: 1 to 256 bytes of printable text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TerminationReason(String);

impl TerminationReason {
    /// A sentence or two, which a line of the log has room for.
    const BYTES_MAX: usize = 256;

    /// # Errors
    /// [`Error::Invalid`] for the field `reason`.
    pub fn new(text: String) -> Result<Self, Error> {
        if text.trim().is_empty() || text.len() > Self::BYTES_MAX || text.contains(char::is_control) {
            let problem =
                format!("must be 1 to {} bytes of printable text: say why the session is ended", Self::BYTES_MAX);
            return Err(Error::invalid("reason", problem));
        }
        Ok(Self(text))
    }

    fn as_str(&self) -> &str {
        &self.0
    }
}

/// What terminating a session found.
#[derive(Debug)]
pub enum Terminated {
    /// It lived.
    Now {
        /// The session as it was.
        was: Box<SessionOverview>,
        /// Whether its transaction is over by now, and its connection free.
        is_over: bool,
    },
    /// It had ended, for this reason.
    Before(EndReason),
}

/// An engine, as operators see it.
#[derive(Debug)]
pub struct EngineOverview {
    /// What is behind it.
    pub info: EngineInfo,
    /// Why its PostgreSQL does not answer; `None`: it does.
    pub unreachable: Option<String>,
    /// Whether sessions that name no engine have it.
    pub is_default: bool,
    /// The profiles whose sessions may have it.
    pub profiles: Vec<String>,
}

impl Broker {
    /// Lets an operator make a call.
    ///
    /// # Errors
    /// [`Error::Forbidden`] for a principal without the admin right.
    pub fn operator(&self, principal: Principal, call: AdminCall) -> Result<Operator<'_>, Error> {
        if !self.is_admin(&principal) {
            info!(target: AUDIT, rpc = %call, %principal, allowed = false, "operator's call");
            let problem = format!("principal {principal} may not make an operator's calls: it is not granted admin");
            return Err(Error::Forbidden(problem));
        }
        Ok(Operator { broker: self, principal, call, session: None, reason: None, count: None })
    }

    /// Refuses new sessions from now on, and has whoever runs the broker drain and stop it. The first grace asked for
    /// stands.
    pub fn ask_to_drain(&self, grace: Option<Duration>) {
        self.shared.draining.store(true, Ordering::SeqCst);
        // Fails when it was asked before.
        let _ = self.shared.drain_asked.set(grace);
    }

    /// Waits until an operator asks for the broker to be drained, and says within what grace, if that was said.
    ///
    /// # Cancel safety
    /// Dropping the future loses nothing.
    pub async fn drain_asked(&self) -> Option<Duration> {
        *self.shared.drain_asked.wait().await
    }
}

impl Operator<'_> {
    /// Lists live sessions.
    ///
    /// # Cancel safety
    /// Dropping the future leaves nothing behind.
    pub async fn list_sessions(mut self, filter: &SessionFilter, page: Page) -> SessionPage {
        self.session = filter.id;
        let mut known = self.broker.shared.registry.sessions();
        known.sort_unstable_by_key(|session| session.id());
        let (seen, next) = look(&known, filter, page).await;
        self.count = Some(seen.len());
        let (mut blocked, blockers_complete) = ask_blocking(&seen, || known).await;
        let sessions = seen.into_iter().map(|Seen { session, glance }| {
            let blocking = blocked.remove(&session.id()).unwrap_or_default();
            SessionOverview::new(&session, glance, blocking)
        });
        SessionPage { sessions: sessions.collect(), next, blockers_complete }
    }

    /// Ends a session, whatever runs in it. Returns when its transaction is over, within a bound.
    ///
    /// # Errors
    /// [`Error::SessionUnknown`] when there is none of that id.
    ///
    /// # Cancel safety
    /// Dropping the future before its first poll ends nothing; later the end goes on.
    pub async fn terminate(mut self, id: SessionId, reason: TerminationReason) -> Result<Terminated, Error> {
        self.session = Some(id);
        let reason = &*self.reason.insert(reason);
        let session = self.broker.shared.registry.get(id).ok_or(Error::SessionUnknown)?;
        let (glance, over) = match session.terminate() {
            Ok(terminated) => terminated,
            Err(earlier) => return Ok(Terminated::Before(earlier)),
        };
        info!(
            target: AUDIT, event = "session.terminated", session.id = %id, principal = %session.principal(),
            operator = %self.principal, reason = reason.as_str(), "session terminated"
        );
        let is_over = match over {
            None => true,
            // Its sender has nothing to say: it goes with the task.
            Some(over) => timeout(STOP, over).await.is_ok(),
        };
        Ok(Terminated::Now { was: Box::new(SessionOverview::new(&session, glance, Vec::new())), is_over })
    }

    /// Lists the engines, by name, asking each whether its PostgreSQL answers.
    ///
    /// # Cancel safety
    /// Dropping the future leaves nothing behind.
    pub async fn list_engines(mut self) -> Vec<EngineOverview> {
        let Broker { engines, default_engine, .. } = self.broker;
        self.count = Some(engines.len());
        let offers = self.broker.offers();
        let probed = probe(engines).await;
        let overviews = engines.iter().zip(probed).map(|((name, engine), unreachable)| EngineOverview {
            info: engine.info(),
            unreachable,
            is_default: name == default_engine,
            profiles: offers.profiles_of(name),
        });
        overviews.collect()
    }

    /// Has the broker drain and stop, and says how many sessions are live.
    pub fn drain(mut self, grace: Option<Duration>) -> usize {
        self.broker.ask_to_drain(grace);
        let live = self.broker.live_sessions();
        self.count = Some(live);
        live
    }
}

impl Drop for Operator<'_> {
    fn drop(&mut self) {
        let Self { broker: _, principal, call, session, reason, count } = self;
        let (session, reason) = (session.map(display), reason.as_ref().map(TerminationReason::as_str));
        info!(
            target: AUDIT, rpc = %call, %principal, allowed = true, session.id = session, reason, count = *count,
            "operator's call"
        );
    }
}

impl SessionOverview {
    fn new(session: &Session, glance: Glance, blocked_by: Vec<Blocking>) -> Self {
        Self {
            id: session.id(),
            principal: session.principal().clone(),
            engine: session.engine().name().to_owned(),
            profile: session.profile_name().to_owned(),
            labels: session.labels().clone(),
            one_shot: session.is_one_shot(),
            glance,
            blocked_by,
        }
    }
}

impl SessionFilter {
    /// The session as it is now, if it lives and meets all that is given.
    fn glance(&self, session: &Session) -> Option<Glance> {
        let Self { id, principal, engine, profile, transaction, labels, idle_longer_than, transaction_longer_than } =
            self;
        let is = |asked: Option<&str>, own: &str| asked.is_none_or(|asked| asked == own);
        // What never changes is looked at first: it takes no lock.
        let fits = id.is_none_or(|id| id == session.id())
            && is(principal.as_deref(), session.principal().name())
            && is(engine.as_deref(), session.engine().name())
            && is(profile.as_deref(), session.profile_name())
            && labels.iter().all(|(key, value)| session.labels().get(key) == Some(value));
        if !fits {
            return None;
        }
        let glance = session.glance().ok()?;
        let Glance { state, idle, transaction_age, .. } = &glance;
        let fits = transaction.is_none_or(|transaction| transaction == state.transaction)
            && idle_longer_than.is_none_or(|limit| *idle > limit)
            && transaction_longer_than.is_none_or(|limit| transaction_age.is_some_and(|age| age > limit));
        fits.then_some(glance)
    }
}

/// A session that is to be on a page.
struct Seen {
    session: Arc<Session>,
    glance: Glance,
}

/// A statement that runs on a backend.
struct Running<'a> {
    session: &'a Session,
    backend: &'a BackendInfo,
    age: Duration,
}

impl Seen {
    fn running(&self) -> Option<Running<'_>> {
        let Self { session, glance } = self;
        Some(Running { session, backend: glance.backend.as_ref()?, age: glance.statement_age? })
    }
}

/// The sessions of a page, of all in their order, and behind which of them the next page begins.
async fn look(known: &[Arc<Session>], filter: &SessionFilter, page: Page) -> (Vec<Seen>, Option<SessionId>) {
    let Page { size, after } = page;
    let size = size.unwrap_or(PAGE_SIZE).clamp(1, PAGE_SIZE_MAX);
    let from = after.map_or(0, |after| known.partition_point(|session| session.id() <= after));
    let mut seen: Vec<Seen> = Vec::new();
    let mut room = PAGE_BYTES_MAX;
    for (index, session) in known[from..].iter().enumerate() {
        give_way(index).await;
        let Some(glance) = filter.glance(session) else { continue };
        let labels: usize = session.labels().iter().map(|(key, value)| key.len() + value.len()).sum();
        let bytes = SESSION_BYTES + labels;
        if seen.len() == size || room < bytes {
            let last = seen.last().map(|last| last.session.id());
            return (seen, last);
        }
        room -= bytes;
        seen.push(Seen { session: session.clone(), glance });
    }
    (seen, None)
}

/// Which session each backend works for, by its server and its process id.
async fn backends(known: &[Arc<Session>]) -> HashMap<(Arc<str>, i32), SessionId> {
    let mut backends = HashMap::new();
    for (index, session) in known.iter().enumerate() {
        give_way(index).await;
        if let Some(BackendInfo { pid, host }) = session.backend() {
            backends.insert((host, pid), session.id());
        }
    }
    backends
}

/// Lets other tasks have their turn between two slices of a long look.
async fn give_way(index: usize) {
    if index % SLICE == SLICE - 1 {
        yield_now().await;
    }
}

/// Asks who stands in the way of the statements that run, and which of the sessions that are known they work for: by the
/// session in whose way somebody stands, and whether all could be asked about.
async fn ask_blocking(
    seen: &[Seen],
    known: impl FnOnce() -> Vec<Arc<Session>>,
) -> (HashMap<SessionId, Vec<Blocking>>, bool) {
    let (mut blockers, complete) = ask_blockers(seen).await;
    if blockers.is_empty() {
        return (HashMap::new(), complete);
    }
    let backends = backends(&known()).await;
    let blocked = seen.iter().filter_map(|Seen { session, glance }| {
        let told = blockers.remove(&session.id())?;
        let host = glance.backend.as_ref().map(|backend| backend.host.clone()).unwrap_or_default();
        let blocking = told.into_iter().map(|backend| {
            let session = backends.get(&(host.clone(), backend.pid)).copied();
            Blocking { backend, session }
        });
        Some((session.id(), blocking.collect()))
    });
    (blocked.collect(), complete)
}

/// Asks who stands in the way of the statements that run, the oldest first: in whose way somebody stands, and whether
/// all could be asked about. Servers are asked side by side, each one thing after the other.
async fn ask_blockers(seen: &[Seen]) -> (HashMap<SessionId, Vec<Blocker>>, bool) {
    let mut running: Vec<_> = seen.iter().filter_map(Seen::running).collect();
    running.sort_by_key(|running| Reverse(running.age));
    let mut complete = running.len() <= ASKED_MAX;
    running.truncate(ASKED_MAX);
    let mut servers: BTreeMap<(&str, &str), Vec<Running<'_>>> = BTreeMap::new();
    for running in running {
        let server = (running.session.engine().name(), &*running.backend.host);
        servers.entry(server).or_default().push(running);
    }
    let until = Instant::now() + ASKING;
    let answers = join_all(servers.into_values().map(|running| ask(running, until))).await;
    let mut blockers = HashMap::new();
    for (told, told_all) in answers {
        complete &= told_all;
        blockers.extend(told.into_iter().filter(|(_, blockers)| !blockers.is_empty()));
    }
    (blockers, complete)
}

/// Asks one server until it fails to say: what keeps it from one answer keeps it from the next.
async fn ask(running: Vec<Running<'_>>, until: Instant) -> (Vec<(SessionId, Vec<Blocker>)>, bool) {
    let mut told = Vec::new();
    for Running { session, backend, age: _ } in running {
        let asking = session.engine().blockers(&backend.host, backend.pid);
        let Ok(Ok(blockers)) = timeout_at(until, asking).await else { return (told, false) };
        told.push((session.id(), blockers));
    }
    (told, true)
}

/// Asks each engine whether its PostgreSQL answers: why not, in the engines' order.
async fn probe(engines: &BTreeMap<String, Arc<dyn Engine>>) -> impl Iterator<Item = Option<String>> + use<> {
    let probed = join_all(engines.values().map(|engine| timeout(PROBE, engine.probe()))).await;
    probed.into_iter().map(unreachable_cause)
}

fn unreachable_cause(probed: Result<Result<(), CheckoutError>, Elapsed>) -> Option<String> {
    let mut cause = match probed {
        Ok(Ok(())) => return None,
        Ok(Err(error)) => error.to_string(),
        Err(_) => format!("no answer within {}", humantime::format_duration(PROBE)),
    };
    cause.truncate(cause.floor_char_boundary(CAUSE_BYTES_MAX));
    Some(cause)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reason_is_printable_and_of_bounded_length() {
        for good in ["runaway", "ticket 4711: holds the lock on accounts", &"x".repeat(256)] {
            assert_eq!(TerminationReason::new(good.into()).unwrap().as_str(), good);
        }
        for bad in ["", "  ", "two\nlines", "bell\u{7}", "nul\0", &"x".repeat(257), &"é".repeat(129)] {
            let error = TerminationReason::new(bad.into()).unwrap_err();
            assert!(matches!(error, Error::Invalid { field, .. } if field == "reason"), "{bad:?}");
        }
    }
}
