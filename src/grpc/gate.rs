//! The gate that every call comes through: who calls, whether there is room for the call, and how long its request may
//! take to arrive.
//!
//! Health checks come through for anybody: probes have no credentials, and learn nothing. Invariants: no service sees a
//! call without a principal; a panic ends its own call alone.

use std::panic::AssertUnwindSafe;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use http::{HeaderMap, Request, Response};
use http_body::{Body as HttpBody, Frame, SizeHint};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, Sleep, sleep_until};
use tonic::body::Body;
use tonic::{Code, Status};
use tonic_types::StatusExt;
use tower_layer::Layer;
use tower_service::Service;
use tracing::field::display;
use tracing::{Instrument, Span, info};

use super::framing::Framing;
use super::{method, status};
use crate::acceptor::{OpenCall, Peer};
use crate::broker::admin::AUDIT;
use crate::broker::error::{Error, Exhausted};
use crate::broker::observer::{Event, Observer};
use crate::broker::principal::Principal;
use crate::broker::{Admitted, Broker};
use crate::identity::{CurrentAuthenticator, authorization};
use crate::names::attribute;
use crate::seldom::Seldom;

/// How long a request may take to arrive: the largest comes in it at five megabits a second.
pub(super) const ARRIVAL_TIMEOUT: Duration = Duration::from_secs(30);

/// How much of requests may be on its way at a time, all together: thirty-two of the largest.
const ARRIVING_KIB_MAX: usize = 512 * 1024;

/// How much of an answer is handed on at a time. A caller that takes none of it holds back the rest here, where its call is
/// still counted.
const PIECE_BYTES: usize = 64 * 1024;

/// The one call whose request may pause: its caller sends what others give it.
const COPY_IN: &str = "/sessionbroker.v1.BulkService/CopyIn";

/// The one call that is many: each of its messages has its own time and room to arrive in.
const INTERACT: &str = "/sessionbroker.v1.SessionService/Interact";

/// Whose answers go on: they are counted until they begin, and their sessions and listeners from there on.
const STREAMS: [&str; 5] = [
    "/sessionbroker.v1.BulkService/CopyOut",
    "/sessionbroker.v1.NotificationService/Listen",
    "/sessionbroker.v1.SessionService/Attach",
    "/sessionbroker.v1.SessionService/ExecuteStream",
    INTERACT,
];

/// The calls whose refusals the audit log has.
const BEGIN_SESSION: &str = "/sessionbroker.v1.SessionService/BeginSession";
const OPERATORS: &str = "/sessionbroker.v1.AdminService/";

/// Those that give back what is held. They are let in whatever else is at work.
const GIVING_BACK: [&str; 3] = [
    "/sessionbroker.v1.SessionService/Cancel",
    "/sessionbroker.v1.SessionService/Close",
    "/sessionbroker.v1.SessionService/Rollback",
];

/// Whose calls need no principal.
const OPEN_TO_ALL: &str = "/grpc.health.v1.Health/";

/// Lets calls in.
#[derive(Debug, Clone)]
pub struct Gate {
    broker: Arc<Broker>,
    authenticator: CurrentAuthenticator,
    /// Room for what is on its way.
    arriving: Arc<Semaphore>,
    strangers: Arc<Mutex<Seldom>>,
}

impl Gate {
    /// The gate of `broker`.
    pub fn new(broker: Arc<Broker>, authenticator: CurrentAuthenticator) -> Self {
        let (arriving, strangers) = (Arc::new(Semaphore::new(ARRIVING_KIB_MAX)), Arc::default());
        Self { broker, authenticator, arriving, strangers }
    }

    async fn admit(
        &self,
        peer: Option<&Peer>,
        path: &str,
        headers: &HeaderMap,
    ) -> Result<(Principal, Admitted), Status> {
        let refused = |principal: Option<&Principal>, error: Error| {
            self.note_refusal(peer, path, principal, &error);
            status::from_error(error)
        };
        let principal = self.authenticate(peer, headers).await.map_err(|error| refused(None, error))?;
        let is_spared = path.starts_with(OPERATORS) || GIVING_BACK.contains(&path);
        let admitted = if is_spared { self.broker.admit_spared(&principal) } else { self.broker.admit(&principal) };
        match admitted {
            Ok(admitted) => Ok((principal, admitted)),
            Err(error) => Err(refused(Some(&principal), error)),
        }
    }

