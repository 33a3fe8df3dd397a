//! The guard against slow changes: whether a transaction still costs the broker and PostgreSQL what it did, in CPU.
//!
//! CPU and not throughput, ratios and not microseconds: a slow, a shared or a busy machine changes both sides alike.
//! Instructions would be steadier still, but counters are not to be had on most machines that run checks, and valgrind
//! leaves out the kernel, where half of the cost is. Invariant: the least of the rounds counts; what else the machine
//! does strikes single rounds, and a change that costs more costs it in every one.

use std::time::Duration;

use crate::cpu::Process;
use crate::measure::{Distance, Ground, Sample, Setting, Time};
use crate::samples::{Samples, Spread};
use crate::servers::Servers;
use crate::shape::Shape;
use crate::work::{Failure, Work, ensure};

const ROUNDS: usize = 7;

const SETTING: Setting = Setting { work: Work::Transaction, clients: 8, distance: Distance::Near };

const TIME: Time = Time { warm_up: Duration::from_millis(300), measured: Duration::from_secs(1) };

/// The broker's CPU for a transaction in one call, over what client and PostgreSQL take without a broker. It was 0.60 when
/// this was set, and the margin is half as much again.
const BROKER_MAX: f64 = 0.9;

/// PostgreSQL's CPU for a transaction in one call, over what it takes for one step by step. It was 1.20 when this was set,
/// the reset included; a Sync of its own for each request and a reset in full made it 2.6.
const POSTGRES_MAX: f64 = 1.8;

/// Measures for half a minute or so, prints the ratios, and fails when one is over its limit.
pub(crate) async fn run() -> Result<(), Failure> {
    let mut ground = Ground::prepare(Servers::start_broker()?).await?;
    let endpoints = ground.servers.endpoints.clone();
    let mut samples = Samples::default();
    for round in 0..ROUNDS {
        for shape in [Shape::Direct, Shape::Run] {
            samples.push(ground.measure(round, SETTING, shape, &endpoints, TIME).await?);
        }
    }
    // What stands for the machine: the same transactions without a broker.
    let broker = |sample: &Sample| {
        if sample.shape == Shape::Run {
            sample.cpu_us(Process::Broker)
        } else {
            sample.cpu_us(Process::Postgres) + sample.cpu_us(Process::LoadGenerator)
        }
    };
    let postgres = |sample: &Sample| sample.cpu_us(Process::Postgres);
    let ratio = |figure: &dyn Fn(&Sample) -> f64| samples.ratio(SETTING, Shape::Run, Shape::Direct, figure);
    let ratios = [
        ("broker CPU of a Run ÷ client and PostgreSQL without it", ratio(&broker), BROKER_MAX),
        ("PostgreSQL CPU of a Run ÷ PostgreSQL's step by step", ratio(&postgres), POSTGRES_MAX),
    ];
    let mut over = Vec::new();
    for (what, spread, limit) in ratios {
        let Spread { median, least, most } = spread.ok_or("nothing was measured")?;
        println!("{what}: {least:.2}, at most {limit} is allowed (median {median:.2}, most {most:.2})");
        if least > limit {
            over.push(what);
        }
    }
    ensure(over.is_empty(), &format!("over its limit: {}", over.join("; ")))
}
