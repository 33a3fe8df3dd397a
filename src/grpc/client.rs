//! The protocol from the caller's side, for the command line: connects, calls, and takes errors apart.
//!
//! Knows no terminal and no argument. Invariants: every call has a deadline, but a stream whose caller names none,
//! which the broker's own limits end; a token is in no text that can be shown.

use std::error::Error;
use std::fmt;
use std::iter;
use std::time::Duration;

use prost::Message;
use tokio::time::timeout;
use tonic::metadata::{Ascii, MetadataValue};
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity};
use tonic::{Request, Status, Streaming};
use tonic_health::pb::health_client::HealthClient;
use tonic_health::pb::{HealthCheckRequest, HealthCheckResponse};
use tonic_types::{StatusExt, pb as rpc};

use super::{convert, method, pb};
use crate::acceptor::Address;
use crate::secret::Secret;
use pb::admin_service_client::AdminServiceClient;
use pb::execute_stream_response::Part;
use pb::session_service_client::SessionServiceClient;

/// The largest answer that is taken. The broker's configuration bounds what it sends; this bounds what is believed of
/// one that is none.
const ANSWER_BYTES_MAX: usize = 64 * 1024 * 1024;

/// A broker whose machine vanished is noticed within both, while a call is open.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(10);
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(10);

/// A broker, and how to call it.
#[derive(Debug)]
pub struct Target {
    /// Where it listens.
    pub address: Address,
    /// How the connection is encrypted; absent: it is not. A Unix socket's never is.
    pub tls: Option<Tls>,
    /// The bearer token that proves who calls.
    pub token: Option<Secret>,
    /// The longest that connecting may take, and a call that is no stream.
    pub timeout: Duration,
}

/// What a connection is encrypted with.
#[derive(Debug)]
pub struct Tls {
    /// The authorities that vouch for the broker, PEM; absent: the system's.
    pub authorities: Option<String>,
    /// The client's certificate with those above it, and its key, PEM.
    pub identity: Option<(String, Secret)>,
    /// The name that the broker's certificate must have; absent: the host of its address.
    pub server_name: Option<String>,
}

/// A connection to a broker.
#[derive(Debug)]
pub struct Client {
    channel: Channel,
    /// Marked as sensitive, so that its `Debug` does not show it.
    authorization: Option<MetadataValue<Ascii>>,
    timeout: Duration,
}

impl Client {
    /// Connects.
    ///
    /// # Errors
    /// UNAVAILABLE when nobody answers there, or TLS fails; INVALID_ARGUMENT when the target makes no sense.
    pub async fn connect(target: Target) -> Result<Self, CallError> {
        let Target { address, tls, token, timeout: limit } = target;
        let authorization = token.as_ref().map(bearer).transpose()?;
        let endpoint = endpoint(&address, tls).map_err(|error| {
            let problem = with_causes(&format!("cannot call {address}: {error}"), error.source());
            CallError::local("INVALID_ARGUMENT", problem)
        })?;
        let unavailable = format!("cannot connect to {address}");
        let problem = match timeout(limit, endpoint.connect()).await {
            Ok(Ok(channel)) => return Ok(Self { channel, authorization, timeout: limit }),
            Ok(Err(error)) => with_causes(&unavailable, error.source()),
            Err(_) => format!("{unavailable}: timed out after {}", humantime::format_duration(limit)),
        };
        Err(CallError::local("UNAVAILABLE", problem))
    }

    /// A page of the live sessions.
    pub async fn list_sessions(&self, request: pb::ListSessionsRequest) -> Result<pb::ListSessionsResponse, CallError> {
        Ok(self.admin().list_sessions(self.request(request)).await?.into_inner())
    }

    /// Ends a session.
    pub async fn terminate_session(
        &self,
        session_id: String,
        reason: String,
    ) -> Result<pb::TerminateSessionResponse, CallError> {
        let request = pb::TerminateSessionRequest { session_id, reason };
        Ok(self.admin().terminate_session(self.request(request)).await?.into_inner())
    }

    /// The engines.
    pub async fn list_engines(&self) -> Result<Vec<pb::EngineOverview>, CallError> {
        let request = self.request(pb::ListEnginesRequest {});
        Ok(self.admin().list_engines(request).await?.into_inner().engines)
    }

    /// Makes the broker drain and stop, and says how many sessions are live.
    pub async fn drain(&self, grace: Option<Duration>) -> Result<u32, CallError> {
        let request = self.request(pb::DrainRequest { grace: grace.and_then(to_wire) });
        Ok(self.admin().drain(request).await?.into_inner().live_sessions)
    }

