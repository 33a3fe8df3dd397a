//! What hostile and broken clients send, over raw connections and with raw messages: each is refused or closed, costs
//! next to nothing, and keeps nobody else from the broker.

use std::collections::BTreeSet;
use std::io;
use std::process::Command;
use std::time::Duration;

use prost::Message;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use session_broker::grpc::pb;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::net::tcp::OwnedWriteHalf;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::timeout;
use tonic::Code;
use tonic::transport::Channel;

use crate::command_line::Program;
use crate::support::{Broker, Database, Failure, Session, first_row, int, seconds, until};
use crate::trust::{Site, call, message, rpcs};

const EXECUTE: &str = "/sessionbroker.v1.SessionService/Execute";
const BEGIN_SESSION: &str = "/sessionbroker.v1.SessionService/BeginSession";
const HEALTH: &str = "/grpc.health.v1.Health/Check";
const KEEP_ALIVE: &str = "/sessionbroker.v1.SessionService/KeepAlive";

const PREFACE: &[u8; 24] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

// Kinds of frames and their flags, by RFC 9113, section 6.
const DATA: u8 = 0;
const HEADERS: u8 = 1;
const RST_STREAM: u8 = 3;
const SETTINGS: u8 = 4;
const PUSH_PROMISE: u8 = 5;
const PING: u8 = 6;
const WINDOW_UPDATE: u8 = 8;
const CONTINUATION: u8 = 9;
const ACK: u8 = 1;
const END_STREAM: u8 = 1;
const END_HEADERS: u8 = 4;

/// The longest frame that a server takes unless it says otherwise.
const FRAME_BYTES_MAX: usize = 16 * 1024;

/// As much as a flood may leave behind, in KiB.
const GROWTH_KIB_MAX: u64 = 64 * 1024;

/// What does not happen within ten seconds does not happen.
async fn soon<T>(future: impl Future<Output = T>) -> T {
    timeout(Duration::from_secs(10), future).await.expect("it happens")
}

/// A frame of that kind, with those flags, on that stream.
fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let [_, length @ ..] = u32::try_from(payload.len()).unwrap().to_be_bytes();
    [length.as_slice(), &[kind, flags], &stream.to_be_bytes(), payload].concat()
}

/// A length or an index as HPACK writes it, behind so many bits of something else (RFC 7541, section 5.1).
fn hpack_integer(bits_before: u8, prefix_bits: u32, value: usize) -> Vec<u8> {
    let prefix_max = (1 << prefix_bits) - 1;
    if value < prefix_max {
        return vec![bits_before | u8::try_from(value).unwrap()];
    }
    let mut bytes = vec![bits_before | u8::try_from(prefix_max).unwrap()];
    bytes.extend(varint(value - prefix_max));
    bytes
}

/// A number as HPACK goes on writing it, and as protobuf does from the start.
fn varint(mut value: usize) -> Vec<u8> {
    let mut bytes = Vec::new();
    while value >= 0x80 {
        bytes.push(0x80 | u8::try_from(value & 0x7f).unwrap());
        value >>= 7;
    }
    bytes.push(u8::try_from(value).unwrap());
    bytes
}

fn hpack_text(text: &[u8]) -> Vec<u8> {
    [hpack_integer(0, 7, text.len()), text.to_vec()].concat()
}

/// A header whose name is written out, not kept for later ones.
fn header(name: &str, value: &[u8]) -> Vec<u8> {
    [vec![0], hpack_text(name.as_bytes()), hpack_text(value)].concat()
}

/// The headers of a call. The first bytes are indices of HPACK's table: POST, http, and the names of the next three.
fn call_headers(path: &str) -> Vec<u8> {
    let known = |index: usize, value: &str| [hpack_integer(0, 4, index), hpack_text(value.as_bytes())].concat();
    [vec![0x83, 0x86], known(4, path), known(1, "broker"), known(31, "application/grpc"), header("te", b"trailers")]
        .concat()
}

/// A call whose message is all there.
fn call_frames(stream: u32, path: &str, request: &impl Message) -> Vec<u8> {
    let headers = frame(HEADERS, END_HEADERS, stream, &call_headers(path));
    [headers, frame(DATA, END_STREAM, stream, &message(&request.encode_to_vec()))].concat()
}

