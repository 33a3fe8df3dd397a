//! Spans as OpenTelemetry's, and their places in traces.

use opentelemetry::propagation::{Extractor, TextMapPropagator};
use opentelemetry::trace::{SpanContext, SpanId, TraceContextExt, TraceFlags, TraceId, TraceState, TracerProvider};
use opentelemetry::{Context, InstrumentationScope};
use opentelemetry_sdk::propagation::TraceContextPropagator;
use opentelemetry_sdk::trace::SdkTracerProvider;
use tracing::field::Empty;
use tracing::{Span, info_span};
use tracing_opentelemetry::{OpenTelemetryLayer, OpenTelemetrySpanExt};
use tracing_subscriber::Registry;
use tracing_subscriber::layer::Layer;

use crate::broker::observer::{TRACE, TracePlace};
use crate::names::{SCHEMA_URL, SCOPE, attribute};

/// Makes spans OpenTelemetry's.
pub(super) fn layer(tracers: &SdkTracerProvider) -> impl Layer<Registry> + Send + Sync + use<> {
    let tracer = tracers.tracer_with_scope(scope());
    OpenTelemetryLayer::new(tracer)
        .with_location(false)
        .with_threads(false)
        .with_target(false)
        .with_level(false)
        .with_tracked_inactivity(false)
}

/// Who makes spans and metrics.
pub(super) fn scope() -> InstrumentationScope {
    InstrumentationScope::builder(SCOPE).with_version(env!("CARGO_PKG_VERSION")).with_schema_url(SCHEMA_URL).build()
}

/// Where the current span stands, if its trace is kept.
pub(super) fn here() -> Option<TracePlace> {
    let context = Context::current();
    let span = context.span();
    let place = span.span_context();
    (place.is_valid() && place.is_sampled())
        .then(|| TracePlace { trace_id: place.trace_id().to_bytes(), span_id: place.span_id().to_bytes() })
}

/// Links a span to where another stood.
pub(super) fn link(span: &Span, place: TracePlace) {
    let TracePlace { trace_id, span_id } = place;
    span.add_link(SpanContext::new(
        TraceId::from_bytes(trace_id),
        SpanId::from_bytes(span_id),
        TraceFlags::SAMPLED,
        false,
        TraceState::default(),
    ));
}

/// The span of a call, in the trace that its headers name; none if that is not kept, so that nothing is spent on others
/// within it.
pub(super) fn call(method: &str, header: &dyn Fn(&str) -> Option<String>) -> Span {
    let span = info_span!(
        target: TRACE, "call", otel.name = method, otel.kind = "server", otel.status_code = Empty,
        { attribute::RPC_SYSTEM } = "grpc", { attribute::RPC_METHOD } = method, { attribute::RPC_STATUS } = Empty,
        { attribute::ERROR_TYPE } = Empty
    );
    if !span.is_disabled() {
        let parent = TraceContextPropagator::new()
            .extract(&Headers { traceparent: header("traceparent"), tracestate: header("tracestate") });
        // It has been made just now: nothing has started it.
        let _ = span.set_parent(parent);
        if !span.context().span().span_context().is_sampled() {
            return Span::none();
        }
    }
    span
}

/// W3C Trace Context's headers.
struct Headers {
    traceparent: Option<String>,
    tracestate: Option<String>,
}

impl Extractor for Headers {
    fn get(&self, key: &str) -> Option<&str> {
        match key {
            "traceparent" => self.traceparent.as_deref(),
            "tracestate" => self.tracestate.as_deref(),
            _ => None,
        }
    }

    fn keys(&self) -> Vec<&str> {
        vec!["traceparent", "tracestate"]
    }
}
