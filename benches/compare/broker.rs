//! Clients of the broker: tonic, with requests that were encoded before.
//!
//! Knows the protocol, and nothing of what is behind it. Invariant: what is sent is what prost would have encoded.

use std::marker::PhantomData;
use std::net::SocketAddr;

use async_trait::async_trait;
use bytes::{BufMut, Bytes};
use http::uri::PathAndQuery;
use prost::Message;
use session_broker::grpc::pb;
use tonic::Status;
use tonic::client::Grpc;
use tonic::codec::{BufferSettings, Codec, DecodeBuf, Decoder, EncodeBuf, Encoder};
use tonic::transport::{Channel, Endpoint};

use crate::cpu::Process;
use crate::servers::Endpoints;
use crate::shape::Changes;
use crate::work::{Caller, Change, Failure, SELECT, UPDATE, ensure};

const BEGIN_SESSION: &str = "/sessionbroker.v1.SessionService/BeginSession";
const EXECUTE: &str = "/sessionbroker.v1.SessionService/Execute";
const COMMIT: &str = "/sessionbroker.v1.SessionService/Commit";
const CLOSE: &str = "/sessionbroker.v1.SessionService/Close";
const RUN: &str = "/sessionbroker.v1.TransactionService/Run";

/// How many clients share an HTTP/2 connection, as the threads of a program do; `CLIENTS_PER_CHANNEL` changes it.
const CLIENTS_PER_CHANNEL: usize = 8;

/// Clients that begin a session for each transaction: BeginSession, Execute, Execute, Commit, Close.
pub(crate) async fn sessions(endpoints: &Endpoints, clients: &[Changes]) -> Result<Vec<Box<dyn Caller>>, Failure> {
    let mut callers: Vec<Box<dyn Caller>> = Vec::with_capacity(clients.len());
    for (calls, changes) in connect(endpoints, clients.len()).await?.into_iter().zip(clients) {
        let statements = changes.iter().map(|change| Statements::encode(*change, Then::StaysOpen)).collect();
        callers.push(Box::new(Session { calls, statements }));
    }
    Ok(callers)
}

/// Clients that keep a session: Execute, Execute with commit.
pub(crate) async fn kept_sessions(endpoints: &Endpoints, clients: &[Changes]) -> Result<Vec<Box<dyn Caller>>, Failure> {
    let mut callers: Vec<Box<dyn Caller>> = Vec::with_capacity(clients.len());
    for (mut calls, changes) in connect(endpoints, clients.len()).await?.into_iter().zip(clients) {
        let statements = changes.iter().map(|change| Statements::encode(*change, Then::Commits)).collect();
        let token = calls.begin_session().await?;
        callers.push(Box::new(KeptSession { calls, token, statements }));
    }
    Ok(callers)
}

/// Clients without a session, which send a whole transaction: Run.
pub(crate) async fn runs(endpoints: &Endpoints, clients: &[Changes]) -> Result<Vec<Box<dyn Caller>>, Failure> {
    let mut callers: Vec<Box<dyn Caller>> = Vec::with_capacity(clients.len());
    for (calls, changes) in connect(endpoints, clients.len()).await?.into_iter().zip(clients) {
        let transactions = changes.iter().map(|change| encode_run(&[read(*change), write(*change)])).collect();
        let reads = changes.iter().map(|change| encode_run(&[read(*change)])).collect();
        callers.push(Box::new(Run { calls, transactions, reads }));
    }
    Ok(callers)
}

/// What so many clients call with.
pub(crate) async fn connect(endpoints: &Endpoints, clients: usize) -> Result<Vec<Calls>, Failure> {
    let channels = channels(endpoints.address(Process::Broker), clients).await?;
    Ok(channels.into_iter().map(|channel| Calls(Grpc::new(channel))).collect())
}

/// A channel for each client, some of which are one.
async fn channels(address: SocketAddr, clients: usize) -> Result<Vec<Channel>, Failure> {
    let per_channel = match std::env::var("CLIENTS_PER_CHANNEL") {
        Ok(number) => number.parse()?,
        Err(_) => CLIENTS_PER_CHANNEL,
    };
    ensure(per_channel > 0, "CLIENTS_PER_CHANNEL must be 1 or more")?;
    let mut channels: Vec<Channel> = Vec::with_capacity(clients);
    for client in 0..clients {
        let channel = match channels.last() {
            Some(channel) if !client.is_multiple_of(per_channel) => channel.clone(),
            _ => Endpoint::from_shared(format!("http://{address}"))?.connect().await?,
        };
        channels.push(channel);
    }
    Ok(channels)
}