    fn note_refusal(&self, peer: Option<&Peer>, path: &str, principal: Option<&Principal>, error: &Error) {
        let rpc = path.strip_prefix(OPERATORS);
        if path != BEGIN_SESSION && path != INTERACT && rpc.is_none() {
            return;
        }
        // Anybody can make these lines.
        let times = match principal {
            Some(_) => Some(1),
            None => self.strangers.lock().unwrap_or_else(PoisonError::into_inner).count(Instant::now()),
        };
        let Some(times) = times else { return };
        let (principal, address) = (principal.map(display), peer.and_then(Peer::address).map(display));
        let reason = status::reason(error);
        match rpc {
            Some(rpc) => {
                info!(target: AUDIT, rpc, principal, address, allowed = false, reason, times, "operator's call");
            }
            None => {
                info!(target: AUDIT, event = "session.refused", principal, address, reason, times, "session refused");
            }
        }
    }

    async fn authenticate(&self, peer: Option<&Peer>, headers: &HeaderMap) -> Result<Principal, Error> {
        let certificate = peer.and_then(Peer::certificate);
        let authenticator = self.authenticator.get();
        let authenticated = async { authenticator.authenticate(certificate, authorization(headers)?).await };
        authenticated.await.map_err(|why| {
            // Nothing is wrong then with what the caller shows.
            let error = if why.is_temporary() { Error::IdentityUnavailable } else { Error::Unauthenticated };
            error(why.to_string())
        })
    }
}

impl<S> Layer<S> for Gate {
    type Service = Gated<S>;

    fn layer(&self, inner: S) -> Gated<S> {
        Gated { gate: self.clone(), inner }
    }
}

/// Has a connection in use while a call goes on over it, where there is no gate.
#[derive(Debug, Clone)]
pub(super) struct Ungated;

impl<S> Layer<S> for Ungated {
    type Service = Counted<S>;

    fn layer(&self, inner: S) -> Counted<S> {
        Counted(inner)
    }
}

/// Services whose calls are counted by their connections.
#[derive(Debug, Clone)]
pub(super) struct Counted<S>(S);

impl<S> Service<Request<Body>> for Counted<S>
where
    S: Service<Request<Body>, Response = Response<Body>>,
    S::Future: Send + 'static,
    S::Error: 'static,
{
    type Response = Response<Body>;
    type Error = S::Error;
    type Future = BoxFuture<'static, Result<Response<Body>, S::Error>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.0.poll_ready(context)
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let open_call = request.extensions().get::<Arc<Peer>>().map(Peer::begin_call);
        let answer = self.0.call(request);
        Box::pin(async move { Ok(answer.await?.map(|body| Body::new(Answering::new(body, None, open_call, None)))) })
    }
}

/// Services behind the gate.
#[derive(Debug, Clone)]
pub struct Gated<S> {
    gate: Gate,
    inner: S,
}

impl<S> Service<Request<Body>> for Gated<S>
where
    S: Service<Request<Body>, Response = Response<Body>> + Clone + Send + 'static,
    S::Future: Send,
{
    type Response = Response<Body>;
    type Error = S::Error;
    type Future = BoxFuture<'static, Result<Response<Body>, S::Error>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, mut request: Request<Body>) -> Self::Future {
        // The one that is ready goes along; its copy stays.
        let copy = self.inner.clone();
        let mut inner = std::mem::replace(&mut self.inner, copy);
        let gate = self.gate.clone();
        let peer = request.extensions().get::<Arc<Peer>>().cloned();
        let open_call = peer.as_ref().map(Peer::begin_call);
        let told = Told::begin(gate.broker.observer(), &request);
        let span = told.span.clone();
        let answering = async move {
            let admitted = if request.uri().path().starts_with(OPEN_TO_ALL) {
                None
            } else {
                match gate.admit(peer.as_deref(), request.uri().path(), request.headers()).await {
                    Ok((principal, admitted)) => {
                        request.extensions_mut().insert(principal);
                        Some(admitted)
                    }
                    Err(status) => return Ok(told.answered(status.into_http(), None, open_call)),
                }
            };
            let path = request.uri().path();
            let is_stream = STREAMS.contains(&path);
            let arrival = match path {
                COPY_IN => None,
                INTERACT => Some(Arrival::of_messages(gate.arriving)),
                _ => Some(Arrival::new(gate.arriving)),
            };
            let request = request.map(|body| Body::new(Arriving { body, arrival }));
            let response = match AssertUnwindSafe(inner.call(request)).catch_unwind().await {
                Ok(response) => response?,
                Err(_) => status::from_error(Error::internal("a call panicked")).into_http(),
            };
            Ok(told.answered(response, admitted.filter(|_| !is_stream), open_call))
        };
        Box::pin(answering.instrument(span))
    }
}

