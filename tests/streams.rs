//! ExecuteStream: results of any size in parts, complete when a trailer says so; PostgreSQL waits for whoever reads
//! slowly, and stops for whoever goes.

use prost::Message;
use session_broker::grpc::pb;
use tokio::task::JoinHandle;
use tonic::{Code, Streaming};

use crate::batches::SLEEPING;
#[cfg(target_os = "linux")]
use crate::command_line::Program;
use crate::support::{
    Broker, Database, Failure, Session, Streamed, first_row, int, kinds_of, millis, seconds, text, until,
};
use pb::execute_stream_response::Part;
use pb::{IsolationLevel, Outcome, TransactionState};

/// How many of the broker's backends wait for somebody to read what they send.
pub(crate) const STALLED: &str = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() \
     AND application_name = 'session-broker' AND wait_event = 'ClientWrite'";

/// How many of the broker's backends run a statement.
pub(crate) const ACTIVE: &str = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() \
     AND application_name = 'session-broker' AND state = 'active'";

/// Some 40 MB: more than the buffers between PostgreSQL and a caller hold.
const LARGE: &str = "SELECT n, repeat('x', 1000) FROM generate_series(1, 40000) AS n";

/// How many rows [`LARGE`] has.
const LARGE_ROWS: u64 = 40_000;

/// More than anybody would wait for. In the list of what is selected, a series is made as it is read.
const ENDLESS: &str = "SELECT generate_series(1, 1000000000) AS n, repeat('x', 1000)";

/// A statement that sleeps before its first row.
const ASLEEP: &str = "SELECT n, pg_sleep(60) FROM generate_series(1, 2) AS n";

