//! A caller in another language: Python's grpcio, with stubs generated from our protocol.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::LazyLock;

use crate::command_line::Program;
use crate::support::Database;

/// A Python with grpcio and the generated stubs, made once in the build's directory.
static PYTHON: LazyLock<PathBuf> = LazyLock::new(|| {
    const REQUIREMENTS: &str = "tests/python/requirements.txt";

    let home = environment("python-caller", REQUIREMENTS, &["--requirement", REQUIREMENTS]);
    let python = home.join("bin/python");
    let stubs = home.join("stubs");
    std::fs::create_dir_all(&stubs).unwrap();
    let protos = ["admin", "bulk", "connect", "error", "notification", "run", "session", "transaction", "value"]
        .map(|name| format!("sessionbroker/v1/{name}.proto"));
    run(Command::new(&python)
        .args(["-m", "grpc_tools.protoc", "-Iproto"])
        .arg(format!("--python_out={}", stubs.display()))
        .arg(format!("--grpc_python_out={}", stubs.display()))
        .args(protos));
    home
});

/// A virtual environment of that name in the build's directory, with what pip installs by these arguments: made when it is
/// not there, and anew when the file that says what is needed has changed.
pub(crate) fn environment(name: &str, needs: &str, install: &[&str]) -> PathBuf {
    let home = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    let installed = home.join(Path::new(needs).file_name().unwrap());
    if std::fs::read(&installed).ok() != std::fs::read(needs).ok() {
        run(Command::new("python3").args(["-m", "venv", "--clear"]).arg(&home));
        run(Command::new(home.join("bin/python")).args(["-m", "pip", "install", "--quiet"]).args(install));
        std::fs::copy(needs, &installed).unwrap();
    }
    home
}

pub(crate) fn run(command: &mut Command) {
    let output = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
}

/// A script of ours, about to call the broker at `address`.
pub(crate) fn python(script: &str, address: &str) -> Command {
    let mut command = Command::new(PYTHON.join("bin/python"));
    command.arg(Path::new("tests/python").join(script)).arg(address).env("PYTHONPATH", PYTHON.join("stubs"));
    command
}

#[test]
fn a_python_caller_drives_a_whole_session() {
    let database = Database::create();
    let broker = Program::serve(&database.url(), "");
    run(&mut python("session.py", &broker.address));
    assert_eq!(database.balances(), "87.50 112.50");
}

#[test]
fn the_readmes_python_session_runs() {
    let readme = std::fs::read_to_string("README.md").unwrap();
    let (_, code) = readme.split_once("```python\n").unwrap();
    let (code, _) = code.split_once("```").unwrap();
    let database = Database::create();
    let broker = Program::serve(&database.url(), "");
    let code = code.replace("127.0.0.1:50051", &broker.address);
    let output = Command::new(PYTHON.join("bin/python"))
        .args(["-c", &code])
        .env("PYTHONPATH", PYTHON.join("stubs"))
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(output.stdout, b"112.50\n");
    assert_eq!(database.balances(), "87.50 112.50");
}
