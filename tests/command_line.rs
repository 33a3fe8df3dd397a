//! The program itself: dev, serve, check, and its signals.

use std::collections::BTreeSet;
use std::io::{BufRead, BufReader, Read};
use std::net::TcpListener;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicI64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures_util::FutureExt;
use session_broker::grpc::pb;
use session_broker::grpc::pb::session_service_client::SessionServiceClient;
use tokio::io::{AsyncReadExt, AsyncWriteExt, copy_bidirectional};
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Status};
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;
use tonic_health::pb::{HealthCheckRequest, HealthCheckResponse};
use tonic_types::StatusExt;

use crate::proxy::Proxy;
use crate::support::{
    COMMIT_TOKEN_KEY, Database, Failure, Session, first_row, for_everybody, int, text, until, wait_until,
};

const SESSION_SERVICE: &str = "sessionbroker.v1.SessionService";

/// The program running.
pub(crate) struct Program {
    child: Child,
    output: BufReader<ChildStdout>,
    pub(crate) address: String,
    /// The line that tells the address.
    ready: String,
    /// What it has logged so far.
    log: Arc<Mutex<Vec<String>>>,
}

impl Program {
    /// Starts it and waits for its ready line.
    pub(crate) fn start(arguments: &[&str]) -> Self {
        Self::start_under(&[], arguments)
    }

    /// The same, with these variables in its environment.
    fn start_under(environment: &[(&str, PathBuf)], arguments: &[&str]) -> Self {
        let mut child = program()
            .args(arguments)
            .env("RUST_LOG", "info")
            .envs(environment.iter().cloned())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let log = Arc::<Mutex<Vec<String>>>::default();
        // Read whether anybody looks or not: a full pipe would stop the program.
        std::thread::spawn({
            let (errors, log) = (BufReader::new(child.stderr.take().unwrap()), log.clone());
            move || errors.lines().map_while(Result::ok).for_each(|line| log.lock().unwrap().push(line))
        });
        let mut output = BufReader::new(child.stdout.take().unwrap());
        let mut ready = String::new();
        output.read_line(&mut ready).unwrap();
        let address =
            ready.split([' ', ',', '\n']).find(|word| word.starts_with("127.0.0.1:")).expect(&ready).to_owned();
        Self { child, output, address, ready, log }
    }

    /// Serves `database` with a configuration file.
    pub(crate) fn serve(database_url: &str, more: &str) -> Self {
        Self::serve_under(&[], database_url, more)
    }

    /// The same, with these variables in its environment.
    pub(crate) fn serve_under(environment: &[(&str, PathBuf)], database_url: &str, more: &str) -> Self {
        Self::configured(environment, "drain_grace = \"5s\"", database_url, more)
    }

