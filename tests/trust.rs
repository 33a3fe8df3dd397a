//! Who is believed, what each may do, and how much of the broker it may take: over the real server, on a real
//! PostgreSQL.
//!
//! What a token, a certificate or a claim must be in detail is the subject of `identity` and `acceptor`; here it
//! decides about calls.

use std::convert::Infallible;
use std::fs;
use std::future::poll_fn;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::task::{Context, Poll};

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use bytes::Bytes;
use futures_util::future::join_all;
use http_body::{Body as _, Frame};
use jsonwebtoken::get_current_timestamp;
use prost::Message;
use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams, DnType, IsCa, Issuer, KeyIdMethod, KeyPair,
    RevokedCertParams, SanType, SerialNumber, date_time_ymd,
};
use ring::rand::SystemRandom;
use ring::signature::{ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, KeyPair as _};
use session_broker::grpc::pb;
use session_broker::grpc::pb::admin_service_client::AdminServiceClient;
use session_broker::grpc::pb::notification_service_client::NotificationServiceClient;
use session_broker::grpc::pb::session_service_client::SessionServiceClient;
use session_broker::identity::TokenDigest;
use tempfile::TempDir;
use tokio::task::JoinSet;
use tokio::time::Instant;
use tonic::body::Body;
use tonic::metadata::{Ascii, MetadataValue};
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity};
use tonic::{Code, Request, Status};
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;
use tonic_health::pb::{HealthCheckRequest, HealthCheckResponse};
use tonic_types::StatusExt;
use tower_service::Service;

use crate::command_line::Program;
use crate::support::{Broker, Database, Failure, first_row, int, until};
use pb::copy_in_request::Part;
use pb::copy_out_request::Source;

const BEGIN_SESSION: &str = "/sessionbroker.v1.SessionService/BeginSession";
const KEEP_ALIVE: &str = "/sessionbroker.v1.SessionService/KeepAlive";
const REFLECTION: [&str; 2] = [
    "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
];

const UPDATE: &str = "UPDATE accounts SET balance = 7 WHERE id = 1";

/// How many statements of this database wait for a lock.
const PARKED: &str =
    "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'";

/// Static tokens, each its principal's.
const BILLING: &str = "sbt_the-token-of-billing";
const SHIPPING: &str = "sbt_the-token-of-shipping";

pub(crate) const ISSUER: &str = "https://issuer.example";
pub(crate) const AUDIENCE: &str = "session-broker";

/// A section by which billing and shipping have those tokens.
fn tokens() -> String {
    let (billing, shipping) = (TokenDigest::of(BILLING), TokenDigest::of(SHIPPING));
    format!("[authentication.tokens]\nbilling = \"{billing}\"\nshipping = \"{shipping}\"\n")
}

/// A broker of which billing may take so much, and shipping as much as there is.
async fn broker_for(database: &Database, billing: &str, sections: &str) -> (Broker, Caller, Caller) {
    let principals = format!("[principals.shipping]\n[principals.billing]\n{billing}\n");
    let broker = Broker::start_with(database, "", &format!("{}{principals}{sections}", tokens())).await;
    let [billing, shipping] = [BILLING, SHIPPING].map(|token| Caller::bearing(broker.channel(), token));
    (broker, billing, shipping)
}

/// Whoever calls, by a token that it shows or by its connection.
#[derive(Clone)]
pub(crate) struct Caller {
    channel: Channel,
    authorization: Option<MetadataValue<Ascii>>,
}

impl Caller {
    /// With a bearer token.
    pub(crate) fn bearing(channel: Channel, token: &str) -> Self {
        Self { channel, authorization: Some(format!("Bearer {token}").parse().unwrap()) }
    }

    /// With nothing but the connection.
    fn over(channel: Channel) -> Self {
        Self { channel, authorization: None }
    }

    pub(crate) fn request<T>(&self, message: T) -> Request<T> {
        let mut request = Request::new(message);
        if let Some(authorization) = &self.authorization {
            request.metadata_mut().insert("authorization", authorization.clone());
        }
        request
    }

    pub(crate) fn sessions(&self) -> SessionServiceClient<Channel> {
        SessionServiceClient::new(self.channel.clone())
    }

    pub(crate) async fn begin_with(
        &self,
        request: pb::BeginSessionRequest,
    ) -> Result<pb::BeginSessionResponse, Status> {
        Ok(self.sessions().begin_session(self.request(request)).await?.into_inner())
    }

    /// A session's token.
    pub(crate) async fn begin(&self) -> Result<String, Status> {
        Ok(self.begin_with(pb::BeginSessionRequest::default()).await?.session_token)
    }

    pub(crate) async fn run(&self, request: pb::ExecuteRequest) -> Result<pb::ExecuteResponse, Status> {
        Ok(self.sessions().execute(self.request(request)).await?.into_inner())
    }

    pub(crate) async fn execute(&self, session_token: &str, sql: &str) -> Result<pb::ExecuteResponse, Status> {
        self.run(statement(session_token, sql)).await
    }

    async fn execute_and_commit(&self, session_token: &str, sql: &str) -> Result<pb::ExecuteResponse, Status> {
        self.run(pb::ExecuteRequest { commit: true, ..statement(session_token, sql) }).await
    }

    pub(crate) async fn commit(&self, session_token: &str) -> Result<pb::CommitResponse, Status> {
        let request = pb::CommitRequest { session_token: session_token.into() };
        Ok(self.sessions().commit(self.request(request)).await?.into_inner())
    }

