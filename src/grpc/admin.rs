//! `AdminService`: decode, let the operator's call act, encode.
//!
//! Knows no rule of its own about who may call: an [`Operator`] is had from the broker alone. Invariant: the right is
//! asked for before anything of a request is looked at.

use std::sync::Arc;

use tonic::{Request, Response, Status};

use super::pb;
use super::pb::admin_service_server::AdminService;
use super::{auth, convert, status};
use crate::broker::Broker;
use crate::broker::admin::{
    AdminCall, Blocking, EngineOverview, Operator, Page, SessionFilter, SessionOverview, SessionPage, Terminated,
    TerminationReason,
};
use crate::broker::engine::EngineInfo;
use crate::broker::error::{EndReason, Error};
use crate::broker::session::{BackendInfo, Glance, TransactionState};
use crate::broker::token::SessionId;

/// Serves operators.
#[derive(Debug)]
pub struct Admin {
    broker: Arc<Broker>,
}

impl Admin {
    /// The service for `broker`.
    pub fn new(broker: Arc<Broker>) -> Self {
        Self { broker }
    }

    /// Who calls, if it may.
    fn operator<T>(&self, request: &Request<T>, call: AdminCall) -> Result<Operator<'_>, Status> {
        self.broker.operator(auth::principal(request)?, call).map_err(status::from_error)
    }
}

#[tonic::async_trait]
impl AdminService for Admin {
    async fn list_sessions(
        &self,
        request: Request<pb::ListSessionsRequest>,
    ) -> Result<Response<pb::ListSessionsResponse>, Status> {
        let operator = self.operator(&request, AdminCall::ListSessions)?;
        let (filter, page) = page_asked(request.into_inner()).map_err(status::from_error)?;
        Ok(Response::new(session_page(operator.list_sessions(&filter, page).await)))
    }

    async fn terminate_session(
        &self,
        request: Request<pb::TerminateSessionRequest>,
    ) -> Result<Response<pb::TerminateSessionResponse>, Status> {
        let operator = self.operator(&request, AdminCall::TerminateSession)?;
        let pb::TerminateSessionRequest { session_id, reason } = request.into_inner();
        let id = self::session_id(&session_id).map_err(status::from_error)?;
        let reason = TerminationReason::new(reason).map_err(status::from_error)?;
        let terminated = operator.terminate(id, reason).await.map_err(status::from_error)?;
        Ok(Response::new(self::terminated(terminated)))
    }

    async fn list_engines(
        &self,
        request: Request<pb::ListEnginesRequest>,
    ) -> Result<Response<pb::ListEnginesResponse>, Status> {
        let operator = self.operator(&request, AdminCall::ListEngines)?;
        let pb::ListEnginesRequest {} = request.into_inner();
        let engines = operator.list_engines().await.into_iter().map(engine_overview).collect();
        Ok(Response::new(pb::ListEnginesResponse { engines }))
    }

    async fn drain(&self, request: Request<pb::DrainRequest>) -> Result<Response<pb::DrainResponse>, Status> {
        let operator = self.operator(&request, AdminCall::Drain)?;
        let pb::DrainRequest { grace } = request.into_inner();
        let grace = convert::duration("grace", grace).map_err(status::from_error)?;
        let live = operator.drain(grace);
        Ok(Response::new(pb::DrainResponse { live_sessions: u32::try_from(live).unwrap_or(u32::MAX) }))
    }
}

