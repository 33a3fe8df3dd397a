//! The operations port over HTTP: probes, metrics, and what operators look at with a browser.
//!
//! The only place that says axum. It knows no gRPC, whose health checks are answered on the same port. Invariants: what
//! tells anything of a session asks first who looks; nothing here is told of another site's page, or does what it asks.

mod access;
mod console;
mod render;

use std::fmt;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::extract::State;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use http::header::{CACHE_CONTROL, CONTENT_TYPE, RETRY_AFTER, WWW_AUTHENTICATE, X_CONTENT_TYPE_OPTIONS};
use http::{HeaderValue, StatusCode};
use serde_json::{Value, json};
use tokio::sync::{Semaphore, watch};
use tokio::task::spawn_blocking;
use tokio_util::sync::CancellationToken;

use crate::broker::Broker;
use crate::identity::CurrentAuthenticator;
use crate::seldom::Seldom;

/// Routes of HTTP, to be merged with those of gRPC.
pub type Router = axum::Router;

/// Prints the metrics in Prometheus's text format, or says why it cannot. It may take its time.
pub type Metrics = Arc<dyn Fn() -> Result<String, String> + Send + Sync>;

/// How many watch at a time: every operator there is, with a browser at home. Each takes a connection.
const WATCHES_MAX: usize = 16;

/// When to come again that finds no place, or cannot be told who it is.
const COME_AGAIN: Duration = Duration::from_secs(5);

/// What the operations port answers, beside gRPC health checks.
pub struct Operations {
    broker: Arc<Broker>,
    authenticator: CurrentAuthenticator,
    metrics: Metrics,
    stop: CancellationToken,
}

impl Operations {
    /// For `broker`; streams end when `stop` is cancelled.
    pub fn new(
        broker: Arc<Broker>,
        authenticator: CurrentAuthenticator,
        metrics: Metrics,
        stop: CancellationToken,
    ) -> Self {
        Self { broker, authenticator, metrics, stop }
    }

    /// Adds its routes to `others`, and for all else an answer that there is nothing. `ready` is what probes hear.
    pub fn routes(self, others: Router, ready: watch::Receiver<bool>) -> Router {
        let Self { broker, authenticator, metrics, stop } = self;
        let site = Site {
            broker,
            authenticator,
            metrics,
            ready,
            stop,
            strangers: Mutex::default(),
            places: Arc::new(Semaphore::new(WATCHES_MAX)),
            scrape: Arc::new(Semaphore::new(1)),
        };
        let own: Router = axum::Router::new()
            .route("/healthz", get(async || "alive\n"))
            .route("/readyz", get(async |State(site): State<Arc<Site>>| site.readiness()))
            .route("/metrics", get(metrics_text))
            .route("/debug/sessions", get(console::debug_sessions))
            .route("/console", get(async || console::page()))
            .route("/console/events", get(console::events))
            .route("/console/sessions/{id}/terminate", post(console::terminate))
            .with_state(Arc::new(site));
        others.merge(own).fallback(async || StatusCode::NOT_FOUND)
    }
}

impl fmt::Debug for Operations {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Operations").field("broker", &self.broker).finish_non_exhaustive()
    }
}

/// What all routes share.
struct Site {
    broker: Arc<Broker>,
    authenticator: CurrentAuthenticator,
    metrics: Metrics,
    ready: watch::Receiver<bool>,
    stop: CancellationToken,
    /// Refusals that anybody can cause.
    strangers: Mutex<Seldom>,
    /// Room for those who watch.
    places: Arc<Semaphore>,
    /// Metrics are printed for one at a time: they are the same for all, and anybody may ask.
    scrape: Arc<Semaphore>,
}

impl Site {
    fn is_ready(&self) -> bool {
        *self.ready.borrow()
    }

    fn readiness(&self) -> (StatusCode, &'static str) {
        if self.is_ready() { (StatusCode::OK, "ready\n") } else { (StatusCode::SERVICE_UNAVAILABLE, "not ready\n") }
    }
}

async fn metrics_text(State(site): State<Arc<Site>>) -> Response {
    let turn = site.scrape.clone().acquire_owned().await.expect("the semaphore is never closed");
    let printing = spawn_blocking(move || {
        // The turn goes along: who asks and leaves does not have the next begin beside this.
        let _turn = turn;
        (site.metrics)()
    });
    match printing.await {
        Ok(Ok(text)) => ([(CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], text).into_response(),
        Ok(Err(cause)) => (StatusCode::SERVICE_UNAVAILABLE, format!("{cause}\n")).into_response(),
        Err(_) => (StatusCode::INTERNAL_SERVER_ERROR, "printing the metrics panicked\n").into_response(),
    }
}

/// An answer that says what is wrong, to people and their scripts.
#[derive(Debug)]
struct Problem {
    status: StatusCode,
    error: String,
}

impl Problem {
    fn new(status: StatusCode, error: impl Into<String>) -> Self {
        Self { status, error: error.into() }
    }
}

impl IntoResponse for Problem {
    fn into_response(self) -> Response {
        let Self { status, error } = self;
        let mut response = (status, data(&json!({ "error": error }))).into_response();
        let headers = response.headers_mut();
        if status == StatusCode::UNAUTHORIZED {
            headers.insert(WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        if status == StatusCode::SERVICE_UNAVAILABLE {
            headers.insert(RETRY_AFTER, HeaderValue::from(COME_AGAIN.as_secs()));
        }
        response
    }
}

/// Data for those who asked, and for no cache.
fn data(value: &Value) -> Response {
    let headers =
        [(CONTENT_TYPE, "application/json"), (CACHE_CONTROL, "no-store"), (X_CONTENT_TYPE_OPTIONS, "nosniff")];
    (headers, value.to_string()).into_response()
}
