//! The operations port over HTTP: probes, metrics, /debug/sessions and the console, with a real browser for the page.
//!
//! Who may ask, and what is told of time, is tested on the routes alone, over a fake engine with a paused clock; what the
//! audit log has, and what PostgreSQL says, on the program.

use std::future::poll_fn;
use std::io::{BufRead, BufReader, Lines};
use std::path::Path;
use std::pin::Pin;
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use bytes::Bytes;
use http::{HeaderMap, Request, StatusCode};
use http_body::{Body as HttpBody, Frame};
use ring::digest;
use serde_json::{Value, json};
use session_broker::broker::Broker;
use session_broker::broker::grant::{Grant, Grants};
use session_broker::broker::profile::{Limits, Profile, Profiles};
use session_broker::grpc::pb;
use session_broker::identity::{
    Authentication, Authenticator, CurrentAuthenticator, JwtOptions, KeySource, TokenDigest,
};
use session_broker::operations::{Metrics, Operations, Router};
use tokio::sync::watch;
use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;
use tower_service::Service;
use ureq::{Agent, BodyReader};

use crate::command_line::Program;
use crate::fake_engine::{FakeEngine, Gate, Gates};
use crate::leases;
use crate::python::run;
use crate::support::{Database, Session, wait_until};

/// Of an operator, and of a caller that is none.
const TOKEN: &str = "sbt_the-token-of-operations";
const BILLING: &str = "sbt_the-token-of-billing";

const UPDATE: &str = "UPDATE accounts SET balance = 7 WHERE id = 1";

const SECOND: Duration = Duration::from_secs(1);
const TTL: Duration = Duration::from_secs(250);

/// What is told of sessions, and how it is asked for.
const GUARDED: [(&str, &str); 3] = [
    ("GET", "/debug/sessions"),
    ("GET", "/console/events"),
    ("POST", "/console/sessions/00000000000000000000000000000000/terminate"),
];

// ---- The routes alone ----

/// The port's routes without a port, for a broker on a fake engine. Everybody is an operator there.
struct Site {
    broker: Arc<Broker>,
    engine: Arc<FakeEngine>,
    router: Router,
    ready: watch::Sender<bool>,
    stop: CancellationToken,
}

type Answer = <Router as Service<Request<String>>>::Response;

impl Site {
    fn new() -> Self {
        Self::of(Gates::OPEN, anonymous(), Arc::new(|| Ok("up 1\n".to_owned())))
    }

    fn of(gates: Gates, authentication: Authentication, metrics: Metrics) -> Self {
        let (broker, engine) = leases::broker(gates, Profile::default(), Limits::default());
        broker.set_profiles(granting(true));
        let (broker, stop) = (Arc::new(broker), CancellationToken::new());
        let (ready, said) = watch::channel(true);
        let authenticator = CurrentAuthenticator::new(Authenticator::new(authentication));
        let operations = Operations::new(broker.clone(), authenticator, metrics, stop.clone());
        Self { broker, engine, router: operations.routes(Router::new(), said), ready, stop }
    }