/// What a client calls with.
pub(crate) struct Calls(pub(crate) Grpc<Channel>);

impl Calls {
    async fn call<T: Message + Default + 'static>(
        &mut self,
        method: &'static str,
        request: Encoded,
    ) -> Result<T, Failure> {
        self.0.ready().await?;
        let path = PathAndQuery::from_static(method);
        let answer = self.0.unary(tonic::Request::new(request), path, EncodedCodec::default()).await?;
        Ok(answer.into_inner())
    }

    /// Begins a session; returns its token, encoded as every request's first field.
    async fn begin_session(&mut self) -> Result<Bytes, Failure> {
        let begun: pb::BeginSessionResponse = self.call(BEGIN_SESSION, Encoded::default()).await?;
        // A request that has the token alone.
        Ok(pb::CloseRequest { session_token: begun.session_token }.encode_to_vec().into())
    }

    async fn execute(&mut self, token: &Bytes, statement: &Bytes) -> Result<pb::ExecuteResponse, Failure> {
        self.call(EXECUTE, Encoded { token: token.clone(), rest: statement.clone() }).await
    }

    async fn close_session(&mut self, token: Bytes) -> Result<(), Failure> {
        let closed: pb::CloseResponse = self.call(CLOSE, Encoded { token, rest: Bytes::new() }).await?;
        ensure(closed.end_reason() == pb::EndReason::Closed, "the session had ended before it was closed")
    }
}

/// A client with a session for each transaction.
struct Session {
    calls: Calls,
    statements: Vec<Statements>,
}

#[async_trait]
impl Caller for Session {
    async fn transaction(&mut self, number: usize) -> Result<(), Failure> {
        let token = self.calls.begin_session().await?;
        let statements = &self.statements[number];
        is_read(&self.calls.execute(&token, &statements.read).await?)?;
        is_written(&self.calls.execute(&token, &statements.write).await?)?;
        let request = Encoded { token: token.clone(), rest: Bytes::new() };
        let committed: pb::CommitResponse = self.calls.call(COMMIT, request).await?;
        is_committed(Some(&committed))?;
        self.calls.close_session(token).await
    }

    async fn select(&mut self, number: usize) -> Result<(), Failure> {
        let token = self.calls.begin_session().await?;
        is_read(&self.calls.execute(&token, &self.statements[number].read_alone).await?)?;
        self.calls.close_session(token).await
    }
}

/// A client with a session that it keeps.
struct KeptSession {
    calls: Calls,
    token: Bytes,
    statements: Vec<Statements>,
}

#[async_trait]
impl Caller for KeptSession {
    async fn transaction(&mut self, number: usize) -> Result<(), Failure> {
        let statements = &self.statements[number];
        is_read(&self.calls.execute(&self.token, &statements.read).await?)?;
        let written = self.calls.execute(&self.token, &statements.write).await?;
        is_written(&written)?;
        is_committed(written.commit.as_ref())
    }

    async fn select(&mut self, number: usize) -> Result<(), Failure> {
        is_read(&self.calls.execute(&self.token, &self.statements[number].read_alone).await?)
    }

    async fn close(&mut self) -> Result<(), Failure> {
        self.calls.close_session(self.token.clone()).await
    }
}

/// A client without a session.
struct Run {
    calls: Calls,
    transactions: Vec<Bytes>,
    reads: Vec<Bytes>,
}

#[async_trait]
impl Caller for Run {
    async fn transaction(&mut self, number: usize) -> Result<(), Failure> {
        let ran: pb::RunResponse = self.calls.call(RUN, self.transactions[number].clone().into()).await?;
        let [read, written] = ran.results.as_slice() else {
            return Err("Run did not answer for two statements".into());
        };
        ensure(read.rows.len() == 1, "the SELECT returned no row")?;
        ensure(written.row_count == 1, "the UPDATE changed no row")?;
        is_committed(ran.commit.as_ref())
    }

    async fn select(&mut self, number: usize) -> Result<(), Failure> {
        let ran: pb::RunResponse = self.calls.call(RUN, self.reads[number].clone().into()).await?;
        ensure(ran.results.len() == 1 && ran.results[0].rows.len() == 1, "the SELECT returned no row")
    }
}

/// Fails unless the SELECT brought its row.
pub(crate) fn is_read(answer: &pb::ExecuteResponse) -> Result<(), Failure> {
    ensure(answer.rows.len() == 1, "the SELECT returned no row")
}