#[tokio::test(flavor = "multi_thread")]
async fn a_result_comes_in_chunks_and_a_trailer_closes_it() {
    /// About 128 KiB, of messages whose framing is not counted to the byte; less when rows come late.
    const CHUNK_BYTES_MAX: usize = 192 * 1024;
    const CHUNK_BYTES_USUAL: usize = 96 * 1024;
    const ROWS: i64 = 50_000;

    let database = Database::create();
    let broker = Broker::start(&database).await;
    let session = broker.session().await;
    let sql = "SELECT n, 'row ' || n AS name FROM generate_series(1, $1::int4) AS n";
    let streamed = session.stream(session.streaming(sql, vec![int(ROWS)])).await;
    let trailer = streamed.end.as_ref().unwrap();
    assert_eq!((trailer.row_count, trailer.command_tag.as_str()), (50_000, "SELECT 50000"));
    assert_eq!((&trailer.commit, trailer.notices.len()), (&None, 0));
    assert_eq!(trailer.state.as_ref().unwrap().transaction_state(), TransactionState::Open);
    let names: Vec<_> = streamed.columns.iter().map(|column| (column.name.as_str(), column.type_oid)).collect();
    assert_eq!(names, [("n", 23), ("name", 25)]);
    let expected: Vec<_> = (1..=ROWS).map(|n| vec![int(n), text(&format!("row {n}"))]).collect();
    assert_eq!(streamed.rows(), expected);
    let is_usual = |chunk: &&pb::ResultChunk| chunk.encoded_len() >= CHUNK_BYTES_USUAL;
    assert!(streamed.chunks.len() > 1 && streamed.chunks.iter().any(|chunk| is_usual(&chunk)));
    for chunk in &streamed.chunks {
        assert_eq!(chunk.rows.len(), usize::try_from(chunk.row_count).unwrap());
        assert!(chunk.row_count > 0 && chunk.packed_rows.is_empty());
        assert!(chunk.encoded_len() <= CHUNK_BYTES_MAX, "{} bytes", chunk.encoded_len());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn rows_without_columns_come_in_chunks_too() {
    let database = Database::create();
    let broker = Broker::start(&database).await;
    let session = broker.session().await;
    for result_format in [pb::ResultFormat::Values, pb::ResultFormat::Packed] {
        let request = session.streaming("SELECT FROM generate_series(1, 100000)", vec![]);
        let streamed =
            session.stream(pb::ExecuteStreamRequest { result_format: result_format.into(), ..request }).await;
        assert_eq!(streamed.end.unwrap().row_count, 100_000);
        assert_eq!(streamed.chunks.iter().map(|chunk| chunk.row_count).sum::<u32>(), 100_000);
        assert!(streamed.chunks.iter().all(|chunk| chunk.row_count < 50_000));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn rows_larger_than_a_chunk_come_whole() {
    let database = Database::create();
    let broker = Broker::start(&database).await;
    let session = broker.session().await;
    let lengths = [10, 1_000_000, 10, 20, 2_000_000];
    let sql = "SELECT repeat('x', length) FROM unnest(ARRAY[10, 1000000, 10, 20, 2000000]) AS length";
    let streamed = session.stream(session.streaming(sql, vec![])).await;
    assert_eq!(streamed.end.as_ref().unwrap().row_count, 5);
    let expected: Vec<_> = lengths.iter().map(|length| vec![text(&"x".repeat(*length))]).collect();
    assert!(streamed.rows() == expected);
    // No chunk goes on after such a row.
    assert!(streamed.chunks.iter().all(|chunk| chunk.encoded_len() < 2_200_000));
}

#[tokio::test(flavor = "multi_thread")]
async fn every_statement_answers_as_execute_does() {
    let database = Database::create();
    let broker = Broker::start(&database).await;
    let session = broker.session().await;
    for sql in [
        "SELECT id, id, balance FROM accounts ORDER BY id",
        "SELECT 1 AS one, NULL::text AS nothing WHERE false",
        "SELECT FROM generate_series(1, 4)",
        "SELECT",
        "VALUES (1, 'a'), (2, NULL)",
        "INSERT INTO accounts VALUES (3, 5), (4, 6.50) RETURNING *",
        "INSERT INTO accounts VALUES (3, 5)",
        "UPDATE accounts SET balance = balance + 1 WHERE id > 1",
        "DELETE FROM accounts WHERE id = 77 RETURNING id",
        "CREATE TABLE made (id int)",
        "CREATE TABLE filled AS SELECT 1 AS one",
        "DO $$ BEGIN END $$",
        "SET LOCAL work_mem = '1MB'",
        "SHOW server_version",
        "EXPLAIN (COSTS off) SELECT 1",
    ] {
        let executed = session.execute(sql).await.unwrap();
        session.rollback().await.unwrap();
        let streamed = session.stream(session.streaming(sql, vec![])).await;
        session.rollback().await.unwrap();
        let trailer = streamed.end.as_ref().unwrap();
        assert_eq!(streamed.columns, executed.columns, "{sql}");
        assert_eq!(streamed.rows(), executed.rows.iter().map(kinds_of).collect::<Vec<_>>(), "{sql}");
        assert_eq!((trailer.row_count, &trailer.command_tag), (executed.row_count, &executed.command_tag), "{sql}");
        let state = trailer.state.as_ref().unwrap();
        assert_eq!(state.transaction_state(), executed.state.unwrap().transaction_state(), "{sql}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_error_after_rows_ends_the_stream_without_a_trailer() {
    let database = Database::create();
    let broker = Broker::start(&database).await;
    let session = broker.session().await;
    let sql = "SELECT n, 1 / (50000 - n) FROM generate_series(1, 100000) AS n";
    let streamed = session.stream(session.streaming(sql, vec![])).await;
    assert_eq!(streamed.columns.len(), 2);
    let came = streamed.chunks.iter().map(|chunk| chunk.row_count).sum::<u32>();
    assert!((1..50_000).contains(&came), "{came} rows");
    let failure = streamed.end.unwrap_err();
    assert_eq!((failure.code, failure.reason.as_str()), (Code::InvalidArgument, "DATABASE_ERROR"));
    assert_eq!(failure.metadata["sqlstate"], "22012");
    assert_eq!(failure.pg_error.as_ref().unwrap().sqlstate, "22012");
    assert_eq!(failure.transaction_state(), TransactionState::Failed);
    session.rollback().await.unwrap();
    until(async || session.get().await.unwrap().pool.unwrap().in_use == 0).await;
    session.execute("SELECT 1").await.unwrap();
    assert_eq!(session.get().await.unwrap().pool.unwrap().opened, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bad_stream_is_refused_with_nothing_run() {
    let database = Database::create();
    let broker = Broker::start(&database).await;
    let session = broker.session().await;
    session.execute("UPDATE accounts SET balance = 7 WHERE id = 1").await.unwrap();
    let update = "UPDATE accounts SET balance = $1::int4";
    let of = |sql, parameters| session.streaming(sql, parameters);
    let isolation_level = IsolationLevel::Serializable.into();
    let options = Some(pb::TransactionOptions { isolation_level, ..Default::default() });
    for (request, field) in [
        (of("", vec![]), "sql"),
        (of("COMMIT", vec![]), "sql"),
        (of("COPY accounts TO STDOUT", vec![]), "sql"),
        (of(update, vec![]), "parameters"),
        (of(update, vec![int(1 << 40)]), "parameters[0].value"),
        (pb::ExecuteStreamRequest { timeout: seconds(0), ..of(update, vec![int(8)]) }, "timeout"),
        (pb::ExecuteStreamRequest { class: "nosuch".into(), ..of(update, vec![int(8)]) }, "class"),
        (pb::ExecuteStreamRequest { transaction_options: options, ..of(update, vec![int(8)]) }, "transaction_options"),
    ] {
        let refused = session.stream(request).await;
        assert!(refused.columns.is_empty() && refused.chunks.is_empty());
        let failure = refused.end.unwrap_err();
        assert_eq!((failure.code, failure.reason.as_str()), (Code::InvalidArgument, "INVALID_REQUEST"), "{failure:?}");
        assert_eq!(failure.field.as_deref(), Some(field), "{failure:?}");
        assert_eq!(failure.transaction_state(), TransactionState::Open, "{failure:?}");
    }
    session.commit().await.unwrap();
    assert_eq!(database.balances(), "7 100");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_of_no_living_session_is_refused() {
    let database = Database::create();
    let broker = Broker::start(&database).await;
    let session = broker.session().await;
    session.close().await.unwrap();
    let ended = session.stream(session.streaming("SELECT 1", vec![])).await.end.unwrap_err();
    assert_eq!(ended.end_reason(), "END_REASON_CLOSED");
    let unknown = Session { token: format!("broker.{}.{}", "0".repeat(32), "0".repeat(32)), ..session };
    let refused = unknown.stream(unknown.streaming("SELECT 1", vec![])).await.end.unwrap_err();
    assert_eq!((refused.code, refused.reason.as_str()), (Code::NotFound, "SESSION_UNKNOWN"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_that_commits_says_so_in_its_trailer() {
    let database = Database::create();
    let broker = Broker::start(&database).await;
    let session = broker.session().await;
    let sql = "UPDATE accounts SET balance = balance + 1 RETURNING id, balance";
    let options = pb::TransactionOptions { isolation_level: IsolationLevel::Serializable.into(), ..Default::default() };
    let request =
        pb::ExecuteStreamRequest { commit: true, transaction_options: Some(options), ..session.streaming(sql, vec![]) };
    let streamed = session.stream(request).await;
    assert_eq!(streamed.rows(), [[int(1), text("101")], [int(2), text("101")]]);
    let trailer = streamed.end.unwrap();
    let commit = trailer.commit.unwrap();
    assert_eq!((commit.outcome(), &commit.state), (Outcome::Committed, &None));
    assert_eq!(trailer.state.unwrap().transaction_state(), TransactionState::None);
    assert_eq!(database.balances(), "101 101");
    let resolved = broker.resolve(&commit.commit_token).await.unwrap();
    assert_eq!((resolved.outcome(), resolved.transaction_id), (Outcome::Committed, commit.transaction_id));
    assert_eq!(session.commit().await.unwrap().transaction_id, commit.transaction_id);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_that_was_to_commit_rolls_back_when_it_fails() {
    let database = Database::create();
    let broker = Broker::start(&database).await;
    let session = broker.session().await;
    session.execute("UPDATE accounts SET balance = 7").await.unwrap();
    let sql = "SELECT 1 / (50000 - n) FROM generate_series(1, 100000) AS n";
    let request = pb::ExecuteStreamRequest { commit: true, ..session.streaming(sql, vec![]) };
    let streamed = session.stream(request).await;
    assert!(!streamed.chunks.is_empty());
    let failure = streamed.end.unwrap_err();
    assert_eq!((failure.metadata["sqlstate"].as_str(), failure.transaction_state()), ("22012", TransactionState::None));
    assert_eq!(failure.commit.unwrap().outcome(), Outcome::RolledBack);
    assert_eq!((database.balances().as_str(), database.open_transactions().as_str()), ("100 100", "0"));
}

#[tokio::test(flavor = "multi_thread")]
async fn notices_come_with_the_stream_and_a_hundred_at_most() {
    let database = Database::create();
    database.psql(
        "CREATE FUNCTION tell(n int) RETURNS int LANGUAGE plpgsql \
         AS 'BEGIN RAISE NOTICE ''row %'', n; RETURN n; END'",
    );
    let broker = Broker::start(&database).await;
    let session = broker.session().await;
    for (sql, count) in [
        ("SELECT tell(n) FROM generate_series(1, 10) AS n", 10),
        ("SELECT tell(n) FROM generate_series(1, 500) AS n", 100),
        ("DO $$ BEGIN PERFORM tell(1); END $$", 1),
        ("DROP TABLE IF EXISTS nowhere", 1),
    ] {
        let streamed = session.stream(session.streaming(sql, vec![])).await;
        let trailer = streamed.end.as_ref().unwrap();
        let told: Vec<_> = streamed.chunks.iter().flat_map(|chunk| &chunk.notices).chain(&trailer.notices).collect();
        assert_eq!(told.len(), count, "{sql}");
        assert!(told.iter().all(|notice| notice.severity == "NOTICE"), "{told:?}");
        if sql.starts_with("SELECT") {
            assert!(told.iter().zip(1..).all(|(notice, n)| notice.message == format!("row {n}")), "{told:?}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_notice_comes_while_its_statement_runs_on() {
    const WAITING: &str = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted";

    let database = Database::create();
    let broker = Broker::start(&database).await;
    let session = broker.session().await;
    for (sql, columns) in [
        ("DO $$ BEGIN RAISE NOTICE 'half'; PERFORM pg_advisory_xact_lock(42); RAISE NOTICE 'whole'; END $$", 0),
        ("SELECT halfway()", 1),
    ] {
        database.psql(
            "CREATE OR REPLACE FUNCTION halfway() RETURNS int LANGUAGE plpgsql \
             AS 'BEGIN RAISE NOTICE ''half''; PERFORM pg_advisory_xact_lock(42); RAISE NOTICE ''whole''; RETURN 1; END'",
        );
        let held = database.hold("DO $$ BEGIN PERFORM pg_advisory_xact_lock(42); END $$");
        let mut parts = opened(&session, sql).await;
        let Part::Header(header) = next(&mut parts).await else { panic!("the header comes first") };
        let Part::Chunk(chunk) = next(&mut parts).await else { panic!("the notice comes next") };
        assert_eq!(database.psql(WAITING), "1");
        let notices: Vec<_> = chunk.notices.iter().map(|notice| notice.message.as_str()).collect();
        assert_eq!((header.columns.len(), chunk.row_count, notices), (columns, 0, vec!["half"]), "{sql}");
        drop(held);
        let mut notices = Vec::new();
        loop {
            match next(&mut parts).await {
                Part::Header(header) => panic!("another header: {header:?}"),
                Part::Chunk(chunk) => notices.extend(chunk.notices),
                Part::Trailer(trailer) => break notices.extend(trailer.notices),
            }
        }
        assert_eq!((notices.len(), notices[0].message.as_str()), (1, "whole"), "{sql}");
        session.commit().await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_streams_limits_are_its_own() {
    let database = Database::create();
    let limits = "[profiles.default]\nresult_rows_max = 100\nresult_bytes_max = 4096";
    let broker = Broker::start_with(&database, "", limits).await;
    let session = broker.session().await;
    let of = |sql, max_rows| pb::ExecuteStreamRequest { max_rows, ..session.streaming(sql, vec![]) };
    let many = "SELECT repeat('x', 100) FROM generate_series(1, 20000)";
    // More rows and more bytes than Execute may return.
    for max_rows in [0, 20_000, 1_000_000] {
        assert_eq!(session.stream(of(many, max_rows)).await.end.unwrap().row_count, 20_000);
    }
    let wide = "SELECT repeat('x', CASE n WHEN 15000 THEN 5000 ELSE 5 END) FROM generate_series(1, 20000) AS n";
    for (request, rows_max) in [(of(many, 1000), 1000), (of(wide, 0), 14_999)] {
        let streamed = session.stream(request).await;
        let came = streamed.chunks.iter().map(|chunk| chunk.row_count).sum::<u32>();
        assert!(came <= rows_max, "{came} rows");
        let failure = streamed.end.unwrap_err();
        assert_eq!((failure.code, failure.reason.as_str()), (Code::ResourceExhausted, "RESULT_TOO_LARGE"));
        assert_eq!(failure.transaction_state(), TransactionState::Failed);
        session.rollback().await.unwrap();
    }
    session.execute("SELECT 1").await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_caller_that_leaves_has_its_statement_cancelled() {
    let database = Database::create();
    let broker = Broker::start(&database).await;
    let session = broker.session().await;
    // One whose rows nobody takes, and one without any yet.
    for (sql, running) in [(ENDLESS, STALLED), (ASLEEP, SLEEPING)] {
        session.execute("UPDATE accounts SET balance = 7").await.unwrap();
        let call = begin(&session, session.streaming(sql, vec![]));
        database.wait_for(running, "1");
        leave(call).await;
        database.wait_for(ACTIVE, "0");
        let failure = session.execute("SELECT 1").await.unwrap_err();
        assert_eq!((failure.code, failure.reason.as_str()), (Code::FailedPrecondition, "DATABASE_ERROR"), "{sql}");
        assert_eq!(failure.metadata["sqlstate"], "25P02");
        assert_eq!(failure.transaction_state(), TransactionState::Failed);
        session.rollback().await.unwrap();
    }
    session.execute_and_commit("SELECT 1").await.unwrap();
    assert_eq!((database.balances().as_str(), database.open_transactions().as_str()), ("100 100", "0"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_caller_that_leaves_before_the_commit_has_nothing_committed() {
    let database = Database::create();
    let broker = Broker::start(&database).await;
    let session = broker.session().await;
    session.execute("UPDATE accounts SET balance = 7").await.unwrap();
    let request = pb::ExecuteStreamRequest { commit: true, ..session.streaming(ENDLESS, vec![]) };
    let call = begin(&session, request);
    database.wait_for(STALLED, "1");
    leave(call).await;
    until(async || session.get().await.unwrap().pool.unwrap().in_use == 0).await;
    assert_eq!((database.balances().as_str(), database.open_transactions().as_str()), ("100 100", "0"));
    session.execute_and_commit("SELECT 1").await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn postgresql_waits_for_a_caller_that_reads_late_and_nothing_is_lost() {
    let database = Database::create();
    let broker = Broker::start(&database).await;
    let session = broker.session().await;
    let mut parts = opened(&session, LARGE).await;
    database.wait_for(STALLED, "1");
    // It goes on as soon as somebody reads, and waits again.
    let mut came = 0;
    for _ in 0..50 {
        came += rows_of(&next(&mut parts).await);
    }
    database.wait_for(STALLED, "1");
    let trailer = loop {
        match next(&mut parts).await {
            Part::Trailer(trailer) => break trailer,
            part => came += rows_of(&part),
        }
    };
    assert_eq!((came, trailer.row_count), (LARGE_ROWS, LARGE_ROWS));
    assert_eq!(session.execute("SELECT 1").await.unwrap().row_count, 1);
}

#[cfg(target_os = "linux")]
#[tokio::test(flavor = "multi_thread")]
async fn a_caller_that_never_reads_takes_no_memory_and_meets_its_time_limit() {
    const GROWTH_KIB_MAX: u64 = 32 * 1024;

    let database = Database::create();
    let broker = Program::serve(&database.url(), "");
    let session = broker.session().await;
    session.execute("SELECT 1").await.unwrap();
    let before = broker.peak_memory();
    let request = pb::ExecuteStreamRequest { timeout: seconds(3), ..session.streaming(ENDLESS, vec![]) };
    let parts = session.open(request).await.unwrap();
    database.wait_for(STALLED, "1");
    database.wait_for(ACTIVE, "0");
    let growth = broker.peak_memory() - before;
    assert!(growth < GROWTH_KIB_MAX, "{growth} KiB more");
    // What was under way to it is still there, and then why there is no more.
    let failure = Streamed::read(parts).await.end.unwrap_err();
    assert_eq!((failure.code, failure.reason.as_str()), (Code::DeadlineExceeded, "STATEMENT_TIMEOUT"));
    assert_eq!(
        (failure.metadata["bound"].as_str(), failure.transaction_state()),
        ("timeout", TransactionState::Failed)
    );
    session.rollback().await.unwrap();
    session.execute_and_commit("SELECT 1").await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_is_within_the_time_limits() {
    let database = Database::create();
    let classes = "[profiles.default.classes.brief]\nstatement_timeout = \"300ms\"";
    let broker = Broker::start_with(&database, "", classes).await;
    let session = broker.session().await;
    // Rows come, and the last of them too late.
    let request = session.streaming("SELECT n, pg_sleep(0.01 * n) FROM generate_series(1, 1000) AS n", vec![]);
    let brief = pb::ExecuteStreamRequest { class: "brief".into(), ..request.clone() };
    let timed = pb::ExecuteStreamRequest { timeout: millis(300), ..request };
    for (request, bound) in [(brief, "class"), (timed, "timeout")] {
        let failure = session.stream(request).await.end.unwrap_err();
        assert_eq!((failure.code, failure.reason.as_str()), (Code::DeadlineExceeded, "STATEMENT_TIMEOUT"));
        assert_eq!(
            (failure.metadata["bound"].as_str(), failure.transaction_state()),
            (bound, TransactionState::Failed)
        );
        session.rollback().await.unwrap();
    }
    session.execute("SELECT 1").await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_suspends_the_lease() {
    let database = Database::create();
    let broker = Broker::start(&database).await;
    let request = pb::BeginSessionRequest { lease_ttl: seconds(1), ..Default::default() };
    let session = broker.session_with(request).await;
    let sql = "SELECT n, pg_sleep(0.5) FROM generate_series(1, 4) AS n";
    let trailer = session.stream(session.streaming(sql, vec![])).await.end.unwrap();
    assert_eq!((trailer.row_count, trailer.state.unwrap().lease_remaining), (4, seconds(1)));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cancelled_stream_has_stopped_when_cancel_returns() {
    let database = Database::create();
    let broker = Broker::start(&database).await;
    let session = broker.session().await;
    // One that waits for its caller, who does not read meanwhile, and one that makes its caller wait.
    for (sql, running) in [(ENDLESS, STALLED), (ASLEEP, SLEEPING)] {
        let call = begin(&session, session.streaming(sql, vec![]));
        database.wait_for(running, "1");
        let answer = session.cancel().await.unwrap();
        assert_eq!((answer.cancelled, answer.state.unwrap().transaction_state()), (true, TransactionState::Failed));
        assert_eq!(database.psql(ACTIVE), "0");
        let stopped = match call.await.unwrap() {
            Ok(parts) => Streamed::read(parts).await.end.unwrap_err(),
            Err(failure) => failure,
        };
        assert_eq!((stopped.code, stopped.reason.as_str()), (Code::Cancelled, "CANCELLED"), "{sql}");
        assert_eq!(stopped.transaction_state(), TransactionState::Failed);
        session.rollback().await.unwrap();
    }
    session.execute_and_commit("SELECT 1").await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_call_behind_a_stream_waits_its_turn() {
    let database = Database::create();
    let broker = Broker::start(&database).await;
    let session = broker.session().await;
    let parts = opened(&session, LARGE).await;
    database.wait_for(STALLED, "1");
    let behind = tokio::spawn({
        let session = session.clone();
        async move { session.execute_and_commit("UPDATE accounts SET balance = 7").await }
    });
    // What waits for no other call is answered meanwhile.
    for _ in 0..10 {
        session.keep_alive().await.unwrap();
    }
    assert_eq!(database.psql(STALLED), "1");
    assert!(!behind.is_finished());
    let streamed = Streamed::read(parts).await;
    assert_eq!(streamed.end.unwrap().row_count, LARGE_ROWS);
    assert_eq!(behind.await.unwrap().unwrap().commit.unwrap().outcome(), Outcome::Committed);
    assert_eq!(database.balances(), "7 7");
}

#[tokio::test(flavor = "multi_thread")]
async fn streams_and_other_calls_follow_each_other_in_one_transaction() {
    let database = Database::create();
    let broker = Broker::start(&database).await;
    let session = broker.session().await;
    let numbered = |seq, sql| pb::ExecuteRequest { seq, ..session.statement(sql, vec![]) };
    session.run(numbered(1, "CREATE TABLE made (n int)")).await.unwrap();
    let insert = "INSERT INTO made SELECT generate_series(1, 3000) RETURNING n";
    assert_eq!(session.stream(session.streaming(insert, vec![])).await.rows().len(), 3000);
    session.savepoint("before").await.unwrap();
    let update = "UPDATE made SET n = n / (n - 3000)";
    let failure = session.stream(session.streaming(update, vec![])).await.end.unwrap_err();
    assert_eq!(failure.metadata["sqlstate"], "22012");
    session.rollback_to("before").await.unwrap();
    // A stream has no number, and takes none.
    let counted = session.run(numbered(2, "SELECT count(*) FROM made")).await.unwrap();
    assert_eq!(first_row(&counted), [int(3000)]);
    let delete = pb::ExecuteStreamRequest { commit: true, ..session.streaming("DELETE FROM made WHERE n > 1", vec![]) };
    let trailer = session.stream(delete).await.end.unwrap();
    assert_eq!((trailer.row_count, trailer.command_tag.as_str()), (2999, "DELETE 2999"));
    assert_eq!(database.psql("SELECT n FROM made"), "1");
    let failed = session.stream(session.streaming("SELECT nonsense", vec![])).await.end.unwrap_err();
    assert_eq!((failed.code, failed.metadata["sqlstate"].as_str()), (Code::InvalidArgument, "42703"));
    let refused = session.stream(session.streaming("SELECT 1", vec![])).await.end.unwrap_err();
    assert_eq!((refused.code, refused.metadata["sqlstate"].as_str()), (Code::FailedPrecondition, "25P02"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backend_that_dies_in_mid_stream_ends_the_session_as_lost() {
    let database = Database::create();
    let broker = Broker::start(&database).await;
    let session = broker.session().await;
    let parts = opened(&session, ENDLESS).await;
    database.wait_for(STALLED, "1");
    let pid = session.get().await.unwrap().backend_pid;
    database.psql(&format!("SELECT pg_terminate_backend({pid})"));
    let lost = Streamed::read(parts).await;
    assert_eq!(lost.end.unwrap_err().end_reason(), "END_REASON_BACKEND_LOST");
    broker.session().await.execute("SELECT 1").await.unwrap();
}

/// A stream that has begun to come, of which nothing is read yet.
async fn opened(session: &Session, sql: &str) -> Streaming<pb::ExecuteStreamResponse> {
    session.open(session.streaming(sql, vec![])).await.unwrap()
}

type Call = JoinHandle<Result<Streaming<pb::ExecuteStreamResponse>, Failure>>;

/// Begins a stream without waiting for anything of it.
fn begin(session: &Session, request: pb::ExecuteStreamRequest) -> Call {
    let session = session.clone();
    tokio::spawn(async move { session.open(request).await })
}

/// Leaves a stream, whether something of it has come or not.
async fn leave(call: Call) {
    call.abort();
    drop(call.await);
}

async fn next(parts: &mut Streaming<pb::ExecuteStreamResponse>) -> Part {
    parts.message().await.unwrap().expect("the stream goes on").part.expect("every message has a part")
}

fn rows_of(part: &Part) -> u64 {
    match part {
        Part::Chunk(chunk) => chunk.row_count.into(),
        Part::Header(_) | Part::Trailer(_) => 0,
    }
}