/// A call, as it is told of once its answer is over. Dropped before, it was left.
struct Told {
    observer: Arc<dyn Observer>,
    method: &'static str,
    began: Instant,
    span: Span,
    code: Code,
    /// What it failed with, in a word.
    reason: Option<String>,
}

impl Told {
    fn begin(observer: &Arc<dyn Observer>, request: &Request<Body>) -> Self {
        let method = method::of_path(request.uri().path());
        let header = |name: &str| Some(request.headers().get(name)?.to_str().ok()?.to_owned());
        let span = observer.call(method, &header);
        Self { observer: observer.clone(), method, began: Instant::now(), span, code: Code::Cancelled, reason: None }
    }

    /// The answer, which tells the status now or at its end.
    fn answered(
        mut self,
        response: Response<Body>,
        admitted: Option<Admitted>,
        open_call: Option<OpenCall>,
    ) -> Response<Body> {
        self.hear(response.headers());
        response.map(|body| Body::new(Answering::new(body, admitted, open_call, Some(self))))
    }

    fn hear(&mut self, headers: &HeaderMap) {
        if let Some(code) = method::status_of(headers) {
            self.code = code;
            if code != Code::Ok {
                let status = Status::from_header_map(headers);
                self.reason = status.and_then(|status| Some(status.get_details_error_info()?.reason));
            }
        }
    }
}

impl Drop for Told {
    fn drop(&mut self) {
        let Self { observer, method, began, span, code, reason } = self;
        let status = method::name(*code);
        let error = (*code != Code::Ok).then(|| reason.as_deref().unwrap_or(status));
        if !span.is_disabled() {
            span.record(attribute::RPC_STATUS, status);
            if let Some(error) = error {
                span.record(attribute::ERROR_TYPE, error);
            }
            if method::is_failure(*code) {
                span.record("otel.status_code", "ERROR");
            }
            // It lasts until it is last left, which may have been when the answer began.
            span.in_scope(|| ());
        }
        observer.observe(Event::CallEnded { method, status, error, took: began.elapsed() });
    }
}

/// A request on its way.
struct Arriving {
    body: Body,
    /// `None` for one that may take its time: its caller sends what others give it.
    arrival: Option<Arrival>,
}

/// The bounds of a request's arrival.
struct Arrival {
    /// Of a call that is many.
    framing: Option<Framing>,
    deadline: Instant,
    /// Set while it is waited for.
    patience: Option<Pin<Box<Sleep>>>,
    arriving: Arc<Semaphore>,
    /// How much of it has come.
    bytes: usize,
    /// The room that it takes.
    room: Option<OwnedSemaphorePermit>,
}

impl Arrival {
    fn new(arriving: Arc<Semaphore>) -> Self {
        let deadline = Instant::now() + ARRIVAL_TIMEOUT;
        Self { framing: None, deadline, patience: None, arriving, bytes: 0, room: None }
    }

    /// Of a call that is many.
    fn of_messages(arriving: Arc<Semaphore>) -> Self {
        Self { framing: Some(Framing::default()), ..Self::new(arriving) }
    }

