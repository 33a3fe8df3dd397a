//! The operators' console: a page, what it is told once a second, and the one thing that it can do.
//!
//! The page itself holds nothing and is for anybody; what it shows and does, it asks for with its reader's credential.
//! Invariants: a stream hands on a snapshot when its reader takes it, and keeps none; it ends by itself, so that who
//! reads it proves anew who that is.

use std::convert::Infallible;
use std::sync::{Arc, LazyLock, Mutex, PoisonError};
use std::time::Duration;

use axum::body::{Body, to_bytes};
use axum::extract::{Path, Request, State};
use axum::response::{IntoResponse, Response};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use futures_util::stream::{self, StreamExt};
use http::header::{
    CACHE_CONTROL, CONTENT_SECURITY_POLICY, CONTENT_TYPE, HeaderName, REFERRER_POLICY, X_CONTENT_TYPE_OPTIONS,
    X_FRAME_OPTIONS,
};
use http::{HeaderValue, StatusCode};
use ring::digest;
use serde_json::{Value, json};
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::{Instant, sleep_until, timeout};
use tokio_util::task::AbortOnDropHandle;

use super::{Problem, Site, WATCHES_MAX, data, render};
use crate::broker::admin::watch::{Unseen, Watch};
use crate::broker::admin::{AdminCall, Terminated, TerminationReason};
use crate::broker::token::SessionId;

/// The page, with its style and its script.
const PAGE: &str = include_str!("console.html");

/// How long a stream is read with one proof of who reads it: a token that is good no more is found out within. It is
/// shorter than the half hour that a connection lives on when it is to be closed.
const STREAM_AGE_MAX: Duration = Duration::from_mins(15);

/// How long a request may take to arrive, and how large it may be: a reason of 256 bytes, each of them escaped.
const ARRIVAL_TIMEOUT: Duration = Duration::from_secs(10);
const REQUEST_BYTES_MAX: usize = 4096;

/// What the page may do: run its own script with its own style, and ask where it came from. Nothing can be loaded from
/// elsewhere, nothing put into it as markup, and no other page can hold it.
static POLICY: LazyLock<HeaderValue> = LazyLock::new(|| {
    let (script, style) = (source("script"), source("style"));
    let policy = format!(
        "default-src 'none'; script-src {script}; style-src {style}; img-src data:; connect-src 'self'; \
         base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'"
    );
    HeaderValue::try_from(policy).expect("hashes in base64 are plain text")
});

