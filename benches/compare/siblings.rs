//! The figures of the other benches, `leases` and `streams`, which have their own ways of measuring: each is run, and
//! its lines are read.
//!
//! Invariant: a figure that their lines do not have is missing here, and not invented.

use std::process::Command;

use crate::servers::output_of;
use crate::work::Failure;

/// What they print, where this reads it.
#[derive(Debug, Default)]
pub(crate) struct Siblings {
    /// Bytes of an idle session, at 100,000 of them.
    pub(crate) idle_session_bytes: Option<f64>,
    /// How late the last hundredth of 100,000 leases was that were due over 2 s, in milliseconds.
    pub(crate) spread_lateness_ms: Option<f64>,
    /// How late the last of 100,000 leases was that were all due at once, in milliseconds.
    pub(crate) at_once_lateness_ms: Option<f64>,
    /// The rate of a million packed rows over that of psql's binary COPY.
    pub(crate) packed_rate: Option<f64>,
    /// The rate of a million rows as values over that of psql's SELECT.
    pub(crate) values_rate: Option<f64>,
    /// Mebibytes that the broker had at most while it streamed.
    pub(crate) streaming_mib: Option<f64>,
}

impl Siblings {
    /// Runs both, a few minutes long.
    pub(crate) fn run() -> Result<Self, Failure> {
        let (leases, streams) = (bench("leases")?, bench("streams")?);
        Ok(Self::read(&leases, &streams))
    }

    fn read(leases: &str, streams: &str) -> Self {
        Self {
            idle_session_bytes: number(leases, "idle sessions: ", " bytes each"),
            spread_lateness_ms: milliseconds(line(leases, "due over 2 s: "), "p99 "),
            at_once_lateness_ms: milliseconds(line(leases, "due at once: "), "last "),
            packed_rate: number(line(streams, "psql COPY BINARY "), ": ", " times its rate"),
            values_rate: number(line(streams, "psql SELECT "), ": ", " times its rate"),
            streaming_mib: number(line(streams, "memory: "), "at rest, ", " MiB at most"),
        }
    }
}

/// What a bench prints; it is compiled first where it has changed.
fn bench(name: &str) -> Result<String, Failure> {
    let directory = env!("CARGO_MANIFEST_DIR");
    output_of(Command::new(env!("CARGO")).args(["bench", "--locked", "--bench", name]).current_dir(directory))
}

/// The line that begins so; empty where there is none.
fn line<'a>(text: &'a str, beginning: &str) -> &'a str {
    text.lines().find(|line| line.starts_with(beginning)).unwrap_or_default()
}

/// The number between two texts.
fn number(text: &str, before: &str, after: &str) -> Option<f64> {
    let (_, text) = text.split_once(before)?;
    let (number, _) = text.split_once(after)?;
    number.parse().ok()
}

/// The duration behind a text, as Rust prints durations.
fn milliseconds(text: &str, before: &str) -> Option<f64> {
    let (_, text) = text.split_once(before)?;
    let text = text.split([',', ' ']).next()?;
    let units = [("ms", 1.0), ("µs", 1e-3), ("ns", 1e-6), ("s", 1e3)];
    let (number, unit) = units.iter().find_map(|(name, unit)| Some((text.strip_suffix(*name)?, unit)))?;
    Some(number.parse::<f64>().ok()? * unit)
}