    /// Ready when it has taken too long.
    fn poll_late(&mut self, context: &mut Context<'_>) -> Poll<Status> {
        let deadline = match &self.framing {
            // The next message may take its time to begin.
            Some(framing) if framing.begun() == 0 => return Poll::Pending,
            // It is waited for from now on: what came before it may have been long at work.
            Some(_) => Instant::now() + ARRIVAL_TIMEOUT,
            None => self.deadline,
        };
        let patience = self.patience.get_or_insert_with(|| Box::pin(sleep_until(deadline)));
        patience.as_mut().poll(context).map(|()| {
            let problem = format!("took too long to arrive: more than {} s", ARRIVAL_TIMEOUT.as_secs());
            status::from_error(Error::invalid("request", problem))
        })
    }

    /// Finds room for what has come. The beginning of each call has its own: small ones are let in when all else is full.
    fn take(&mut self, data: &[u8]) -> Result<(), Status> {
        const OWN_BYTES: usize = 64 * 1024;
        let mut bytes = data.len();
        if let Some(framing) = &mut self.framing
            && framing.follow(data)
        {
            bytes = framing.begun();
            // Messages that are complete have been handed on.
            (self.bytes, self.room, self.patience) = (0, None, None);
        }
        let taken = self.bytes.saturating_sub(OWN_BYTES).div_ceil(1024);
        self.bytes += bytes;
        let more = self.bytes.saturating_sub(OWN_BYTES).div_ceil(1024) - taken;
        if more == 0 {
            return Ok(());
        }
        let kib = u32::try_from(more).unwrap_or(u32::MAX);
        let room = self
            .arriving
            .clone()
            .try_acquire_many_owned(kib)
            .map_err(|_| status::from_error(Error::Exhausted(Exhausted::Requests(ARRIVING_KIB_MAX / 1024))))?;
        match &mut self.room {
            None => self.room = Some(room),
            Some(taken) => taken.merge(room),
        }
        Ok(())
    }
}

impl HttpBody for Arriving {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let Self { body, arrival } = &mut *self;
        let frame = Pin::new(body).poll_frame(context);
        let Some(arrival) = arrival else { return frame };
        match frame {
            Poll::Pending => arrival.poll_late(context).map(|late| Some(Err(late))),
            Poll::Ready(Some(Ok(frame))) => {
                let taken = arrival.take(frame.data_ref().map_or(&[][..], |data| &data[..]));
                Poll::Ready(Some(taken.map(|()| frame)))
            }
            // A caller's leaving is not to look like the end of its calls, as CANCELLED does.
            Poll::Ready(Some(Err(_))) if arrival.framing.is_some() => {
                Poll::Ready(Some(Err(Status::unavailable("the caller has left"))))
            }
            over @ Poll::Ready(_) => over,
        }
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// An answer on its way, piece by piece. Its connection is in use for as long, and its call is at work.
struct Answering {
    body: Body,
    /// Of a part that is handed on.
    rest: Bytes,
    _admitted: Option<Admitted>,
    _open_call: Option<OpenCall>,
    told: Option<Told>,
}

impl Answering {
    fn new(body: Body, admitted: Option<Admitted>, open_call: Option<OpenCall>, told: Option<Told>) -> Self {
        Self { body, rest: Bytes::new(), _admitted: admitted, _open_call: open_call, told }
    }
}

impl HttpBody for Answering {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        if self.rest.is_empty() {
            let frame = match ready!(Pin::new(&mut self.body).poll_frame(context)) {
                Some(Ok(frame)) => frame,
                over => return Poll::Ready(over),
            };
            match frame.into_data() {
                Ok(data) if data.len() > PIECE_BYTES => self.rest = data,
                Ok(data) => return Poll::Ready(Some(Ok(Frame::data(data)))),
                Err(frame) => {
                    if let Some((told, trailers)) = self.told.as_mut().zip(frame.trailers_ref()) {
                        told.hear(trailers);
                    }
                    return Poll::Ready(Some(Ok(frame)));
                }
            }
        }
        let length = self.rest.len().min(PIECE_BYTES);
        Poll::Ready(Some(Ok(Frame::data(self.rest.split_to(length)))))
    }

    fn is_end_stream(&self) -> bool {
        self.rest.is_empty() && self.body.is_end_stream()
    }
}
