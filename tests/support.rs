//! What the tests stand on: one PostgreSQL for the run, a database and a broker for each test, a client.

use std::io::{Read, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::sync::LazyLock;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use futures_util::stream;
use prost::Message;
use session_broker::config::Config;
use session_broker::dev::{self, ThrowAwayPostgres};
use session_broker::grpc::pb;
use session_broker::grpc::pb::bulk_service_client::BulkServiceClient;
use session_broker::grpc::pb::session_service_client::SessionServiceClient;
use session_broker::grpc::pb::transaction_service_client::TransactionServiceClient;
use session_broker::server;
use session_broker::telemetry::Telemetry;
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Status, Streaming};
use tonic_types::StatusExt;

/// Every broker's, so that each opens the others' commit tokens.
pub(crate) const COMMIT_TOKEN_KEY: &str = "a key for tests, not drawn at random";

/// Stops and vanishes when the process ends, as its input then does.
static POSTGRES: LazyLock<ThrowAwayPostgres> =
    LazyLock::new(|| ThrowAwayPostgres::start().unwrap_or_else(|error| panic!("{error}")));

/// A database of one's own.
pub(crate) struct Database {
    pub(crate) name: String,
}

impl Database {
    pub(crate) fn create() -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let name = format!("test_{}", COUNT.fetch_add(1, Ordering::Relaxed));
        psql(&POSTGRES.admin_url("postgres"), &format!("CREATE DATABASE {name} OWNER broker"));
        let database = Self { name };
        psql(
            &database.url(),
            "CREATE TABLE accounts (id int PRIMARY KEY, balance numeric NOT NULL CHECK (balance >= 0)); \
             INSERT INTO accounts VALUES (1, 100), (2, 100)",
        );
        database
    }

    pub(crate) fn url(&self) -> String {
        POSTGRES.url(&self.name)
    }

    /// What psql, as an independent witness and a superuser, prints for `sql`.
    pub(crate) fn psql(&self, sql: &str) -> String {
        psql(&POSTGRES.admin_url(&self.name), sql)
    }

    /// What psql prints for `sql` as the broker's own role, row by row and column by column. NULL is none.
    pub(crate) fn cells(&self, sql: &str) -> Vec<Vec<Option<String>>> {
        // No text in a test holds these.
        const COLUMN_END: &str = "\u{1f}";
        const ROW_END: &str = "\u{1e}";
        const NULL: &str = "\u{1d}";
        let printed = run_psql(&self.url(), sql, &["-F", COLUMN_END, "-R", ROW_END, "-P", &format!("null={NULL}")]);
        let cell = |cell: &str| (cell != NULL).then(|| cell.to_owned());
        // The last row ends with a line; without a row there is none.
        let rows = printed.strip_suffix('\n').map(|rows| rows.split(ROW_END));
        rows.into_iter().flatten().map(|row| row.split(COLUMN_END).map(cell).collect()).collect()
    }

    /// Both balances, as psql sees them.
    pub(crate) fn balances(&self) -> String {
        self.psql("SELECT string_agg(balance::text, ' ' ORDER BY id) FROM accounts")
    }

    /// How many backends of the broker in this database have a transaction open.
    pub(crate) fn open_transactions(&self) -> String {
        self.psql(
            "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() \
             AND application_name = 'session-broker' AND state LIKE 'idle in transaction%'",
        )
    }
}

impl Database {
    /// Runs `sql` in a transaction of somebody else's that stays open until the answer is dropped.
    pub(crate) fn hold(&self, sql: &str) -> Held {
        let mut psql = Command::new("psql")
            .args(["-XAtq", "-v", "ON_ERROR_STOP=1", &POSTGRES.admin_url(&self.name)])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("psql is installed with the server");
        writeln!(psql.stdin.as_mut().unwrap(), "BEGIN; {sql}; SELECT 'held';").unwrap();
        let mut answer = [0; 5];
        psql.stdout.as_mut().unwrap().read_exact(&mut answer).unwrap();
        assert_eq!(&answer, b"held\n");
        Held(psql)
    }

