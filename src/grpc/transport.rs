//! The listener's other side: HTTP/2 with all its limits set, the services, health and reflection.
//!
//! Invariant: liveness (health service "") never depends on PostgreSQL; readiness is told by [`Readiness`] alone.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::OptionFuture;
use futures_util::join;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tonic::service::Routes;
use tonic::transport::Server;
use tonic::transport::server::Connected;
use tonic_health::ServingStatus;
use tonic_health::server::{HealthReporter, health_reporter};

use super::DESCRIPTORS;
use super::admin::Admin;
use super::bulk::Bulk;
use super::gate::{Gate, Ungated};
use super::notifications::Notifications;
use super::pb::admin_service_server::AdminServiceServer;
use super::pb::bulk_service_server::BulkServiceServer;
use super::pb::notification_service_server::NotificationServiceServer;
use super::pb::session_service_server::{SERVICE_NAME, SessionServiceServer};
use super::pb::transaction_service_server::TransactionServiceServer;
use super::service::{Sessions, Transactions};
use crate::acceptor::{Acceptor, Connection, Peer};
use crate::broker::Broker;
use crate::operations::Operations;

/// The largest request: room for the longest SQL and parameters of a few mebibytes.
const REQUEST_BYTES_MAX: usize = 16 * 1024 * 1024;

/// The largest request of a probe: a service's name.
const PROBE_BYTES_MAX: usize = 1024;

/// What the transport failed with.
pub use tonic::transport::Error;

/// Tells callers' probes whether to send sessions here.
pub struct Readiness {
    reporter: HealthReporter,
    /// For probes that speak HTTP.
    said: watch::Sender<bool>,
}

impl Readiness {
    /// Says whether the broker is ready. Said only when it changes: whoever watches hears every word.
    pub async fn set(&mut self, ready: bool) {
        if *self.said.borrow() != ready {
            let status = if ready { ServingStatus::Serving } else { ServingStatus::NotServing };
            self.reporter.set_service_status(SERVICE_NAME, status).await;
            self.said.send_replace(ready);
        }
    }
}

impl fmt::Debug for Readiness {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Readiness").field("said", &*self.said.borrow()).finish_non_exhaustive()
    }
}

/// Serves `broker` to whom `acceptor` lets in, and probes and operators to whom that of `operations` does, until `stop` and
/// then as long as calls are open. Not ready until told so.
pub async fn serve(
    broker: Arc<Broker>,
    gate: Gate,
    endpoint: String,
    acceptor: Acceptor,
    operations: Option<(Acceptor, Operations)>,
    stop: CancellationToken,
) -> (Readiness, impl Future<Output = Result<(), Error>>) {
    let (reporter, health) = health_reporter();
    let health = health.max_decoding_message_size(PROBE_BYTES_MAX);
    let (said, ready) = watch::channel(true);
    let mut readiness = Readiness { reporter, said };
    readiness.set(false).await;
    let probed = OptionFuture::from(operations.map(|(acceptor, operations)| {
        let health = Routes::new(health.clone()).into_axum_router();
        let routes: Routes = operations.routes(health, ready).into();
        let server = limited(acceptor.limits().age_max).accept_http1(true).layer(Ungated).add_routes(routes);
        server.serve_with_incoming_shutdown(acceptor.into_stream(), stop.clone().cancelled_owned())
    }));
    // What may be answered is the profile's to bound.
    let sessions = SessionServiceServer::new(Sessions::new(broker.clone(), endpoint))
        .max_decoding_message_size(REQUEST_BYTES_MAX)
        .max_encoding_message_size(usize::MAX);
    let bulk = BulkServiceServer::new(Bulk::new(broker.clone()))
        .max_decoding_message_size(REQUEST_BYTES_MAX)
        .max_encoding_message_size(usize::MAX);
    let transactions = TransactionServiceServer::new(Transactions::new(broker.clone()))
        .max_decoding_message_size(REQUEST_BYTES_MAX)
        .max_encoding_message_size(usize::MAX);
    let admin = AdminServiceServer::new(Admin::new(broker.clone()));
    // Names of channels fit the default, and so does PostgreSQL's longest payload.
    let notifications = NotificationServiceServer::new(Notifications::new(broker));
    let reflection = || {
        tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(DESCRIPTORS)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
            .register_encoded_file_descriptor_set(tonic_types::pb::FILE_DESCRIPTOR_SET)
    };
    let serving = limited(acceptor.limits().age_max)
        .layer(gate)
        .add_service(health)
        .add_service(reflection().build_v1().expect("the descriptors are our own"))
        .add_service(reflection().build_v1alpha().expect("the descriptors are our own"))
        .add_service(sessions)
        .add_service(transactions)
        .add_service(bulk)
        .add_service(notifications)
        .add_service(admin)
        .serve_with_incoming_shutdown(acceptor.into_stream(), stop.cancelled_owned());
    let all = async {
        let (served, probed) = join!(serving, probed);
        served.and(probed.unwrap_or(Ok(())))
    };
    (readiness, all)
}

impl Connected for Connection {
    type ConnectInfo = Arc<Peer>;

    fn connect_info(&self) -> Arc<Peer> {
        self.peer()
    }
}

/// A server with all its limits set, whose connections get as old as that.
fn limited(age_max: Duration) -> Server {
    /// One caller's calls in flight on one connection; a call beyond waits.
    const STREAMS_MAX: u32 = 256;
    /// Streams a client may open and reset, or make us reset, before its connection is closed: rapid-reset floods.
    const RESETS_MAX: usize = 1024;
    /// Requests have few and short headers.
    const HEADER_BYTES_MAX: u32 = 16 * 1024;
    /// A caller whose machine vanished is noticed within both; its statement is stopped then, and its stream gone.
    const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(10);
    const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(5);

    Server::builder()
        .max_concurrent_streams(STREAMS_MAX)
        .http2_max_pending_accept_reset_streams(Some(RESETS_MAX))
        .http2_max_local_error_reset_streams(Some(RESETS_MAX))
        .http2_max_header_list_size(HEADER_BYTES_MAX)
        .http2_keepalive_interval(Some(KEEPALIVE_INTERVAL))
        .http2_keepalive_timeout(Some(KEEPALIVE_TIMEOUT))
        .max_connection_age(age_max)
}
