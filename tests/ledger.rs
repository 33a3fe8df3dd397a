//! The ledger: many callers enter their transactions while backends are terminated, links are cut and callers leave or
//! die. Each notes what it was told of each of its transactions; in the end the notes are compared with the table.
//!
//! `LEDGER_TRANSACTIONS` (500) says how many, `LEDGER_SEED` picks what the callers do. A long run:
//! `LEDGER_TRANSACTIONS=100000 cargo test --release ledger -- --nocapture`.

use std::collections::{BTreeMap, HashMap};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::Duration;

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use session_broker::grpc::pb;
use session_broker::grpc::pb::session_service_client::SessionServiceClient;
use tokio::task::{JoinSet, spawn_blocking};
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;
use tonic::transport::Channel;
use tonic::{Code, Status};
use tonic_types::StatusExt;

use crate::lost_answers::{commit_within, resolved};
use crate::proxy::{AtCommit, Proxy};
use crate::support::{Broker, Database, Failure, Session, first_row, int, seconds, text};
use pb::{Outcome, TransactionState, retry_advice::Scope};

/// Callers at a time, each with a session.
const WORKERS: u32 = 200;

/// The connections to the broker that they share.
const CHANNELS: usize = 8;

/// Fewer connections than callers, so that these wait for each other.
const ENGINE: &str = "pool_size = 20\nmax_overflow = 0\npool_timeout = \"20s\"";

const INSERT: &str = "INSERT INTO ledger (worker, n, part) VALUES ($1, $2, $3)";

/// What an earlier transaction has left on the connection.
const LOOK: &str = "SELECT coalesce(nullif(current_setting('ledger.marker', true), ''), 'none'), \
     coalesce(to_regclass('pg_temp.ledger_marker')::text, 'none')";

/// How a transaction is to end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Ending {
    Commit,
    /// With the last insert, in one call.
    ExecuteAndCommit,
    Rollback,
    /// A statement fails, and then it is committed: PostgreSQL rolls it back.
    CommitFailed,
    /// Its session is closed.
    Close,
    /// Its caller dies: no call ends it.
    Vanish,
}

/// What a transaction leaves on its connection, for others to find if they can.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mark {
    Nothing,
    Setting,
    SettingAndTable,
}

/// What a caller means to do in one transaction.
#[derive(Debug, Clone, Copy)]
struct Plan {
    n: i64,
    ending: Ending,
    mark: Mark,
    /// Both parts in one call.
    batch: bool,
    /// A third part is inserted and rolled back to a savepoint.
    savepoint: bool,
    /// The call that the caller leaves, counted from 0, and how long after it was made.
    leaves: Option<(u32, Duration)>,
    /// The deadline of the Commit.
    patience: Option<Duration>,
    /// Having left its Commit, the caller makes it again.
    repeats: bool,
}

/// What a caller knows of a transaction that is over for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Known {
    /// It was told so.
    Committed,
    /// It was told so, or never asked for a commit.
    RolledBack,
    /// It asked for a commit, and nobody could say what became of it, or it did not wait for the answer.
    InDoubt,
}

/// Why a transaction did not go as planned.
enum Interruption {
    /// A call was refused.
    Refused(Box<Failure>),
    /// The caller left a call before the answer was there.
    Left,
}

impl From<Failure> for Interruption {
    fn from(failure: Failure) -> Self {
        Self::Refused(Box::new(failure))
    }
}

/// Where a transaction leaves its caller.
enum After {
    /// It never began: nothing ran.
    NotBegun,
    /// The session takes the next.
    Ready,
    /// The session has ended, or is not to be used any more.
    SessionOver,
}

/// A line in a caller's book.
#[derive(Debug)]
struct Entry {
    worker: u32,
    n: i64,
    known: Known,
    commit_token: String,
}

