//! `NotificationService`: decode, let the domain listen, encode what it is told.
//!
//! Invariant: an RPC future owns nothing; the stream owns its listener, and dropping either leaves nobody listening.

use std::sync::Arc;

use futures_util::stream::{self, BoxStream, StreamExt};
use tonic::{Request, Response, Status};

use super::pb;
use super::pb::notification_service_server::NotificationService;
use super::{auth, convert, status};
use crate::broker::Broker;
use crate::broker::notification::Listener;

/// Serves what NOTIFY sends.
#[derive(Debug)]
pub struct Notifications {
    broker: Arc<Broker>,
}

impl Notifications {
    /// The service for `broker`.
    pub fn new(broker: Arc<Broker>) -> Self {
        Self { broker }
    }
}

#[tonic::async_trait]
impl NotificationService for Notifications {
    type ListenStream = BoxStream<'static, Result<pb::ListenResponse, Status>>;

    async fn listen(&self, request: Request<pb::ListenRequest>) -> Result<Response<Self::ListenStream>, Status> {
        let principal = auth::principal(&request)?;
        let asked = convert::listen(request.into_inner());
        let listener = self.broker.listen(&principal, asked).await.map_err(status::from_error)?;
        // The transport drops the stream when its caller is gone.
        let events = stream::try_unfold(listener, async |mut listener: Listener| {
            let event = listener.next().await.map_err(status::from_error)?;
            Ok::<_, Status>(Some((convert::listen_event(event), listener)))
        });
        Ok(Response::new(events.boxed()))
    }
}