fn page_asked(request: pb::ListSessionsRequest) -> Result<(SessionFilter, Page), Error> {
    use pb::TransactionState as Pb;
    let pb::ListSessionsRequest {
        principal,
        engine,
        profile,
        transaction_state,
        labels,
        idle_longer_than,
        transaction_longer_than,
        session_id,
        page_size,
        page_token,
    } = request;
    let given = |text: String| (!text.is_empty()).then_some(text);
    let id = given(session_id).map(|id| self::session_id(&id)).transpose()?;
    let transaction = match Pb::try_from(transaction_state) {
        Ok(Pb::Unspecified) => None,
        Ok(Pb::None) => Some(TransactionState::None),
        Ok(Pb::Open) => Some(TransactionState::Open),
        Ok(Pb::Failed) => Some(TransactionState::Failed),
        Err(_) => {
            let problem = format!("{transaction_state} is none of its values");
            return Err(Error::invalid("transaction_state", problem));
        }
    };
    let filter = SessionFilter {
        id,
        principal: given(principal),
        engine: given(engine),
        profile: given(profile),
        transaction,
        labels: labels.into_iter().collect(),
        idle_longer_than: convert::duration("idle_longer_than", idle_longer_than)?,
        transaction_longer_than: convert::duration("transaction_longer_than", transaction_longer_than)?,
    };
    let after = given(page_token).map(|token| {
        let problem = "is none of this call's: pass next_page_token unchanged";
        SessionId::parse(&token).ok_or_else(|| Error::invalid("page_token", problem))
    });
    let size = usize::try_from(page_size).ok().filter(|size| *size > 0);
    Ok((filter, Page { size, after: after.transpose()? }))
}

/// Not shown in its error: it may be a session token that was mistaken for one.
fn session_id(text: &str) -> Result<SessionId, Error> {
    SessionId::parse(text).ok_or_else(|| {
        Error::invalid("session_id", "is no session id: pass one as ListSessions or BeginSession shows it")
    })
}

fn session_page(page: SessionPage) -> pb::ListSessionsResponse {
    let SessionPage { sessions, next, blockers_complete } = page;
    pb::ListSessionsResponse {
        sessions: sessions.into_iter().map(session_overview).collect(),
        next_page_token: shown(next),
        blockers_complete,
    }
}

/// A session's id, empty without one.
fn shown(id: Option<SessionId>) -> String {
    id.map(|id| id.to_string()).unwrap_or_default()
}

fn session_overview(overview: SessionOverview) -> pb::SessionOverview {
    let SessionOverview { id, principal, engine, profile, labels, one_shot, glance, blocked_by } = overview;
    let Glance { state, age, idle, transaction_age, statement_age, backend } = glance;
    let (backend_pid, host) = backend.map_or((0, String::new()), |BackendInfo { pid, host }| (pid, host.to_string()));
    pb::SessionOverview {
        session_id: id.to_string(),
        principal: principal.name().to_owned(),
        engine,
        profile,
        labels: labels.into_iter().collect(),
        state: Some(convert::session_state(state)),
        age: convert::to_duration(age),
        idle_time: convert::to_duration(idle),
        transaction_age: transaction_age.and_then(convert::to_duration),
        statement_age: statement_age.and_then(convert::to_duration),
        backend_pid,
        host,
        blocked_by: blocked_by.into_iter().map(blocking).collect(),
        one_shot,
    }
}

fn blocking(blocking: Blocking) -> pb::BlockingBackend {
    let Blocking { backend, session } = blocking;
    pb::BlockingBackend { blocker: Some(convert::blocker(backend)), session_id: shown(session) }
}

fn terminated(terminated: Terminated) -> pb::TerminateSessionResponse {
    match terminated {
        Terminated::Now { was, is_over } => pb::TerminateSessionResponse {
            session: Some(session_overview(*was)),
            end_reason: convert::end_reason(EndReason::Terminated).into(),
            is_over,
        },
        Terminated::Before(reason) => pb::TerminateSessionResponse {
            session: None,
            end_reason: convert::end_reason(reason).into(),
            is_over: false,
        },
    }
}

fn engine_overview(overview: EngineOverview) -> pb::EngineOverview {
    let EngineOverview { info, unreachable, is_default, profiles } = overview;
    let EngineInfo { name, database, user, server_version, pool } = info;
    pb::EngineOverview {
        name,
        database,
        user,
        server_version,
        pool: Some(convert::pool_statistics(pool)),
        reachable: unreachable.is_none(),
        unreachable_cause: unreachable.unwrap_or_default(),
        is_default,
        profiles,
    }
}
