//! From a configuration to a running broker: engines, services, health, and a drain in two phases.
//!
//! Phase one drains the sessions while the transport still answers; phase two stops the transport. Invariants: liveness
//! (health service "") never depends on PostgreSQL, readiness does; stopping has a bound.

use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::net::TcpListener;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;
use tonic::transport::server::TcpIncoming;
use tonic_health::ServingStatus;
use tonic_health::server::{HealthReporter, health_reporter};
use tracing::{info, warn};

use crate::broker::Broker;
use crate::broker::engine::Engine;
use crate::config::Config;
use crate::grpc::DESCRIPTORS;
use crate::grpc::pb::session_service_server::{SERVICE_NAME, SessionServiceServer};
use crate::grpc::service::Sessions;
use crate::postgres::engine::PostgresEngine;

/// The largest request: room for the longest SQL and parameters of a few mebibytes.
const REQUEST_BYTES_MAX: usize = 16 * 1024 * 1024;

/// How long open calls, health watches among them, may hold up the transport once the sessions are drained.
const TRANSPORT_GRACE: Duration = Duration::from_secs(2);

/// A broker that listens but does not serve yet.
#[derive(Debug)]
pub struct Server {
    listener: TcpListener,
    broker: Arc<Broker>,
    endpoint: String,
    drain_grace: Duration,
}

impl Server {
    /// Makes the engines and takes the port. Needs no PostgreSQL.
    ///
    /// # Errors
    /// The port's, with its address.
    pub async fn bind(config: Config) -> io::Result<Self> {
        let Config { listen, endpoint, owner, default_engine, drain_grace, profile, limits, engines } = config;
        let listener = TcpListener::bind(&listen)
            .await
            .map_err(|error| io::Error::new(error.kind(), format!("cannot listen on {listen}: {error}")))?;
        let endpoint = match endpoint {
            Some(endpoint) => endpoint,
            None => listener.local_addr()?.to_string(),
        };
        let engines: BTreeMap<String, Arc<dyn Engine>> = engines
            .into_iter()
            .map(|(name, engine)| {
                let made = PostgresEngine::new(name.clone(), engine.connect, &engine.pool);
                (name, Arc::new(made) as Arc<dyn Engine>)
            })
            .collect();
        let broker = Arc::new(Broker::new(owner, engines, default_engine, profile, limits));
        Ok(Self { listener, broker, endpoint, drain_grace })
    }

    /// Where it listens.
    ///
    /// # Errors
    /// The operating system's.
    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }

    /// Serves until `shutdown` resolves, then drains and stops.
    ///
    /// # Errors
    /// The transport's.
    pub async fn run(self, shutdown: impl Future<Output = ()>) -> Result<(), tonic::transport::Error> {
        let Self { listener, broker, endpoint, drain_grace } = self;
        let (health, health_service) = health_reporter();
        health.set_service_status(SERVICE_NAME, ServingStatus::NotServing).await;
        let sessions = SessionServiceServer::new(Sessions::new(broker.clone(), endpoint))
            .max_decoding_message_size(REQUEST_BYTES_MAX)
            .max_encoding_message_size(usize::MAX);
        let reflection = || {
            tonic_reflection::server::Builder::configure()
                .register_encoded_file_descriptor_set(DESCRIPTORS)
                .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
                .register_encoded_file_descriptor_set(tonic_types::pb::FILE_DESCRIPTOR_SET)
        };
        let stop_transport = CancellationToken::new();
        let serving = transport()
            .add_service(health_service)
            .add_service(reflection().build_v1().expect("the descriptors are our own"))
            .add_service(reflection().build_v1alpha().expect("the descriptors are our own"))
            .add_service(sessions)
            .serve_with_incoming_shutdown(
                TcpIncoming::from(listener).with_nodelay(Some(true)),
                stop_transport.clone().cancelled_owned(),
            );
        let mut serving = std::pin::pin!(serving);

        let stopping = async {
            // Readiness is looked after until the drain begins, and then says no for good.
            tokio::select! {
                () = shutdown => {}
                () = watch_engines(&broker, &health) => {}
            }
            health.set_service_status(SERVICE_NAME, ServingStatus::NotServing).await;
            broker.drain(drain_grace).await;
            stop_transport.cancel();
        };
        tokio::select! {
            served = &mut serving => return served,
            () = stopping => {}
        }
        let stopped = timeout(TRANSPORT_GRACE, serving).await;
        info!("stopped");
        // Who still holds a call open after the grace loses the connection.
        stopped.unwrap_or(Ok(()))
    }
}

/// The transport with all its limits set.
fn transport() -> tonic::transport::Server {
    /// One caller's calls in flight on one connection; a call beyond waits.
    const STREAMS_MAX: u32 = 256;
    /// Streams a client may open and reset, or make us reset, before its connection is closed: rapid-reset floods.
    const RESETS_MAX: usize = 1024;
    /// Requests have few and short headers.
    const HEADER_BYTES_MAX: u32 = 16 * 1024;
    /// A caller whose machine vanished is noticed within both.
    const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(20);
    const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(10);

    tonic::transport::Server::builder()
        .max_concurrent_streams(STREAMS_MAX)
        .http2_max_pending_accept_reset_streams(Some(RESETS_MAX))
        .http2_max_local_error_reset_streams(Some(RESETS_MAX))
        .http2_max_header_list_size(HEADER_BYTES_MAX)
        .http2_keepalive_interval(Some(KEEPALIVE_INTERVAL))
        .http2_keepalive_timeout(Some(KEEPALIVE_TIMEOUT))
}

/// Keeps readiness true to the engines: serving while at least one of them answers. Never returns.
async fn watch_engines(broker: &Broker, health: &HealthReporter) {
    /// How soon a database that comes is noticed.
    const WHILE_DOWN: Duration = Duration::from_secs(1);
    /// How soon one that goes is noticed; callers notice at once.
    const WHILE_UP: Duration = Duration::from_secs(5);

    let mut reachable: BTreeMap<&str, bool> = BTreeMap::new();
    let mut was_ready = false;
    loop {
        for (name, engine) in broker.engines() {
            let answer = engine.probe().await;
            if reachable.insert(name, answer.is_ok()) != Some(answer.is_ok()) {
                match &answer {
                    Ok(()) => info!(engine = %name, "engine is reachable"),
                    Err(error) => warn!(engine = %name, cause = %error, "engine is not reachable"),
                }
            }
        }
        let ready = reachable.values().any(|reachable| *reachable);
        // Said only when it changes: whoever watches hears every word.
        if ready != was_ready {
            let status = if ready { ServingStatus::Serving } else { ServingStatus::NotServing };
            health.set_service_status(SERVICE_NAME, status).await;
            was_ready = ready;
        }
        sleep(if reachable.values().all(|reachable| *reachable) { WHILE_UP } else { WHILE_DOWN }).await;
    }
}
