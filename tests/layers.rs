//! The layering: the domain knows no wire format and no driver; each of those is named in one place.

use std::fs;
use std::path::{Path, PathBuf};

/// Who may not say what.
const WALLS: [(&str, &[&str]); 6] = [
    (
        "src/broker",
        &["tonic", "tonic_types", "prost", "prost_types", "tokio_postgres", "deadpool", "deadpool_postgres"],
    ),
    ("src/broker", &["crate::grpc", "crate::postgres", "crate::config", "crate::server", "crate::telemetry"]),
    ("src/grpc", &["tokio_postgres", "deadpool", "deadpool_postgres", "crate::postgres", "crate::config"]),
    ("src/postgres", &["tonic", "tonic_types", "prost", "prost_types", "crate::grpc", "crate::server"]),
    (
        "src/config",
        &["tonic", "tonic_types", "prost", "prost_types", "tokio_postgres", "deadpool", "deadpool_postgres"],
    ),
    ("src/main.rs", &["tonic", "prost", "tokio_postgres", "deadpool"]),
];

#[test]
fn no_layer_says_what_is_anothers() {
    let leaks: Vec<String> = WALLS
        .iter()
        .flat_map(|(layer, forbidden)| {
            let files = sources(Path::new(layer));
            assert!(!files.is_empty(), "{layer} has no sources");
            files.into_iter().flat_map(|file| leaks(&file, forbidden))
        })
        .collect();
    assert!(leaks.is_empty(), "{}", leaks.join("\n"));
}

#[test]
fn a_leak_is_seen_when_there_is_one() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("leak.rs");
    fs::write(&file, "//! Knows no tonic.\nuse tonic::Status;\nfn f(_: prost_types::Any) {}\n").unwrap();
    assert_eq!(leaks(&file, &["tonic", "prost"]).len(), 1);
    assert_eq!(leaks(&file, &["prost_types"]).len(), 1);
}

/// The lines of code, comments left out, that name a forbidden path.
fn leaks(file: &Path, forbidden: &[&str]) -> Vec<String> {
    let text = fs::read_to_string(file).unwrap();
    let lines = text.lines().enumerate().filter(|(_, line)| !line.trim_start().starts_with("//"));
    lines
        .filter(|(_, line)| forbidden.iter().any(|name| names(line, name)))
        .map(|(index, line)| format!("{}:{}: {line}", file.display(), index + 1))
        .collect()
}

/// Whether `line` says `name` as a whole path segment that is used.
fn names(line: &str, name: &str) -> bool {
    line.match_indices(name).any(|(at, _)| {
        let before = line[..at].chars().next_back();
        let after = &line[at + name.len()..];
        !before.is_some_and(|c| c.is_alphanumeric() || c == '_') && (after.starts_with("::") || after.starts_with(';'))
    })
}

fn sources(path: &Path) -> Vec<PathBuf> {
    if path.is_file() {
        return vec![path.to_owned()];
    }
    let entries = fs::read_dir(path).unwrap().map(|entry| entry.unwrap().path());
    entries.flat_map(|path| sources(&path)).filter(|path| path.extension().is_some_and(|e| e == "rs")).collect()
}
