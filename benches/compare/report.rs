//! A run's figures for people and for programs: Markdown tables, results.json.
//!
//! Knows what was measured, and nothing of how. Invariant: what was not measured is a dash, never a zero.

use serde_json::{Map, Value, json};

use crate::cpu::Process;
use crate::measure::{Distance, Sample, Setting};
use crate::samples::{Samples, Spread};
use crate::shape::Shape;
use crate::targets::{Good, Target};
use crate::work::Work;

/// Everything that a run has found out.
pub(crate) struct Report {
    /// When, where and with what: a name and what it was.
    pub(crate) facts: Vec<(&'static str, String)>,
    /// How many clients there were at a time, from the least.
    pub(crate) clients: &'static [usize],
    /// The measurements.
    pub(crate) samples: Samples,
    /// What was to be reached.
    pub(crate) targets: Vec<Target>,
}

impl Report {
    /// The tables, with what they are of above them.
    pub(crate) fn markdown(&self) -> String {
        let facts: Vec<String> = self.facts.iter().map(|(name, fact)| format!("{name}: {fact}")).collect();
        let transaction = self.table("BEGIN, SELECT, UPDATE, COMMIT", Work::Transaction);
        let select = self.table("SELECT", Work::Select);
        let tables = [transaction, select, self.targets_table()];
        format!(
            "{}.\n\nMedians of the rounds, in brackets the least and the most. ÷ is the ratio to \"{}\" in the same \
             round. CPU-µs are those of a piece of work, with the most clients.\n\n{}",
            facts.join(". "),
            Shape::PgBouncer.description(),
            tables.join("\n")
        )
    }

    /// The same, and each measurement, for programs.
    pub(crate) fn json(&self) -> Value {
        let facts = self.facts.iter().map(|(name, fact)| ((*name).to_owned(), Value::from(fact.as_str())));
        let facts: Map<String, Value> = facts.collect();
        let samples: Vec<Value> = self.samples.iter().map(sample_json).collect();
        let targets: Vec<Value> = self.targets.iter().map(target_json).collect();
        json!({"facts": facts, "samples": samples, "targets": targets})
    }

    fn table(&self, title: &str, work: Work) -> String {
        let near = |clients| Setting { work, clients, distance: Distance::Near };
        let far = Setting { work, clients: 1, distance: Distance::Far };
        let measured = |setting: Setting| self.samples.iter().any(|sample| sample.setting == setting);
        let settings: Vec<Setting> =
            self.clients.iter().rev().map(|clients| near(*clients)).filter(|setting| measured(*setting)).collect();

        let mut header = vec![title.to_owned()];
        for Setting { clients, .. } in &settings {
            header.push(format!("a second, {clients} {}", if *clients == 1 { "client" } else { "clients" }));
            header.push("÷".to_owned());
        }
        header.extend(["CPU-µs: service", "PostgreSQL", "load generator"].map(str::to_owned));
        if measured(far) {
            header.push("p50 with the delay, ms".to_owned());
        }

        let row = |shape: Shape| {
            let figure = |setting, figure: &dyn Fn(&Sample) -> f64| self.samples.spread(setting, shape, figure);
            let mut row = vec![shape.description().to_owned()];
            for setting in &settings {
                row.push(spread(figure(*setting, &Sample::rate), whole));
                row.push(spread(self.samples.ratio(*setting, shape, Shape::PgBouncer, Sample::rate), two_digits));
            }
            let cpu = |figure_of: &dyn Fn(&Sample) -> f64| {
                spread(settings.first().and_then(|setting| figure(*setting, figure_of)), whole)
            };
            row.push(shape.service().map_or_else(dash, |_| cpu(&Sample::service_cpu_us)));
            row.push(cpu(&|sample: &Sample| sample.cpu_us(Process::Postgres)));
            row.push(cpu(&|sample: &Sample| sample.cpu_us(Process::LoadGenerator)));
            if measured(far) {
                row.push(spread(figure(far, &|sample: &Sample| sample.p50_ms), two_digits));
            }
            row
        };
        let rows = Shape::ALL.into_iter().filter(|shape| shape.does(work)).map(row);
        markdown_table(header, rows)
    }

    fn targets_table(&self) -> String {
        let header = ["Target", "must", "goal", "reached", "holds"].map(str::to_owned).to_vec();
        let row = |target: &Target| {
            let sign = match target.good {
                Good::AtLeast => "≥",
                Good::AtMost => "≤",
            };
            let holds = target.holds().map_or("–", |holds| if holds { "yes" } else { "no" });
            vec![
                target.what.to_owned(),
                format!("{sign} {}", target.must),
                format!("{sign} {}", target.goal),
                target.reached.map_or_else(dash, two_digits),
                holds.to_owned(),
            ]
        };
        markdown_table(header, self.targets.iter().map(row))
    }
}

fn sample_json(sample: &Sample) -> Value {
    let cpu = Process::ALL.map(|process| (process.name().to_owned(), Value::from(sample.cpu_us(process))));
    let cpu: Map<String, Value> = cpu.into_iter().collect();
    let Setting { work, clients, distance } = sample.setting;
    json!({
        "round": sample.round,
        "work": work.name(),
        "clients": clients,
        "delayed": distance == Distance::Far,
        "shape": sample.shape.key(),
        "done": sample.done,
        "seconds": sample.seconds,
        "rate": sample.rate(),
        "p50_ms": sample.p50_ms,
        "p99_ms": sample.p99_ms,
        "cpu_us": cpu,
    })
}

fn target_json(target: &Target) -> Value {
    json!({
        "what": target.what,
        "good": match target.good {
            Good::AtLeast => "at least",
            Good::AtMost => "at most",
        },
        "must": target.must,
        "goal": target.goal,
        "reached": target.reached,
        "holds": target.holds(),
    })
}

/// A table that is read as well as it is rendered: each column as wide as its widest cell.
fn markdown_table(header: Vec<String>, rows: impl Iterator<Item = Vec<String>>) -> String {
    let rule = header.iter().map(|_| "---".to_owned()).collect();
    let lines: Vec<Vec<String>> = [header, rule].into_iter().chain(rows).collect();
    let width = |column: usize| lines.iter().map(|line| line[column].chars().count()).max().unwrap_or_default();
    let widths: Vec<usize> = (0..lines[0].len()).map(width).collect();
    let render = |line: &Vec<String>| {
        let cells = line.iter().zip(&widths).map(|(cell, &width)| format!(" {cell:<width$} "));
        format!("|{}|\n", cells.collect::<Vec<_>>().join("|"))
    };
    lines.iter().map(render).collect()
}

fn spread(spread: Option<Spread>, form: fn(f64) -> String) -> String {
    spread.map_or_else(dash, |Spread { median, least, most }| {
        format!("{} ({}–{})", form(median), form(least), form(most))
    })
}

fn dash() -> String {
    "–".to_owned()
}

fn two_digits(figure: f64) -> String {
    format!("{figure:.2}")
}

/// Without digits behind the point, and a comma between thousands.
pub(crate) fn whole(figure: f64) -> String {
    let digits = format!("{figure:.0}");
    let mut text = String::with_capacity(digits.len() + digits.len() / 3);
    for (position, digit) in digits.chars().enumerate() {
        if position > 0 && (digits.len() - position).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}
