//! Reads a table of settings key by key, noting every problem with its path instead of stopping at the first.
//!
//! A setting may come as text, as it does from the environment. Invariant: what nobody asked for is a problem.

use std::collections::BTreeSet;
use std::fmt::Display;
use std::ops::RangeInclusive;
use std::time::Duration;

use humantime::{format_duration, parse_duration};
use toml::{Table, Value};

/// The problems found so far.
#[derive(Debug, Default)]
pub(super) struct Problems(Vec<String>);

impl Problems {
    pub(super) fn add(&mut self, path: &str, problem: &str) {
        self.0.push(format!("{path}: {problem}"));
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(super) fn into_vec(self) -> Vec<String> {
        self.0
    }
}

/// A table being read.
pub(super) struct Section<'a> {
    /// Where it is: empty at the root, else ending in a dot.
    prefix: String,
    table: Table,
    /// The keys asked for.
    known: BTreeSet<String>,
    problems: &'a mut Problems,
}

impl<'a> Section<'a> {
    pub(super) fn new(prefix: String, table: Table, problems: &'a mut Problems) -> Self {
        Self { prefix, table, known: BTreeSet::new(), problems }
    }

    pub(super) fn problem(&mut self, key: &str, problem: &str) {
        self.problems.add(&format!("{}{key}", self.prefix), problem);
    }

    /// The keys not yet asked for.
    pub(super) fn keys(&self) -> Vec<String> {
        self.table.keys().cloned().collect()
    }

    /// The section of that name; an absent one reads as empty.
    pub(super) fn section(&mut self, key: &str) -> Section<'_> {
        let table = match self.take(key) {
            None => Table::new(),
            Some(Value::Table(table)) => table,
            Some(_) => {
                self.problem(key, &format!("must be a section: [{}{key}]", self.prefix));
                Table::new()
            }
        };
        Section::new(format!("{}{key}.", self.prefix), table, self.problems)
    }

    pub(super) fn text(&mut self, key: &str) -> Option<String> {
        match self.take(key)? {
            Value::String(text) => Some(text),
            _ => {
                self.problem(key, "must be text in quotes");
                None
            }
        }
    }

    /// A whole number within `range`, which the number's type must hold.
    pub(super) fn number<N>(&mut self, key: &str, default: N, range: RangeInclusive<i64>) -> N
    where
        N: TryFrom<i64> + Display,
    {
        let number = match self.take(key) {
            None => return default,
            Some(Value::Integer(number)) => Some(number),
            Some(Value::String(text)) => text.parse().ok(),
            Some(_) => None,
        };
        match number.filter(|number| range.contains(number)).map(N::try_from) {
            Some(Ok(number)) => number,
            _ => {
                self.problem(key, &format!("must be a whole number from {} to {}", range.start(), range.end()));
                default
            }
        }
    }

    /// A duration within `range`, such as "30s", "5m" or "1h 30m".
    pub(super) fn duration(&mut self, key: &str, default: Duration, range: RangeInclusive<Duration>) -> Duration {
        let duration = match self.take(key) {
            None => return default,
            Some(Value::String(text)) => parse_duration(&text).ok(),
            Some(_) => None,
        };
        duration.filter(|duration| range.contains(duration)).unwrap_or_else(|| {
            let (from, to) = (format_duration(*range.start()), format_duration(*range.end()));
            self.problem(key, &format!("must be a duration such as \"30s\", from {from} to {to}"));
            default
        })
    }

    /// Notes the keys that nobody asked for.
    pub(super) fn finish(mut self) {
        for key in self.keys() {
            /// How alike two keys must be to be taken for a slip: one letter in five.
            const ALIKE: f64 = 0.8;
            let alike = |known: &&String| strsim::jaro_winkler(known, &key) >= ALIKE;
            let nearest = self
                .known
                .iter()
                .filter(alike)
                .max_by(|a, b| strsim::jaro_winkler(a, &key).total_cmp(&strsim::jaro_winkler(b, &key)));
            let problem = match nearest {
                Some(nearest) => format!("unknown key: did you mean {nearest}?"),
                None => {
                    let known: Vec<_> = self.known.iter().map(String::as_str).collect();
                    format!("unknown key: known are {}", known.join(", "))
                }
            };
            self.problem(&key, &problem);
        }
    }

    fn take(&mut self, key: &str) -> Option<Value> {
        self.known.insert(key.to_owned());
        self.table.remove(key)
    }
}
