//! What it takes to read a large result: the figures for `cargo bench --bench streams`.
//!
//! A real broker in a process of its own, a PostgreSQL started for it, psql beside it: the same million rows through each,
//! in turns, to nobody who keeps them. Only ratios within one run mean anything. `ROWS` (1000000) says how many, `ROUNDS`
//! (5) how often.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "it prints its figures, and fails where it cannot")]

use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use bytes::{Buf, Bytes};
use prost::Message;
use session_broker::dev::ThrowAwayPostgres;
use session_broker::grpc::pb;
use session_broker::grpc::pb::session_service_client::SessionServiceClient;
use tokio::time::Instant;
use tonic::Status;
use tonic::client::Grpc;
use tonic::codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder};
use tonic::transport::{Channel, Endpoint};

const COLUMNS: &str = "n::int4 AS a, n::int8 * 1000000007 AS b, md5(n::text) AS c, n / 7.0::float8 AS d, \
    timestamptz '2026-11-22' + n * interval '1 second' AS e";

/// Passes answers on as they are: what is measured is the broker, and not a client.
#[derive(Clone, Copy, Default)]
struct Raw;

impl Codec for Raw {
    type Encode = pb::ExecuteStreamRequest;
    type Decode = Bytes;
    type Encoder = Self;
    type Decoder = Self;

    fn encoder(&mut self) -> Self {
        Self
    }

    fn decoder(&mut self) -> Self {
        Self
    }
}

impl Encoder for Raw {
    type Item = pb::ExecuteStreamRequest;
    type Error = Status;

    fn encode(&mut self, request: Self::Item, out: &mut EncodeBuf<'_>) -> Result<(), Status> {
        request.encode(out).unwrap();
        Ok(())
    }
}

impl Decoder for Raw {
    type Item = Bytes;
    type Error = Status;

    fn decode(&mut self, answer: &mut DecodeBuf<'_>) -> Result<Option<Bytes>, Status> {
        Ok(Some(answer.copy_to_bytes(answer.remaining())))
    }
}

/// The broker, in a process of its own.
struct Broker {
    child: Child,
    address: String,
}

impl Broker {
    fn start(url: &str) -> Self {
        let mut child = Command::new(env!("CARGO_BIN_EXE_session-broker"))
            .args(["serve", "--listen", "127.0.0.1:0"])
            .env("SESSION_BROKER__ENGINES__MAIN__URL", url)
            .env("SESSION_BROKER__AUTHENTICATION__ANONYMOUS", "true")
            .env("SESSION_BROKER__PRINCIPALS__ANONYMOUS__PROFILES", "default")
            .env("SESSION_BROKER__PROFILES__DEFAULT__STATEMENT_TIMEOUT", "10m")
            .env("SESSION_BROKER__PROFILES__DEFAULT__TRANSACTION_TIMEOUT", "10m")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut ready = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut ready).unwrap();
        let address = ready.split_whitespace().last().unwrap().to_owned();
        Self { child, address }
    }

    /// Seconds of CPU it has used, at a hundred ticks a second.
    fn cpu(&self) -> f64 {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.child.id())).unwrap();
        let fields: Vec<&str> = stat.rsplit(") ").next().unwrap().split(' ').collect();
        fields[11..=12].iter().map(|ticks| ticks.parse::<f64>().unwrap()).sum::<f64>() / 100.0
    }

    /// Mebibytes of memory it has, or has had at most.
    fn memory(&self, what: &str) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap();
        let line = status.lines().find(|line| line.starts_with(what)).unwrap();
        line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() / 1024
    }
}