    /// Begins a session.
    pub async fn begin_session(&self, request: pb::BeginSessionRequest) -> Result<pb::BeginSessionResponse, CallError> {
        Ok(self.sessions().begin_session(self.request(request)).await?.into_inner())
    }

    /// Runs a statement. Without a deadline of the caller's, the session's limits bound it.
    pub async fn execute_stream(
        &self,
        request: pb::ExecuteStreamRequest,
        deadline: Option<Duration>,
    ) -> Result<Parts, CallError> {
        let mut request = self.authorized(request);
        if let Some(deadline) = deadline {
            request.set_timeout(deadline);
        }
        Ok(Parts(self.sessions().execute_stream(request).await?.into_inner()))
    }

    /// Ends a session of one's own.
    pub async fn close(&self, session_token: String) -> Result<(), CallError> {
        self.sessions().close(self.request(pb::CloseRequest { session_token })).await?;
        Ok(())
    }

    /// Begins to watch whether the broker is there.
    pub async fn watch(&self) -> Result<Presence, CallError> {
        let mut health = HealthClient::new(self.channel.clone());
        Ok(Presence(health.watch(self.authorized(HealthCheckRequest::default())).await?.into_inner()))
    }

    fn admin(&self) -> AdminServiceClient<Channel> {
        AdminServiceClient::new(self.channel.clone()).max_decoding_message_size(ANSWER_BYTES_MAX)
    }

    fn sessions(&self) -> SessionServiceClient<Channel> {
        SessionServiceClient::new(self.channel.clone()).max_decoding_message_size(ANSWER_BYTES_MAX)
    }

    fn authorized<T>(&self, message: T) -> Request<T> {
        let mut request = Request::new(message);
        if let Some(authorization) = &self.authorization {
            request.metadata_mut().insert("authorization", authorization.clone());
        }
        request
    }

    fn request<T>(&self, message: T) -> Request<T> {
        let mut request = self.authorized(message);
        request.set_timeout(self.timeout);
        request
    }
}

/// A result as it comes. Dropped, its statement is cancelled.
#[derive(Debug)]
pub struct Parts(Streaming<pb::ExecuteStreamResponse>);

impl Parts {
    /// The next part; none at the end.
    ///
    /// # Cancel safety
    /// A part that nobody took is there the next time.
    pub async fn next(&mut self) -> Result<Option<Part>, CallError> {
        Ok(self.0.message().await?.and_then(|message| message.part))
    }
}

/// Whether a broker is there, as its connection tells.
#[derive(Debug)]
pub struct Presence(Streaming<HealthCheckResponse>);

impl Presence {
    /// Resolves when the broker is gone, or the connection to it.
    ///
    /// # Cancel safety
    /// What was heard of it meanwhile is of no use: it is asked whether it is there, not how it is.
    pub async fn gone(&mut self) {
        while let Ok(Some(_)) = self.0.message().await {}
    }
}

/// A failed call with its details unpacked, or why it could not be made.
#[derive(Debug)]
pub struct CallError {
    /// The gRPC code's name.
    pub code: &'static str,
    /// `ErrorInfo.reason`; empty when it was not the broker that answered.
    pub reason: String,
    /// What is wrong.
    pub message: String,
    /// What PostgreSQL said.
    pub pg_error: Option<Box<pb::PgError>>,
}

impl CallError {
    /// Of something that no broker said.
    pub fn local(code: &'static str, message: String) -> Self {
        Self { code, reason: String::new(), message, pg_error: None }
    }
}

impl fmt::Display for CallError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { code, reason, message, pg_error } = self;
        f.write_str(code)?;
        if !reason.is_empty() {
            write!(f, ", {reason}")?;
        }
        match pg_error {
            Some(error) => write!(f, ", SQLSTATE {}: {}", error.sqlstate, error.message),
            None => write!(f, ": {message}"),
        }
    }
}

impl Error for CallError {}

impl From<Status> for CallError {
    fn from(status: Status) -> Self {
        let code = method::name(status.code());
        let pg_error = detail::<pb::PgError>(&status, "sessionbroker.v1.PgError").map(Box::new);
        match status.get_details_error_info() {
            Some(info) => Self { code, reason: info.reason, message: status.message().to_owned(), pg_error },
            // Of the transport, whose message alone says little.
            None => {
                let message = if status.message().is_empty() { status.code().description() } else { status.message() };
                Self { code, reason: String::new(), message: with_causes(message, status.source()), pg_error }
            }
        }
    }
}

