//! The gate that every call comes through: who calls, whether there is room for the call, and how long its request may
//! take to arrive.
//!
//! Health checks come through for anybody: probes have no credentials, and learn nothing. Invariants: no service sees a
//! call without a principal; a panic ends its own call alone.

use std::panic::AssertUnwindSafe;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use http::header::AUTHORIZATION;
use http::{HeaderMap, Request, Response};
use http_body::{Body as HttpBody, Frame, SizeHint};
use tokio::time::{Sleep, sleep};
use tonic::Status;
use tonic::body::Body;
use tower_layer::Layer;
use tower_service::Service;
use tracing::field::display;
use tracing::info;

use super::status;
use crate::acceptor::{OpenCall, Peer};
use crate::broker::admin::AUDIT;
use crate::broker::error::Error;
use crate::broker::principal::Principal;
use crate::broker::{Admitted, Broker};
use crate::identity::CurrentAuthenticator;

/// How long a request may take to go on arriving. What a caller has to send it has, and a slow line moves meanwhile.
const ARRIVAL_TIMEOUT: Duration = Duration::from_secs(30);

/// The one call whose request may pause: its caller sends what others give it.
const COPY_IN: &str = "/sessionbroker.v1.BulkService/CopyIn";

/// The call whose refusals the audit log has.
const BEGIN_SESSION: &str = "/sessionbroker.v1.SessionService/BeginSession";

/// Whose calls need no principal.
const OPEN_TO_ALL: &str = "/grpc.health.v1.Health/";

/// Lets calls in.
#[derive(Debug, Clone)]
pub struct Gate {
    broker: Arc<Broker>,
    authenticator: CurrentAuthenticator,
}

impl Gate {
    /// The gate of `broker`.
    pub fn new(broker: Arc<Broker>, authenticator: CurrentAuthenticator) -> Self {
        Self { broker, authenticator }
    }

    async fn admit(
        &self,
        peer: Option<&Peer>,
        path: &str,
        headers: &HeaderMap,
    ) -> Result<(Principal, Admitted), Status> {
        let refused = |principal: Option<&Principal>, error: Error| {
            if path == BEGIN_SESSION {
                let (principal, address) = (principal.map(display), peer.and_then(Peer::address).map(display));
                let reason = status::reason(&error);
                info!(target: AUDIT, event = "session.refused", principal, address, reason, "session refused");
            }
            status::from_error(error)
        };
        let principal = self.authenticate(peer, headers).await.map_err(|error| refused(None, error))?;
        match self.broker.admit(&principal) {
            Ok(admitted) => Ok((principal, admitted)),
            Err(error) => Err(refused(Some(&principal), error)),
        }
    }

    async fn authenticate(&self, peer: Option<&Peer>, headers: &HeaderMap) -> Result<Principal, Error> {
        let certificate = peer.and_then(Peer::certificate);
        let mut credentials = headers.get_all(AUTHORIZATION).iter();
        let authorization = credentials.next().map(http::HeaderValue::as_bytes);
        if credentials.next().is_some() {
            return Err(Error::Unauthenticated("there is more than one authorization header: send one".into()));
        }
        let authenticator = self.authenticator.get();
        authenticator.authenticate(certificate, authorization).await.map_err(|why| {
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
        Box::pin(async move {
            let admitted = if request.uri().path().starts_with(OPEN_TO_ALL) {
                None
            } else {
                match gate.admit(peer.as_deref(), request.uri().path(), request.headers()).await {
                    Ok((principal, admitted)) => {
                        request.extensions_mut().insert(principal);
                        Some(admitted)
                    }
                    Err(status) => return Ok(status.into_http()),
                }
            };
            let goes_on = request.uri().path() == COPY_IN;
            let request = request.map(|body| Body::new(Arriving { body, goes_on, patience: None }));
            let response = match AssertUnwindSafe(inner.call(request)).catch_unwind().await {
                Ok(response) => response?,
                Err(_) => return Ok(status::from_error(Error::internal("a call panicked")).into_http()),
            };
            // Its answer has begun: what it took is another call's to take.
            drop(admitted);
            Ok(response.map(|body| Body::new(Answering { body, _open_call: open_call })))
        })
    }
}

/// A request on its way. It fails when it stops arriving.
struct Arriving {
    body: Body,
    /// It has begun, and may take its time from here on: its caller sends what others give it.
    goes_on: bool,
    /// Set while nothing arrives.
    patience: Option<Pin<Box<Sleep>>>,
}

impl HttpBody for Arriving {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let this = &mut *self;
        if let Poll::Ready(frame) = Pin::new(&mut this.body).poll_frame(context) {
            this.patience = None;
            return Poll::Ready(frame);
        }
        if this.goes_on {
            return Poll::Pending;
        }
        let patience = this.patience.get_or_insert_with(|| Box::pin(sleep(ARRIVAL_TIMEOUT)));
        patience.as_mut().poll(context).map(|()| {
            let seconds = ARRIVAL_TIMEOUT.as_secs();
            let problem = format!("stopped arriving: nothing of it came for {seconds} s");
            Some(Err(status::from_error(Error::invalid("request", problem))))
        })
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// An answer on its way. Its connection is in use for as long.
struct Answering {
    body: Body,
    _open_call: Option<OpenCall>,
}

impl HttpBody for Answering {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        Pin::new(&mut self.body).poll_frame(context)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
