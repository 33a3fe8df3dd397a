//! The Python client, by its own tests against this broker, and by SQLAlchemy's, which nobody here wrote.

use std::path::PathBuf;
use std::process::Command;
use std::sync::LazyLock;

use crate::python::environment;

const CLIENT: &str = "clients/python";

/// A Python with the client and all that its tests need, made once in the build's directory.
static PYTHON: LazyLock<PathBuf> = LazyLock::new(|| {
    let (needs, client) = (format!("{CLIENT}/pyproject.toml"), format!("{CLIENT}[test]"));
    environment("python-client", &needs, &["--editable", &client]).join("bin/python")
});

/// Has Python do something in the client's directory; what it says is told when it fails.
fn python(arguments: &[&str]) {
    let output = Command::new(&*PYTHON)
        .args(arguments)
        .current_dir(CLIENT)
        .env("SESSION_BROKER", env!("CARGO_BIN_EXE_session-broker"))
        .output()
        .unwrap();
    let said = [output.stdout, output.stderr].map(|said| String::from_utf8_lossy(&said).into_owned()).concat();
    assert!(output.status.success(), "{arguments:?}: {}\n{said}", output.status);
}

#[test]
fn its_own_tests_pass() {
    python(&["-m", "pytest", "--quiet"]);
}

#[test]
fn a_part_of_sqlalchemys_dialect_suite_passes_as_with_psycopg() {
    python(&["tests/suite/run.py", "--part"]);
}

#[test]
fn it_is_typed_and_reads_well() {
    python(&["-m", "mypy"]);
    python(&["-m", "ruff", "check", "."]);
    python(&["-m", "ruff", "format", "--check", "."]);
}
