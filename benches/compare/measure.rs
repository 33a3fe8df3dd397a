//! One measurement: so many clients do one piece of work in one shape for some time.
//!
//! Invariants: a measurement in which any client failed is an error and no figure, and so is one after which the
//! balances are not what its answers said; the CPU of a measurement is that of its own transactions.

use std::time::Duration;

use tokio::task::JoinSet;
use tokio::time::{Instant, sleep};

use crate::cpu::{Process, Usage};
use crate::servers::{Endpoints, Servers};
use crate::shape::{Changes, Shape};
use crate::work::{Accounts, CHANGES, Caller, Failure, Work, changes};

/// After the last answer, until what the servers do behind it is done too.
const AFTERMATH: Duration = Duration::from_millis(20);

/// What is measured, but for the shape.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Setting {
    /// What is done.
    pub(crate) work: Work,
    /// How many clients do it, each one piece after the other.
    pub(crate) clients: usize,
    /// How far they are from the server.
    pub(crate) distance: Distance,
}

/// How far clients are from what they connect to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Distance {
    /// On the same machine.
    Near,
    /// At the end of a road.
    Far,
}

/// How long a measurement takes.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Time {
    /// For the servers to get used to it.
    pub(crate) warm_up: Duration,
    /// Until no client begins another piece of work.
    pub(crate) measured: Duration,
}

/// What one measurement has brought.
#[derive(Debug)]
pub(crate) struct Sample {
    /// In which round, from 0.
    pub(crate) round: usize,
    /// What was measured.
    pub(crate) setting: Setting,
    /// By which shape.
    pub(crate) shape: Shape,
    /// How many pieces of work were done.
    pub(crate) done: usize,
    /// In how many seconds.
    pub(crate) seconds: f64,
    /// Half of them took no longer than so many milliseconds.
    pub(crate) p50_ms: f64,
    /// All but a hundredth took no longer.
    pub(crate) p99_ms: f64,
    /// The CPU for all of them.
    usage: Usage,
}

impl Sample {
    /// Pieces of work for each second.
    pub(crate) fn rate(&self) -> f64 {
        self.done as f64 / self.seconds
    }

    /// CPU-microseconds of a process for each piece of work.
    pub(crate) fn cpu_us(&self, process: Process) -> f64 {
        self.usage[process] * 1e6 / self.done as f64
    }

    /// CPU-microseconds of what stands between the client and PostgreSQL, for each piece of work.
    pub(crate) fn service_cpu_us(&self) -> f64 {
        self.shape.service().map_or(0.0, |process| self.cpu_us(process))
    }
}

/// What is measured on: the servers, and the accounts with what should be in them.
pub(crate) struct Ground {
    /// The servers.
    pub(crate) servers: Servers,
    /// The accounts.
    pub(crate) accounts: Accounts,
    /// All balances together, by the answers.
    total: i64,
}

impl Ground {
    /// Makes the accounts on these servers.
    pub(crate) async fn prepare(servers: Servers) -> Result<Self, Failure> {
        let accounts = Accounts::create(&servers.admin_url()).await?;
        Ok(Self { servers, accounts, total: 0 })
    }

    /// Measures a shape, over connections of its own.
    pub(crate) async fn measure(
        &mut self,
        round: usize,
        setting: Setting,
        shape: Shape,
        endpoints: &Endpoints,
        time: Time,
    ) -> Result<Sample, Failure> {
        let of = |error: Failure| {
            Failure::from(format!("{}, {} with {} clients: {error}", shape.key(), setting.work.name(), setting.clients))
        };
        // Of their own in each round: what earlier ones did to the accounts is for nobody alone.
        let seeds = (0..setting.clients).map(|client| (1_000 * round + client) as u64);
        let plans: Vec<Changes> = seeds.map(changes).collect();
        let callers = shape.connect(endpoints, &plans).await.map_err(of)?;
        let clients = callers.into_iter().zip(plans).map(|(caller, changes)| Client { caller, changes, next: 0 });
        let clients: Vec<Client> = clients.collect();

        let (clients, warm_up) = work(clients, setting.work, time.warm_up).await.map_err(of)?;
        sleep(AFTERMATH).await;
        let before = self.servers.usage();
        let start = Instant::now();
        let (clients, done) = work(clients, setting.work, time.measured).await.map_err(of)?;
        let seconds = start.elapsed().as_secs_f64();
        sleep(AFTERMATH).await;
        let usage = self.servers.usage() - before;

        for mut client in clients {
            client.caller.close().await.map_err(of)?;
        }
        self.total += warm_up.added + done.added;
        let total = self.accounts.total().await?;
        if total != self.total {
            let wrong = format!("the balances are {total}, and by the answers {}", self.total);
            return Err(of(wrong.into()));
        }
        // Every client has done one piece at least, so that there are some.
        let mut latencies = done.latencies;
        latencies.sort_unstable();
        let percentile = |percent: usize| latencies[latencies.len() * percent / 100].as_secs_f64() * 1e3;
        Ok(Sample {
            round,
            setting,
            shape,
            done: latencies.len(),
            seconds,
            p50_ms: percentile(50),
            p99_ms: percentile(99),
            usage,
        })
    }
}

/// A client, and where it is in its changes.
struct Client {
    caller: Box<dyn Caller>,
    changes: Changes,
    next: usize,
}

/// What clients have done.
#[derive(Default)]
struct Done {
    /// How long each piece took.
    latencies: Vec<Duration>,
    /// What was added to all balances.
    added: i64,
}

impl Client {
    /// Does one piece of work after the other until it is time.
    async fn work(&mut self, work: Work, until: Instant) -> Result<Done, Failure> {
        let mut done = Done::default();
        let mut start = Instant::now();
        while start < until {
            let number = self.next % CHANGES;
            self.next += 1;
            match work {
                Work::Transaction => {
                    self.caller.transaction(number).await?;
                    done.added += i64::from(self.changes[number].delta);
                }
                Work::Select => self.caller.select(number).await?,
            }
            let end = Instant::now();
            done.latencies.push(end - start);
            start = end;
        }
        Ok(done)
    }
}

/// Lets all clients work at the same time, and gives them back when the last has finished.
async fn work(clients: Vec<Client>, work: Work, time: Duration) -> Result<(Vec<Client>, Done), Failure> {
    let until = Instant::now() + time;
    let mut tasks = JoinSet::new();
    for mut client in clients {
        tasks.spawn(async move {
            let done = client.work(work, until).await;
            (client, done)
        });
    }
    let (mut clients, mut all, mut errors) = (Vec::new(), Done::default(), Vec::new());
    for (client, done) in tasks.join_all().await {
        clients.push(client);
        match done {
            Ok(done) => {
                all.latencies.extend(done.latencies);
                all.added += done.added;
            }
            Err(error) => errors.push(error),
        }
    }
    match errors.first() {
        Some(first) => Err(format!("{} clients failed, the first with: {first}", errors.len()).into()),
        None => Ok((clients, all)),
    }
}
