//! The layering: each wire format and each driver is named in one place, and the domain knows none of them.

use std::fs;
use std::path::{Path, PathBuf};

const RPC: [&str; 7] =
    ["tonic", "tonic_types", "tonic_health", "tonic_prost", "tonic_reflection", "prost", "prost_types"];
const DRIVER: [&str; 3] = ["tokio_postgres", "deadpool", "deadpool_postgres"];

const TELEMETRY: [&str; 6] = [
    "opentelemetry",
    "opentelemetry_sdk",
    "opentelemetry_otlp",
    "opentelemetry_prometheus",
    "tracing_opentelemetry",
    "prometheus",
];

/// What may be said in one place only; OTLP goes over gRPC too.
const OWNED: [(&[&str], &[&str]); 4] = [
    (&["axum"], &["src/operations"]),
    (&RPC, &["src/grpc", "src/telemetry/otlp.rs"]),
    (&DRIVER, &["src/postgres"]),
    (&TELEMETRY, &["src/telemetry", "src/names.rs"]),
];

/// Who may not know of whom.
const WALLS: [(&str, &[&str]); 8] = [
    ("src/operations", &["crate::grpc", "crate::postgres", "crate::config", "crate::server", "crate::telemetry"]),
    (
        "src/cli",
        &["crate::broker", "crate::config", "crate::identity", "crate::postgres", "crate::server", "crate::telemetry"],
    ),
    (
        "src/identity",
        &["crate::grpc", "crate::postgres", "crate::config", "crate::server", "crate::acceptor", "crate::telemetry"],
    ),
    (
        "src/acceptor",
        &["crate::grpc", "crate::postgres", "crate::config", "crate::server", "crate::broker", "crate::telemetry"],
    ),
    ("src/broker", &["crate::grpc", "crate::postgres", "crate::config", "crate::server", "crate::telemetry"]),
    ("src/grpc", &["crate::postgres", "crate::config", "crate::server"]),
    ("src/postgres", &["crate::grpc", "crate::config", "crate::server"]),
    ("src/config", &["crate::grpc", "crate::server"]),
];

#[test]
fn what_one_layer_owns_no_other_says() {
    for (words, owners) in OWNED {
        assert!(owners.iter().all(|owner| !sources(Path::new(owner)).is_empty()));
        let is_owned = |file: &PathBuf| owners.iter().any(|owner| file.starts_with(owner));
        let others = sources(Path::new("src")).into_iter().filter(|file| !is_owned(file));
        let leaks: Vec<_> = others.flat_map(|file| leaks(&file, words)).collect();
        assert!(leaks.is_empty(), "{}", leaks.join("\n"));
    }
}

#[test]
fn no_layer_knows_one_above_it() {
    for (layer, forbidden) in WALLS {
        let files = sources(Path::new(layer));
        assert!(!files.is_empty(), "{layer} has no sources");
        let leaks: Vec<_> = files.iter().flat_map(|file| leaks(file, forbidden)).collect();
        assert!(leaks.is_empty(), "{}", leaks.join("\n"));
    }
}

#[test]
fn a_leak_is_seen_when_there_is_one() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("leak.rs");
    fs::write(&file, "//! Knows no tonic.\nuse tonic as t;\nuse {prost, std::io};\nfn prosty(not_tonic: u8) {}\n")
        .unwrap();
    assert_eq!(leaks(&file, &["tonic"]).len(), 1);
    assert_eq!(leaks(&file, &["prost"]).len(), 1);
}

/// The lines of code, comments left out, that say a forbidden word.
fn leaks(file: &Path, forbidden: &[&str]) -> Vec<String> {
    let text = fs::read_to_string(file).unwrap();
    let lines = text.lines().enumerate().filter(|(_, line)| !line.trim_start().starts_with("//"));
    lines
        .filter(|(_, line)| forbidden.iter().any(|word| says(line, word)))
        .map(|(index, line)| format!("{}:{}: {line}", file.display(), index + 1))
        .collect()
}

fn says(line: &str, word: &str) -> bool {
    let part_of_a_word = |c: char| c.is_alphanumeric() || c == '_';
    line.match_indices(word).any(|(at, _)| {
        let before = line[..at].chars().next_back();
        let after = line[at + word.len()..].chars().next();
        !before.is_some_and(part_of_a_word) && !after.is_some_and(part_of_a_word)
    })
}

fn sources(path: &Path) -> Vec<PathBuf> {
    if path.is_file() {
        return vec![path.to_owned()];
    }
    let entries = fs::read_dir(path).unwrap().map(|entry| entry.unwrap().path());
    entries.flat_map(|path| sources(&path)).filter(|path| path.extension().is_some_and(|e| e == "rs")).collect()
}