/// What a caller has noted.
#[derive(Debug, Default)]
struct Book {
    entries: Vec<Entry>,
    /// Marks of others that were seen, and own ones that were not.
    foreign: Vec<String>,
    /// Answers that cannot be.
    untrue: Vec<String>,
    /// Refusals, counted.
    heard: BTreeMap<String, u64>,
    /// Calls left.
    left: u64,
    /// Sessions abandoned.
    vanished: u64,
}

/// A transaction under way, as its caller sees it.
struct Attempt<'a> {
    worker: u32,
    session: &'a Session,
    plan: Plan,
    /// Calls made.
    calls: u32,
    /// Whether a call made has asked for the commit.
    committing: bool,
    /// Whether PostgreSQL has answered for something written.
    wrote: bool,
    /// The last one told.
    commit_token: String,
    foreign: Vec<String>,
}

impl<'a> Attempt<'a> {
    fn new(worker: u32, session: &'a Session, plan: Plan) -> Self {
        Self {
            worker,
            session,
            plan,
            calls: 0,
            committing: false,
            wrote: false,
            commit_token: String::new(),
            foreign: Vec::new(),
        }
    }

    /// Runs it as planned.
    async fn run(&mut self) -> Result<Known, Interruption> {
        let session = self.session;
        let found = self.call(session.execute(LOOK)).await?;
        self.compare(&found, &[text("none"), text("none")]);
        self.mark().await?;
        let last: &[i64] = if self.plan.batch {
            &[1, 2]
        } else {
            self.insert(&[1]).await?;
            &[2]
        };
        if self.plan.savepoint {
            self.insert_and_undo().await?;
        }
        self.look_for_own_mark().await?;
        self.committing = self.plan.ending == Ending::ExecuteAndCommit;
        self.insert(last).await?;
        match self.plan.ending {
            Ending::ExecuteAndCommit => Ok(Known::Committed),
            Ending::Commit => self.commit().await,
            Ending::CommitFailed => {
                self.fail().await?;
                self.commit().await
            }
            Ending::Rollback => self.call(session.rollback()).await.map(|_| Known::RolledBack),
            Ending::Close => self.call(session.close()).await.map(|_| Known::RolledBack),
            Ending::Vanish => Ok(Known::RolledBack),
        }
    }

    /// Makes a call, which the caller may leave.
    async fn call<T, E: Into<Interruption>>(
        &mut self,
        call: impl Future<Output = Result<T, E>>,
    ) -> Result<T, Interruption> {
        let number = self.calls;
        self.calls += 1;
        match self.plan.leaves {
            Some((at, after)) if at == number => tokio::select! {
                answer = call => answer.map_err(Into::into),
                () = sleep(after) => Err(Interruption::Left),
            },
            _ => call.await.map_err(Into::into),
        }
    }

    fn marker(&self) -> String {
        format!("{}.{}", self.worker, self.plan.n)
    }

    async fn mark(&mut self) -> Result<(), Interruption> {
        let (session, marker) = (self.session, self.marker());
        if self.plan.mark == Mark::Nothing {
            return Ok(());
        }
        let set = session.statement("SELECT set_config('ledger.marker', $1, false)", vec![text(&marker)]);
        self.call(session.run(set)).await?;
        if self.plan.mark == Mark::SettingAndTable {
            let create = format!("CREATE TEMP TABLE ledger_marker AS SELECT '{marker}' AS marker");
            let created = self.call(session.execute(&create)).await?;
            self.written(created.state.as_ref());
        }
        Ok(())
    }

    async fn look_for_own_mark(&mut self) -> Result<(), Interruption> {
        let (session, marker) = (self.session, self.marker());
        let (sql, own) = match self.plan.mark {
            Mark::Nothing => return Ok(()),
            Mark::Setting => ("SELECT current_setting('ledger.marker', true)", marker),
            Mark::SettingAndTable => {
                let sql = "SELECT concat_ws(' ', current_setting('ledger.marker', true), \
                     (SELECT marker FROM pg_temp.ledger_marker))";
                (sql, format!("{marker} {marker}"))
            }
        };
        let found = self.call(session.execute(sql)).await?;
        self.compare(&found, &[text(&own)]);
        Ok(())
    }

