//! The CPU that processes have used, as /proc tells it.
//!
//! Knows no server. Invariant: what a process has used never gets less, children that have ended included, so that a
//! difference is what was used in between.

use std::fs;
use std::ops::{Index, Sub};

/// The kernel's USER_HZ, which is the same on every Linux.
const TICKS_PER_SECOND: f64 = 100.0;

/// Who uses it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Process {
    /// The broker.
    Broker,
    /// PostgreSQL: the postmaster and all that it starts.
    Postgres,
    /// PgBouncer.
    PgBouncer,
    /// FastAPI and SQLAlchemy under uvicorn.
    FastApi,
    /// This process.
    LoadGenerator,
}

impl Process {
    /// All of them, in the order of their declaration.
    pub(crate) const ALL: [Self; 5] =
        [Self::Broker, Self::Postgres, Self::PgBouncer, Self::FastApi, Self::LoadGenerator];

    /// Its name in the results.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Broker => "broker",
            Self::Postgres => "postgresql",
            Self::PgBouncer => "pgbouncer",
            Self::FastApi => "fastapi",
            Self::LoadGenerator => "load_generator",
        }
    }
}

/// Seconds of CPU, for each process.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Usage([f64; Process::ALL.len()]);

impl Usage {
    /// What each has used so far.
    pub(crate) fn now(used: impl Fn(Process) -> f64) -> Self {
        Self(Process::ALL.map(used))
    }
}

impl Index<Process> for Usage {
    type Output = f64;

    fn index(&self, process: Process) -> &f64 {
        &self.0[process as usize]
    }
}

impl Sub for Usage {
    type Output = Self;

    fn sub(self, earlier: Self) -> Self {
        Self(Process::ALL.map(|process| self[process] - earlier[process]))
    }
}

/// Seconds that a process has used, all its threads together; 0 when there is none.
pub(crate) fn of(pid: u32) -> f64 {
    Stat::read(pid).map_or(0.0, |stat| stat.own)
}

/// Seconds that a process and its children have used, those that have ended included.
pub(crate) fn of_family(parent: u32) -> f64 {
    let entries = fs::read_dir("/proc").into_iter().flatten();
    let pids = entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<u32>().ok());
    let children = pids
        .filter_map(|pid| Some((pid, Stat::read(pid)?)))
        .filter(|(_, stat)| stat.parent == parent)
        .map(|(pid, stat)| of_thread(pid).unwrap_or(stat.own));
    // Before the parent, who takes over what a child has used when it ends.
    let children: f64 = children.sum();
    children + Stat::read(parent).map_or(0.0, |stat| stat.own + stat.ended_children)
}

/// Seconds that a process of one thread has used, to the nanosecond: of dozens of backends, each of which does a
/// little, ticks would lose too much.
fn of_thread(pid: u32) -> Option<f64> {
    let text = fs::read_to_string(format!("/proc/{pid}/schedstat")).ok()?;
    Some(text.split(' ').next()?.parse::<f64>().ok()? / 1e9)
}

/// What `/proc/PID/stat` says.
struct Stat {
    parent: u32,
    /// Seconds of its own threads.
    own: f64,
    /// Seconds of its children that have ended.
    ended_children: f64,
}

impl Stat {
    fn read(pid: u32) -> Option<Self> {
        let text = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        // The program's name, which may hold anything, ends with the last parenthesis.
        let (_, fields) = text.rsplit_once(") ")?;
        let fields: Vec<&str> = fields.split(' ').collect();
        let seconds = |ticks: &[&str]| {
            let ticks: Result<Vec<f64>, _> = ticks.iter().map(|ticks| ticks.parse::<f64>()).collect();
            Some(ticks.ok()?.iter().sum::<f64>() / TICKS_PER_SECOND)
        };
        Some(Self {
            parent: fields.get(1)?.parse().ok()?,
            own: seconds(fields.get(11..=12)?)?,
            ended_children: seconds(fields.get(13..=14)?)?,
        })
    }
}
