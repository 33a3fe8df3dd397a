//! Nothing secret is shown: not in the log at its most talkative, not by `check`, not in an error.
//!
//! The one exception is PostgreSQL's own error, which quotes what a caller sent, to that caller.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD_NO_PAD, URL_SAFE_NO_PAD};
use prost::Message;
use session_broker::grpc::pb;
use session_broker::grpc::pb::transaction_service_client::TransactionServiceClient;
use session_broker::identity::TokenDigest;
use tempfile::TempDir;
use tonic::transport::{Channel, Endpoint};
use tonic::{Request, Status};

use crate::batches::parameters;
use crate::support::{COMMIT_TOKEN_KEY, Database, bounded, int, psql, seconds, text, wait_until};
use crate::trust::{Caller, SigningKey, believing};
use pb::value::Kind;

/// Values of parameters, such as stand nowhere else.
const TEXT: &str = "Zwetschkenknoedel";
const BYTES: &str = "Marillenmarmelade";
const NUMBER: i64 = 739_162_850_437;

const STATIC_TOKEN: &str = "sbt_Powidltatschkerl-Powidltatschkerl-43";
const WRONG_TOKEN: &str = "sbt_Germknoedel-Germknoedel-Germknoedel-7";

/// A secret as it may show up: as it is, as hexadecimal digits, as numbers, or as base64 of a text that it is in.
fn forms(secret: &str) -> Vec<String> {
    let hex = secret.bytes().map(|byte| format!("{byte:02x}")).collect::<Vec<_>>().concat();
    let numbers: Vec<_> = secret.bytes().map(|byte| byte.to_string()).collect();
    let mut forms = vec![secret.to_owned(), hex.to_uppercase(), hex, numbers.join(","), numbers.join(", ")];
    for before in 0..3 {
        let bytes = [vec![0; before], secret.as_bytes().to_vec()].concat();
        // The digits that hold nothing else, wherever the text begins.
        let digits = (before * 8).div_ceil(6)..bytes.len() * 8 / 6;
        for engine in [STANDARD_NO_PAD, URL_SAFE_NO_PAD] {
            forms.push(engine.encode(&bytes)[digits.clone()].to_owned());
        }
    }
    forms
}

fn shows(text: &str, secret: &str) -> bool {
    forms(secret).iter().any(|form| text.contains(form))
}

#[test]
fn a_secret_is_found_in_every_form() {
    for text in [
        format!("before {TEXT} after"),
        format!("{:x?}", TEXT.as_bytes()).replace(", ", ""),
        format!("{:?}", TEXT.as_bytes()),
        STANDARD_NO_PAD.encode(TEXT),
        STANDARD_NO_PAD.encode(format!("x{TEXT}y")),
        URL_SAFE_NO_PAD.encode(format!("xy{TEXT}")),
        URL_SAFE_NO_PAD.encode(format!("xyz{TEXT}xyz")),
    ] {
        assert!(shows(&text, TEXT), "{text}");
        assert!(!shows(&text, BYTES), "{text}");
    }
}

/// The program, with all that it writes kept in files.
struct Watched {
    child: Child,
    directory: TempDir,
    address: String,
}

