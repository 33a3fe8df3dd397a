//! `SessionService` and `TransactionService`: decode, find the session, let the domain act, encode.
//!
//! Invariant: an RPC future owns nothing; dropping it at any point leaves nothing behind, because the domain's calls
//! are cancel safe.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use futures_util::stream::{self, BoxStream, StreamExt};
use tokio::time::Instant;
use tonic::metadata::MetadataMap;
use tonic::{Request, Response, Status};
use tracing::info;

use super::pb;
use super::pb::session_service_server::SessionService;
use super::pb::transaction_service_server::TransactionService;
use super::{auth, convert, interact, status};
use crate::broker::admin::AUDIT;
use crate::broker::attach::Attached;
use crate::broker::engine::{SavepointAction, SavepointName};
use crate::broker::error::{Error, Failure};
use crate::broker::run::RunFailure;
use crate::broker::session::Session;
use crate::broker::session::streaming::Streaming;
use crate::broker::{Broker, Granted};

/// Serves the broker's sessions.
#[derive(Debug)]
pub struct Sessions {
    broker: Arc<Broker>,
    /// Where callers reach this broker, HOST:PORT.
    endpoint: String,
}

impl Sessions {
    /// The service for `broker`, reached at `endpoint`.
    pub fn new(broker: Arc<Broker>, endpoint: String) -> Self {
        Self { broker, endpoint }
    }

    /// The session a call is about.
    fn session<T>(&self, request: &Request<T>, token: &str) -> Result<Arc<Session>, Status> {
        let token = convert::session_token(token).map_err(status::from_error)?;
        self.broker.session(&auth::principal(request)?, &token).map_err(status::from_error)
    }
}

#[tonic::async_trait]
impl SessionService for Sessions {
    type AttachStream = BoxStream<'static, Result<pb::AttachResponse, Status>>;
    type ExecuteStreamStream = BoxStream<'static, Result<pb::ExecuteStreamResponse, Status>>;
    type InteractStream = BoxStream<'static, Result<pb::InteractResponse, Status>>;

    async fn begin_session(
        &self,
        request: Request<pb::BeginSessionRequest>,
    ) -> Result<Response<pb::BeginSessionResponse>, Status> {
        let principal = auth::principal(&request)?;
        let refused = |error: Error| {
            let reason = status::reason(&error);
            info!(target: AUDIT, event = "session.refused", %principal, reason, "session refused");
            status::from_error(error)
        };
        let asked = convert::begin_session(request.into_inner()).map_err(refused)?;
        let Granted { session, lease_ttl } = self.broker.begin_session(&principal, asked).map_err(refused)?;
        let state = session.state().map_err(|reason| status::from_error(reason.into()))?;
        Ok(Response::new(pb::BeginSessionResponse {
            session_token: session.token().expose(),
            session_id: session.id().to_string(),
            owner_endpoint: self.endpoint.clone(),
            lease_ttl: convert::to_duration(lease_ttl),
            expire_time: Some(wall_clock_after(state.session_remaining)),
            state: Some(convert::session_state(state)),
            profile: session.profile_name().to_owned(),
        }))
    }

    async fn execute(&self, request: Request<pb::ExecuteRequest>) -> Result<Response<pb::ExecuteResponse>, Status> {
        let session = self.session(&request, &request.get_ref().session_token)?;
        let deadline = grpc_deadline(request.metadata());
        let call = checked(&session, convert::execute_call(request.into_inner(), deadline))?;
        let executed = session.execute(call).await.map_err(status::from_failure)?;
        Ok(Response::new(convert::executed(executed)))
    }

    async fn execute_stream(
        &self,
        request: Request<pb::ExecuteStreamRequest>,
    ) -> Result<Response<Self::ExecuteStreamStream>, Status> {
        let session = self.session(&request, &request.get_ref().session_token)?;
        let deadline = grpc_deadline(request.metadata());
        let call = checked(&session, convert::stream_call(request.into_inner(), deadline))?;
        let streaming = session.execute_stream(call).await.map_err(status::from_failure)?;
        // The transport drops the stream when its caller is gone.
        let parts = stream::unfold(streaming, async |mut streaming: Streaming| {
            let part = streaming.next().await?;
            Some((part.map(convert::streamed).map_err(status::from_failure), streaming))
        });
        Ok(Response::new(parts.boxed()))
    }

    async fn execute_batch(
        &self,
        request: Request<pb::ExecuteBatchRequest>,
    ) -> Result<Response<pb::ExecuteBatchResponse>, Status> {
        let session = self.session(&request, &request.get_ref().session_token)?;
        let deadline = grpc_deadline(request.metadata());
        let (call, runs) = checked(&session, convert::batch_call(request.into_inner(), deadline))?;
        let executed = session.execute(call).await.map_err(|failure| status::from_batch_failure(failure, &runs))?;
        Ok(Response::new(convert::batch_executed(executed)))
    }

