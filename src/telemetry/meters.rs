//! Metrics: what happens is counted as it is told, and what there is, when somebody asks.
//!
//! Invariant: nothing a caller chooses becomes an attribute: engines, methods and reasons are ours, and an error of
//! PostgreSQL's counts by its class.

use std::sync::Weak;
use std::time::Duration;

use opentelemetry::metrics::{Counter, Gauge, Histogram, Meter, MeterProvider};
use opentelemetry::{KeyValue, Value};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::error::OTelSdkResult;
use opentelemetry_sdk::metrics::{SdkMeterProvider, reader::MetricReader};
use prometheus::{Registry, TextEncoder};
use tracing::Span;

use super::delivery::Deliveries;
use super::{TelemetryError, traces};
use crate::broker::Broker;
use crate::broker::engine::PoolStatistics;
use crate::broker::observer::{Discard, Event, Observer, TracePlace};
use crate::broker::session::TransactionState;
use crate::names::{attribute, metric};

/// The bounds of times, in seconds: from what a statement takes that finds all in memory to a transaction's longest.
const TIMES: [f64; 18] =
    [0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 1800.0];

/// The bounds of a ratio.
const RATIOS: [f64; 10] = [0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 1.0];

/// Every metric that is counted as it happens.
#[derive(Debug)]
pub struct Meters {
    provider: SdkMeterProvider,
    registry: Registry,
    meter: Meter,
    shows_sql: bool,
    call_duration: Histogram<f64>,
    operation_duration: Histogram<f64>,
    connection_timeouts: Counter<u64>,
    connection_wait_time: Histogram<f64>,
    connection_use_time: Histogram<f64>,
    connections_discarded: Counter<u64>,
    sessions_begun: Counter<u64>,
    sessions_ended: Counter<u64>,
    transaction_duration: Histogram<f64>,
    transaction_idle_ratio: Histogram<f64>,
    lease_remaining: Histogram<f64>,
    reaper_lag: Histogram<f64>,
    reaper_spared: Counter<u64>,
    cancel_duration: Histogram<f64>,
    commits_resolved: Counter<u64>,
    engine_reachable: Gauge<u64>,
}

