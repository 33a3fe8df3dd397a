//! Interact: a session on one stream. What is pipelined is answered in order, nothing runs behind a failure unasked,
//! and the session goes with its stream. On a real PostgreSQL; exact times on the fake engine under a paused clock.

use std::sync::Arc;
use std::time::Duration;

use futures_util::stream;
use prost::Message;
use session_broker::broker::error::{EndReason as Reason, Error};
use session_broker::broker::profile::{Limits, Profile};
use session_broker::broker::session::TransactionState as Standing;
use session_broker::broker::session::interact::Interaction;
use session_broker::grpc::pb;
use session_broker::grpc::pb::session_service_client::SessionServiceClient;
use tokio::sync::{Barrier, mpsc};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep};
use tonic::transport::{Channel, Endpoint};
use tonic::{CancellationHandle, Code, Request, Status, Streaming};

use crate::batches::{SLEEPING, batch, one, parameters, place};
use crate::fake_engine::Gates;
use crate::leases::{begin, broker, call, settle};
use crate::proxy::Proxy;
use crate::streams::ACTIVE;
use crate::support::{Broker, Database, Failure, Session, first_row, int, kinds_of, millis, text, until};
use pb::interact_request::Request as Asked;
use pb::interact_response::Response as Answer;
use pb::{EndReason, Outcome, ResultFormat, TransactionState};

const SECOND: Duration = Duration::from_secs(1);

const UPDATE: &str = "UPDATE accounts SET balance = 7 WHERE id = 1";

/// One that fails when it runs.
const FAILING: &str = "SELECT 1 / 0";

/// Far shorter than the lease.
const BRIEF_GRACE: &str = "[profiles.default]\ndisconnect_grace = \"200ms\"";

/// A caller's end of a stream.
#[derive(Debug)]
struct Line {
    requests: mpsc::UnboundedSender<pb::InteractRequest>,
    answers: Streaming<pb::InteractResponse>,
    cancellation: CancellationHandle,
}

impl Line {
    /// Opens a stream with its first message, and hears the answer to that.
    async fn open(client: SessionServiceClient<Channel>, first: Asked) -> Result<(Self, Answer), Failure> {
        Self::open_within(client, first, None).await
    }

    /// The same, with a gRPC deadline for the stream.
    async fn open_within(
        mut client: SessionServiceClient<Channel>,
        first: Asked,
        deadline: Option<Duration>,
    ) -> Result<(Self, Answer), Failure> {
        let (requests, sent) = mpsc::unbounded_channel();
        requests.send(message(first)).unwrap();
        let sent = stream::unfold(sent, async |mut sent: mpsc::UnboundedReceiver<pb::InteractRequest>| {
            Some((sent.recv().await?, sent))
        });
        let mut request = Request::new(sent);
        if let Some(deadline) = deadline {
            request.set_timeout(deadline);
        }
        let cancellation = request.cancellation_handle();
        let answers = client.interact(request).await?.into_inner();
        let mut line = Self { requests, answers, cancellation };
        let answer = line.answer().await?;
        Ok((line, answer))
    }

    /// A stream that begins its session, and the session as it is for other calls.
    async fn begin(broker: &Broker) -> (Self, Session) {
        Self::begin_with(broker.client(), pb::BeginSessionRequest::default()).await
    }

    async fn begin_with(client: SessionServiceClient<Channel>, begin: pb::BeginSessionRequest) -> (Self, Session) {
        let (line, answer) = Self::open(client.clone(), Asked::BeginSession(begin)).await.unwrap();
        let Answer::BeginSession(begun) = answer else { panic!("{answer:?}") };
        assert!(begun.state.unwrap().attached);
        (line, Session { client, token: begun.session_token, id: begun.session_id })
    }

    /// A stream of a session that is there.
    async fn of(session: &Session) -> Result<Self, Failure> {
        let (line, answer) = Self::open(session.client.clone(), Asked::SessionToken(session.token.clone())).await?;
        let Answer::SessionState(state) = answer else { panic!("{answer:?}") };
        assert!(state.attached);
        Ok(line)
    }

    fn send(&self, asked: Asked) {
        self.requests.send(message(asked)).unwrap();
    }

    /// The next answer, or the failure in its place.
    async fn answer(&mut self) -> Result<Answer, Failure> {
        let answer = self.answers.message().await?.expect("the stream goes on");
        match answer.response.expect("every message has a response") {
            Answer::Failure(failure) => Err(failed(&failure)),
            answer => Ok(answer),
        }
    }

    async fn ask(&mut self, asked: Asked) -> Result<Answer, Failure> {
        self.send(asked);
        self.answer().await
    }

    /// The same, by somebody who has read of the failure.
    async fn resume(&mut self, asked: Asked) -> Result<Answer, Failure> {
        self.requests.send(pb::InteractRequest { request: Some(asked), resume: true }).unwrap();
        self.answer().await
    }

    async fn run(&mut self, sql: &str) -> Result<pb::ExecuteResponse, Failure> {
        self.ask(execute(sql)).await.map(executed)
    }

    /// The next answer says that nothing was done behind a failure.
    async fn is_aborted(&mut self) -> Failure {
        let failure = self.answer().await.unwrap_err();
        assert_eq!((failure.code, failure.reason.as_str()), (Code::FailedPrecondition, "PIPELINE_ABORTED"));
        failure
    }

    /// Says that this was all: nothing comes behind what has been read, and the stream ends well.
    async fn finish(self) {
        let Self { requests, mut answers, cancellation: _ } = self;
        drop(requests);
        assert_eq!(answers.message().await.unwrap(), None);
    }

    /// What the stream ends with, when not with OK.
    async fn ended(&mut self) -> Failure {
        self.answers.message().await.unwrap_err().into()
    }

    fn cancel(self) {
        self.cancellation.cancel();
    }
}

