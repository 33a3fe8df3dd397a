//! Handing telemetry over to a collector: in the background, in batches, from bounded queues.
//!
//! Invariant: whoever tells something never waits; what finds its queue full is dropped and counted, and so is what the
//! collector did not take. That it takes nothing any more, and that it does again, is logged once.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use opentelemetry::logs::Severity;
use opentelemetry::{Context, InstrumentationScope};
use opentelemetry_otlp::{LogExporter, MetricExporter, SpanExporter};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::error::OTelSdkResult;
use opentelemetry_sdk::logs::{
    BatchConfigBuilder as LogBatchConfig, BatchLogProcessor, LogBatch, LogExporter as ExportLogs, LogProcessor,
    SdkLogRecord,
};
use opentelemetry_sdk::metrics::data::ResourceMetrics;
use opentelemetry_sdk::metrics::exporter::PushMetricExporter;
use opentelemetry_sdk::metrics::{PeriodicReader, Temporality};
use opentelemetry_sdk::trace::{
    BatchConfigBuilder as SpanBatchConfig, BatchSpanProcessor, Span, SpanData, SpanExporter as ExportSpans,
    SpanProcessor,
};
use tracing::{info, warn};

/// How many spans, or log records, wait to be sent, unless the standard variables say otherwise.
const QUEUE_MAX: usize = 2048;

/// What is sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Signal {
    Traces,
    Metrics,
    Logs,
}

impl Signal {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Traces => "traces",
            Self::Metrics => "metrics",
            Self::Logs => "logs",
        }
    }
}

/// What became of what was to be sent.
#[derive(Debug, Clone)]
pub(super) struct Deliveries([Arc<Delivery>; 3]);

/// The same, of one signal.
#[derive(Debug)]
pub(super) struct Delivery {
    signal: Signal,
    waiting: AtomicUsize,
    dropped: AtomicU64,
    is_failing: AtomicBool,
}

impl Default for Deliveries {
    fn default() -> Self {
        let delivery = |signal| {
            Arc::new(Delivery {
                signal,
                waiting: AtomicUsize::new(0),
                dropped: AtomicU64::new(0),
                is_failing: AtomicBool::new(false),
            })
        };
        Self([Signal::Traces, Signal::Metrics, Signal::Logs].map(delivery))
    }
}

impl Deliveries {
    pub(super) fn of(&self, signal: Signal) -> Arc<Delivery> {
        self.0[signal as usize].clone()
    }

    /// How much was dropped, by its signal.
    pub(super) fn dropped(&self) -> impl Iterator<Item = (&'static str, u64)> {
        self.0.iter().map(|delivery| (delivery.signal.name(), delivery.dropped.load(Ordering::Relaxed)))
    }
}

impl Delivery {
    /// Whether there is room for one more; it is counted either way.
    fn enter(&self, queue_max: usize) -> bool {
        let has_room = self.waiting.fetch_add(1, Ordering::Relaxed) < queue_max;
        if !has_room {
            self.waiting.fetch_sub(1, Ordering::Relaxed);
            self.dropped.fetch_add(1, Ordering::Relaxed);
        }
        has_room
    }

    /// So many have been sent, or not.
    fn leave(&self, count: usize, sent: &OTelSdkResult) {
        // What did not come through the queue was never counted in.
        let _ = self
            .waiting
            .try_update(Ordering::Relaxed, Ordering::Relaxed, |waiting| Some(waiting.saturating_sub(count)));
        match sent {
            Ok(()) => {
                if self.is_failing.swap(false, Ordering::Relaxed) {
                    info!(signal = self.signal.name(), "telemetry is delivered again");
                }
            }
            Err(error) => {
                self.dropped.fetch_add(count as u64, Ordering::Relaxed);
                if !self.is_failing.swap(true, Ordering::Relaxed) {
                    warn!(signal = self.signal.name(), cause = %error, "telemetry is not delivered");
                }
            }
        }
    }
}

/// Sends spans.
pub(super) fn spans(exporter: SpanExporter, delivery: Arc<Delivery>) -> impl SpanProcessor {
    let queue_max = queue_max("OTEL_BSP_MAX_QUEUE_SIZE");
    // Ours is full first.
    let config = SpanBatchConfig::default().with_max_queue_size(queue_max + 1).build();
    let exporter = Counted { exporter, delivery: delivery.clone() };
    Bounded { inner: BatchSpanProcessor::builder(exporter).with_batch_config(config).build(), delivery, queue_max }
}

/// Sends log records.
pub(super) fn logs(exporter: LogExporter, delivery: Arc<Delivery>) -> impl LogProcessor {
    let queue_max = queue_max("OTEL_BLRP_MAX_QUEUE_SIZE");
    let config = LogBatchConfig::default().with_max_queue_size(queue_max + 1).build();
    let exporter = Counted { exporter, delivery: delivery.clone() };
    Bounded { inner: BatchLogProcessor::builder(exporter).with_batch_config(config).build(), delivery, queue_max }
}

