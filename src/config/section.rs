//! Reads a table of settings key by key, noting every problem with its path instead of stopping at the first.
//!
//! A setting may come as text, as it does from the environment. Invariant: what nobody asked for is a problem.

use std::collections::BTreeSet;
use std::ops::RangeInclusive;
use std::time::Duration;

use humantime::{format_duration, parse_duration};
use toml::{Table, Value};

/// Whether `name` can be a run-time parameter's: words of letters, digits and underscores, joined by dots.
pub(super) fn is_setting_name(name: &str) -> bool {
    name.split('.').all(|word| {
        word.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_')
            && word.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_')
    })
}

/// A name as a TOML key.
pub(super) fn key(name: &str) -> String {
    let is_bare = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'-');
    if !name.is_empty() && name.bytes().all(is_bare) { name.to_owned() } else { format!("{name:?}") }
}

/// Names as a TOML list.
pub(super) fn list(names: &BTreeSet<String>) -> String {
    format!("{:?}", names.iter().collect::<Vec<_>>())
}

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

    /// Whether a key stands here.
    pub(super) fn has(&self, key: &str) -> bool {
        self.table.contains_key(key)
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

    /// Sets a key, as if it had stood here. A key that does already is a problem.
    pub(super) fn add(&mut self, key: String, value: Value) {
        if self.table.contains_key(&key) {
            self.problem(&key, "is given twice, here and in the url");
        } else {
            self.table.insert(key, value);
        }
    }

    /// A list of texts; one text is a list too, split at its commas, as libpq and the environment write lists.
    pub(super) fn list(&mut self, key: &str) -> Vec<String> {
        let text = |value: &Value| match value {
            Value::String(text) => Some(text.clone()),
            Value::Integer(number) => Some(number.to_string()),
            _ => None,
        };
        let list = match self.take(key) {
            None => return Vec::new(),
            Some(Value::Array(values)) => values.iter().map(text).collect(),
            Some(Value::String(list)) => Some(list.split(',').map(|entry| entry.trim().to_owned()).collect()),
            Some(value) => text(&value).map(|entry| vec![entry]),
        };
        list.unwrap_or_else(|| {
            self.problem(key, "must be a list of texts");
            Vec::new()
        })
    }

    pub(super) fn flag(&mut self, key: &str, default: bool) -> bool {
        match self.take(key) {
            None => default,
            Some(Value::Boolean(flag)) => flag,
            Some(Value::String(text)) if text == "true" || text == "1" => true,
            Some(Value::String(text)) if text == "false" || text == "0" => false,
            Some(_) => {
                self.problem(key, "must be true or false");
                default
            }
        }
    }

    /// One of a few words.
    pub(super) fn word<T: Copy>(&mut self, key: &str, words: &[(&str, T)], default: T) -> T {
        let Some(value) = self.take(key) else { return default };
        let found = words.iter().find(|(word, _)| value.as_str() == Some(word));
        found.map_or_else(
            || {
                let words: Vec<_> = words.iter().map(|(word, _)| *word).collect();
                self.problem(key, &format!("must be one of {}", words.join(", ")));
                default
            },
            |(_, value)| *value,
        )
    }

    /// A duration that may be absent.
    pub(super) fn optional_duration(&mut self, key: &str, range: RangeInclusive<Duration>) -> Option<Duration> {
        let given = self.has(key);
        let duration = self.duration(key, Duration::ZERO, range);
        given.then_some(duration)
    }

    /// A number that may be absent.
    pub(super) fn optional_number<N>(&mut self, key: &str, range: RangeInclusive<i64>) -> Option<N>
    where
        N: TryFrom<i64> + Default,
    {
        let given = self.has(key);
        let number = self.number(key, N::default(), range);
        given.then_some(number)
    }

    /// A whole number within `range`, which the number's type must hold.
    pub(super) fn number<N>(&mut self, key: &str, default: N, range: RangeInclusive<i64>) -> N
    where
        N: TryFrom<i64>,
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
