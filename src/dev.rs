//! A real, throw-away PostgreSQL for `session-broker dev` and for tests.
//!
//! A small shell script makes the cluster, runs the server, and waits for the end of its standard input, which this
//! process holds. Invariant: however this process ends, killed included, the input ends with it, and then the server
//! stops and its directory goes.

use std::ffi::OsString;
use std::fs::{self, DirBuilder};
use std::io::{self, Read, Write};
use std::net::TcpListener;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, chown};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use crate::random::random;

/// `$1` the binaries' directory, `$2` the cluster's own directory, `$3` the port. Durability is off: nothing is to last.
const SCRIPT: &str = r#"
bin=$1 dir=$2 port=$3
server=
fail() { cat "$dir/log" >&2; exit 1; }
trap 'rm -rf "$dir"' EXIT
trap '' INT
"$bin/initdb" -D "$dir/data" -U postgres -A scram-sha-256 --pwfile="$dir/password" -E UTF8 --locale=C --no-sync \
    >"$dir/log" 2>&1 || fail
for database in postgres sample; do
    "$bin/postgres" --single -j -D "$dir/data" "$database" <"$dir/$database.sql" >>"$dir/log" 2>&1 || fail
done
start() {
    "$bin/postgres" -D "$dir/data" -c listen_addresses=127.0.0.1 -c port="$port" -c unix_socket_directories="$dir" \
        -c fsync=off -c synchronous_commit=off -c full_page_writes=off -c max_connections=200 -c timezone=UTC \
        >>"$dir/log" 2>&1 &
    server=$!
    for _ in $(seq 300); do
        grep -q ready "$dir/data/postmaster.pid" 2>/dev/null && break
        kill -0 $server 2>/dev/null || fail
        sleep 0.1
    done
    grep -q ready "$dir/data/postmaster.pid" || fail
    echo ready
}
trap '[ -z "$server" ] || { kill -QUIT $server 2>/dev/null; wait $server; }; rm -rf "$dir"' EXIT
start
while read -r command; do
    # The only one there is: restart.
    kill -INT $server
    wait $server
    start
done
"#;

/// The sample database's tables, for a first call.
const SAMPLE: &str = "\
CREATE TABLE accounts (
    id int4 PRIMARY KEY,
    owner text NOT NULL,
    balance numeric(12, 2) NOT NULL CHECK (balance >= 0)
);

INSERT INTO accounts VALUES (1, 'Ada', 100.00), (2, 'Grace', 50.00);

ALTER TABLE accounts OWNER TO broker;

";

/// A running PostgreSQL that stops and vanishes when it is dropped.
#[derive(Debug)]
pub struct ThrowAwayPostgres {
    script: Child,
    directory: PathBuf,
    port: u16,
    password: String,
}

/// Why there is no PostgreSQL.
#[derive(Debug, thiserror::Error)]
pub enum DevError {
    /// The server's programs are not on this machine.
    #[error(
        "PostgreSQL's server programs were not found in $PG_BIN, on the PATH or where packages put them: \
         run `make setup`, or install the package postgresql"
    )]
    NotInstalled,
    /// Something around it failed.
    #[error("cannot prepare a throw-away PostgreSQL: {0}")]
    Io(#[from] io::Error),
    /// The server did not start.
    #[error("the throw-away PostgreSQL did not start:\n{0}")]
    NotStarted(String),
}

impl ThrowAwayPostgres {
    /// Makes a cluster with the sample database and starts its server on a free port of 127.0.0.1. Takes two seconds or
    /// so, blocking.
    ///
    /// # Errors
    /// [`DevError`], with the server's log when it would not start.
    pub fn start() -> Result<Self, DevError> {
        let bin = server_programs().ok_or(DevError::NotInstalled)?;
        let id = random_name();
        let password = random_name();
        let port = free_port()?;
        let dir = std::env::temp_dir().join(format!("session-broker-{id}"));
        DirBuilder::new().mode(0o700).create(&dir)?;
        let account = match prepare(&dir, &password) {
            Ok(account) => account,
            Err(error) => {
                fs::remove_dir_all(&dir)?;
                return Err(error.into());
            }
        };
        let mut command = Command::new("/bin/sh");
        command
            .args(["-c", SCRIPT, "session-broker-dev"])
            .args([bin.as_os_str(), dir.as_os_str(), &OsString::from(port.to_string())])
            .current_dir(&dir)
            .env("LC_ALL", "C")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            // A Ctrl-C is for the broker, which needs its database until it has drained.
            .process_group(0);
        if let Some((user, group)) = account {
            command.uid(user).gid(group);
        }
        let script = command.spawn()?;
        let mut started = Self { script, directory: dir, port, password };
        started.wait_until_ready()?;
        Ok(started)
    }

    /// The URL of a database, for the role `broker`, which owns it.
    pub fn url(&self, database: &str) -> String {
        format!("postgresql://broker:{}@127.0.0.1:{}/{database}", self.password, self.port)
    }