/// The frames of headers that may not fit one.
fn header_frames(stream: u32, block: &[u8]) -> Vec<u8> {
    let pieces: Vec<_> = block.chunks(FRAME_BYTES_MAX).collect();
    let last = pieces.len() - 1;
    let frames = pieces.iter().enumerate().map(|(index, piece)| {
        let kind = if index == 0 { HEADERS } else { CONTINUATION };
        frame(kind, if index == last { END_HEADERS } else { 0 }, stream, piece)
    });
    frames.collect::<Vec<_>>().concat()
}

/// So many streams of one connection.
fn streams(count: u32) -> BTreeSet<u32> {
    (0..count).map(|number| 2 * number + 1).collect()
}

#[derive(Debug)]
struct Frame {
    kind: u8,
    flags: u8,
    stream: u32,
    payload: Vec<u8>,
}

async fn read_frame(reader: &mut (impl AsyncRead + Unpin)) -> io::Result<Frame> {
    let mut head = [0; 9];
    reader.read_exact(&mut head).await?;
    let [a, b, c, kind, flags, stream @ ..] = head;
    let mut payload = vec![0; usize::try_from(u32::from_be_bytes([0, a, b, c])).unwrap()];
    reader.read_exact(&mut payload).await?;
    Ok(Frame { kind, flags, stream: u32::from_be_bytes(stream), payload })
}

/// An HTTP/2 connection over which anything can be said.
struct Wire {
    writer: OwnedWriteHalf,
    /// Read whether anybody looks or not, so that both sides can write as much as they like.
    frames: mpsc::UnboundedReceiver<Frame>,
}

impl Wire {
    /// Connects and shows the preface, with no settings.
    async fn open(address: &str) -> Self {
        Self::open_with(address, &[]).await
    }

    /// With these settings.
    async fn open_with(address: &str, settings: &[u8]) -> Self {
        let (mut reader, writer) = TcpStream::connect(address).await.unwrap().into_split();
        let (sender, frames) = mpsc::unbounded_channel();
        tokio::spawn(async move {
            while let Ok(frame) = read_frame(&mut reader).await {
                if sender.send(frame).is_err() {
                    break;
                }
            }
        });
        let mut wire = Self { writer, frames };
        assert!(wire.send(PREFACE).await && wire.send(&frame(SETTINGS, 0, 0, settings)).await);
        wire
    }

    /// Whether the connection took these bytes.
    async fn send(&mut self, bytes: &[u8]) -> bool {
        self.writer.write_all(bytes).await.is_ok()
    }

    /// The next frame; `None` when the connection is closed. Answers pings: whoever is silent is closed for that.
    async fn next(&mut self) -> Option<Frame> {
        let next = self.frames.recv().await?;
        if next.kind == PING && next.flags & ACK == 0 {
            self.send(&frame(PING, ACK, 0, &next.payload)).await;
        }
        Some(next)
    }

    /// Waits until each of these streams is over, if only because the connection is.
    async fn over(&mut self, mut open: BTreeSet<u32>) {
        while !open.is_empty()
            && let Some(next) = self.next().await
        {
            let is_last = match next.kind {
                HEADERS | DATA => next.flags & END_STREAM != 0,
                RST_STREAM => true,
                _ => false,
            };
            if is_last {
                open.remove(&next.stream);
            }
        }
    }

    /// Waits until all that was sent has been looked at, or the connection is closed.
    async fn settle(&mut self) {
        self.send(&frame(PING, 0, 0, b"settled?")).await;
        while let Some(next) = self.next().await {
            if next.kind == PING && next.flags & ACK != 0 {
                return;
            }
        }
    }

    /// Waits until the other side closes the connection.
    async fn closed(mut self) {
        while self.next().await.is_some() {}
    }
}

/// Waits until the other side closes the connection.
async fn is_closed(mut stream: TcpStream) {
    let mut rest = Vec::new();
    // A reset is an end too.
    let _ = stream.read_to_end(&mut rest).await;
}

/// A line of what the system says of a process' memory, in KiB.
fn memory(program: &Program, line: &str) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", program.pid())).unwrap();
    let value = status.lines().find_map(|text| text.strip_prefix(line)).unwrap();
    value.trim().trim_end_matches(" kB").parse().unwrap()
}