    async fn keep_alive(&self, session_token: &str) -> Result<pb::KeepAliveResponse, Status> {
        let request = pb::KeepAliveRequest { session_token: session_token.into() };
        Ok(self.sessions().keep_alive(self.request(request)).await?.into_inner())
    }

    async fn close(&self, session_token: &str) -> Result<pb::CloseResponse, Status> {
        let request = pb::CloseRequest { session_token: session_token.into() };
        Ok(self.sessions().close(self.request(request)).await?.into_inner())
    }

    async fn resolve(&self, commit_token: &str) -> Result<pb::ResolveCommitResponse, Status> {
        let request = pb::ResolveCommitRequest { commit_token: commit_token.into(), wait: None };
        Ok(self.sessions().resolve_commit(self.request(request)).await?.into_inner())
    }

    async fn list_sessions(&self) -> Result<pb::ListSessionsResponse, Status> {
        let request = self.request(pb::ListSessionsRequest::default());
        Ok(AdminServiceClient::new(self.channel.clone()).list_sessions(request).await?.into_inner())
    }
}

fn statement(session_token: &str, sql: &str) -> pb::ExecuteRequest {
    pb::ExecuteRequest { session_token: session_token.into(), sql: sql.into(), ..Default::default() }
}

/// Every RPC of the protocol, by its path.
pub(crate) fn rpcs() -> Vec<String> {
    let protocol = Path::new(env!("CARGO_MANIFEST_DIR")).join("proto/sessionbroker/v1");
    let mut paths = Vec::new();
    for file in fs::read_dir(protocol).unwrap() {
        let text = fs::read_to_string(file.unwrap().path()).unwrap();
        let mut service = "";
        for line in text.lines() {
            let mut words = line.split([' ', '(']).filter(|word| !word.is_empty());
            match (words.next(), words.next()) {
                (Some("service"), Some(name)) => service = name,
                (Some("rpc"), Some(name)) => paths.push(format!("/sessionbroker.v1.{service}/{name}")),
                _ => {}
            }
        }
    }
    paths.sort();
    assert!(paths.len() >= 18, "{paths:?}");
    paths
}

/// A gRPC message of these bytes.
pub(crate) fn message(bytes: &[u8]) -> Vec<u8> {
    let length = u32::try_from(bytes.len()).unwrap();
    [[0_u8].as_slice(), &length.to_be_bytes(), bytes].concat()
}

/// A request's whole body.
struct Whole(Option<Bytes>);

impl http_body::Body for Whole {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        Poll::Ready(self.0.take().map(|bytes| Ok(Frame::data(bytes))))
    }

    fn is_end_stream(&self) -> bool {
        self.0.is_none()
    }
}

/// Sends a call of any bytes and says what came of it: OK as soon as there is a message.
pub(crate) async fn call(channel: &Channel, path: &str, headers: &[(&str, &str)], body: Vec<u8>) -> Status {
    let mut request = http::Request::post(path)
        .version(http::Version::HTTP_2)
        .header("te", "trailers")
        .header("content-type", "application/grpc");
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    let request = request.body(Body::new(Whole(Some(body.into())))).unwrap();
    let mut channel = channel.clone();
    poll_fn(|context| channel.poll_ready(context)).await.unwrap();
    let response = channel.call(request).await.unwrap();
    if let Some(status) = Status::from_header_map(response.headers()) {
        return status;
    }
    let mut body = response.into_body();
    let frame = poll_fn(|context| Pin::new(&mut body).poll_frame(context)).await.unwrap().unwrap();
    match frame.trailers_ref() {
        Some(trailers) => Status::from_header_map(trailers).unwrap(),
        None => Status::ok("there is a message"),
    }
}

/// Whether a connection carries calls. Anybody may ask that.
async fn carries_calls(channel: Channel) -> bool {
    HealthClient::new(channel).check(HealthCheckRequest::default()).await.is_ok()
}

fn is(status: Status, code: Code, reason: &str) -> Failure {
    let failure = Failure::from(status);
    assert_eq!((failure.code, failure.reason.as_str()), (code, reason), "{failure:?}");
    failure
}

/// The caller is nobody, and hears what to do about it.
fn unauthenticated(status: Status) {
    let failure = is(status, Code::Unauthenticated, "UNAUTHENTICATED");
    let remedy = failure.message.split_once(": ").map(|(_, remedy)| remedy);
    assert!(remedy.is_some_and(|remedy| !remedy.is_empty()), "{failure:?}");
}

fn forbidden(status: Status) {
    is(status, Code::PermissionDenied, "FORBIDDEN");
}

/// The limit of that name was met, and the call may be tried again later.
fn is_exhausted(status: Status, reason: &str, limit: &str) {
    let violations = status.get_details_quota_failure().unwrap().violations;
    assert_eq!(violations[0].subject, limit);
    assert!(is(status, Code::ResourceExhausted, reason).retry_info);
}

fn is_over_quota(status: Status, quota: &str) {
    is_exhausted(status, "QUOTA_EXHAUSTED", &format!("principals.{quota}"));
}

/// All that a caller is told, in bytes.
fn told(status: &Status) -> (Code, String, Vec<u8>) {
    (status.code(), status.message().to_owned(), status.details().to_vec())
}