/// Fails unless the UPDATE changed its row.
pub(crate) fn is_written(answer: &pb::ExecuteResponse) -> Result<(), Failure> {
    ensure(answer.row_count == 1, "the UPDATE changed no row")
}

/// Fails unless this is what a commit answered that committed.
pub(crate) fn is_committed(commit: Option<&pb::CommitResponse>) -> Result<(), Failure> {
    let committed = commit.is_some_and(|commit| commit.outcome() == pb::Outcome::Committed);
    ensure(committed, "the transaction was not committed")
}

/// A statement and its parameters, before they are encoded.
pub(crate) type Statement = (&'static str, Vec<pb::Parameter>);

/// The SELECT.
pub(crate) fn read(change: Change) -> Statement {
    (SELECT, vec![parameter(change.account)])
}

/// The UPDATE.
pub(crate) fn write(change: Change) -> Statement {
    (UPDATE, vec![parameter(change.delta), parameter(change.account)])
}

fn parameter(value: i32) -> pb::Parameter {
    let kind = pb::value::Kind::IntValue(value.into());
    pb::Parameter { value: Some(pb::Value { kind: Some(kind) }), ..Default::default() }
}

/// What a transaction does after a statement.
#[derive(Clone, Copy)]
pub(crate) enum Then {
    /// It waits for more.
    StaysOpen,
    /// It ends, in the same call.
    Commits,
}

/// The request that runs a statement, without its session.
pub(crate) fn execute((sql, parameters): Statement, then: Then) -> pb::ExecuteRequest {
    let commit = matches!(then, Then::Commits);
    pb::ExecuteRequest { sql: sql.to_owned(), parameters, commit, ..Default::default() }
}

/// The requests of a change, but for the session's token.
struct Statements {
    read: Bytes,
    write: Bytes,
    /// The SELECT as a transaction of its own.
    read_alone: Bytes,
}

impl Statements {
    fn encode(change: Change, last: Then) -> Self {
        let encode = |statement, then| Bytes::from(execute(statement, then).encode_to_vec());
        Self {
            read: encode(read(change), Then::StaysOpen),
            write: encode(write(change), last),
            read_alone: encode(read(change), Then::Commits),
        }
    }
}

fn encode_run(statements: &[Statement]) -> Bytes {
    let statements = statements.iter().cloned().map(|(sql, parameters)| pb::RunStatement {
        sql: sql.to_owned(),
        parameters,
        ..Default::default()
    });
    let request = pb::RunRequest { statements: statements.collect(), ..Default::default() };
    request.encode_to_vec().into()
}

/// A request in two parts, of which either may be empty.
#[derive(Default)]
pub(crate) struct Encoded {
    /// The session's token, as a field.
    token: Bytes,
    /// All other fields.
    rest: Bytes,
}

impl From<Bytes> for Encoded {
    /// One without a token.
    fn from(rest: Bytes) -> Self {
        Self { token: Bytes::new(), rest }
    }
}

/// Sends requests as they are, and decodes answers, as any client must.
pub(crate) struct EncodedCodec<T>(PhantomData<fn() -> T>);

impl<T> Default for EncodedCodec<T> {
    fn default() -> Self {
        Self(PhantomData)
    }
}

impl<T: Message + Default + 'static> Codec for EncodedCodec<T> {
    type Encode = Encoded;
    type Decode = T;
    type Encoder = Self;
    type Decoder = Self;

    fn encoder(&mut self) -> Self {
        Self::default()
    }

    fn decoder(&mut self) -> Self {
        Self::default()
    }
}

impl<T> Encoder for EncodedCodec<T> {
    type Item = Encoded;
    type Error = Status;

    fn encode(&mut self, request: Encoded, out: &mut EncodeBuf<'_>) -> Result<(), Status> {
        out.put_slice(&request.token);
        out.put_slice(&request.rest);
        Ok(())
    }

    fn buffer_settings(&self) -> BufferSettings {
        // Room for a request of ours; tonic's default of 8 KiB is for larger ones.
        BufferSettings::new(1024, 32 * 1024)
    }
}

impl<T: Message + Default> Decoder for EncodedCodec<T> {
    type Item = T;
    type Error = Status;

    fn decode(&mut self, answer: &mut DecodeBuf<'_>) -> Result<Option<T>, Status> {
        T::decode(answer).map(Some).map_err(|error| Status::internal(error.to_string()))
    }

    fn buffer_settings(&self) -> BufferSettings {
        BufferSettings::new(1024, 32 * 1024)
    }
}