    async fn commit(&self, request: Request<pb::CommitRequest>) -> Result<Response<pb::CommitResponse>, Status> {
        let pb::CommitRequest { session_token } = request.get_ref();
        let session = self.session(&request, session_token)?;
        let committed = session.commit(grpc_deadline(request.metadata())).await.map_err(status::from_failure)?;
        Ok(Response::new(convert::committed(committed)))
    }

    async fn rollback(&self, request: Request<pb::RollbackRequest>) -> Result<Response<pb::RollbackResponse>, Status> {
        let session = self.session(&request, &request.get_ref().session_token)?;
        let deadline = grpc_deadline(request.metadata());
        let answer = rollback(&session, request.into_inner(), deadline).await;
        answer.map(Response::new).map_err(status::from_failure)
    }

    async fn create_savepoint(
        &self,
        request: Request<pb::CreateSavepointRequest>,
    ) -> Result<Response<pb::CreateSavepointResponse>, Status> {
        let session = self.session(&request, &request.get_ref().session_token)?;
        let deadline = grpc_deadline(request.metadata());
        let answer = create_savepoint(&session, request.into_inner(), deadline).await;
        answer.map(Response::new).map_err(status::from_failure)
    }

    async fn release_savepoint(
        &self,
        request: Request<pb::ReleaseSavepointRequest>,
    ) -> Result<Response<pb::ReleaseSavepointResponse>, Status> {
        let session = self.session(&request, &request.get_ref().session_token)?;
        let deadline = grpc_deadline(request.metadata());
        let answer = release_savepoint(&session, request.into_inner(), deadline).await;
        answer.map(Response::new).map_err(status::from_failure)
    }

    async fn resolve_commit(
        &self,
        request: Request<pb::ResolveCommitRequest>,
    ) -> Result<Response<pb::ResolveCommitResponse>, Status> {
        let principal = auth::principal(&request)?;
        let deadline = grpc_deadline(request.metadata());
        let pb::ResolveCommitRequest { commit_token, wait } = request.into_inner();
        let until = Instant::now() + convert::wait(wait).map_err(status::from_error)?;
        let until = deadline.map_or(until, |deadline| until.min(deadline));
        let resolved = self.broker.resolve_commit(&principal, &commit_token, until).await;
        let (resolution, xid) = resolved.map_err(status::from_error)?;
        Ok(Response::new(convert::resolution(resolution, xid)))
    }

    async fn cancel(&self, request: Request<pb::CancelRequest>) -> Result<Response<pb::CancelResponse>, Status> {
        let pb::CancelRequest { session_token } = request.get_ref();
        let session = self.session(&request, session_token)?;
        let (cancelled, state) = session.cancel().await.map_err(status::from_failure)?;
        Ok(Response::new(pb::CancelResponse { cancelled, state: Some(convert::session_state(state)) }))
    }

    async fn close(&self, request: Request<pb::CloseRequest>) -> Result<Response<pb::CloseResponse>, Status> {
        let pb::CloseRequest { session_token } = request.get_ref();
        let session = self.session(&request, session_token)?;
        let reason = session.close().await.map_err(status::from_failure)?;
        Ok(Response::new(pb::CloseResponse { end_reason: convert::end_reason(reason).into() }))
    }

    async fn keep_alive(
        &self,
        request: Request<pb::KeepAliveRequest>,
    ) -> Result<Response<pb::KeepAliveResponse>, Status> {
        let pb::KeepAliveRequest { session_token } = request.get_ref();
        let session = self.session(&request, session_token)?;
        let state = session.keep_alive().map_err(status::from_error)?;
        Ok(Response::new(pb::KeepAliveResponse { state: Some(convert::session_state(state)) }))
    }

    async fn attach(&self, request: Request<pb::AttachRequest>) -> Result<Response<Self::AttachStream>, Status> {
        let pb::AttachRequest { session_token } = request.get_ref();
        let session = self.session(&request, session_token)?;
        let attached = session.attach().map_err(status::from_failure)?;
        // The transport drops the stream when its caller is gone.
        let events = stream::unfold(attached, async |mut attached: Attached| {
            let event = attached.next().await?;
            Some((Ok(convert::event(event)), attached))
        });
        Ok(Response::new(events.boxed()))
    }

    async fn interact(
        &self,
        request: Request<tonic::Streaming<pb::InteractRequest>>,
    ) -> Result<Response<Self::InteractStream>, Status> {
        interact::interact(self, &self.broker, request).await
    }

    async fn get_session(
        &self,
        request: Request<pb::GetSessionRequest>,
    ) -> Result<Response<pb::GetSessionResponse>, Status> {
        let pb::GetSessionRequest { session_token } = request.get_ref();
        let session = self.session(&request, session_token)?;
        Ok(Response::new(convert::description(session.describe())))
    }
}

