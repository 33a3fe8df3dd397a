//! `Interact`: a session on one stream, a call in each message.
//!
//! A message is done as the unary call of its name is, without that call's way through the gate. Invariants: an RPC
//! future owns nothing, and the stream owns its session: dropping either leaves nothing behind; each message has one
//! answer, in order, unless the stream's status takes its place.

use std::sync::Arc;

use futures_util::stream::{self, BoxStream, StreamExt};
use prost::Message;
use tokio::time::{Instant, timeout};
use tonic::{Request, Response, Status, Streaming};
use tracing::field::Empty;
use tracing::{Instrument, Span, info_span};

use super::gate::ARRIVAL_TIMEOUT;
use super::pb;
use super::pb::session_service_server::SessionService;
use super::service::{self, Sessions, grpc_deadline, refused};
use super::{auth, convert, status};
use crate::broker::Broker;
use crate::broker::error::{Error, Failure};
use crate::broker::observer::TRACE;
use crate::broker::principal::Principal;
use crate::broker::session::Session;
use crate::broker::session::interact::Interaction;
use crate::names::attribute;
use pb::interact_request::Request as Asked;
use pb::interact_response::Response as Answer;

/// Has a session begin or go on over a stream. Returns when it has.
pub(super) async fn interact(
    sessions: &Sessions,
    broker: &Arc<Broker>,
    request: Request<Streaming<pb::InteractRequest>>,
) -> Result<Response<BoxStream<'static, Result<pb::InteractResponse, Status>>>, Status> {
    let principal = auth::principal(&request)?;
    let (metadata, _, mut requests) = request.into_parts();
    let invalid = |problem: &str| status::from_error(Error::invalid("request", problem));
    let first =
        timeout(ARRIVAL_TIMEOUT, requests.message()).await.map_err(|_| invalid("took too long to arrive"))??;
    let (interaction, answer) = match first.and_then(|pb::InteractRequest { request, resume: _ }| request) {
        Some(Asked::BeginSession(begin)) => begin_session(sessions, broker, &principal, begin).await?,
        Some(Asked::SessionToken(token)) => find_session(broker, &principal, &token)?,
        Some(
            Asked::Execute(_)
            | Asked::ExecuteBatch(_)
            | Asked::Commit(_)
            | Asked::Rollback(_)
            | Asked::CreateSavepoint(_)
            | Asked::ReleaseSavepoint(_),
        )
        | None => return Err(invalid("must say first which session it is for: give begin_session or session_token")),
    };
    let calls = Calls {
        broker: broker.clone(),
        principal,
        interaction,
        requests,
        grpc_deadline: grpc_deadline(&metadata),
        span: Span::current(),
    };
    // The transport drops the stream when its caller is gone.
    let answers = stream::try_unfold(calls, async |mut calls: Calls| {
        let Some(answer) = calls.next().await? else {
            calls.interaction.finish();
            return Ok(None);
        };
        Ok::<_, Status>(Some((answer, calls)))
    });
    Ok(Response::new(stream::iter([Ok(answered(answer))]).chain(answers).boxed()))
}

/// Begins a session as BeginSession does, to end with its stream.
async fn begin_session(
    sessions: &Sessions,
    broker: &Broker,
    principal: &Principal,
    begin: pb::BeginSessionRequest,
) -> Result<(Interaction, Answer), Status> {
    if !begin.request_id.is_empty() {
        let problem = "is of no use, as the session ends with its stream: leave it out";
        return Err(status::from_error(Error::invalid("begin_session.request_id", problem)));
    }
    let mut request = Request::new(begin);
    request.extensions_mut().insert(principal.clone());
    let begun = sessions.begin_session(request).await?.into_inner();
    let interaction = Interaction::begun(session(broker, principal, &begun.session_token)?);
    let interaction = interaction.map_err(status::from_failure)?;
    let state = Some(state(&interaction)?);
    Ok((interaction, Answer::BeginSession(pb::BeginSessionResponse { state, ..begun })))
}

/// Goes on with a session that is there.
fn find_session(broker: &Broker, principal: &Principal, token: &str) -> Result<(Interaction, Answer), Status> {
    let interaction = Interaction::found(session(broker, principal, token)?).map_err(status::from_failure)?;
    let state = state(&interaction)?;
    Ok((interaction, Answer::SessionState(state)))
}

fn session(broker: &Broker, principal: &Principal, token: &str) -> Result<Arc<Session>, Status> {
    let token = convert::session_token(token).map_err(status::from_error)?;
    broker.session(principal, &token).map_err(status::from_error)
}

fn state(interaction: &Interaction) -> Result<pb::SessionState, Status> {
    let state = interaction.session().state().map_err(|reason| status::from_error(reason.into()))?;
    Ok(convert::session_state(state))
}

/// The calls that come over a stream, and the session that they are for.
struct Calls {
    broker: Arc<Broker>,
    principal: Principal,
    interaction: Interaction,
    requests: Streaming<pb::InteractRequest>,
    /// When the stream's own gRPC deadline passes.
    grpc_deadline: Option<Instant>,
    /// The stream's.
    span: Span,
}

/// Why a call was not done.
enum Refusal {
    /// The next one may be.
    Failed(Status),
    /// The session has ended, and with it the stream.
    Ended(Status),
}