impl Drop for Broker {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn main() {
    let number = |name, default| std::env::var(name).map_or(default, |number| number.parse().unwrap());
    let (rows, rounds) = (number("ROWS", 1_000_000_u64), number("ROUNDS", 5_u64));
    let postgres = ThrowAwayPostgres::start().unwrap();
    let url = postgres.url("sample");
    psql(&url, &format!("CREATE TABLE rows AS SELECT {COLUMNS} FROM generate_series(1, {rows}) AS n"));
    psql(&url, "VACUUM ANALYZE rows");
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let broker = Broker::start(&url);
    runtime.block_on(async {
        let channel = Endpoint::from_shared(format!("http://{}", broker.address)).unwrap().connect_lazy();
        let mut caller = Caller::new(channel);
        let select = "SELECT * FROM rows";
        // Everybody once, unmeasured.
        caller.read(select, pb::ResultFormat::Packed).await;
        let idle = broker.memory("VmRSS");
        let (mut copy, mut packed, mut text, mut values) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        let (mut packed_cpu, mut values_cpu) = (Vec::new(), Vec::new());
        for _ in 0..rounds {
            copy.push(psql(&url, "COPY rows TO STDOUT (FORMAT binary)"));
            let cpu = broker.cpu();
            packed.push(caller.read(select, pb::ResultFormat::Packed).await);
            packed_cpu.push(broker.cpu() - cpu);
            text.push(psql(&url, select));
            let cpu = broker.cpu();
            values.push(caller.read(select, pb::ResultFormat::Values).await);
            values_cpu.push(broker.cpu() - cpu);
        }
        let (copy, packed) = (median(copy), median(packed));
        let (text, values) = (median(text), median(values));
        println!("{rows} rows of int4, int8, text of 32, float8 and timestamptz; medians of {rounds} rounds in turns");
        println!("psql COPY BINARY {copy:.3} s, PACKED {packed:.3} s: {:.2} times its rate", copy / packed);
        println!("psql SELECT {text:.3} s, VALUES {values:.3} s: {:.2} times its rate", text / values);
        #[allow(clippy::cast_precision_loss, reason = "it is printed with two digits")]
        let per_million = 1e6 / rows as f64;
        let (packed_cpu, values_cpu) = (median(packed_cpu) * per_million, median(values_cpu) * per_million);
        println!("broker CPU for a million rows: PACKED {packed_cpu:.2} s, VALUES {values_cpu:.2} s");
        let ten = format!("SELECT {COLUMNS} FROM generate_series(1, {}) AS n", 10 * rows);
        caller.read(&ten, pb::ResultFormat::Values).await;
        let most = broker.memory("VmHWM");
        println!("memory: {idle} MiB at rest, {most} MiB at most, after {} rows as VALUES", 10 * rows);
    });
}

/// Seconds that psql takes, its output thrown away.
fn psql(url: &str, sql: &str) -> f64 {
    let start = Instant::now();
    let status = Command::new("psql").args(["-XAtq", "-c", sql, url]).stdout(Stdio::null()).status().unwrap();
    assert!(status.success());
    start.elapsed().as_secs_f64()
}

/// A caller with a session of its own for each read.
struct Caller {
    channel: Channel,
    sessions: SessionServiceClient<Channel>,
}

impl Caller {
    fn new(channel: Channel) -> Self {
        Self { sessions: SessionServiceClient::new(channel.clone()), channel }
    }

    /// Seconds that the broker takes to bring a result.
    async fn read(&mut self, sql: &str, format: pb::ResultFormat) -> f64 {
        let begun = self.sessions.begin_session(pb::BeginSessionRequest::default()).await.unwrap().into_inner();
        let request = pb::ExecuteStreamRequest {
            session_token: begun.session_token.clone(),
            sql: sql.into(),
            result_format: format.into(),
            commit: true,
            ..Default::default()
        };
        let start = Instant::now();
        let mut client = Grpc::new(self.channel.clone()).max_decoding_message_size(usize::MAX);
        client.ready().await.unwrap();
        let path = "/sessionbroker.v1.SessionService/ExecuteStream".parse().unwrap();
        let mut answers = client.server_streaming(tonic::Request::new(request), path, Raw).await.unwrap().into_inner();
        let mut last = Bytes::new();
        while let Some(answer) = answers.message().await.unwrap() {
            last = answer;
        }
        let took = start.elapsed();
        let last = pb::ExecuteStreamResponse::decode(last).unwrap().part;
        assert!(matches!(last, Some(pb::execute_stream_response::Part::Trailer(trailer)) if trailer.row_count > 0));
        self.sessions.close(pb::CloseRequest { session_token: begun.session_token }).await.unwrap();
        tokio::time::sleep(Duration::from_millis(100)).await;
        took.as_secs_f64()
    }
}

fn median(mut figures: Vec<f64>) -> f64 {
    figures.sort_by(f64::total_cmp);
    figures[figures.len() / 2]
}