    /// The URL of a database, for the superuser.
    pub fn admin_url(&self, database: &str) -> String {
        format!("postgresql://postgres:{}@127.0.0.1:{}/{database}", self.password, self.port)
    }

    /// Where its files are, its log among them.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Stops the server, fast, and starts it again. Blocking.
    ///
    /// # Errors
    /// [`DevError`], with the server's log when it would not start.
    pub fn restart(&mut self) -> Result<(), DevError> {
        self.script.stdin.as_mut().expect("it is piped").write_all(b"restart\n")?;
        self.wait_until_ready()
    }

    fn wait_until_ready(&mut self) -> Result<(), DevError> {
        let mut ready = [0; "ready\n".len()];
        let stdout = self.script.stdout.as_mut().expect("it is piped");
        if stdout.read_exact(&mut ready).is_ok() {
            return Ok(());
        }
        // The script has ended, or is about to: it closes both pipes.
        let mut log = String::new();
        self.script.stderr.take().expect("it is piped and taken once").read_to_string(&mut log)?;
        Err(DevError::NotStarted(log))
    }
}

impl Drop for ThrowAwayPostgres {
    fn drop(&mut self) {
        drop(self.script.stdin.take());
        // The script ends by itself; that it cannot be waited for would mean that it already has.
        let _ = self.script.wait();
    }
}

/// Fills the cluster's directory. As root it goes to an account that PostgreSQL agrees to run under, which is returned.
fn prepare(dir: &Path, password: &str) -> io::Result<Option<(u32, u32)>> {
    let cluster =
        format!("CREATE ROLE broker LOGIN PASSWORD '{password}';\n\nCREATE DATABASE sample OWNER broker;\n\n");
    let files = [("password", password), ("postgres.sql", &cluster), ("sample.sql", SAMPLE)];
    for (name, text) in files {
        fs::write(dir.join(name), text)?;
    }
    if fs::metadata(dir)?.uid() != 0 {
        return Ok(None);
    }
    let (user, group) = unprivileged_account()?;
    chown(dir, Some(user), Some(group))?;
    for (name, _) in files {
        chown(dir.join(name), Some(user), Some(group))?;
    }
    Ok(Some((user, group)))
}

/// The account `postgres`, or else `nobody`.
fn unprivileged_account() -> io::Result<(u32, u32)> {
    let accounts = fs::read_to_string("/etc/passwd")?;
    let ids = |name: &str| {
        let mut fields =
            accounts.lines().map(|line| line.split(':')).find(|fields| fields.clone().next() == Some(name))?;
        Some((fields.nth(2)?.parse().ok()?, fields.next()?.parse().ok()?))
    };
    ids("postgres").or_else(|| ids("nobody")).ok_or_else(|| {
        io::Error::other("PostgreSQL refuses to run as root, and there is no account postgres or nobody")
    })
}

/// Where `initdb` and `postgres` are: `$PG_BIN`, the PATH, or the newest that a package has installed.
pub fn server_programs() -> Option<PathBuf> {
    const PACKAGES: [&str; 4] =
        ["/usr/lib/postgresql", "/opt/homebrew/opt", "/usr/local/opt", "/Applications/Postgres.app/Contents/Versions"];
    let given = std::env::var_os("PG_BIN").map(PathBuf::from);
    let path = std::env::var_os("PATH").unwrap_or_default();
    let mut packaged: Vec<PathBuf> = PACKAGES
        .iter()
        .filter_map(|directory| fs::read_dir(directory).ok())
        .flatten()
        .filter_map(|version| Some(version.ok()?.path().join("bin")))
        .collect();
    packaged.sort_by_key(|bin| std::cmp::Reverse(version(bin)));
    let found = |bin: &PathBuf| bin.join("initdb").is_file() && bin.join("postgres").is_file();
    given.into_iter().chain(std::env::split_paths(&path)).chain(packaged).find(found)
}

/// The version in `/usr/lib/postgresql/15/bin` and `/opt/homebrew/opt/postgresql@15/bin`.
fn version(bin: &Path) -> u32 {
    let name = bin.parent().and_then(Path::file_name).unwrap_or_default().to_string_lossy();
    name.trim_start_matches("postgresql@").parse().unwrap_or(0)
}

/// A port that is free, below those that the system hands out to clients: a server takes it only a second later.
///
/// # Errors
/// When none is.
pub fn free_port() -> io::Result<u16> {
    const FIRST: u16 = 20_000;
    const COUNT: u16 = 12_000;
    let start = u16::from_be_bytes(random()) % COUNT;
    let mut ports = (0..COUNT).map(|offset| FIRST + (start + offset) % COUNT);
    ports
        .find(|port| TcpListener::bind(("127.0.0.1", *port)).is_ok())
        .ok_or_else(|| io::Error::other(format!("no port is free from {FIRST} on")))
}

fn random_name() -> String {
    format!("{:016x}", u64::from_be_bytes(random()))
}