impl Meters {
    /// Metrics of that resource, for Prometheus and for that reader.
    pub(super) fn new(
        resource: Resource,
        reader: Option<impl MetricReader>,
        deliveries: Deliveries,
        shows_sql: bool,
    ) -> Result<Self, TelemetryError> {
        let registry = Registry::new();
        let scraped = opentelemetry_prometheus::exporter()
            .with_registry(registry.clone())
            .scope_info_enabled(false)
            .build()
            .map_err(|error| TelemetryError::Metrics(error.to_string()))?;
        let mut builder = SdkMeterProvider::builder().with_resource(resource).with_reader(scraped);
        if let Some(reader) = reader {
            builder = builder.with_reader(reader);
        }
        let provider = builder.build();
        let meter = provider.meter_with_scope(traces::scope());
        let seconds = |name: &'static str, description: &'static str| {
            let histogram = meter.f64_histogram(name).with_unit("s").with_description(description);
            histogram.with_boundaries(TIMES.to_vec()).build()
        };
        let count = |name: &'static str, unit: &'static str, description: &'static str| {
            meter.u64_counter(name).with_unit(unit).with_description(description).build()
        };
        meter
            .u64_observable_counter(metric::TELEMETRY_DROPPED)
            .with_description("Spans, log records and exports of metrics that no collector got")
            .with_callback(move |observer| {
                for (signal, dropped) in deliveries.dropped() {
                    observer.observe(dropped, &[KeyValue::new(attribute::SIGNAL, signal)]);
                }
            })
            .build();
        Ok(Self {
            call_duration: seconds(metric::CALL_DURATION, "How long calls take, to the end of their answer"),
            operation_duration: seconds(metric::OPERATION_DURATION, "How long PostgreSQL takes to do what it is asked"),
            connection_timeouts: count(
                metric::CONNECTION_TIMEOUTS,
                "{timeout}",
                "Transactions that got no connection in time",
            ),
            connection_wait_time: seconds(metric::CONNECTION_WAIT_TIME, "How long transactions wait for a connection"),
            connection_use_time: seconds(
                metric::CONNECTION_USE_TIME,
                "How long connections are in use, reset included",
            ),
            connections_discarded: count(
                metric::CONNECTIONS_DISCARDED,
                "{connection}",
                "Connections closed instead of given back",
            ),
            sessions_begun: count(metric::SESSIONS_BEGUN, "{session}", "Sessions begun"),
            sessions_ended: count(metric::SESSIONS_ENDED, "{session}", "Sessions ended"),
            transaction_duration: seconds(metric::TRANSACTION_DURATION, "How long transactions are open"),
            transaction_idle_ratio: meter
                .f64_histogram(metric::TRANSACTION_IDLE_RATIO)
                .with_description("The part of a transaction in which it waits for its caller")
                .with_boundaries(RATIOS.to_vec())
                .build(),
            lease_remaining: seconds(metric::LEASE_REMAINING, "What was left of leases when they were renewed"),
            reaper_lag: seconds(metric::REAPER_LAG, "How late sessions are reaped"),
            reaper_spared: count(metric::REAPER_SPARED, "{session}", "Sessions that the reaper has only counted"),
            cancel_duration: seconds(metric::CANCEL_DURATION, "How long stopping a statement takes"),
            commits_resolved: count(metric::COMMITS_RESOLVED, "{commit}", "Commits whose answer was lost"),
            engine_reachable: meter
                .u64_gauge(metric::ENGINE_REACHABLE)
                .with_description("Whether an engine's PostgreSQL answers: 1 or 0")
                .build(),
            provider,
            registry,
            meter,
            shows_sql,
        })
    }

    /// Tells from now on what a broker has, too.
    pub(super) fn watch(&self, broker: Weak<Broker>) {
        let pool =
            |name: &'static str, unit: &'static str, description: &'static str, read: fn(&PoolStatistics) -> usize| {
                let broker = broker.clone();
                self.meter
                    .i64_observable_up_down_counter(name)
                    .with_unit(unit)
                    .with_description(description)
                    .with_callback(move |observer| {
                        for (engine, pool) in pools(&broker) {
                            observer.observe(amount(read(&pool)), &[KeyValue::new(attribute::POOL_NAME, engine)]);
                        }
                    })
                    .build();
            };
        pool(metric::CONNECTION_MAX, "{connection}", "The most connections there may be", |pool| {
            pool.size + pool.overflow_max
        });
        pool(metric::CONNECTION_PENDING, "{request}", "Transactions that wait for a connection", |pool| pool.waiting);
        let counted = broker.clone();
        self.meter
            .i64_observable_up_down_counter(metric::CONNECTION_COUNT)
            .with_unit("{connection}")
            .with_description("Open connections")
            .with_callback(move |observer| {
                for (engine, pool) in pools(&counted) {
                    for (state, count) in [("used", pool.in_use), ("idle", pool.idle)] {
                        let attributes = [
                            KeyValue::new(attribute::POOL_NAME, engine.clone()),
                            KeyValue::new(attribute::CONNECTION_STATE, state),
                        ];
                        observer.observe(amount(count), &attributes);
                    }
                }
            })
            .build();
        let counted = broker.clone();
        self.meter
            .u64_observable_counter(metric::LOGIN_FAILURES)
            .with_unit("{attempt}")
            .with_description("Connections that could not be opened")
            .with_callback(move |observer| {
                for (engine, pool) in pools(&counted) {
                    observer.observe(pool.login_failures, &[KeyValue::new(attribute::ENGINE, engine)]);
                }
            })
            .build();
        let counted = broker.clone();
        self.meter
            .i64_observable_up_down_counter(metric::SESSIONS)
            .with_unit("{session}")
            .with_description("Live sessions")
            .with_callback(move |observer| {
                let Some(broker) = counted.upgrade() else { return };
                for ((engine, state), count) in broker.count_sessions() {
                    let state = match state {
                        TransactionState::None => "idle",
                        TransactionState::Open => "in_transaction",
                        TransactionState::Failed => "failed",
                    };
                    let attributes = [
                        KeyValue::new(attribute::ENGINE, engine.to_owned()),
                        KeyValue::new(attribute::SESSION_STATE, state),
                    ];
                    observer.observe(amount(count), &attributes);
                }
            })
            .build();
        self.meter
            .u64_observable_gauge(metric::DRAINING)
            .with_description("Whether the broker is draining: 1 or 0")
            .with_callback(move |observer| {
                if let Some(broker) = broker.upgrade() {
                    observer.observe(broker.is_draining().into(), &[]);
                }
            })
            .build();
    }

    /// Metrics as text, for Prometheus.
    pub(super) fn render(&self) -> Result<String, String> {
        TextEncoder::new().encode_to_string(&self.registry.gather()).map_err(|error| error.to_string())
    }

    /// Sends what is left.
    pub(super) fn stop(&self, within: Duration) -> OTelSdkResult {
        self.provider.shutdown_with_timeout(within)
    }
}