    /// With these keys at its configuration's root.
    fn configured(environment: &[(&str, PathBuf)], root: &str, database_url: &str, more: &str) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("broker.toml");
        let sections = for_everybody(&format!("[engines.main]\nurl = {database_url:?}\n{more}"));
        std::fs::write(&file, format!("{root}\ncommit_token_key = {COMMIT_TOKEN_KEY:?}\n{sections}")).unwrap();
        let arguments = ["serve", "--config", file.to_str().unwrap(), "--listen", "127.0.0.1:0"];
        Self::start_under(environment, &arguments)
    }

    pub(crate) fn channel(&self) -> Channel {
        Endpoint::from_shared(format!("http://{}", self.address)).unwrap().connect_lazy()
    }

    pub(crate) fn client(&self) -> SessionServiceClient<Channel> {
        SessionServiceClient::new(self.channel())
    }

    pub(crate) async fn session(&self) -> Session {
        Session::begin(self.client(), pb::BeginSessionRequest::default()).await.unwrap()
    }

    /// Where the throw-away PostgreSQL of `dev` has its files.
    fn directory(&self) -> PathBuf {
        let log = Path::new(self.ready.split_whitespace().last().unwrap());
        log.parent().unwrap().to_owned()
    }

    /// Where its operations port is: the line behind the ready line says so. To be asked once.
    pub(crate) fn operations_address(&mut self) -> String {
        let mut line = String::new();
        self.output.read_line(&mut line).unwrap();
        line.trim().strip_prefix("probes are answered on ").expect(&line).to_owned()
    }

    /// How many lines it has logged that hold all of these.
    pub(crate) fn logged(&self, words: &[&str]) -> usize {
        let log = self.log.lock().unwrap();
        log.iter().filter(|line| words.iter().all(|word| line.contains(word))).count()
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The most memory that it has ever had resident, in KiB.
    #[cfg(target_os = "linux")]
    pub(crate) fn peak_memory(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.pid())).unwrap();
        let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
        peak.trim().trim_end_matches(" kB").parse().unwrap()
    }

    pub(crate) fn signal(&self, name: &str) {
        let sent = Command::new("kill").args([format!("-{name}"), self.pid().to_string()]).status().unwrap();
        assert!(sent.success());
    }

    pub(crate) fn wait(mut self) -> ExitStatus {
        self.child.wait().unwrap()
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        // A test that failed leaves nothing running.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

pub(crate) fn program() -> Command {
    Command::new(env!("CARGO_BIN_EXE_session-broker"))
}

/// The exit code of a program that ends by itself.
pub(crate) fn exit_code(program: Program) -> Option<i32> {
    let status = program.wait();
    assert_eq!(status.signal(), None);
    status.code()
}

#[tokio::test(flavor = "multi_thread")]
async fn dev_serves_a_sample_database_and_leaves_nothing_behind() {
    let mut dev = Program::start(&["dev", "--listen", "127.0.0.1:0"]);
    let mut rest = String::new();
    for _ in 0..3 {
        dev.output.read_line(&mut rest).unwrap();
    }
    let call = format!("grpcurl -plaintext -d '{{}}' {} {SESSION_SERVICE}/BeginSession", dev.address);
    assert!(rest.contains(&call), "{rest}");
    let session = dev.session().await;
    let result = session.execute("SELECT owner FROM accounts WHERE id = 1").await.unwrap();
    assert_eq!(first_row(&result), [text("Ada")]);
    let directory = dev.directory();
    assert!(directory.exists());
    dev.signal("INT");
    assert_eq!(exit_code(dev), Some(0));
    assert!(!directory.exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn dev_leaves_nothing_behind_even_when_it_is_killed() {
    let dev = Program::start(&["dev", "--listen", "127.0.0.1:0"]);
    dev.session().await.execute("SELECT 1").await.unwrap();
    let directory = dev.directory();
    let url = dev.ready.split_whitespace().find(|word| word.starts_with("postgresql://")).unwrap().to_owned();
    dev.signal("KILL");
    dev.wait();
    // The script that stops the server is another process; its last act is to remove the directory.
    wait_until(|| !directory.exists());
    let refused = Command::new("psql").args(["-c", "SELECT 1", &url]).output().unwrap();
    assert!(!refused.status.success());
}

#[tokio::test(flavor = "multi_thread")]
async fn sigterm_lets_calls_finish_rolls_the_rest_back_and_exits_zero() {
    let database = Database::create();
    let broker = Program::serve(&database.url(), "");
    let (calling, lingering) = (broker.session().await, broker.session().await);
    calling.execute("UPDATE accounts SET balance = 1 WHERE id = 1").await.unwrap();
    lingering.execute("UPDATE accounts SET balance = 1 WHERE id = 2").await.unwrap();
    let call = tokio::spawn(async move { calling.execute_and_commit("SELECT pg_sleep(1)").await });
    database.wait_for(
        "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'PgSleep' AND datname = current_database()",
        "1",
    );
    broker.signal("TERM");
    assert_eq!(call.await.unwrap().unwrap().commit.unwrap().outcome(), pb::Outcome::Committed);
    assert_eq!(exit_code(broker), Some(0));
    assert_eq!((database.balances().as_str(), database.open_transactions().as_str()), ("1 100", "0"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_drain_under_load_loses_no_acknowledged_commit_and_types_every_refusal() {
    const CALLERS: usize = 200;
    /// How many are acknowledged before the signal comes.
    const BEFORE: usize = 1000;

    let database = Database::create();
    database.psql("CREATE TABLE entries (id bigint PRIMARY KEY); ALTER TABLE entries OWNER TO broker");
    // All of them wait for fifteen connections, which a busy machine is slow to give.
    let patient = "pool_timeout = \"30s\"\nconnect_timeout = \"30s\"";
    let broker = Program::serve(&database.url(), patient);
    let (numbers, acknowledged) = (Arc::new(AtomicI64::new(0)), Arc::<Mutex<Vec<i64>>>::default());
    let mut callers = JoinSet::new();
    for _ in 0..CALLERS {
        let (client, numbers, acknowledged) = (broker.client(), numbers.clone(), acknowledged.clone());
        callers.spawn(async move {
            loop {
                let session = Session::begin(client.clone(), pb::BeginSessionRequest::default()).await?;
                for _ in 0..10 {
                    let id = numbers.fetch_add(1, Ordering::Relaxed);
                    let insert = session.statement("INSERT INTO entries VALUES ($1)", vec![int(id)]);
                    let request = pb::ExecuteRequest { commit: true, ..insert };
                    session.client.clone().execute(request).await?;
                    acknowledged.lock().unwrap().push(id);
                }
            }
        });
    }
    until(async || acknowledged.lock().unwrap().len() >= BEFORE).await;
    broker.signal("TERM");
    while let Some(ended) = callers.join_next().await {
        let Err::<(), Status>(status) = ended.unwrap() else { unreachable!("nobody ends well") };
        // Once the broker is gone nobody is there to say why.
        let reason = status.get_details_error_info().map(|info| info.reason);
        let is_typed = matches!(
            (status.code(), reason.as_deref()),
            (Code::Unavailable, Some("DRAINING") | None) | (Code::Aborted, Some("SESSION_ENDED"))
        );
        assert!(is_typed, "{status:?}");
    }
    assert_eq!(exit_code(broker), Some(0));
    let kept = database.psql("SELECT id FROM entries");
    let kept: BTreeSet<i64> = kept.lines().map(|id| id.parse().unwrap()).collect();
    let acknowledged = acknowledged.lock().unwrap();
    let lost: Vec<_> = acknowledged.iter().filter(|id| !kept.contains(id)).collect();
    assert!(lost.is_empty(), "{lost:?} of {} were acknowledged and are lost", acknowledged.len());
    assert_eq!(database.open_transactions(), "0");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_signal_waits_for_nobody() {
    let database = Database::create();
    let broker = Program::configured(&[], "drain_grace = \"1h\"", &database.url(), "");
    let session = broker.session().await;
    session.execute("UPDATE accounts SET balance = 7").await.unwrap();
    broker.signal("TERM");
    until(async || session.keep_alive().await.unwrap().draining).await;
    let refused = broker.client().begin_session(pb::BeginSessionRequest::default()).await.unwrap_err();
    let refused = Failure::from(refused);
    assert_eq!((refused.code, refused.reason.as_str(), refused.retry_info), (Code::Unavailable, "DRAINING", true));
    session.execute("SELECT 1").await.unwrap();
    broker.signal("INT");
    assert_eq!(exit_code(broker), Some(0));
    assert_eq!((database.balances().as_str(), database.open_transactions().as_str()), ("100 100", "0"));
}

#[tokio::test(flavor = "multi_thread")]
async fn who_looks_at_readiness_has_a_notice_before_sessions_are_refused() {
    let database = Database::create();
    let broker = Program::configured(&[], "drain_notice = \"5m\"", &database.url(), "");
    let mut health = HealthClient::new(broker.channel());
    let request = HealthCheckRequest { service: SESSION_SERVICE.into() };
    let mut ready = health.watch(request).await.unwrap().into_inner();
    let status = |answer: Option<HealthCheckResponse>| answer.unwrap().status();
    while status(ready.message().await.unwrap()) != ServingStatus::Serving {}
    broker.signal("TERM");
    assert_eq!(status(ready.message().await.unwrap()), ServingStatus::NotServing);
    let late = broker.session().await;
    late.execute_and_commit("UPDATE accounts SET balance = 7 WHERE id = 1").await.unwrap();
    assert!(!late.keep_alive().await.unwrap().draining);
    drop(ready);
    broker.signal("TERM");
    assert_eq!(exit_code(broker), Some(0));
    assert_eq!(database.balances(), "7 100");
}

#[tokio::test(flavor = "multi_thread")]
async fn probes_are_answered_on_a_port_of_their_own_in_grpc_and_in_http() {
    let database = Database::create();
    let mut broker = Program::serve(&database.url(), "[operations]\nlisten = \"127.0.0.1:0\"");
    let address = broker.operations_address();
    let channel = Endpoint::from_shared(format!("http://{address}")).unwrap().connect_lazy();
    let mut health = HealthClient::new(channel.clone());
    let request = |service: &str| HealthCheckRequest { service: service.into() };
    assert_eq!(health.check(request("")).await.unwrap().into_inner().status(), ServingStatus::Serving);
    until(async || {
        health.check(request(SESSION_SERVICE)).await.unwrap().into_inner().status() == ServingStatus::Serving
    })
    .await;
    for (path, status, body) in
        [("/healthz", "200 OK", "alive\n"), ("/readyz", "200 OK", "ready\n"), ("/nothing", "404 Not Found", "")]
    {
        let answer = get(&address, path).await;
        assert!(answer.starts_with(&format!("HTTP/1.1 {status}\r\n")), "{path}: {answer}");
        assert!(answer.ends_with(&format!("\r\n\r\n{body}")), "{path}: {answer}");
    }
    // Nothing else is there.
    let refused = SessionServiceClient::new(channel).begin_session(pb::BeginSessionRequest::default()).await;
    assert_eq!(refused.unwrap_err().code(), Code::Unimplemented);
    let session = broker.session().await;
    session.execute("UPDATE accounts SET balance = 7").await.unwrap();
    broker.signal("TERM");
    until(async || get(&address, "/readyz").await.starts_with("HTTP/1.1 503 ")).await;
    assert!(get(&address, "/healthz").await.starts_with("HTTP/1.1 200 "));
    session.commit().await.unwrap();
    assert_eq!(exit_code(broker), Some(0));
}

/// What a server answers to a GET.
pub(crate) async fn get(address: &str, path: &str) -> String {
    let mut stream = TcpStream::connect(address).await.unwrap();
    let request = format!("GET {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    answer
}

#[tokio::test(flavor = "multi_thread")]
async fn a_broker_without_its_database_starts_is_not_ready_and_recovers() {
    let database = Database::create();
    // A port that is taken, but not listened on until the database "comes".
    let port = tokio::net::TcpSocket::new_v4().unwrap();
    port.bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let absent = port.local_addr().unwrap();
    let url = database.url();
    let real = url.split('@').nth(1).unwrap().split('/').next().unwrap().to_owned();
    let broker = Program::serve(&url.replace(&real, &absent.to_string()), "");
    let endpoint = Endpoint::from_shared(format!("http://{}", broker.address)).unwrap();
    let mut health = HealthClient::new(endpoint.connect().await.unwrap());
    let request = |service: &str| HealthCheckRequest { service: service.into() };
    let alive = health.check(request("")).await.unwrap().into_inner();
    assert_eq!(alive.status(), ServingStatus::Serving);
    let mut ready = health.watch(request(SESSION_SERVICE)).await.unwrap().into_inner();
    let status = |answer: Option<HealthCheckResponse>| answer.unwrap().status();
    assert_eq!(status(ready.message().await.unwrap()), ServingStatus::NotServing);
    let session = broker.session().await;
    let refused = session.execute("SELECT 1").await.unwrap_err();
    assert_eq!((refused.code, refused.reason.as_str()), (Code::Unavailable, "ENGINE_UNREACHABLE"));
    assert_eq!(refused.transaction_state(), pb::TransactionState::None);
    assert!(refused.retry_info);
    let proxy = port.listen(16).unwrap();
    let proxying = tokio::spawn(async move {
        loop {
            let (mut caller, _) = proxy.accept().await.unwrap();
            let mut server = TcpStream::connect(&real).await.unwrap();
            tokio::spawn(async move { copy_bidirectional(&mut caller, &mut server).await });
        }
    });
    assert_eq!(status(ready.message().await.unwrap()), ServingStatus::Serving);
    session.execute("SELECT 1").await.unwrap();
    proxying.abort();
}

#[tokio::test(flavor = "multi_thread")]
async fn readiness_outlasts_a_short_outage_and_not_a_long_one() {
    let database = Database::create();
    let proxy = Proxy::start(&database.url(), Duration::ZERO).await;
    let broker = Program::serve(&proxy.url, "");
    let endpoint = Endpoint::from_shared(format!("http://{}", broker.address)).unwrap();
    let mut health = HealthClient::new(endpoint.connect().await.unwrap());
    let request = HealthCheckRequest { service: SESSION_SERVICE.into() };
    let mut ready = health.watch(request).await.unwrap().into_inner();
    let status = |answer: Option<HealthCheckResponse>| answer.unwrap().status();
    while status(ready.message().await.unwrap()) != ServingStatus::Serving {}
    proxy.refuse();
    wait_until(|| broker.logged(&["engine is not reachable"]) == 1);
    proxy.admit();
    wait_until(|| broker.logged(&["engine is reachable"]) == 2);
    assert!(ready.message().now_or_never().is_none(), "it was not ready for a moment");
    proxy.refuse();
    assert_eq!(status(ready.message().await.unwrap()), ServingStatus::NotServing);
    proxy.admit();
    assert_eq!(status(ready.message().await.unwrap()), ServingStatus::Serving);
}

#[test]
fn check_prints_what_is_in_effect_or_every_problem() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("broker.toml");
    let check = |text: &str| {
        std::fs::write(&file, text).unwrap();
        program()
            .args(["check", "--config", file.to_str().unwrap()])
            .env("SESSION_BROKER__PROFILES__DEFAULT__LEASE_TTL", "45s")
            .output()
            .unwrap()
    };
    let good = check(&for_everybody("[engines.main]\nurl = \"postgresql://u:hush@localhost/db\""));
    let printed = String::from_utf8(good.stdout).unwrap();
    assert!(good.status.success());
    assert!(printed.contains("lease_ttl = \"45s\"") && !printed.contains("hush"), "{printed}");
    let bad = check("lisen = \"x\"\n[engines.main]\nurl = \"mysql://u:hush@h/d\"");
    let problems = String::from_utf8(bad.stderr).unwrap();
    assert_eq!(bad.status.code(), Some(1));
    assert!(problems.contains("lisen") && problems.contains("engines.main.url"), "{problems}");
    assert!(!problems.contains("hush"), "{problems}");
}

#[test]
fn check_explains_what_a_principal_may_do() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("broker.toml");
    let text = "[engines.main]\nurl = \"postgresql://u:hush@localhost/db\"\n[principals.billing]\ncalls_max = 7\n\
        [authentication]\nanonymous = true";
    std::fs::write(&file, text).unwrap();
    let explain = |principal: &str| {
        let told =
            program().args(["check", "--config", file.to_str().unwrap(), "--explain", principal]).output().unwrap();
        assert!(told.status.success());
        String::from_utf8(told.stdout).unwrap()
    };
    let billing = explain("billing");
    assert!(billing.contains("[principals.billing]") && billing.contains("calls at work: 7"), "{billing}");
    assert!(explain("anonymous").contains("may do nothing"), "{}", explain("anonymous"));
    assert!(!billing.contains("hush"), "{billing}");
}

#[test]
fn a_token_is_drawn_with_what_the_configuration_holds_of_it() {
    let draw = || {
        let drawn = program().arg("token").output().unwrap();
        assert!(drawn.status.success());
        let printed = String::from_utf8(drawn.stdout).unwrap();
        printed.lines().map(str::to_owned).collect::<Vec<_>>()
    };
    let (first, second) = (draw(), draw());
    assert_eq!(first.len(), 2);
    assert_ne!(first, second);
    let digest = ring::digest::digest(&ring::digest::SHA256, first[0].as_bytes());
    let hex = digest.as_ref().iter().map(|byte| format!("{byte:02x}")).collect::<Vec<_>>().concat();
    assert_eq!(first[1], format!("sha256:{hex}"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_taken_port_is_named() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let mut child = program()
        .args(["serve", "--listen", &address])
        .env("SESSION_BROKER__ENGINES__MAIN__URL", "postgresql://u@localhost/db")
        .env("SESSION_BROKER__AUTHENTICATION__ANONYMOUS", "true")
        .env("SESSION_BROKER__PRINCIPALS__ANONYMOUS__PROFILES", "default")
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut message = String::new();
    child.stderr.take().unwrap().read_to_string(&mut message).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(1));
    assert!(message.contains(&address), "{message}");
}
