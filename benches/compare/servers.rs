//! What is compared, started: PostgreSQL, and before it the broker, PgBouncer and a FastAPI service, each in a process
//! of its own, on 127.0.0.1.
//!
//! Knows how each is configured, and nothing of what is asked of it. Invariants: everything runs with its defaults but
//! for what is said here; and all of it ends with this value.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::net::{Ipv4Addr, SocketAddr};
use std::os::unix::fs::{MetadataExt, chown};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use session_broker::dev::{ThrowAwayPostgres, free_port};
use tempfile::TempDir;
use tokio::net::TcpStream;
use tokio::time::{Instant, sleep};
use tokio_postgres::Config;

use crate::cpu::{self, Process, Usage};
use crate::delay;
use crate::work::{Failure, ensure};

/// Uvicorn loads the service, and the libraries it is made of, in a second or two; on a busy machine in more.
const START_MAX: Duration = Duration::from_mins(1);

/// What a server makes of prepared statements.
#[derive(Debug, Clone, Copy)]
pub(crate) enum StatementSupport {
    /// They stay prepared for the client.
    Prepared,
    /// They are parsed for each transaction: connections are shared, and nobody keeps the book.
    Unnamed,
}

/// Where everything is to be reached.
#[derive(Clone)]
pub(crate) struct Endpoints {
    addresses: BTreeMap<Process, SocketAddr>,
    password: String,
    pgbouncer_statements: StatementSupport,
}

impl Endpoints {
    /// Where clients of this process connect.
    pub(crate) fn address(&self, process: Process) -> SocketAddr {
        *self.addresses.get(&process).expect("only what has been started is measured")
    }

    /// The password of the role `broker`.
    pub(crate) fn password(&self) -> &str {
        &self.password
    }

    /// What PgBouncer makes of prepared statements.
    pub(crate) fn pgbouncer_statements(&self) -> StatementSupport {
        self.pgbouncer_statements
    }

    /// The same at the end of a road.
    pub(crate) fn at_the_end_of_a_road(&self, length: Duration) -> Result<Self, Failure> {
        let mut far = self.clone();
        for address in far.addresses.values_mut() {
            *address = delay::road_to(*address, length)?;
        }
        Ok(far)
    }
}

/// Everything that has been started.
pub(crate) struct Servers {
    /// Where they are.
    pub(crate) endpoints: Endpoints,
    /// Ended before PostgreSQL: fields are dropped in this order.
    processes: Vec<(Process, Running)>,
    postgres: ThrowAwayPostgres,
    postmaster: u32,
    /// What they are, for people.
    versions: Vec<(&'static str, String)>,
}

impl Servers {
    /// Starts PostgreSQL and the broker.
    pub(crate) fn start_broker() -> Result<Self, Failure> {
        fs::create_dir_all(results())?;
        let postgres = ThrowAwayPostgres::start()?;
        let pid_file = fs::read_to_string(postgres.directory().join("data/postmaster.pid"))?;
        let postmaster = pid_file.lines().next().ok_or("PostgreSQL has written no pid")?.parse()?;
        let url = postgres.url("sample");
        let config: Config = url.parse()?;
        let password = String::from_utf8(config.get_password().unwrap_or_default().to_vec())?;
        let port = *config.get_ports().first().ok_or("PostgreSQL has no port")?;
        let (broker, address) = start_broker(&url)?;
        let addresses = [(Process::Postgres, local(port)), (Process::Broker, address)];
        let endpoints =
            Endpoints { addresses: addresses.into(), password, pgbouncer_statements: StatementSupport::Unnamed };
        let versions = vec![("broker", broker_version())];
        let processes = vec![(Process::Broker, broker)];
        Ok(Self { endpoints, processes, postgres, postmaster, versions })
    }

    /// Starts PostgreSQL, the broker, PgBouncer and the FastAPI service.
    pub(crate) async fn start_all() -> Result<Self, Failure> {
        // What takes installing comes first: nothing has been started when it is not there.
        let (pgbouncer, pgbouncer_version) = find_pgbouncer()?;
        let python = python()?;
        let mut servers = Self::start_broker()?;
        let address = servers.start_pgbouncer(&pgbouncer, pgbouncer_version).await?;
        servers.endpoints.addresses.insert(Process::PgBouncer, address);
        let address = servers.start_fastapi(&python).await?;
        servers.endpoints.addresses.insert(Process::FastApi, address);
        let (major, minor) = pgbouncer_version;
        servers.versions.push(("PgBouncer", format!("{major}.{minor}")));
        servers.versions.push(("FastAPI service", python_versions(&python)?));
        Ok(servers)
    }