    async fn ask(&self, method: &str, path: &str, headers: &[(&str, &str)]) -> Answer {
        let mut request = Request::builder().method(method).uri(path);
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let body = if method == "POST" { r#"{"reason":"a test's"}"# } else { "" };
        self.router.clone().call(request.body(body.to_owned()).unwrap()).await.unwrap()
    }

    /// As a browser on this machine asks.
    async fn get(&self, path: &str) -> Answer {
        self.ask("GET", path, &[("host", "localhost:8081")]).await
    }

    async fn sessions(&self) -> Value {
        let answer = self.get("/debug/sessions").await;
        assert_eq!(answer.status(), StatusCode::OK);
        serde_json::from_str(&text(answer).await).unwrap()
    }

    async fn events(&self) -> Answer {
        let answer = self.get("/console/events").await;
        assert_eq!(answer.status(), StatusCode::OK);
        answer
    }
}

fn anonymous() -> Authentication {
    Authentication { anonymous: true, ..Authentication::default() }
}

fn granting(admin: bool) -> Profiles {
    let principals = Grants::for_everybody(Grant { admin, ..Grant::default() });
    Profiles { principals, ..Profile::default().into() }
}

/// The next part of a body, as it was made.
async fn part<B: HttpBody<Data = Bytes> + Unpin>(body: &mut B) -> Option<String> {
    let frame = poll_fn(|context| Pin::new(&mut *body).poll_frame(context)).await?;
    let Ok(Ok(data)) = frame.map(Frame::into_data) else { panic!("a body of data alone, without errors") };
    Some(String::from_utf8(data.to_vec()).unwrap())
}

async fn text(mut answer: Answer) -> String {
    let mut text = String::new();
    while let Some(part) = part(answer.body_mut()).await {
        text += &part;
    }
    text
}

/// The next event of a stream.
async fn event(answer: &mut Answer) -> Option<(String, Value)> {
    let event = part(answer.body_mut()).await?;
    let (name, data) = event.strip_prefix("event: ").unwrap().split_once("\ndata: ").unwrap();
    Some((name.to_owned(), serde_json::from_str(data.strip_suffix("\n\n").unwrap()).unwrap()))
}

async fn snapshot(answer: &mut Answer) -> Value {
    let (name, snapshot) = event(answer).await.expect("the stream goes on");
    assert_eq!(name, "snapshot");
    snapshot
}

/// The age of the one session that is there.
fn age(snapshot: &Value) -> u64 {
    snapshot["sessions"][0]["age_ms"].as_u64().unwrap()
}

/// Give or take how exact a timer is.
fn is_a_second(millis: u64) -> bool {
    (998..=1002).contains(&millis)
}

/// The stream says why it ends, and ends.
async fn ends(answer: &mut Answer, reason: &str) {
    assert_eq!(event(answer).await, Some(("end".to_owned(), json!({ "reason": reason }))));
    assert_eq!(event(answer).await, None);
}

fn header<'a>(headers: &'a HeaderMap, name: &str) -> &'a str {
    headers.get(name).map_or("", |value| value.to_str().unwrap())
}

#[tokio::test(start_paused = true)]
async fn each_route_has_its_method_and_there_are_no_others() {
    let site = Site::new();
    for (path, expected) in [("/healthz", "alive\n"), ("/readyz", "ready\n"), ("/metrics", "up 1\n")] {
        // Probes ask at any name, and are nobody.
        let answer = site.ask("GET", path, &[("host", "broker.example")]).await;
        assert_eq!(answer.status(), StatusCode::OK, "{path}");
        assert_eq!(text(answer).await, expected);
    }
    let metrics = site.get("/metrics").await;
    assert_eq!(header(metrics.headers(), "content-type"), "text/plain; version=0.0.4; charset=utf-8");
    site.ready.send_replace(false);
    let answer = site.get("/readyz").await;
    assert_eq!((answer.status(), text(answer).await.as_str()), (StatusCode::SERVICE_UNAVAILABLE, "not ready\n"));
    for (method, path) in
        [("GET", "/healthz"), ("GET", "/readyz"), ("GET", "/metrics"), ("GET", "/console")].into_iter().chain(GUARDED)
    {
        for wrong in ["GET", "POST", "PUT", "DELETE", "OPTIONS"] {
            if wrong != method {
                let answer = site.ask(wrong, path, &[("host", "localhost")]).await;
                assert_eq!(answer.status(), StatusCode::METHOD_NOT_ALLOWED, "{wrong} {path}");
            }
        }
    }
    for path in ["/", "/nothing", "/console/", "/console/nothing", "/console/sessions", "/debug", "/metrics/"] {
        assert_eq!(site.get(path).await.status(), StatusCode::NOT_FOUND, "{path}");
    }
}