/// Another caller does its work meanwhile: a whole transaction, over a connection of its own.
async fn others_work(program: &Program) {
    let session = program.session().await;
    let answer = session.execute_and_commit("SELECT count(*) FROM accounts").await.unwrap();
    assert_eq!(first_row(&answer), [int(2)]);
    session.close().await.unwrap();
}

/// What a flood has taken at its worst is not much.
struct Bounded<'a> {
    program: &'a Program,
    before: u64,
}

impl<'a> Bounded<'a> {
    async fn start(program: &'a Program) -> Self {
        others_work(program).await;
        Self { program, before: program.peak_memory() }
    }

    async fn end(self) {
        others_work(self.program).await;
        let growth = self.program.peak_memory() - self.before;
        assert!(growth < GROWTH_KIB_MAX, "{growth} KiB more");
    }
}

/// Opens a thousand calls that say nothing more; of every other connection, each call announces 16 MiB before. They are
/// there as long as the answer is.
async fn silent_calls(address: &str) -> Vec<Wire> {
    const CONNECTIONS: u32 = 4;
    const ANNOUNCED: [u8; 5] = [0, 1, 0, 0, 0];

    let headers = call_headers(EXECUTE);
    let mut wires = Vec::new();
    for number in 0..CONNECTIONS {
        let mut wire = Wire::open(address).await;
        for stream in streams(1000 / CONNECTIONS) {
            assert!(wire.send(&frame(HEADERS, END_HEADERS, stream, &headers)).await);
            if number % 2 == 1 {
                assert!(wire.send(&frame(DATA, 0, stream, &ANNOUNCED)).await);
            }
        }
        soon(wire.settle()).await;
        wires.push(wire);
    }
    wires
}

/// Opens calls and breaks them off at once, until it is told to stop.
async fn reset_calls(address: &str) {
    const CANCEL: [u8; 4] = [0, 0, 0, 8];

    let mut wire = Wire::open(address).await;
    let headers = call_headers(EXECUTE);
    for stream in streams(5000) {
        let both = [frame(HEADERS, END_HEADERS, stream, &headers), frame(RST_STREAM, 0, stream, &CANCEL)].concat();
        if !wire.send(&both).await {
            return;
        }
    }
    soon(wire.settle()).await;
}

/// Sends headers that are too long, or too many.
async fn long_headers(address: &str) {
    let begun = call_headers(BEGIN_SESSION);
    let many = |count: usize| (0..count).flat_map(|number| header(&format!("x-{number}"), b"1")).collect::<Vec<_>>();
    for block in [
        // Five megabytes in one; many short ones; and no more than a few frames hold.
        header("x-long", &vec![b'x'; 5_000_000]),
        many(20_000),
        header("x-long", &vec![b'x'; 40_000]),
        many(2000),
    ] {
        let mut wire = Wire::open(address).await;
        wire.send(&header_frames(1, &[begun.clone(), block].concat())).await;
        wire.send(&frame(DATA, END_STREAM, 1, &message(&[]))).await;
        soon(wire.over(streams(1))).await;
    }
}

