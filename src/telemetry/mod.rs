//! What the broker tells of itself: logs on standard error; metrics, for Prometheus to scrape; and all of them with traces
//! over OTLP, where the standard `OTEL_*` variables say so.
//!
//! The domain tells what happens through its port, [`Observer`](crate::broker::observer::Observer), and in `tracing`'s
//! spans and events; only here it becomes OpenTelemetry's. Invariants: nobody waits for a collector, and what one does not
//! take is bounded, dropped and counted; nothing listens to the `log` crate, through which the driver shows statements and
//! parameters.

mod delivery;
mod logs;
mod meters;
mod otlp;
mod traces;

use std::sync::mpsc::RecvTimeoutError;
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::Duration;

use opentelemetry_sdk::Resource;
use opentelemetry_sdk::error::OTelSdkResult;
use opentelemetry_sdk::logs::SdkLoggerProvider;
use opentelemetry_sdk::metrics::ManualReader;
use opentelemetry_sdk::trace::SdkTracerProvider;
use tokio::time::Instant;
use tracing::warn;

pub use logs::{LogFilter, Logs};
pub use meters::Meters;
pub use otlp::OtlpError;

use crate::broker::Broker;
use crate::broker::observer::Observer;
use delivery::{Deliveries, Signal};
use otlp::Exporters;

/// How long sending what is left may take: a collector that is there takes it in less.
const STOP: Duration = Duration::from_secs(2);

/// What is told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TelemetryOptions {
    /// Which events are logged.
    pub log: LogFilter,
    /// Whether spans hold the text of statements.
    pub query_text: bool,
}

/// Why there is no telemetry.
#[derive(Debug, thiserror::Error)]
pub enum TelemetryError {
    /// A variable of the environment is wrong.
    #[error(transparent)]
    Otlp(#[from] OtlpError),
    /// A registry of metrics refuses them.
    #[error("cannot prepare metrics: {0}")]
    Metrics(String),
}

/// The telemetry of a broker. Its copies are the same one.
#[derive(Debug, Clone)]
pub struct Telemetry {
    logs: Logs,
    meters: Arc<Meters>,
    tracers: Option<SdkTracerProvider>,
    loggers: Option<SdkLoggerProvider>,
}

impl Telemetry {
    /// Starts the program's telemetry: its logs, panics among them, its metrics, and what the environment wants sent by
    /// OTLP. Call it on a tokio runtime, once.
    ///
    /// # Errors
    /// For a variable of the environment that is wrong, with its name.
    pub fn start(options: &TelemetryOptions) -> Result<Self, TelemetryError> {
        let exporters = Exporters::from_environment()?;
        let deliveries = Deliveries::default();
        let resource = resource();
        let tracers = exporters.spans.map(|exporter| {
            let processor = delivery::spans(exporter, deliveries.of(Signal::Traces));
            SdkTracerProvider::builder().with_resource(resource.clone()).with_span_processor(processor).build()
        });
        let loggers = exporters.logs.map(|exporter| {
            let processor = delivery::logs(exporter, deliveries.of(Signal::Logs));
            SdkLoggerProvider::builder().with_resource(resource.clone()).with_log_processor(processor).build()
        });
        let logs = Logs::start(&options.log, tracers.as_ref().map(traces::layer), loggers.as_ref());
        let exporter = exporters.metrics.map(|exporter| delivery::metrics(exporter, deliveries.of(Signal::Metrics)));
        let meters = Arc::new(Meters::new(resource, exporter, deliveries, options.query_text)?);
        Ok(Self { logs, meters, tracers, loggers })
    }

    /// Telemetry that is sent nowhere and logs nothing, but counts.
    ///
    /// # Panics
    /// Never: metrics that are fixed are refused by no registry.
    pub fn local() -> Self {
        let meters = Meters::new(resource(), None::<ManualReader>, Deliveries::default(), false);
        let meters = Arc::new(meters.expect("the names of metrics are well formed and differ"));
        Self { logs: Logs::default(), meters, tracers: None, loggers: None }
    }

    /// Who is to be told of what happens.
    pub fn observer(&self) -> Arc<dyn Observer> {
        self.meters.clone()
    }

    /// Metrics as text, for Prometheus. Looks at every session: not on a thread that others wait for.
    ///
    /// # Errors
    /// What is wrong with them.
    pub fn render(&self) -> Result<String, String> {
        self.meters.render()
    }

    /// Counts from now on what a broker has, too.
    pub fn watch(&self, broker: &Arc<Broker>) {
        self.meters.watch(Arc::downgrade(broker));
    }

    /// Logs other events from now on.
    pub fn set_log(&self, filter: &LogFilter) {
        self.logs.set(filter);
    }

    /// Sends what is left, within a bound. Not on a runtime's own thread.
    pub fn stop(self) {
        let Self { logs: _, meters, tracers, loggers } = self;
        let (told, stopped) = mpsc::channel();
        // Not each of them keeps to its bound, so all have one together.
        let stop = |signal, stop: Box<dyn FnOnce() -> OTelSdkResult + Send>| {
            let told = told.clone();
            thread::spawn(move || told.send((signal, stop())));
        };
        if let Some(tracers) = tracers {
            stop("traces", Box::new(move || tracers.shutdown_with_timeout(STOP)));
        }
        stop("metrics", Box::new(move || meters.stop(STOP)));
        if let Some(loggers) = loggers {
            stop("logs", Box::new(move || loggers.shutdown_with_timeout(STOP)));
        }
        drop(told);
        let until = Instant::now() + STOP;
        loop {
            match stopped.recv_timeout(until.saturating_duration_since(Instant::now())) {
                Ok((_, Ok(()))) => {}
                Ok((signal, Err(error))) => warn!(signal, cause = %error, "telemetry was left unsent"),
                Err(RecvTimeoutError::Timeout) => return warn!("telemetry was left unsent"),
                // All have been heard.
                Err(RecvTimeoutError::Disconnected) => return,
            }
        }
    }
}

/// Who tells all this. The standard variables go over it.
fn resource() -> Resource {
    use opentelemetry::KeyValue;
    use opentelemetry_sdk::resource::{EnvResourceDetector, ResourceDetector};

    let own = [
        KeyValue::new("service.name", env!("CARGO_PKG_NAME")),
        KeyValue::new("service.version", env!("CARGO_PKG_VERSION")),
    ];
    let stated = EnvResourceDetector::new().detect();
    let mut builder = Resource::builder_empty().with_attributes(own);
    builder = builder.with_attributes(stated.iter().map(|(key, value)| KeyValue::new(key.clone(), value.clone())));
    // It goes before service.name among the attributes.
    if let Ok(name) = std::env::var("OTEL_SERVICE_NAME")
        && !name.is_empty()
    {
        builder = builder.with_service_name(name);
    }
    builder.build()
}
