//! Stopping a running statement from outside, as PostgreSQL offers it: a request on a connection of its own.
//!
//! Invariant: at most one request is outstanding for a connection, and [`Canceller::cancel`] returns only when the
//! server has closed the request's connection. By then the signal has been sent, so it cannot hit a later statement;
//! unless a proxy in between has closed it, which nobody can tell. So the requests are counted too: a connection on which
//! fewer statements were cancelled than requested is not used again.

use std::sync::{Arc, Mutex as StdMutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use tokio::io::{AsyncReadExt, copy, sink};
use tokio::sync::Mutex;
use tokio::time::timeout;
use tokio_postgres::tls::MakeTlsConnect;
use tokio_postgres::{CancelToken, NoTls};
use tokio_postgres_rustls::MakeRustlsConnect;

use super::net::{Address, Lent, Stream};
use super::wire::Wire;
use crate::broker::engine::{Canceller, Lost, NotCancelled};

/// How long connecting may take: the server is the one that the connection has, and not far.
const CONNECT_WAIT: Duration = Duration::from_secs(1);

/// Requests since the backend was last known to have dealt with all.
#[derive(Debug, Clone, Copy, Default)]
struct Count {
    requests: u32,
    /// How many statements had been cancelled before, by whomever.
    cancelled_before: u32,
}

impl Count {
    fn is_settled(self, cancelled: u32) -> bool {
        cancelled - self.cancelled_before >= self.requests
    }
}

/// Cancels what runs on one backend.
pub(super) struct BackendCanceller {
    token: CancelToken,
    address: Address,
    /// How to encrypt the request, and the server's name, when the connection is encrypted.
    tls: Option<(MakeRustlsConnect, String)>,
    outstanding: Mutex<()>,
    wire: Arc<Wire>,
    count: StdMutex<Count>,
}

impl BackendCanceller {
    pub(super) fn new(
        token: CancelToken,
        address: Address,
        tls: Option<(MakeRustlsConnect, String)>,
        wire: Arc<Wire>,
    ) -> Self {
        Self { token, address, tls, outstanding: Mutex::new(()), wire, count: StdMutex::default() }
    }

    fn note_request(&self) {
        let cancelled = self.wire.cancelled();
        let mut count = self.count.lock().unwrap_or_else(PoisonError::into_inner);
        if count.is_settled(cancelled) {
            *count = Count { requests: 0, cancelled_before: cancelled };
        }
        count.requests += 1;
    }

    /// Whether each request has stopped a statement, so that none can still be on its way.
    pub(super) fn is_settled(&self) -> bool {
        let count = *self.count.lock().unwrap_or_else(PoisonError::into_inner);
        count.is_settled(self.wire.cancelled())
    }
}

#[async_trait]
impl Canceller for BackendCanceller {
    fn bytes_received(&self) -> u64 {
        self.wire.bytes_received()
    }

    async fn cancel(&self) -> Result<(), NotCancelled> {
        let _one_at_a_time = self.outstanding.lock().await;
        let stream = match timeout(CONNECT_WAIT, self.address.connect()).await {
            Ok(Ok(stream)) => stream,
            Ok(Err(error)) => return Err(NotCancelled::Unsent(error.to_string())),
            Err(_) => {
                let wait = humantime::format_duration(CONNECT_WAIT);
                return Err(NotCancelled::Unsent(format!("no connection within {wait}")));
            }
        };
        self.note_request();
        let lost = |error: &dyn std::error::Error| Lost(format!("cannot send a cancel request: {error}"));
        let (stream, returned) = Lent::new(stream);
        let sent = match &self.tls {
            None => self.token.cancel_query_raw(stream, NoTls).await,
            Some((tls, name)) => {
                let tls = MakeTlsConnect::<Lent<Stream>>::make_tls_connect(&mut tls.clone(), name);
                self.token.cancel_query_raw(stream, tls.map_err(|error| lost(&error))?).await
            }
        };
        sent.map_err(|error| lost(&error))?;
        // The server says nothing, it only hangs up. A reset is as good as a clean end.
        if let Ok(stream) = returned.await {
            let _ = copy(&mut stream.take(16 * 1024), &mut sink()).await;
        }
        Ok(())
    }
}