/// Sends headers that never end.
async fn endless_headers(address: &str) {
    for piece in [Vec::new(), header("x-more", &[b'x'; 1000])] {
        let mut wire = Wire::open(address).await;
        wire.send(&frame(HEADERS, 0, 1, &call_headers(EXECUTE))).await;
        let more = frame(CONTINUATION, 0, 1, &piece);
        for _ in 0..10_000 {
            if !wire.send(&more).await {
                break;
            }
        }
        soon(wire.closed()).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_thousand_calls_that_send_nothing_hold_nobody_up_and_are_ended() {
    /// Twice as long as a request may take to arrive.
    const PATIENCE: Duration = Duration::from_mins(1);

    let database = Database::create();
    let broker = Program::serve(&database.url(), "");
    let bounded = Bounded::start(&broker).await;
    let mut ends = JoinSet::new();
    for mut wire in silent_calls(&broker.address).await {
        ends.spawn(async move { wire.over(streams(250)).await });
    }
    // Those that send a little now and then have no more time.
    for path in [EXECUTE, HEALTH] {
        let mut wire = Wire::open(&broker.address).await;
        wire.send(&frame(HEADERS, END_HEADERS, 1, &call_headers(path))).await;
        wire.send(&frame(DATA, 0, 1, &[0, 0, 0, 1, 0])).await;
        ends.spawn(async move {
            while timeout(Duration::from_secs(1), wire.over(streams(1))).await.is_err() {
                wire.send(&frame(DATA, 0, 1, b"x")).await;
            }
        });
    }
    others_work(&broker).await;
    assert!(ends.try_join_next().is_none(), "their time is not over");
    timeout(PATIENCE, ends.join_all()).await.expect("all of them end");
    bounded.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_that_is_not_taken_is_a_call_at_work() {
    const NO_WINDOW: [u8; 6] = [0, 4, 0, 0, 0, 0];

    let database = Database::create();
    let broker = Program::serve(&database.url(), "[principals.anonymous]\ncalls_max = 2");
    let begin = async || Session::begin(broker.client(), pb::BeginSessionRequest::default()).await;
    let mut wire = Wire::open_with(&broker.address, &NO_WINDOW).await;
    for stream in [1, 3] {
        wire.send(&call_frames(stream, BEGIN_SESSION, &pb::BeginSessionRequest::default())).await;
    }
    // Both are at work, and answered but for what needs a window: a call of ours would have taken the place of one before.
    let mut answered = BTreeSet::new();
    while answered != streams(2) {
        let frame = soon(wire.next()).await.expect("both are answered");
        if frame.kind == HEADERS {
            answered.insert(frame.stream);
        }
    }
    assert_eq!(Failure::from(begin().await.err().expect("two are at work")).reason, "QUOTA_EXHAUSTED");
    drop(wire);
    until(async || begin().await.is_ok()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn calls_that_are_reset_as_fast_as_they_can_be_cost_nothing() {
    let database = Database::create();
    let broker = Program::serve(&database.url(), "");
    let bounded = Bounded::start(&broker).await;
    reset_calls(&broker.address).await;
    bounded.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn headers_past_the_limit_are_refused_and_their_call_does_not_run() {
    let database = Database::create();
    let broker = Program::serve(&database.url(), "[telemetry]\nlog = \"session_broker=debug\"");
    let bounded = Bounded::start(&broker).await;
    long_headers(&broker.address).await;
    // The same call with its own headers alone begins a session.
    let mut wire = Wire::open(&broker.address).await;
    wire.send(&call_frames(1, BEGIN_SESSION, &pb::BeginSessionRequest::default())).await;
    soon(wire.over(streams(1))).await;
    // What was logged before the last is in the log with it: one session before the headers, this one, and the last.
    let last = broker.session().await;
    until(async || broker.logged(&["session began", &last.id]) == 1).await;
    assert_eq!(broker.logged(&["session began"]), 3);
    bounded.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn headers_without_an_end_close_their_connection() {
    let database = Database::create();
    let broker = Program::serve(&database.url(), "");
    let bounded = Bounded::start(&broker).await;
    endless_headers(&broker.address).await;
    bounded.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn who_reads_no_answers_holds_up_its_own_stream_only() {
    /// SETTINGS_INITIAL_WINDOW_SIZE, and never an update of it.
    const WINDOW: usize = 1024;
    const SMALL_WINDOW: [u8; 6] = [0, 4, 0, 0, 4, 0];
    const BUSY: &str = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() \
                        AND application_name = 'session-broker' AND state <> 'idle'";

    let database = Database::create();
    let broker = Broker::start(&database).await;
    let short = pb::BeginSessionRequest { lease_ttl: seconds(1), ..Default::default() };
    let (reading, other, witness) = (broker.session_with(short).await, broker.session().await, broker.session().await);
    let large = reading.streaming("SELECT repeat('x', 1000) FROM generate_series(1, 1000000)", vec![]);
    let mut wire = Wire::open_with(&broker.address, &SMALL_WINDOW).await;
    wire.send(&call_frames(1, "/sessionbroker.v1.SessionService/ExecuteStream", &large)).await;
    let mut came = 0;
    while came < WINDOW {
        let next = soon(wire.next()).await.expect("the connection stays");
        if (next.kind, next.stream) == (DATA, 1) {
            came += next.payload.len();
        }
    }
    assert_eq!(came, WINDOW);
    // Neither a call on the same connection nor one on another waits for it.
    wire.send(&call_frames(3, KEEP_ALIVE, &pb::KeepAliveRequest { session_token: other.token.clone() })).await;
    soon(wire.over([3].into())).await;
    witness.execute_and_commit("UPDATE accounts SET balance = 7 WHERE id = 1").await.unwrap();
    assert_eq!(database.balances(), "7 100");
    database.wait_for(BUSY, "1");
    // Once it is gone, so is all that it held.
    drop(wire);
    database.wait_for(BUSY, "0");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_no_http2_closes_its_connection() {
    let database = Database::create();
    let broker = Program::serve(&database.url(), "");
    for text in ["GET / HTTP/1.1\r\nhost: broker\r\n\r\n", "\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0"] {
        let mut stream = TcpStream::connect(&broker.address).await.unwrap();
        stream.write_all(text.as_bytes()).await.unwrap();
        soon(is_closed(stream)).await;
    }
    let request = call_headers(EXECUTE);
    for garbage in [
        // A frame of sixteen megabytes, of no known kind.
        vec![0xff; 4096],
        frame(SETTINGS, 0, 0, &[1, 2, 3]),
        frame(SETTINGS, ACK, 0, &[0; 6]),
        frame(PING, 0, 0, &[0; 7]),
        frame(DATA, 0, 0, b"of no stream"),
        frame(DATA, 0, 1, b"of a stream that is not open"),
        frame(HEADERS, END_HEADERS, 0, &request),
        frame(HEADERS, END_HEADERS, 2, &request),
        // An index that no table has.
        frame(HEADERS, END_HEADERS, 1, &[0xff, 0xff, 0xff, 0xff, 0x0f]),
        frame(CONTINUATION, END_HEADERS, 1, &request),
        frame(PUSH_PROMISE, END_HEADERS, 1, &request),
        frame(WINDOW_UPDATE, 0, 0, &[0; 4]),
        [frame(WINDOW_UPDATE, 0, 0, &0x7fff_ffff_u32.to_be_bytes()), frame(WINDOW_UPDATE, 0, 0, &[0, 0, 0, 1])]
            .concat(),
    ] {
        let mut wire = Wire::open(&broker.address).await;
        wire.send(&garbage).await;
        soon(wire.closed()).await;
    }
    // Whatever it is, the end of it is the end of the connection.
    let mut random = StdRng::seed_from_u64(1);
    for _ in 0..100 {
        let length = random.random_range(1..1000);
        let garbage: Vec<u8> = (0..length).map(|_| random.random()).collect();
        let mut wire = Wire::open(&broker.address).await;
        wire.send(&garbage).await;
        let _ = wire.writer.shutdown().await;
        soon(wire.closed()).await;
    }
    others_work(&broker).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn who_says_half_of_something_is_closed_for_its_silence() {
    let database = Database::create();
    let limits = "[limits]\nconnection_handshake_timeout = \"300ms\"\nconnection_idle_timeout = \"300ms\"";
    let broker = Broker::start_with(&database, "", limits).await;
    let half_a_frame = [PREFACE.as_slice(), &frame(SETTINGS, 0, 0, &[])[..5]].concat();
    for half in [Vec::new(), PREFACE[..10].to_vec(), half_a_frame] {
        let mut stream = TcpStream::connect(&broker.address).await.unwrap();
        stream.write_all(&half).await.unwrap();
        soon(is_closed(stream)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tls_handshake_that_never_finishes_is_broken_off_and_delays_nobody() {
    /// The beginning of a ClientHello of half a kilobyte.
    const BEGUN: [u8; 11] = [0x16, 3, 1, 2, 0, 1, 0, 1, 0xfc, 3, 3];

    let database = Database::create();
    let site = Site::new();
    let sections = format!("{}[limits]\nconnection_handshake_timeout = \"300ms\"", site.tls());
    let broker = Broker::start_with(&database, "", &sections).await;
    let mut stuck = Vec::new();
    for _ in 0..100 {
        let mut stream = TcpStream::connect(&broker.address).await.unwrap();
        stream.write_all(&BEGUN).await.unwrap();
        stuck.push(stream);
    }
    let begun = call(&site.channel(&broker, None), BEGIN_SESSION, &[], message(&[])).await;
    assert_eq!(begun.code(), Code::Ok, "{begun:?}");
    for stream in stuck {
        soon(is_closed(stream)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_compressed_message_is_refused_as_it_is() {
    let database = Database::create();
    let broker = Program::serve(&database.url(), "");
    let bounded = Bounded::start(&broker).await;
    // 200 MB of zeros in some hundred kilobytes.
    let bomb = Command::new("sh").args(["-c", "head -c 200000000 /dev/zero | gzip -1"]).output().unwrap().stdout;
    assert!((1000..2_000_000).contains(&bomb.len()), "{}", bomb.len());
    let mut compressed = message(&bomb);
    compressed[0] = 1;
    for encoding in ["gzip", "deflate", "zstd", "br"] {
        let headers = [("grpc-encoding", encoding)];
        let refused = call(&broker.channel(), EXECUTE, &headers, compressed.clone()).await;
        assert_eq!(refused.code(), Code::Unimplemented, "{encoding}: {refused:?}");
    }
    // Nor is one that does not say how, or says something else.
    for flag in [1, 2, 0xff] {
        compressed[0] = flag;
        let refused = call(&broker.channel(), EXECUTE, &[], compressed.clone()).await;
        assert_ne!(refused.code(), Code::Ok);
    }
    bounded.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_message_that_is_announced_as_too_large_is_not_waited_for() {
    let database = Database::create();
    let broker = Program::serve(&database.url(), "");
    let bounded = Bounded::start(&broker).await;
    for length in [u32::MAX, 1 << 31, 17 * 1024 * 1024] {
        let body = [[0_u8].as_slice(), &length.to_be_bytes(), b"and no more than that"].concat();
        for path in [EXECUTE, BEGIN_SESSION, "/sessionbroker.v1.BulkService/CopyIn"] {
            let refused = call(&broker.channel(), path, &[], body.clone()).await;
            assert_eq!(refused.code(), Code::OutOfRange, "{path}: {refused:?}");
        }
    }
    bounded.end().await;
}

/// An Execute with lists in lists to that depth, made from the innermost outwards and from the last byte to the first.
fn nested(session_token: &str, depth: usize) -> Vec<u8> {
    const VALUES: u8 = 0x0a;
    const LIST_VALUE: u8 = 0x3a;
    const VALUE: u8 = 0x0a;
    const PARAMETERS: u8 = 0x1a;

    let mut reversed = Vec::new();
    let mut wrap = |tag: u8| {
        let length = varint(reversed.len());
        reversed.extend(length.iter().rev());
        reversed.push(tag);
    };
    for _ in 0..depth {
        wrap(LIST_VALUE);
        wrap(VALUES);
    }
    wrap(LIST_VALUE);
    wrap(VALUE);
    wrap(PARAMETERS);
    reversed.reverse();
    let request = pb::ExecuteRequest {
        session_token: session_token.into(),
        sql: "SELECT $1::int4[]".into(),
        ..Default::default()
    };
    [request.encode_to_vec(), reversed].concat()
}

#[tokio::test(flavor = "multi_thread")]
async fn lists_in_lists_without_end_are_refused() {
    let database = Database::create();
    let broker = Program::serve(&database.url(), "");
    let bounded = Bounded::start(&broker).await;
    let session = broker.session().await;
    let channel = broker.channel();
    assert_eq!(call(&channel, EXECUTE, &[], message(&nested(&session.token, 0))).await.code(), Code::Ok);
    for depth in [100, 1000, 100_000] {
        let refused = call(&channel, EXECUTE, &[], message(&nested(&session.token, depth))).await;
        assert_eq!(refused.code(), Code::InvalidArgument, "{depth}: {refused:?}");
    }
    session.execute_and_commit("SELECT 1").await.unwrap();
    bounded.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn whatever_bytes_a_call_holds_its_answer_is_a_status() {
    /// For each RPC.
    const MESSAGES: usize = 100;

    let database = Database::create();
    // With the right to make all calls but the one after which there are no more.
    let broker = Program::serve(&database.url(), "\n[principals.anonymous]\nadmin = true");
    let channel = broker.channel();
    let mut random = StdRng::seed_from_u64(2);
    for path in rpcs().into_iter().filter(|path| !path.ends_with("/Drain")) {
        for number in 0..MESSAGES {
            let length = if number == 0 { 0 } else { random.random_range(1..64) };
            let mut bytes: Vec<u8> = (0..length).map(|_| random.random()).collect();
            // Half of them begin as messages do, with a field's number and a length that fits.
            if number % 2 == 1 && length > 2 {
                bytes[0] = (random.random_range(1..8) << 3) | 2;
                bytes[1] = random.random_range(0..u8::try_from(length - 1).unwrap());
            }
            let answer = soon(call(&channel, &path, &[], message(&bytes))).await;
            let is_defect = matches!(answer.code(), Code::Internal | Code::Unknown | Code::DataLoss);
            assert!(!is_defect, "{path} {bytes:?}: {answer:?}");
        }
    }
    others_work(&broker).await;
}

/// What comes of an Execute of these bytes.
async fn executed(channel: &Channel, bytes: &[u8]) -> Code {
    soon(call(channel, EXECUTE, &[], message(bytes))).await.code()
}

#[tokio::test(flavor = "multi_thread")]
async fn messages_that_other_versions_of_the_protocol_have_are_read_or_refused() {
    let database = Database::create();
    let broker = Broker::start(&database).await;
    let session = broker.session().await;
    let channel = broker.channel();
    let good = session.statement("SELECT $1::int4", vec![int(1)]).encode_to_vec();
    // Field 1000, as a number, eight bytes, a text, a group, and four bytes.
    for unknown in
        [[0xc0_u8, 0x3e, 1].as_slice(), b"\xc1\x3e12345678", b"\xc2\x3e\x01x", b"\xc3\x3e\xc4\x3e", b"\xc5\x3e1234"]
    {
        assert_eq!(executed(&channel, &[good.as_slice(), unknown].concat()).await, Code::Ok, "{unknown:?}");
    }
    for wrong in [
        // Field 2, sql, as a number; as four bytes; as a group; field 3, parameters, as a number.
        [0x10_u8, 1].as_slice(),
        b"\x151234",
        b"\x13\x14",
        &[0x18, 1],
        // A group that does not end, and one that has not begun; field 0; a kind of field that there is none of.
        b"\xc3\x3e",
        b"\x14",
        &[0, 1],
        &[0x0f],
        // A number of eleven bytes; a length past the end; and one past every end.
        &[0xff; 11],
        b"\x12\x7fSELECT",
        b"\x12\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01",
    ] {
        let bytes = [good.as_slice(), wrong].concat();
        assert_eq!(executed(&channel, &bytes).await, Code::InvalidArgument, "{wrong:?}");
    }
    for length in 0..good.len() {
        assert_ne!(executed(&channel, &good[..length]).await, Code::Internal, "the first {length} bytes");
    }
    session.rollback().await.unwrap();
    assert_eq!(executed(&channel, &good).await, Code::Ok);
    session.commit().await.unwrap();
}

#[allow(clippy::print_stdout, reason = "how much is left behind is for a person to judge")]
#[tokio::test(flavor = "multi_thread")]
async fn floods_leave_nothing_behind() {
    /// Floods as many as before leave no more than this: what the allocator keeps comes in steps of megabytes.
    const LEFT_KIB_MAX: u64 = 16 * 1024;

    let database = Database::create();
    let broker = Program::serve(&database.url(), "");
    others_work(&broker).await;
    let start = memory(&broker, "VmRSS:");
    let floods = async || {
        for _ in 0..4 {
            let silent = silent_calls(&broker.address).await;
            reset_calls(&broker.address).await;
            long_headers(&broker.address).await;
            endless_headers(&broker.address).await;
            others_work(&broker).await;
            drop(silent);
        }
    };
    // The first ones leave what the allocator keeps for the next.
    floods().await;
    let before = memory(&broker, "VmRSS:");
    floods().await;
    others_work(&broker).await;
    // Connections that are gone are noticed one after the other.
    until(async || memory(&broker, "VmRSS:") < before + LEFT_KIB_MAX).await;
    let after = memory(&broker, "VmRSS:");
    println!("resident: {start} KiB before the floods, {before} KiB in between, {after} KiB after");
}
