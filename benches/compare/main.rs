//! What a transaction costs through the broker, and through what people use instead: the figures for
//! `cargo bench --bench compare -- --quick` (minutes) and `--full` (half an hour); `--guard` is for checks.
//!
//! PostgreSQL, PgBouncer, a FastAPI service and the broker run side by side with their defaults, and the same work is
//! done through each in turns, round after round. Only ratios within one run mean anything. Figures go to standard
//! output and, with a plot, to target/compare. Invariant: figures are printed only when every answer and every balance
//! was right.
//!
//! `CLIENTS_PER_CHANNEL` (8) says how many clients share an HTTP/2 connection to the broker.

#![allow(clippy::print_stdout, reason = "it prints its figures")]
#![allow(clippy::cast_precision_loss, reason = "figures are printed with three digits")]

mod work;

mod cpu;
mod delay;
mod servers;

mod broker;
mod fastapi;
mod interact;
mod postgres;
mod shape;

mod measure;
mod samples;

mod guard;
mod plot;
mod report;
mod siblings;
mod targets;

use std::fs;
use std::process::ExitCode;
use std::thread::available_parallelism;
use std::time::Duration;

use tokio::runtime::Builder;

use crate::measure::{Distance, Ground, Setting, Time};
use crate::report::Report;
use crate::samples::Samples;
use crate::servers::{Servers, results};
use crate::shape::Shape;
use crate::siblings::Siblings;
use crate::work::{Failure, Work};

/// As far away as a server in the next building: half a millisecond each way.
const ROAD: Duration = Duration::from_micros(500);

/// One, as many as two cores are busy with, and more than any pool here has connections.
const CLIENTS: &[usize] = &[1, 8, 32];

/// How much is measured.
struct Plan {
    name: &'static str,
    rounds: usize,
    time: Time,
    /// With the delay, where only latency counts.
    time_far: Time,
    /// How many clients the SELECT is measured with.
    select_clients: &'static [usize],
    /// Whether the other benches are run too.
    siblings: bool,
}

/// Within four minutes on two cores.
const QUICK: Plan = Plan {
    name: "quick",
    rounds: 3,
    time: Time { warm_up: Duration::from_millis(200), measured: Duration::from_millis(700) },
    time_far: Time { warm_up: Duration::from_millis(100), measured: Duration::from_millis(400) },
    select_clients: &[32],
    siblings: false,
};

/// Within twenty-five minutes on two cores.
const FULL: Plan = Plan {
    name: "full",
    rounds: 5,
    time: Time { warm_up: Duration::from_millis(300), measured: Duration::from_millis(2_500) },
    time_far: Time { warm_up: Duration::from_millis(200), measured: Duration::from_secs(1) },
    select_clients: CLIENTS,
    siblings: true,
};

impl Plan {
    /// What each round measures, in order.
    fn settings(&self) -> Vec<Setting> {
        let setting = |work, clients, distance| Setting { work, clients, distance };
        let transactions = CLIENTS.iter().map(|clients| setting(Work::Transaction, *clients, Distance::Near));
        let selects = self.select_clients.iter().map(|clients| setting(Work::Select, *clients, Distance::Near));
        let far = setting(Work::Transaction, 1, Distance::Far);
        transactions.chain(selects).chain([far]).collect()
    }
}

fn main() -> ExitCode {
    // One thread: load that is made with fewer wake-ups takes less from those that it is made for.
    let runtime = Builder::new_current_thread().enable_all().build().expect("a process may have a runtime");
    // Cargo itself adds --bench.
    let arguments: Vec<String> = std::env::args().skip(1).filter(|argument| argument != "--bench").collect();
    let done = match arguments.iter().map(String::as_str).collect::<Vec<_>>().as_slice() {
        [] | ["--quick"] => runtime.block_on(compare(&QUICK)),
        ["--full"] => runtime.block_on(compare(&FULL)),
        ["--guard"] => runtime.block_on(guard::run()),
        _ => Err("usage: cargo bench --bench compare -- [--quick | --full | --guard]".into()),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("compare: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Measures by a plan, and writes down what came of it.
async fn compare(plan: &Plan) -> Result<(), Failure> {
    let mut ground = Ground::prepare(Servers::start_all().await?).await?;
    let near = ground.servers.endpoints.clone();
    let far = near.at_the_end_of_a_road(ROAD)?;
    let road = delay::measured(ROAD)?;
    let facts = facts(&ground, plan, road).await?;
    let mut samples = Samples::default();
    for round in 0..plan.rounds {
        eprintln!("round {} of {}", round + 1, plan.rounds);
        ground.accounts.tidy().await?;
        for setting in plan.settings() {
            let (endpoints, time) = match setting.distance {
                Distance::Near => (&near, plan.time),
                Distance::Far => (&far, plan.time_far),
            };
            // Another is first in each round, so that what one leaves behind is not always the same one's burden.
            let mut shapes = Shape::ALL;
            shapes.rotate_left(round % Shape::ALL.len());
            for shape in shapes.into_iter().filter(|shape| shape.does(setting.work)) {
                samples.push(ground.measure(round, setting, shape, endpoints, time).await?);
            }
        }
    }
    // The other benches have the machine to themselves.
    drop(ground);
    let siblings = if plan.siblings { Siblings::run()? } else { Siblings::default() };
    let targets = targets::targets(&samples, &siblings);
    write(&Report { facts, clients: CLIENTS, samples, targets })
}

/// When, where and with what.
async fn facts(ground: &Ground, plan: &Plan, road: Duration) -> Result<Vec<(&'static str, String)>, Failure> {
    let (postgres, date) = ground.accounts.version_and_date().await?;
    let cpus = fs::read_to_string("/proc/cpuinfo")?;
    let model = cpus.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
    let model = model.map_or("unknown", |(_, model)| model);
    let cores = available_parallelism()?;
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease")?;
    let Time { measured, .. } = plan.time;
    let mut facts = vec![
        ("date", format!("{date} UTC")),
        ("run", format!("{}, {} rounds in turns, {measured:?} each", plan.name, plan.rounds)),
        ("machine", format!("{cores} cores for everything, {model}, Linux {}", kernel.trim())),
        ("delay", format!("{:.2} ms each way, measured", road.as_secs_f64() * 1e3)),
        ("PostgreSQL", format!("{postgres}, without fsync")),
    ];
    facts.extend(ground.servers.versions().iter().cloned());
    Ok(facts)
}

/// Prints the tables and writes the files.
fn write(report: &Report) -> Result<(), Failure> {
    let directory = results();
    let markdown = report.markdown();
    let subtitle: Vec<&str> = report.facts.iter().take(3).map(|(_, fact)| fact.as_str()).collect();
    fs::write(directory.join("table.md"), &markdown)?;
    fs::write(directory.join("results.json"), format!("{:#}\n", report.json()))?;
    fs::write(directory.join("plot.svg"), plot::plot(&report.samples, report.clients, &subtitle.join("; "))?)?;
    println!("{markdown}\nAll answers and all balances were right. Files: {}", directory.display());
    Ok(())
}