impl Calls {
    /// The answer to the next call; `None` when their caller has said all.
    ///
    /// # Errors
    /// What ends the stream.
    async fn next(&mut self) -> Result<Option<pb::InteractResponse>, Status> {
        let request = tokio::select! {
            biased;
            reason = self.interaction.ended() => return Err(status::from_error(reason.into())),
            request = self.requests.message() => request?,
        };
        let Some(pb::InteractRequest { request, resume }) = request else { return Ok(None) };
        if resume {
            self.interaction.resume();
        }
        let span = self.call_span(request.as_ref());
        match self.answer(request).instrument(span).await {
            Ok(answer) => Ok(Some(answered(answer))),
            Err(Refusal::Failed(status)) => {
                self.interaction.fail();
                Ok(Some(answered(Answer::Failure(failure(&status)))))
            }
            Err(Refusal::Ended(status)) => Err(status),
        }
    }

    /// The span of a call, in its stream's.
    fn call_span(&self, asked: Option<&Asked>) -> Span {
        if self.span.is_disabled() {
            return Span::none();
        }
        let name = asked.map_or("Interact", name);
        info_span!(
            target: TRACE, parent: &self.span, "message", otel.name = name, { attribute::ERROR_TYPE } = Empty
        )
    }

    /// Does what a call asks.
    async fn answer(&mut self, asked: Option<Asked>) -> Result<Answer, Refusal> {
        let Self { broker, principal, interaction, grpc_deadline, .. } = self;
        let deadline = *grpc_deadline;
        let session = interaction.session();
        let invalid = |field: &str, problem: &str| refused(session, Error::invalid(field, problem));
        let Some(asked) = asked else { return Err(invalid("request", "is absent: say what is to be done").into()) };
        if !token(&asked).is_empty() {
            return Err(invalid("session_token", "is the stream's: leave it out").into());
        }
        // What gives back what is held is done for nothing, and whatever has failed.
        if !matches!(asked, Asked::Rollback(_)) {
            broker.pay(principal).map_err(|error| refused(session, error))?;
            interaction.check()?;
        }
        Ok(match asked {
            Asked::BeginSession(_) | Asked::SessionToken(_) => {
                let problem = "says a second time which session it is for: open another stream for another";
                return Err(invalid("request", problem).into());
            }
            Asked::Execute(request) => {
                let call = convert::execute_call(request, deadline).map_err(|error| refused(session, error))?;
                Answer::Execute(convert::executed(session.execute(call).await?))
            }
            Asked::ExecuteBatch(request) => {
                let (call, runs) = convert::batch_call(request, deadline).map_err(|error| refused(session, error))?;
                let executed = session.execute(call).await;
                let blamed = |failure| Refusal::new(failure, |failure| status::from_batch_failure(failure, &runs));
                Answer::ExecuteBatch(convert::batch_executed(executed.map_err(blamed)?))
            }
            Asked::Commit(pb::CommitRequest { session_token: _ }) => {
                Answer::Commit(convert::committed(session.commit(deadline).await?))
            }
            Asked::Rollback(request) => {
                let answer = service::rollback(session, request, deadline).await?;
                // What had failed is undone, and what comes now was meant to come behind that.
                interaction.resume();
                Answer::Rollback(answer)
            }
            Asked::CreateSavepoint(request) => {
                Answer::CreateSavepoint(service::create_savepoint(session, request, deadline).await?)
            }
            Asked::ReleaseSavepoint(request) => {
                Answer::ReleaseSavepoint(service::release_savepoint(session, request, deadline).await?)
            }
        })
    }
}

impl Refusal {
    fn new(failure: Failure, told: impl FnOnce(Failure) -> Status) -> Self {
        Span::current().record(attribute::ERROR_TYPE, status::reason(&failure.error));
        let refusal = if matches!(failure.error, Error::SessionEnded(_)) { Self::Ended } else { Self::Failed };
        refusal(told(failure))
    }
}

impl From<Failure> for Refusal {
    fn from(failure: Failure) -> Self {
        Self::new(failure, status::from_failure)
    }
}

fn answered(answer: Answer) -> pb::InteractResponse {
    pb::InteractResponse { response: Some(answer) }
}

/// A call's status as a message.
fn failure(status: &Status) -> pb::Failure {
    pb::Failure::decode(status.details()).expect("the details of our statuses are whole google.rpc.Status messages")
}

/// The name of the unary call.
fn name(asked: &Asked) -> &'static str {
    match asked {
        Asked::BeginSession(_) => "BeginSession",
        Asked::SessionToken(_) => "Interact",
        Asked::Execute(_) => "Execute",
        Asked::ExecuteBatch(_) => "ExecuteBatch",
        Asked::Commit(_) => "Commit",
        Asked::Rollback(_) => "Rollback",
        Asked::CreateSavepoint(_) => "CreateSavepoint",
        Asked::ReleaseSavepoint(_) => "ReleaseSavepoint",
    }
}

/// The session's token, if the call has one of its own.
fn token(asked: &Asked) -> &str {
    match asked {
        Asked::BeginSession(_) | Asked::SessionToken(_) => "",
        Asked::Execute(request) => &request.session_token,
        Asked::ExecuteBatch(request) => &request.session_token,
        Asked::Commit(request) => &request.session_token,
        Asked::Rollback(request) => &request.session_token,
        Asked::CreateSavepoint(request) => &request.session_token,
        Asked::ReleaseSavepoint(request) => &request.session_token,
    }
}
