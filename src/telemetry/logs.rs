//! Logs: structured events on standard error, for people on a terminal and as JSON elsewhere, and over OTLP.
//!
//! Invariant: what is meant for traces alone, or said by the exporters themselves, is not logged: a collector that is down
//! is said once, by [`delivery`](super::delivery).

use std::backtrace::Backtrace;
use std::fmt;
use std::io::{IsTerminal, stderr};
use std::panic;
use std::sync::Arc;

use opentelemetry_appender_tracing::layer::OpenTelemetryTracingBridge;
use opentelemetry_sdk::logs::SdkLoggerProvider;
use tracing::{Event, Metadata, Subscriber, error, info};
use tracing_subscriber::filter::{FilterExt, filter_fn};
use tracing_subscriber::fmt::format::{Format, Json, JsonFields, Writer};
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields};
use tracing_subscriber::layer::{Layer, SubscriberExt};
use tracing_subscriber::registry::LookupSpan;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, Registry, fmt as log_format, reload};

use super::traces;
use crate::broker::observer::TRACE;

/// Which events are logged: directives such as `info` or `warn,audit=info`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LogFilter(String);

impl LogFilter {
    /// Reads directives, separated by commas: a level, or TARGET=LEVEL.
    ///
    /// # Errors
    /// What is wrong with them.
    pub fn parse(text: &str) -> Result<Self, String> {
        const LEVELS: [&str; 6] = ["error", "warn", "info", "debug", "trace", "off"];
        // A word alone may be a target, of which all is logged, and nothing else.
        let is_level = |word: &str| LEVELS.iter().any(|level| level.eq_ignore_ascii_case(word));
        if let Some(word) = text.split(',').map(str::trim).find(|word| !word.contains('=') && !is_level(word)) {
            return Err(format!("{word:?} is no level: use {}, or TARGET=LEVEL", LEVELS.join(", ")));
        }
        match EnvFilter::builder().parse(text) {
            Ok(_) => Ok(Self(text.to_owned())),
            Err(error) => Err(format!("is no list of directives such as info or warn,audit=info: {error}")),
        }
    }

    /// What RUST_LOG says, as for other programs: a word alone may be a target.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn from_rust_log() -> Result<Self, String> {
        let text = std::env::var("RUST_LOG").unwrap_or_default();
        match EnvFilter::builder().parse(&text) {
            Ok(_) if text.trim().is_empty() => Ok(Self::default()),
            Ok(_) => Ok(Self(text)),
            Err(error) => Err(format!("is missing, and RUST_LOG is no list of directives: {error}")),
        }
    }

    fn directives(&self) -> EnvFilter {
        EnvFilter::builder().parse(&self.0).expect("it has been parsed before")
    }
}

impl Default for LogFilter {
    fn default() -> Self {
        Self("info".into())
    }
}

impl fmt::Display for LogFilter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// The program's log.
#[derive(Clone, Default)]
pub struct Logs(Option<Arc<reload::Handle<EnvFilter, Registry>>>);

impl Logs {
    /// Starts logging, panics among it, and has spans become traces and logs be sent where there is somebody to take them.
    pub(super) fn start(
        filter: &LogFilter,
        traces: Option<impl Layer<Registry> + Send + Sync>,
        loggers: Option<&SdkLoggerProvider>,
    ) -> Self {
        let (level, handle) = reload::Layer::new(filter.directives());
        let filter = level.and(filter_fn(is_logged));
        let traces = traces.map(|layer| layer.with_filter(filter_fn(|metadata| metadata.target() == TRACE)));
        let sent = loggers.map(OpenTelemetryTracingBridge::new);
        let written = if stderr().is_terminal() {
            log_format::layer().with_writer(stderr).boxed()
        } else {
            let format = WithTrace(log_format::format().json().with_current_span(false).with_span_list(false));
            log_format::layer().event_format(format).fmt_fields(JsonFields::new()).with_writer(stderr).boxed()
        };
        let mut layers = vec![written.and_then(sent).with_filter(filter).boxed()];
        // A layer that is none would still have every span made.
        layers.extend(traces.map(Layer::boxed));
        tracing_subscriber::registry().with(layers).init();
        // What a panic says may hold a value; where it was, and who it was that died, is enough to find it.
        panic::set_hook(Box::new(|panic| {
            let location = panic.location().map(ToString::to_string);
            let backtrace = Backtrace::capture();
            error!(location, %backtrace, "panic");
        }));
        Self(Some(Arc::new(handle)))
    }

    /// Logs other events from now on.
    pub(super) fn set(&self, filter: &LogFilter) {
        let Some(handle) = &self.0 else { return };
        match handle.reload(filter.directives()) {
            Ok(()) => info!(%filter, "log filter set"),
            Err(error) => error!(%filter, cause = %error, "log filter not set"),
        }
    }
}

impl fmt::Debug for Logs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Logs").field("is_started", &self.0.is_some()).finish()
    }
}

fn is_logged(metadata: &Metadata<'_>) -> bool {
    metadata.is_event() && metadata.target() != TRACE && !metadata.target().starts_with("opentelemetry")
}

/// Lines of JSON that name the trace and the span they were written in.
struct WithTrace(Format<Json>);

impl<S, N> FormatEvent<S, N> for WithTrace
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(&self, context: &FmtContext<'_, S, N>, mut out: Writer<'_>, event: &Event<'_>) -> fmt::Result {
        let Some(place) = traces::here() else { return self.0.format_event(context, out, event) };
        let mut line = String::new();
        self.0.format_event(context, Writer::new(&mut line), event)?;
        let open = line.trim_end().strip_suffix('}').ok_or(fmt::Error)?;
        let (trace_id, span_id) = (u128::from_be_bytes(place.trace_id), u64::from_be_bytes(place.span_id));
        writeln!(out, "{open},\"trace_id\":\"{trace_id:032x}\",\"span_id\":\"{span_id:016x}\"}}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn directives_that_are_none_are_refused() {
        for wrong in ["", " ", "inof", "info,", "info,=", "session_broker=loud"] {
            assert!(LogFilter::parse(wrong).is_err(), "{wrong:?}");
        }
        for right in ["info", "warn,audit=info", "off", "session_broker::grpc=debug"] {
            assert_eq!(LogFilter::parse(right).unwrap().to_string(), right);
        }
    }
}