#[tokio::test(start_paused = true)]
async fn metrics_that_cannot_be_printed_say_why() {
    let site = Site::of(Gates::OPEN, anonymous(), Arc::new(|| Err("the registry is gone".to_owned())));
    let answer = site.get("/metrics").await;
    assert_eq!(answer.status(), StatusCode::SERVICE_UNAVAILABLE);
    assert_eq!(text(answer).await, "the registry is gone\n");
}

#[tokio::test(start_paused = true)]
async fn the_page_is_for_anybody_and_may_run_its_own_script_alone() {
    let site = Site::of(Gates::OPEN, Authentication::default(), Arc::new(|| Ok(String::new())));
    let answer = site.ask("GET", "/console", &[("host", "broker.example")]).await;
    assert_eq!(answer.status(), StatusCode::OK);
    let headers = answer.headers().clone();
    let page = text(answer).await;
    let policy = header(&headers, "content-security-policy");
    for element in ["script", "style"] {
        let content =
            page.split_once(&format!("<{element}>")).unwrap().1.split_once(&format!("</{element}>")).unwrap().0;
        let hash = STANDARD.encode(digest::digest(&digest::SHA256, content.as_bytes()));
        assert!(policy.contains(&format!("{element}-src 'sha256-{hash}'; ")), "{policy}");
    }
    for directive in ["default-src 'none'", "connect-src 'self'", "frame-ancestors 'none'", "form-action 'none'"] {
        assert!(policy.contains(directive), "{policy}");
    }
    assert!(!policy.contains("unsafe"), "{policy}");
    for (name, value) in [
        ("content-type", "text/html; charset=utf-8"),
        ("x-content-type-options", "nosniff"),
        ("x-frame-options", "DENY"),
        ("referrer-policy", "no-referrer"),
    ] {
        assert_eq!(header(&headers, name), value, "{name}");
    }
}

#[tokio::test(start_paused = true)]
async fn where_nobody_shows_anything_another_sites_page_can_neither_look_nor_do() {
    let site = Site::new();
    let session = leases::begin(&site.broker, TTL);
    let terminate = format!("/console/sessions/{}/terminate", session.id());
    let asked = [("GET", "/debug/sessions"), ("GET", "/console/events"), ("POST", terminate.as_str())];
    for (method, path) in asked {
        for headers in [
            // DNS rebinding: the page's own name leads here.
            &[("host", "evil.example:8081"), ("origin", "http://evil.example:8081"), ("sec-fetch-site", "same-origin")]
                [..],
            &[("host", "broker.svc.cluster.local:8081")],
            &[],
            &[("host", "localhost:8081"), ("sec-fetch-site", "cross-site")],
            &[("host", "localhost:8081"), ("sec-fetch-site", "same-site")],
            &[("host", "localhost:8081"), ("origin", "http://localhost:9999")],
            &[("host", "localhost:8081"), ("origin", "null")],
        ] {
            let answer = site.ask(method, path, headers).await;
            assert_eq!(answer.status(), StatusCode::FORBIDDEN, "{method} {path} {headers:?}");
            let told: Value = serde_json::from_str(&text(answer).await).unwrap();
            assert!(told["error"].is_string(), "{told}");
        }
    }
    assert!(session.state().is_ok());
    let own = [("host", "localhost:8081"), ("origin", "http://localhost:8081"), ("sec-fetch-site", "same-origin")];
    for (method, path) in asked {
        assert_eq!(site.ask(method, path, &own).await.status(), StatusCode::OK, "{method} {path}");
    }
    assert!(session.state().is_err());
}

#[tokio::test(start_paused = true)]
async fn a_token_is_believed_at_any_name() {
    let tokens = [("operations".to_owned(), vec![TokenDigest::of(TOKEN)])].into();
    let authentication = Authentication { tokens, ..Authentication::default() };
    let site = Site::of(Gates::OPEN, authentication, Arc::new(|| Ok(String::new())));
    let bearer = format!("Bearer {TOKEN}");
    let headers = [("host", "broker.example"), ("authorization", bearer.as_str())];
    assert_eq!(site.ask("GET", "/debug/sessions", &headers).await.status(), StatusCode::OK);
    let twice = [headers[0], headers[1], headers[1]];
    assert_eq!(site.ask("GET", "/debug/sessions", &twice).await.status(), StatusCode::UNAUTHORIZED);
}

