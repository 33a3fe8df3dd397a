//! Certificates, keys and lists in PEM files.
//!
//! Invariant: what is wrong with a file is told with its name, and nothing of what it holds: it may be a key.

use std::path::Path;

use rustls::pki_types::pem::{Error, PemObject};

/// All that a file holds of one kind; not none.
///
/// # Errors
/// What is wrong with the file, naming it.
pub(crate) fn all<T: PemObject>(path: &Path, kind: &str) -> Result<Vec<T>, String> {
    let failed = |error| problem(path, kind, &error);
    let found: Vec<T> = T::pem_file_iter(path).map_err(failed)?.collect::<Result<_, _>>().map_err(failed)?;
    if found.is_empty() { Err(problem(path, kind, &Error::NoItemsFound)) } else { Ok(found) }
}

/// The first of one kind that a file holds.
///
/// # Errors
/// What is wrong with the file, naming it.
pub(crate) fn one<T: PemObject>(path: &Path, kind: &str) -> Result<T, String> {
    T::from_pem_file(path).map_err(|error| problem(path, kind, &error))
}

fn problem(path: &Path, kind: &str, error: &Error) -> String {
    let path = path.display();
    match error {
        Error::Io(error) => format!("{path}: {error}"),
        Error::NoItemsFound => format!("{path}: holds no {kind}"),
        _ => format!("{path}: is no PEM file"),
    }
}