/// Serves transactions without a session.
#[derive(Debug)]
pub struct Transactions {
    broker: Arc<Broker>,
}

impl Transactions {
    /// The service for `broker`.
    pub fn new(broker: Arc<Broker>) -> Self {
        Self { broker }
    }
}

#[tonic::async_trait]
impl TransactionService for Transactions {
    async fn run(&self, request: Request<pb::RunRequest>) -> Result<Response<pb::RunResponse>, Status> {
        let principal = auth::principal(&request)?;
        let deadline = grpc_deadline(request.metadata());
        let (run, runs) = convert::run(request.into_inner(), deadline).map_err(status::from_error)?;
        let ran = self.broker.run(&principal, run).await;
        let ran = ran.map_err(|RunFailure { failure, attempts }| status::from_run_failure(failure, attempts, &runs))?;
        Ok(Response::new(convert::ran(ran).map_err(status::from_error)?))
    }
}

/// Rolls a session's transaction back, or to a savepoint.
pub(super) async fn rollback(
    session: &Arc<Session>,
    request: pb::RollbackRequest,
    deadline: Option<Instant>,
) -> Result<pb::RollbackResponse, Failure> {
    let pb::RollbackRequest { session_token: _, savepoint } = request;
    let state = if savepoint.is_empty() {
        session.rollback().await?
    } else {
        let name = SavepointName::new("savepoint", savepoint).map_err(|error| refused(session, error))?;
        session.savepoint(SavepointAction::RollBackTo, name, None, deadline).await?
    };
    Ok(pb::RollbackResponse { state: Some(convert::session_state(state)) })
}

/// Sets a savepoint in a session's transaction.
pub(super) async fn create_savepoint(
    session: &Arc<Session>,
    request: pb::CreateSavepointRequest,
    deadline: Option<Instant>,
) -> Result<pb::CreateSavepointResponse, Failure> {
    let pb::CreateSavepointRequest { session_token: _, name, transaction_options } = request;
    let name = SavepointName::new("name", name).map_err(|error| refused(session, error))?;
    let choice = transaction_options.map(convert::transaction_choice).transpose();
    let choice = choice.map_err(|error| refused(session, error))?;
    let state = session.savepoint(SavepointAction::Create, name, choice, deadline).await?;
    Ok(pb::CreateSavepointResponse { state: Some(convert::session_state(state)) })
}

/// Forgets a savepoint of a session's transaction.
pub(super) async fn release_savepoint(
    session: &Arc<Session>,
    request: pb::ReleaseSavepointRequest,
    deadline: Option<Instant>,
) -> Result<pb::ReleaseSavepointResponse, Failure> {
    let pb::ReleaseSavepointRequest { session_token: _, name } = request;
    let name = SavepointName::new("name", name).map_err(|error| refused(session, error))?;
    let state = session.savepoint(SavepointAction::Release, name, None, deadline).await?;
    Ok(pb::ReleaseSavepointResponse { state: Some(convert::session_state(state)) })
}

/// A request on a session that was read, or what is wrong with it.
pub(super) fn checked<T>(session: &Session, read: Result<T, Error>) -> Result<T, Status> {
    read.map_err(|error| status::from_failure(refused(session, error)))
}

/// What is told of a call that was refused as it came. It is a finished call: it renews the lease and hears where the
/// session stands.
pub(super) fn refused(session: &Session, error: Error) -> Failure {
    session.keep_alive().map_or_else(Failure::from, |state| Failure { state: Some(state), ..Failure::from(error) })
}

/// When to stop for a caller that stops waiting, by the `grpc-timeout` header: up to eight digits and a unit. A little
/// earlier, so that the caller hears from us what was stopped and why, and not from its own clock.
pub(super) fn grpc_deadline(metadata: &MetadataMap) -> Option<Instant> {
    const MARGIN_MAX: Duration = Duration::from_millis(500);

    let text = metadata.get("grpc-timeout")?.to_str().ok()?;
    let (digits, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    let count: u64 = digits.parse().ok()?;
    let timeout = match unit {
        "H" => Duration::from_secs(count.checked_mul(3600)?),
        "M" => Duration::from_secs(count.checked_mul(60)?),
        "S" => Duration::from_secs(count),
        "m" => Duration::from_millis(count),
        "u" => Duration::from_micros(count),
        "n" => Duration::from_nanos(count),
        _ => return None,
    };
    Instant::now().checked_add(timeout.saturating_sub((timeout / 10).min(MARGIN_MAX)))
}

#[allow(clippy::disallowed_methods, reason = "it is told to people and other machines, whose clock this is")]
fn wall_clock_after(duration: Duration) -> prost_types::Timestamp {
    (SystemTime::now() + duration).into()
}