#[tokio::test(start_paused = true)]
async fn who_cannot_be_told_now_is_to_come_again() {
    let keys = KeySource::File("/nonexistent/keys.json".into());
    let jwt = Some(JwtOptions::new("https://issuer.example".into(), "session-broker".into(), keys));
    let authentication = Authentication { jwt, ..Authentication::default() };
    let site = Site::of(Gates::OPEN, authentication, Arc::new(|| Ok(String::new())));
    let bearer = format!("Bearer {}.e30.e30", URL_SAFE_NO_PAD.encode(r#"{"alg":"ES256","kid":"k"}"#));
    for (method, path) in GUARDED {
        let answer = site.ask(method, path, &[("host", "localhost"), ("authorization", bearer.as_str())]).await;
        assert_eq!(answer.status(), StatusCode::SERVICE_UNAVAILABLE, "{path}");
        assert_ne!(header(answer.headers(), "retry-after"), "");
    }
}

#[tokio::test(start_paused = true)]
async fn a_stream_says_once_a_second_what_is_there() {
    let site = Site::new();
    let mut events = site.events().await;
    let headers = events.headers();
    assert_eq!((header(headers, "content-type"), header(headers, "cache-control")), ("text/event-stream", "no-store"));
    let first = snapshot(&mut events).await;
    assert_eq!((&first["totals"]["live"], &first["broker"]["owner"]), (&json!(0), &json!("test")));
    let session = leases::begin(&site.broker, TTL);
    let second = snapshot(&mut events).await;
    let [shown] = &second["sessions"].as_array().unwrap()[..] else { panic!("not one session: {second}") };
    assert_eq!((&shown["id"], &shown["state"]), (&json!(session.id().to_string()), &json!("idle")));
    let third = snapshot(&mut events).await;
    assert!(is_a_second(age(&third) - age(&second)));
    session.close().await.unwrap();
    let fourth = snapshot(&mut events).await;
    assert_eq!(fourth["sessions"], json!([]));
    assert_eq!((&fourth["endings"][0]["reason"], &fourth["endings"][0]["id"]), (&json!("CLOSED"), &shown["id"]));
    assert_eq!(fourth["engines"][0]["reachable"], json!(true));
}

#[tokio::test(start_paused = true)]
async fn who_takes_nothing_is_kept_nothing_and_goes_on_with_what_is_there() {
    let site = Site::new();
    leases::begin(&site.broker, TTL);
    let (mut slow, mut quick) = (site.events().await, site.events().await);
    let before = age(&snapshot(&mut slow).await);
    for _ in 0..100 {
        snapshot(&mut quick).await;
    }
    // The hundred between are nowhere; the next is the latest, and then the next.
    let after = age(&snapshot(&mut slow).await);
    assert!((98_000..=100_000).contains(&(after - before)), "{before} {after}");
    assert!(is_a_second(age(&snapshot(&mut slow).await) - after));
}

#[tokio::test(start_paused = true)]
async fn a_grant_that_is_taken_back_ends_the_stream() {
    let site = Site::new();
    let mut events = site.events().await;
    snapshot(&mut events).await;
    site.broker.set_profiles(granting(false));
    ends(&mut events, "FORBIDDEN").await;
    assert_eq!(site.get("/console/events").await.status(), StatusCode::UNAUTHORIZED);
}

#[tokio::test(start_paused = true)]
async fn a_stream_ends_when_the_broker_stops() {
    let site = Site::new();
    let mut events = site.events().await;
    snapshot(&mut events).await;
    site.stop.cancel();
    ends(&mut events, "STOPPED").await;
}

#[tokio::test(start_paused = true)]
async fn after_a_quarter_of_an_hour_its_reader_proves_anew_who_it_is() {
    let site = Site::new();
    let mut events = site.events().await;
    let began = Instant::now();
    let end = loop {
        let (name, data) = event(&mut events).await.unwrap();
        if name != "snapshot" {
            break (name, data);
        }
    };
    assert_eq!(end, ("end".to_owned(), json!({ "reason": "REAUTHENTICATE" })));
    assert_eq!(began.elapsed().as_secs(), 15 * 60);
    assert_eq!(event(&mut events).await, None);
}

#[tokio::test(start_paused = true)]
async fn no_more_than_sixteen_watch_at_a_time() {
    let site = Site::new();
    let mut watching = Vec::new();
    for _ in 0..16 {
        watching.push(site.events().await);
    }
    let refused = site.get("/console/events").await;
    assert_eq!(refused.status(), StatusCode::SERVICE_UNAVAILABLE);
    assert_ne!(header(refused.headers(), "retry-after"), "");
    watching.pop();
    snapshot(&mut site.events().await).await;
}

#[tokio::test(start_paused = true)]
async fn however_many_watch_postgresql_is_asked_once_in_two_seconds_while_something_runs() {
    let gates = Gates { execute: Gate::Never, ..Gates::OPEN };
    let site = Site::of(gates, anonymous(), Arc::new(|| Ok(String::new())));
    let mut watching = Vec::new();
    for _ in 0..10 {
        watching.push(site.events().await);
    }
    let session = leases::begin(&site.broker, TTL);
    sleep(10 * SECOND).await;
    assert_eq!(site.engine.counts().asked, 0);
    let running = tokio::spawn({
        let session = session.clone();
        async move { session.execute(leases::call(false)).await }
    });
    sleep(10 * SECOND).await;
    let seen = snapshot(&mut watching[0]).await;
    assert_eq!((&seen["sessions"][0]["state"], &seen["totals"]["running"]), (&json!("running"), &json!(1)));
    let asked = site.engine.counts().asked;
    assert!((3..=6).contains(&asked), "{asked}");
    // When nobody watches, nobody asks.
    drop(watching);
    sleep(10 * SECOND).await;
    assert_eq!(site.engine.counts().asked, asked);
    session.cancel().await.unwrap();
    running.await.unwrap().unwrap_err();
}

#[tokio::test(start_paused = true)]
async fn two_hundred_sessions_are_shown_of_all_that_are_counted() {
    let site = Site::new();
    let mut sessions = Vec::new();
    for _ in 0..250 {
        sessions.push(leases::begin(&site.broker, TTL));
    }
    sleep(SECOND).await;
    // The last ones are in a transaction, and go first.
    for session in &sessions[240..] {
        session.execute(leases::call(false)).await.unwrap();
    }
    let seen = site.sessions().await;
    assert_eq!((&seen["totals"]["live"], &seen["totals"]["shown"]), (&json!(250), &json!(200)));
    let shown = seen["sessions"].as_array().unwrap();
    let first: Vec<_> = shown[..10].iter().map(|session| session["state"].as_str().unwrap()).collect();
    assert_eq!((shown.len(), first), (200, vec!["open"; 10]));
    assert!(shown[10..].iter().all(|session| session["state"] == "idle"));
}

// ---- The program ----

/// The program, with its operations port.
struct Served {
    program: Program,
    url: String,
    agent: Agent,
}

impl Served {
    fn start(database: &Database) -> Self {
        let mut program = Program::serve(&database.url(), &sections());
        let url = format!("http://{}", program.operations_address());
        let agent = Agent::config_builder()
            .http_status_as_error(false)
            .proxy(None)
            .timeout_global(Some(Duration::from_secs(30)))
            .build()
            .into();
        Self { program, url, agent }
    }

    fn answer(&self, method: &str, path: &str, token: Option<&str>, body: &str) -> http::Response<ureq::Body> {
        let mut request = Request::builder().method(method).uri(format!("{}{path}", self.url));
        if let Some(token) = token {
            request = request.header("authorization", format!("Bearer {token}"));
        }
        let answer = if method == "POST" {
            self.agent.run(request.body(body.to_owned()).unwrap())
        } else {
            self.agent.run(request.body(()).unwrap())
        };
        answer.unwrap()
    }

    /// Its status, and the JSON that it holds.
    fn ask(&self, method: &str, path: &str, token: Option<&str>, body: &str) -> (u16, Value) {
        let mut answer = self.answer(method, path, token, body);
        let text = answer.body_mut().read_to_string().unwrap();
        (answer.status().as_u16(), serde_json::from_str(&text).unwrap_or(Value::String(text)))
    }

    fn sessions(&self) -> Value {
        let (status, sessions) = self.ask("GET", "/debug/sessions", Some(TOKEN), "");
        assert_eq!(status, 200, "{sessions}");
        sessions
    }

    fn terminate(&self, id: &str, body: &str) -> (u16, Value) {
        self.ask("POST", &format!("/console/sessions/{id}/terminate"), Some(TOKEN), body)
    }

    fn events(&self) -> Events {
        let answer = self.answer("GET", "/console/events", Some(TOKEN), "");
        assert_eq!(answer.status(), 200);
        Events(BufReader::new(answer.into_body().into_reader()).lines())
    }

    /// Waits for the audit log's line with these words, of which there is one.
    fn is_logged_once(&self, words: &[&str]) {
        let mut line = vec!["\"target\":\"audit\""];
        line.extend(words);
        wait_until(|| self.program.logged(&line) > 0);
        assert_eq!(self.program.logged(&line), 1, "{line:?}");
    }
}

/// Everybody may call, and has the time to; those that have a token may prove who they are, and one is an operator.
fn sections() -> String {
    let [operations, billing] = [TOKEN, BILLING].map(|token| TokenDigest::of(token).to_string());
    format!(
        "[operations]\nlisten = \"127.0.0.1:0\"\n[authentication]\nanonymous = true\n[authentication.tokens]\n\
         operations = {operations:?}\nbilling = {billing:?}\n[principals.anonymous]\n[principals.billing]\n\
         [principals.operations]\nadmin = true\n[profiles.default]\nlease_ttl = \"5m\"\n\
         statement_timeout = \"2m\"\ntransaction_timeout = \"5m\"\nidle_in_transaction_timeout = \"5m\"\n"
    )
}

/// A stream of events, as it is read.
struct Events(Lines<BufReader<BodyReader<'static>>>);

impl Iterator for Events {
    type Item = (String, Value);

    fn next(&mut self) -> Option<Self::Item> {
        let mut line = || self.0.next().map(Result::unwrap);
        let name = line()?.strip_prefix("event: ").unwrap().to_owned();
        let data = serde_json::from_str(line().unwrap().strip_prefix("data: ").unwrap()).unwrap();
        assert_eq!(line().unwrap(), "");
        Some((name, data))
    }
}

fn rpc(call: &str) -> String {
    format!("\"rpc\":\"{call}\"")
}

#[tokio::test(flavor = "multi_thread")]
async fn who_is_no_operator_is_refused_and_the_audit_log_has_it_without_a_flood() {
    let database = Database::create();
    let served = Served::start(&database);
    for (method, path) in GUARDED {
        let nobody = served.answer(method, path, None, "{}");
        assert_eq!((nobody.status().as_u16(), header(nobody.headers(), "www-authenticate")), (401, "Bearer"), "{path}");
        assert_eq!(header(nobody.headers(), "cache-control"), "no-store");
        let (status, told) = served.ask(method, path, Some("sbt_nobody's"), "{}");
        assert_eq!((status, told["error"].is_string()), (401, true), "{path} {told}");
        let (status, told) = served.ask(method, path, Some(BILLING), "{}");
        assert_eq!((status, told["error"].is_string()), (403, true), "{path} {told}");
    }
    for _ in 0..20 {
        assert_eq!(served.ask("GET", "/debug/sessions", None, "").0, 401);
    }
    served.sessions();
    served.is_logged_once(&[&rpc("DebugSessions"), "\"allowed\":true", "\"principal\":\"operations\""]);
    // Those of strangers are counted in one line; who is somebody has one for each.
    assert_eq!(served.program.logged(&["\"allowed\":false", "\"times\":"]), 1);
    for call in ["DebugSessions", "WatchSessions", "TerminateSession"] {
        served.is_logged_once(&[&rpc(call), "\"allowed\":false", "\"principal\":\"billing\""]);
    }
    for secret in [TOKEN, BILLING, "sbt_nobody's"] {
        assert_eq!(served.program.logged(&[secret]), 0);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_told_has_no_token_no_label_and_no_sql() {
    const SECRET: &str = "a-value-that-nobody-is-to-see";

    let database = Database::create();
    let served = Served::start(&database);
    let labels = [("customer".to_owned(), "Ada Lovelace".to_owned())].into();
    let request = pb::BeginSessionRequest { labels, ..Default::default() };
    let session = Session::begin(served.program.client(), request).await.unwrap();
    let running = tokio::spawn({
        let (session, sql) = (session.clone(), format!("SELECT pg_sleep(60), '{SECRET}'"));
        async move { session.execute(&sql).await }
    });
    wait_until(|| served.sessions()["totals"]["running"] == 1);
    let mut events = served.events();
    let told = [served.sessions(), events.next().unwrap().1];
    for told in &told {
        let [shown] = &told["sessions"].as_array().unwrap()[..] else { panic!("not one session: {told}") };
        assert_eq!((&shown["id"], &shown["state"]), (&json!(session.id), &json!("running")));
        assert_eq!(
            (&shown["principal"], &shown["engine"], &shown["profile"]),
            (&json!("anonymous"), &json!("main"), &json!("default"))
        );
        assert!(shown["backend_pid"].as_i64().unwrap() > 0);
        for age in
            ["age_ms", "transaction_age_ms", "statement_age_ms", "lease_remaining_ms", "transaction_remaining_ms"]
        {
            assert!(shown[age].is_u64(), "{age}: {shown}");
        }
        let text = told.to_string();
        let own = session.token.rsplit('.').next().unwrap();
        for secret in [own, TOKEN, "customer", "Lovelace", "pg_sleep", "SELECT", SECRET] {
            assert!(!text.contains(secret), "{secret} is in {text}");
        }
    }
    session.cancel().await.unwrap();
    running.await.unwrap().unwrap_err();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_leaves_one_line_in_the_audit_log_and_shows_who_waits_for_whom() {
    let database = Database::create();
    let served = Served::start(&database);
    let (holder, waiter) = (served.program.session().await, served.program.session().await);
    served.program.session().await;
    holder.execute(UPDATE).await.unwrap();
    let waiting = tokio::spawn({
        let waiter = waiter.clone();
        async move { waiter.execute_and_commit(UPDATE).await }
    });
    let mut events = served.events();
    let seen = events.by_ref().map(|(_, seen)| seen).find(|seen| seen["totals"]["blocked"] == 1).unwrap();
    // Both go before the one that is idle.
    let shown = seen["sessions"].as_array().unwrap();
    let of = |id: &str| shown[..2].iter().find(|shown| shown["id"] == id).unwrap();
    let (holding, blocked) = (of(&holder.id), of(&waiter.id));
    assert_eq!((&holding["state"], &blocked["state"]), (&json!("open"), &json!("blocked")));
    let by = json!([{
        "pid": holding["backend_pid"], "user": "broker", "state": "idle in transaction", "session": holder.id,
    }]);
    assert_eq!((&blocked["blocked_by"], &seen["blockers_complete"]), (&by, &json!(true)));
    holder.rollback().await.unwrap();
    waiting.await.unwrap().unwrap();
    events.by_ref().find(|(_, seen)| seen["totals"]["blocked"] == 0).unwrap();
    served.is_logged_once(&[&rpc("WatchSessions"), "\"allowed\":true", "\"principal\":\"operations\""]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_session_is_terminated_with_a_reason_and_says_so() {
    let database = Database::create();
    let served = Served::start(&database);
    let session = served.program.session().await;
    session.execute(UPDATE).await.unwrap();
    let long = json!({ "reason": "x".repeat(257) }).to_string();
    let large = json!({ "reason": "x".repeat(5000) }).to_string();
    for body in ["", "{}", "reason", r#"{"reason":""}"#, r#"{"reason":7}"#, r#"{"reason":"two\nlines"}"#, &long, &large]
    {
        let (status, told) = served.terminate(&session.id, body);
        assert_eq!((status, told["error"].is_string()), (400, true), "{body}: {told}");
    }
    let reason = r#"{"reason":"it holds the lock"}"#;
    let (status, told) = served.terminate(&session.token, reason);
    assert!(status == 400 && !told.to_string().contains(&session.token), "{told}");
    assert_eq!(served.terminate(&"0".repeat(32), reason).0, 404);
    session.execute(UPDATE).await.unwrap();

    let (status, told) = served.terminate(&session.id, reason);
    let expected = json!({ "id": session.id, "terminated": true, "is_over": true, "end_reason": "TERMINATED" });
    assert_eq!((status, told), (200, expected));
    assert_eq!((database.balances().as_str(), database.open_transactions().as_str()), ("100 100", "0"));
    assert_eq!(session.execute(UPDATE).await.unwrap_err().end_reason(), "END_REASON_TERMINATED");
    let (status, told) = served.terminate(&session.id, reason);
    assert_eq!((status, &told["terminated"], &told["end_reason"]), (200, &json!(false), &json!("TERMINATED")));
    let ending = &served.sessions()["endings"][0];
    assert_eq!((&ending["id"], &ending["reason"]), (&json!(session.id), &json!("TERMINATED")));
    let id = format!("\"session.id\":\"{}\"", session.id);
    let words =
        ["\"event\":\"session.terminated\"", &id, "\"operator\":\"operations\"", "\"reason\":\"it holds the lock\""];
    served.is_logged_once(&words);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_goes_on_through_a_drain_and_ends_with_it() {
    let database = Database::create();
    let served = Served::start(&database);
    let session = served.program.session().await;
    session.execute(UPDATE).await.unwrap();
    let mut events = served.events();
    assert_eq!(events.next().unwrap().1["broker"]["draining"], false);
    served.program.signal("TERM");
    events.by_ref().find(|(_, seen)| seen["broker"]["draining"] == true).unwrap();
    session.commit().await.unwrap();
    let (name, why) = events.by_ref().last().unwrap();
    assert_eq!((name.as_str(), why), ("end", json!({ "reason": "STOPPED" })));
    assert_eq!(served.program.wait().code(), Some(0));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_browser_shows_who_waits_and_ends_a_session() {
    let database = Database::create();
    let served = Served::start(&database);
    let (holder, waiter) = (served.program.session().await, served.program.session().await);
    holder.execute(UPDATE).await.unwrap();
    let waiting = tokio::spawn({
        let waiter = waiter.clone();
        async move { waiter.execute_and_commit("UPDATE accounts SET balance = 8 WHERE id = 1").await }
    });
    let address = served.url.strip_prefix("http://").unwrap();
    let screenshot = Path::new(env!("CARGO_TARGET_TMPDIR")).join("console.png");
    run(Command::new("python3")
        .arg("tests/browser/console.py")
        .args([address, TOKEN, &holder.id, &waiter.id])
        .arg(&screenshot)
        .env("PYTHONDONTWRITEBYTECODE", "1"));
    assert!(std::fs::metadata(screenshot).unwrap().len() > 10_000);
    assert_eq!(holder.get().await.unwrap().end_reason(), pb::EndReason::Terminated);
    waiting.await.unwrap().unwrap();
    assert_eq!(database.balances(), "8 100");
    served.is_logged_once(&["\"event\":\"session.terminated\"", &holder.id, "\"reason\":\"the browser's test\""]);
}