/// Sends metrics, now and then.
pub(super) fn metrics(exporter: MetricExporter, delivery: Arc<Delivery>) -> PeriodicReader<impl PushMetricExporter> {
    PeriodicReader::builder(Counted { exporter, delivery }).build()
}

fn queue_max(variable: &str) -> usize {
    let stated = std::env::var(variable).ok().and_then(|text| text.parse().ok());
    stated.filter(|max| *max > 0).unwrap_or(QUEUE_MAX)
}

/// A queue with a bound of its own, so that what it drops is counted.
#[derive(Debug)]
struct Bounded<P> {
    inner: P,
    delivery: Arc<Delivery>,
    queue_max: usize,
}

impl<P: SpanProcessor> SpanProcessor for Bounded<P> {
    fn on_start(&self, span: &mut Span, context: &Context) {
        self.inner.on_start(span, context);
    }

    fn on_end(&self, span: SpanData) {
        if self.delivery.enter(self.queue_max) {
            self.inner.on_end(span);
        }
    }

    fn force_flush(&self) -> OTelSdkResult {
        self.inner.force_flush()
    }

    fn shutdown_with_timeout(&self, timeout: Duration) -> OTelSdkResult {
        self.inner.shutdown_with_timeout(timeout)
    }

    fn set_resource(&mut self, resource: &Resource) {
        self.inner.set_resource(resource);
    }
}

impl<P: LogProcessor> LogProcessor for Bounded<P> {
    fn emit(&self, record: &mut SdkLogRecord, scope: &InstrumentationScope) {
        if self.delivery.enter(self.queue_max) {
            self.inner.emit(record, scope);
        }
    }

    fn force_flush(&self) -> OTelSdkResult {
        self.inner.force_flush()
    }

    fn shutdown_with_timeout(&self, timeout: Duration) -> OTelSdkResult {
        self.inner.shutdown_with_timeout(timeout)
    }

    fn event_enabled(&self, level: Severity, target: &str, name: Option<&str>) -> bool {
        self.inner.event_enabled(level, target, name)
    }

    fn set_resource(&mut self, resource: &Resource) {
        self.inner.set_resource(resource);
    }
}

/// An exporter whose failures are counted.
struct Counted<E> {
    exporter: E,
    delivery: Arc<Delivery>,
}

impl<E> fmt::Debug for Counted<E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Counted").field("delivery", &self.delivery).finish_non_exhaustive()
    }
}

impl<E: ExportSpans> ExportSpans for Counted<E> {
    async fn export(&self, batch: Vec<SpanData>) -> OTelSdkResult {
        let count = batch.len();
        let sent = self.exporter.export(batch).await;
        self.delivery.leave(count, &sent);
        sent
    }

    fn shutdown_with_timeout(&self, timeout: Duration) -> OTelSdkResult {
        self.exporter.shutdown_with_timeout(timeout)
    }

    fn force_flush(&self) -> OTelSdkResult {
        self.exporter.force_flush()
    }

    fn set_resource(&mut self, resource: &Resource) {
        self.exporter.set_resource(resource);
    }
}

impl<E: ExportLogs> ExportLogs for Counted<E> {
    async fn export(&self, batch: LogBatch<'_>) -> OTelSdkResult {
        let count = batch.iter().count();
        let sent = self.exporter.export(batch).await;
        self.delivery.leave(count, &sent);
        sent
    }

    fn shutdown_with_timeout(&self, timeout: Duration) -> OTelSdkResult {
        self.exporter.shutdown_with_timeout(timeout)
    }

    fn event_enabled(&self, level: Severity, target: &str, name: Option<&str>) -> bool {
        self.exporter.event_enabled(level, target, name)
    }

    fn set_resource(&mut self, resource: &Resource) {
        self.exporter.set_resource(resource);
    }
}

impl<E: PushMetricExporter> PushMetricExporter for Counted<E> {
    async fn export(&self, metrics: &ResourceMetrics) -> OTelSdkResult {
        let sent = self.exporter.export(metrics).await;
        self.delivery.leave(1, &sent);
        sent
    }

    fn force_flush(&self) -> OTelSdkResult {
        self.exporter.force_flush()
    }

    fn shutdown_with_timeout(&self, timeout: Duration) -> OTelSdkResult {
        self.exporter.shutdown_with_timeout(timeout)
    }

    fn temporality(&self) -> Temporality {
        self.exporter.temporality()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_finds_the_queue_full_or_is_not_taken_is_counted() {
        let deliveries = Deliveries::default();
        let spans = deliveries.of(Signal::Traces);
        assert!(spans.enter(2) && spans.enter(2));
        assert!(!spans.enter(2));
        spans.leave(2, &Err(opentelemetry_sdk::error::OTelSdkError::InternalFailure("down".into())));
        assert!(spans.enter(2));
        spans.leave(1, &Ok(()));
        let dropped: Vec<_> = deliveries.dropped().collect();
        assert_eq!(dropped, [("traces", 3), ("metrics", 0), ("logs", 0)]);
    }
}