    /// From now on, COMMIT after an update of an account takes so many seconds, for each row.
    pub(crate) fn doze_at_commit(&self, seconds: u32) {
        self.psql(&format!(
            "CREATE FUNCTION doze() RETURNS trigger LANGUAGE plpgsql \
             AS 'BEGIN PERFORM pg_sleep({seconds}); RETURN NULL; END'; \
             CREATE CONSTRAINT TRIGGER doze AFTER UPDATE ON accounts DEFERRABLE INITIALLY DEFERRED \
             FOR EACH ROW EXECUTE FUNCTION doze()"
        ));
    }

    /// Looks until psql prints `expected` for `sql`; fails when it has not after ten seconds.
    pub(crate) fn wait_for(&self, sql: &str, expected: &str) {
        let mut seen = String::new();
        for _ in 0..500 {
            seen = self.psql(sql);
            if seen == expected {
                return;
            }
            // psql takes its own ten milliseconds to start; there is no event to wait for in another process.
        }
        panic!("{sql} printed {seen}, not {expected}");
    }
}

/// An open transaction of somebody else's.
pub(crate) struct Held(Child);

impl Drop for Held {
    fn drop(&mut self) {
        // The end of its input ends psql, and with it the transaction.
        drop(self.0.stdin.take());
        let _ = self.0.wait();
    }
}

/// Runs psql and returns its output; its failure is the test's.
pub(crate) fn psql(url: &str, sql: &str) -> String {
    run_psql(url, sql, &[]).trim_end_matches('\n').to_owned()
}

