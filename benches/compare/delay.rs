//! A road of a known length between a client and a server: what is sent over it arrives so much later.
//!
//! Threads and not tasks, as tokio's timers count whole milliseconds. Knows nothing of what it carries. Invariant:
//! bytes arrive in order and each as much later as the others, however many are on their way: it adds latency, and
//! takes no throughput.

#![allow(clippy::disallowed_methods, reason = "its threads sleep, and no runtime runs on them")]

use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use tokio::time::Instant;

/// An address whose connections lead to `target`, either direction taking `delay`. It is there until the process ends.
/// To be called on the main thread, which is the one whose timer slack threads get here.
pub(crate) fn road_to(target: SocketAddr, delay: Duration) -> io::Result<SocketAddr> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let address = listener.local_addr()?;
    set_timer_slack("1");
    thread::spawn(move || {
        for client in listener.incoming().map_while(Result::ok) {
            // A server that cannot be reached looks like one that closes the connection.
            let _ = TcpStream::connect(target).and_then(|server| join(client, server, delay));
        }
    });
    set_timer_slack(DEFAULT_TIMER_SLACK);
    Ok(address)
}

/// What the kernel takes for its default, which is 50 µs.
const DEFAULT_TIMER_SLACK: &str = "0";

/// How many nanoseconds later than asked the main thread may be woken, and threads and processes that it starts. Where
/// it cannot be set the road is longer by as much, which [`measured`] tells.
fn set_timer_slack(nanoseconds: &str) {
    let _ = std::fs::write("/proc/self/timerslack_ns", nanoseconds);
}

/// How long a road of this length proves to be: half of what it adds to a round trip.
pub(crate) fn measured(delay: Duration) -> io::Result<Duration> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let near = listener.local_addr()?;
    thread::spawn(move || {
        for stream in listener.incoming().map_while(Result::ok) {
            thread::spawn(move || io::copy(&mut &stream, &mut &stream));
        }
    });
    let far = road_to(near, delay)?;
    Ok(round_trip(far)?.saturating_sub(round_trip(near)?) / 2)
}

/// The median of many, to a server that says what it hears.
fn round_trip(address: SocketAddr) -> io::Result<Duration> {
    const ROUND_TRIPS: usize = 201;
    let mut stream = TcpStream::connect(address)?;
    stream.set_nodelay(true)?;
    let mut message = [0; 64];
    let mut took = Vec::with_capacity(ROUND_TRIPS);
    for _ in 0..ROUND_TRIPS {
        let start = Instant::now();
        stream.write_all(&message)?;
        stream.read_exact(&mut message)?;
        took.push(start.elapsed());
    }
    took.sort_unstable();
    Ok(took[ROUND_TRIPS / 2])
}

fn join(client: TcpStream, server: TcpStream, delay: Duration) -> io::Result<()> {
    client.set_nodelay(true)?;
    server.set_nodelay(true)?;
    carry(client.try_clone()?, server.try_clone()?, delay);
    carry(server, client, delay);
    Ok(())
}

/// Carries one direction of a connection: one thread takes what is sent and notes when it is due, another brings it.
fn carry(mut from: TcpStream, mut to: TcpStream, delay: Duration) {
    let (road, arrivals) = mpsc::channel::<(Instant, Vec<u8>)>();
    thread::spawn(move || {
        let mut buffer = vec![0; 64 * 1024];
        while let Ok(length @ 1..) = from.read(&mut buffer) {
            if road.send((Instant::now() + delay, buffer[..length].to_vec())).is_err() {
                return;
            }
        }
    });
    thread::spawn(move || {
        for (due, bytes) in arrivals {
            thread::sleep(due.saturating_duration_since(Instant::now()));
            if to.write_all(&bytes).is_err() {
                return;
            }
        }
        // The end arrives as everything before it. A receiver that has gone already needs none.
        let _ = to.shutdown(Shutdown::Write);
    });
}