    /// Notes a mark that should not be there, or is missing.
    fn compare(&mut self, found: &pb::ExecuteResponse, expected: &[pb::value::Kind]) {
        let found = first_row(found);
        if found != expected {
            self.foreign.push(format!("{} found {found:?}, not {expected:?}", self.marker()));
        }
    }

    /// Inserts these parts in one call, which commits too when that is asked for.
    async fn insert(&mut self, parts: &[i64]) -> Result<(), Interruption> {
        let session = self.session;
        let (committed, state) = if let [part] = parts {
            let request = pb::ExecuteRequest { commit: self.committing, ..self.row(*part) };
            let inserted = self.call(session.run(request)).await?;
            (inserted.commit, inserted.state)
        } else {
            let request = self.rows(parts);
            let inserted = self.call(session.execute_batch(request)).await?;
            (inserted.commit, inserted.state)
        };
        match committed {
            Some(committed) => self.note_token(&committed.commit_token),
            None => self.written(state.as_ref()),
        }
        Ok(())
    }

    fn row(&self, part: i64) -> pb::ExecuteRequest {
        self.session.statement(INSERT, vec![int(self.worker.into()), int(self.plan.n), int(part)])
    }

    fn rows(&self, parts: &[i64]) -> pb::ExecuteBatchRequest {
        let parameters = |part: &i64| pb::ParameterSet { parameters: self.row(*part).parameters };
        let statement = pb::BatchStatement {
            sql: INSERT.into(),
            parameters: Vec::new(),
            parameter_sets: parts.iter().map(parameters).collect(),
        };
        pb::ExecuteBatchRequest { statements: vec![statement], commit: self.committing, ..Default::default() }
    }

    /// Inserts what a savepoint then undoes.
    async fn insert_and_undo(&mut self) -> Result<(), Interruption> {
        let session = self.session;
        self.call(session.savepoint("undone")).await?;
        self.insert(&[3]).await?;
        self.call(session.rollback_to("undone")).await?;
        if self.plan.n % 2 == 0 {
            self.call(session.release("undone")).await?;
        }
        Ok(())
    }

    /// Fails the transaction, by inserting a part again.
    async fn fail(&mut self) -> Result<(), Interruption> {
        match self.insert(&[1]).await {
            Ok(()) => panic!("{} was inserted twice", self.marker()),
            Err(Interruption::Refused(failure)) if failure.code == Code::AlreadyExists => Ok(()),
            Err(interruption) => Err(interruption),
        }
    }

    async fn commit(&mut self) -> Result<Known, Interruption> {
        self.committing = true;
        let session = self.session;
        let committed = match self.plan.patience {
            None => self.call(session.commit()).await?,
            Some(patience) => self.call(in_time(commit_within(session, patience))).await?,
        };
        self.note_token(&committed.commit_token);
        Ok(Known::Committed)
    }

    /// Notes that something has been written, and the token that goes with it.
    fn written(&mut self, state: Option<&pb::SessionState>) {
        self.wrote = true;
        if let Some(state) = state {
            self.note_token(&state.commit_token);
        }
    }

    fn note_token(&mut self, commit_token: &str) {
        if !commit_token.is_empty() {
            commit_token.clone_into(&mut self.commit_token);
        }
    }

    /// What is known of the transaction by a refusal.
    fn refused(&mut self, failure: &Failure) -> Known {
        let Some(commit) = failure.commit.as_ref().filter(|commit| commit.outcome() == Outcome::Unknown) else {
            return Known::RolledBack;
        };
        self.wrote = true;
        self.note_token(&commit.commit_token);
        Known::InDoubt
    }

    /// What is known of the transaction by a caller that has left a call, and may make it again.
    async fn left(&mut self) -> Known {
        if !self.committing {
            return Known::RolledBack;
        }
        // An Execute that never arrived has left its part out: what is there must not be committed now.
        if self.plan.ending == Ending::ExecuteAndCommit || !self.plan.repeats {
            return Known::InDoubt;
        }
        match self.session.commit().await {
            Ok(committed) => {
                self.note_token(&committed.commit_token);
                Known::Committed
            }
            Err(failure) => self.refused(&failure),
        }
    }
}

