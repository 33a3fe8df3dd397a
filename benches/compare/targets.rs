//! What the broker is to reach, and whether it has.
//!
//! Invariant: what a run did not measure counts neither as reached nor as missed.

use crate::measure::{Distance, Sample, Setting};
use crate::samples::Samples;
use crate::shape::Shape;
use crate::siblings::Siblings;
use crate::work::Work;

/// Which side of a number is the good one.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Good {
    /// The number or more.
    AtLeast,
    /// The number or less.
    AtMost,
}

/// Something to be reached.
#[derive(Debug)]
pub(crate) struct Target {
    /// What it is, with its unit.
    pub(crate) what: &'static str,
    /// Which side is good.
    pub(crate) good: Good,
    /// What must be.
    pub(crate) must: f64,
    /// What would be better still.
    pub(crate) goal: f64,
    /// What is: the median; none where it was not measured.
    pub(crate) reached: Option<f64>,
}

impl Target {
    /// Whether what must be is; none where it was not measured.
    pub(crate) fn holds(&self) -> Option<bool> {
        self.reached.map(|reached| match self.good {
            Good::AtLeast => reached >= self.must,
            Good::AtMost => reached <= self.must,
        })
    }
}

/// All of them, with what this run reached.
pub(crate) fn targets(samples: &Samples, siblings: &Siblings) -> Vec<Target> {
    let near = |clients| Setting { work: Work::Transaction, clients, distance: Distance::Near };
    let far = Setting { work: Work::Transaction, clients: 1, distance: Distance::Far };
    let rate = |clients, over, under| Some(samples.ratio(near(clients), over, under, Sample::rate)?.median);
    let cpu = |over, under| Some(samples.ratio(near(32), over, under, Sample::service_cpu_us)?.median);
    let latency = |over, under| Some(samples.ratio(far, over, under, |sample: &Sample| sample.p50_ms)?.median);
    let at_least = |what, must, goal, reached| Target { what, good: Good::AtLeast, must, goal, reached };
    let at_most = |what, must, goal, reached| Target { what, good: Good::AtMost, must, goal, reached };
    vec![
        at_least("c ÷ PgBouncer, 32 clients", 1.8, 2.5, rate(32, Shape::Run, Shape::PgBouncer)),
        at_least("c ÷ PgBouncer, 8 clients", 1.6, 2.2, rate(8, Shape::Run, Shape::PgBouncer)),
        at_least(
            "c ÷ PgBouncer with a pipelining client, 32 clients",
            1.1,
            1.3,
            rate(32, Shape::Run, Shape::PgBouncerPipelined),
        ),
        at_least("c ÷ direct, each step awaited, 32 clients", 0.75, 1.0, rate(32, Shape::Run, Shape::Direct)),
        at_least("b ÷ PgBouncer, 32 clients", 1.3, 1.5, rate(32, Shape::Kept, Shape::PgBouncer)),
        at_least("d2 ÷ PgBouncer, 32 clients", 1.7, 2.0, rate(32, Shape::InteractPipelined, Shape::PgBouncer)),
        at_least("a ÷ PgBouncer, 32 clients", 0.6, 0.75, rate(32, Shape::Session, Shape::PgBouncer)),
        at_least("c ÷ FastAPI and SQLAlchemy, 32 clients", 15.0, 20.0, rate(32, Shape::Run, Shape::FastApi)),
        at_least("CPU: FastAPI and SQLAlchemy's ÷ the broker's for c", 25.0, 40.0, cpu(Shape::FastApi, Shape::Run)),
        at_most("CPU: the broker's for c ÷ PgBouncer's", 0.6, 0.4, cpu(Shape::Run, Shape::PgBouncer)),
        at_least("latency at 0.5 ms each way: direct ÷ c", 3.3, 3.5, latency(Shape::Direct, Shape::Run)),
        at_least("latency at 0.5 ms each way: PgBouncer ÷ c", 3.7, 3.9, latency(Shape::PgBouncer, Shape::Run)),
        at_least("1 M rows: rate of PACKED ÷ psql COPY BINARY", 0.9, 1.0, siblings.packed_rate),
        at_least("1 M rows: rate of VALUES ÷ psql SELECT", 1.2, 1.5, siblings.values_rate),
        at_most("broker memory while streaming, MiB", 32.0, 16.0, siblings.streaming_mib),
        at_most("an idle session at 100,000 of them, bytes", 768.0, 512.0, siblings.idle_session_bytes),
        at_most("100,000 leases due over 2 s: p99 late, ms", 50.0, 20.0, siblings.spread_lateness_ms),
        at_most("100,000 leases due at once: last one late, ms", 500.0, 250.0, siblings.at_once_lateness_ms),
    ]
}
