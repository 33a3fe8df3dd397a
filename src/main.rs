//! The command line.

use std::error::Error;
use std::future::pending;
use std::io::{self, Write, stdout};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::task::Poll;

use clap::{CommandFactory, Parser, Subcommand};
use clap_complete::{Shell, generate};
use futures_util::stream;
use session_broker::acceptor::Address;
use session_broker::cli;
use session_broker::config::{Config, ConfigError};
use session_broker::dev::ThrowAwayPostgres;
use session_broker::identity::draw_token;
use session_broker::server::{Reloader, Server};
use session_broker::telemetry::Telemetry;
use tokio::runtime::Runtime;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::task::spawn_blocking;
use tracing::error;

/// A gRPC session broker for PostgreSQL.
#[derive(Debug, Parser)]
#[command(version)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    #[command(flatten)]
    Broker(BrokerCommand),
    #[command(flatten)]
    Client(cli::Command),
    /// Print a script by which a shell completes this command line.
    Completions {
        /// The shell.
        shell: Shell,
    },
}

#[derive(Debug, Subcommand)]
enum BrokerCommand {
    /// Serve sessions of the configured engines.
    Serve {
        #[command(flatten)]
        source: Source,
        /// Listen here only, instead of where the configuration says: HOST:PORT, of which port 0 takes a free one, or
        /// unix:/PATH.
        #[arg(long, value_name = "ADDRESS")]
        listen: Option<Address>,
    },
    /// Serve sessions of a throw-away PostgreSQL with a sample schema.
    Dev {
        /// Listen here; port 0 takes a free one.
        #[arg(long, value_name = "HOST:PORT", default_value = "127.0.0.1:50051")]
        listen: String,
    },
    /// Draw a static bearer token: print it, and below it the digest by which [authentication.tokens] knows it.
    Token,
    /// Check the configuration and print what is in effect, passwords left out.
    Check {
        #[command(flatten)]
        source: Source,
        /// Tell instead what this principal may do, and why not more.
        #[arg(long, value_name = "PRINCIPAL")]
        explain: Option<String>,
    },
}

#[derive(Debug, clap::Args)]
struct Source {
    /// The configuration file, TOML. Environment variables such as SESSION_BROKER__ENGINES__MAIN__URL go over it.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
}

impl Source {
    fn load(&self) -> Result<Config, ConfigError> {
        // A name or a value that is not UTF-8 cannot be one of ours.
        let environment =
            std::env::vars_os().filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)));
        Config::load(self.config.as_deref(), environment)
    }
}

fn main() -> ExitCode {
    let done = match Arguments::parse().command {
        Command::Broker(command) => run(command),
        Command::Client(command) => return command.run(),
        Command::Completions { shell } => completions(shell),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // Nothing is left to tell whom, should standard error be closed.
            let _ = writeln!(io::stderr(), "session-broker: {error}");
            ExitCode::FAILURE
        }
    }
}

fn completions(shell: Shell) -> Result<(), Box<dyn Error>> {
    let mut script = Vec::new();
    generate(shell, &mut Arguments::command(), "session-broker", &mut script);
    stdout().write_all(&script)?;
    Ok(())
}