/// A call with a deadline: when the caller's own clock is first, it has left the call.
async fn in_time<T>(call: impl Future<Output = Result<T, Status>>) -> Result<T, Interruption> {
    call.await.map_err(|status| {
        let silent = status.get_details_error_info().is_none();
        if silent && matches!(status.code(), Code::Cancelled | Code::DeadlineExceeded) {
            Interruption::Left
        } else {
            Failure::from(status).into()
        }
    })
}

/// Where a refused call leaves its session, with its transaction over.
async fn settle(session: &Session, failure: &Failure) -> After {
    match failure.state.as_ref().map(pb::SessionState::transaction_state) {
        None => After::SessionOver,
        Some(TransactionState::None) => After::Ready,
        Some(TransactionState::Open | TransactionState::Failed | TransactionState::Unspecified) => {
            if session.rollback().await.is_ok() { After::Ready } else { After::SessionOver }
        }
    }
}

/// One caller.
struct Worker {
    number: u32,
    client: SessionServiceClient<Channel>,
    random: StdRng,
    /// Refusals since the last transaction that began.
    refusals: u32,
    book: Book,
}

impl Worker {
    /// Makes transactions, in one session after the other, until all are made.
    async fn work(mut self, next: Arc<AtomicI64>, transactions: i64) -> Book {
        let mut n = next.fetch_add(1, Ordering::Relaxed);
        while n < transactions {
            // One in eight dies in the middle of the session's last transaction; PostgreSQL is rid of it in a second.
            let vanishes = self.random.random_ratio(1, 8);
            let lease_ttl = if vanishes { seconds(1) } else { None };
            let request = pb::BeginSessionRequest { lease_ttl, ..Default::default() };
            let session = Session::begin(self.client.clone(), request).await.unwrap();
            let lasts: u32 = self.random.random_range(1..=10);
            for remaining in (0..lasts).rev() {
                let mut plan = self.plan(n);
                if vanishes && remaining == 0 {
                    plan.ending = Ending::Vanish;
                }
                let after = self.transaction(&session, plan).await;
                if matches!(after, After::NotBegun) {
                    self.pause().await;
                    continue;
                }
                self.refusals = 0;
                n = next.fetch_add(1, Ordering::Relaxed);
                if n >= transactions || matches!(after, After::SessionOver) {
                    break;
                }
            }
            if vanishes {
                self.book.vanished += 1;
            } else {
                session.close().await.unwrap();
            }
        }
        self.book
    }

    fn plan(&mut self, n: i64) -> Plan {
        let random = &mut self.random;
        Plan {
            n,
            ending: match random.random_range(0..100) {
                0..40 => Ending::Commit,
                40..75 => Ending::ExecuteAndCommit,
                75..85 => Ending::Rollback,
                85..95 => Ending::CommitFailed,
                _ => Ending::Close,
            },
            mark: match random.random_range(0..8) {
                0 => Mark::SettingAndTable,
                1..6 => Mark::Setting,
                _ => Mark::Nothing,
            },
            batch: random.random_ratio(1, 3),
            savepoint: random.random_ratio(1, 4),
            leaves: random
                .random_ratio(1, 6)
                .then(|| (random.random_range(0..8), Duration::from_micros(random.random_range(0..20_000)))),
            patience: random.random_ratio(1, 2).then(|| Duration::from_millis(random.random_range(100..400))),
            repeats: random.random_ratio(1, 2),
        }
    }

