//! What the broker tells of itself: metrics, traces and logs, as those receive them who look.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use opentelemetry_proto::tonic::collector::logs::v1::logs_service_server::{LogsService, LogsServiceServer};
use opentelemetry_proto::tonic::collector::logs::v1::{ExportLogsServiceRequest, ExportLogsServiceResponse};
use opentelemetry_proto::tonic::collector::metrics::v1::metrics_service_server::{
    MetricsService, MetricsServiceServer,
};
use opentelemetry_proto::tonic::collector::metrics::v1::{ExportMetricsServiceRequest, ExportMetricsServiceResponse};
use opentelemetry_proto::tonic::collector::trace::v1::trace_service_server::{TraceService, TraceServiceServer};
use opentelemetry_proto::tonic::collector::trace::v1::{ExportTraceServiceRequest, ExportTraceServiceResponse};
use opentelemetry_proto::tonic::common::v1::any_value::Value as Any;
use opentelemetry_proto::tonic::trace::v1::{Span, span::SpanKind, status::StatusCode};
use prost::Message as _;
use session_broker::grpc::pb;
use session_broker::grpc::pb::value::Kind;
use session_broker::names::{self, attribute};
use tempfile::TempDir;
use tokio::net::TcpListener;
use tokio::time::sleep;
use tokio_stream::wrappers::TcpListenerStream;
use tokio_util::task::AbortOnDropHandle;
use tonic::service::Routes;
use tonic::{Code, Request, Response, Status};

use crate::command_line::{Program, exit_code, get};
use crate::profiles::Served;
use crate::support::{Database, Session, first_row, seconds, text, until, wait_until};

/// A port for operators.
const OPERATIONS: &str = "[operations]\nlisten = \"127.0.0.1:0\"\n";

/// The counts that Prometheus is told, by each line's name and labels.
async fn scraped(operations: &str) -> BTreeMap<String, u64> {
    let answer = get(operations, "/metrics").await;
    assert!(answer.starts_with("HTTP/1.1 200 OK\r\n"), "{answer}");
    let (_, text) = answer.split_once("\r\n\r\n").unwrap();
    let lines = text.lines().filter(|line| !line.starts_with('#'));
    let values = lines
        .filter_map(|line| line.rsplit_once(' '))
        .filter(|(name, _)| !is_sum(name))
        .map(|(name, value)| (name.to_owned(), value.parse().unwrap_or_else(|_| panic!("{name} is {value:?}"))));
    values.collect()
}

/// Whether a line is the sum of a histogram's values, which are no counts.
fn is_sum(name: &str) -> bool {
    name.split('{').next().unwrap().ends_with("_sum")
}

/// The sum of all lines of that name that have these labels.
fn sum(metrics: &BTreeMap<String, u64>, name: &str, labels: &[&str]) -> u64 {
    let is_one = |line: &str| {
        let (found, rest) = line.split_once('{').unwrap_or((line, ""));
        found == name && labels.iter().all(|label| rest.contains(label))
    };
    metrics.iter().filter(|(line, _)| is_one(line)).map(|(_, value)| value).sum()
}