    /// The URL of the accounts' database, for the superuser.
    pub(crate) fn admin_url(&self) -> String {
        self.postgres.admin_url("sample")
    }

    /// What has been started, and its version, but for PostgreSQL's, which it says itself.
    pub(crate) fn versions(&self) -> &[(&'static str, String)] {
        &self.versions
    }

    /// The CPU that each has used so far.
    pub(crate) fn usage(&self) -> Usage {
        Usage::now(|process| match process {
            Process::Postgres => cpu::of_family(self.postmaster),
            Process::LoadGenerator => cpu::of(std::process::id()),
            Process::Broker | Process::PgBouncer | Process::FastApi => {
                let running = self.processes.iter().find(|(running, _)| *running == process);
                running.map_or(0.0, |(_, running)| cpu::of(running.child.id()))
            }
        })
    }

    /// Starts PgBouncer with transaction pooling, and with prepared statements where it has them.
    async fn start_pgbouncer(&mut self, program: &Path, version: (u32, u32)) -> Result<SocketAddr, Failure> {
        /// The first that keeps the book of prepared statements over connections that are shared.
        const PREPARES: (u32, u32) = (1, 21);
        let home = tempfile::tempdir()?;
        let (settings, users) = (home.path().join("pgbouncer.ini"), home.path().join("users.txt"));
        let prepared = if version >= PREPARES {
            self.endpoints.pgbouncer_statements = StatementSupport::Prepared;
            "max_prepared_statements = 200\n"
        } else {
            ""
        };
        let (port, postgres) = (free_port()?, self.endpoints.address(Process::Postgres).port());
        let text = format!(
            "[databases]\n* = host=127.0.0.1 port={postgres}\n[pgbouncer]\nlisten_addr = 127.0.0.1\n\
             listen_port = {port}\nunix_socket_dir =\nauth_type = scram-sha-256\nauth_file = {}\n\
             pool_mode = transaction\n{prepared}",
            users.display()
        );
        fs::write(&settings, text)?;
        fs::write(&users, format!("\"broker\" \"{}\"\n", self.endpoints.password))?;
        let mut command = Command::new(program);
        command.arg("--quiet").arg(&settings);
        if is_root()? {
            // It refuses to run as root, as PostgreSQL does: it gets the account that PostgreSQL has.
            let owner = fs::metadata(self.postgres.directory())?;
            for path in [home.path(), settings.as_path(), users.as_path()] {
                chown(path, Some(owner.uid()), Some(owner.gid()))?;
            }
            command.uid(owner.uid()).gid(owner.gid());
        }
        let running = Running::start(command, "pgbouncer.log", Some(home))?;
        self.serve(Process::PgBouncer, running, local(port)).await
    }

    /// Starts the service: one process, as uvicorn runs it unless asked otherwise, and without a line of log for each
    /// request, which the broker does not write either.
    async fn start_fastapi(&mut self, python: &Path) -> Result<SocketAddr, Failure> {
        let port = free_port()?;
        let mut command = Command::new(python);
        command
            .args(["-m", "uvicorn", "service:app", "--host", "127.0.0.1", "--port", &port.to_string()])
            .args(["--no-access-log", "--app-dir"])
            .arg(sources())
            .env("DATABASE_URL", self.postgres.url("sample").replace("postgresql://", "postgresql+psycopg://"))
            .env("PYTHONDONTWRITEBYTECODE", "1");
        let running = Running::start(command, "fastapi.log", None)?;
        self.serve(Process::FastApi, running, local(port)).await
    }

    /// Keeps a process once it listens.
    async fn serve(
        &mut self,
        process: Process,
        mut running: Running,
        address: SocketAddr,
    ) -> Result<SocketAddr, Failure> {
        let start = Instant::now();
        while TcpStream::connect(address).await.is_err() {
            let gone = running.child.try_wait()?.is_some();
            if gone || start.elapsed() > START_MAX {
                return Err(format!("{} does not start: see its log in {}", process.name(), results().display()).into());
            }
            sleep(Duration::from_millis(50)).await;
        }
        self.processes.push((process, running));
        Ok(address)
    }
}

/// A process that ends when it is dropped.
struct Running {
    child: Child,
    /// What it reads, while it runs.
    _home: Option<TempDir>,
}

impl Running {
    /// Starts it, with its log in the directory of the results.
    fn start(mut command: Command, log: &str, home: Option<TempDir>) -> Result<Self, Failure> {
        let log = File::create(results().join(log))?;
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        Ok(Self { child: command.spawn()?, _home: home })
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Where results and logs go.
pub(crate) fn results() -> PathBuf {
    Path::new(env!("CARGO_TARGET_TMPDIR")).with_file_name("compare")
}

/// Where this file is, and what it starts in Python.
fn sources() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("benches/compare")
}

fn local(port: u16) -> SocketAddr {
    (Ipv4Addr::LOCALHOST, port).into()
}

fn is_root() -> Result<bool, Failure> {
    Ok(fs::metadata("/proc/self")?.uid() == 0)
}

/// Starts the broker with nothing but what it cannot do without: where the database is, and who may call.
fn start_broker(url: &str) -> Result<(Running, SocketAddr), Failure> {
    let mut command = Command::new(env!("CARGO_BIN_EXE_session-broker"));
    command
        .args(["serve", "--listen", "127.0.0.1:0"])
        .env("SESSION_BROKER__ENGINES__MAIN__URL", url)
        .env("SESSION_BROKER__AUTHENTICATION__ANONYMOUS", "true")
        .env("SESSION_BROKER__PRINCIPALS__ANONYMOUS__PROFILES", "default")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(File::create(results().join("broker.log"))?);
    let mut running = Running { child: command.spawn()?, _home: None };
    let output = running.child.stdout.take().expect("it is piped, and taken once");
    let mut ready = String::new();
    BufReader::new(output).read_line(&mut ready)?;
    let address = ready.split([' ', ',', '\n']).find_map(|word| word.parse().ok());
    let missing = || format!("the broker does not start: see broker.log in {}", results().display());
    Ok((running, address.ok_or_else(missing)?))
}

/// PgBouncer and its version.
fn find_pgbouncer() -> Result<(PathBuf, (u32, u32)), Failure> {
    // Packages put it where the PATH of people does not lead.
    for program in ["pgbouncer", "/usr/sbin/pgbouncer", "/usr/local/sbin/pgbouncer"] {
        let Ok(output) = Command::new(program).arg("--version").output() else {
            continue;
        };
        let text = String::from_utf8(output.stdout)?;
        let number = text.trim_start_matches("PgBouncer ").lines().next().unwrap_or_default();
        let mut numbers = number.split('.').map(str::parse::<u32>);
        let (Some(Ok(major)), Some(Ok(minor))) = (numbers.next(), numbers.next()) else {
            return Err(format!("{program} tells no version: {text}").into());
        };
        return Ok((program.into(), (major, minor)));
    }
    Err("PgBouncer is missing: install it with `apt-get install pgbouncer`, `dnf install pgbouncer` or \
         `brew install pgbouncer`"
        .into())
}

/// A Python with the service's libraries, made once in the build's directory.
fn python() -> Result<PathBuf, Failure> {
    let home = Path::new(env!("CARGO_TARGET_TMPDIR")).join("fastapi");
    let (python, installed) = (home.join("bin/python"), home.join("requirements.txt"));
    let requirements = sources().join("requirements.txt");
    if fs::read(&installed).ok() != Some(fs::read(&requirements)?) {
        output_of(Command::new("python3").args(["-m", "venv", "--clear"]).arg(&home))?;
        output_of(Command::new(&python).args(["-m", "pip", "install", "--quiet", "--requirement"]).arg(&requirements))?;
        fs::copy(&requirements, &installed)?;
    }
    Ok(python)
}

fn python_versions(python: &Path) -> Result<String, Failure> {
    let script = "import platform; from importlib.metadata import version; \
                  names = ['fastapi', 'sqlalchemy', 'psycopg', 'uvicorn', 'uvloop']; \
                  print('Python', platform.python_version(), *(f'{name} {version(name)}' for name in names), sep=', ')";
    Ok(output_of(Command::new(python).args(["-c", script]))?.replacen("Python, ", "Python ", 1))
}

/// The package's version, and the commit where there is a repository.
fn broker_version() -> String {
    let mut git = Command::new("git");
    git.args(["describe", "--always", "--dirty"]).current_dir(env!("CARGO_MANIFEST_DIR"));
    match output_of(&mut git) {
        Ok(commit) => format!("{} ({commit})", env!("CARGO_PKG_VERSION")),
        Err(_) => env!("CARGO_PKG_VERSION").to_owned(),
    }
}

/// What a program prints, without the end of the line.
pub(crate) fn output_of(command: &mut Command) -> Result<String, Failure> {
    let output = command.output();
    let program = command.get_program().display();
    let output = output.map_err(|error| format!("cannot run {program}: {error}"))?;
    let errors = String::from_utf8_lossy(&output.stderr);
    ensure(output.status.success(), &format!("{program} failed: {errors}"))?;
    Ok(String::from_utf8(output.stdout)?.trim_end().to_owned())
}