/// The page.
pub(super) fn page() -> Response {
    let headers = [
        (CONTENT_SECURITY_POLICY, POLICY.clone()),
        (CONTENT_TYPE, HeaderValue::from_static("text/html; charset=utf-8")),
        (CACHE_CONTROL, HeaderValue::from_static("no-cache")),
        (X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff")),
        (X_FRAME_OPTIONS, HeaderValue::from_static("DENY")),
        (REFERRER_POLICY, HeaderValue::from_static("no-referrer")),
        (HeaderName::from_static("cross-origin-opener-policy"), HeaderValue::from_static("same-origin")),
        (HeaderName::from_static("cross-origin-resource-policy"), HeaderValue::from_static("same-origin")),
    ];
    (headers, PAGE).into_response()
}

/// Sessions, engines and endings, now. Redacted: no labels, SQL, values or tokens.
pub(super) async fn debug_sessions(State(site): State<Arc<Site>>, request: Request) -> Result<Response, Problem> {
    let (parts, _) = request.into_parts();
    let operator = site.operator(&parts, AdminCall::DebugSessions).await?;
    let snapshot = operator.look().await;
    Ok(data(&render::snapshot(&snapshot, site.is_ready())))
}

/// The same as server-sent events, once a second.
pub(super) async fn events(State(site): State<Arc<Site>>, request: Request) -> Result<Response, Problem> {
    let (parts, _) = request.into_parts();
    let operator = site.operator(&parts, AdminCall::WatchSessions).await?;
    let place = site.places.clone().try_acquire_owned().map_err(|_| {
        let error = format!("{WATCHES_MAX} streams are open already: close one, or come again");
        Problem::new(StatusCode::SERVICE_UNAVAILABLE, error)
    })?;
    let (watch, until) = (operator.watch(), Instant::now() + STREAM_AGE_MAX);
    let place = Arc::new(Mutex::new(Some(place)));
    let held = Arc::downgrade(&place);
    let timer = AbortOnDropHandle::new(tokio::spawn(async move {
        sleep_until(until).await;
        if let Some(place) = held.upgrade() {
            place.lock().unwrap_or_else(PoisonError::into_inner).take();
        }
    }));
    let watching = Watching { watch, until, site: site.clone(), _place: place, _timer: timer };
    let events = stream::unfold(Some(watching), async |watching: Option<Watching>| {
        let mut watching = watching?;
        Some(match watching.snapshot().await {
            Ok(snapshot) => (event("snapshot", &snapshot), Some(watching)),
            Err(why) => (event("end", &json!({ "reason": why.name() })), None),
        })
    });
    let headers =
        [(CONTENT_TYPE, "text/event-stream"), (CACHE_CONTROL, "no-store"), (X_CONTENT_TYPE_OPTIONS, "nosniff")];
    Ok((headers, Body::from_stream(events.map(Ok::<_, Infallible>))).into_response())
}

/// Ends a session.
pub(super) async fn terminate(
    State(site): State<Arc<Site>>,
    Path(id): Path<String>,
    request: Request,
) -> Result<Response, Problem> {
    let (parts, body) = request.into_parts();
    let operator = site.operator(&parts, AdminCall::TerminateSession).await?;
    let reason = reason(body).await?;
    // Not shown in its error: it may be a session token that was mistaken for one.
    let id = SessionId::parse(&id).ok_or_else(|| {
        Problem::new(StatusCode::BAD_REQUEST, "id: is no session id: pass one as /debug/sessions shows it")
    })?;
    let unknown = |_| Problem::new(StatusCode::NOT_FOUND, "no such session: it never was, or ended too long ago");
    let answer = match operator.terminate(id, reason).await.map_err(unknown)? {
        Terminated::Now { was: _, is_over } => {
            json!({ "id": id.to_string(), "terminated": true, "is_over": is_over, "end_reason": "TERMINATED" })
        }
        Terminated::Before(reason) => {
            json!({ "id": id.to_string(), "terminated": false, "is_over": true, "end_reason": reason.name() })
        }
    };
    Ok(data(&answer))
}

/// Why a session is to be ended: `{"reason": "..."}`.
async fn reason(body: Body) -> Result<TerminationReason, Problem> {
    let invalid = |error: String| Problem::new(StatusCode::BAD_REQUEST, error);
    let arriving = timeout(ARRIVAL_TIMEOUT, to_bytes(body, REQUEST_BYTES_MAX));
    let arrived = arriving.await.map_err(|_| {
        let error = format!("body: took longer than {} s to arrive: send it again", ARRIVAL_TIMEOUT.as_secs());
        Problem::new(StatusCode::REQUEST_TIMEOUT, error)
    })?;
    let problem = format!("body: must be JSON of at most {REQUEST_BYTES_MAX} bytes: {{\"reason\": \"...\"}}");
    let request: Option<Value> = arrived.ok().and_then(|bytes| serde_json::from_slice(&bytes).ok());
    let reason = request.as_ref().and_then(|request| request.get("reason")).and_then(Value::as_str);
    let reason = reason.ok_or_else(|| invalid(problem))?;
    TerminationReason::new(reason.to_owned()).map_err(|error| invalid(error.to_string()))
}

/// Somebody who watches, and its place.
struct Watching {
    watch: Watch,
    until: Instant,
    site: Arc<Site>,
    /// Its place, which the timer takes away at that time: nothing else looks after a reader that takes nothing.
    _place: Arc<Mutex<Option<OwnedSemaphorePermit>>>,
    _timer: AbortOnDropHandle<()>,
}

/// Why a stream ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    /// The broker stops.
    Stopped,
    /// Its reader is to prove anew who it is.
    Reauthenticate,
    /// Its reader is an operator no more.
    Forbidden,
    /// A defect of ours, which is logged.
    Failed,
}

impl End {
    fn name(self) -> &'static str {
        match self {
            Self::Stopped => "STOPPED",
            Self::Reauthenticate => "REAUTHENTICATE",
            Self::Forbidden => "FORBIDDEN",
            Self::Failed => "FAILED",
        }
    }
}

impl Watching {
    /// The next snapshot, or why there is none.
    async fn snapshot(&mut self) -> Result<Value, End> {
        let Self { watch, until, site, .. } = self;
        tokio::select! {
            biased;
            () = site.stop.cancelled() => Err(End::Stopped),
            () = sleep_until(*until) => Err(End::Reauthenticate),
            seen = watch.snapshot() => match seen {
                Ok(snapshot) => Ok(render::snapshot(&snapshot, site.is_ready())),
                Err(Unseen::NotGranted) => Err(End::Forbidden),
                Err(Unseen::LookoutDied) => Err(End::Failed),
            },
        }
    }
}

/// An event as a stream has it. JSON has no line ends in it.
fn event(name: &str, data: &Value) -> String {
    format!("event: {name}\ndata: {data}\n\n")
}

/// The source expression that lets the page's own element of that name do what it does (CSP level 3, section 2.3.1).
fn source(element: &str) -> String {
    let (_, rest) = PAGE.split_once(&format!("<{element}>")).expect("the page has one of each");
    let (content, _) = rest.split_once(&format!("</{element}>")).expect("the page closes what it opens");
    let digest = digest::digest(&digest::SHA256, content.as_bytes());
    format!("'sha256-{}'", STANDARD.encode(digest))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_page_has_one_script_and_one_style_and_neither_markup_nor_addresses_in_them() {
        for element in ["script", "style"] {
            assert_eq!(PAGE.matches(&format!("<{element}")).count(), 1, "{element}");
        }
        for word in ["innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "http://", "https://"] {
            // The icon's namespace is a name, not an address.
            let page = PAGE.replace("http://www.w3.org/2000/svg", "");
            assert!(!page.contains(word), "{word}");
        }
        for word in [" style=", " onclick=", "localStorage", "sessionStorage", "document.cookie"] {
            assert!(!PAGE.contains(word), "{word}");
        }
    }

    #[test]
    fn an_event_is_two_lines_and_an_empty_one() {
        assert_eq!(event("end", &json!({ "reason": "a\nb" })), "event: end\ndata: {\"reason\":\"a\\nb\"}\n\n");
    }
}