fn message(asked: Asked) -> pb::InteractRequest {
    pb::InteractRequest { request: Some(asked), resume: false }
}

/// A failure as the unary call's status would have been.
fn failed(failure: &pb::Failure) -> Failure {
    Status::with_details(failure.code.into(), failure.message.clone(), failure.encode_to_vec().into()).into()
}

fn begin_session() -> Asked {
    Asked::BeginSession(pb::BeginSessionRequest::default())
}

fn statement(sql: &str) -> pb::ExecuteRequest {
    pb::ExecuteRequest { sql: sql.into(), ..Default::default() }
}

fn execute(sql: &str) -> Asked {
    Asked::Execute(statement(sql))
}

fn execute_and_commit(sql: &str) -> Asked {
    Asked::Execute(pb::ExecuteRequest { commit: true, ..statement(sql) })
}

fn commit() -> Asked {
    Asked::Commit(pb::CommitRequest::default())
}

fn rollback() -> Asked {
    rollback_to("")
}

fn rollback_to(savepoint: &str) -> Asked {
    Asked::Rollback(pb::RollbackRequest { savepoint: savepoint.into(), ..Default::default() })
}

fn savepoint(name: &str) -> Asked {
    Asked::CreateSavepoint(pb::CreateSavepointRequest { name: name.into(), ..Default::default() })
}

fn release(name: &str) -> Asked {
    Asked::ReleaseSavepoint(pb::ReleaseSavepointRequest { name: name.into(), ..Default::default() })
}

fn executed(answer: Answer) -> pb::ExecuteResponse {
    let Answer::Execute(executed) = answer else { panic!("{answer:?}") };
    executed
}

fn state_of(answer: Answer) -> TransactionState {
    let state = match answer {
        Answer::SessionState(state) => Some(state),
        Answer::BeginSession(answer) => answer.state,
        Answer::Execute(answer) => answer.state,
        Answer::ExecuteBatch(answer) => answer.state,
        Answer::Commit(answer) => answer.state,
        Answer::Rollback(answer) => answer.state,
        Answer::CreateSavepoint(answer) => answer.state,
        Answer::ReleaseSavepoint(answer) => answer.state,
        Answer::Failure(failure) => panic!("{failure:?}"),
    };
    state.unwrap().transaction_state()
}

