//! The command line for people, run as people run it: each verb against a broker, what it prints, and its exit code.

use std::fs;
use std::process::{Command, Stdio};

use serde_json::Value as Json;
use session_broker::grpc::pb;
use session_broker::identity::TokenDigest;

use crate::command_line::{Program, program};
use crate::support::{Broker, COMMIT_TOKEN_KEY, Database, for_everybody, until};
use crate::trust::Site;

/// The callers are operators too.
const ADMIN: &str = "[principals.anonymous]\nprofiles = [\"default\"]\nadmin = true";

const UPDATE: &str = "UPDATE accounts SET balance = 7 WHERE id = 1";

/// A static token, an operator's.
const TOKEN: &str = "sbt_the-token-of-operations";

/// What a run of the program came to.
#[derive(Debug)]
struct Ran {
    code: Option<i32>,
    out: String,
    err: String,
}

impl Ran {
    fn of(command: &mut Command) -> Self {
        let output = command.stdin(Stdio::null()).output().unwrap();
        Self {
            code: output.status.code(),
            out: String::from_utf8(output.stdout).unwrap(),
            err: String::from_utf8(output.stderr).unwrap(),
        }
    }

    /// What it printed, of a run that went well.
    fn printed(&self) -> &str {
        assert_eq!(self.code, Some(0), "{self:?}");
        &self.out
    }

    fn json(&self) -> Json {
        serde_json::from_str(self.printed()).unwrap()
    }

    /// The call failed, and the first line says so with these words.
    fn failed(&self, words: &[&str]) {
        assert_eq!(self.code, Some(1), "{self:?}");
        self.said(words);
    }

    /// The arguments were refused, naming these.
    fn misused(&self, words: &[&str]) {
        assert_eq!(self.code, Some(2), "{self:?}");
        self.said(words);
    }

    fn said(&self, words: &[&str]) {
        let first = self.err.lines().next().unwrap();
        assert!(words.iter().all(|word| first.contains(word)), "{words:?} in {first}");
    }
}

/// The client, of nobody in particular.
fn client(address: &str) -> Command {
    let mut command = program();
    command.env("SESSION_BROKER_ADDRESS", address).env_remove("SESSION_BROKER_TOKEN").env_remove("NO_COLOR");
    command
}

fn run(address: &str, arguments: &[&str]) -> Ran {
    Ran::of(client(address).args(arguments))
}

