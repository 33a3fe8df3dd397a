//! Clients of the web service: HTTP/1.1 over a connection that is kept, as little of it as this service needs.
//!
//! Knows no SQL. Invariant: an answer has been read to its end before the next request is sent.

use async_trait::async_trait;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::cpu::Process;
use crate::servers::Endpoints;
use crate::shape::Changes;
use crate::work::{Caller, Change, Failure, ensure};

/// Clients of the service.
pub(crate) async fn requests(endpoints: &Endpoints, clients: &[Changes]) -> Result<Vec<Box<dyn Caller>>, Failure> {
    let address = endpoints.address(Process::FastApi);
    let mut callers: Vec<Box<dyn Caller>> = Vec::with_capacity(clients.len());
    for changes in clients {
        let stream = TcpStream::connect(address).await?;
        stream.set_nodelay(true)?;
        let encode = |change: &Change| {
            let body = format!("{{\"account\":{},\"delta\":{}}}", change.account, change.delta);
            let length = body.len();
            Encoded {
                change: format!(
                    "POST /changes HTTP/1.1\r\nhost: {address}\r\ncontent-type: application/json\r\n\
                     content-length: {length}\r\n\r\n{body}"
                ),
                read: format!("GET /accounts/{} HTTP/1.1\r\nhost: {address}\r\n\r\n", change.account),
            }
        };
        let requests = changes.iter().map(encode).collect();
        callers.push(Box::new(Connected { stream, requests, answer: Vec::with_capacity(4096) }));
    }
    Ok(callers)
}

/// The requests of a change.
struct Encoded {
    change: String,
    read: String,
}

/// A client of the service.
struct Connected {
    stream: TcpStream,
    requests: Vec<Encoded>,
    answer: Vec<u8>,
}

#[async_trait]
impl Caller for Connected {
    async fn transaction(&mut self, number: usize) -> Result<(), Failure> {
        self.stream.write_all(self.requests[number].change.as_bytes()).await?;
        self.read_answer().await
    }

    async fn select(&mut self, number: usize) -> Result<(), Failure> {
        self.stream.write_all(self.requests[number].read.as_bytes()).await?;
        self.read_answer().await
    }
}

impl Connected {
    async fn read_answer(&mut self) -> Result<(), Failure> {
        self.answer.clear();
        while !is_complete(&self.answer)? {
            let more = self.stream.read_buf(&mut self.answer).await?;
            ensure(more > 0, "the service closed the connection in the middle of an answer")?;
        }
        ensure(self.answer.starts_with(b"HTTP/1.1 200 "), "the service answered something else than 200")
    }
}

/// Whether these bytes are a whole answer.
fn is_complete(answer: &[u8]) -> Result<bool, Failure> {
    let Some((head, body)) = str::from_utf8(answer)?.split_once("\r\n\r\n") else {
        return Ok(false);
    };
    let length = head.lines().find_map(|line| line.strip_prefix("content-length: "));
    Ok(body.len() >= length.ok_or("the service's answer has no content-length")?.parse::<usize>()?)
}