    /// Makes a transaction and notes what is known of it.
    async fn transaction(&mut self, session: &Session, plan: Plan) -> After {
        let mut attempt = Attempt::new(self.number, session, plan);
        let ran = attempt.run().await;
        let (known, after) = match ran {
            Ok(known) if matches!(plan.ending, Ending::Close | Ending::Vanish) => (known, After::SessionOver),
            Ok(known) => (known, After::Ready),
            Err(Interruption::Refused(failure)) => {
                *self.book.heard.entry(format!("{:?} {}", failure.code, failure.reason)).or_default() += 1;
                if attempt.calls == 1 && failure.advice == Scope::Call {
                    return After::NotBegun;
                }
                (attempt.refused(&failure), settle(session, &failure).await)
            }
            Err(Interruption::Left) => {
                self.book.left += 1;
                // A call that was left may still be on its way, so the session is trusted with no other transaction.
                (attempt.left().await, After::SessionOver)
            }
        };
        self.enter(attempt, known);
        after
    }

    fn enter(&mut self, attempt: Attempt<'_>, known: Known) {
        let Attempt { worker, plan, wrote, commit_token, foreign, .. } = attempt;
        let n = plan.n;
        self.book.foreign.extend(foreign);
        if wrote && commit_token.is_empty() {
            self.book.untrue.push(format!("{worker}.{n} has written, and has no commit token"));
        }
        if known == Known::Committed && plan.ending == Ending::CommitFailed {
            self.book.untrue.push(format!("{worker}.{n} had failed, and was told to be committed"));
        }
        self.book.entries.push(Entry { worker, n, known, commit_token });
    }

    /// Waits, as a caller does that was told to make its call again.
    async fn pause(&mut self) {
        self.refusals += 1;
        assert!(self.refusals < 1000, "worker {} is refused for ever: {:?}", self.number, self.book.heard);
        sleep(Duration::from_millis(self.random.random_range(20..100))).await;
    }
}

/// When the next thing breaks: by the transactions begun, so that a slow machine has as many that go well as a fast one.
struct Weather {
    begun: Arc<AtomicI64>,
    random: StdRng,
    over: CancellationToken,
}

impl Weather {
    /// Waits for so many more transactions, or for the end: whether there is something to break.
    async fn after(&mut self, transactions: Range<i64>) -> bool {
        let due = self.begun.load(Ordering::Relaxed) + self.random.random_range(transactions);
        while self.begun.load(Ordering::Relaxed) < due {
            tokio::select! {
                () = self.over.cancelled() => return false,
                () = sleep(Duration::from_millis(1)) => {}
            }
        }
        true
    }
}

/// Terminates one of the broker's backends now and then, and counts them.
async fn terminate_backends(database: Arc<Database>, mut weather: Weather) -> u64 {
    const TERMINATE: &str = "SELECT count(*) FILTER (WHERE pg_terminate_backend(pid)) FROM (SELECT pid \
         FROM pg_stat_activity WHERE datname = current_database() AND application_name = 'session-broker' \
         ORDER BY random() LIMIT 1) AS unlucky";
    let mut terminated = 0;
    while weather.after(20..60).await {
        let database = database.clone();
        let count = spawn_blocking(move || database.psql(TERMINATE)).await.unwrap();
        terminated += count.parse::<u64>().unwrap();
    }
    terminated
}

/// Cuts a link now and then, just so or in the middle of a COMMIT, and counts them.
async fn cut_links(proxy: Arc<Proxy>, mut weather: Weather) -> u64 {
    let mut cut = 0;
    while weather.after(4..16).await {
        match weather.random.random_range(0..4) {
            0 => proxy.at_next_commit(AtCommit::CutBefore),
            1 | 2 => proxy.at_next_commit(AtCommit::CutAfter),
            _ if !proxy.cut(weather.random.random_range(0..1000)) => continue,
            _ => {}
        }
        cut += 1;
    }
    cut
}

/// The parts that are in the table of each transaction.
fn table(database: &Database) -> HashMap<(u32, i64), String> {
    let sql = "SELECT worker, n, string_agg(part::text, '' ORDER BY part) FROM ledger GROUP BY worker, n";
    let read = |row: &str| {
        let mut fields = row.split('|');
        let mut next = || fields.next().unwrap();
        let transaction = (next().parse::<u32>().unwrap(), next().parse::<i64>().unwrap());
        (transaction, next().to_owned())
    };
    database.psql(sql).lines().map(read).collect()
}