/// Has psql write the row that [`UPDATE`] has locked. It waits for the lock, for less than a lease or a grace.
fn take_the_lock(database: &Database) {
    database.psql("SET lock_timeout = '3s'; UPDATE accounts SET balance = balance + 1 WHERE id = 1");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_session_begins_works_and_ends_on_one_stream() {
    let database = Database::create();
    let broker = Broker::start(&database).await;
    let (mut line, session) = Line::begin(&broker).await;
    let open = line.run(UPDATE).await.unwrap();
    assert_eq!((open.row_count, open.state.unwrap().transaction_state()), (1, TransactionState::Open));
    let Answer::Commit(committed) = line.ask(commit()).await.unwrap() else { panic!("not committed") };
    assert_eq!(committed.outcome(), Outcome::Committed);
    assert_eq!(broker.resolve(&committed.commit_token).await.unwrap().outcome(), Outcome::Committed);
    let both = executed(line.ask(execute_and_commit("UPDATE accounts SET balance = 8 WHERE id = 2")).await.unwrap());
    assert_eq!(both.commit.unwrap().outcome(), Outcome::Committed);
    assert_eq!(both.state.unwrap().transaction_state(), TransactionState::None);
    line.run("UPDATE accounts SET balance = 9").await.unwrap();
    assert_eq!(state_of(line.ask(rollback()).await.unwrap()), TransactionState::None);
    assert_eq!(database.balances(), "7 8");
    line.finish().await;
    assert_eq!(session.ended().await, EndReason::Closed);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_pipelined_is_answered_in_order() {
    const COUNT: i64 = 500;

    let database = Database::create();
    let broker = Broker::start(&database).await;
    // All is said before anything is heard.
    let selects = (1..=COUNT).map(|n| {
        let commit = n % 10 == 0;
        Asked::Execute(pb::ExecuteRequest {
            commit,
            parameters: parameters(vec![int(n)]),
            ..statement("SELECT $1::int8")
        })
    });
    let messages: Vec<_> = std::iter::once(begin_session()).chain(selects).map(message).collect();
    let mut answers = broker.client().interact(stream::iter(messages)).await.unwrap().into_inner();
    let first = answers.message().await.unwrap().unwrap().response.unwrap();
    assert!(matches!(first, Answer::BeginSession(_)));
    for n in 1..=COUNT {
        let answer = executed(answers.message().await.unwrap().unwrap().response.unwrap());
        assert_eq!((first_row(&answer), answer.commit.is_some()), (vec![int(n)], n % 10 == 0));
    }
    assert_eq!(answers.message().await.unwrap(), None);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_statement_behind_a_failed_one_never_commits_alone() {
    let database = Database::create();
    let broker = Broker::start(&database).await;
    let (mut line, _) = Line::begin(&broker).await;
    let unknown_class = pb::ExecuteRequest { class: "nosuch".into(), ..statement("SELECT 1") };
    let too_few = pb::ExecuteRequest { parameters: parameters(vec![int(1)]), ..statement("SELECT 1") };
    let too_long = pb::ExecuteRequest { timeout: millis(50), ..statement("SELECT pg_sleep(60)") };
    let gap = pb::ExecuteRequest { seq: 9, ..statement("SELECT 1") };
    for (failing, reason, left) in [
        (execute(FAILING), "DATABASE_ERROR", TransactionState::Failed),
        // These leave no transaction to be refused by.
        (execute_and_commit(FAILING), "DATABASE_ERROR", TransactionState::None),
        (execute("COMMIT"), "INVALID_REQUEST", TransactionState::None),
        (execute(""), "INVALID_REQUEST", TransactionState::None),
        (Asked::Execute(unknown_class), "INVALID_REQUEST", TransactionState::None),
        (Asked::Execute(too_few), "INVALID_REQUEST", TransactionState::None),
        (Asked::Execute(gap), "SEQ_GAP", TransactionState::None),
        (rollback_to("nosuch"), "INVALID_REQUEST", TransactionState::None),
        (release("nosuch"), "INVALID_REQUEST", TransactionState::None),
        (Asked::ExecuteBatch(batch(Vec::new())), "INVALID_REQUEST", TransactionState::None),
        (Asked::Execute(too_long), "STATEMENT_TIMEOUT", TransactionState::Failed),
    ] {
        line.send(failing);
        line.send(execute(UPDATE));
        line.send(execute_and_commit("UPDATE accounts SET balance = 8 WHERE id = 2"));
        line.send(Asked::ExecuteBatch(pb::ExecuteBatchRequest { commit: true, ..batch(vec![one(UPDATE)]) }));
        line.send(savepoint("a"));
        line.send(commit());
        line.send(rollback());
        let failure = line.answer().await.unwrap_err();
        assert_eq!((failure.reason.as_str(), failure.transaction_state()), (reason, left), "{failure:?}");
        for _ in 0..5 {
            assert_eq!(line.is_aborted().await.transaction_state(), left, "{reason}");
        }
        assert_eq!(state_of(line.answer().await.unwrap()), TransactionState::None);
        assert_eq!(database.balances(), "100 100", "{reason}");
    }
    // Rolled back, it goes on as if nothing had been.
    line.ask(execute_and_commit(UPDATE)).await.unwrap();
    assert_eq!(database.balances(), "7 100");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_statement_that_found_no_connection_is_not_followed_by_one_that_does() {
    let database = Database::create();
    let broker = Broker::start_with(&database, "pool_size = 1\nmax_overflow = 0\npool_timeout = \"100ms\"", "").await;
    let holding = broker.session().await;
    holding.execute("SELECT 1").await.unwrap();
    let (mut line, _) = Line::begin(&broker).await;
    let failure = line.run("UPDATE accounts SET balance = 0 WHERE id = 2").await.unwrap_err();
    assert_eq!((failure.reason.as_str(), failure.transaction_state()), ("POOL_EXHAUSTED", TransactionState::None));
    holding.rollback().await.unwrap();
    // What was on its way when the connection came free.
    line.send(execute_and_commit(UPDATE));
    line.is_aborted().await;
    assert_eq!(database.balances(), "100 100");
    line.resume(execute_and_commit(UPDATE)).await.unwrap();
    assert_eq!(database.balances(), "7 100");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_caller_that_knows_of_the_failure_goes_on_in_the_transaction() {
    let database = Database::create();
    let broker = Broker::start(&database).await;
    let (mut line, _) = Line::begin(&broker).await;
    line.run(UPDATE).await.unwrap();
    // Nothing of it runs, and the transaction stands.
    let refused = line.run("ROLLBACK").await.unwrap_err();
    assert_eq!((refused.code, refused.transaction_state()), (Code::InvalidArgument, TransactionState::Open));
    line.send(commit());
    assert_eq!(line.is_aborted().await.transaction_state(), TransactionState::Open);
    line.resume(execute("UPDATE accounts SET balance = 8 WHERE id = 2")).await.unwrap();
    // Said once, it holds until the next failure.
    line.ask(commit()).await.unwrap();
    assert_eq!(database.balances(), "7 8");
    // PostgreSQL refuses a failed transaction however much its caller knows.
    line.run(FAILING).await.unwrap_err();
    let refused = line.resume(execute("SELECT 1")).await.unwrap_err();
    assert_eq!(refused.metadata["sqlstate"], "25P02");
    line.send(execute("SELECT 1"));
    line.is_aborted().await;
    let failure = line.resume(commit()).await.unwrap_err();
    assert_eq!((failure.code, failure.reason.as_str()), (Code::Aborted, "COMMIT_ROLLED_BACK"));
    assert_eq!(failure.commit.unwrap().outcome(), Outcome::RolledBack);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_caller_that_waits_for_each_answer_may_always_say_that_it_knows() {
    let database = Database::create();
    let broker = Broker::start(&database).await;
    let (mut line, _) = Line::begin(&broker).await;
    line.resume(execute_and_commit(FAILING)).await.unwrap_err();
    line.resume(execute_and_commit(UPDATE)).await.unwrap();
    line.resume(execute("COMMIT")).await.unwrap_err();
    line.resume(execute_and_commit("UPDATE accounts SET balance = 8 WHERE id = 2")).await.unwrap();
    assert_eq!(database.balances(), "7 8");
}

#[tokio::test(flavor = "multi_thread")]
async fn going_back_to_a_savepoint_undoes_a_failure_and_to_an_unknown_one_does_not() {
    let database = Database::create();
    let broker = Broker::start(&database).await;
    let (mut line, _) = Line::begin(&broker).await;
    for asked in [
        savepoint("a"),
        execute(UPDATE),
        savepoint("b"),
        execute(FAILING),
        execute("UPDATE accounts SET balance = 0"),
        rollback_to("nosuch"),
        execute("UPDATE accounts SET balance = 0"),
        rollback_to("b"),
        release("a"),
        commit(),
    ] {
        line.send(asked);
    }
    for expected in [TransactionState::Open; 3] {
        assert_eq!(state_of(line.answer().await.unwrap()), expected);
    }
    assert_eq!(line.answer().await.unwrap_err().transaction_state(), TransactionState::Failed);
    line.is_aborted().await;
    let unknown = line.answer().await.unwrap_err();
    assert_eq!((unknown.code, unknown.field.as_deref()), (Code::InvalidArgument, Some("savepoint")), "{unknown:?}");
    line.is_aborted().await;
    for expected in [TransactionState::Open, TransactionState::Open, TransactionState::None] {
        assert_eq!(state_of(line.answer().await.unwrap()), expected);
    }
    assert_eq!(database.balances(), "7 100");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failure_has_all_that_the_unary_calls_status_has() {
    let database = Database::create();
    let broker = Broker::start(&database).await;
    let session = broker.session().await;
    let (mut line, _) = Line::begin(&broker).await;
    for sql in [FAILING, "SELECT nope FROM accounts", "INSERT INTO accounts VALUES (1, 1)", "BEGIN"] {
        let unary = session.execute(sql).await.unwrap_err();
        let failure = line.run(sql).await.unwrap_err();
        assert_eq!((failure.code, &failure.message), (unary.code, &unary.message));
        assert_eq!((failure.reason, failure.advice), (unary.reason, unary.advice));
        assert_eq!((failure.metadata, failure.field), (unary.metadata, unary.field));
        assert_eq!(failure.pg_error, unary.pg_error);
        let states = [failure.state, unary.state].map(|state| state.unwrap().transaction_state());
        assert_eq!(states[0], states[1], "{sql}");
        session.rollback().await.unwrap();
        line.ask(rollback()).await.unwrap();
    }
    let statements = vec![one("SELECT 1"), one(FAILING), one("SELECT 2")];
    let failure = line.ask(Asked::ExecuteBatch(batch(statements))).await.unwrap_err();
    assert_eq!(place(&failure), (Some("1"), None));
}

#[tokio::test(flavor = "multi_thread")]
async fn results_and_limits_are_those_of_execute() {
    let database = Database::create();
    let broker = Broker::start(&database).await;
    let session = broker.session().await;
    let (mut line, _) = Line::begin(&broker).await;
    let kinds = || vec![int(5), text("né"), text("1.50")];
    let sql = "SELECT $1::int4 AS a, $2::text AS b, $3::numeric AS c, NULL::bool, ARRAY[1, NULL], '\\x00ff'::bytea";
    for format in [ResultFormat::Values, ResultFormat::Packed] {
        let request = pb::ExecuteRequest { result_format: format.into(), ..session.statement(sql, kinds()) };
        let unary = session.run(request.clone()).await.unwrap();
        let request = pb::ExecuteRequest { session_token: String::new(), ..request };
        let answer = executed(line.ask(Asked::Execute(request)).await.unwrap());
        assert_eq!((answer.columns, answer.rows, answer.packed_rows), (unary.columns, unary.rows, unary.packed_rows));
        assert_eq!((answer.row_count, answer.command_tag), (unary.row_count, unary.command_tag));
    }
    let Answer::ExecuteBatch(batched) = line.ask(Asked::ExecuteBatch(batch(vec![one("SELECT 1"); 3]))).await.unwrap()
    else {
        panic!("no batch")
    };
    assert_eq!(batched.results.len(), 3);
    for sql in ["SELECT repeat('x', 4000000)", "SELECT generate_series(1, 10001)"] {
        let failure = line.run(sql).await.unwrap_err();
        assert_eq!((failure.code, failure.reason.as_str()), (Code::ResourceExhausted, "RESULT_TOO_LARGE"), "{sql}");
        line.ask(rollback()).await.unwrap();
    }
    let failure = line
        .ask(Asked::Execute(pb::ExecuteRequest { max_rows: 1, ..statement("SELECT id FROM accounts") }))
        .await
        .unwrap_err();
    assert_eq!(failure.reason, "RESULT_TOO_LARGE");
}

#[tokio::test(flavor = "multi_thread")]
async fn messages_of_any_size_come_whole_and_in_order() {
    let database = Database::create();
    let broker = Broker::start(&database).await;
    let (mut line, _) = Line::begin(&broker).await;
    let lengths = [0, 1, 16_384, 70_000, 3_000_000, 5, 8_000_000, 0, 1_000_000];
    for length in lengths {
        let parameters = parameters(vec![text(&"x".repeat(length))]);
        line.send(Asked::Execute(pb::ExecuteRequest { parameters, ..statement("SELECT length($1::text)") }));
    }
    for length in lengths {
        let answer = executed(line.answer().await.unwrap());
        assert_eq!(first_row(&answer), [int(i64::try_from(length).unwrap())]);
    }
    // What is larger than a request may be ends the stream.
    let parameters = parameters(vec![text(&"x".repeat(17_000_000))]);
    line.send(Asked::Execute(pb::ExecuteRequest { parameters, ..statement("SELECT length($1::text)") }));
    assert_eq!(line.answers.message().await.unwrap_err().code(), Code::OutOfRange);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_numbered_statement_that_comes_again_is_answered_again() {
    let database = Database::create();
    let broker = Broker::start(&database).await;
    let (mut line, _) = Line::begin(&broker).await;
    let sql = "UPDATE accounts SET balance = balance + 1 WHERE id = 1 RETURNING balance";
    let numbered = || Asked::Execute(pb::ExecuteRequest { seq: 1, commit: true, ..statement(sql) });
    line.send(numbered());
    line.send(numbered());
    for _ in 0..2 {
        let answer = executed(line.answer().await.unwrap());
        assert_eq!((first_row(&answer), answer.commit.unwrap().outcome()), (vec![text("101")], Outcome::Committed));
    }
    assert_eq!(database.balances(), "101 100");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_that_is_half_closed_within_a_transaction_rolls_it_back() {
    let database = Database::create();
    let broker = Broker::start(&database).await;
    let (mut line, session) = Line::begin(&broker).await;
    line.run(UPDATE).await.unwrap();
    line.finish().await;
    take_the_lock(&database);
    assert_eq!(session.ended().await, EndReason::Disconnected);
    assert_eq!(database.balances(), "101 100");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_that_is_cancelled_takes_its_session_along_at_once() {
    let database = Database::create();
    let broker = Broker::start(&database).await;
    for sql in [None, Some(UPDATE)] {
        let (mut line, session) = Line::begin(&broker).await;
        if let Some(sql) = sql {
            line.run(sql).await.unwrap();
        }
        line.cancel();
        take_the_lock(&database);
        assert_eq!(session.ended().await, EndReason::Disconnected);
    }
    assert_eq!(database.balances(), "102 100");
    assert_eq!(database.open_transactions(), "0");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_that_is_cancelled_within_a_statement_has_it_stopped() {
    let database = Database::create();
    let broker = Broker::start(&database).await;
    for (first, reason) in [
        (execute("SELECT pg_sleep(60)"), "SESSION_ENDED"),
        (execute_and_commit("SELECT pg_sleep(60)"), "COMMIT_ROLLED_BACK"),
    ] {
        let (mut line, session) = Line::begin(&broker).await;
        line.run(UPDATE).await.unwrap();
        line.send(first);
        line.send(commit());
        database.wait_for(SLEEPING, "1");
        line.cancel();
        database.wait_for(SLEEPING, "0");
        take_the_lock(&database);
        assert_eq!(session.ended().await, EndReason::Disconnected);
        assert_eq!(session.commit().await.unwrap_err().reason, reason);
    }
    assert_eq!(database.balances(), "102 100");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_commit_under_way_outlives_its_stream_and_its_outcome_is_told() {
    for asked in [commit(), execute_and_commit("SELECT 1")] {
        let database = Database::create();
        database.doze_at_commit(1);
        let broker = Broker::start(&database).await;
        let (mut line, session) = Line::begin(&broker).await;
        line.run(UPDATE).await.unwrap();
        line.send(asked);
        database.wait_for(SLEEPING, "1");
        line.cancel();
        assert_eq!(session.ended().await, EndReason::Disconnected);
        // It is unknown until PostgreSQL has answered.
        until(async || session.commit().await.is_ok()).await;
        assert_eq!(session.commit().await.unwrap().outcome(), Outcome::Committed);
        assert_eq!(database.balances(), "7 100");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_caller_whose_connection_is_cut_takes_its_session_along() {
    let database = Database::create();
    let broker = Broker::start(&database).await;
    let proxy = Proxy::start(&format!("postgresql://x@{}/db", broker.address), Duration::ZERO).await;
    let address = proxy.url.split(['@', '/']).nth(3).unwrap();
    let endpoint = Endpoint::from_shared(format!("http://{address}")).unwrap();
    let client = SessionServiceClient::new(endpoint.connect_lazy());
    let (mut line, far) = Line::begin_with(client, pb::BeginSessionRequest::default()).await;
    let near = Session { client: broker.client(), ..far };
    line.run(UPDATE).await.unwrap();
    line.send(execute("SELECT pg_sleep(60)"));
    database.wait_for(SLEEPING, "1");
    assert!(proxy.cut(0));
    database.wait_for(SLEEPING, "0");
    take_the_lock(&database);
    assert_eq!(near.ended().await, EndReason::Disconnected);
    assert_eq!(database.balances(), "101 100");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_session_that_was_there_before_outlives_a_stream_that_is_half_closed() {
    let database = Database::create();
    let broker = Broker::start(&database).await;
    let session = broker.session().await;
    session.execute(UPDATE).await.unwrap();
    let mut line = Line::of(&session).await.unwrap();
    let seen = line.run("SELECT balance FROM accounts WHERE id = 1").await.unwrap();
    assert_eq!(first_row(&seen), [text("7")]);
    line.finish().await;
    let state = session.execute("SELECT 1").await.unwrap().state.unwrap();
    assert_eq!((state.attached, state.transaction_state()), (false, TransactionState::Open));
    session.commit().await.unwrap();
    assert_eq!(database.balances(), "7 100");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_session_that_was_there_before_has_the_grace_when_its_caller_is_gone() {
    let database = Database::create();
    let broker = Broker::start_with(&database, "", BRIEF_GRACE).await;
    let session = broker.session().await;
    let mut line = Line::of(&session).await.unwrap();
    line.run(UPDATE).await.unwrap();
    line.cancel();
    take_the_lock(&database);
    assert_eq!(session.ended().await, EndReason::Disconnected);
    // Of one that has ended, or that never was, there is no stream.
    assert_eq!(Line::of(&session).await.unwrap_err().end_reason(), "END_REASON_DISCONNECTED");
    let unknown = Session { token: format!("broker.{}.{}", "0".repeat(32), "0".repeat(32)), ..session };
    let refused = Line::of(&unknown).await.unwrap_err();
    assert_eq!((refused.code, refused.reason.as_str()), (Code::NotFound, "SESSION_UNKNOWN"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_session_has_one_stream_at_a_time() {
    let database = Database::create();
    let broker = Broker::start(&database).await;
    let (mut line, session) = Line::begin(&broker).await;
    for refused in [Line::of(&session).await.unwrap_err(), session.attach().await.unwrap_err()] {
        assert_eq!((refused.code, refused.reason.as_str()), (Code::FailedPrecondition, "ALREADY_ATTACHED"));
    }
    line.run("SELECT 1").await.unwrap();
    let attached = broker.session().await;
    let events = attached.attach().await.unwrap();
    assert_eq!(Line::of(&attached).await.unwrap_err().reason, "ALREADY_ATTACHED");
    drop(events);
    until(async || !attached.get().await.unwrap().state.unwrap().attached).await;
    Line::of(&attached).await.unwrap().finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn calls_beside_the_stream_have_their_turn_and_cancel_stops_its_statement() {
    let database = Database::create();
    let broker = Broker::start(&database).await;
    let (mut line, session) = Line::begin(&broker).await;
    line.run(UPDATE).await.unwrap();
    let beside = session.execute("SELECT balance FROM accounts WHERE id = 1").await.unwrap();
    assert_eq!(first_row(&beside), [text("7")]);
    let streamed = session.stream(session.streaming("SELECT id FROM accounts ORDER BY id", Vec::new())).await;
    assert_eq!(streamed.rows(), [[int(1)], [int(2)]]);
    line.send(execute("SELECT pg_sleep(60)"));
    line.send(commit());
    database.wait_for(SLEEPING, "1");
    assert!(session.cancel().await.unwrap().cancelled);
    let stopped = line.answer().await.unwrap_err();
    assert_eq!((stopped.code, stopped.reason.as_str()), (Code::Cancelled, "CANCELLED"));
    line.is_aborted().await;
    line.ask(rollback()).await.unwrap();
    assert_eq!(database.balances(), "100 100");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_message_that_finds_the_sessions_queue_full_fails_like_a_call() {
    let database = Database::create();
    let broker = Broker::start_with(&database, "", "[profiles.default]\nsession_queue_max = 1").await;
    let (mut line, session) = Line::begin(&broker).await;
    let running = tokio::spawn({
        let session = session.clone();
        async move { session.execute("SELECT pg_sleep(60)").await }
    });
    database.wait_for(SLEEPING, "1");
    let refused = line.run("SELECT 1").await.unwrap_err();
    assert_eq!((refused.code, refused.reason.as_str()), (Code::ResourceExhausted, "SESSION_QUEUE_FULL"));
    line.send(execute("SELECT 1"));
    line.is_aborted().await;
    session.cancel().await.unwrap();
    assert_eq!(running.await.unwrap().unwrap_err().reason, "CANCELLED");
    line.ask(rollback()).await.unwrap();
    line.run("SELECT 1").await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_says_first_and_once_which_session_it_is_for() {
    let database = Database::create();
    let broker = Broker::start(&database).await;
    let refused = async |messages: Vec<pb::InteractRequest>| {
        Failure::from(broker.client().interact(stream::iter(messages)).await.unwrap_err())
    };
    let empty = refused(Vec::new()).await;
    let without = refused(vec![message(commit())]).await;
    let nothing = refused(vec![pb::InteractRequest::default(), message(begin_session())]).await;
    let request_id = pb::BeginSessionRequest { request_id: "again".into(), ..Default::default() };
    let named = Line::open(broker.client(), Asked::BeginSession(request_id)).await.unwrap_err();
    let nosuch = pb::BeginSessionRequest { engine: "nosuch".into(), ..Default::default() };
    let nosuch = Line::open(broker.client(), Asked::BeginSession(nosuch)).await.unwrap_err();
    let malformed = Line::open(broker.client(), Asked::SessionToken("nonsense".into())).await.unwrap_err();
    for (refused, field) in [
        (empty, "request"),
        (without, "request"),
        (nothing, "request"),
        (named, "begin_session.request_id"),
        (nosuch, "engine"),
        (malformed, "session_token"),
    ] {
        assert_eq!((refused.code, refused.field.as_deref()), (Code::InvalidArgument, Some(field)), "{refused:?}");
    }
    let (mut line, session) = Line::begin(&broker).await;
    line.run(UPDATE).await.unwrap();
    let own = pb::ExecuteRequest { session_token: session.token.clone(), ..statement("SELECT 1") };
    for (asked, field) in [
        (Some(begin_session()), "request"),
        (Some(Asked::SessionToken(session.token.clone())), "request"),
        (Some(Asked::Execute(own)), "session_token"),
        (None, "request"),
    ] {
        line.requests.send(pb::InteractRequest { request: asked, resume: true }).unwrap();
        let refused = line.answer().await.unwrap_err();
        assert_eq!((refused.code, refused.field.as_deref()), (Code::InvalidArgument, Some(field)), "{refused:?}");
        assert_eq!(refused.transaction_state(), TransactionState::Open);
    }
    line.resume(commit()).await.unwrap();
    assert_eq!(database.balances(), "7 100");
}

#[tokio::test(flavor = "multi_thread")]
async fn each_message_counts_for_the_callers_rate_but_rollback() {
    let database = Database::create();
    let broker = Broker::start_with(&database, "", "[principals.anonymous]\ncalls_per_second = 5").await;
    let (mut line, _) = Line::begin(&broker).await;
    for _ in 0..100 {
        line.requests.send(pb::InteractRequest { request: Some(execute("SELECT 1")), resume: true }).unwrap();
    }
    let mut refused = Vec::new();
    for _ in 0..100 {
        refused.extend(line.answer().await.err());
    }
    assert!(!refused.is_empty());
    for failure in refused {
        assert_eq!((failure.code, failure.reason.as_str()), (Code::ResourceExhausted, "QUOTA_EXHAUSTED"));
    }
    for _ in 0..20 {
        line.ask(rollback()).await.unwrap();
    }
    until(async || line.resume(execute("SELECT 1")).await.is_ok()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_end_of_the_session_ends_its_stream_and_says_why() {
    let database = Database::create();
    let limits = "[profiles.default]\nlease_ttl = \"1s\"\nlease_ttl_max = \"1s\"\nsession_idle_timeout = \"1s\"";
    let broker = Broker::start_with(&database, "", limits).await;
    // Not used for its idle limit, though its lease was kept.
    let (mut line, _) = Line::begin(&broker).await;
    assert_eq!(line.ended().await.end_reason(), "END_REASON_IDLE_TIMEOUT");
    // Its transaction took too long.
    let options = pb::SessionOptions { transaction_timeout: millis(500), ..Default::default() };
    let begin = pb::BeginSessionRequest { options: Some(options), ..Default::default() };
    let (mut line, session) = Line::begin_with(broker.client(), begin).await;
    line.run(UPDATE).await.unwrap();
    assert_eq!(line.ended().await.end_reason(), "END_REASON_TRANSACTION_DEADLINE");
    take_the_lock(&database);
    assert_eq!(session.ended().await, EndReason::TransactionDeadline);
    // Closed beside it.
    let (mut line, session) = Line::begin(&broker).await;
    session.close().await.unwrap();
    assert_eq!(line.ended().await.end_reason(), "END_REASON_CLOSED");
    // Its backend is gone.
    let (mut line, _) = Line::begin(&broker).await;
    line.run("SELECT 1").await.unwrap();
    database.psql(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database() \
         AND application_name = 'session-broker' AND state = 'idle in transaction'",
    );
    assert_eq!(line.ended().await.end_reason(), "END_REASON_BACKEND_LOST");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_drain_lets_a_transaction_finish_and_then_ends_the_stream() {
    let database = Database::create();
    let engine = format!("[engines.main]\nurl = {:?}", database.url());
    let broker = Broker::start_draining_for("10s", &engine).await;
    let (mut line, session) = Line::begin(&broker).await;
    let (mut idle, _) = Line::begin_with(session.client.clone(), pb::BeginSessionRequest::default()).await;
    line.run(UPDATE).await.unwrap();
    broker.begin_stop();
    // One between transactions goes at once.
    assert_eq!(idle.ended().await.end_reason(), "END_REASON_DRAINED");
    let refused = Line::open(session.client.clone(), begin_session()).await.unwrap_err();
    assert_eq!((refused.code, refused.reason.as_str()), (Code::Unavailable, "DRAINING"));
    assert!(line.run("SELECT 1").await.unwrap().state.unwrap().draining);
    line.ask(commit()).await.unwrap();
    assert_eq!(line.ended().await.end_reason(), "END_REASON_DRAINED");
    broker.stop().await;
    assert_eq!(database.balances(), "7 100");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_streams_own_deadline_stops_a_statement_and_is_named() {
    let database = Database::create();
    let broker = Broker::start(&database).await;
    let (mut line, _) = Line::open_within(broker.client(), begin_session(), Some(2 * SECOND)).await.unwrap();
    let failure = line.run("SELECT pg_sleep(60)").await.unwrap_err();
    assert_eq!((failure.code, failure.reason.as_str()), (Code::DeadlineExceeded, "STATEMENT_TIMEOUT"));
    assert_eq!(failure.metadata["bound"], "grpc_deadline");
    database.wait_for(ACTIVE, "0");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_caller_that_reads_no_answers_is_not_run_ahead_of() {
    const COUNT: usize = 100;
    const ANSWER_BYTES: usize = 1_000_000;

    let database = Database::create();
    database.psql("CREATE TABLE written (n int); GRANT ALL ON written TO broker");
    let broker = Broker::start(&database).await;
    let (mut line, _) = Line::begin(&broker).await;
    let sql = format!("INSERT INTO written VALUES (1) RETURNING repeat('x', {ANSWER_BYTES})");
    for _ in 0..COUNT {
        line.send(execute_and_commit(&sql));
    }
    // Some are answered into what lies between; then it stays so.
    database.wait_for("SELECT count(*) > 1 FROM written", "t");
    let mut written = 0;
    for _ in 0..50 {
        written = database.psql("SELECT count(*) FROM written").parse().unwrap();
    }
    assert!(written < COUNT / 2, "{written}");
    for _ in 0..COUNT {
        let answer = executed(line.answer().await.unwrap());
        assert_eq!(kinds_of(&answer.rows[0]), [text(&"x".repeat(ANSWER_BYTES))]);
    }
    assert_eq!(database.psql("SELECT count(*) FROM written"), COUNT.to_string());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_thousand_streams_are_open_at_once_and_leave_nothing() {
    const STREAMS: usize = 1000;
    /// One carries 256.
    const CONNECTIONS: usize = 5;

    let database = Database::create();
    let quotas = "[principals.anonymous]\ntransactions_max = 1000";
    // A busy machine is slow to give them a connection each.
    let broker = Broker::start_with(&database, "pool_timeout = \"30s\"", quotas).await;
    let clients: Vec<_> = (0..CONNECTIONS).map(|_| broker.client()).collect();
    let all_open = Arc::new(Barrier::new(STREAMS));
    let mut callers = JoinSet::new();
    for number in 0..STREAMS {
        let (client, all_open) = (clients[number % CONNECTIONS].clone(), all_open.clone());
        callers.spawn(async move {
            let (mut line, session) = Line::begin_with(client, pb::BeginSessionRequest::default()).await;
            all_open.wait().await;
            line.send(execute("SELECT balance FROM accounts WHERE id = 1"));
            line.send(execute_and_commit("SELECT balance FROM accounts WHERE id = 2"));
            for _ in 0..2 {
                assert_eq!(first_row(&executed(line.answer().await.unwrap())), [text("100")]);
            }
            if number % 2 == 0 {
                line.finish().await;
            } else {
                line.cancel();
            }
            session
        });
    }
    let mut ended = Vec::new();
    for session in callers.join_all().await {
        ended.push(session.ended().await);
    }
    let closed = ended.iter().filter(|reason| **reason == EndReason::Closed).count();
    let disconnected = ended.iter().filter(|reason| **reason == EndReason::Disconnected).count();
    assert_eq!((closed, disconnected), (STREAMS / 2, STREAMS / 2));
    assert_eq!(database.open_transactions(), "0");
}

#[tokio::test(start_paused = true)]
async fn an_open_stream_keeps_its_session_to_its_maximum_age() {
    let long = Duration::from_hours(10);
    let profile = Profile { session_age_max: 100 * SECOND, session_idle_timeout: long, ..Profile::default() };
    let (broker, _) = broker(Gates::OPEN, profile, Limits::default());
    for take in [Interaction::begun, Interaction::found] {
        let interaction = take(begin(&broker, 10 * SECOND)).unwrap();
        let state = interaction.session().state().unwrap();
        assert_eq!((state.attached, state.lease_remaining), (true, 10 * SECOND));
        let began = Instant::now();
        assert_eq!((interaction.ended().await, began.elapsed().as_secs()), (Reason::MaxAge, 100));
    }
    assert_eq!(broker.live_sessions(), 0);
}

#[tokio::test(start_paused = true)]
async fn the_idle_limits_and_the_transactions_deadline_stand_while_a_stream_is_open() {
    let limits = |idle: u64, deadline: u64| Profile {
        session_idle_timeout: 60 * SECOND,
        idle_in_transaction_timeout: Duration::from_secs(idle),
        transaction_timeout: Duration::from_secs(deadline),
        ..Profile::default()
    };
    for (profile, in_transaction, reason, seconds) in [
        (limits(20, 30), false, Reason::IdleTimeout, 60),
        (limits(20, 30), true, Reason::IdleTimeout, 20),
        (limits(30, 20), true, Reason::TransactionDeadline, 20),
    ] {
        let (broker, engine) = broker(Gates::OPEN, profile, Limits::default());
        let interaction = Interaction::begun(begin(&broker, 10 * SECOND)).unwrap();
        if in_transaction {
            interaction.session().execute(call(false)).await.unwrap();
        }
        let began = Instant::now();
        assert_eq!((interaction.ended().await, began.elapsed().as_secs()), (reason, seconds));
        settle().await;
        let counts = engine.counts();
        assert_eq!((counts.released, counts.committed), (u32::from(in_transaction), 0));
    }
}

#[tokio::test(start_paused = true)]
async fn a_session_that_a_stream_began_has_no_grace() {
    for in_transaction in [false, true] {
        let (broker, engine) = broker(Gates::OPEN, Profile::default(), Limits::default());
        let session = begin(&broker, 10 * SECOND);
        let interaction = Interaction::begun(session.clone()).unwrap();
        if in_transaction {
            session.execute(call(false)).await.unwrap();
        }
        drop(interaction);
        assert_eq!(session.state(), Err(Reason::Disconnected));
        settle().await;
        let counts = engine.counts();
        assert_eq!((counts.released, counts.committed), (u32::from(in_transaction), 0));
    }
}

#[tokio::test(start_paused = true)]
async fn a_session_that_a_stream_began_is_closed_by_its_end_between_transactions_alone() {
    let (broker, _) = broker(Gates::OPEN, Profile::default(), Limits::default());
    for (commit, reason) in [(true, Reason::Closed), (false, Reason::Disconnected)] {
        let session = begin(&broker, 10 * SECOND);
        let interaction = Interaction::begun(session.clone()).unwrap();
        session.execute(call(commit)).await.unwrap();
        interaction.finish();
        assert_eq!(session.state(), Err(reason));
    }
}

#[tokio::test(start_paused = true)]
async fn a_session_that_was_there_has_its_lease_after_a_goodbye_and_the_grace_after_a_loss() {
    for (is_lost, lasts, reason) in [(false, 10, Reason::LeaseExpired), (true, 5, Reason::Disconnected)] {
        let (broker, _) = broker(Gates::OPEN, Profile::default(), Limits::default());
        let session = begin(&broker, 10 * SECOND);
        let interaction = Interaction::found(session.clone()).unwrap();
        sleep(60 * SECOND).await;
        if is_lost {
            drop(interaction);
        } else {
            interaction.finish();
        }
        sleep(Duration::from_secs(lasts - 1)).await;
        assert!(!session.state().unwrap().attached);
        sleep(2 * SECOND).await;
        assert_eq!(session.state(), Err(reason));
        assert_eq!(broker.live_sessions(), 0);
    }
}

#[tokio::test(start_paused = true)]
async fn behind_a_failure_nothing_is_done_until_somebody_knows() {
    let (broker, _) = broker(Gates::OPEN, Profile::default(), Limits::default());
    let session = begin(&broker, 10 * SECOND);
    let mut interaction = Interaction::begun(session.clone()).unwrap();
    interaction.check().unwrap();
    interaction.fail();
    for _ in 0..2 {
        let refused = interaction.check().unwrap_err();
        assert_eq!((refused.error, refused.state.unwrap().transaction), (Error::PipelineAborted, Standing::None));
    }
    interaction.resume();
    interaction.check().unwrap();
    interaction.fail();
    session.close().await.unwrap();
    assert_eq!(interaction.check().unwrap_err().error, Error::SessionEnded(Reason::Closed));
}

#[tokio::test(start_paused = true)]
async fn a_stream_takes_a_session_that_lives_and_that_no_other_has() {
    let (broker, _) = broker(Gates::OPEN, Profile::default(), Limits::default());
    let session = begin(&broker, 10 * SECOND);
    let interaction = Interaction::found(session.clone()).unwrap();
    assert_eq!(session.attach().unwrap_err().error, Error::AlreadyAttached);
    assert_eq!(Interaction::found(session.clone()).unwrap_err().error, Error::AlreadyAttached);
    // Whoever was refused takes nothing from the stream that is there.
    assert!(session.state().unwrap().attached);
    drop(interaction);
    let attached = session.attach().unwrap();
    assert_eq!(Interaction::found(session.clone()).unwrap_err().error, Error::AlreadyAttached);
    drop(attached);
    session.close().await.unwrap();
    assert_eq!(Interaction::found(session).unwrap_err().error, Error::SessionEnded(Reason::Closed));
}
