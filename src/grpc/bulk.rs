//! `BulkService`: COPY as streams of bytes.
//!
//! Invariant: an RPC future owns nothing; dropping it breaks the COPY off, and nothing of it is kept.

use std::sync::Arc;

use futures_util::stream::{self, BoxStream, StreamExt};
use tokio::time::timeout;
use tonic::{Request, Response, Status, Streaming};

use super::gate::ARRIVAL_TIMEOUT;
use super::pb;
use super::pb::bulk_service_server::BulkService;
use super::service::{checked, grpc_deadline};
use super::{auth, convert, status};
use crate::broker::Broker;
use crate::broker::bulk::{CopyingIn, CopyingOut, Holder};
use crate::broker::error::{Error, Failure};
use crate::broker::principal::Principal;
use crate::broker::session::Executed;

/// Serves COPY.
#[derive(Debug)]
pub struct Bulk {
    broker: Arc<Broker>,
}

impl Bulk {
    /// The service for `broker`.
    pub fn new(broker: Arc<Broker>) -> Self {
        Self { broker }
    }

    /// Whose transaction a COPY is to be a part of.
    fn holder(&self, principal: &Principal, whose: convert::Whose) -> Result<Holder, Status> {
        match whose {
            convert::Whose::Session(token) => self.broker.session(principal, &token).map(Holder::of),
            convert::Whose::Alone(begin) => self.broker.alone(principal, &begin),
        }
        .map_err(status::from_error)
    }
}

#[tonic::async_trait]
impl BulkService for Bulk {
    type CopyOutStream = BoxStream<'static, Result<pb::CopyOutResponse, Status>>;

    async fn copy_in(
        &self,
        request: Request<Streaming<pb::CopyInRequest>>,
    ) -> Result<Response<pb::CopyInResponse>, Status> {
        use pb::copy_in_request::Part;
        let principal = auth::principal(&request)?;
        let (metadata, _, mut parts) = request.into_parts();
        let refused = |problem: &str| Error::invalid("target", problem);
        let first = timeout(ARRIVAL_TIMEOUT, parts.message()).await;
        let first = first.map_err(|_| status::from_error(refused("took too long to arrive")))??;
        let Some(pb::CopyInRequest { part: Some(Part::Target(target)) }) = first else {
            return Err(status::from_error(refused("must be the first message: it says where the data goes")));
        };
        let (whose, copy) = convert::copy_in(target, grpc_deadline(&metadata)).map_err(status::from_error)?;
        let holder = self.holder(&principal, whose)?;
        let copy = of(&holder, copy)?;
        let mut copying = holder.copy_in(copy).await.map_err(status::from_failure)?;
        let has_session = copying.has_session();
        loop {
            let part = tokio::select! {
                biased;
                // Before its data has ended, a COPY ends only by failing.
                done = copying.done() => return copied(done, has_session),
                part = parts.message() => part?,
            };
            match part {
                Some(pb::CopyInRequest { part: Some(Part::Data(data)) }) => copying.put(data).await,
                Some(pb::CopyInRequest { part: Some(Part::Target(_)) }) => {
                    return Err(broken_off(copying, refused("comes once, before the data")).await);
                }
                Some(pb::CopyInRequest { part: None }) => {}
                Some(pb::CopyInRequest { part: Some(Part::End(pb::CopyInEnd {})) }) => {
                    copying.end().await;
                    return copied(copying.done().await, has_session);
                }
                // A caller's leaving looks like the end of its stream: what is complete says so itself.
                None => {
                    let problem = "is missing: it comes last, and says that the data is complete";
                    return Err(broken_off(copying, Error::invalid("end", problem)).await);
                }
            }
        }
    }

    async fn copy_out(&self, request: Request<pb::CopyOutRequest>) -> Result<Response<Self::CopyOutStream>, Status> {
        let principal = auth::principal(&request)?;
        let (metadata, _, request) = request.into_parts();
        let (whose, copy) = convert::copy_out(request, grpc_deadline(&metadata)).map_err(status::from_error)?;
        let holder = self.holder(&principal, whose)?;
        let copy = of(&holder, copy)?;
        let copying = holder.copy_out(copy).await.map_err(status::from_failure)?;
        let parts = stream::unfold(copying, async |mut copying: CopyingOut| {
            let part = copying.next().await?;
            let has_session = copying.has_session();
            Some((part.map(|part| convert::copying_out(part, has_session)).map_err(status::from_failure), copying))
        });
        Ok(Response::new(parts.boxed()))
    }
}

/// A COPY that was read, or what is wrong with it, and where the session stands.
fn of<T>(holder: &Holder, copy: Result<T, Error>) -> Result<T, Status> {
    match holder.session() {
        Some(session) => checked(session, copy),
        None => copy.map_err(status::from_error),
    }
}

/// Why a COPY was broken off by its caller, and where that leaves the session.
async fn broken_off(copying: CopyingIn, why: Error) -> Status {
    match copying.break_off().await {
        Err(failure) => status::from_failure(Failure { error: why, ..failure }),
        Ok(_) => status::from_error(why),
    }
}

fn copied(done: Result<Executed, Failure>, has_session: bool) -> Result<Response<pb::CopyInResponse>, Status> {
    done.map(|done| Response::new(convert::copied_in(done, has_session))).map_err(status::from_failure)
}
