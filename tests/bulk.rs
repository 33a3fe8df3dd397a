//! COPY through the broker: PostgreSQL's own bytes, in a session's transaction or alone, and all or none of them.

use std::time::Duration;

use bytes::Bytes;
use futures_util::stream::{self, StreamExt};
use session_broker::grpc::pb;
use session_broker::grpc::pb::bulk_service_client::BulkServiceClient;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Status, Streaming};

#[cfg(target_os = "linux")]
use crate::command_line::Program;
use crate::proxy::Proxy;
use crate::streams::{ACTIVE, STALLED};
use crate::support::{Broker, Database, Failure, Session, first_row, int, psql, seconds, until};
use pb::copy_out_request::Source;
use pb::{CopyContext, CopyFormat, CopyOptions, Outcome, TransactionState};

/// How many COPY commands are under way.
const COPYING: &str = "SELECT count(*) FROM pg_stat_progress_copy WHERE datname = current_database()";

/// A table of all that is hard to write down, and another of the same shape.
const THINGS: &str = r#"
    CREATE TABLE things (id int PRIMARY KEY, note text, price numeric, moment timestamptz, tags text[], data jsonb,
        raw bytea);
    CREATE TABLE copies (LIKE things INCLUDING ALL);
    INSERT INTO things VALUES
        (1, E'tab\there', 1.50, '2026-11-22 10:00:00.5+00', '{"a,b",NULL}', '{"a": [1, null]}', '\x00ff'),
        (2, E'line\nbreak; "quoted" ''single'' \\ back | !', 'NaN', '-infinity', '[0:1]={"{}","\""}', '"x"', ''),
        (3, '', 0.00, '0044-03-15 00:00:00+00 BC', '{}', 'null', '\x5c'),
        (4, NULL, NULL, NULL, NULL, NULL, NULL),
        (5, '\N', -1e-20, '294276-12-31 00:00:00+00', '{{a},{b}}', '{}', '\x22'),
        (6, 'NIL', 1e30, '2026-11-22 10:00:00+00', '{NULL}', '[]', '\x2c'),
        (7, '\.', 7, 'infinity', '{"NULL"}', '1', '\x0a'),
        (8, 'üñí 𝄞', 8, '2026-11-22 10:00:00+00', '{" "}', 'true', '\xffffff');
"#;

/// More than anybody would wait for. In the list of what is selected, a series is made as it is read.
const ENDLESS: &str = "SELECT generate_series(1, 1000000000), repeat('x', 1000)";

