//! Profiles: the limits that sessions live by, classes of statements within them, who may have which; and a reload of
//! the configuration, which is for the sessions begun after it.

use std::path::PathBuf;
use std::time::Duration;

use session_broker::grpc::pb;
use session_broker::grpc::pb::session_service_client::SessionServiceClient;
use tempfile::TempDir;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tonic::Code;
use tonic::transport::Channel;

use crate::batches::{batch, kinds, one, place};
use crate::command_line::Program;
use crate::support::{
    Broker, COMMIT_TOKEN_KEY, Database, Failure, Session, first_row, for_everybody, int, list, millis, seconds, text,
    wait_until,
};
use pb::{Outcome, TransactionState};

const SLEEP: &str = "SELECT pg_sleep(60)";

/// Three profiles, two of which are for the callers.
const TWO_FOR_CALLERS: &str = r#"
    [profiles.default]
    result_rows_max = 100
    [profiles.oltp]
    result_rows_max = 10
    [profiles.report]
    result_rows_max = 1000
    [principals.anonymous]
    profiles = ["oltp", "report"]
"#;

#[tokio::test(flavor = "multi_thread")]
async fn a_session_has_the_profile_it_asks_for_or_its_callers_first() {
    let database = Database::create();
    let broker = Broker::start_with(&database, "", TWO_FOR_CALLERS).await;
    for (asked, given, rows) in [("", "oltp", 10), ("oltp", "oltp", 10), ("report", "report", 1000)] {
        assert_eq!(begin(broker.client(), in_profile(asked)).await.unwrap().profile, given);
        let session = broker.session_with(in_profile(asked)).await;
        assert_eq!(session.get().await.unwrap().profile, given);
        returns_up_to(&session, rows, &pb::ExecuteRequest::default()).await;
        session.close().await.unwrap();
        assert_eq!(session.get().await.unwrap().profile, given);
        let returning = |rows| pb::RunRequest { profile: asked.into(), ..run(&series(rows)) };
        assert_eq!(broker.run(returning(rows)).await.unwrap().results[0].row_count, u64::from(rows));
        too_large(&broker.run(returning(rows + 1)).await.unwrap_err());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_profile_that_is_unknown_or_not_for_the_caller_is_refused_with_those_that_are() {
    let database = Database::create();
    let broker = Broker::start_with(&database, "", TWO_FOR_CALLERS).await;
    for asked in ["default", "nonsense", "OLTP", "oltp "] {
        let begun = begin(broker.client(), in_profile(asked)).await.unwrap_err();
        let update = pb::RunRequest { profile: asked.into(), ..run("UPDATE accounts SET balance = 7") };
        for failure in [begun, broker.run(update).await.unwrap_err()] {
            refused(&failure, "profile");
            assert!(failure.message.contains("oltp") && failure.message.contains("report"), "{failure:?}");
        }
    }
    assert_eq!(database.balances(), "100 100");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_caller_that_is_given_no_profiles_has_the_default_one_alone() {
    let database = Database::create();
    let broker = Broker::start_with(&database, "", "[profiles.report]\n[principals.anonymous]").await;
    for asked in ["", "default"] {
        assert_eq!(begin(broker.client(), in_profile(asked)).await.unwrap().profile, "default");
    }
    refused(&begin(broker.client(), in_profile("report")).await.unwrap_err(), "profile");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_caller_nothing_is_said_of_may_do_nothing() {
    let database = Database::create();
    let broker = Broker::start_with(&database, "", "[principals.billing]\n[principals.\"*\"]").await;
    let begun = begin(broker.client(), in_profile("")).await.unwrap_err();
    let ran = broker.run(run("UPDATE accounts SET balance = 7")).await.unwrap_err();
    let resolved = broker.resolve("anything").await.unwrap_err();
    for failure in [begun, ran, resolved] {
        assert_eq!((failure.code, failure.reason.as_str()), (Code::PermissionDenied, "FORBIDDEN"), "{failure:?}");
    }
    assert_eq!(database.balances(), "100 100");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_repeated_begin_is_to_name_the_same_profile() {
    let database = Database::create();
    let broker = Broker::start_with(&database, "", TWO_FOR_CALLERS).await;
    let request = |profile| pb::BeginSessionRequest { request_id: "first".into(), ..in_profile(profile) };
    let begun = begin(broker.client(), request("report")).await.unwrap();
    let again = begin(broker.client(), request("report")).await.unwrap();
    assert_eq!((again.session_id, again.profile.as_str()), (begun.session_id, "report"));
    for other in ["oltp", ""] {
        refused(&begin(broker.client(), request(other)).await.unwrap_err(), "request_id");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lease_lies_within_its_profiles_bounds() {
    let database = Database::create();
    let sections = r#"
        [profiles.patient]
        lease_ttl = "40s"
        lease_ttl_min = "20s"
        lease_ttl_max = "1m"
        session_age_max = "10m"
        [principals.anonymous]
        profiles = ["default", "patient"]
    "#;
    let broker = Broker::start_with(&database, "", sections).await;
    for (profile, asked, granted) in [
        ("default", None, 30),
        ("default", seconds(1), 1),
        ("default", seconds(600), 300),
        ("patient", None, 40),
        ("patient", seconds(1), 20),
        ("patient", seconds(25), 25),
        ("patient", seconds(600), 60),
    ] {
        let request = pb::BeginSessionRequest { lease_ttl: asked, ..in_profile(profile) };
        let begun = begin(broker.client(), request).await.unwrap();
        assert_eq!((begun.profile.as_str(), begun.lease_ttl), (profile, seconds(granted)));
        let remaining = begun.state.unwrap().session_remaining.unwrap().seconds;
        let age_max = if profile == "patient" { 600 } else { 1800 };
        assert!((age_max - 10..=age_max).contains(&remaining), "{profile}: {remaining}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_options_may_ask_for_is_the_profiles_to_say() {
    let database = Database::create();
    let role = crate::transactions::role(&database);
    let sections = format!(
        r#"
        [profiles.default]
        roles = [{role:?}]
        settings = ["app.tenant"]
        statement_timeout = "40s"
        transaction_timeout = "2m"
        [profiles.heir]
        [profiles.strict]
        roles = []
        settings = []
        statement_timeout = "10s"
        transaction_timeout = "20s"
        [principals.anonymous]
        profiles = ["default", "heir", "strict"]
        "#
    );
    let broker = Broker::start_with(&database, "", &sections).await;
    let of_acme = [("app.tenant".to_owned(), "acme".to_owned())];
    for (options, field) in [
        (pb::SessionOptions { role: role.clone(), ..Default::default() }, "options.role"),
        (pb::SessionOptions { settings: of_acme.into(), ..Default::default() }, "options.settings"),
        (pb::SessionOptions { statement_timeout: seconds(30), ..Default::default() }, "options.statement_timeout"),
        (pb::SessionOptions { transaction_timeout: seconds(90), ..Default::default() }, "options.transaction_timeout"),
    ] {
        let request = |profile| pb::BeginSessionRequest { options: Some(options.clone()), ..in_profile(profile) };
        for profile in ["default", "heir"] {
            broker.session_with(request(profile)).await.execute_and_commit("SELECT id FROM accounts").await.unwrap();
        }
        refused(&begin(broker.client(), request("strict")).await.unwrap_err(), field);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_profile_has_from_default_what_it_does_not_say_itself() {
    let database = Database::create();
    let sections = r#"
        [profiles.default]
        lease_ttl = "20s"
        result_rows_max = 100
        [profiles.default.classes.few]
        result_rows_max = 10
        [profiles.report]
        result_rows_max = 200
        [profiles.own]
        lease_ttl = "25s"
        [profiles.own.classes.single]
        result_rows_max = 1
        [principals.anonymous]
        profiles = ["default", "report", "own"]
    "#;
    let broker = Broker::start_with(&database, "", sections).await;
    // Classes come all together: who has any has none of default's.
    for (profile, lease, rows, (class, class_rows), unknown) in [
        ("default", 20, 100, ("few", 10), "single"),
        ("report", 20, 200, ("few", 10), "single"),
        ("own", 25, 100, ("single", 1), "few"),
    ] {
        assert_eq!(begin(broker.client(), in_profile(profile)).await.unwrap().lease_ttl, seconds(lease));
        let session = broker.session_with(in_profile(profile)).await;
        returns_up_to(&session, rows, &pb::ExecuteRequest::default()).await;
        returns_up_to(&session, class_rows, &in_class(class, pb::ExecuteRequest::default())).await;
        let misnamed = in_class(unknown, session.statement("SELECT 1", vec![]));
        refused(&session.run(misnamed).await.unwrap_err(), "class");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_profiles_engines_are_those_its_sessions_may_name() {
    let (main, other) = (Database::create(), Database::create());
    let (main_url, other_url) = (main.url(), other.url());
    let broker = Broker::start_engines(&format!(
        r#"
        default_engine = "main"
        [engines.main]
        url = {main_url:?}
        [engines.other]
        url = {other_url:?}
        [profiles.report]
        engines = ["other"]
        [profiles.both]
        engines = ["other", "main"]
        [principals.anonymous]
        profiles = ["default", "report", "both"]
        "#
    ))
    .await;
    let begun = |engine: &str, profile| pb::BeginSessionRequest { engine: engine.into(), ..in_profile(profile) };
    let ran = |engine: &str, profile: &str| pb::RunRequest {
        engine: engine.into(),
        profile: profile.into(),
        ..run("SELECT current_database()")
    };
    for (profile, asked, given, database) in [
        ("default", "", "main", &main),
        ("default", "other", "other", &other),
        // The default engine is none of its own: its first stands in.
        ("report", "", "other", &other),
        ("report", "other", "other", &other),
        ("both", "", "main", &main),
        ("both", "other", "other", &other),
    ] {
        let session = broker.session_with(begun(asked, profile)).await;
        assert_eq!(session.get().await.unwrap().engine, given, "{profile} {asked}");
        let row = first_row(&session.execute_and_commit("SELECT current_database()").await.unwrap());
        assert_eq!(row, [text(&database.name)], "{profile} {asked}");
        let answer = broker.run(ran(asked, profile)).await.unwrap();
        assert_eq!(kinds(&answer.results[0]), [[text(&database.name)]], "{profile} {asked}");
    }
    for (profile, asked) in [("report", "main"), ("both", "nowhere"), ("default", "nowhere")] {
        refused(&begin(broker.client(), begun(asked, profile)).await.unwrap_err(), "engine");
        refused(&broker.run(ran(asked, profile)).await.unwrap_err(), "engine");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_shortest_of_all_time_limits_wins_and_is_named() {
    let database = Database::create();
    let sections = r#"
        [profiles.default.classes.quick]
        statement_timeout = "200ms"
        [profiles.default.classes.slow]
        statement_timeout = "20s"
        [profiles.short]
        statement_timeout = "200ms"
        [profiles.short.classes.few]
        result_rows_max = 10
        [profiles.brief]
        transaction_timeout = "500ms"
        [principals.anonymous]
        profiles = ["default", "short", "brief"]
    "#;
    let broker = Broker::start_with(&database, "", sections).await;
    // So that nobody has to wait for a connection to be opened.
    broker.session().await.execute_and_commit("SELECT 1").await.unwrap();
    for (profile, own, class, timeout, patience, bound) in [
        ("default", seconds(10), "slow", seconds(15), Some(3), "grpc_deadline"),
        ("default", seconds(10), "slow", millis(200), Some(20), "timeout"),
        ("default", seconds(10), "quick", seconds(15), Some(20), "class"),
        ("default", millis(200), "slow", seconds(15), Some(20), "statement_timeout"),
        ("default", millis(200), "", None, None, "statement_timeout"),
        ("short", None, "few", seconds(15), Some(20), "profile"),
        ("short", None, "", None, None, "profile"),
        ("brief", seconds(10), "slow", seconds(15), Some(20), "transaction_timeout"),
    ] {
        let options = pb::SessionOptions { statement_timeout: own, ..Default::default() };
        let request = pb::BeginSessionRequest { options: Some(options), ..in_profile(profile) };
        let session = broker.session_with(request).await;
        let sleep = in_class(class, session.statement(SLEEP, vec![]));
        let mut call = tonic::Request::new(pb::ExecuteRequest { timeout, ..sleep });
        if let Some(patience) = patience {
            call.set_timeout(Duration::from_secs(patience));
        }
        let failure = Failure::from(session.client.clone().execute(call).await.unwrap_err());
        assert_eq!(stopped_by(&failure), bound, "{failure:?}");
        session.close().await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_classs_time_limit_is_for_the_call_that_names_it_as_a_whole() {
    let database = Database::create();
    let sections = "[profiles.default.classes.quick]\nstatement_timeout = \"300ms\"";
    let broker = Broker::start_with(&database, "", sections).await;
    let session = broker.session().await;
    let executed = session.run(in_class("quick", session.statement(SLEEP, vec![]))).await.unwrap_err();
    assert_eq!(executed.transaction_state(), TransactionState::Failed);
    session.rollback().await.unwrap();
    let nap = "SELECT pg_sleep(0.2)";
    let naps = pb::ExecuteBatchRequest { class: "quick".into(), ..batch(vec![one(nap); 3]) };
    let batched = session.execute_batch(naps).await.unwrap_err();
    session.rollback().await.unwrap();
    let [update, nap] = ["UPDATE accounts SET balance = 7", nap].map(|sql| run(sql).statements.remove(0));
    let statements = vec![update, nap.clone(), nap.clone(), nap];
    let ran = broker.run(pb::RunRequest { class: "quick".into(), statements, ..Default::default() }).await.unwrap_err();
    for failure in [executed, batched, ran] {
        assert_eq!(stopped_by(&failure), "class");
    }
    // The session's other calls are not of that class.
    session.execute_and_commit("SELECT pg_sleep(0.5)").await.unwrap();
    assert_eq!(database.balances(), "100 100");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_lowest_of_all_limits_on_results_wins() {
    let database = Database::create();
    let sections = r#"
        [profiles.default]
        result_rows_max = 100
        [profiles.default.classes.few]
        result_rows_max = 10
        [profiles.default.classes.timed]
        statement_timeout = "20s"
        [profiles.default.classes.narrow]
        result_bytes_max = 4096
    "#;
    let broker = Broker::start_with(&database, "", sections).await;
    let session = broker.session().await;
    for (class, max_rows, rows) in
        [("", 0, 100), ("few", 0, 10), ("few", 5, 5), ("few", 50, 10), ("timed", 0, 100), ("timed", 1_000_000, 100)]
    {
        let asked = pb::ExecuteRequest { max_rows, ..in_class(class, pb::ExecuteRequest::default()) };
        returns_up_to(&session, rows, &asked).await;
    }
    let wide = session.statement("SELECT repeat('x', 5000)", vec![]);
    let together = pb::ExecuteBatchRequest { class: "few".into(), ..batch(vec![one(&series(6)), one(&series(6))]) };
    let in_one_call = pb::RunRequest { class: "few".into(), ..run(&series(11)) };
    session.run(wide.clone()).await.unwrap();
    let executed = session.run(in_class("narrow", wide)).await.unwrap_err();
    session.rollback().await.unwrap();
    let batched = session.execute_batch(together).await.unwrap_err();
    for failure in [executed, batched, broker.run(in_one_call).await.unwrap_err()] {
        too_large(&failure);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_profiles_limits_on_values_hold_for_what_is_sent_and_for_what_comes() {
    let database = Database::create();
    let sections = "[profiles.default]\nvalue_bytes_max = 2000\nparameters_bytes_max = 5000\nlist_depth_max = 2";
    let broker = Broker::start_with(&database, "", sections).await;
    let session = broker.session().await;
    let text = |bytes: usize| text(&"x".repeat(bytes));
    let pairs = |count: usize| list(vec![list(vec![int(1), int(2)]); count]);
    let length = |kind| session.statement("SELECT length($1::text)", vec![kind]);
    let array = |kind| session.statement("SELECT array_ndims($1::int4[])", vec![kind]);
    let together = |bytes| {
        session.statement("SELECT length($1::text || $2::text || $3::text)", vec![text(2000), text(2000), text(bytes)])
    };
    for (request, expected) in
        [(length(text(2000)), 2000), (array(pairs(125)), 2), (together(1000), 5000), (array(list(vec![int(1)])), 1)]
    {
        assert_eq!(first_row(&session.run(request).await.unwrap()), [int(expected)]);
    }
    session.execute("UPDATE accounts SET balance = 7 WHERE id = 1").await.unwrap();
    for (request, field, limit) in [
        (length(text(2001)), "parameters[0].value", "value_bytes_max is 2000"),
        (array(pairs(126)), "parameters[0].value", "value_bytes_max is 2000"),
        (array(list(vec![pairs(1)])), "parameters[0].value", "list_depth_max is 2"),
        (together(1001), "parameters", "parameters_bytes_max is 5000"),
    ] {
        let pb::ExecuteRequest { sql, parameters, .. } = request.clone();
        let streaming =
            pb::ExecuteStreamRequest { parameters: parameters.clone(), ..session.streaming(&sql, Vec::new()) };
        let streamed = session.stream(streaming).await.end.unwrap_err();
        let second = pb::BatchStatement { sql: sql.clone(), parameters: parameters.clone(), ..Default::default() };
        let batched =
            session.execute_batch(batch(vec![one("UPDATE accounts SET balance = 8"), second])).await.unwrap_err();
        let statements = vec![pb::RunStatement { sql, parameters, ..Default::default() }];
        let in_one_call = broker.run(pb::RunRequest { statements, ..Default::default() }).await.unwrap_err();
        let executed = session.run(request).await.unwrap_err();
        for (failure, prefix) in
            [(streamed, ""), (executed, ""), (batched, "statements[1]."), (in_one_call, "statements[0].")]
        {
            refused(&failure, &format!("{prefix}{field}"));
            assert!(failure.message.contains(limit), "{}", failure.message);
            if prefix != "statements[0]." {
                assert_eq!(failure.transaction_state(), TransactionState::Open);
            }
        }
    }
    // Nothing of the refused calls ran, and the transaction is as it was.
    session.commit().await.unwrap();
    assert_eq!(database.balances(), "7 100");
    for sql in ["SELECT 'short', repeat('x', 2001)", "SELECT ARRAY[repeat('x', 1000), repeat('x', 1000)]"] {
        let executed = session.execute(sql).await.unwrap_err();
        session.rollback().await.unwrap();
        let streamed = session.stream(session.streaming(sql, vec![])).await.end.unwrap_err();
        session.rollback().await.unwrap();
        for failure in [executed, streamed] {
            too_large(&failure);
            assert!(failure.message.contains("2000 bytes"), "{}", failure.message);
        }
    }
    session.execute("SELECT repeat('x', 2000), repeat('x', 2000)").await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unknown_class_is_refused_with_nothing_run_and_the_transaction_as_it_was() {
    let database = Database::create();
    let sections = "[profiles.default.classes.quick]\nstatement_timeout = \"20s\"";
    let broker = Broker::start_with(&database, "", sections).await;
    let session = broker.session().await;
    let update = "UPDATE accounts SET balance = 8";
    for standing in [TransactionState::None, TransactionState::Open] {
        if standing == TransactionState::Open {
            session.execute("UPDATE accounts SET balance = 7 WHERE id = 1").await.unwrap();
        }
        for (class, commit) in [("nonsense", false), ("nonsense", true), ("Quick", false), ("Quick", true)] {
            let one_statement = in_class(class, session.statement(update, vec![]));
            let executed = session.run(pb::ExecuteRequest { commit, ..one_statement }).await.unwrap_err();
            let many = pb::ExecuteBatchRequest { class: class.into(), commit, ..batch(vec![one(update), one(update)]) };
            let batched = session.execute_batch(many).await.unwrap_err();
            for failure in [executed, batched] {
                refused(&failure, "class");
                assert!(failure.message.contains("quick"), "{failure:?}");
                assert_eq!((failure.transaction_state(), place(&failure)), (standing, (None, None)), "{failure:?}");
            }
            let ran = pb::RunRequest { class: class.into(), ..run(update) };
            refused(&broker.run(ran).await.unwrap_err(), "class");
        }
    }
    assert_eq!(session.commit().await.unwrap().outcome(), Outcome::Committed);
    assert_eq!(database.balances(), "7 100");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_number_used_with_another_class_is_refused() {
    let database = Database::create();
    let sections = r#"
        [profiles.default.classes.quick]
        statement_timeout = "20s"
        [profiles.default.classes.slow]
        statement_timeout = "25s"
    "#;
    let broker = Broker::start_with(&database, "", sections).await;
    let session = broker.session().await;
    let update = "UPDATE accounts SET balance = balance + 1 RETURNING balance";
    let numbered = |class| pb::ExecuteRequest { seq: 1, ..in_class(class, session.statement(update, vec![])) };
    let batched = |class: &str| pb::ExecuteBatchRequest { seq: 2, class: class.into(), ..batch(vec![one(update)]) };
    // A call that ran nothing does not use up its number.
    refused(&session.run(numbered("nonsense")).await.unwrap_err(), "class");
    let first = session.run(numbered("quick")).await.unwrap();
    for other in ["", "slow"] {
        refused(&session.run(numbered(other)).await.unwrap_err(), "seq");
    }
    assert_eq!(session.run(numbered("quick")).await.unwrap().rows, first.rows);
    let second = session.execute_batch(batched("")).await.unwrap();
    refused(&session.execute_batch(batched("slow")).await.unwrap_err(), "seq");
    assert_eq!(session.execute_batch(batched("")).await.unwrap().results, second.results);
    session.commit().await.unwrap();
    assert_eq!(database.balances(), "102 102");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_run_goes_by_the_class_of_the_profile_it_names() {
    let database = Database::create();
    let sections = r#"
        [profiles.report.classes.quick]
        statement_timeout = "200ms"
        [profiles.report.classes.few]
        result_rows_max = 10
        [principals.anonymous]
        profiles = ["default", "report"]
    "#;
    let broker = Broker::start_with(&database, "", sections).await;
    let in_report =
        |class: &str, sql: &str| pb::RunRequest { profile: "report".into(), class: class.into(), ..run(sql) };
    let committed = broker.run(in_report("few", "UPDATE accounts SET balance = 7 RETURNING id")).await.unwrap();
    assert_eq!(committed.commit.unwrap().outcome(), Outcome::Committed);
    assert_eq!(stopped_by(&broker.run(in_report("quick", SLEEP)).await.unwrap_err()), "class");
    too_large(&broker.run(in_report("few", &series(11))).await.unwrap_err());
    // It is none of the other profile's.
    let elsewhere = pb::RunRequest { profile: "default".into(), ..in_report("few", "UPDATE accounts SET balance = 8") };
    refused(&broker.run(elsewhere).await.unwrap_err(), "class");
    assert_eq!(database.balances(), "7 7");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reload_is_for_new_sessions_and_live_ones_stay_as_they_were_begun() {
    let database = Database::create();
    let before = "[profiles.default]\nresult_rows_max = 10\nstatement_timeout = \"20s\"\nlease_ttl = \"40s\"";
    let after = "[profiles.default]\nresult_rows_max = 5\nstatement_timeout = \"1s\"\nlease_ttl = \"20s\"";
    let served = Served::start(&database, before);
    let live = served.program.session().await;
    live.execute("UPDATE accounts SET balance = 7 WHERE id = 1").await.unwrap();
    served.write(after);
    served.hang_up(&RELOADED);
    let begun = begin(served.program.client(), pb::BeginSessionRequest::default()).await.unwrap();
    assert_eq!((begun.profile.as_str(), begun.lease_ttl), ("default", seconds(20)));
    let new = served.program.session().await;
    let (outlasting, stopped) = tokio::join!(live.execute("SELECT pg_sleep(1.5)"), new.execute(SLEEP));
    outlasting.unwrap();
    assert_eq!(stopped_by(&stopped.unwrap_err()), "profile");
    new.rollback().await.unwrap();
    assert_eq!(live.execute(&series(10)).await.unwrap().row_count, 10);
    assert!(live.keep_alive().await.unwrap().lease_remaining.unwrap().seconds > 20);
    assert_eq!(live.commit().await.unwrap().outcome(), Outcome::Committed);
    // Its next transactions are no different.
    returns_up_to(&live, 10, &pb::ExecuteRequest::default()).await;
    returns_up_to(&new, 5, &pb::ExecuteRequest::default()).await;
    assert_eq!(database.balances(), "7 100");
    assert_eq!(served.program.logged(&NEEDS_RESTART), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_profile_that_a_reload_takes_away_lives_on_in_its_sessions() {
    let database = Database::create();
    let before = r#"
        [profiles.old]
        result_rows_max = 10
        [profiles.old.classes.few]
        result_rows_max = 3
        [principals.anonymous]
        profiles = ["default", "old"]
    "#;
    let after = r#"
        [profiles.new]
        [principals.anonymous]
        profiles = ["new"]
    "#;
    let served = Served::start(&database, before);
    let client = served.program.client();
    let request = pb::BeginSessionRequest { request_id: "first".into(), ..in_profile("old") };
    let live = Session::begin(client.clone(), request.clone()).await.unwrap();
    live.execute("UPDATE accounts SET balance = 7 WHERE id = 1").await.unwrap();
    served.write(after);
    served.hang_up(&RELOADED);
    for asked in ["old", "default"] {
        refused(&begin(client.clone(), in_profile(asked)).await.unwrap_err(), "profile");
    }
    assert_eq!(begin(client.clone(), in_profile("")).await.unwrap().profile, "new");
    // A repeated begin gives what it gave before.
    let again = begin(client, request).await.unwrap();
    assert_eq!((again.session_id.as_str(), again.profile.as_str()), (live.id.as_str(), "old"));
    assert_eq!(live.get().await.unwrap().profile, "old");
    assert_eq!(live.commit().await.unwrap().outcome(), Outcome::Committed);
    returns_up_to(&live, 10, &pb::ExecuteRequest::default()).await;
    returns_up_to(&live, 3, &in_class("few", pb::ExecuteRequest::default())).await;
    assert_eq!(database.balances(), "7 100");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_with_any_problem_is_refused_whole_and_the_next_good_one_taken() {
    let problems = r#"
        [profiles.default]
        result_rows_max = 5
        [profiles.report]
        lease_ttl = "1h"
        [limits]
        sessions_max = "many"
        [principals.anonymous]
        profiles = ["report", "nonsense"]
    "#;
    let database = Database::create();
    let served = Served::start(&database, "[profiles.default]\nresult_rows_max = 10");
    let live = served.program.session().await;
    live.execute("UPDATE accounts SET balance = 7 WHERE id = 1").await.unwrap();
    // Several problems; no TOML; no file.
    for sections in [Some(problems), Some("[profiles.default\nresult_rows_max = 5"), None] {
        match sections {
            Some(sections) => served.write(sections),
            None => std::fs::remove_file(served.file()).unwrap(),
        }
        served.hang_up(&REFUSED);
        let new = served.program.session().await;
        assert_eq!(new.get().await.unwrap().profile, "default");
        returns_up_to(&new, 10, &pb::ExecuteRequest::default()).await;
        refused(&begin(served.program.client(), in_profile("report")).await.unwrap_err(), "profile");
    }
    for problem in ["profiles.report.lease_ttl", "limits.sessions_max", "principals.anonymous.profiles"] {
        assert!(served.program.logged(&[problem]) > 0, "{problem} is not told");
    }
    let password = served.url.split([':', '@']).nth(2).unwrap();
    assert_eq!((served.program.logged(&RELOADED), served.program.logged(&[password])), (0, 0));
    served.write("[profiles.default]\nresult_rows_max = 5");
    served.hang_up(&RELOADED);
    returns_up_to(&served.program.session().await, 5, &pb::ExecuteRequest::default()).await;
    assert_eq!(live.commit().await.unwrap().outcome(), Outcome::Committed);
    assert_eq!(database.balances(), "7 100");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_whose_profiles_name_an_engine_that_does_not_run_yet_is_refused_whole() {
    let database = Database::create();
    let served = Served::start(&database, "");
    let second = format!("[engines.second]\nurl = {:?}\n", database.url());
    let profile = "[profiles.report]\nengines = [\"second\"]\n[principals.anonymous]\nprofiles = [\"report\"]";
    let file = std::fs::read_to_string(served.file()).unwrap().replace("[principals.anonymous]", "");
    std::fs::write(served.file(), format!("default_engine = \"main\"\n{file}{second}{profile}")).unwrap();
    served.hang_up(&REFUSED);
    assert!(served.program.logged(&["profiles.report.engines", "second"]) > 0);
    assert_eq!(served.program.session().await.get().await.unwrap().profile, "default");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_reload_cannot_change_stays_as_it_is_and_is_said_to_need_a_restart() {
    let database = Database::create();
    let served = Served::start(&database, "");
    let changed = "[limits]\nsessions_max = 1\n[profiles.default]\nresult_rows_max = 5";
    served.write_for("postgresql://nobody@127.0.0.1:1/nowhere", changed);
    served.hang_up(&RELOADED);
    let [level, message] = NEEDS_RESTART;
    for section in ["\"section\":\"engines\"", "\"section\":\"limits\""] {
        wait_until(|| served.program.logged(&[level, message, section]) == 1);
    }
    // Two at a time, each with a connection of its own, opened now.
    let (one, other) = (served.program.session().await, served.program.session().await);
    one.execute("UPDATE accounts SET balance = 7 WHERE id = 1").await.unwrap();
    other.execute("UPDATE accounts SET balance = 8 WHERE id = 2").await.unwrap();
    one.commit().await.unwrap();
    other.commit().await.unwrap();
    assert_eq!(database.balances(), "7 8");
    // The profiles of the same file are taken.
    returns_up_to(&one, 5, &pb::ExecuteRequest::default()).await;
    // What is as it runs again needs no restart.
    served.write("");
    served.hang_up(&RELOADED);
    assert_eq!(served.program.logged(&NEEDS_RESTART), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_storm_of_reloads_loses_no_transaction_and_the_last_file_counts() {
    const RELOADS: i64 = 20;
    let database = Database::create();
    database.psql("UPDATE accounts SET balance = 0; INSERT INTO accounts VALUES (3, 0), (4, 0)");
    let lease = |ttl: i64| format!("[profiles.default]\nlease_ttl = \"{ttl}s\"");
    let served = Served::start(&database, &lease(100));
    let client = served.program.client();
    let over = CancellationToken::new();
    let mut callers = JoinSet::new();
    for account in 1..5 {
        callers.spawn(deposit(client.clone(), account, over.clone()));
    }
    let lasting = served.program.session().await;
    lasting.execute("INSERT INTO accounts VALUES (5, 0)").await.unwrap();
    database.wait_for("SELECT min(balance) > 0 FROM accounts", "t");
    for reload in 1..=RELOADS {
        served.write(&lease(100 + reload));
        served.program.signal("HUP");
    }
    // Signals that come while one is handled are handled as one, so what is waited for is the last file's lease.
    until_granted(&client, 100 + RELOADS).await;
    assert_eq!(lasting.commit().await.unwrap().outcome(), Outcome::Committed);
    over.cancel();
    let deposits: u64 = callers.join_all().await.iter().sum();
    assert_eq!(database.psql("SELECT sum(balance) FROM accounts"), deposits.to_string());
    assert_eq!((served.program.logged(&REFUSED), served.program.logged(&NEEDS_RESTART)), (0, 0));
}

/// What the log says of a reload, by the parts of a line.
const RELOADED: [&str; 2] = ["\"level\":\"INFO\"", "\"message\":\"profiles reloaded\""];
const REFUSED: [&str; 2] = ["\"level\":\"ERROR\"", "\"message\":\"configuration refused: nothing has changed\""];
const NEEDS_RESTART: [&str; 2] = ["\"level\":\"WARN\"", "\"message\":\"needs a restart to take effect\""];

/// The program, serving with a configuration file that can be rewritten.
pub(crate) struct Served {
    pub(crate) program: Program,
    directory: TempDir,
    /// The engine's.
    url: String,
}

impl Served {
    pub(crate) fn start(database: &Database, sections: &str) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let url = database.url();
        let file = write(&directory, &url, sections);
        let program = Program::start(&["serve", "--config", file.to_str().unwrap(), "--listen", "127.0.0.1:0"]);
        Self { program, directory, url }
    }

    fn file(&self) -> PathBuf {
        self.directory.path().join("broker.toml")
    }

    pub(crate) fn write(&self, sections: &str) {
        self.write_for(&self.url, sections);
    }

    /// With another engine.
    fn write_for(&self, url: &str, sections: &str) {
        write(&self.directory, url, sections);
    }

    /// Has it read the file anew, and waits until it says what came of that.
    pub(crate) fn hang_up(&self, said: &[&str]) {
        let before = self.program.logged(said);
        self.program.signal("HUP");
        wait_until(|| self.program.logged(said) > before);
    }
}

/// Puts the file in its place as a whole, so that nobody reads half of it.
fn write(directory: &TempDir, url: &str, sections: &str) -> PathBuf {
    let (file, next) = (directory.path().join("broker.toml"), directory.path().join("next.toml"));
    let toml = format!(
        "drain_grace = \"5s\"\ncommit_token_key = {COMMIT_TOKEN_KEY:?}\n{}\n",
        for_everybody(&format!("[engines.main]\nurl = {url:?}\n{sections}"))
    );
    std::fs::write(&next, toml).unwrap();
    std::fs::rename(&next, &file).unwrap();
    file
}

/// Adds one to an account again and again, each time in a session of its own, until told to stop. Returns how often.
async fn deposit(client: SessionServiceClient<Channel>, account: i64, over: CancellationToken) -> u64 {
    let mut deposits = 0;
    while !over.is_cancelled() {
        let session = Session::begin(client.clone(), pb::BeginSessionRequest::default()).await.unwrap();
        let update = "UPDATE accounts SET balance = balance + 1 WHERE id = $1";
        session.run(session.statement(update, vec![int(account)])).await.unwrap();
        assert_eq!(session.commit().await.unwrap().outcome(), Outcome::Committed);
        session.close().await.unwrap();
        deposits += 1;
    }
    deposits
}

/// Begins sessions until one is granted a lease of so many seconds.
async fn until_granted(client: &SessionServiceClient<Channel>, lease: i64) {
    for _ in 0..10_000 {
        let begun = begin(client.clone(), pb::BeginSessionRequest::default()).await.unwrap();
        if begun.lease_ttl == seconds(lease) {
            return;
        }
    }
    panic!("no lease of {lease} s is granted");
}

async fn begin(
    mut client: SessionServiceClient<Channel>,
    request: pb::BeginSessionRequest,
) -> Result<pb::BeginSessionResponse, Failure> {
    Ok(client.begin_session(request).await?.into_inner())
}

fn in_profile(profile: &str) -> pb::BeginSessionRequest {
    pb::BeginSessionRequest { profile: profile.into(), ..Default::default() }
}

fn in_class(class: &str, request: pb::ExecuteRequest) -> pb::ExecuteRequest {
    pb::ExecuteRequest { class: class.into(), ..request }
}

/// A whole transaction of one statement.
fn run(sql: &str) -> pb::RunRequest {
    let statement = pb::RunStatement { sql: sql.into(), ..Default::default() };
    pb::RunRequest { statements: vec![statement], ..Default::default() }
}

/// A statement that returns so many rows.
fn series(rows: u32) -> String {
    format!("SELECT generate_series(1, {rows})")
}

/// With what is asked, the session's statements return so many rows and not one more. Leaves it without a transaction.
async fn returns_up_to(session: &Session, rows: u32, asked: &pb::ExecuteRequest) {
    let returning = |rows| {
        let pb::ExecuteRequest { session_token, sql, .. } = session.statement(&series(rows), vec![]);
        pb::ExecuteRequest { session_token, sql, ..asked.clone() }
    };
    let answer = session.run(returning(rows)).await.unwrap();
    assert_eq!((answer.rows.len(), answer.row_count), (usize::try_from(rows).unwrap(), u64::from(rows)));
    too_large(&session.run(returning(rows + 1)).await.unwrap_err());
    session.rollback().await.unwrap();
}

fn too_large(failure: &Failure) {
    let said = (failure.code, failure.reason.as_str());
    assert_eq!(said, (Code::ResourceExhausted, "RESULT_TOO_LARGE"), "{failure:?}");
}

/// The time limit that stopped a statement.
fn stopped_by(failure: &Failure) -> &str {
    let said = (failure.code, failure.reason.as_str());
    assert_eq!(said, (Code::DeadlineExceeded, "STATEMENT_TIMEOUT"), "{failure:?}");
    &failure.metadata["bound"]
}

fn refused(failure: &Failure, field: &str) {
    assert_eq!((failure.code, failure.reason.as_str()), (Code::InvalidArgument, "INVALID_REQUEST"), "{failure:?}");
    assert_eq!(failure.field.as_deref(), Some(field), "{failure:?}");
}