fn run(command: BrokerCommand) -> Result<(), Box<dyn Error>> {
    match command {
        BrokerCommand::Token => {
            let (token, digest) = draw_token();
            writeln!(stdout(), "{}\n{digest}", token.expose())?;
            let which = "the first line is for the caller, who sends it as authorization: Bearer TOKEN; \
                         the second is for [authentication.tokens], NAME = [\"sha256:...\"]";
            writeln!(io::stderr(), "{which}")?;
            Ok(())
        }
        BrokerCommand::Check { source, explain } => {
            let config = source.load()?;
            match explain {
                None => write!(stdout(), "{config}")?,
                Some(principal) => write!(stdout(), "{}", config.explain(&principal))?,
            }
            Ok(())
        }
        BrokerCommand::Serve { source, listen } => {
            let load: Load = Arc::new(move || {
                let config = source.load()?;
                match &listen {
                    None => Ok(config),
                    Some(address) => Ok(Config { listen: config.listen.at(address.clone())?, ..config }),
                }
            });
            let config = load()?;
            run_server(config, Some(load), |address| format!("session-broker is listening on {address}\n"))
        }
        BrokerCommand::Dev { listen } => {
            let postgres = ThrowAwayPostgres::start()?;
            let url = postgres.url("sample");
            let log = postgres.directory().join("log").display().to_string();
            let setting = |name: &str, value: &str| (format!("SESSION_BROKER__{name}"), value.to_owned());
            let config = Config::load(
                None,
                [
                    setting("ENGINES__SAMPLE__URL", &url),
                    setting("LISTEN", &listen),
                    // There is nothing here but samples: who listens beyond this machine means to.
                    setting("PLAINTEXT_BEYOND_LOOPBACK", "true"),
                    setting("PRINCIPALS__ANONYMOUS__PROFILES", "default"),
                    setting("AUTHENTICATION__ANONYMOUS", "true"),
                    setting("DRAIN_GRACE", "2s"),
                    // As random as the password in it, and gone as soon.
                    setting("COMMIT_TOKEN_KEY", &url),
                ],
            )?;
            // PostgreSQL stops when `postgres` is dropped, after the broker has.
            run_server(config, None, |address| {
                format!(
                    "session-broker is ready on {address}, its PostgreSQL at {url} with its log in {log}\n\
                     First call:\n  \
                     grpcurl -plaintext -d '{{}}' {address} sessionbroker.v1.SessionService/BeginSession\n\
                     Ctrl-C stops both.\n"
                )
            })
        }
    }
}

/// Loads the configuration, at first and again.
type Load = Arc<dyn Fn() -> Result<Config, ConfigError> + Send + Sync>;

/// Serves with telemetry, to the end of which the runtime is needed.
fn run_server(config: Config, load: Option<Load>, ready: impl FnOnce(&str) -> String) -> Result<(), Box<dyn Error>> {
    let runtime = Runtime::new()?;
    let telemetry = {
        let _entered = runtime.enter();
        Telemetry::start(&config.telemetry)?
    };
    let served = runtime.block_on(serve(config, load, telemetry.clone(), ready));
    telemetry.stop();
    served
}

/// Serves until SIGINT or SIGTERM; at SIGHUP, loads the configuration again.
async fn serve(
    config: Config,
    load: Option<Load>,
    telemetry: Telemetry,
    ready: impl FnOnce(&str) -> String,
) -> Result<(), Box<dyn Error>> {
    let (mut interrupt, mut terminate) = (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?);
    // Without anything to load, a hang-up ends the program, as it does others.
    let loading = load.map(|load| Ok::<_, io::Error>((load, signal(SignalKind::hangup())?))).transpose()?;
    let server = Server::bind(config, telemetry).await?;
    let reloader = server.reloader();
    let addresses: Vec<_> = server.addresses().iter().map(ToString::to_string).collect();
    write!(stdout(), "{}", ready(&addresses.join(", ")))?;
    if let Some(address) = server.operations_address() {
        writeln!(stdout(), "probes are answered on {address}")?;
    }
    stdout().flush()?;
    let signals = stream::poll_fn(move |context| match interrupt.poll_recv(context) {
        Poll::Pending => terminate.poll_recv(context),
        signal @ Poll::Ready(_) => signal,
    });
    let reloading = async {
        if let Some((load, hangup)) = loading {
            reload(reloader, load, hangup).await;
        }
        pending().await
    };
    tokio::select! {
        served = server.run(signals) => Ok(served?),
        never = reloading => never,
    }
}

/// Loads the configuration again at each hang-up.
async fn reload(mut reloader: Reloader, load: Load, mut hangup: Signal) {
    while hangup.recv().await.is_some() {
        let load = load.clone();
        match spawn_blocking(move || load()).await {
            Ok(loaded) => reloader.reload(loaded),
            Err(panic) => error!(%panic, "configuration not loaded: nothing has changed"),
        }
    }
}