/// What the comparison of the books with the table has shown.
#[derive(Debug, Default)]
struct Audit {
    committed: u64,
    rolled_back: u64,
    /// In doubt, and resolved by their tokens.
    resolved_committed: u64,
    resolved_rolled_back: u64,
    /// In doubt and without a token: nothing had been written that was answered for.
    never_known: u64,
    /// Told to be committed, and not there.
    lost: Vec<String>,
    /// There and not told to be committed, or there by halves, or resolved as what they are not.
    untrue: Vec<String>,
}

impl Audit {
    async fn of(entries: &[Entry], mut table: HashMap<(u32, i64), String>, witness: &Broker) -> Self {
        /// How many transactions there are for each one that is resolved although its end is known.
        const SAMPLE: i64 = 20;

        let mut audit = Self::default();
        for entry in entries {
            let Entry { worker, n, known, commit_token } = entry;
            let parts = table.remove(&(*worker, *n)).unwrap_or_default();
            audit.compare(entry, &parts);
            let outcome = if commit_token.is_empty() || (*known != Known::InDoubt && n % SAMPLE != 0) {
                None
            } else {
                Some(resolved(witness, commit_token).await.outcome())
            };
            let is = if parts.is_empty() { Outcome::RolledBack } else { Outcome::Committed };
            if outcome.is_some_and(|outcome| outcome != is) {
                audit.untrue.push(format!("{entry:?} is there as {parts:?}, and resolved as {outcome:?}"));
            }
            *audit.count(*known, outcome) += 1;
        }
        audit.untrue.extend(table.iter().map(|row| format!("{row:?} was entered by nobody")));
        audit
    }

    fn compare(&mut self, entry: &Entry, parts: &str) {
        match (entry.known, parts) {
            (Known::Committed, "12") | (Known::RolledBack, "") | (Known::InDoubt, "12" | "") => {}
            (Known::Committed, _) => self.lost.push(format!("{entry:?} is there as {parts:?}")),
            (Known::RolledBack | Known::InDoubt, _) => self.untrue.push(format!("{entry:?} is there as {parts:?}")),
        }
    }

    /// Where a transaction is counted.
    fn count(&mut self, known: Known, outcome: Option<Outcome>) -> &mut u64 {
        match (known, outcome) {
            (Known::Committed, _) => &mut self.committed,
            (Known::RolledBack, _) => &mut self.rolled_back,
            (Known::InDoubt, Some(Outcome::Committed)) => &mut self.resolved_committed,
            (Known::InDoubt, Some(_)) => &mut self.resolved_rolled_back,
            (Known::InDoubt, None) => &mut self.never_known,
        }
    }
}

/// Waits until no transaction is left, neither for the broker nor for PostgreSQL.
async fn until_whole(broker: &Broker, database: &Database) -> pb::PoolStatistics {
    let session = broker.session().await;
    let resting = async {
        loop {
            let pool = session.get().await.unwrap().pool.unwrap();
            if (pool.in_use, pool.waiting) == (0, 0) {
                break pool;
            }
            sleep(Duration::from_millis(20)).await;
        }
    };
    let pool = timeout(Duration::from_secs(30), resting).await.expect("the pool comes to rest");
    let open = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() \
         AND application_name = 'session-broker' AND xact_start IS NOT NULL";
    database.wait_for(open, "0");
    pool
}

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |text| text.parse().unwrap())
}

fn say(line: &str) {
    let _ = std::io::Write::write_all(&mut std::io::stderr(), format!("{line}\n").as_bytes());
}