/// The same with more options, and every character of the output.
fn run_psql(url: &str, sql: &str, options: &[&str]) -> String {
    let output = Command::new("psql")
        .args(["-XAtq", "-v", "ON_ERROR_STOP=1"])
        .args(options)
        .args(["-c", sql, url])
        .env("PGTZ", "UTC")
        .stdin(Stdio::null())
        .output()
        .expect("psql is installed with the server");
    assert!(output.status.success(), "{sql}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// A broker in this process, stopped when dropped.
pub(crate) struct Broker {
    pub(crate) address: String,
    stop: CancellationToken,
    task: Option<JoinHandle<()>>,
}

impl Broker {
    pub(crate) async fn start(database: &Database) -> Self {
        Self::start_with(database, "", "").await
    }

    /// With more settings for the engine, and more sections.
    pub(crate) async fn start_with(database: &Database, engine: &str, sections: &str) -> Self {
        Self::start_at(&database.url(), engine, sections).await
    }

    /// For the database at `url`.
    pub(crate) async fn start_at(url: &str, engine: &str, sections: &str) -> Self {
        Self::start_engine(&format!("url = {url:?}\n{engine}\n{sections}")).await
    }

    /// For an engine of these keys.
    pub(crate) async fn start_engine(engine: &str) -> Self {
        Self::start_engines(&format!("[engines.main]\n{engine}")).await
    }

    /// For the engines of a configuration that says this too: keys of its root, then sections.
    pub(crate) async fn start_engines(configuration: &str) -> Self {
        Self::start_draining_for("1s", configuration).await
    }

    /// The same, with another grace for its drain.
    pub(crate) async fn start_draining_for(grace: &str, configuration: &str) -> Self {
        let toml = format!(
            "listen = \"127.0.0.1:0\"\ndrain_grace = {grace:?}\ncommit_token_key = {COMMIT_TOKEN_KEY:?}\n\
             {}\n",
            for_everybody(configuration)
        );
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("broker.toml");
        std::fs::write(&file, toml).unwrap();
        let config = Config::load(Some(&file), []).unwrap_or_else(|error| panic!("{error}"));
        let server = server::Server::bind(config, Telemetry::local()).await.unwrap();
        let address = server.addresses()[0].to_string();
        let stop = CancellationToken::new();
        let stopped = stop.clone().cancelled_owned();
        let task = tokio::spawn(async move { server.run(stream::once(stopped)).await.unwrap() });
        Self { address, stop, task: Some(task) }
    }

    /// Drains and stops it.
    pub(crate) async fn stop(mut self) {
        self.stop.cancel();
        self.task.take().unwrap().await.unwrap();
    }

    pub(crate) fn begin_stop(&self) {
        self.stop.cancel();
    }

    pub(crate) fn channel(&self) -> Channel {
        Endpoint::from_shared(format!("http://{}", self.address)).unwrap().connect_lazy()
    }

    pub(crate) fn client(&self) -> SessionServiceClient<Channel> {
        SessionServiceClient::new(self.channel())
    }

    pub(crate) fn transactions(&self) -> TransactionServiceClient<Channel> {
        TransactionServiceClient::new(self.channel())
    }

    pub(crate) fn bulk(&self) -> BulkServiceClient<Channel> {
        BulkServiceClient::new(self.channel())
    }

    pub(crate) async fn run(&self, request: pb::RunRequest) -> Result<pb::RunResponse, Failure> {
        Ok(self.transactions().run(request).await?.into_inner())
    }

    pub(crate) async fn resolve(&self, commit_token: &str) -> Result<pb::ResolveCommitResponse, Failure> {
        let request = pb::ResolveCommitRequest { commit_token: commit_token.into(), wait: None };
        Ok(self.client().resolve_commit(request).await?.into_inner())
    }

    pub(crate) async fn session(&self) -> Session {
        self.session_with(pb::BeginSessionRequest::default()).await
    }

    pub(crate) async fn session_with(&self, request: pb::BeginSessionRequest) -> Session {
        Session::begin(self.client(), request).await.unwrap()
    }
}

/// A configuration by which everybody may call, of these variables.
pub(crate) fn config(variables: &[(&str, &str)]) -> Config {
    let everybody = [("AUTHENTICATION__ANONYMOUS", "true"), ("PRINCIPALS__ANONYMOUS__PROFILES", "default")];
    let variables = variables.iter().chain(&everybody);
    let environment = variables.map(|(name, value)| (format!("SESSION_BROKER__{name}"), (*value).to_owned()));
    Config::load(None, environment).unwrap_or_else(|error| panic!("{error}"))
}

/// A configuration with what it does not say itself: that everybody may call.
pub(crate) fn for_everybody(configuration: &str) -> String {
    let sections = ["[authentication]\nanonymous = true", "[principals.anonymous]"];
    let absent =
        sections.iter().filter(|section| !configuration.contains(&section[..section.find(['.', ']']).unwrap()]));
    absent.fold(configuration.to_owned(), |text, section| text + "\n" + section)
}

/// A PostgreSQL of a test's own, with TLS by certificates made for it.
pub(crate) struct Server {
    pub(crate) postgres: ThrowAwayPostgres,
    pub(crate) port: String,
    pub(crate) password: String,
}

impl Server {
    pub(crate) fn start() -> Self {
        let postgres = ThrowAwayPostgres::start().unwrap_or_else(|error| panic!("{error}"));
        let url = postgres.url("sample");
        let (login, rest) = url.trim_start_matches("postgresql://broker:").split_once('@').unwrap();
        let port = rest.trim_start_matches("127.0.0.1:").split('/').next().unwrap().to_owned();
        Self { port, password: login.to_owned(), postgres }
    }

    pub(crate) fn psql(&self, sql: &str) -> String {
        psql(&self.postgres.admin_url("sample"), sql)
    }

    /// The same, while the server may not be there.
    pub(crate) fn try_psql(&self, sql: &str) -> Option<String> {
        let url = self.postgres.admin_url("sample");
        let output = Command::new("psql").args(["-XAtq", "-c", sql, &url]).output().unwrap();
        let answer = String::from_utf8(output.stdout).unwrap();
        output.status.success().then(|| answer.trim_end().to_owned())
    }

    /// Turns TLS on with this certificate and key, asking callers for one by this authority.
    pub(crate) fn encrypt(&self, certificate: &str, key: &str, authority: &str) {
        let data = self.postgres.directory().join("data");
        let owner = std::fs::metadata(&data).unwrap();
        for (name, text) in [("server.crt", certificate), ("server.key", key), ("root.crt", authority)] {
            let file = data.join(name);
            std::fs::write(&file, text).unwrap();
            std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o600)).unwrap();
            std::os::unix::fs::chown(&file, Some(owner.uid()), Some(owner.gid())).unwrap();
        }
        for setting in ["ssl = on", "ssl_ca_file = 'root.crt'"] {
            self.psql(&format!("ALTER SYSTEM SET {setting}"));
        }
        self.psql("SELECT pg_reload_conf()");
        wait_until(|| self.psql("SHOW ssl") == "on");
    }

    /// An engine's keys for the sample database, without its host.
    pub(crate) fn login(&self) -> String {
        let Self { port, password, .. } = self;
        format!("port = {port}\nuser = \"broker\"\npassword = {password:?}\ndatabase = \"sample\"\n")
    }
}