fn ids(listed: &Json) -> Vec<&str> {
    listed.as_array().unwrap().iter().map(|session| session["session_id"].as_str().unwrap()).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn sessions_are_shown_as_a_table_and_as_json() {
    let database = Database::create();
    let broker = Broker::start_with(&database, "", ADMIN).await;
    let labels = [("app".to_owned(), "web\u{1b}[31m".to_owned())].into();
    let labelled = broker.session_with(pb::BeginSessionRequest { labels, ..Default::default() }).await;
    let open = broker.session().await;
    open.execute(UPDATE).await.unwrap();

    let sessions = |more: &[&str]| run(&broker.address, &[&["sessions"][..], more].concat());
    let json = |more: &[&str]| sessions(&[&["--output", "json"][..], more].concat()).json();
    assert_eq!(ids(&json(&[])).len(), 2);
    assert_eq!(ids(&json(&["--state", "open", "--engine", "main", "--principal", "anonymous"])), [&open.id]);
    assert_eq!(ids(&json(&["--state", "none", "--profile", "default"])), [&labelled.id]);
    assert_eq!(ids(&json(&["--label", "app=web\u{1b}[31m"])), [&labelled.id]);
    assert_eq!(ids(&json(&["--transaction-longer-than", "0s"])), [&open.id]);
    for none in [["--state", "failed"], ["--label", "app=job"], ["--idle-longer-than", "1h"], ["--engine", "nowhere"]] {
        assert!(ids(&json(&none)).is_empty(), "{none:?}");
    }
    let shown = json(&["--state", "open"])[0].clone();
    assert_eq!(shown["state"]["transaction_state"], "TRANSACTION_STATE_OPEN");
    assert!(shown["age"].is_number() && shown["transaction_age"].is_number() && shown["statement_age"].is_null());
    assert!(shown["backend_pid"].as_i64().unwrap() > 0);
    assert!(shown["state"].get("commit_token").is_none());

    let table = sessions(&[]);
    let lines: Vec<_> = table.printed().lines().collect();
    assert_eq!(lines.len(), 4, "{lines:?}");
    assert!(lines[0].starts_with("SESSION ") && lines[0].ends_with("LABELS"), "{lines:?}");
    assert!(table.out.contains("app=web\\u{1b}[31m") && table.out.contains(&open.id));
    assert!(!table.out.contains('\u{1b}'), "a pipe has no colours");
    assert!(sessions(&["--color", "always"]).printed().contains("\u{1b}[1mSESSION\u{1b}[0m"));

    sessions(&["--label", "app"]).misused(&["--label"]);
    sessions(&["--output", "csv"]).misused(&["csv"]);
    sessions(&["--idle-longer-than", "soon"]).misused(&["soon"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn who_stands_in_whose_way_is_shown() {
    let database = Database::create();
    let broker = Broker::start_with(&database, "", ADMIN).await;
    let (holder, waiter) = (broker.session().await, broker.session().await);
    holder.execute(UPDATE).await.unwrap();
    let waiting = tokio::spawn({
        let waiter = waiter.clone();
        async move { waiter.execute_and_commit(UPDATE).await }
    });
    let blocking = || {
        let listed = run(&broker.address, &["sessions", "--output", "json"]).json();
        let waiter = listed.as_array().unwrap().iter().find(|session| session["session_id"] == waiter.id);
        waiter.unwrap()["blocked_by"].as_array().unwrap().clone()
    };
    until(async || !blocking().is_empty()).await;
    let blocking = blocking();
    assert_eq!((blocking.len(), &blocking[0]["session_id"]), (1, &Json::from(holder.id.as_str())));
    assert_eq!(blocking[0]["blocker"]["user"], "broker");
    let table = run(&broker.address, &["sessions"]);
    assert_eq!(table.printed().matches(&holder.id).count(), 2, "{table:?}");
    holder.rollback().await.unwrap();
    waiting.await.unwrap().unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_session_is_terminated_and_its_caller_hears_why() {
    let database = Database::create();
    let broker = Broker::start_with(&database, "", ADMIN).await;
    let session = broker.session().await;
    session.execute(UPDATE).await.unwrap();
    let terminate = |more: &[&str]| run(&broker.address, &[&["sessions", "terminate"][..], more].concat());
    terminate(&[&session.id]).misused(&["required"]);
    let ended = terminate(&[&session.id, "--reason", "it holds the lock"]);
    assert!(ended.printed().starts_with(&session.id) && ended.out.contains("TERMINATED"), "{ended:?}");
    assert_eq!(session.execute("SELECT 1").await.unwrap_err().end_reason(), "END_REASON_TERMINATED");
    assert_eq!(database.balances(), "100 100");
    let again = terminate(&[&session.id, "--reason", "again", "--output", "json"]).json();
    assert_eq!((&again[0]["session"], &again[0]["end_reason"]), (&Json::Null, &Json::from("END_REASON_TERMINATED")));
    terminate(&[&"0".repeat(32), "--reason", "why"]).failed(&["NOT_FOUND", "SESSION_UNKNOWN"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn engines_are_shown_with_their_pools() {
    let database = Database::create();
    let broker = Broker::start_with(&database, "pool_size = 7\nmax_overflow = 4", ADMIN).await;
    broker.session().await.execute("SELECT 1").await.unwrap();
    let engines = run(&broker.address, &["engines", "--output", "json"]).json();
    let engine = &engines[0];
    assert_eq!((&engine["name"], &engine["database"]), (&Json::from("main"), &Json::from(database.name.as_str())));
    assert_eq!((&engine["pool"]["size"], &engine["pool"]["in_use"]), (&Json::from(7), &Json::from(1)));
    assert_eq!((&engine["reachable"], &engine["profiles"][0]), (&Json::Bool(true), &Json::from("default")));
    let table = run(&broker.address, &["engines"]);
    let lines: Vec<Vec<_>> = table.printed().lines().map(|line| line.split_whitespace().collect()).collect();
    assert_eq!((lines.len(), lines[0][0], &lines[2][..3]), (3, "ENGINE", &["main", "yes", database.name.as_str()][..]));
    assert!(lines[2].contains(&"11"), "{lines:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_broker_is_drained_until_it_is_gone() {
    let database = Database::create();
    let broker = Broker::start_with(&database, "", ADMIN).await;
    let session = broker.session().await;
    session.execute(UPDATE).await.unwrap();
    let drained = run(&broker.address, &["drain", "--grace", "0s", "--output", "json"]);
    assert_eq!(drained.json()[0]["live_sessions"], 1);
    let said: Vec<_> = drained.err.lines().collect();
    assert_eq!((said.first(), said.last()), (Some(&"draining: sessions still live: 1"), Some(&"the broker is gone")));
    assert_eq!(database.balances(), "100 100");
    let address = broker.address.clone();
    broker.stop().await;
    run(&address, &["sessions"]).failed(&["UNAVAILABLE", &address]);
}

#[tokio::test(flavor = "multi_thread")]
async fn without_the_right_or_a_broker_the_call_fails() {
    let database = Database::create();
    let broker = Broker::start(&database).await;
    for verb in [&["sessions"][..], &["engines"], &["drain"], &["sessions", "terminate", "x", "--reason", "why"]] {
        run(&broker.address, verb).failed(&["PERMISSION_DENIED", "FORBIDDEN"]);
    }
    // Taken, but not listened on.
    let socket = tokio::net::TcpSocket::new_v4().unwrap();
    socket.bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let nobody = socket.local_addr().unwrap().to_string();
    run(&nobody, &["engines"]).failed(&["UNAVAILABLE", &nobody]);
    run(&broker.address, &["engines", "--address", "nowhere"]).misused(&["--address"]);
    run(&broker.address, &["engines", "--timeout", "0s"]).misused(&["--timeout"]);
    run(&broker.address, &["engine"]).misused(&["engine"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_is_taken_from_a_file_or_the_environment() {
    let database = Database::create();
    let digest = TokenDigest::of(TOKEN);
    let sections =
        format!("[authentication.tokens]\noperations = \"{digest}\"\n[principals.operations]\nadmin = true\n");
    let broker = Broker::start_with(&database, "", &sections).await;
    run(&broker.address, &["engines"]).failed(&["UNAUTHENTICATED"]);
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("token");
    let with_file = |more: &[&str]| {
        run(&broker.address, &[&["engines", "--token-file", file.to_str().unwrap()][..], more].concat())
    };
    with_file(&[]).misused(&["--token-file"]);
    fs::write(&file, "\n").unwrap();
    with_file(&[]).misused(&["--token-file", "empty"]);
    fs::write(&file, format!("{TOKEN}\n")).unwrap();
    assert!(with_file(&[]).printed().contains("main"));
    let by_environment =
        |token: &str| Ran::of(client(&broker.address).arg("engines").env("SESSION_BROKER_TOKEN", token));
    assert!(by_environment(TOKEN).printed().contains("main"));
    by_environment("").failed(&["UNAUTHENTICATED"]);
    let wrong = by_environment("sbt_another\u{1}");
    wrong.failed(&["INVALID_ARGUMENT", "token"]);
    assert!(!wrong.err.contains("sbt_another"));
    // An address that nobody has: it is refused before anything is sent.
    let elsewhere = with_file(&["--address", "192.0.2.1:50051"]);
    elsewhere.misused(&["plain text", "--plaintext-beyond-loopback"]);
    assert!(!elsewhere.err.contains(TOKEN));
}

#[tokio::test(flavor = "multi_thread")]
async fn tls_and_client_certificates_are_spoken() {
    let database = Database::create();
    let site = Site::new();
    let sections = format!("{}[principals.\"spiffe://shop/*\"]\nadmin = true\n", site.mutual_tls());
    let broker = Broker::start_with(&database, "", &sections).await;
    let (ca, [certificate, key]) = (site.ca(), site.client("spiffe://shop/operations"));
    let [ca, certificate, key] = [&ca, &certificate, &key].map(|file| file.to_str().unwrap());
    let engines = |more: &[&str]| run(&broker.address, &[&["engines"][..], more].concat());
    let believed = ["--tls-ca", ca, "--server-name", "localhost"];
    let shown = ["--tls-cert", certificate, "--tls-key", key];
    assert!(engines(&[believed, shown].concat()).printed().contains("main"));
    engines(&[["--tls-ca", ca, "--server-name", "elsewhere"], shown].concat()).failed(&["UNAVAILABLE"]);
    // Without its certificate, and in plain text.
    engines(&believed).failed(&[]);
    engines(&[]).failed(&[]);
    engines(&["--tls-ca", ca, "--tls-cert", certificate]).misused(&["required"]);
    engines(&["--tls-ca", "/nowhere/ca.crt"]).misused(&["--tls-ca", "/nowhere/ca.crt"]);
    engines(&["--tls", "--address", "unix:/nowhere"]).misused(&["--address"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_unix_socket_is_an_address() {
    let database = Database::create();
    let directory = tempfile::tempdir().unwrap();
    let (file, address) =
        (directory.path().join("broker.toml"), format!("unix:{}", directory.path().join("broker.sock").display()));
    let engine = for_everybody(&format!("[engines.main]\nurl = {:?}\n{ADMIN}", database.url()));
    let listen = format!("listen = [\"127.0.0.1:0\", {address:?}]\ncommit_token_key = {COMMIT_TOKEN_KEY:?}\n");
    fs::write(&file, listen + &engine).unwrap();
    let _broker = Program::start(&["serve", "--config", file.to_str().unwrap()]);
    assert!(run(&address, &["engines"]).printed().contains("main"));
    assert_eq!(run(&address, &["exec", "SELECT 1 AS n", "--output", "csv"]).printed(), "n\r\n1\r\n");
}

#[tokio::test(flavor = "multi_thread")]
async fn rows_are_shown_aligned_and_null_is_told() {
    let database = Database::create();
    let broker = Broker::start(&database).await;
    let exec = |arguments: &[&str]| run(&broker.address, &[&["exec"][..], arguments].concat());
    let sql = "SELECT 1 AS id, 'Ada' AS name, NULL::text AS note UNION ALL SELECT 20, '日本', 'x' ORDER BY 1";
    let expected = "id  name  note\n--  ----  ------\n 1  Ada   (null)\n20  日本  x\nSELECT 2\n";
    assert_eq!(exec(&[sql]).printed(), expected);
    assert!(exec(&["--color", "always", sql]).printed().contains("\u{1b}[2m(null)\u{1b}[0m"));
    let odd = exec(&[r"SELECT E'a\x1b[2J\tb\r\n' AS c, U&'\202E' AS d"]);
    assert!(odd.printed().contains(r"a\u{1b}[2J\tb\r\n  \u{202e}"), "{odd:?}");
    assert!(!odd.out.contains(['\u{1b}', '\t', '\r', '\u{202e}']), "{odd:?}");
    assert_eq!(exec(&["SELECT 1 AS n WHERE false"]).printed(), "n\n-\nSELECT 0\n");
}

#[tokio::test(flavor = "multi_thread")]
async fn rows_are_json_or_csv_with_all_that_they_hold() {
    let database = Database::create();
    let broker = Broker::start(&database).await;
    let exec = |arguments: &[&str]| run(&broker.address, &[&["exec"][..], arguments].concat());
    let sql = r"SELECT $1::int8 AS n, $2::text AS n, NULL::int AS nothing, '\x00ff'::bytea AS b,
        ARRAY['a b', NULL] AS l, true AS t, 0.1::float4 AS f, '1.50'::numeric AS d";
    let given = ["--parameter", "-5", "--parameter", "say \"hi\", \u{1b}"];
    let json = exec(&[&["--output", "json"][..], &given, &[sql]].concat()).json();
    let expected = serde_json::json!([{
        "n": -5, "n_2": "say \"hi\", \u{1b}", "nothing": null, "b": "AP8=", "l": ["a b", null],
        "t": true, "f": 0.1, "d": "1.50",
    }]);
    assert_eq!(json, expected);
    let csv = exec(&[&["--output", "csv"][..], &given, &[sql]].concat());
    let expected = "n,n,nothing,b,l,t,f,d\r\n\
        -5,\"say \"\"hi\"\", \u{1b}\",,\\x00ff,\"{\"\"a b\"\",NULL}\",true,0.1,1.50\r\n";
    assert_eq!(csv.printed(), expected);
    assert_eq!(exec(&["--output", "json", "SELECT 1 WHERE false"]).json(), serde_json::json!([]));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_statement_is_committed_unless_it_may_not_write() {
    let database = Database::create();
    let broker = Broker::start_with(&database, "", ADMIN).await;
    let exec = |arguments: &[&str]| run(&broker.address, &[&["exec"][..], arguments].concat());
    assert_eq!(exec(&["CREATE TABLE made (id int)"]).printed(), "CREATE TABLE\n");
    assert_eq!(exec(&["--parameter", "3", "INSERT INTO made VALUES ($1)"]).printed(), "INSERT 0 1\n");
    exec(&["--read-only", "INSERT INTO made VALUES (4)"]).failed(&["25006"]);
    exec(&["--max-rows", "1", "SELECT generate_series(1, 3)"]).failed(&["RESOURCE_EXHAUSTED"]);
    exec(&["--engine", "nowhere", "SELECT 1"]).failed(&["INVALID_ARGUMENT", "engine"]);
    exec(&["COMMIT"]).failed(&["INVALID_ARGUMENT"]);
    exec(&["--timeout", "2s", "SELECT pg_sleep(60)"]).failed(&["DEADLINE_EXCEEDED"]);
    assert_eq!(database.psql("SELECT string_agg(id::text, ' ') FROM made"), "3");
    // Nothing is left of any of them.
    until(async || ids(&run(&broker.address, &["sessions", "--output", "json"]).json()).is_empty()).await;
    let notice = exec(&["DO $$BEGIN RAISE NOTICE E'look\\x07' USING HINT = 'here'; END$$"]);
    assert_eq!((notice.printed(), notice.err.as_str()), ("DO\n", "NOTICE: look\\u{7}\nhint: here\n"));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_error_has_a_caret_below_its_place_and_all_that_postgresql_says() {
    let database = Database::create();
    let broker = Broker::start(&database).await;
    let exec = |sql: &str| run(&broker.address, &["exec", sql]);
    let misnamed = exec("SELECT 1,\n  '日本', nope FROM accounts");
    misnamed.failed(&["session-broker: INVALID_ARGUMENT, DATABASE_ERROR, SQLSTATE 42703: "]);
    let lines: Vec<_> = misnamed.err.lines().collect();
    assert_eq!(lines[1..3], ["  '日本', nope FROM accounts", "          ^"], "{lines:?}");
    let duplicate = exec("INSERT INTO accounts VALUES (1, 1)");
    duplicate.failed(&["ALREADY_EXISTS", "23505"]);
    assert!(duplicate.err.lines().any(|line| line == "detail: Key (id)=(1) already exists."), "{duplicate:?}");
    assert_eq!(duplicate.out, "");
    let raised = exec("DO $$BEGIN RAISE EXCEPTION E'bad\\n\\x1b[31m' USING HINT = 'be good', ERRCODE = 'P0009'; END$$");
    raised.failed(&["P0009", r"bad\n\u{1b}[31m"]);
    assert!(raised.err.lines().any(|line| line == "hint: be good"), "{raised:?}");
    assert!(!raised.err.contains('\u{1b}'));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_gets_rows_of_any_number() {
    const ROWS: usize = 100_000;

    let database = Database::create();
    let broker = Broker::start(&database).await;
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("rows");
    let exec = |more: &[&str]| {
        let sql = format!("SELECT i, 'row ' || i AS t FROM generate_series(1, {ROWS}) AS i");
        run(&broker.address, &[&["exec", "--file", file.to_str().unwrap(), &sql][..], more].concat())
    };
    let written = exec(&[]);
    assert_eq!(written.printed(), "");
    let csv = fs::read_to_string(&file).unwrap();
    let told = format!("SELECT {ROWS}: {ROWS} rows, {} bytes in {}\n", csv.len(), file.display());
    assert_eq!(written.err, told);
    let mut lines = csv.split_terminator("\r\n");
    assert_eq!(lines.next(), Some("i,t"));
    assert!(lines.enumerate().all(|(index, line)| line == format!("{0},row {0}", index + 1)));
    assert_eq!(csv.matches("\r\n").count(), ROWS + 1);
    exec(&["--output", "json"]).printed();
    let json = fs::read_to_string(&file).unwrap();
    let first: Json = serde_json::from_str(json.lines().next().unwrap()).unwrap();
    assert_eq!((json.lines().count(), first), (ROWS, serde_json::json!({ "i": 1, "t": "row 1" })));
    exec(&["--output", "table"]).misused(&["--output"]);
    run(&broker.address, &["exec", "--file", "/nowhere/rows", "SELECT 1"]).misused(&["/nowhere/rows"]);
    let broken = exec(&["--max-rows", "10"]);
    broken.failed(&["RESOURCE_EXHAUSTED"]);
    assert!(broken.err.contains("is incomplete"), "{broken:?}");
}

#[test]
fn completions_are_scripts_of_their_shells() {
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        let script = Ran::of(program().args(["completions", shell]));
        assert!(script.printed().contains("terminate"), "{shell}");
    }
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("completions.bash");
    fs::write(&file, Ran::of(program().args(["completions", "bash"])).printed()).unwrap();
    let parsed = Command::new("bash").arg("-n").arg(&file).status().unwrap();
    assert!(parsed.success());
    Ran::of(program().args(["completions", "csh"])).misused(&["csh"]);
}