/// Runs the transactions through `broker`, and all that breaks beside them. Returns the callers' books together, the
/// backends terminated and the links cut.
async fn bad_day(
    broker: &Broker,
    proxy: &Arc<Proxy>,
    database: &Arc<Database>,
    transactions: i64,
    seed: u64,
) -> (Book, u64, u64) {
    let over = CancellationToken::new();
    let random = |part: u32| StdRng::seed_from_u64(seed.wrapping_add(part.into()));
    let next = Arc::new(AtomicI64::new(0));
    let weather = |part| Weather { begun: next.clone(), random: random(part), over: over.clone() };
    let terminating = tokio::spawn(terminate_backends(database.clone(), weather(WORKERS)));
    let cutting = tokio::spawn(cut_links(proxy.clone(), weather(WORKERS + 1)));
    let clients: Vec<_> = (0..CHANNELS).map(|_| broker.client()).collect();
    let mut workers = JoinSet::new();
    for (worker, client) in (0..WORKERS).zip(clients.iter().cycle()) {
        let (client, random) = (client.clone(), random(worker));
        let worker = Worker { number: worker, client, random, refusals: 0, book: Book::default() };
        workers.spawn(worker.work(next.clone(), transactions));
    }
    let mut all = Book::default();
    for book in workers.join_all().await {
        let Book { entries, foreign, untrue, heard, left, vanished } = book;
        all.entries.extend(entries);
        all.foreign.extend(foreign);
        all.untrue.extend(untrue);
        for (said, times) in heard {
            *all.heard.entry(said).or_default() += times;
        }
        all.left += left;
        all.vanished += vanished;
    }
    over.cancel();
    (all, terminating.await.unwrap(), cutting.await.unwrap())
}

#[tokio::test(flavor = "multi_thread")]
async fn every_commit_told_is_there_and_nothing_else_is_whatever_breaks() {
    let (transactions, seed) = (number("LEDGER_TRANSACTIONS", 500), number("LEDGER_SEED", 20_261_122));
    say(&format!("ledger: LEDGER_TRANSACTIONS={transactions} LEDGER_SEED={seed}"));
    let database = Arc::new(Database::create());
    database.psql(
        "CREATE TABLE ledger (worker int, n bigint, part int, PRIMARY KEY (worker, n, part)); \
         ALTER TABLE ledger OWNER TO broker",
    );
    let proxy = Arc::new(Proxy::start(&database.url(), Duration::ZERO).await);
    let broker = Broker::start_at(&proxy.url, ENGINE, "").await;
    let count = i64::try_from(transactions).unwrap();
    let (mut book, terminated, cut) = bad_day(&broker, &proxy, &database, count, seed).await;
    let pool = until_whole(&broker, &database).await;
    let witness = Broker::start(&database).await;
    let mut audit = Audit::of(&book.entries, table(&database), &witness).await;
    audit.untrue.append(&mut book.untrue);
    let Audit { committed, rolled_back, resolved_committed, resolved_rolled_back, never_known, lost, untrue } = &audit;
    let Book { entries, foreign, heard, left, vanished, .. } = &book;
    say(&format!(
        "ledger: {} transactions: {committed} committed, {rolled_back} rolled back, in doubt and resolved: \
         {resolved_committed} committed, {resolved_rolled_back} rolled back; {never_known} in doubt without a token\n\
         ledger: {left} calls left, {vanished} sessions abandoned, {terminated} backends terminated, {cut} links cut\n\
         ledger: {} lost, {} foreign, {} false; {heard:?}; {pool:?}",
        entries.len(),
        lost.len(),
        foreign.len(),
        untrue.len(),
    ));
    assert!(lost.is_empty(), "lost: {lost:#?}");
    assert!(foreign.is_empty(), "foreign: {foreign:#?}");
    assert!(untrue.is_empty(), "false: {untrue:#?}");
    // Nobody hears of a defect, and most work is done.
    let expected = ["Aborted", "Unavailable", "ResourceExhausted", "Unknown COMMIT_UNKNOWN"];
    assert!(heard.keys().all(|said| expected.iter().any(|known| said.starts_with(known))), "{heard:?}");
    assert_eq!(u64::try_from(entries.len()).unwrap(), transactions);
    assert!(*committed > transactions / 4, "{committed} committed");
    assert!(pool.open <= pool.size + pool.overflow_max, "{pool:?}");
    broker.stop().await;
}