/// A streaming standby of a [`Server`].
pub(crate) struct Standby {
    script: Child,
    directory: tempfile::TempDir,
    pub(crate) port: String,
    admin_url: String,
}

impl Standby {
    /// Copies the primary and follows it. Stops when its input ends, as the throw-away PostgreSQL does.
    pub(crate) fn start(primary: &Server) -> Self {
        const SCRIPT: &str = r#"
            PATH="$4:$PATH" pg_basebackup -h 127.0.0.1 -p "$2" -U postgres -D "$1/data" -X stream -R -c fast || exit 1
            "$4/postgres" -D "$1/data" -c port="$3" -c unix_socket_directories="$1" -c max_connections=200 \
                >"$1/log" 2>&1 &
            server=$!
            read -r _
            kill -QUIT $server; wait $server; rm -rf "$1/data" "$1/log"
        "#;
        let port = dev::free_port().unwrap().to_string();
        let directory = tempfile::tempdir().unwrap();
        let owner = std::fs::metadata(primary.postgres.directory()).unwrap();
        std::os::unix::fs::chown(directory.path(), Some(owner.uid()), Some(owner.gid())).unwrap();
        let admin_url = primary.postgres.admin_url("sample");
        let password = admin_url.trim_start_matches("postgresql://postgres:").split('@').next().unwrap();
        let mut command = Command::new("/bin/sh");
        command
            .args(["-c", SCRIPT, "standby"])
            .args([directory.path().as_os_str(), primary.port.as_ref(), port.as_ref()])
            .arg(dev::server_programs().unwrap())
            .current_dir(directory.path())
            .env("PGPASSWORD", password)
            .stdin(Stdio::piped());
        if std::fs::metadata("/proc/self").is_ok_and(|own| own.uid() == 0) {
            command.uid(owner.uid()).gid(owner.gid());
        }
        let script = command.spawn().unwrap();
        let admin_url = admin_url.replace(&primary.port, &port);
        let standby = Self { script, directory, port, admin_url };
        wait_until(|| {
            std::fs::read_to_string(standby.directory.path().join("data/postmaster.pid"))
                .is_ok_and(|state| state.contains("ready"))
        });
        standby
    }

    pub(crate) fn psql(&self, sql: &str) -> String {
        psql(&self.admin_url, sql)
    }
}

impl Drop for Standby {
    fn drop(&mut self) {
        drop(self.script.stdin.take());
        let _ = self.script.wait();
    }
}

/// Looks until it is so, as fast as it can be asked; fails when it is not after ten seconds.
pub(crate) async fn until(mut so: impl AsyncFnMut() -> bool) {
    let looking = async { while !so().await {} };
    timeout(Duration::from_secs(10), looking).await.expect("it happens");
}

/// Looks until it is so; fails when it is not after ten seconds of looking.
pub(crate) fn wait_until(mut so: impl FnMut() -> bool) {
    for _ in 0..1000 {
        if so() {
            return;
        }
        let _ = Command::new("sleep").arg("0.01").status();
    }
    panic!("it did not happen");
}

