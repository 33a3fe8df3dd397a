//! How transactions begin, and how they end: isolation, roles and settings, conflicts, ids and commit tokens.

use session_broker::grpc::pb;
use tonic::Code;

use crate::batches::{batch, kinds, one};
use crate::support::{Broker, Database, Failure, Session, first_row, int, text};
use pb::value::Kind;
use pb::{IsolationLevel, Outcome, TransactionState, retry_advice::Scope};

const SHOWN: &str = "SELECT current_setting('transaction_isolation'), current_setting('transaction_read_only'), \
     current_setting('transaction_deferrable')";

#[tokio::test(flavor = "multi_thread")]
async fn a_transaction_may_be_what_the_servers_defaults_are_not() {
    let database = Database::create();
    let engine =
        "server_settings = { default_transaction_read_only = \"on\", default_transaction_deferrable = \"on\" }";
    let broker = Broker::start_with(&database, engine, "").await;
    let session = broker.session().await;
    let own = transaction_options(IsolationLevel::Unspecified, Some(false), Some(false));
    let request = pb::ExecuteRequest { transaction_options: Some(own), ..session.statement(SHOWN, vec![]) };
    let shown = session.run(request).await.unwrap();
    assert_eq!(first_row(&shown), ["read committed", "off", "off"].map(text));
    session.execute_and_commit("UPDATE accounts SET balance = 7 WHERE id = 1").await.unwrap();
    let denied = session.execute("UPDATE accounts SET balance = 8 WHERE id = 1").await.unwrap_err();
    assert_eq!(denied.metadata["sqlstate"], "25006");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_transactions_options_go_over_its_sessions_and_for_it_alone() {
    let database = Database::create();
    let broker = Broker::start(&database).await;
    let plain = pb::SessionOptions::default();
    let strict = pb::SessionOptions {
        isolation_level: IsolationLevel::Serializable.into(),
        read_only: true,
        deferrable: true,
        ..Default::default()
    };
    let (by_default, strictly) = (["read committed", "off", "off"], ["serializable", "on", "on"]);
    let all = transaction_options(IsolationLevel::Serializable, Some(true), Some(true));
    let none = transaction_options(IsolationLevel::ReadCommitted, Some(false), Some(false));
    let level = transaction_options(IsolationLevel::RepeatableRead, None, None);
    let one_flag = transaction_options(IsolationLevel::Unspecified, None, Some(false));
    for (options, own, shown, later) in [
        (&plain, all, strictly, by_default),
        (&strict, none, by_default, strictly),
        (&plain, level, ["repeatable read", "off", "off"], by_default),
        (&strict, level, ["repeatable read", "on", "on"], strictly),
        (&strict, one_flag, ["serializable", "on", "off"], strictly),
    ] {
        let session = broker.session_with(with_options(options.clone())).await;
        let request = pb::ExecuteRequest { transaction_options: Some(own), ..session.statement(SHOWN, vec![]) };
        assert_eq!(first_row(&session.run(request).await.unwrap()), shown.map(text));
        assert_eq!(first_row(&session.execute_and_commit(SHOWN).await.unwrap()), shown.map(text));
        assert_eq!(first_row(&session.execute_and_commit(SHOWN).await.unwrap()), later.map(text));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn whatever_begins_a_transaction_can_say_how() {
    let database = Database::create();
    let broker = Broker::start(&database).await;
    let session = broker.session().await;
    let options = transaction_options(IsolationLevel::RepeatableRead, Some(true), None);
    let expected = ["repeatable read", "on", "off"].map(text);
    let request = pb::ExecuteBatchRequest { transaction_options: Some(options), ..batch(vec![one(SHOWN)]) };
    let batched = session.execute_batch(request).await.unwrap();
    assert_eq!(kinds(&batched.results[0]), std::slice::from_ref(&expected));
    session.commit().await.unwrap();
    session.client.clone().create_savepoint(savepoint(&session, options)).await.unwrap();
    assert_eq!(first_row(&session.execute(SHOWN).await.unwrap()), expected);
    let denied = session.execute("DELETE FROM accounts").await.unwrap_err();
    assert_eq!((denied.code, denied.metadata["sqlstate"].as_str()), (Code::FailedPrecondition, "25006"));
}

#[tokio::test(flavor = "multi_thread")]
async fn options_for_a_transaction_that_is_open_already_are_refused() {
    let database = Database::create();
    let broker = Broker::start(&database).await;
    let session = broker.session().await;
    session.execute("UPDATE accounts SET balance = 7").await.unwrap();
    let options = transaction_options(IsolationLevel::ReadCommitted, None, None);
    let update = session.statement("UPDATE accounts SET balance = 8", vec![]);
    let execute = pb::ExecuteRequest { transaction_options: Some(options), ..update };
    let updates = batch(vec![one("UPDATE accounts SET balance = 8")]);
    let execute_batch = pb::ExecuteBatchRequest { transaction_options: Some(options), ..updates };
    let created = session.client.clone().create_savepoint(savepoint(&session, options)).await;
    for failure in [
        session.run(execute).await.unwrap_err(),
        session.execute_batch(execute_batch).await.unwrap_err(),
        Failure::from(created.unwrap_err()),
    ] {
        refused(&failure, "transaction_options");
    }
    assert_eq!(standing(&session).await, TransactionState::Open);
    session.commit().await.unwrap();
    assert_eq!(database.balances(), "7 7");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_isolation_level_that_is_none_is_refused_and_begins_nothing() {
    let database = Database::create();
    let broker = Broker::start(&database).await;
    let session = broker.session().await;
    let options = Some(pb::TransactionOptions { isolation_level: 9, ..Default::default() });
    let request = pb::ExecuteRequest { transaction_options: options, ..session.statement("SELECT 1", vec![]) };
    let failure = session.run(request).await.unwrap_err();
    assert_eq!((failure.code, failure.reason.as_str()), (Code::InvalidArgument, "INVALID_REQUEST"));
    assert!(failure.field.as_ref().unwrap().starts_with("transaction_options"), "{failure:?}");
    assert_eq!(standing(&session).await, TransactionState::None);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_serialization_failure_of_a_statement_aborts_and_a_retry_succeeds() {
    let database = Database::create();
    let broker = Broker::start(&database).await;
    let session = broker.session_with(isolated(IsolationLevel::RepeatableRead)).await;
    session.execute("SELECT balance FROM accounts").await.unwrap();
    database.psql("UPDATE accounts SET balance = 50");
    let update = "UPDATE accounts SET balance = balance + 1";
    let failure = session.execute(update).await.unwrap_err();
    assert_eq!((failure.code, failure.metadata["sqlstate"].as_str()), (Code::Aborted, "40001"));
    assert_eq!((failure.advice, failure.transaction_state()), (Scope::Transaction, TransactionState::Failed));
    session.rollback().await.unwrap();
    session.execute_and_commit(update).await.unwrap();
    assert_eq!(database.balances(), "51 51");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_serialization_failure_of_a_commit_aborts_and_a_retry_succeeds() {
    let database = Database::create();
    let broker = Broker::start(&database).await;
    let first = broker.session_with(isolated(IsolationLevel::Serializable)).await;
    let second = broker.session_with(isolated(IsolationLevel::Serializable)).await;
    // Each reads what the other writes: both statements pass, and the later commit fails.
    read_all_and_take(&first, 1).await;
    read_all_and_take(&second, 2).await;
    assert_eq!(first.commit().await.unwrap().outcome(), Outcome::Committed);
    let failure = second.commit().await.unwrap_err();
    assert_eq!((failure.code, failure.metadata["sqlstate"].as_str()), (Code::Aborted, "40001"));
    for failure in [failure, second.commit().await.unwrap_err()] {
        assert_eq!((failure.code, failure.advice), (Code::Aborted, Scope::Transaction));
        assert_eq!(failure.commit.as_ref().unwrap().outcome(), Outcome::RolledBack);
        assert_eq!(failure.transaction_state(), TransactionState::None);
    }
    assert_eq!(database.balances(), "0 100");
    read_all_and_take(&second, 2).await;
    second.commit().await.unwrap();
    assert_eq!(database.balances(), "0 0");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_commit_in_the_last_execute_says_its_serialization_failure_too() {
    let database = Database::create();
    let broker = Broker::start(&database).await;
    let first = broker.session_with(isolated(IsolationLevel::Serializable)).await;
    let second = broker.session_with(isolated(IsolationLevel::Serializable)).await;
    read_all_and_take(&first, 1).await;
    read_all_and_take(&second, 2).await;
    first.commit().await.unwrap();
    let failure = second.execute_and_commit("SELECT 1").await.unwrap_err();
    assert_eq!((failure.code, failure.metadata["sqlstate"].as_str()), (Code::Aborted, "40001"));
    assert_eq!(failure.advice, Scope::Transaction);
    assert_eq!(failure.commit.as_ref().unwrap().outcome(), Outcome::RolledBack);
    assert_eq!(failure.transaction_state(), TransactionState::None);
    assert_eq!(database.balances(), "0 100");
}

#[tokio::test(flavor = "multi_thread")]
async fn of_two_in_a_deadlock_one_is_aborted_and_its_retry_succeeds() {
    let database = Database::create();
    let broker = Broker::start(&database).await;
    let (one, other) = (broker.session().await, broker.session().await);
    let credit = |id: i32| format!("UPDATE accounts SET balance = balance + 1 WHERE id = {id}");
    one.execute(&credit(1)).await.unwrap();
    other.execute(&credit(2)).await.unwrap();
    let (its, the_others) = (credit(2), credit(1));
    let (ones, others) = tokio::join!(one.execute(&its), other.execute(&the_others));
    let (winner, victim, failure) = match (ones, others) {
        (Ok(_), Err(failure)) => (one, other, failure),
        (Err(failure), Ok(_)) => (other, one, failure),
        both => panic!("one of them is the victim: {both:?}"),
    };
    assert_eq!((failure.code, failure.metadata["sqlstate"].as_str()), (Code::Aborted, "40P01"));
    assert_eq!((failure.advice, failure.transaction_state()), (Scope::Transaction, TransactionState::Failed));
    winner.commit().await.unwrap();
    victim.rollback().await.unwrap();
    for id in [1, 2] {
        victim.execute(&credit(id)).await.unwrap();
    }
    victim.commit().await.unwrap();
    assert_eq!(database.balances(), "102 102");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_role_is_its_transactions_and_gone_from_the_connection_after_it() {
    let database = Database::create();
    let role = role(&database);
    let broker = Broker::start_with(&database, ONE_CONNECTION, &profile(&[&role], &[])).await;
    let plain = broker.session().await;
    let session = broker.session_with(as_role(&role)).await;
    let who = "SELECT current_user::text, session_user::text, current_setting('role'), pg_backend_pid()";
    for ending in 0..3 {
        let inside = first_row(&session.execute(who).await.unwrap());
        assert_eq!(inside[..3], [text(&role), text("broker"), text(&role)]);
        match ending {
            0 => drop(session.commit().await.unwrap()),
            1 => drop(session.rollback().await.unwrap()),
            _ => {
                session.execute("SELECT 1 / 0").await.unwrap_err();
                session.rollback().await.unwrap();
            }
        }
        let outside = first_row(&plain.execute_and_commit(who).await.unwrap());
        assert_eq!(outside[..3], [text("broker"), text("broker"), text("none")]);
        // It was the same connection.
        assert_eq!(outside[3], inside[3]);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_role_may_do_what_it_was_granted_and_no_more() {
    let database = Database::create();
    let role = role(&database);
    let broker = Broker::start_with(&database, "", &profile(&[&role], &[])).await;
    let session = broker.session_with(as_role(&role)).await;
    session.execute("SELECT id FROM accounts").await.unwrap();
    let failure = session.execute("UPDATE accounts SET balance = 7").await.unwrap_err();
    assert_eq!((failure.code, failure.metadata["sqlstate"].as_str()), (Code::PermissionDenied, "42501"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_role_of_any_name_can_be_taken() {
    let database = Database::create();
    let odd = format!("Odd \"role\", it's {}", database.name);
    let quoted = odd.replace('"', "\"\"");
    database.psql(&format!("CREATE ROLE \"{quoted}\"; GRANT \"{quoted}\" TO broker"));
    let broker = Broker::start_with(&database, "", &profile(&[&odd], &[])).await;
    let session = broker.session_with(as_role(&odd)).await;
    let row = first_row(&session.execute("SELECT current_user::text").await.unwrap());
    assert_eq!(row, [text(&odd)]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_role_that_is_not_allowed_is_refused_at_the_beginning() {
    let database = Database::create();
    let role = role(&database);
    let broker = Broker::start_with(&database, "", &profile(&[&role], &[])).await;
    for other in ["postgres", "broker", "none", "pg_read_all_data", &role.to_uppercase(), &format!("{role} ")] {
        refused(&begin_failure(&broker, as_role(other)).await, "options.role");
    }
    let closed = Broker::start(&database).await;
    refused(&begin_failure(&closed, as_role(&role)).await, "options.role");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_role_that_cannot_be_taken_fails_the_first_call_and_leaves_nothing_open() {
    let database = Database::create();
    let (missing, foreign) = (format!("missing_{}", database.name), format!("foreign_{}", database.name));
    database.psql(&format!("CREATE ROLE {foreign}"));
    let broker = Broker::start_with(&database, ONE_CONNECTION, &profile(&[&missing, &foreign], &[])).await;
    let plain = broker.session().await;
    for role in [&missing, &foreign] {
        let session = broker.session_with(as_role(role)).await;
        for _ in 0..2 {
            let failure = session.execute("UPDATE accounts SET balance = 7").await.unwrap_err();
            assert!(matches!(failure.code, Code::InvalidArgument | Code::PermissionDenied), "{failure:?}");
            assert_eq!(failure.transaction_state(), TransactionState::None, "{failure:?}");
            // The only connection is free and clean.
            let user = first_row(&plain.execute_and_commit("SELECT current_user::text").await.unwrap());
            assert_eq!(user, [text("broker")]);
        }
        assert_eq!(session.commit().await.unwrap().outcome(), Outcome::NothingWritten);
    }
    assert_eq!((database.balances().as_str(), database.open_transactions().as_str()), ("100 100", "0"));
}

#[tokio::test(flavor = "multi_thread")]
async fn settings_are_their_transactions_and_gone_from_the_connection_after_it() {
    let database = Database::create();
    let broker = Broker::start_with(&database, ONE_CONNECTION, &profile(&[], &["app.tenant"])).await;
    let plain = broker.session().await;
    let session = broker.session_with(settings([("app.tenant", "acme")])).await;
    for ending in 0..3 {
        let inside = session.execute("SELECT current_setting('app.tenant'), pg_backend_pid()").await.unwrap();
        let [tenant, pid]: [Kind; 2] = first_row(&inside).try_into().unwrap();
        assert_eq!(tenant, text("acme"));
        match ending {
            0 => drop(session.commit().await.unwrap()),
            1 => drop(session.rollback().await.unwrap()),
            _ => drop(session.execute_and_commit("SELECT 1").await.unwrap()),
        }
        // '' or NULL, and which of them is PostgreSQL's affair.
        let sql = "SELECT coalesce(current_setting('app.tenant', true), ''), pg_backend_pid()";
        assert_eq!(first_row(&plain.execute_and_commit(sql).await.unwrap()), [text(""), pid]);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_settings_value_arrives_as_it_is() {
    let database = Database::create();
    let broker = Broker::start_with(&database, "", &profile(&[], &["app.tenant"])).await;
    let longest = "x".repeat(1024);
    for value in
        ["", " padded ", "it's", "a\"b", "back\\slash\\'", "'; DROP TABLE accounts; --", "$1 %s {}", "Ünï 𝄞", &longest]
    {
        let session = broker.session_with(settings([("app.tenant", value)])).await;
        let row = first_row(&session.execute("SELECT current_setting('app.tenant')").await.unwrap());
        assert_eq!(row, [text(value)]);
    }
    assert_eq!(database.balances(), "100 100");
}

#[tokio::test(flavor = "multi_thread")]
async fn settings_that_cannot_be_are_refused_at_the_beginning() {
    let database = Database::create();
    let names: Vec<_> = (0..17).map(|n| format!("app.s{n}")).collect();
    let names: Vec<_> = names.iter().map(String::as_str).collect();
    let broker = Broker::start_with(&database, "", &profile(&[], &names)).await;
    let (long, wide) = ("x".repeat(1025), "é".repeat(513));
    for value in ["line\nbreak", "tab\t", "nul\0", "\x1b", "\x7f", &long, &wide] {
        refused(&begin_failure(&broker, settings([("app.s0", value)])).await, "options.settings");
    }
    for name in ["app.other", "role", "search_path", "statement_timeout", "app", ""] {
        refused(&begin_failure(&broker, settings([(name, "x")])).await, "options.settings");
    }
    let many = |count: usize| settings(names[..count].iter().map(|name| (*name, "x")));
    refused(&begin_failure(&broker, many(17)).await, "options.settings");
    let session = broker.session_with(many(16)).await;
    let row = first_row(&session.execute("SELECT current_setting('app.s15')").await.unwrap());
    assert_eq!(row, [text("x")]);
}

#[tokio::test(flavor = "multi_thread")]
async fn tenants_see_their_own_rows_and_a_session_without_a_tenant_none() {
    let database = Database::create();
    let role = role(&database);
    database.psql(&format!(
        "CREATE TABLE notes (tenant text NOT NULL, body text NOT NULL); \
         INSERT INTO notes VALUES ('acme', 'a'), ('acme', 'b'), ('umbrella', 'c'); \
         ALTER TABLE notes ENABLE ROW LEVEL SECURITY; \
         CREATE POLICY own ON notes USING (tenant = nullif(current_setting('app.tenant', true), '')); \
         GRANT SELECT, INSERT ON notes TO {role}"
    ));
    // On one connection, so that what one leaves the other would find.
    let broker = Broker::start_with(&database, ONE_CONNECTION, &profile(&[&role], &["app.tenant"])).await;
    let tenant = |name: &str| {
        let options = settings([("app.tenant", name)]).options.unwrap();
        broker.session_with(with_options(pb::SessionOptions { role: role.clone(), ..options }))
    };
    let (acme, umbrella) = (tenant("acme").await, tenant("umbrella").await);
    let nobody = broker.session_with(as_role(&role)).await;
    let seen = "SELECT coalesce(string_agg(body, ' ' ORDER BY body), '') FROM notes";
    for _ in 0..2 {
        for (session, expected) in [(&acme, "a b"), (&nobody, ""), (&umbrella, "c"), (&nobody, "")] {
            assert_eq!(first_row(&session.execute_and_commit(seen).await.unwrap()), [text(expected)]);
        }
    }
    acme.execute_and_commit("INSERT INTO notes VALUES ('acme', 'd')").await.unwrap();
    for session in [&acme, &nobody] {
        let forged = session.execute_and_commit("INSERT INTO notes VALUES ('umbrella', 'e')").await.unwrap_err();
        assert_eq!((forged.code, forged.metadata["sqlstate"].as_str()), (Code::PermissionDenied, "42501"));
    }
    assert_eq!(database.psql("SELECT string_agg(body, ' ' ORDER BY body) FROM notes"), "a b c d");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_transactions_id_and_commit_token_are_told_from_its_first_write_on() {
    let database = Database::create();
    let broker = Broker::start(&database).await;
    let session = broker.session().await;
    let reading = session.execute("SELECT id FROM accounts").await.unwrap().state.unwrap();
    assert_eq!((reading.transaction_id, reading.commit_token.as_str()), (0, ""));
    let writing = session.execute("UPDATE accounts SET balance = 7").await.unwrap().state.unwrap();
    assert!(writing.transaction_id > 0 && !writing.commit_token.is_empty());
    let asked = session.execute("SELECT pg_current_xact_id()::text").await.unwrap();
    assert_eq!(first_row(&asked), [text(&writing.transaction_id.to_string())]);
    let known = session.get().await.unwrap().state.unwrap();
    assert_eq!((known.transaction_id, &known.commit_token), (writing.transaction_id, &writing.commit_token));
    let committed = session.commit().await.unwrap();
    assert_eq!(committed.outcome(), Outcome::Committed);
    assert_eq!((committed.transaction_id, &committed.commit_token), (writing.transaction_id, &writing.commit_token));
    let over = committed.state.unwrap();
    assert_eq!((over.transaction_id, over.commit_token.as_str()), (0, ""));
    assert_eq!(broker.resolve(&writing.commit_token).await.unwrap().outcome(), Outcome::Committed);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_transaction_that_wrote_nothing_has_neither_id_nor_token() {
    let database = Database::create();
    let broker = Broker::start(&database).await;
    let session = broker.session().await;
    session.execute("SELECT id FROM accounts").await.unwrap();
    let last = session.execute_and_commit("SELECT 1").await.unwrap().commit.unwrap();
    session.execute("SELECT id FROM accounts").await.unwrap();
    for commit in [last, session.commit().await.unwrap()] {
        assert_eq!((commit.outcome(), commit.transaction_id), (Outcome::NothingWritten, 0));
        assert!(commit.commit_token.is_empty());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_execute_that_commits_tells_id_and_token_too() {
    let database = Database::create();
    let broker = Broker::start(&database).await;
    let session = broker.session().await;
    let commit = session.execute_and_commit("UPDATE accounts SET balance = 7").await.unwrap().commit.unwrap();
    let status = format!("SELECT pg_xact_status('{}'::xid8)", commit.transaction_id);
    assert_eq!(database.psql(&status), "committed");
    let resolved = broker.resolve(&commit.commit_token).await.unwrap();
    assert_eq!((resolved.outcome(), resolved.transaction_id), (Outcome::Committed, commit.transaction_id));
}

/// An engine's keys: whatever a transaction leaves on its connection, the next one meets.
const ONE_CONNECTION: &str = "pool_size = 1\nmax_overflow = 0";

/// A role of the database's own, for roles are the whole cluster's. It may read the accounts, and broker may be it.
pub(crate) fn role(database: &Database) -> String {
    let role = format!("app_reader_{}", database.name);
    database.psql(&format!("CREATE ROLE {role}; GRANT {role} TO broker; GRANT SELECT ON accounts TO {role}"));
    role
}

/// The section that allows these.
fn profile(roles: &[&str], settings: &[&str]) -> String {
    format!("[profiles.default]\nroles = {roles:?}\nsettings = {settings:?}")
}

fn with_options(options: pb::SessionOptions) -> pb::BeginSessionRequest {
    pb::BeginSessionRequest { options: Some(options), ..Default::default() }
}

fn isolated(level: IsolationLevel) -> pb::BeginSessionRequest {
    with_options(pb::SessionOptions { isolation_level: level.into(), ..Default::default() })
}

fn as_role(role: &str) -> pb::BeginSessionRequest {
    with_options(pb::SessionOptions { role: role.into(), ..Default::default() })
}

fn settings<'a>(settings: impl IntoIterator<Item = (&'a str, &'a str)>) -> pb::BeginSessionRequest {
    let settings = settings.into_iter().map(|(name, value)| (name.into(), value.into())).collect();
    with_options(pb::SessionOptions { settings, ..Default::default() })
}

fn transaction_options(
    level: IsolationLevel,
    read_only: Option<bool>,
    deferrable: Option<bool>,
) -> pb::TransactionOptions {
    pb::TransactionOptions { isolation_level: level.into(), read_only, deferrable }
}

fn savepoint(session: &Session, options: pb::TransactionOptions) -> pb::CreateSavepointRequest {
    let session_token = session.token.clone();
    pb::CreateSavepointRequest { session_token, name: "a".into(), transaction_options: Some(options) }
}

/// Empties an account after a look at both.
async fn read_all_and_take(session: &Session, id: i64) {
    session.execute("SELECT sum(balance) FROM accounts").await.unwrap();
    let take = "UPDATE accounts SET balance = 0 WHERE id = $1";
    session.run(session.statement(take, vec![int(id)])).await.unwrap();
}

async fn standing(session: &Session) -> TransactionState {
    session.get().await.unwrap().state.unwrap().transaction_state()
}

async fn begin_failure(broker: &Broker, request: pb::BeginSessionRequest) -> Failure {
    Failure::from(broker.client().begin_session(request).await.unwrap_err())
}

fn refused(failure: &Failure, field: &str) {
    assert_eq!((failure.code, failure.reason.as_str()), (Code::InvalidArgument, "INVALID_REQUEST"), "{failure:?}");
    assert_eq!(failure.field.as_deref(), Some(field), "{failure:?}");
}