/// A duration as the protocol has it; none for one of more than its 292 billion years.
pub fn to_wire(duration: Duration) -> Option<prost_types::Duration> {
    convert::to_duration(duration)
}

/// A duration of an answer; a negative one, which there is none of, is absent.
pub fn from_wire(duration: Option<prost_types::Duration>) -> Option<Duration> {
    duration.and_then(|duration| duration.try_into().ok())
}

fn endpoint(address: &Address, tls: Option<Tls>) -> Result<Endpoint, tonic::transport::Error> {
    let uri = match (address, &tls) {
        (Address::Tcp(address), None) => format!("http://{address}"),
        (Address::Tcp(address), Some(_)) => format!("https://{address}"),
        (Address::Unix(path), _) => format!("unix:{}", path.display()),
    };
    let endpoint =
        Endpoint::from_shared(uri)?.http2_keep_alive_interval(KEEPALIVE_INTERVAL).keep_alive_timeout(KEEPALIVE_TIMEOUT);
    match tls {
        None => Ok(endpoint),
        Some(tls) => endpoint.tls_config(tls_config(tls)),
    }
}

fn tls_config(tls: Tls) -> ClientTlsConfig {
    let Tls { authorities, identity, server_name } = tls;
    let mut config = match authorities {
        Some(pem) => ClientTlsConfig::new().ca_certificate(Certificate::from_pem(pem)),
        None => ClientTlsConfig::new().with_native_roots(),
    };
    if let Some((certificate, key)) = identity {
        config = config.identity(Identity::from_pem(certificate, key.expose()));
    }
    if let Some(name) = server_name {
        config = config.domain_name(name);
    }
    config
}

fn bearer(token: &Secret) -> Result<MetadataValue<Ascii>, CallError> {
    let mut value: MetadataValue<Ascii> = format!("Bearer {}", token.expose()).parse().map_err(|_| {
        let problem = "token: has characters that no header may have: pass the token and nothing else";
        CallError::local("INVALID_ARGUMENT", problem.into())
    })?;
    value.set_sensitive(true);
    Ok(value)
}

/// A message with all that caused it, each said once.
fn with_causes(message: &str, cause: Option<&(dyn Error + 'static)>) -> String {
    let mut text = message.to_owned();
    for cause in iter::successors(cause, |&cause| cause.source()) {
        let cause = cause.to_string();
        if !text.ends_with(&cause) {
            text.push_str(": ");
            text.push_str(&cause);
        }
    }
    text
}

fn detail<M: Message + Default>(status: &Status, name: &str) -> Option<M> {
    let details = rpc::Status::decode(status.details()).ok()?.details;
    let found = details.into_iter().find(|any| any.type_url.rsplit('/').next() == Some(name))?;
    M::decode(found.value.as_slice()).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::grpc::status;

    #[test]
    fn an_error_is_taken_apart_as_it_was_put_together() {
        use crate::broker::error::{Error, PgError};

        let pg_error = PgError { sqlstate: "42703".into(), message: "no such column".into(), ..PgError::default() };
        let failed = CallError::from(status::from_error(Error::Database(Box::new(pg_error))));
        assert_eq!((failed.code, failed.reason.as_str()), ("INVALID_ARGUMENT", "DATABASE_ERROR"));
        assert_eq!(failed.to_string(), "INVALID_ARGUMENT, DATABASE_ERROR, SQLSTATE 42703: no such column");
        let draining = CallError::from(status::from_error(Error::Draining));
        assert!(draining.to_string().starts_with("UNAVAILABLE, DRAINING: "), "{draining}");
        assert!(draining.pg_error.is_none());
    }

    #[test]
    fn an_error_of_the_transport_says_what_caused_it_once() {
        let cause = std::io::Error::other("connection refused");
        let failed = CallError::from(Status::from_error(Box::new(cause)));
        assert_eq!((failed.reason.as_str(), failed.message.as_str()), ("", "connection refused"));
    }

    #[test]
    fn a_token_is_shown_to_nobody() {
        let token = Secret::new("sbt_hush".into());
        assert!(!format!("{:?}", bearer(&token).unwrap()).contains("hush"));
        let odd = bearer(&Secret::new("sbt_hush\n".into())).unwrap_err();
        assert!(!format!("{odd} {odd:?}").contains("hush"));
    }
}