impl Watched {
    /// Serves with that configuration, and logs all that it can.
    fn start(configuration: &str) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let written = |name: &str| Stdio::from(File::create(directory.path().join(name)).unwrap());
        let file = configure(directory.path(), configuration);
        let child = program("serve", &file)
            .args(["--listen", "127.0.0.1:0"])
            .env("RUST_LOG", "trace")
            .stdin(Stdio::null())
            .stdout(written("stdout"))
            .stderr(written("stderr"))
            .spawn()
            .unwrap();
        let mut watched = Self { child, directory, address: String::new() };
        wait_until(|| watched.read("stdout").ends_with('\n'));
        let ready = watched.read("stdout");
        let address = ready.split_whitespace().find(|word| word.starts_with("127.0.0.1:")).expect(&ready);
        address.clone_into(&mut watched.address);
        watched
    }

    fn read(&self, name: &str) -> String {
        String::from_utf8_lossy(&fs::read(self.directory.path().join(name)).unwrap()).into_owned()
    }

    fn channel(&self) -> Channel {
        Endpoint::from_shared(format!("http://{}", self.address)).unwrap().connect_lazy()
    }

    fn signal(&self, name: &str) {
        let sent = Command::new("kill").args([format!("-{name}"), self.child.id().to_string()]).status().unwrap();
        assert!(sent.success());
    }

    /// How often it has logged that.
    fn logged(&self, text: &str) -> usize {
        self.read("stderr").matches(text).count()
    }

    /// Has it read another configuration, and waits until it says what came of that.
    fn reload(&self, configuration: &str, said: &str) {
        let before = self.logged(said);
        configure(self.directory.path(), configuration);
        self.signal("HUP");
        wait_until(|| self.logged(said) > before);
    }

    /// Drains it. All that it has written.
    fn stop(mut self) -> String {
        self.signal("TERM");
        assert!(self.child.wait().unwrap().success());
        self.read("stdout") + &self.read("stderr")
    }
}

impl Drop for Watched {
    fn drop(&mut self) {
        // A test that failed leaves nothing running.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn program(verb: &str, configuration: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_session-broker"));
    command.args([verb, "--config"]).arg(configuration);
    command
}

fn configure(directory: &Path, configuration: &str) -> PathBuf {
    let (file, next) = (directory.join("broker.toml"), directory.join("next.toml"));
    fs::write(&next, configuration).unwrap();
    fs::rename(&next, &file).unwrap();
    file
}

/// What the program says of a configuration, all of it.
fn checked(configuration: &str) -> String {
    let directory = tempfile::tempdir().unwrap();
    let file = configure(directory.path(), configuration);
    let Output { stdout, stderr, .. } = program("check", &file).env("RUST_LOG", "trace").output().unwrap();
    String::from_utf8(stdout).unwrap() + &String::from_utf8(stderr).unwrap()
}

/// All that an error tells but PostgreSQL's own words.
fn shown(status: &Status) -> String {
    let details = tonic_types::pb::Status::decode(status.details()).unwrap().details;
    let is_postgresqls = |name: &str| name.ends_with(".PgError");
    let quotes = details.iter().any(|detail| is_postgresqls(&detail.type_url));
    let ours = details.iter().filter(|detail| !is_postgresqls(&detail.type_url));
    let mut text: String = ours.map(|detail| String::from_utf8_lossy(&detail.value).into_owned()).collect();
    if !quotes {
        text.push_str(status.message());
    }
    text
}

/// A statement with a parameter of each kind that has a secret in it.
fn with_secrets(session_token: &str, sql: &str, more: Vec<Kind>) -> pb::ExecuteRequest {
    let mut kinds = vec![text(TEXT), Kind::BytesValue(BYTES.into()), int(NUMBER)];
    kinds.extend(more);
    pb::ExecuteRequest {
        session_token: session_token.into(),
        sql: sql.into(),
        parameters: parameters(kinds),
        ..Default::default()
    }
}

fn with(session_token: &str, sql: &str, kind: Kind) -> pb::ExecuteRequest {
    let parameters = parameters(vec![kind]);
    pb::ExecuteRequest { parameters, ..with_secrets(session_token, sql, vec![]) }
}

const INSERT: &str = "INSERT INTO notes VALUES ($1, $2, $3)";

/// What was told to callers while they worked.
#[derive(Default)]
struct Told {
    /// Of sessions.
    tokens: Vec<String>,
    ids: Vec<String>,
    errors: Vec<Status>,
}

impl Told {
    async fn begin(&mut self, caller: &Caller, lease_ttl: i64) -> String {
        let request = pb::BeginSessionRequest { lease_ttl: seconds(lease_ttl), ..Default::default() };
        let begun = caller.begin_with(request).await.unwrap();
        self.tokens.push(begun.session_token.clone());
        self.ids.push(begun.session_id);
        begun.session_token
    }