#[test]
fn every_test_that_the_threat_model_names_is_there() {
    /// All that is at or under `path`, one after the other.
    fn sources(path: &Path) -> String {
        if path.is_dir() {
            return fs::read_dir(path).unwrap().map(|entry| sources(&entry.unwrap().path())).collect();
        }
        if path.extension().is_some_and(|extension| extension == "rs") {
            return fs::read_to_string(path).unwrap();
        }
        String::new()
    }

    let top = Path::new(env!("CARGO_MANIFEST_DIR"));
    let sources = sources(&top.join("src")) + &sources(&top.join("tests"));
    let model = fs::read_to_string(top.join("SECURITY.md")).unwrap();
    let rows = model.lines().filter(|line| line.starts_with("| "));
    let named: Vec<_> = rows.flat_map(|row| row.rsplit("| ").next().unwrap().split('`').skip(1).step_by(2)).collect();
    assert!(named.len() > 50, "{named:?}");
    for name in named {
        assert!(sources.contains(&format!("fn {name}(")), "{name} is no test");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn without_credentials_no_call_runs_but_health_checks() {
    let database = Database::create();
    let (broker, billing, _) = broker_for(&database, "", "").await;
    let session = billing.begin().await.unwrap();
    let channel = broker.channel();
    // The token of a session is no credential.
    let update = pb::ExecuteRequest { commit: true, ..statement(&session, UPDATE) };
    for path in rpcs().iter().map(String::as_str).chain(REFLECTION).chain(["/nowhere.Service/Call"]) {
        unauthenticated(call(&channel, path, &[], message(&[])).await);
        unauthenticated(call(&channel, path, &[], message(&update.encode_to_vec())).await);
    }
    assert_eq!(database.balances(), "100 100");
    let state = billing.keep_alive(&session).await.unwrap().state.unwrap();
    assert_eq!(state.transaction_state(), pb::TransactionState::None);
}

#[tokio::test(flavor = "multi_thread")]
async fn probes_need_no_credentials_and_reflection_does() {
    let database = Database::create();
    let (broker, ..) = broker_for(&database, "", "").await;
    let channel = broker.channel();
    let mut health = HealthClient::new(channel.clone());
    let status = |answer: HealthCheckResponse| answer.status();
    let checked = health.check(HealthCheckRequest::default()).await.unwrap().into_inner();
    assert_eq!(status(checked), ServingStatus::Serving);
    let mut watched = health.watch(HealthCheckRequest::default()).await.unwrap().into_inner();
    assert_eq!(status(watched.message().await.unwrap().unwrap()), ServingStatus::Serving);
    // Which services there are.
    let list = message(b"\x3a\x00");
    for path in REFLECTION {
        unauthenticated(call(&channel, path, &[], list.clone()).await);
        let bearer = format!("Bearer {BILLING}");
        assert_eq!(call(&channel, path, &[("authorization", &bearer)], list.clone()).await.code(), Code::Ok);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_static_token_lets_its_principal_in_and_nothing_else_does() {
    let database = Database::create();
    let (broker, billing, shipping) = broker_for(&database, "", "").await;
    let (channel, right) = (broker.channel(), format!("Bearer {BILLING}"));
    for caller in [&billing, &shipping] {
        let session = caller.begin().await.unwrap();
        caller.execute_and_commit(&session, "SELECT 1").await.unwrap();
    }
    let basic = format!("Basic {}", URL_SAFE_NO_PAD.encode(format!("billing:{BILLING}")));
    let digest = format!("Bearer {}", TokenDigest::of(BILLING));
    for wrong in ["", "Bearer", "Bearer ", BILLING, "Bearer sbt_another", "Bearer a.b.c", &basic, &digest] {
        unauthenticated(call(&channel, BEGIN_SESSION, &[("authorization", wrong)], message(&[])).await);
    }
    for second in [right.as_str(), "Bearer sbt_another"] {
        let both = [("authorization", right.as_str()), ("authorization", second)];
        unauthenticated(call(&channel, BEGIN_SESSION, &both, message(&[])).await);
    }
    assert_eq!(call(&channel, BEGIN_SESSION, &[("authorization", &right)], message(&[])).await.code(), Code::Ok);
}

#[tokio::test(flavor = "multi_thread")]
async fn while_a_token_is_replaced_the_old_and_the_new_one_do_for_the_same_sessions() {
    let database = Database::create();
    let (old, new) = (TokenDigest::of("sbt_old"), TokenDigest::of("sbt_new"));
    let sections = format!("[authentication.tokens]\nbilling = [\"{old}\", \"{new}\"]\n[principals.billing]");
    let broker = Broker::start_with(&database, "", &sections).await;
    let session = Caller::bearing(broker.channel(), "sbt_old").begin().await.unwrap();
    Caller::bearing(broker.channel(), "sbt_new").execute_and_commit(&session, UPDATE).await.unwrap();
    assert_eq!(database.balances(), "7 100");
}

/// Each call that a session's token opens, and its message.
fn calls_on(session_token: &str) -> Vec<(String, Vec<u8>)> {
    const OTHERS: [&str; 2] = [BEGIN_SESSION, "/sessionbroker.v1.SessionService/ResolveCommit"];
    // Field 1 of them all is the token.
    let token = pb::KeepAliveRequest { session_token: session_token.into() }.encode_to_vec();
    let is_on_session = |path: &String| path.contains(".SessionService/") && !OTHERS.contains(&path.as_str());
    let mut calls: Vec<_> = rpcs().into_iter().filter(is_on_session).map(|path| (path, token.clone())).collect();
    assert!(calls.len() >= 12, "{calls:?}");
    let context = Some(pb::CopyContext { session_token: session_token.into(), ..Default::default() });
    let copy_out = pb::CopyOutRequest {
        context: context.clone(),
        source: Some(Source::Table("accounts".into())),
        ..Default::default()
    };
    let target = pb::CopyInTarget { context, table: "accounts".into(), ..Default::default() };
    let copy_in = pb::CopyInRequest { part: Some(Part::Target(target)) };
    calls.push(("/sessionbroker.v1.BulkService/CopyOut".into(), copy_out.encode_to_vec()));
    calls.push(("/sessionbroker.v1.BulkService/CopyIn".into(), copy_in.encode_to_vec()));
    calls
}

#[tokio::test(flavor = "multi_thread")]
async fn anothers_session_is_answered_as_one_that_never_was_and_goes_on_unharmed() {
    let database = Database::create();
    let (broker, billing, _) = broker_for(&database, "", "").await;
    let session = billing.begin().await.unwrap();
    billing.execute(&session, UPDATE).await.unwrap();
    let owner = session.rsplitn(3, '.').nth(2).unwrap();
    let unknown = format!("{owner}.{}.{}", "0".repeat(32), "0".repeat(32));
    let (channel, shipping) = (broker.channel(), format!("Bearer {SHIPPING}"));
    let credentials = [("authorization", shipping.as_str())];
    for ((path, anothers), (_, unknown)) in calls_on(&session).into_iter().zip(calls_on(&unknown)) {
        let anothers = call(&channel, &path, &credentials, message(&anothers)).await;
        let unknown = call(&channel, &path, &credentials, message(&unknown)).await;
        assert_eq!(told(&anothers), told(&unknown), "{path}");
        is(anothers, Code::NotFound, "SESSION_UNKNOWN");
    }
    assert_eq!(billing.commit(&session).await.unwrap().outcome(), pb::Outcome::Committed);
    assert_eq!(database.balances(), "7 100");
}

#[tokio::test(flavor = "multi_thread")]
async fn anothers_commit_is_answered_as_one_that_never_was() {
    let database = Database::create();
    let (_broker, billing, shipping) = broker_for(&database, "", "").await;
    let session = billing.begin().await.unwrap();
    let committed = billing.execute_and_commit(&session, UPDATE).await.unwrap().commit.unwrap();
    let own = billing.resolve(&committed.commit_token).await.unwrap();
    assert_eq!(own.outcome(), pb::Outcome::Committed);
    let first = if committed.commit_token.starts_with('A') { "B" } else { "A" };
    let forged = format!("{first}{}", &committed.commit_token[1..]);
    let anothers = shipping.resolve(&committed.commit_token).await.unwrap_err();
    for unknown in [shipping.resolve(&forged).await, shipping.resolve("none").await, billing.resolve(&forged).await] {
        assert_eq!(told(&anothers), told(&unknown.unwrap_err()));
    }
    assert_eq!(Failure::from(anothers).field.as_deref(), Some("commit_token"));
}

/// A key of an issuer that the tests play.
pub(crate) struct SigningKey {
    pair: EcdsaKeyPair,
    id: &'static str,
}

impl SigningKey {
    pub(crate) fn draw(id: &'static str) -> Self {
        let (algorithm, random) = (&ECDSA_P256_SHA256_FIXED_SIGNING, SystemRandom::new());
        let document = EcdsaKeyPair::generate_pkcs8(algorithm, &random).unwrap();
        Self { pair: EcdsaKeyPair::from_pkcs8(algorithm, document.as_ref(), &random).unwrap(), id }
    }

    /// Puts it in the place of the keys that the issuer has published there.
    pub(crate) fn publish(&self, directory: &Path) -> PathBuf {
        // A byte that says that both coordinates follow, and these.
        let (x, y) = self.pair.public_key().as_ref()[1..].split_at(32);
        let (x, y) = (URL_SAFE_NO_PAD.encode(x), URL_SAFE_NO_PAD.encode(y));
        let id = self.id;
        let key = format!(r#"{{"kty":"EC","crv":"P-256","alg":"ES256","kid":"{id}","x":"{x}","y":"{y}"}}"#);
        let (file, next) = (directory.join("keys.json"), directory.join("next.json"));
        fs::write(&next, format!(r#"{{"keys":[{key}]}}"#)).unwrap();
        fs::rename(&next, &file).unwrap();
        file
    }

    pub(crate) fn sign(&self, claims: &str) -> String {
        let header = format!(r#"{{"typ":"JWT","alg":"ES256","kid":"{}"}}"#, self.id);
        let signed = unsigned(&header, claims);
        let signature = self.pair.sign(&SystemRandom::new(), signed.as_bytes()).unwrap();
        format!("{signed}.{}", URL_SAFE_NO_PAD.encode(signature))
    }

    /// A token of `principal`'s that is good for so many seconds.
    pub(crate) fn token(&self, principal: &str, lasts: i64) -> String {
        self.sign(&claims(ISSUER, AUDIENCE, principal, 0, lasts))
    }
}

fn unsigned(header: &str, claims: &str) -> String {
    format!("{}.{}", URL_SAFE_NO_PAD.encode(header), URL_SAFE_NO_PAD.encode(claims))
}

/// What a token says that is good from so many seconds after now to so many after.
fn claims(issuer: &str, audience: &str, principal: &str, begins: i64, ends: i64) -> String {
    let at = |seconds: i64| get_current_timestamp().checked_add_signed(seconds).unwrap();
    let (begins, ends) = (at(begins), at(ends));
    format!(r#"{{"iss":"{issuer}","aud":"{audience}","sub":"{principal}","nbf":{begins},"exp":{ends}}}"#)
}

/// A section by which the tokens of an issuer with the keys in that file are believed.
pub(crate) fn believing(keys: &Path) -> String {
    format!("[authentication.jwt]\nissuer = {ISSUER:?}\naudience = {AUDIENCE:?}\njwks_file = \"{}\"\n", keys.display())
}

/// A broker that believes an issuer, of whose principals it knows two.
async fn broker_believing(database: &Database, keys: &Path) -> Broker {
    let sections = format!("{}[principals.billing]\n[principals.shipping]", believing(keys));
    Broker::start_with(database, "", &sections).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_of_the_issuer_lets_its_subject_in_and_no_other_does() {
    let database = Database::create();
    let directory = tempfile::tempdir().unwrap();
    let key = SigningKey::draw("a");
    let broker = broker_believing(&database, &key.publish(directory.path())).await;
    let caller = |token: &str| Caller::bearing(broker.channel(), token);
    let (billing, shipping) = (caller(&key.token("billing", 300)), caller(&key.token("shipping", 300)));
    let session = billing.begin().await.unwrap();
    billing.execute_and_commit(&session, UPDATE).await.unwrap();
    is(shipping.keep_alive(&session).await.unwrap_err(), Code::NotFound, "SESSION_UNKNOWN");
    let right = claims(ISSUER, AUDIENCE, "billing", 0, 300);
    let none = unsigned(r#"{"typ":"JWT","alg":"none","kid":"a"}"#, &right);
    for wrong in [
        key.token("billing", -60),
        key.sign(&claims(ISSUER, AUDIENCE, "billing", 300, 600)),
        key.sign(&claims(ISSUER, "another-broker", "billing", 0, 300)),
        key.sign(&claims("https://another.example", AUDIENCE, "billing", 0, 300)),
        key.token("anonymous", 300),
        format!("{none}."),
        // Another's key under the same name, and under one that the issuer has none of.
        SigningKey::draw("a").sign(&right),
        SigningKey::draw("b").sign(&right),
    ] {
        unauthenticated(caller(&wrong).keep_alive(&session).await.unwrap_err());
    }
    // It is believed, and may do nothing.
    forbidden(caller(&key.token("stranger", 300)).begin().await.unwrap_err());
    billing.keep_alive(&session).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_key_of_the_issuer_counts_without_a_restart_and_the_old_one_no_more() {
    let database = Database::create();
    let directory = tempfile::tempdir().unwrap();
    let (old, new) = (SigningKey::draw("old"), SigningKey::draw("new"));
    let broker = broker_believing(&database, &old.publish(directory.path())).await;
    let [with_old, with_new] = [&old, &new].map(|key| Caller::bearing(broker.channel(), &key.token("billing", 300)));
    let session = with_old.begin().await.unwrap();
    unauthenticated(with_new.keep_alive(&session).await.unwrap_err());
    new.publish(directory.path());
    until(async || with_new.keep_alive(&session).await.is_ok()).await;
    unauthenticated(with_old.keep_alive(&session).await.unwrap_err());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_that_expires_between_two_calls_of_a_session_is_refused_at_the_second() {
    /// By which clocks may differ.
    const LEEWAY: i64 = 30;

    let database = Database::create();
    let directory = tempfile::tempdir().unwrap();
    let key = SigningKey::draw("a");
    let broker = broker_believing(&database, &key.publish(directory.path())).await;
    let lasting = Caller::bearing(broker.channel(), &key.token("billing", 300));
    let session = lasting.begin().await.unwrap();
    let expiring = Caller::bearing(broker.channel(), &key.token("billing", 5 - LEEWAY));
    expiring.execute(&session, UPDATE).await.unwrap();
    until(async || expiring.keep_alive(&session).await.is_err()).await;
    unauthenticated(expiring.commit(&session).await.unwrap_err());
    // The caller gets itself another token, and goes on.
    lasting.commit(&session).await.unwrap();
    assert_eq!(database.balances(), "7 100");
}

/// An authority, and files for a broker that it vouches for.
pub(crate) struct Site {
    authority: Authority,
    files: TempDir,
}

struct Authority {
    issuer: Issuer<'static, KeyPair>,
    pem: String,
}

/// A certificate and its key, PEM.
pub(crate) struct Credential {
    certificate: String,
    key: String,
}

impl Authority {
    fn new(name: &str) -> Self {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().unwrap();
        let pem = params.self_signed(&key).unwrap().pem();
        Self { issuer: Issuer::new(params, key), pem }
    }

    fn issue(&self, name: SanType, serial: u8) -> Credential {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.distinguished_name.push(DnType::CommonName, "the name does not count");
        params.subject_alt_names = vec![name];
        params.serial_number = Some(SerialNumber::from_slice(&[serial]));
        let key = KeyPair::generate().unwrap();
        let certificate = params.signed_by(&key, &self.issuer).unwrap().pem();
        Credential { certificate, key: key.serialize_pem() }
    }

    /// For a client.
    fn issue_to(&self, uri: &str, serial: u8) -> Credential {
        self.issue(SanType::URI(uri.try_into().unwrap()), serial)
    }

    /// The list of those revoked.
    fn revoke(&self, serial: u8) -> String {
        let revoked = RevokedCertParams {
            serial_number: SerialNumber::from_slice(&[serial]),
            revocation_time: date_time_ymd(2020, 1, 1),
            reason_code: None,
            invalidity_date: None,
        };
        let list = CertificateRevocationListParams {
            this_update: date_time_ymd(2020, 1, 1),
            next_update: date_time_ymd(2049, 1, 1),
            crl_number: SerialNumber::from_slice(&[1]),
            issuing_distribution_point: None,
            revoked_certs: vec![revoked],
            key_identifier_method: KeyIdMethod::Sha256,
        };
        list.signed_by(&self.issuer).unwrap().pem().unwrap()
    }
}

impl Site {
    pub(crate) fn new() -> Self {
        let site = Self { authority: Authority::new("the authority"), files: tempfile::tempdir().unwrap() };
        let server = site.authority.issue(SanType::DnsName("localhost".try_into().unwrap()), 1);
        site.put("tls.crt", &server.certificate);
        site.put("tls.key", &server.key);
        site.put("ca.crt", &site.authority.pem);
        // Nobody has that one.
        site.put("crl.pem", &site.authority.revoke(200));
        site
    }

    /// The authority's certificate.
    pub(crate) fn ca(&self) -> PathBuf {
        self.files.path().join("ca.crt")
    }

    /// The certificate and the key of the client of that name.
    pub(crate) fn client(&self, uri: &str) -> [PathBuf; 2] {
        let Credential { certificate, key } = self.authority.issue_to(uri, 2);
        self.put("client.crt", &certificate);
        self.put("client.key", &key);
        ["client.crt", "client.key"].map(|name| self.files.path().join(name))
    }

    /// Puts a file there in one step.
    fn put(&self, name: &str, text: &str) {
        let (file, next) = (self.files.path().join(name), self.files.path().join("next"));
        fs::write(&next, text).unwrap();
        fs::rename(&next, &file).unwrap();
    }

    /// A section by which connections are encrypted.
    pub(crate) fn tls(&self) -> String {
        let path = |name: &str| self.files.path().join(name);
        format!("[tls]\ncertificate = \"{}\"\nkey = \"{}\"\n", path("tls.crt").display(), path("tls.key").display())
    }

    /// Sections by which certificates of clients are asked for, and name them.
    pub(crate) fn mutual_tls(&self) -> String {
        let path = |name: &str| self.files.path().join(name);
        let clients =
            format!("client_ca = \"{}\"\nclient_crl = \"{}\"\n", path("ca.crt").display(), path("crl.pem").display());
        format!("{}{clients}[authentication]\ncertificate = \"uri\"\n", self.tls())
    }

    /// A connection of who has that certificate, or none.
    pub(crate) fn channel(&self, broker: &Broker, shown: Option<&Credential>) -> Channel {
        let authority = Certificate::from_pem(&self.authority.pem);
        let tls = ClientTlsConfig::new().ca_certificate(authority).domain_name("localhost");
        let tls = match shown {
            None => tls,
            Some(Credential { certificate, key }) => tls.identity(Identity::from_pem(certificate, key)),
        };
        let endpoint = Endpoint::from_shared(format!("https://{}", broker.address)).unwrap();
        endpoint.tls_config(tls).unwrap().connect_lazy()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_certificate_names_its_caller_and_no_header_does() {
    let database = Database::create();
    let site = Site::new();
    let sections = format!("{}[principals.\"spiffe://shop/*\"]\n", site.mutual_tls());
    let broker = Broker::start_with(&database, "", &sections).await;
    let orders = site.authority.issue_to("spiffe://shop/orders", 2);
    let session = Caller::over(site.channel(&broker, Some(&orders))).begin().await.unwrap();
    let billing = site.channel(&broker, Some(&site.authority.issue_to("spiffe://shop/billing", 3)));
    let keep_alive = message(&pb::KeepAliveRequest { session_token: session.clone() }.encode_to_vec());
    for header in [
        ("x-forwarded-client-cert", "URI=spiffe://shop/orders"),
        ("x-ssl-client-cert", orders.certificate.split('\n').nth(1).unwrap()),
        ("x-spiffe-id", "spiffe://shop/orders"),
        ("x-principal", "spiffe://shop/orders"),
        ("x-forwarded-user", "spiffe://shop/orders"),
        ("forwarded", "for=spiffe://shop/orders"),
    ] {
        let answer = call(&billing, KEEP_ALIVE, &[header], keep_alive.clone()).await;
        is(answer, Code::NotFound, "SESSION_UNKNOWN");
    }
    let elsewhere = site.authority.issue_to("spiffe://elsewhere/orders", 4);
    forbidden(Caller::over(site.channel(&broker, Some(&elsewhere))).begin().await.unwrap_err());
    // A session is its principal's over any connection.
    Caller::over(site.channel(&broker, Some(&orders))).execute_and_commit(&session, UPDATE).await.unwrap();
    assert_eq!(database.balances(), "7 100");
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_certificate_of_the_authority_there_is_no_connection() {
    let database = Database::create();
    let site = Site::new();
    let sections = format!("{}[principals.\"*\"]\n", site.mutual_tls());
    let broker = Broker::start_with(&database, "", &sections).await;
    let right = site.authority.issue_to("spiffe://shop/orders", 2);
    assert!(carries_calls(site.channel(&broker, Some(&right))).await);
    let anothers = Authority::new("another authority").issue_to("spiffe://shop/orders", 2);
    assert!(!carries_calls(site.channel(&broker, Some(&anothers))).await);
    assert!(!carries_calls(site.channel(&broker, None)).await);
    assert!(!carries_calls(broker.channel()).await, "in plain text");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_certificate_that_is_revoked_makes_no_more_connections() {
    let database = Database::create();
    let site = Site::new();
    let sections = format!("{}[principals.\"spiffe://shop/*\"]\n", site.mutual_tls());
    let broker = Broker::start_with(&database, "", &sections).await;
    let (lost, other) =
        (site.authority.issue_to("spiffe://shop/orders", 2), site.authority.issue_to("spiffe://shop/orders", 3));
    let session = Caller::over(site.channel(&broker, Some(&lost))).begin().await.unwrap();
    site.put("crl.pem", &site.authority.revoke(2));
    until(async || !carries_calls(site.channel(&broker, Some(&lost))).await).await;
    // Its owner has another of the same name.
    Caller::over(site.channel(&broker, Some(&other))).keep_alive(&session).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_profile_and_the_options_of_a_connection_are_for_those_who_were_granted_them() {
    let database = Database::create();
    let sections = format!(
        "{}[profiles.narrow]\nconnect_options = [\"time_zone\"]\n[principals.billing]\nprofiles = [\"narrow\"]\n\
         [principals.shipping]\n",
        tokens()
    );
    let overridable = "overridable = [\"application_name\", \"time_zone\"]";
    let broker = Broker::start_with(&database, overridable, &sections).await;
    let [billing, shipping] = [BILLING, SHIPPING].map(|token| Caller::bearing(broker.channel(), token));
    let begin = |profile: &str, options| pb::BeginSessionRequest {
        profile: profile.into(),
        connect_options: Some(options),
        ..Default::default()
    };
    let vienna = || pb::ConnectOptions { time_zone: Some("Europe/Vienna".into()), ..Default::default() };
    let named = || pb::ConnectOptions { application_name: Some("shop".into()), ..Default::default() };
    for (caller, profile, options, field) in [
        (&billing, "default", vienna(), "profile"),
        (&shipping, "narrow", vienna(), "profile"),
        (&billing, "narrow", named(), "connect_options.application_name"),
        (&billing, "", named(), "connect_options.application_name"),
    ] {
        let refused = caller.begin_with(begin(profile, options)).await.unwrap_err();
        let failure = is(refused, Code::InvalidArgument, "INVALID_REQUEST");
        assert_eq!(failure.field.as_deref(), Some(field), "{failure:?}");
    }
    assert_eq!(billing.begin_with(begin("", vienna())).await.unwrap().profile, "narrow");
    assert_eq!(shipping.begin_with(begin("", named())).await.unwrap().profile, "default");
}

#[tokio::test(flavor = "multi_thread")]
async fn operators_calls_are_for_those_who_were_granted_them() {
    let database = Database::create();
    let (broker, billing, shipping) = broker_for(&database, "admin = true", "").await;
    shipping.begin().await.unwrap();
    assert_eq!(billing.list_sessions().await.unwrap().sessions.len(), 1);
    let (channel, credentials) = (broker.channel(), format!("Bearer {SHIPPING}"));
    let calls = rpcs();
    for path in calls.iter().filter(|path| path.contains(".AdminService/")) {
        forbidden(call(&channel, path, &[("authorization", &credentials)], message(&[])).await);
    }
    // Nothing came of it: the broker does not drain.
    shipping.begin().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_principal_or_a_token_that_a_reload_has_removed_is_good_for_nothing_any_more() {
    let database = Database::create();
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("broker.toml");
    let configure = |tokens: &str, principals: &str| {
        let url = database.url();
        let next = directory.path().join("next.toml");
        fs::write(&next, format!("[engines.main]\nurl = {url:?}\n{tokens}{principals}")).unwrap();
        fs::rename(&next, &file).unwrap();
    };
    configure(&tokens(), "[principals.billing]\n[principals.shipping]\n");
    let broker = Program::start(&["serve", "--config", file.to_str().unwrap(), "--listen", "127.0.0.1:0"]);
    let [billing, shipping] = [BILLING, SHIPPING].map(|token| Caller::bearing(broker.channel(), token));
    let session = billing.begin().await.unwrap();
    billing.execute(&session, UPDATE).await.unwrap();
    let channels = pb::ListenRequest { channels: vec!["news".into()], ..Default::default() };
    let mut notifications = NotificationServiceClient::new(broker.channel());
    let mut heard = notifications.listen(billing.request(channels)).await.unwrap().into_inner();
    assert!(heard.message().await.unwrap().is_some());
    configure(&tokens(), "[principals.shipping]\n");
    broker.signal("HUP");
    until(async || billing.keep_alive(&session).await.is_err()).await;
    forbidden(billing.keep_alive(&session).await.unwrap_err());
    forbidden(billing.commit(&session).await.unwrap_err());
    forbidden(billing.begin().await.unwrap_err());
    // What had begun ends too.
    forbidden(heard.message().await.unwrap_err());
    until(async || database.open_transactions() == "0").await;
    let session = shipping.begin().await.unwrap();
    let another = TokenDigest::of("sbt_another").to_string();
    configure(&tokens().replace(&TokenDigest::of(SHIPPING).to_string(), &another), "[principals.shipping]\n");
    broker.signal("HUP");
    until(async || shipping.keep_alive(&session).await.is_err()).await;
    unauthenticated(shipping.keep_alive(&session).await.unwrap_err());
    Caller::bearing(broker.channel(), "sbt_another").keep_alive(&session).await.unwrap();
    assert_eq!(database.balances(), "100 100");
}

#[tokio::test(flavor = "multi_thread")]
async fn sessions_past_a_principals_own_are_refused_until_one_is_closed_or_reaped() {
    let database = Database::create();
    let leases = "[profiles.default]\nlease_ttl = \"1s\"\n";
    let (_broker, billing, shipping) = broker_for(&database, "sessions_max = 1", leases).await;
    let first = billing.begin().await.unwrap();
    is_over_quota(billing.begin().await.unwrap_err(), "sessions_max");
    for _ in 0..3 {
        shipping.begin().await.unwrap();
    }
    billing.close(&first).await.unwrap();
    billing.begin().await.unwrap();
    is_over_quota(billing.begin().await.unwrap_err(), "sessions_max");
    // Left alone, it is reaped.
    until(async || billing.begin().await.is_ok()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn transactions_past_a_principals_own_are_refused_until_one_is_over() {
    let database = Database::create();
    let leases = "[profiles.default]\nlease_ttl = \"2s\"\n";
    let (_broker, billing, shipping) = broker_for(&database, "transactions_max = 1", leases).await;
    let (one, two) = (billing.begin().await.unwrap(), billing.begin().await.unwrap());
    let others = shipping.begin().await.unwrap();
    billing.execute(&one, "SELECT 1").await.unwrap();
    is_over_quota(billing.execute(&two, UPDATE).await.unwrap_err(), "transactions_max");
    shipping.execute_and_commit(&others, "SELECT 1").await.unwrap();
    billing.commit(&one).await.unwrap();
    billing.execute(&two, "SELECT 1").await.unwrap();
    is_over_quota(billing.execute(&one, UPDATE).await.unwrap_err(), "transactions_max");
    billing.close(&two).await.unwrap();
    let left_alone = billing.begin().await.unwrap();
    billing.execute(&left_alone, "SELECT 1").await.unwrap();
    is_over_quota(billing.execute(&one, UPDATE).await.unwrap_err(), "transactions_max");
    // A call that is refused keeps its session; the other is reaped with its transaction.
    until(async || billing.execute(&one, UPDATE).await.is_ok()).await;
    billing.commit(&one).await.unwrap();
    assert_eq!(database.balances(), "7 100");
}

#[tokio::test(flavor = "multi_thread")]
async fn calls_past_a_principals_own_are_refused_until_one_is_answered() {
    let database = Database::create();
    let (_broker, billing, shipping) = broker_for(&database, "calls_max = 1", "").await;
    let session = billing.begin().await.unwrap();
    let lock = database.hold("LOCK TABLE accounts");
    let parked = tokio::spawn({
        let (billing, session) = (billing.clone(), session.clone());
        async move { billing.execute(&session, UPDATE).await }
    });
    database.wait_for(PARKED, "1");
    is_over_quota(billing.begin().await.unwrap_err(), "calls_max");
    is_over_quota(billing.keep_alive(&session).await.unwrap_err(), "calls_max");
    let others = shipping.begin().await.unwrap();
    shipping.execute_and_commit(&others, "SELECT 1").await.unwrap();
    drop(lock);
    parked.await.unwrap().unwrap();
    billing.commit(&session).await.unwrap();
    assert_eq!(database.balances(), "7 100");
}

#[tokio::test(flavor = "multi_thread")]
async fn calls_that_come_faster_than_a_principals_own_rate_are_refused_until_later() {
    let database = Database::create();
    let (_broker, billing, shipping) = broker_for(&database, "calls_per_second = 5", "").await;
    let at_once = join_all((0..100).map(|_| billing.begin())).await;
    let refused: Vec<_> = at_once.into_iter().filter_map(Result::err).collect();
    assert!(!refused.is_empty());
    for status in refused {
        is_over_quota(status, "calls_per_second");
    }
    for begun in join_all((0..100).map(|_| shipping.begin())).await {
        begun.unwrap();
    }
    until(async || billing.begin().await.is_ok()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn more_calls_than_the_broker_takes_are_shed_and_probes_still_answered() {
    let database = Database::create();
    let (broker, billing, shipping) = broker_for(&database, "", "[limits]\ncalls_max = 1\n").await;
    let session = billing.begin().await.unwrap();
    let lock = database.hold("LOCK TABLE accounts");
    let parked = tokio::spawn({
        let (billing, session) = (billing.clone(), session.clone());
        async move { billing.execute(&session, UPDATE).await }
    });
    database.wait_for(PARKED, "1");
    is_exhausted(shipping.begin().await.unwrap_err(), "CALLS_EXHAUSTED", "limits.calls_max");
    assert!(carries_calls(broker.channel()).await);
    drop(lock);
    parked.await.unwrap().unwrap();
    shipping.begin().await.unwrap();
    billing.commit(&session).await.unwrap();
}

#[allow(clippy::print_stdout, reason = "how long another caller waits is for a person to judge")]
#[tokio::test(flavor = "multi_thread")]
async fn a_principal_that_begins_ten_thousand_sessions_at_once_keeps_no_other_from_its_work() {
    const CALLS: usize = 10_000;
    const SESSIONS_MAX: usize = 100;
    /// Each has 256 calls at a time.
    const CONNECTIONS: usize = 8;

    let database = Database::create();
    let quota = format!("sessions_max = {SESSIONS_MAX}");
    let (broker, _, shipping) = broker_for(&database, &quota, "[profiles.default]\nlease_ttl = \"5m\"\n").await;
    let session = shipping.begin().await.unwrap();
    let channels: Vec<_> = (0..CONNECTIONS).map(|_| broker.channel()).collect();
    let mut flood = JoinSet::new();
    for number in 0..CALLS {
        let billing = Caller::bearing(channels[number % CONNECTIONS].clone(), BILLING);
        flood.spawn(async move { billing.begin().await });
    }
    let flood = tokio::spawn(flood.join_all());
    let mut times = Vec::new();
    while !flood.is_finished() || times.len() < 100 {
        let before = Instant::now();
        let answer = shipping.execute_and_commit(&session, "SELECT 1").await.unwrap();
        times.push(before.elapsed());
        assert_eq!(first_row(&answer), [int(1)]);
    }
    times.sort();
    println!("{} calls beside the flood: p99 {:?}", times.len(), times[times.len() * 99 / 100]);
    let (begun, refused): (Vec<_>, Vec<_>) = flood.await.unwrap().into_iter().partition(Result::is_ok);
    assert_eq!((begun.len(), refused.len()), (SESSIONS_MAX, CALLS - SESSIONS_MAX));
    for status in refused.into_iter().filter_map(Result::err) {
        is_over_quota(status, "sessions_max");
    }
}
