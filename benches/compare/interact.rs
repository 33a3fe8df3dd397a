//! Clients of the broker with a stream each, on which the statements are messages.
//!
//! Knows the protocol, and nothing of what is behind it. Invariant: an answer is taken for each message, in order,
//! before the next piece of work begins.

use async_trait::async_trait;
use bytes::Bytes;
use futures_util::stream;
use http::uri::PathAndQuery;
use prost::Message;
use session_broker::grpc::pb;
use session_broker::grpc::pb::interact_request::Request as Asked;
use session_broker::grpc::pb::interact_response::Response as Answer;
use tokio::sync::mpsc::{UnboundedSender, unbounded_channel};
use tonic::Streaming;

use crate::broker::{self, Calls, Encoded, EncodedCodec, Then};
use crate::postgres::Steps;
use crate::servers::Endpoints;
use crate::shape::Changes;
use crate::work::{Caller, Failure, ensure};

const INTERACT: &str = "/sessionbroker.v1.SessionService/Interact";

/// Clients that have a stream open, with a session that it has begun.
pub(crate) async fn streams(
    endpoints: &Endpoints,
    clients: &[Changes],
    steps: Steps,
) -> Result<Vec<Box<dyn Caller>>, Failure> {
    let mut callers: Vec<Box<dyn Caller>> = Vec::with_capacity(clients.len());
    for (calls, changes) in broker::connect(endpoints, clients.len()).await?.into_iter().zip(clients) {
        let encode = |statement, then| encode(Asked::Execute(broker::execute(statement, then)));
        let messages = changes.iter().map(|change| Messages {
            read: encode(broker::read(*change), Then::StaysOpen),
            write: encode(broker::write(*change), Then::Commits),
            read_alone: encode(broker::read(*change), Then::Commits),
        });
        callers.push(Box::new(Stream::open(calls, messages.collect(), steps).await?));
    }
    Ok(callers)
}

/// The messages of a change.
struct Messages {
    read: Bytes,
    write: Bytes,
    /// The SELECT as a transaction of its own.
    read_alone: Bytes,
}

fn encode(request: Asked) -> Bytes {
    pb::InteractRequest { request: Some(request), ..Default::default() }.encode_to_vec().into()
}

/// A client with a stream.
struct Stream {
    /// What the client says; gone when it has said all.
    requests: Option<UnboundedSender<Encoded>>,
    answers: Streaming<pb::InteractResponse>,
    steps: Steps,
    messages: Vec<Messages>,
    /// Keeps the connection open.
    _calls: Calls,
}

impl Stream {
    /// Opens it, and has a session begin.
    async fn open(mut calls: Calls, messages: Vec<Messages>, steps: Steps) -> Result<Self, Failure> {
        // No more than two wait in it.
        let (requests, mut said) = unbounded_channel::<Encoded>();
        // The broker answers when it has a message, so that one is there first.
        requests.send(encode(Asked::BeginSession(pb::BeginSessionRequest::default())).into())?;
        calls.0.ready().await?;
        let said = tonic::Request::new(stream::poll_fn(move |context| said.poll_recv(context)));
        let path = PathAndQuery::from_static(INTERACT);
        let answers = calls.0.streaming(said, path, EncodedCodec::default()).await?.into_inner();
        let mut stream = Self { requests: Some(requests), answers, steps, messages, _calls: calls };
        let begun = stream.answer().await?;
        ensure(matches!(begun, Answer::BeginSession(_)), "the stream did not begin a session")?;
        Ok(stream)
    }

    fn say(&self, message: &Bytes) -> Result<(), Failure> {
        let requests = self.requests.as_ref().ok_or("the client has said all")?;
        Ok(requests.send(message.clone().into())?)
    }

    async fn answer(&mut self) -> Result<Answer, Failure> {
        let message = self.answers.message().await?.ok_or("the stream ended before its answer")?;
        message.response.ok_or_else(|| "a message has no answer in it".into())
    }

    /// The next answer, which must be that of a statement.
    async fn executed(&mut self) -> Result<pb::ExecuteResponse, Failure> {
        match self.answer().await? {
            Answer::Execute(executed) => Ok(executed),
            Answer::Failure(failure) => Err(failure.message.into()),
            Answer::SessionState(_)
            | Answer::BeginSession(_)
            | Answer::ExecuteBatch(_)
            | Answer::Commit(_)
            | Answer::Rollback(_)
            | Answer::CreateSavepoint(_)
            | Answer::ReleaseSavepoint(_) => Err("a statement was answered as something else".into()),
        }
    }
}

#[async_trait]
impl Caller for Stream {
    async fn transaction(&mut self, number: usize) -> Result<(), Failure> {
        self.say(&self.messages[number].read)?;
        let read = match self.steps {
            Steps::Awaited => {
                let read = self.executed().await?;
                self.say(&self.messages[number].write)?;
                read
            }
            Steps::Pipelined => {
                self.say(&self.messages[number].write)?;
                self.executed().await?
            }
        };
        broker::is_read(&read)?;
        let written = self.executed().await?;
        broker::is_written(&written)?;
        broker::is_committed(written.commit.as_ref())
    }

    async fn select(&mut self, number: usize) -> Result<(), Failure> {
        self.say(&self.messages[number].read_alone)?;
        broker::is_read(&self.executed().await?)
    }

    async fn close(&mut self) -> Result<(), Failure> {
        self.requests = None;
        let more = self.answers.message().await?;
        ensure(more.is_none(), "the stream answered more messages than were sent")
    }
}