impl Drop for Broker {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

/// A caller with its session.
#[derive(Clone)]
pub(crate) struct Session {
    pub(crate) client: SessionServiceClient<Channel>,
    pub(crate) token: String,
    pub(crate) id: String,
}

impl Session {
    pub(crate) async fn begin(
        mut client: SessionServiceClient<Channel>,
        request: pb::BeginSessionRequest,
    ) -> Result<Self, Status> {
        let begun = client.begin_session(request).await?.into_inner();
        Ok(Self { client, token: begun.session_token, id: begun.session_id })
    }

    pub(crate) fn statement(&self, sql: &str, parameters: Vec<pb::value::Kind>) -> pb::ExecuteRequest {
        let parameter = |kind| pb::Parameter { value: Some(pb::Value { kind: Some(kind) }), r#type: String::new() };
        pb::ExecuteRequest {
            session_token: self.token.clone(),
            sql: sql.into(),
            parameters: parameters.into_iter().map(parameter).collect(),
            ..Default::default()
        }
    }

    pub(crate) async fn run(&self, request: pb::ExecuteRequest) -> Result<pb::ExecuteResponse, Failure> {
        Ok(self.client.clone().execute(request).await?.into_inner())
    }

    pub(crate) async fn execute(&self, sql: &str) -> Result<pb::ExecuteResponse, Failure> {
        self.run(self.statement(sql, Vec::new())).await
    }

    pub(crate) async fn execute_and_commit(&self, sql: &str) -> Result<pb::ExecuteResponse, Failure> {
        self.run(pb::ExecuteRequest { commit: true, ..self.statement(sql, Vec::new()) }).await
    }

    pub(crate) fn streaming(&self, sql: &str, parameters: Vec<pb::value::Kind>) -> pb::ExecuteStreamRequest {
        let pb::ExecuteRequest { session_token, sql, parameters, .. } = self.statement(sql, parameters);
        pb::ExecuteStreamRequest { session_token, sql, parameters, ..Default::default() }
    }

    /// Begins a stream, of which nothing is read yet.
    pub(crate) async fn open(
        &self,
        request: pb::ExecuteStreamRequest,
    ) -> Result<Streaming<pb::ExecuteStreamResponse>, Failure> {
        Ok(self.client.clone().execute_stream(request).await?.into_inner())
    }

    /// A whole stream. Its error may come instead of the stream as well as in it.
    pub(crate) async fn stream(&self, request: pb::ExecuteStreamRequest) -> Streamed {
        match self.open(request).await {
            Ok(parts) => Streamed::read(parts).await,
            Err(failure) => Streamed { columns: Vec::new(), chunks: Vec::new(), end: Err(failure) },
        }
    }

    pub(crate) async fn commit(&self) -> Result<pb::CommitResponse, Failure> {
        let request = pb::CommitRequest { session_token: self.token.clone() };
        Ok(self.client.clone().commit(request).await?.into_inner())
    }

    pub(crate) async fn execute_batch(
        &self,
        request: pb::ExecuteBatchRequest,
    ) -> Result<pb::ExecuteBatchResponse, Failure> {
        let request = pb::ExecuteBatchRequest { session_token: self.token.clone(), ..request };
        Ok(self.client.clone().execute_batch(request).await?.into_inner())
    }

    pub(crate) async fn rollback(&self) -> Result<pb::SessionState, Failure> {
        self.rollback_to("").await
    }

    pub(crate) async fn rollback_to(&self, savepoint: &str) -> Result<pb::SessionState, Failure> {
        let request = pb::RollbackRequest { session_token: self.token.clone(), savepoint: savepoint.into() };
        Ok(self.client.clone().rollback(request).await?.into_inner().state.unwrap())
    }

    pub(crate) async fn savepoint(&self, name: &str) -> Result<pb::SessionState, Failure> {
        let request = pb::CreateSavepointRequest {
            session_token: self.token.clone(),
            name: name.into(),
            transaction_options: None,
        };
        Ok(self.client.clone().create_savepoint(request).await?.into_inner().state.unwrap())
    }

    pub(crate) async fn release(&self, name: &str) -> Result<pb::SessionState, Failure> {
        let request = pb::ReleaseSavepointRequest { session_token: self.token.clone(), name: name.into() };
        Ok(self.client.clone().release_savepoint(request).await?.into_inner().state.unwrap())
    }

    pub(crate) async fn close(&self) -> Result<pb::EndReason, Failure> {
        let request = pb::CloseRequest { session_token: self.token.clone() };
        Ok(self.client.clone().close(request).await?.into_inner().end_reason())
    }

    pub(crate) async fn cancel(&self) -> Result<pb::CancelResponse, Failure> {
        let request = pb::CancelRequest { session_token: self.token.clone() };
        Ok(self.client.clone().cancel(request).await?.into_inner())
    }

    pub(crate) async fn keep_alive(&self) -> Result<pb::SessionState, Failure> {
        let request = pb::KeepAliveRequest { session_token: self.token.clone() };
        Ok(self.client.clone().keep_alive(request).await?.into_inner().state.unwrap())
    }

    pub(crate) async fn get(&self) -> Result<pb::GetSessionResponse, Failure> {
        let request = pb::GetSessionRequest { session_token: self.token.clone() };
        Ok(self.client.clone().get_session(request).await?.into_inner())
    }

    pub(crate) async fn attach(&self) -> Result<Streaming<pb::AttachResponse>, Failure> {
        let request = pb::AttachRequest { session_token: self.token.clone() };
        Ok(self.client.clone().attach(request).await?.into_inner())
    }

    /// Looks until the session has ended, which looking does not keep it from, and says why.
    pub(crate) async fn ended(&self) -> pb::EndReason {
        until(async || self.get().await.unwrap().state.is_none()).await;
        self.get().await.unwrap().end_reason()
    }
}

/// What came of ExecuteStream.
#[derive(Debug)]
pub(crate) struct Streamed {
    pub(crate) columns: Vec<pb::Column>,
    pub(crate) chunks: Vec<pb::ResultChunk>,
    pub(crate) end: Result<pb::ResultTrailer, Failure>,
}

impl Streamed {
    /// Reads to the end: one header, chunks, and one trailer with nothing behind it; or an error anywhere.
    pub(crate) async fn read(mut parts: Streaming<pb::ExecuteStreamResponse>) -> Self {
        use pb::execute_stream_response::Part;
        let (mut header, mut chunks) = (None, Vec::new());
        let end = loop {
            let message = match parts.message().await {
                Ok(message) => message.expect("a trailer or an error ends it"),
                Err(status) => break Err(Failure::from(status)),
            };
            match message.part.expect("every message has a part") {
                Part::Header(pb::ResultHeader { columns }) => {
                    assert!(header.is_none(), "a second header");
                    header = Some(columns);
                }
                Part::Chunk(chunk) => {
                    assert!(header.is_some(), "a chunk before the header");
                    chunks.push(chunk);
                }
                Part::Trailer(trailer) => {
                    assert!(header.is_some(), "a trailer without a header");
                    assert_eq!(parts.message().await.unwrap(), None, "something behind the trailer");
                    break Ok(trailer);
                }
            }
        };
        Self { columns: header.unwrap_or_default(), chunks, end }
    }