#[tokio::test(flavor = "multi_thread")]
async fn metrics_after_a_known_script_are_known_numbers() {
    let database = Database::create();
    let mut broker = Program::serve(&database.url(), OPERATIONS);
    let operations = broker.operations_address();
    let session = broker.session().await;
    session.execute("SELECT * FROM accounts").await.unwrap();
    session.execute("UPDATE accounts SET balance = 7 WHERE id = 1").await.unwrap();
    session.commit().await.unwrap();
    session.execute("INSERT INTO accounts VALUES (1, 0)").await.unwrap_err();
    session.rollback().await.unwrap();
    session.execute_and_commit("SELECT 1").await.unwrap();
    session.close().await.unwrap();
    let brief = pb::BeginSessionRequest { lease_ttl: seconds(1), ..Default::default() };
    let abandoned = Session::begin(broker.client(), brief).await.unwrap();
    until(async || abandoned.get().await.unwrap().state.is_none()).await;
    let _idle = broker.session().await;
    let busy = broker.session().await;
    busy.execute("SELECT 1").await.unwrap();
    let failed = broker.session().await;
    failed.execute("SELEC").await.unwrap_err();

    let metrics = scraped(&operations).await;
    let value = |name, labels: &[&str]| sum(&metrics, name, labels);
    let main = "sessionbroker_engine=\"main\"";
    for (state, count) in [("idle", 1), ("in_transaction", 1), ("failed", 1)] {
        let state = format!("sessionbroker_session_state=\"{state}\"");
        assert_eq!(value("sessionbroker_sessions", &[main, &state]), count, "{state}");
    }
    assert_eq!(value("sessionbroker_sessions_begun_total", &[main]), 5);
    for (reason, count) in [("CLOSED", 1), ("LEASE_EXPIRED", 1), ("DRAINED", 0)] {
        let reason = format!("sessionbroker_session_end_reason=\"{reason}\"");
        assert_eq!(value("sessionbroker_sessions_ended_total", &[main, &reason]), count, "{reason}");
    }
    assert_eq!(value("sessionbroker_reaper_lag_seconds_count", &[]), 1);
    for (method, status, count) in [
        ("BeginSession", "OK", 5),
        ("Execute", "OK", 4),
        ("Execute", "ALREADY_EXISTS", 1),
        ("Execute", "INVALID_ARGUMENT", 1),
        ("Commit", "OK", 1),
        ("Rollback", "OK", 1),
        ("Close", "OK", 1),
    ] {
        let method = format!("rpc_method=\"sessionbroker.v1.SessionService/{method}\"");
        let status = format!("rpc_response_status_code=\"{status}\"");
        assert_eq!(value("rpc_server_call_duration_seconds_count", &[&method, &status]), count, "{method} {status}");
    }
    for (operation, error, count) in [
        ("SELECT", None, 3),
        ("UPDATE", None, 1),
        ("INSERT", Some("23"), 1),
        ("OTHER", Some("42"), 1),
        ("COMMIT", None, 2),
        ("ROLLBACK", None, 1),
    ] {
        let labels = [
            format!("db_operation_name=\"{operation}\""),
            error.map_or_else(String::new, |error| format!("error_type=\"{error}\"")),
        ];
        let labels: Vec<_> = labels.iter().map(String::as_str).collect();
        assert_eq!(value("db_client_operation_duration_seconds_count", &labels), count, "{operation}");
    }
    for (outcome, count) in [("COMMITTED", 1), ("ROLLED_BACK", 1), ("NOTHING_WRITTEN", 1), ("UNKNOWN", 0)] {
        let outcome = format!("sessionbroker_transaction_outcome=\"{outcome}\"");
        assert_eq!(value("sessionbroker_transaction_duration_seconds_count", &[main, &outcome]), count, "{outcome}");
    }
    assert_eq!(value("sessionbroker_transaction_idle_ratio_count", &[main]), 3);
    let pool = "db_client_connection_pool_name=\"main\"";
    assert_eq!(value("db_client_connection_wait_time_seconds_count", &[pool]), 5);
    assert_eq!(value("db_client_connection_use_time_seconds_count", &[pool]), 3);
    assert_eq!(value("db_client_connection_count", &[pool, "state=\"used\""]), 2);
    assert_eq!(value("db_client_connection_max", &[pool]), 15);
    assert_eq!(value("db_client_connection_pending_requests", &[pool]), 0);
    assert_eq!(value("sessionbroker_engine_reachable", &[main]), 1);
    assert_eq!(value("sessionbroker_draining", &[]), 0);
    // Nothing that a caller chose has become a label.
    assert!(!metrics.keys().any(|line| line.contains(&session.id) || line.contains("accounts")));

    busy.commit().await.unwrap();
    broker.signal("TERM");
    assert_eq!(exit_code(broker), Some(0));
}

/// A Prometheus that scrapes one target, stopped when dropped.
struct Prometheus {
    child: Child,
    url: String,
    _directory: TempDir,
}

impl Prometheus {
    fn scraping(target: &str) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let configuration = directory.path().join("prometheus.yml");
        let scrape = "scrape_configs: [{job_name: broker, scrape_interval: 200ms, static_configs: [{targets:";
        std::fs::write(&configuration, format!("{scrape} [{target:?}]}}]}}]\n")).unwrap();
        let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let child = Command::new("prometheus")
            .arg(format!("--config.file={}", configuration.display()))
            .arg(format!("--storage.tsdb.path={}", directory.path().join("data").display()))
            .arg(format!("--web.listen-address=127.0.0.1:{port}"))
            .stderr(Stdio::null())
            .spawn()
            .expect("prometheus is installed: `make test` does it");
        Self { child, url: format!("http://127.0.0.1:{port}"), _directory: directory }
    }

    /// What it says of an expression that has one value, if it has one.
    fn value(&self, expression: &str) -> Option<String> {
        let answer = ureq::get(format!("{}/api/v1/query", self.url)).query("query", expression).call().ok()?;
        let answer = answer.into_body().read_to_string().unwrap();
        let answer: serde_json::Value = serde_json::from_str(&answer).unwrap();
        Some(answer["data"]["result"][0]["value"][1].as_str()?.to_owned())
    }
}