    /// It fails, in whatever way.
    async fn fails(&mut self, caller: &Caller, request: pb::ExecuteRequest) {
        self.errors.push(caller.run(request).await.unwrap_err());
    }
}

/// Statements that succeed and that fail, by PostgreSQL's word and by ours.
async fn statements(told: &mut Told, caller: &Caller) {
    let session = told.begin(caller, 30).await;
    caller.run(with_secrets(&session, INSERT, vec![])).await.unwrap();
    caller.commit(&session).await.unwrap();
    for failing in [
        // PostgreSQL says which number there is already, and which text is no number.
        with_secrets(&session, INSERT, vec![]),
        with(&session, "SELECT $1::text::int4", text(TEXT)),
        with(&session, "SELECT $1", text(TEXT)),
        // The rest is refused before.
        with(&session, "SELECT $1::int2", int(NUMBER)),
        with(&session, "SELECT $1::bool", int(NUMBER)),
        with(&session, "SELECT $1::uuid", Kind::BytesValue(BYTES.into())),
        with(&session, "SELECT $1::text", text(&format!("{TEXT}\0"))),
        with(&session, "SELECT $1::int4[]", bounded(vec![int(NUMBER)], vec![1, 1])),
        with_secrets(&session, "COMMIT", vec![]),
        with_secrets(&session, INSERT, vec![text(TEXT); 3]),
    ] {
        // Some leave the transaction failed, in which the next is not looked at.
        told.errors.extend(caller.run(failing).await.err());
        let rollback = pb::RollbackRequest { session_token: session.clone(), ..Default::default() };
        caller.sessions().rollback(caller.request(rollback)).await.unwrap();
    }
    assert!(told.errors.len() >= 8, "{}", told.errors.len());
    let batch = pb::ExecuteBatchRequest {
        session_token: session.clone(),
        statements: vec![pb::BatchStatement {
            sql: "UPDATE notes SET word = $1, bytes = $2 WHERE number = $3".into(),
            parameters: with_secrets("", "", vec![]).parameters,
            ..Default::default()
        }],
        commit: true,
        ..Default::default()
    };
    caller.sessions().execute_batch(caller.request(batch)).await.unwrap();
    let streamed = pb::ExecuteStreamRequest {
        session_token: session.clone(),
        sql: "SELECT word, bytes, number FROM notes WHERE word = $1".into(),
        parameters: parameters(vec![text(TEXT)]),
        commit: true,
        ..Default::default()
    };
    let mut parts = caller.sessions().execute_stream(caller.request(streamed)).await.unwrap().into_inner();
    while parts.message().await.unwrap().is_some() {}
}

/// A whole transaction in one call, which fails.
async fn run(told: &mut Told, caller: &Caller, channel: Channel) {
    let pb::ExecuteRequest { sql, parameters, .. } = with_secrets("", INSERT, vec![]);
    let statements = vec![pb::RunStatement { sql, parameters, ..Default::default() }];
    let request = pb::RunRequest { statements, ..Default::default() };
    told.errors.push(TransactionServiceClient::new(channel).run(caller.request(request)).await.unwrap_err());
}

/// A session whose connection is lost, one that is reaped, and one whose token is wrong.
async fn ends(told: &mut Told, caller: &Caller, database: &Database, watched: &Watched) {
    let lost = told.begin(caller, 30).await;
    caller.run(with(&lost, "SELECT $1::text", text(TEXT))).await.unwrap();
    let get = pb::GetSessionRequest { session_token: lost.clone() };
    let backend = caller.sessions().get_session(caller.request(get)).await.unwrap().into_inner().backend_pid;
    database.psql(&format!("SELECT pg_terminate_backend({backend})"));
    told.fails(caller, with(&lost, "SELECT $1::text", text(TEXT))).await;
    let reaped = told.begin(caller, 1).await;
    caller.run(with(&reaped, "SELECT $1::text", text(TEXT))).await.unwrap();
    wait_until(|| watched.logged("lease expired") > 0);
    told.fails(caller, with(&reaped, "SELECT $1::text", text(TEXT))).await;
    let (rest, _) = reaped.rsplit_once('.').unwrap();
    told.fails(caller, with(&format!("{rest}.{}", "0".repeat(32)), "SELECT $1::text", text(TEXT))).await;
    told.fails(caller, with(&reaped[1..], "SELECT $1::text", text(TEXT))).await;
    told.fails(caller, with(&format!("{reaped}0"), "SELECT $1::text", text(TEXT))).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_that_is_logged_printed_or_told_shows_a_secret() {
    let database = Database::create();
    psql(&database.url(), "CREATE TABLE notes (word text, bytes bytea, number int8 PRIMARY KEY)");
    let keys = tempfile::tempdir().unwrap();
    let key = SigningKey::draw("a");
    let (jwt, expired) = (key.token("shipping", 300), key.token("shipping", -600));
    let configuration = format!(
        "drain_grace = \"1s\"\ncommit_token_key = {COMMIT_TOKEN_KEY:?}\n[engines.main]\nurl = {:?}\n\
         [authentication.tokens]\nbilling = \"{}\"\n{}[principals.billing]\n[principals.shipping]\n",
        database.url(),
        TokenDigest::of(STATIC_TOKEN),
        believing(&key.publish(keys.path())),
    );
    let password = database.url().split([':', '@']).nth(2).unwrap().to_owned();

    let watched = Watched::start(&configuration);
    let mut told = Told::default();
    let [billing, shipping] = [STATIC_TOKEN, &jwt].map(|token| Caller::bearing(watched.channel(), token));
    statements(&mut told, &billing).await;
    run(&mut told, &shipping, watched.channel()).await;
    ends(&mut told, &shipping, &database, &watched).await;
    for wrong in [WRONG_TOKEN, &expired, &jwt[..jwt.len() - 5]] {
        told.errors.push(Caller::bearing(watched.channel(), wrong).begin().await.unwrap_err());
    }
    let mut basic = Request::new(pb::BeginSessionRequest::default());
    basic.metadata_mut().insert("authorization", format!("Basic {WRONG_TOKEN}").parse().unwrap());
    told.errors.push(billing.sessions().begin_session(basic).await.unwrap_err());

    // Each secret where it does not belong, or where something is wrong with what stands around it.
    let digest = TokenDigest::of(STATIC_TOKEN).to_string();
    let mistakes = [
        configuration.replace("postgresql://", "mysql://"),
        configuration.replace(&digest, STATIC_TOKEN),
        configuration.replace("drain_grace = \"1s\"", "drain_grace = \"soon\""),
        configuration.replace("url = \"", "url = postgresql\""),
        configuration.replace("[engines.main]\nurl", "[engines.main]\nurll"),
    ];
    watched.reload(&configuration, "reloaded");
    for mistake in &mistakes {
        watched.reload(mistake, "nothing has changed");
    }
    // One is in the middle of a transaction when the program is stopped.
    let drained = told.begin(&billing, 30).await;
    billing.run(with(&drained, "SELECT $1::text", text(TEXT))).await.unwrap();
    let log = watched.stop();
    let printed: String = [&configuration].into_iter().chain(&mistakes).map(|text| checked(text)).collect();
    let errors: String = told.errors.iter().map(shown).collect();

    // All of them can be searched, and much is there.
    for id in &told.ids {
        assert!(shows(&log, id), "{id} is not in the log");
    }
    assert!(shows(&printed, &digest) && shows(&errors, "SESSION_ENDED"), "{printed}\n{errors}");
    let number = NUMBER.to_string();
    let signature = jwt.rsplit('.').next().unwrap();
    let mut secrets = vec![password.as_str(), COMMIT_TOKEN_KEY, STATIC_TOKEN, WRONG_TOKEN, TEXT, BYTES, &number];
    secrets.extend([jwt.as_str(), signature, &expired]);
    // What opens a session is the last part of its token.
    secrets.extend(told.tokens.iter().map(|token| token.rsplit('.').next().unwrap()));
    for secret in secrets {
        for (place, text) in [("the log", &log), ("what check prints", &printed), ("an error", &errors)] {
            assert!(!shows(text, secret), "{secret} is in {place}");
        }
    }
}
