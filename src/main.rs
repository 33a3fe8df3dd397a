//! The command line.

use std::error::Error;
use std::io::{Write, stdout};
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use session_broker::config::Config;
use session_broker::dev::ThrowAwayPostgres;
use session_broker::server::Server;
use session_broker::telemetry;
use tokio::signal::unix::{SignalKind, signal};

/// A gRPC session broker for PostgreSQL.
#[derive(Debug, Parser)]
#[command(version)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Serve sessions of the configured engines.
    Serve {
        #[command(flatten)]
        source: Source,
        /// Listen here instead of where the configuration says; port 0 takes a free one.
        #[arg(long, value_name = "HOST:PORT")]
        listen: Option<String>,
    },
    /// Serve sessions of a throw-away PostgreSQL with a sample schema.
    Dev {
        /// Listen here; port 0 takes a free one.
        #[arg(long, value_name = "HOST:PORT", default_value = "127.0.0.1:50051")]
        listen: String,
    },
    /// Check the configuration and print what is in effect, passwords left out.
    Check {
        #[command(flatten)]
        source: Source,
    },
}

#[derive(Debug, clap::Args)]
struct Source {
    /// The configuration file, TOML. Environment variables such as SESSION_BROKER__ENGINES__MAIN__URL go over it.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
}

impl Source {
    fn load(&self) -> Result<Config, Box<dyn Error>> {
        // A name or a value that is not UTF-8 cannot be one of ours.
        let environment =
            std::env::vars_os().filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)));
        Ok(Config::load(self.config.as_deref(), environment)?)
    }
}

fn main() -> ExitCode {
    match run(Arguments::parse().command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // Nothing is left to tell whom, should standard error be closed.
            let _ = writeln!(std::io::stderr(), "session-broker: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(command: Command) -> Result<(), Box<dyn Error>> {
    match command {
        Command::Check { source } => {
            let config = source.load()?;
            write!(stdout(), "{config}")?;
            Ok(())
        }
        Command::Serve { source, listen } => {
            let mut config = source.load()?;
            config.listen = listen.unwrap_or(config.listen);
            telemetry::init();
            serve(config, |address| format!("session-broker is listening on {address}\n"))
        }
        Command::Dev { listen } => {
            telemetry::init();
            let postgres = ThrowAwayPostgres::start()?;
            let url = postgres.url("sample");
            let log = postgres.directory().join("log").display().to_string();
            let setting = |name: &str, value: &str| (format!("SESSION_BROKER__{name}"), value.to_owned());
            let config = Config::load(
                None,
                [
                    setting("ENGINES__SAMPLE__URL", &url),
                    setting("LISTEN", &listen),
                    setting("DRAIN_GRACE", "2s"),
                    // As random as the password in it, and gone as soon.
                    setting("COMMIT_TOKEN_KEY", &url),
                ],
            )?;
            // PostgreSQL stops when `postgres` is dropped, after the broker has.
            serve(config, |address| {
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

/// Serves until SIGINT or SIGTERM.
#[tokio::main]
async fn serve(config: Config, ready: impl FnOnce(std::net::SocketAddr) -> String) -> Result<(), Box<dyn Error>> {
    let (mut interrupt, mut terminate) = (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?);
    let server = Server::bind(config).await?;
    write!(stdout(), "{}", ready(server.local_addr()?))?;
    stdout().flush()?;
    let shutdown = async move {
        tokio::select! {
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
        }
    };
    Ok(server.run(shutdown).await?)
}