impl Drop for Prometheus {
    fn drop(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_real_prometheus_scrapes_it() {
    let database = Database::create();
    let mut broker = Program::serve(&database.url(), OPERATIONS);
    let prometheus = Prometheus::scraping(&broker.operations_address());
    for _ in 0..3 {
        broker.session().await.execute_and_commit("UPDATE accounts SET balance = 7").await.unwrap();
    }
    for (expression, value) in [
        ("up{job=\"broker\"}", "1"),
        ("sum(sessionbroker_sessions_begun_total)", "3"),
        ("sum(sessionbroker_sessions{sessionbroker_session_state=\"idle\"})", "3"),
        ("sum(sessionbroker_transaction_duration_seconds_count{sessionbroker_transaction_outcome=\"COMMITTED\"})", "3"),
    ] {
        wait_until(|| prometheus.value(expression).as_deref() == Some(value));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn callers_make_no_labels() {
    let database = Database::create();
    let mut broker = Program::serve(&database.url(), OPERATIONS);
    let operations = broker.operations_address();
    let session = broker.session().await;
    for state in ["ZZ001", "ZZ002", "22ABC"] {
        let raise = format!("DO $$ BEGIN RAISE SQLSTATE '{state}'; END $$");
        session.execute(&raise).await.unwrap_err();
        session.rollback().await.unwrap();
    }
    for path in ["/made.up/One", "/made.up/Two"] {
        let mut client = tonic::client::Grpc::new(broker.channel());
        client.ready().await.unwrap();
        let codec = tonic_prost::ProstCodec::<pb::CloseRequest, pb::CloseResponse>::default();
        let path = http::uri::PathAndQuery::from_static(path);
        let refused = client.unary(Request::new(pb::CloseRequest::default()), path, codec).await;
        assert_eq!(refused.unwrap_err().code(), Code::Unimplemented);
    }
    let metrics = scraped(&operations).await;
    assert_eq!(sum(&metrics, "db_client_operation_duration_seconds_count", &["\"DO\"", "error_type=\"other\""]), 2);
    assert_eq!(sum(&metrics, "db_client_operation_duration_seconds_count", &["\"DO\"", "error_type=\"22\""]), 1);
    assert_eq!(sum(&metrics, "rpc_server_call_duration_seconds_count", &["rpc_method=\"_OTHER\""]), 2);
    let text: Vec<_> = metrics.keys().filter(|line| line.contains("ZZ00") || line.contains("made.up")).collect();
    assert!(text.is_empty(), "{text:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_readmes_table_is_the_metrics_there_are() {
    let readme = std::fs::read_to_string("README.md").unwrap();
    let (_, table) = readme.split_once("| Metric |").expect("README has a table of metrics");
    let (table, _) = table.split_once("\n\n").unwrap();
    let cells = table.lines().skip(2).map(|row| row.split('|').map(str::trim).collect::<Vec<_>>());
    let told: BTreeMap<String, String> =
        cells.map(|row| (row[1].trim_matches('`').to_owned(), row[2].to_owned())).collect();

    let source = std::fs::read_to_string("src/names.rs").unwrap();
    let (_, metrics) = source.split_once("pub mod metric").unwrap();
    let named: BTreeSet<_> = metrics.split('"').skip(1).step_by(2).map(str::to_owned).collect();
    assert_eq!(told.keys().cloned().collect::<BTreeSet<_>>(), named);

    // Prometheus is told each that has happened, of the kind that the table says.
    let database = Database::create();
    let mut broker = Program::serve(&database.url(), OPERATIONS);
    let operations = broker.operations_address();
    broker.session().await.execute_and_commit("SELECT 1").await.unwrap();
    let answer = get(&operations, "/metrics").await;
    let kinds = answer.lines().filter_map(|line| line.strip_prefix("# TYPE ")?.split_once(' '));
    let kinds: BTreeMap<_, _> = kinds.filter(|(name, _)| *name != "target_info").collect();
    let exported = |name: &str, kind: &str| {
        let name = name.replace('.', "_");
        match kind {
            "counter" => format!("{name}_total"),
            "histogram, s" => format!("{name}_seconds"),
            _ => name,
        }
    };
    let told: BTreeMap<_, _> = told.iter().map(|(name, kind)| (exported(name, kind), kind)).collect();
    for (name, kind) in &kinds {
        let said = told.get(*name).unwrap_or_else(|| panic!("{name} is in no table"));
        assert_eq!(said.split(',').next().unwrap(), *kind, "{name}");
    }
    assert!(kinds.len() >= 15, "{kinds:?}");
}

/// A collector, and what it has received.
struct Collector {
    endpoint: String,
    received: Received,
    _serving: AbortOnDropHandle<()>,
}

/// What was logged, and in which trace.
type LogLine = (String, Vec<u8>);

#[derive(Clone, Default)]
struct Received {
    spans: Arc<Mutex<Vec<Span>>>,
    /// Everything, as it came.
    bytes: Arc<Mutex<Vec<u8>>>,
    metrics: Arc<Mutex<BTreeSet<String>>>,
    logs: Arc<Mutex<Vec<LogLine>>>,
    services: Arc<Mutex<BTreeSet<String>>>,
    headers: Arc<Mutex<BTreeSet<String>>>,
}

impl Collector {
    async fn start() -> Self {
        let received = Received::default();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let endpoint = format!("http://{}", listener.local_addr().unwrap());
        let routes = Routes::new(TraceServiceServer::new(received.clone()))
            .add_service(MetricsServiceServer::new(received.clone()))
            .add_service(LogsServiceServer::new(received.clone()));
        // The same over HTTP.
        let over_http = {
            let received = received.clone();
            move |headers: http::HeaderMap, body: axum::body::Bytes| async move {
                received.note_header(headers.get("x-tenant").and_then(|value| value.to_str().ok()));
                received.take_spans(ExportTraceServiceRequest::decode(body).unwrap());
            }
        };
        let router = routes.into_axum_router().route("/v1/traces", axum::routing::post(over_http));
        let serving = tokio::spawn(async move {
            let server = tonic::transport::Server::builder().accept_http1(true).add_routes(router.into());
            server.serve_with_incoming(TcpListenerStream::new(listener)).await.unwrap();
        });
        Self { endpoint, received, _serving: AbortOnDropHandle::new(serving) }
    }

    /// What a program needs to be told to send it all soon.
    fn environment(&self) -> Vec<(&'static str, PathBuf)> {
        vec![
            ("OTEL_EXPORTER_OTLP_ENDPOINT", self.endpoint.clone().into()),
            ("OTEL_BSP_SCHEDULE_DELAY", "50".into()),
            ("OTEL_BLRP_SCHEDULE_DELAY", "50".into()),
            ("OTEL_METRIC_EXPORT_INTERVAL", "100".into()),
        ]
    }

    fn spans(&self) -> Vec<Span> {
        self.received.spans.lock().unwrap().clone()
    }

    /// The one span of that name with this attribute, once it has come.
    async fn span(&self, name: &str, has: impl Fn(&Span) -> bool) -> Span {
        let find = || {
            let mut found: Vec<_> = self.spans().into_iter().filter(|span| span.name == name && has(span)).collect();
            assert!(found.len() < 2, "{found:#?}");
            found.pop()
        };
        until(async || find().is_some()).await;
        find().unwrap()
    }
}

impl Received {
    fn take_spans(&self, request: ExportTraceServiceRequest) {
        self.bytes.lock().unwrap().extend(request.encode_to_vec());
        for resource in request.resource_spans {
            let attributes = resource.resource.unwrap().attributes;
            let service = attributes.iter().find(|attribute| attribute.key == "service.name").unwrap();
            if let Some(Any::StringValue(name)) = &service.value.as_ref().unwrap().value {
                self.services.lock().unwrap().insert(name.clone());
            }
            for scope in resource.scope_spans {
                assert_eq!(scope.schema_url, names::SCHEMA_URL);
                self.spans.lock().unwrap().extend(scope.spans);
            }
        }
    }

    fn note_header(&self, tenant: Option<&str>) {
        self.headers.lock().unwrap().extend(tenant.map(str::to_owned));
    }
}

#[tonic::async_trait]
impl TraceService for Received {
    async fn export(
        &self,
        request: Request<ExportTraceServiceRequest>,
    ) -> Result<Response<ExportTraceServiceResponse>, Status> {
        self.note_header(request.metadata().get("x-tenant").and_then(|value| value.to_str().ok()));
        self.take_spans(request.into_inner());
        Ok(Response::new(ExportTraceServiceResponse::default()))
    }
}

#[tonic::async_trait]
impl MetricsService for Received {
    async fn export(
        &self,
        request: Request<ExportMetricsServiceRequest>,
    ) -> Result<Response<ExportMetricsServiceResponse>, Status> {
        let request = request.into_inner();
        self.bytes.lock().unwrap().extend(request.encode_to_vec());
        let scopes = request.resource_metrics.into_iter().flat_map(|resource| resource.scope_metrics);
        let names = scopes.flat_map(|scope| scope.metrics).map(|metric| metric.name);
        self.metrics.lock().unwrap().extend(names);
        Ok(Response::new(ExportMetricsServiceResponse::default()))
    }
}

#[tonic::async_trait]
impl LogsService for Received {
    async fn export(
        &self,
        request: Request<ExportLogsServiceRequest>,
    ) -> Result<Response<ExportLogsServiceResponse>, Status> {
        let request = request.into_inner();
        self.bytes.lock().unwrap().extend(request.encode_to_vec());
        let scopes = request.resource_logs.into_iter().flat_map(|resource| resource.scope_logs);
        for record in scopes.flat_map(|scope| scope.log_records) {
            if let Some(Any::StringValue(said)) = record.body.and_then(|body| body.value) {
                self.logs.lock().unwrap().push((said, record.trace_id));
            }
        }
        Ok(Response::new(ExportLogsServiceResponse::default()))
    }
}

/// What a span has under that name.
fn told(span: &Span, name: &str) -> Option<String> {
    let attribute = span.attributes.iter().find(|attribute| attribute.key == name)?;
    Some(match attribute.value.as_ref()?.value.as_ref()? {
        Any::StringValue(text) => text.clone(),
        Any::IntValue(number) => number.to_string(),
        Any::DoubleValue(number) => number.to_string(),
        other => format!("{other:?}"),
    })
}

/// A request of a caller's that has a trace.
fn traced<T>(request: T, traceparent: &str) -> Request<T> {
    let mut request = Request::new(request);
    request.metadata_mut().insert("traceparent", traceparent.parse().unwrap());
    request
}

const TRACE: &str = "0af7651916cd43dd8448eb211c80319c";

fn traceparent(span: u64, flags: u8) -> String {
    format!("00-{TRACE}-{span:016x}-{flags:02x}")
}

fn method(name: &str) -> String {
    format!("sessionbroker.v1.SessionService/{name}")
}

#[tokio::test(flavor = "multi_thread")]
async fn a_trace_goes_from_the_caller_to_its_statements_and_every_call_is_linked_to_where_its_session_began() {
    const SECRET: &str = "hush-hush";

    let (database, collector) = (Database::create(), Collector::start().await);
    let broker =
        Program::serve_under(&collector.environment(), &database.url(), "[telemetry]\nlog = \"session_broker=debug\"");
    let mut client = broker.client();
    let begun = client.begin_session(traced(pb::BeginSessionRequest::default(), &traceparent(1, 1))).await.unwrap();
    let session_token = begun.into_inner().session_token;
    let value = pb::Parameter {
        value: Some(pb::Value { kind: Some(Kind::StringValue(SECRET.into())) }),
        r#type: "text".into(),
    };
    let sql = "SELECT owner FROM accounts WHERE owner = $1".replace("owner", "id::text");
    let execute =
        pb::ExecuteRequest { session_token: session_token.clone(), sql, parameters: vec![value], ..Default::default() };
    client.execute(traced(execute, &traceparent(2, 1))).await.unwrap();
    let update = pb::ExecuteRequest {
        session_token: session_token.clone(),
        sql: "UPDATE accounts SET balance = 7".into(),
        ..Default::default()
    };
    client.execute(traced(update.clone(), &traceparent(3, 1))).await.unwrap();
    let wrong = pb::ExecuteRequest { sql: "INSERT INTO accounts VALUES (1, 0)".into(), ..update.clone() };
    let commit = pb::CommitRequest { session_token: session_token.clone() };
    client.commit(traced(commit, &traceparent(4, 1))).await.unwrap();
    client.execute(traced(wrong, &traceparent(5, 1))).await.unwrap_err();

    let began = collector.span(&method("BeginSession"), |_| true).await;
    assert_eq!(hex(&began.trace_id), TRACE);
    assert_eq!((hex(&began.parent_span_id).as_str(), began.kind()), ("0000000000000001", SpanKind::Server));
    assert_eq!(told(&began, attribute::RPC_SYSTEM).as_deref(), Some("grpc"));
    assert_eq!(told(&began, attribute::RPC_STATUS).as_deref(), Some("OK"));
    let executed = collector.span(&method("Execute"), |span| span.parent_span_id[7] == 2).await;
    assert_eq!(hex(&executed.links[0].span_id), hex(&began.span_id));
    assert_eq!(hex(&executed.links[0].trace_id), TRACE);
    let selected = collector.span("SELECT accounts", |_| true).await;
    assert_eq!((hex(&selected.parent_span_id), selected.kind()), (hex(&executed.span_id), SpanKind::Client));
    assert_eq!(told(&selected, attribute::DB_SYSTEM).as_deref(), Some("postgresql"));
    assert_eq!(told(&selected, attribute::DB_NAMESPACE).as_deref(), Some(database.name.as_str()));
    assert_eq!(told(&selected, attribute::DB_OPERATION).as_deref(), Some("SELECT"));
    assert_eq!(told(&selected, attribute::DB_TEXT), None);
    let transaction =
        collector.span("transaction", |span| told(span, attribute::OUTCOME).as_deref() == Some("COMMITTED")).await;
    assert_eq!(hex(&transaction.parent_span_id), hex(&executed.span_id));
    assert_eq!(hex(&transaction.links[0].span_id), hex(&began.span_id));
    assert!(transaction.start_time_unix_nano < selected.end_time_unix_nano);
    let committing = collector.span(&method("Commit"), |_| true).await;
    let committed = collector.span("COMMIT", |_| true).await;
    assert_eq!(hex(&committed.parent_span_id), hex(&committing.span_id));
    assert!(committed.end_time_unix_nano <= transaction.end_time_unix_nano);
    let failed = collector.span("INSERT accounts", |_| true).await;
    assert_eq!(told(&failed, attribute::DB_STATUS).as_deref(), Some("23505"));
    assert_eq!(failed.status.unwrap().code(), StatusCode::Error);
    let refused = collector.span(&method("Execute"), |span| span.parent_span_id[7] == 5).await;
    assert_eq!(told(&refused, attribute::RPC_STATUS).as_deref(), Some("ALREADY_EXISTS"));
    assert_eq!(told(&refused, attribute::ERROR_TYPE).as_deref(), Some("DATABASE_ERROR"));

    // Logs say in which trace they were written, where they are sent and where they are read.
    until(async || {
        let logs = collector.received.logs.lock().unwrap();
        logs.iter().any(|(said, trace)| said == "session began" && hex(trace) == TRACE)
    })
    .await;
    assert_eq!(broker.logged(&["session began", &format!("\"trace_id\":\"{TRACE}\"")]), 1);
    until(async || collector.received.metrics.lock().unwrap().contains(names::metric::CALL_DURATION)).await;
    assert_eq!(*collector.received.services.lock().unwrap(), BTreeSet::from(["session-broker".to_owned()]));
    // Not all of it is known to be there before the end.
    broker.signal("TERM");
    assert_eq!(exit_code(broker), Some(0));
    let bytes = collector.received.bytes.lock().unwrap();
    for secret in [SECRET, &session_token] {
        assert!(!bytes.windows(secret.len()).any(|window| window == secret.as_bytes()));
    }
}

fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write as _;

    bytes.iter().fold(String::new(), |mut hex, byte| {
        write!(hex, "{byte:02x}").unwrap();
        hex
    })
}

#[tokio::test(flavor = "multi_thread")]
async fn the_reapers_rollback_is_linked_to_where_its_session_began_and_a_pause_is_told() {
    let (database, collector) = (Database::create(), Collector::start().await);
    let broker = Program::serve_under(&collector.environment(), &database.url(), "");
    let mut client = broker.client();
    let brief = pb::BeginSessionRequest { lease_ttl: seconds(1), ..Default::default() };
    let session_token = client.begin_session(brief).await.unwrap().into_inner().session_token;
    let update = "UPDATE accounts SET balance = 7".into();
    let update = pb::ExecuteRequest { session_token, sql: update, ..Default::default() };
    client.execute(update).await.unwrap();
    let began = collector.span(&method("BeginSession"), |_| true).await;
    let rolled_back = collector.span("ROLLBACK", |_| true).await;
    assert_eq!(told(&rolled_back, attribute::END_REASON).as_deref(), Some("LEASE_EXPIRED"));
    assert_eq!(hex(&rolled_back.links[0].span_id), hex(&began.span_id));
    let transaction = collector.span("transaction", |_| true).await;
    assert_eq!(told(&transaction, attribute::OUTCOME).as_deref(), Some("ROLLED_BACK"));
    let pause = transaction.events.iter().find(|event| event.name == "idle in transaction").expect("it has paused");
    let Some(Any::DoubleValue(pause)) =
        pause.attributes.iter().find(|a| a.key == attribute::PAUSE).unwrap().value.as_ref().unwrap().value
    else {
        panic!("a pause is a number of seconds")
    };
    assert!((0.5..60.0).contains(&pause), "{pause}");
    let ratio: f64 = told(&transaction, attribute::IDLE_RATIO).unwrap().parse().unwrap();
    assert!((0.5..=1.0).contains(&ratio), "{ratio}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_caller_that_keeps_no_trace_has_none_and_the_standard_variables_are_heard() {
    let (database, collector) = (Database::create(), Collector::start().await);
    let mut environment = collector.environment();
    environment.extend([
        ("OTEL_SERVICE_NAME", PathBuf::from("broker-of-the-shop")),
        ("OTEL_EXPORTER_OTLP_HEADERS", "x-tenant=shop".into()),
        ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "http/protobuf".into()),
        ("OTEL_METRICS_EXPORTER", "none".into()),
        ("OTEL_LOGS_EXPORTER", "none".into()),
    ]);
    let broker = Program::serve_under(&environment, &database.url(), "");
    let mut client = broker.client();
    client.begin_session(traced(pb::BeginSessionRequest::default(), &traceparent(1, 0))).await.unwrap();
    client.begin_session(traced(pb::BeginSessionRequest::default(), &traceparent(2, 1))).await.unwrap();
    collector.span(&method("BeginSession"), |span| span.parent_span_id[7] == 2).await;
    broker.signal("TERM");
    assert_eq!(exit_code(broker), Some(0));
    assert_eq!(collector.spans().len(), 1);
    let Received { services, headers, metrics, logs, .. } = &collector.received;
    assert_eq!(*services.lock().unwrap(), BTreeSet::from(["broker-of-the-shop".to_owned()]));
    assert_eq!(*headers.lock().unwrap(), BTreeSet::from(["shop".to_owned()]));
    assert!(metrics.lock().unwrap().is_empty() && logs.lock().unwrap().is_empty());
}

#[test]
fn a_variable_that_is_wrong_is_refused_by_its_name() {
    let database = Database::create();
    let directory = tempfile::tempdir().unwrap();
    let nothing = directory.path().join("nothing.crt");
    for (variable, value, said) in [
        ("OTEL_TRACES_EXPORTER", "zipkin", "OTEL_TRACES_EXPORTER: \"zipkin\" is not there: use otlp or none"),
        ("OTEL_EXPORTER_OTLP_PROTOCOL", "http/json", "OTEL_EXPORTER_OTLP_PROTOCOL: \"http/json\" is not there"),
        ("OTEL_EXPORTER_OTLP_CERTIFICATE", nothing.to_str().unwrap(), "nothing.crt: No such file"),
        ("OTEL_EXPORTER_OTLP_TRACES_TIMEOUT", "soon", "OTEL_EXPORTER_OTLP_TRACES_TIMEOUT: \"soon\" is no number"),
        ("OTEL_TRACES_SAMPLER", "alwayson", "OTEL_TRACES_SAMPLER: \"alwayson\" is not there"),
        ("OTEL_TRACES_SAMPLER_ARG", "10%", "OTEL_TRACES_SAMPLER_ARG: \"10%\" is no number from 0 to 1"),
    ] {
        let configuration = directory.path().join("broker.toml");
        let engine = format!("[engines.main]\nurl = {:?}\n", database.url());
        std::fs::write(&configuration, crate::support::for_everybody(&engine)).unwrap();
        let output = Command::new(env!("CARGO_BIN_EXE_session-broker"))
            .args(["serve", "--listen", "127.0.0.1:0", "--config", configuration.to_str().unwrap()])
            .env("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")
            .env(variable, value)
            .output()
            .unwrap();
        let error = String::from_utf8(output.stderr).unwrap();
        assert!(!output.status.success() && error.contains(said), "{error}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_collector_that_is_not_there_holds_nobody_up_and_what_it_misses_is_counted() {
    let database = Database::create();
    let environment = [
        ("OTEL_EXPORTER_OTLP_ENDPOINT", PathBuf::from("http://127.0.0.1:1")),
        ("OTEL_BSP_SCHEDULE_DELAY", "50".into()),
        ("OTEL_BSP_MAX_QUEUE_SIZE", "20".into()),
        ("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "10".into()),
    ];
    let mut broker = Program::serve_under(&environment, &database.url(), OPERATIONS);
    let operations = broker.operations_address();
    let session = broker.session().await;
    for _ in 0..100 {
        session.execute_and_commit("SELECT 1").await.unwrap();
    }
    until(async || {
        let metrics = scraped(&operations).await;
        // A hundred Executes have four spans each, and all but what waits is lost.
        sum(&metrics, "sessionbroker_telemetry_dropped_total", &["\"traces\""]) > 350
    })
    .await;
    until(async || broker.logged(&["telemetry is not delivered", "\"traces\""]) == 1).await;
    broker.signal("TERM");
    assert_eq!(exit_code(broker), Some(0));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_collector_that_never_answers_holds_up_neither_calls_nor_the_end() {
    let database = Database::create();
    let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let endpoint = format!("http://{}", silent.local_addr().unwrap());
    let listening = AbortOnDropHandle::new(tokio::spawn(async move {
        let mut connections = Vec::new();
        loop {
            connections.push(silent.accept().await.unwrap());
        }
    }));
    let environment = [
        ("OTEL_EXPORTER_OTLP_ENDPOINT", PathBuf::from(endpoint)),
        ("OTEL_BSP_SCHEDULE_DELAY", "10".into()),
        ("OTEL_BLRP_SCHEDULE_DELAY", "10".into()),
    ];
    let broker = Program::serve_under(&environment, &database.url(), "");
    let session = broker.session().await;
    // One call that waited for an export would wait ten seconds.
    let calls = async {
        for _ in 0..100 {
            session.execute_and_commit("SELECT 1").await.unwrap();
        }
    };
    tokio::time::timeout(Duration::from_mins(1), calls).await.expect("nobody waits");
    broker.signal("TERM");
    assert_eq!(exit_code(broker), Some(0));
    drop(listening);
}

#[tokio::test(flavor = "multi_thread")]
async fn spans_last_as_long_as_what_they_are_of() {
    let (database, collector) = (Database::create(), Collector::start().await);
    let broker = Program::serve_under(&collector.environment(), &database.url(), "");
    let session = broker.session().await;
    session.execute("SELECT pg_sleep(0.3)").await.unwrap();
    let request = pb::ExecuteStreamRequest {
        session_token: session.token.clone(),
        sql: "SELECT pg_sleep(0.3) FROM accounts".into(),
        commit: true,
        ..Default::default()
    };
    let mut parts = broker.client().execute_stream(request).await.unwrap().into_inner();
    while parts.message().await.unwrap().is_some() {}
    let lasts = |span: &Span| span.end_time_unix_nano - span.start_time_unix_nano;
    for (name, least) in [
        ("SELECT", 300),
        ("SELECT accounts", 600),
        (method("Execute").as_str(), 300),
        (method("ExecuteStream").as_str(), 600),
        ("transaction", 900),
    ] {
        let lasted = lasts(&collector.span(name, |_| true).await) / 1_000_000;
        assert!(lasted >= least, "{name} lasted {lasted} ms");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_transaction_of_many_pauses_tells_of_some() {
    let (database, collector) = (Database::create(), Collector::start().await);
    let broker = Program::serve_under(&collector.environment(), &database.url(), "");
    let session = broker.session().await;
    for _ in 0..200 {
        session.execute("SELECT 1").await.unwrap();
        sleep(Duration::from_millis(2)).await;
    }
    session.commit().await.unwrap();
    let transaction = collector.span("transaction", |_| true).await;
    assert_eq!((transaction.events.len(), transaction.dropped_events_count), (128, 72));
}

#[tokio::test(flavor = "multi_thread")]
async fn statements_of_a_kept_trace_tell_postgresql_where_they_stand_and_leave_the_cache_alone() {
    const PREPARED: &str =
        "SELECT count(*) FROM pg_prepared_statements WHERE NOT from_sql AND statement LIKE 'SELECT current_query%'";

    let (database, collector) = (Database::create(), Collector::start().await);
    let options = "sql_comment = true\npool_size = 1\nmax_overflow = 0";
    let broker = Program::serve_under(&collector.environment(), &database.url(), options);
    let mut client = broker.client();
    let begun = client.begin_session(traced(pb::BeginSessionRequest::default(), &traceparent(1, 0))).await.unwrap();
    let session_token = begun.into_inner().session_token;
    let running = async |sql: &str, flags| {
        let request =
            pb::ExecuteRequest { session_token: session_token.clone(), sql: sql.into(), ..Default::default() };
        let answer = client.clone().execute(traced(request, &traceparent(2, flags))).await.unwrap().into_inner();
        first_row(&answer).remove(0)
    };
    let sql = "SELECT current_query() FROM accounts LIMIT 1 -- mine";
    for _ in 0..3 {
        assert_eq!(running(sql, 0).await, text(sql));
    }
    let seen = running(sql, 1).await;
    let selected = collector.span("SELECT accounts", |_| true).await;
    assert_eq!(seen, text(&format!("{sql}\n/*traceparent='00-{TRACE}-{}-01'*/", hex(&selected.span_id))));
    let count = pb::ExecuteRequest { session_token: session_token.clone(), sql: PREPARED.into(), ..Default::default() };
    let answer = client.execute(traced(count, &traceparent(3, 0))).await.unwrap().into_inner();
    assert_eq!(answer.rows[0].values[0].kind, Some(Kind::IntValue(1)));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_logged_can_be_changed_while_the_broker_runs() {
    let database = Database::create();
    let served = Served::start(&database, "[telemetry]\nlog = \"info\"\n");
    let quiet = served.program.session().await;
    served.write("[telemetry]\nlog = \"session_broker=debug,info\"\n");
    served.hang_up(&["log filter set"]);
    let loud = served.program.session().await;
    until(async || served.program.logged(&["session began", &loud.id]) == 1).await;
    assert_eq!(served.program.logged(&["session began", &quiet.id]), 0);
    served.write("[telemetry]\nlog = \"loud\"\n");
    served.hang_up(&["configuration refused", "telemetry.log"]);
    let still = served.program.session().await;
    until(async || served.program.logged(&["session began", &still.id]) == 1).await;
}
