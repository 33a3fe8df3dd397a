//! Stopping a running statement from outside, as PostgreSQL offers it: a request on a connection of its own.
//!
//! Invariant: at most one request is outstanding for a connection, and [`Canceller::cancel`] returns only when the
//! server has closed the request's connection. By then the signal has been sent, so it cannot hit a later statement.

use async_trait::async_trait;
use tokio::io::{AsyncReadExt, copy, sink};
use tokio::sync::Mutex;
use tokio_postgres::{CancelToken, NoTls};

use super::net::Address;
use crate::broker::engine::{Canceller, Lost};

/// Cancels what runs on one backend.
pub(super) struct BackendCanceller {
    token: CancelToken,
    address: Address,
    outstanding: Mutex<()>,
}

impl BackendCanceller {
    pub(super) fn new(token: CancelToken, address: Address) -> Self {
        Self { token, address, outstanding: Mutex::new(()) }
    }
}

#[async_trait]
impl Canceller for BackendCanceller {
    async fn cancel(&self) -> Result<(), Lost> {
        let _one_at_a_time = self.outstanding.lock().await;
        let lost = |error: &dyn std::error::Error| Lost(format!("cannot send a cancel request: {error}"));
        let mut stream = self.address.connect().await.map_err(|error| lost(&error))?;
        self.token.cancel_query_raw(&mut stream, NoTls).await.map_err(|error| lost(&error))?;
        // The server says nothing, it only hangs up. A reset is as good as a clean end.
        let _ = copy(&mut stream.take(1024), &mut sink()).await;
        Ok(())
    }
}