    /// The kinds of all rows that came.
    pub(crate) fn rows(&self) -> Vec<Vec<pb::value::Kind>> {
        self.chunks.iter().flat_map(|chunk| &chunk.rows).map(kinds_of).collect()
    }
}

/// A failed call with its details unpacked.
#[derive(Debug)]
pub(crate) struct Failure {
    pub(crate) code: Code,
    pub(crate) message: String,
    pub(crate) reason: String,
    pub(crate) metadata: std::collections::HashMap<String, String>,
    pub(crate) field: Option<String>,
    pub(crate) advice: pb::retry_advice::Scope,
    pub(crate) pg_error: Option<pb::PgError>,
    pub(crate) commit: Option<pb::CommitResponse>,
    pub(crate) state: Option<pb::SessionState>,
    pub(crate) retry_info: bool,
}

impl From<Status> for Failure {
    fn from(status: Status) -> Self {
        let info = status.get_details_error_info().unwrap_or_else(|| panic!("no ErrorInfo: {status:?}"));
        assert_eq!(info.domain, "sessionbroker.v1");
        Self {
            code: status.code(),
            message: status.message().into(),
            reason: info.reason,
            metadata: info.metadata,
            field: status.get_details_bad_request().map(|bad| bad.field_violations[0].field.clone()),
            advice: detail::<pb::RetryAdvice>(&status, "RetryAdvice").expect("every error has advice").scope(),
            pg_error: detail(&status, "PgError"),
            commit: detail(&status, "CommitResponse"),
            state: detail(&status, "SessionState"),
            retry_info: status.get_details_retry_info().is_some(),
        }
    }
}

impl Failure {
    pub(crate) fn transaction_state(&self) -> pb::TransactionState {
        self.state.as_ref().expect("the session lives").transaction_state()
    }