#[tokio::test(flavor = "multi_thread")]
async fn data_is_copied_alone_and_committed() {
    let database = database_with_things();
    let broker = Broker::start(&database).await;
    let copied = copy_in(&broker, target("accounts"), ["3\t5\n", "4\t6.50\n"]).await.unwrap();
    assert_eq!((copied.row_count, copied.byte_count, copied.state), (2, 11, None));
    let commit = copied.commit.unwrap();
    assert_eq!((commit.outcome(), &commit.state), (Outcome::Committed, &None));
    assert_eq!(database.balances(), "100 100 5 6.50");
    assert_eq!(broker.resolve(&commit.commit_token).await.unwrap().outcome(), Outcome::Committed);
    // None at all is a COPY too.
    let copied = copy_in(&broker, target("accounts"), Vec::<Vec<u8>>::new()).await.unwrap();
    assert_eq!((copied.row_count, copied.byte_count), (0, 0));
    let read = copy_out(&broker, table("accounts")).await;
    let trailer = read.end.unwrap();
    assert_eq!((trailer.row_count, trailer.byte_count, trailer.state), (4, 23, None));
    assert_eq!(read.data, b"1\t100\n2\t100\n3\t5\n4\t6.50\n");
    assert_eq!(database.open_transactions(), "0");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_copy_is_a_part_of_its_sessions_transaction() {
    let database = database_with_things();
    let broker = Broker::start(&database).await;
    let session = broker.session().await;
    session.execute("UPDATE accounts SET balance = 7").await.unwrap();
    let copied = copy_in(&broker, within(&session, "accounts"), ["3\t5\n"]).await.unwrap();
    assert_eq!((copied.row_count, copied.commit), (1, None));
    assert_eq!(copied.state.unwrap().transaction_state(), TransactionState::Open);
    // It reads what was written before it, and what it writes is read after it.
    let request = pb::CopyOutRequest { context: of(&session), ..table("accounts") };
    let read = copy_out(&broker, request.clone()).await;
    assert_eq!(read.data, b"1\t7\n2\t7\n3\t5\n");
    let trailer = read.end.unwrap();
    assert_eq!((trailer.commit, trailer.state.unwrap().transaction_state()), (None, TransactionState::Open));
    assert_eq!(first_row(&session.execute("SELECT count(*) FROM accounts").await.unwrap()), [int(3)]);
    assert_eq!(database.balances(), "100 100");
    session.rollback().await.unwrap();
    assert_eq!(copy_out(&broker, request).await.data, b"1\t100\n2\t100\n");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_copy_begins_a_transaction_and_commits_it_when_asked() {
    let database = database_with_things();
    let broker = Broker::start(&database).await;
    let session = broker.session().await;
    let context = || of(&session).map(|context| CopyContext { commit: true, ..context });
    let target = pb::CopyInTarget { context: context(), ..target("accounts") };
    let copied = copy_in(&broker, target, ["3\t5\n"]).await.unwrap();
    let commit = copied.commit.unwrap();
    assert_eq!((commit.outcome(), &commit.state), (Outcome::Committed, &None));
    assert_eq!(copied.state.unwrap().transaction_state(), TransactionState::None);
    assert_eq!(database.balances(), "100 100 5");
    assert_eq!(session.commit().await.unwrap().transaction_id, commit.transaction_id);
    let delete = pb::CopyOutRequest { context: context(), ..query("DELETE FROM accounts WHERE id = 3 RETURNING id") };
    let read = copy_out(&broker, delete).await;
    let trailer = read.end.unwrap();
    assert_eq!((read.data.as_slice(), trailer.row_count), (b"3\n".as_slice(), 1));
    assert_eq!(trailer.commit.unwrap().outcome(), Outcome::Committed);
    assert_eq!(trailer.state.unwrap().transaction_state(), TransactionState::None);
    assert_eq!(database.balances(), "100 100");
}

#[tokio::test(flavor = "multi_thread")]
async fn every_format_is_psqls_own_and_comes_back_the_same() {
    let database = database_with_things();
    let broker = Broker::start(&database).await;
    let some = |text: &str| Some(text.to_owned());
    let plain = |format: CopyFormat| CopyOptions { format: format.into(), ..Default::default() };
    let spelled = CopyOptions { delimiter: some("|"), null: some("NONE"), ..plain(CopyFormat::Text) };
    let quoted = CopyOptions {
        header: true,
        delimiter: some(";"),
        null: some("NIL"),
        quote: some("'"),
        escape: some("!"),
        ..plain(CopyFormat::Csv)
    };
    for (options, sql) in [
        (plain(CopyFormat::Unspecified), "FORMAT text"),
        (plain(CopyFormat::Text), "FORMAT text"),
        (spelled, "FORMAT text, DELIMITER '|', NULL 'NONE'"),
        (plain(CopyFormat::Csv), "FORMAT csv"),
        (quoted, "FORMAT csv, HEADER, DELIMITER ';', NULL 'NIL', QUOTE '''', ESCAPE '!'"),
    ] {
        let read = copy_out(&broker, pb::CopyOutRequest { options: Some(options.clone()), ..table("things") }).await;
        let printed = database.psql(&format!("COPY things TO STDOUT ({sql})"));
        assert_eq!(String::from_utf8(read.data.clone()).unwrap(), printed + "\n", "{sql}");
        comes_back(&database, &broker, options, read).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn binary_data_comes_back_to_the_byte() {
    let database = database_with_things();
    let broker = Broker::start(&database).await;
    let options = CopyOptions { format: CopyFormat::Binary.into(), ..Default::default() };
    let request = |name| pb::CopyOutRequest { options: Some(options.clone()), ..table(name) };
    let read = copy_out(&broker, request("things")).await;
    assert!(read.data.starts_with(b"PGCOPY\n\xff\r\n\0"));
    let data = read.data.clone();
    comes_back(&database, &broker, options.clone(), read).await;
    assert_eq!(copy_out(&broker, request("copies")).await.data, data);
}

#[tokio::test(flavor = "multi_thread")]
async fn columns_may_be_chosen_and_ordered() {
    let database = database_with_things();
    let broker = Broker::start(&database).await;
    let columns = || vec!["price".to_owned(), "id".to_owned()];
    let target = pb::CopyInTarget { columns: columns(), ..target("copies") };
    let copied = copy_in(&broker, target, ["1.50\t1\n\\N\t2\n"]).await.unwrap();
    assert_eq!(copied.row_count, 2);
    assert_eq!(
        database.psql("SELECT string_agg(c::text, ' ' ORDER BY id) FROM copies AS c"),
        "(1,,1.50,,,,) (2,,,,,,)"
    );
    let read = copy_out(&broker, pb::CopyOutRequest { columns: columns(), ..table("copies") }).await;
    assert_eq!((read.data.as_slice(), read.end.unwrap().row_count), (b"1.50\t1\n\\N\t2\n".as_slice(), 2));
}

#[tokio::test(flavor = "multi_thread")]
async fn whatever_returns_rows_can_be_copied_out() {
    let database = database_with_things();
    let broker = Broker::start(&database).await;
    for (sql, data) in [
        ("SELECT id, balance + 1 FROM accounts ORDER BY id", "1\t101\n2\t101\n"),
        ("select 1 where false", ""),
        ("-- why\n/* and /* how */ */ SELECT 1 -- note", "1\n"),
        ("VALUES (1, NULL), (2, 'a')", "1\t\\N\n2\ta\n"),
        ("; SELECT ';'; -- note", ";\n"),
        ("TABLE accounts", "1\t100\n2\t100\n"),
        ("WITH one AS (SELECT 1) SELECT * FROM one", "1\n"),
        ("INSERT INTO accounts VALUES (3, 3) RETURNING id", "3\n"),
        ("UPDATE accounts SET balance = 4 WHERE id = 3 RETURNING balance", "4\n"),
        ("DELETE FROM accounts WHERE id = 3 RETURNING balance", "4\n"),
    ] {
        let read = copy_out(&broker, query(sql)).await;
        let trailer = read.end.unwrap_or_else(|failure| panic!("{sql}: {failure:?}"));
        assert_eq!(String::from_utf8(read.data).unwrap(), data, "{sql}");
        let [rows, bytes] = [data.lines().count(), data.len()].map(|count| u64::try_from(count).unwrap());
        assert_eq!((trailer.row_count, trailer.byte_count), (rows, bytes), "{sql}");
    }
    assert_eq!(database.balances(), "100 100");
}

#[tokio::test(flavor = "multi_thread")]
async fn names_are_taken_as_they_are() {
    let database = database_with_things();
    psql(
        &database.url(),
        r#"CREATE TABLE "odd ""Table" ("a b" int, "C" int); CREATE SCHEMA elsewhere;
            CREATE TABLE elsewhere.accounts (n int)"#,
    );
    let broker = Broker::start(&database).await;
    let columns = vec!["C".to_owned(), "a b".to_owned()];
    let target_columns = pb::CopyInTarget { columns, ..target("odd \"Table") };
    copy_in(&broker, target_columns, ["1\t2\n"]).await.unwrap();
    assert_eq!(copy_out(&broker, table("odd \"Table")).await.data, b"2\t1\n");
    copy_in(&broker, target("elsewhere.accounts"), ["7\n"]).await.unwrap();
    assert_eq!(copy_out(&broker, table("elsewhere.accounts")).await.data, b"7\n");
    assert_eq!(copy_out(&broker, table("public.accounts")).await.data, b"1\t100\n2\t100\n");
}

#[tokio::test(flavor = "multi_thread")]
async fn data_may_be_cut_anywhere() {
    let database = database_with_things();
    let broker = Broker::start(&database).await;
    let read = copy_out(&broker, table("things")).await;
    let bytes: Vec<_> = read.data.chunks(1).map(Bytes::copy_from_slice).collect();
    let copied = copy_in(&broker, target("copies"), bytes).await.unwrap();
    assert_eq!((copied.row_count, copied.byte_count), (8, u64::try_from(read.data.len()).unwrap()));
    assert_eq!(contents(&database, "copies"), contents(&database, "things"));
    // Parts without data change nothing.
    psql(&database.url(), "TRUNCATE copies");
    let parts = [Bytes::new(), read.data.into(), Bytes::new()];
    assert_eq!(copy_in(&broker, target("copies"), parts).await.unwrap().row_count, 8);
}

#[tokio::test(flavor = "multi_thread")]
async fn much_data_goes_in_and_comes_out() {
    const ROWS: u64 = 200_000;

    let database = database_with_things();
    let broker = Broker::start(&database).await;
    let data = (0..ROWS).map(|n| format!("{n}\tnote of row {n}\n")).collect::<Vec<_>>().concat();
    let columns = || vec!["id".to_owned(), "note".to_owned()];
    let parts: Vec<_> = data.as_bytes().chunks(50_000).map(Bytes::copy_from_slice).collect();
    let copied = copy_in(&broker, pb::CopyInTarget { columns: columns(), ..target("copies") }, parts).await.unwrap();
    let bytes = u64::try_from(data.len()).unwrap();
    assert_eq!((copied.row_count, copied.byte_count), (ROWS, bytes));
    let read = copy_out(&broker, pb::CopyOutRequest { columns: columns(), ..table("copies") }).await;
    let trailer = read.end.unwrap();
    assert_eq!((trailer.row_count, trailer.byte_count), (ROWS, bytes));
    assert!(read.data == data.as_bytes());
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_data_says_where_it_is_and_leaves_nothing() {
    let database = database_with_things();
    let broker = Broker::start(&database).await;
    let session = broker.session().await;
    for (data, sqlstate, code, place) in [
        ("3\t5\nx\t6\n", "22P02", Code::InvalidArgument, "line 2, column id"),
        ("3\t5\n4\n", "22P04", Code::InvalidArgument, "line 2"),
        ("3\t5\n4\t5\t6\n", "22P04", Code::InvalidArgument, "line 2"),
        ("3\t5\n1\t5\n", "23505", Code::AlreadyExists, "line 2"),
        ("3\t5\n4\t-5\n", "23514", Code::FailedPrecondition, "line 2"),
    ] {
        let alone = copy_in(&broker, target("accounts"), [data]).await.unwrap_err();
        assert_eq!((alone.code, alone.reason.as_str()), (code, "DATABASE_ERROR"), "{alone:?}");
        let error = alone.pg_error.unwrap();
        assert_eq!(error.sqlstate, sqlstate);
        assert!(error.r#where.contains(place), "{error:?}");
        assert_eq!(alone.state, None);
        let failed = copy_in(&broker, within(&session, "accounts"), [data]).await.unwrap_err();
        assert_eq!((failed.code, failed.metadata["sqlstate"].as_str()), (code, sqlstate));
        assert_eq!(failed.transaction_state(), TransactionState::Failed);
        let refused = copy_in(&broker, within(&session, "accounts"), ["3\t5\n"]).await.unwrap_err();
        assert_eq!((refused.code, refused.metadata["sqlstate"].as_str()), (Code::FailedPrecondition, "25P02"));
        session.rollback().await.unwrap();
    }
    let bytes = Bytes::from_static(b"3\t\xff\n");
    let failure = copy_in(&broker, target("copies"), [bytes]).await.unwrap_err();
    assert_eq!(failure.code, Code::InvalidArgument, "{failure:?}");
    // With a commit behind it, it is rolled back.
    let context = of(&session).map(|context| CopyContext { commit: true, ..context });
    let target = pb::CopyInTarget { context, ..target("accounts") };
    let failure = copy_in(&broker, target, ["3\t5\nx\t6\n"]).await.unwrap_err();
    assert_eq!(failure.transaction_state(), TransactionState::None);
    assert_eq!(failure.commit.unwrap().outcome(), Outcome::RolledBack);
    assert_eq!((database.balances().as_str(), database.open_transactions().as_str()), ("100 100", "0"));
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_data_is_told_before_all_of_it_has_come() {
    let database = database_with_things();
    let broker = Broker::start(&database).await;
    let upload = Upload::start(broker.bulk(), target("accounts"));
    upload.send("x\t1\n").await;
    // PostgreSQL reads in pieces of 64 KiB.
    upload.send("9\t9\n".repeat(50_000)).await;
    let failure = Failure::from(upload.answer().await.unwrap_err());
    assert_eq!((failure.code, failure.metadata["sqlstate"].as_str()), (Code::InvalidArgument, "22P02"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_query_that_fails_after_rows_ends_without_a_trailer() {
    let database = database_with_things();
    let broker = Broker::start(&database).await;
    let session = broker.session().await;
    let sql = "SELECT n, 1 / (50000 - n) FROM generate_series(1, 100000) AS n";
    let read = copy_out(&broker, pb::CopyOutRequest { context: of(&session), ..query(sql) }).await;
    assert!(!read.data.is_empty());
    let failure = read.end.unwrap_err();
    assert_eq!((failure.code, failure.metadata["sqlstate"].as_str()), (Code::InvalidArgument, "22012"));
    assert_eq!(failure.transaction_state(), TransactionState::Failed);
    session.rollback().await.unwrap();
    session.execute("SELECT 1").await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn data_that_does_not_say_that_it_is_complete_is_not_kept() {
    let database = database_with_things();
    let broker = Broker::start(&database).await;
    let messages = [first(target("accounts")), then("3\t5\n")];
    let refused = Failure::from(broker.bulk().copy_in(stream::iter(messages)).await.unwrap_err());
    assert_eq!((refused.code, refused.field.as_deref()), (Code::InvalidArgument, Some("end")));
    database.wait_for(ACTIVE, "0");
    assert_eq!((database.balances().as_str(), database.open_transactions().as_str()), ("100 100", "0"));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_fails_behind_the_last_row_is_told() {
    let database = Database::create();
    database.psql("CREATE TABLE cards (account int REFERENCES accounts); ALTER TABLE cards OWNER TO broker");
    let broker = Broker::start(&database).await;
    let session = broker.session().await;
    for before in [None, Some("UPDATE accounts SET balance = 7")] {
        if let Some(before) = before {
            session.execute(before).await.unwrap();
        }
        let insert = query("INSERT INTO cards VALUES (99) RETURNING account");
        let request = pb::CopyOutRequest { context: of(&session), ..insert };
        let failure = copy_out(&broker, request).await.end.unwrap_err();
        assert_eq!((failure.code, failure.metadata["sqlstate"].as_str()), (Code::FailedPrecondition, "23503"));
        assert_eq!(failure.transaction_state(), TransactionState::Failed);
        session.rollback().await.unwrap();
    }
    assert_eq!(database.balances(), "100 100");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_row_larger_than_a_result_may_be_is_refused() {
    let database = Database::create();
    let broker = Broker::start(&database).await;
    let session = broker.session().await;
    let sql = "SELECT repeat('x', CASE n WHEN 500 THEN 5000000 ELSE 10 END) FROM generate_series(1, 1000) AS n";
    let request = pb::CopyOutRequest { context: of(&session), ..query(sql) };
    let failure = copy_out(&broker, request).await.end.unwrap_err();
    assert_eq!((failure.code, failure.reason.as_str()), (Code::ResourceExhausted, "RESULT_TOO_LARGE"));
    assert_eq!(failure.transaction_state(), TransactionState::Failed);
    session.rollback().await.unwrap();
    session.execute_and_commit("SELECT 1").await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_caller_that_leaves_in_the_middle_leaves_nothing() {
    let database = database_with_things();
    let broker = Broker::start(&database).await;
    let session = broker.session().await;
    // One whose call is cancelled, and one whose link is cut.
    for cut in [false, true] {
        for target in [target("accounts"), within(&session, "accounts")] {
            let proxy = Proxy::start(&format!("postgresql://x@{}/db", broker.address), Duration::ZERO).await;
            let address = proxy.url.split(['@', '/']).nth(3).unwrap();
            let endpoint = Endpoint::from_shared(format!("http://{address}")).unwrap();
            let upload = Upload::start(BulkServiceClient::new(endpoint.connect_lazy()), target);
            upload.send("3\t5\n").await;
            database.wait_for(COPYING, "1");
            if cut {
                assert!(proxy.cut(0));
                database.wait_for(COPYING, "0");
                drop(upload);
            } else {
                upload.call.abort();
                database.wait_for(COPYING, "0");
            }
        }
        let failure = session.execute("SELECT 1").await.unwrap_err();
        assert_eq!((failure.code, failure.metadata["sqlstate"].as_str()), (Code::FailedPrecondition, "25P02"));
        session.rollback().await.unwrap();
    }
    database.wait_for(ACTIVE, "0");
    assert_eq!((database.balances().as_str(), database.open_transactions().as_str()), ("100 100", "0"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_caller_that_leaves_what_comes_out_has_it_cancelled() {
    let database = database_with_things();
    let broker = Broker::start(&database).await;
    let session = broker.session().await;
    for context in [None, of(&session)] {
        let in_session = context.is_some();
        let request = pb::CopyOutRequest { context, ..query(ENDLESS) };
        let parts = broker.bulk().copy_out(request).await.unwrap();
        database.wait_for(STALLED, "1");
        drop(parts);
        database.wait_for(ACTIVE, "0");
        if in_session {
            let failure = session.execute("SELECT 1").await.unwrap_err();
            assert_eq!((failure.code, failure.metadata["sqlstate"].as_str()), (Code::FailedPrecondition, "25P02"));
            session.rollback().await.unwrap();
        }
    }
    session.execute_and_commit("SELECT 1").await.unwrap();
    until(async || database.open_transactions() == "0").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn postgresql_waits_for_a_caller_that_reads_late_and_nothing_is_lost() {
    const ROWS: u64 = 40_000;

    let database = database_with_things();
    let broker = Broker::start(&database).await;
    let request = query(&format!("SELECT repeat('x', 999) FROM generate_series(1, {ROWS})"));
    let parts = broker.bulk().copy_out(request).await.unwrap().into_inner();
    database.wait_for(STALLED, "1");
    let read = Read::all(parts).await;
    let trailer = read.end.unwrap();
    assert_eq!((trailer.row_count, trailer.byte_count), (ROWS, 1000 * ROWS));
    assert_eq!(u64::try_from(read.data.len()).unwrap(), 1000 * ROWS);
}

#[cfg(target_os = "linux")]
#[tokio::test(flavor = "multi_thread")]
async fn a_caller_that_never_reads_takes_no_memory_and_meets_its_time_limit() {
    const GROWTH_KIB_MAX: u64 = 32 * 1024;

    let database = database_with_things();
    let broker = Program::serve(&database.url(), "");
    let session = broker.session().await;
    session.execute_and_commit("SELECT 1").await.unwrap();
    let before = broker.peak_memory();
    let context = Some(CopyContext { timeout: seconds(3), ..Default::default() });
    let request = pb::CopyOutRequest { context, ..query(ENDLESS) };
    let parts = BulkServiceClient::new(broker.channel()).copy_out(request).await.unwrap().into_inner();
    database.wait_for(STALLED, "1");
    database.wait_for(ACTIVE, "0");
    let growth = broker.peak_memory() - before;
    assert!(growth < GROWTH_KIB_MAX, "{growth} KiB more");
    let failure = Read::all(parts).await.end.unwrap_err();
    assert_eq!((failure.code, failure.reason.as_str()), (Code::DeadlineExceeded, "STATEMENT_TIMEOUT"));
    assert_eq!(failure.metadata["bound"], "timeout");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_caller_that_stops_sending_meets_its_time_limit() {
    let database = database_with_things();
    let broker = Broker::start(&database).await;
    let session = broker.session().await;
    let context = of(&session).map(|context| CopyContext { timeout: seconds(1), ..context });
    let upload = Upload::start(broker.bulk(), pb::CopyInTarget { context, ..target("accounts") });
    upload.send("3\t5\n").await;
    let failure = Failure::from(upload.answer().await.unwrap_err());
    assert_eq!((failure.code, failure.reason.as_str()), (Code::DeadlineExceeded, "STATEMENT_TIMEOUT"));
    assert_eq!(
        (failure.metadata["bound"].as_str(), failure.transaction_state()),
        ("timeout", TransactionState::Failed)
    );
    session.rollback().await.unwrap();
    session.execute_and_commit("SELECT 1").await.unwrap();
    assert_eq!((database.balances().as_str(), database.psql(COPYING).as_str()), ("100 100", "0"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_copy_without_its_target_first_is_refused() {
    let database = database_with_things();
    let broker = Broker::start(&database).await;
    let session = broker.session().await;
    let target = || pb::copy_in_request::Part::Target(within(&session, "accounts"));
    let data = || pb::copy_in_request::Part::Data(Bytes::from_static(b"3\t5\n"));
    for parts in [vec![], vec![data()], vec![data(), target()], vec![target(), data(), target()]] {
        let messages: Vec<_> = parts.into_iter().map(|part| pb::CopyInRequest { part: Some(part) }).collect();
        let refused = broker.bulk().copy_in(stream::iter(messages)).await.unwrap_err();
        let refused = Failure::from(refused);
        assert_eq!((refused.code, refused.reason.as_str()), (Code::InvalidArgument, "INVALID_REQUEST"), "{refused:?}");
        assert_eq!(refused.field.as_deref(), Some("target"));
    }
    database.wait_for(ACTIVE, "0");
    session.rollback().await.unwrap();
    // What was broken off in a session's transaction says what it has left.
    for commit in [false, true] {
        session.execute("UPDATE accounts SET balance = 7").await.unwrap();
        let mut target = within(&session, "accounts");
        target.context.as_mut().unwrap().commit = commit;
        for parts in [vec![first(target.clone()), then("3\t5\n")], vec![first(target.clone()), first(target.clone())]] {
            let refused = Failure::from(broker.bulk().copy_in(stream::iter(parts)).await.unwrap_err());
            assert_eq!((refused.code, refused.reason.as_str()), (Code::InvalidArgument, "INVALID_REQUEST"));
            let expected = if commit { TransactionState::None } else { TransactionState::Failed };
            assert_eq!(refused.transaction_state(), expected, "{refused:?}");
            if commit {
                assert_eq!(refused.commit.unwrap().outcome(), Outcome::RolledBack);
            }
            session.rollback().await.unwrap();
            session.execute("UPDATE accounts SET balance = 7").await.unwrap();
        }
        session.rollback().await.unwrap();
    }
    assert_eq!((database.balances().as_str(), database.open_transactions().as_str()), ("100 100", "0"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_table_that_is_no_name_is_refused_and_one_that_is_not_there_is_postgresqls_to_refuse() {
    let database = database_with_things();
    let broker = Broker::start(&database).await;
    let session = broker.session().await;
    let long = "x".repeat(64);
    for name in ["", ".", "accounts.", ".accounts", "nul\0", &long] {
        session.execute("SELECT 1").await.unwrap();
        let inward = copy_in(&broker, within(&session, name), ["3\t5\n"]).await.unwrap_err();
        let outward = copy_out(&broker, pb::CopyOutRequest { context: of(&session), ..table(name) }).await;
        for refused in [inward, outward.end.unwrap_err()] {
            assert_eq!((refused.code, refused.field.as_deref()), (Code::InvalidArgument, Some("table")), "{name}");
            assert_eq!(refused.transaction_state(), TransactionState::Open, "{name}");
        }
        let state = session.execute("SELECT 1").await.unwrap().state.unwrap();
        assert_eq!(state.transaction_state(), TransactionState::Open);
    }
    for (name, code, sqlstate) in [
        ("nosuch", Code::InvalidArgument, "42P01"),
        ("Accounts", Code::InvalidArgument, "42P01"),
        ("accounts\"; DELETE FROM accounts; --", Code::InvalidArgument, "42P01"),
        ("accounts TO PROGRAM 'true' --", Code::InvalidArgument, "42P01"),
        ("pg_catalog.pg_authid", Code::PermissionDenied, "42501"),
    ] {
        let inward = copy_in(&broker, target(name), ["3\t5\n"]).await.unwrap_err();
        let outward = copy_out(&broker, table(name)).await.end.unwrap_err();
        for failure in [inward, outward] {
            let seen = failure.metadata.get("sqlstate").map(String::as_str);
            assert_eq!((failure.code, seen), (code, Some(sqlstate)), "{name}: {failure:?}");
        }
    }
    let columns = vec!["id\"), (balance".to_owned()];
    let failure = copy_in(&broker, pb::CopyInTarget { columns, ..target("accounts") }, ["3\n"]).await.unwrap_err();
    assert_eq!((failure.code, failure.metadata["sqlstate"].as_str()), (Code::InvalidArgument, "42703"));
    assert_eq!(database.balances(), "100 100");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_returns_no_rows_is_not_copied_out() {
    let database = database_with_things();
    let broker = Broker::start(&database).await;
    let session = broker.session().await;
    session.execute("SELECT 1").await.unwrap();
    for sql in [
        "",
        " -- nothing\n",
        "COMMIT",
        "ROLLBACK",
        "DROP TABLE accounts",
        "/* SELECT */ DROP TABLE accounts",
        "COPY accounts TO STDOUT",
        "EXPLAIN SELECT 1",
        "SET work_mem = '1MB'",
        "SELECT 'nul\0'",
    ] {
        let read = copy_out(&broker, pb::CopyOutRequest { context: of(&session), ..query(sql) }).await;
        let refused = read.end.unwrap_err();
        assert_eq!((refused.code, refused.field.as_deref()), (Code::InvalidArgument, Some("query")), "{sql}");
    }
    let state = session.execute("SELECT 1").await.unwrap().state.unwrap();
    assert_eq!(state.transaction_state(), TransactionState::Open);
    // These look like rows at first.
    for sql in [
        "DELETE FROM accounts",
        "SELECT 1) TO STDOUT --",
        "SELECT 1) TO STDOUT (FORMAT csv) --",
        "SELECT 1) TO PROGRAM 'true' --",
        "SELECT 1) TO STDOUT; DELETE FROM accounts; COPY (SELECT 2",
        "SELECT 1; DELETE FROM accounts",
        "SELECT $1::int",
        "SELEKT",
    ] {
        let read = copy_out(&broker, query(sql)).await;
        let failure = read.end.unwrap_err();
        assert_eq!((failure.code, read.data.len()), (Code::InvalidArgument, 0), "{sql}: {failure:?}");
    }
    let sourceless = pb::CopyOutRequest { context: of(&session), ..Default::default() };
    assert_eq!(copy_out(&broker, sourceless).await.end.unwrap_err().code, Code::InvalidArgument);
    assert_eq!(database.balances(), "100 100");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_copy_of_no_living_session_is_refused() {
    let database = database_with_things();
    let broker = Broker::start(&database).await;
    let session = broker.session().await;
    session.close().await.unwrap();
    let ended = copy_in(&broker, within(&session, "accounts"), ["3\t5\n"]).await.unwrap_err();
    assert_eq!(ended.end_reason(), "END_REASON_CLOSED");
    let unknown = Session { token: format!("broker.{}.{}", "0".repeat(32), "0".repeat(32)), ..session };
    let request = pb::CopyOutRequest { context: of(&unknown), ..table("accounts") };
    let refused = copy_out(&broker, request).await.end.unwrap_err();
    assert_eq!((refused.code, refused.reason.as_str()), (Code::NotFound, "SESSION_UNKNOWN"));
    assert_eq!(database.balances(), "100 100");
}

fn database_with_things() -> Database {
    let database = Database::create();
    psql(&database.url(), THINGS);
    database
}

/// What `things` or `copies` holds, as PostgreSQL prints it.
fn contents(database: &Database, name: &str) -> String {
    database.psql(&format!("SELECT string_agg(t::text, '|' ORDER BY id) FROM {name} AS t"))
}

/// What was read of `things` makes the same of `copies`.
async fn comes_back(database: &Database, broker: &Broker, options: CopyOptions, read: Read) {
    let trailer = read.end.unwrap();
    let bytes = u64::try_from(read.data.len()).unwrap();
    assert_eq!((trailer.row_count, trailer.byte_count), (8, bytes));
    psql(&database.url(), "TRUNCATE copies");
    let target = pb::CopyInTarget { options: Some(options), ..target("copies") };
    let copied = copy_in(broker, target, [read.data]).await.unwrap();
    assert_eq!((copied.row_count, copied.byte_count), (8, bytes));
    assert_eq!(contents(database, "copies"), contents(database, "things"));
}

/// In the session's transaction.
#[allow(clippy::unnecessary_wraps, reason = "the protocol's messages are optional")]
fn of(session: &Session) -> Option<CopyContext> {
    Some(CopyContext { session_token: session.token.clone(), ..Default::default() })
}

fn target(table: &str) -> pb::CopyInTarget {
    pb::CopyInTarget { table: table.into(), ..Default::default() }
}

fn within(session: &Session, table: &str) -> pb::CopyInTarget {
    pb::CopyInTarget { context: of(session), ..target(table) }
}

fn table(name: &str) -> pb::CopyOutRequest {
    pb::CopyOutRequest { source: Some(Source::Table(name.into())), ..Default::default() }
}

fn query(sql: &str) -> pb::CopyOutRequest {
    pb::CopyOutRequest { source: Some(Source::Query(sql.into())), ..Default::default() }
}

fn first(target: pb::CopyInTarget) -> pb::CopyInRequest {
    pb::CopyInRequest { part: Some(pb::copy_in_request::Part::Target(target)) }
}

fn then(data: impl Into<Bytes>) -> pb::CopyInRequest {
    pb::CopyInRequest { part: Some(pb::copy_in_request::Part::Data(data.into())) }
}

fn end() -> pb::CopyInRequest {
    pb::CopyInRequest { part: Some(pb::copy_in_request::Part::End(pb::CopyInEnd {})) }
}

/// Copies these parts of data in.
async fn copy_in<D: Into<Bytes>>(
    broker: &Broker,
    target: pb::CopyInTarget,
    data: impl IntoIterator<Item = D>,
) -> Result<pb::CopyInResponse, Failure> {
    let messages: Vec<_> = std::iter::once(first(target)).chain(data.into_iter().map(then)).chain([end()]).collect();
    Ok(broker.bulk().copy_in(stream::iter(messages)).await?.into_inner())
}

/// Data on its way in, which has not come to its end.
struct Upload {
    messages: mpsc::Sender<pb::CopyInRequest>,
    call: JoinHandle<Result<pb::CopyInResponse, Status>>,
}

impl Upload {
    fn start(mut client: BulkServiceClient<Channel>, target: pb::CopyInTarget) -> Self {
        let (messages, sent) = mpsc::channel(1);
        let rest = stream::unfold(sent, async |mut sent: mpsc::Receiver<_>| Some((sent.recv().await?, sent)));
        let parts = stream::iter([first(target)]).chain(rest);
        let call = tokio::spawn(async move { Ok(client.copy_in(parts).await?.into_inner()) });
        Self { messages, call }
    }

    async fn send(&self, data: impl Into<Bytes>) {
        // Nobody takes it any more when the call has been answered.
        let _ = self.messages.send(then(data)).await;
    }

    /// The answer, which comes although there may be more data.
    async fn answer(self) -> Result<pb::CopyInResponse, Status> {
        self.call.await.unwrap()
    }
}

/// What came of a CopyOut.
struct Read {
    data: Vec<u8>,
    end: Result<pb::CopyOutTrailer, Failure>,
}

impl Read {
    /// Reads to the end: data, and one trailer with nothing behind it; or an error anywhere.
    async fn all(mut parts: Streaming<pb::CopyOutResponse>) -> Self {
        use pb::copy_out_response::Part;
        let mut data = Vec::new();
        let end = loop {
            let message = match parts.message().await {
                Ok(message) => message.expect("a trailer or an error ends it"),
                Err(status) => break Err(Failure::from(status)),
            };
            match message.part.expect("every message has a part") {
                Part::Data(some) => data.extend_from_slice(&some),
                Part::Trailer(trailer) => {
                    assert_eq!(parts.message().await.unwrap(), None, "something behind the trailer");
                    break Ok(trailer);
                }
            }
        };
        Self { data, end }
    }
}

/// A whole CopyOut. Its error may come instead of the stream as well as in it.
async fn copy_out(broker: &Broker, request: pb::CopyOutRequest) -> Read {
    match broker.bulk().copy_out(request).await {
        Ok(parts) => Read::all(parts.into_inner()).await,
        Err(status) => Read { data: Vec::new(), end: Err(Failure::from(status)) },
    }
}