impl Observer for Meters {
    fn observe(&self, event: Event<'_>) {
        match event {
            Event::CallEnded { method, status, error, took } => {
                let mut attributes = vec![
                    KeyValue::new(attribute::RPC_SYSTEM, "grpc"),
                    KeyValue::new(attribute::RPC_METHOD, method),
                    KeyValue::new(attribute::RPC_STATUS, status),
                ];
                if let Some(error) = error {
                    attributes.push(KeyValue::new(attribute::ERROR_TYPE, error.to_owned()));
                }
                self.call_duration.record(took.as_secs_f64(), &attributes);
            }
            Event::EngineProbed { engine, reachable } => {
                self.engine_reachable.record(reachable.into(), &[of_engine(engine)]);
            }
            Event::SessionBegan { engine } => self.sessions_begun.add(1, &[of_engine(engine)]),
            Event::SessionEnded { engine, reason } => {
                let reason = KeyValue::new(attribute::END_REASON, reason.name());
                self.sessions_ended.add(1, &[of_engine(engine), reason]);
            }
            Event::SessionReaped { late } => self.reaper_lag.record(late.as_secs_f64(), &[]),
            Event::SessionSpared => self.reaper_spared.add(1, &[]),
            Event::LeaseRenewed { remaining } => self.lease_remaining.record(remaining.as_secs_f64(), &[]),
            Event::Operation { engine, name, took, error } => {
                let mut attributes = vec![
                    KeyValue::new(attribute::DB_SYSTEM, "postgresql"),
                    KeyValue::new(attribute::DB_OPERATION, name),
                    of_engine(engine),
                ];
                if let Some(error) = error {
                    attributes.push(KeyValue::new(attribute::ERROR_TYPE, error_class(error)));
                }
                self.operation_duration.record(took.as_secs_f64(), &attributes);
            }
            Event::Cancelled { engine, took } => self.cancel_duration.record(took.as_secs_f64(), &[of_engine(engine)]),
            Event::TransactionEnded { engine, verdict, lasted, idle_ratio } => {
                let outcome = KeyValue::new(attribute::OUTCOME, verdict.name());
                self.transaction_duration.record(lasted.as_secs_f64(), &[of_engine(engine), outcome]);
                self.transaction_idle_ratio.record(idle_ratio, &[of_engine(engine)]);
            }
            Event::CommitResolved { engine, verdict } => {
                let outcome = KeyValue::new(attribute::OUTCOME, verdict.name());
                self.commits_resolved.add(1, &[of_engine(engine), outcome]);
            }
            Event::ConnectionTaken { engine, waited } => {
                self.connection_wait_time.record(waited.as_secs_f64(), &[of_pool(engine)]);
            }
            Event::ConnectionDenied { engine } => self.connection_timeouts.add(1, &[of_pool(engine)]),
            Event::ConnectionReturned { engine, used, discarded } => {
                self.connection_use_time.record(used.as_secs_f64(), &[of_pool(engine)]);
                if let Some(discarded) = discarded {
                    let reason = match discarded {
                        Discard::Policy => "policy",
                        Discard::Unclean => "unclean",
                        Discard::Lost => "lost",
                    };
                    let reason = KeyValue::new(attribute::DISCARD_REASON, reason);
                    self.connections_discarded.add(1, &[of_engine(engine), reason]);
                }
            }
        }
    }

    fn call(&self, method: &'static str, header: &dyn Fn(&str) -> Option<String>) -> Span {
        traces::call(method, header)
    }

    fn here(&self) -> Option<TracePlace> {
        traces::here()
    }

    fn link(&self, span: &Span, place: TracePlace) {
        traces::link(span, place);
    }

    fn shows_sql(&self) -> bool {
        self.shows_sql
    }
}

fn of_engine(engine: &str) -> KeyValue {
    KeyValue::new(attribute::ENGINE, engine.to_owned())
}

fn of_pool(engine: &str) -> KeyValue {
    KeyValue::new(attribute::POOL_NAME, engine.to_owned())
}

fn pools(broker: &Weak<Broker>) -> Vec<(String, PoolStatistics)> {
    let broker = broker.upgrade();
    let engines = broker.iter().flat_map(|broker| broker.engines());
    engines.map(|(name, engine)| (name.clone(), engine.info().pool)).collect()
}

fn amount(count: usize) -> i64 {
    i64::try_from(count).unwrap_or(i64::MAX)
}

/// The class of an SQLSTATE, if it is one of PostgreSQL's: functions may raise any. Words stay as they are.
fn error_class(error: &str) -> Value {
    const CLASSES: [&str; 44] = [
        "00", "01", "02", "03", "08", "09", "0A", "0B", "0F", "0L", "0P", "0Z", "10", "20", "21", "22", "23", "24",
        "25", "26", "27", "28", "2B", "2D", "2F", "34", "38", "39", "3B", "3D", "3F", "40", "42", "44", "53", "54",
        "55", "57", "58", "72", "F0", "HV", "P0", "XX",
    ];
    match (error.len(), error.get(..2)) {
        (5, Some(class)) => CLASSES.into_iter().find(|known| *known == class).unwrap_or("other").into(),
        _ => error.to_owned().into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_sqlstate_counts_by_its_class_and_one_of_a_callers_own_with_all_others() {
        for (error, class) in
            [("23505", "23"), ("40001", "40"), ("XX000", "XX"), ("ZZ123", "other"), ("refused", "refused")]
        {
            assert_eq!(error_class(error), Value::from(class));
        }
    }
}