    /// Why the session ended, of a call that says it has.
    pub(crate) fn end_reason(&self) -> &str {
        assert_eq!((self.code, self.reason.as_str()), (Code::Aborted, "SESSION_ENDED"), "{self:?}");
        assert_eq!(self.advice, pb::retry_advice::Scope::Session);
        &self.metadata["end_reason"]
    }
}

fn detail<M: Message + Default>(status: &Status, name: &str) -> Option<M> {
    let details = tonic_types::pb::Status::decode(status.details()).unwrap().details;
    let url = format!("type.googleapis.com/sessionbroker.v1.{name}");
    let found = details.iter().find(|any| any.type_url == url)?;
    Some(M::decode(found.value.as_slice()).unwrap())
}

/// The kinds of a result's first row.
pub(crate) fn first_row(response: &pb::ExecuteResponse) -> Vec<pb::value::Kind> {
    kinds_of(&response.rows[0])
}

/// The kinds of a row.
pub(crate) fn kinds_of(row: &pb::Row) -> Vec<pb::value::Kind> {
    row.values.iter().map(|value| value.kind.clone().unwrap()).collect()
}

pub(crate) fn text(value: &str) -> pb::value::Kind {
    pb::value::Kind::StringValue(value.into())
}

pub(crate) fn int(value: i64) -> pb::value::Kind {
    pb::value::Kind::IntValue(value)
}

pub(crate) fn null() -> pb::value::Kind {
    pb::value::Kind::NullValue(0)
}

/// An array whose subscripts start at 1, or a row of one.
pub(crate) fn list(values: Vec<pb::value::Kind>) -> pb::value::Kind {
    bounded(values, Vec::new())
}

/// An array whose subscripts start there.
pub(crate) fn bounded(values: Vec<pb::value::Kind>, lower_bounds: Vec<i32>) -> pb::value::Kind {
    let values = values.into_iter().map(|kind| pb::Value { kind: Some(kind) }).collect();
    pb::value::Kind::ListValue(pb::ListValue { values, lower_bounds })
}

/// A parameter that names its type.
pub(crate) fn typed(kind: pb::value::Kind, type_name: &str) -> pb::Parameter {
    pb::Parameter { value: Some(pb::Value { kind: Some(kind) }), r#type: type_name.into() }
}

#[allow(clippy::unnecessary_wraps, reason = "the protocol's durations are optional")]
pub(crate) fn seconds(seconds: i64) -> Option<prost_types::Duration> {
    Some(prost_types::Duration { seconds, nanos: 0 })
}

#[allow(clippy::unnecessary_wraps, reason = "the protocol's durations are optional")]
pub(crate) fn millis(millis: i32) -> Option<prost_types::Duration> {
    Some(prost_types::Duration { seconds: 0, nanos: millis * 1_000_000 })
}
