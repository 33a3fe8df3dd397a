//! From a configuration to a running broker: engines, transport, readiness, and a drain in two phases.
//!
//! Phase one drains the sessions while the transport still answers, after a notice to those who look at readiness; phase two
//! stops the transport. Invariant: stopping has a bound.

use std::collections::BTreeMap;
use std::io;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use futures_util::stream::{Stream, StreamExt};
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};

use crate::acceptor::{self, Acceptor, Address};
use crate::broker::Broker;
use crate::broker::commit::CommitTokens;
use crate::broker::engine::Engine;
use crate::broker::observer::Event;
use crate::broker::profile::Profiles;
use crate::config::{Config, ConfigError, EngineConfig};
use crate::grpc::gate::Gate;
use crate::grpc::transport::{self, Readiness};
use crate::identity::{Authenticator, CurrentAuthenticator};
use crate::operations::Operations;
use crate::postgres::engine::PostgresEngine;
use crate::postgres::options::ConnectOptions;
use crate::random::random;
use crate::telemetry::Telemetry;

/// How long open calls, health watches among them, may hold up the transport once the sessions are drained.
const TRANSPORT_GRACE: Duration = Duration::from_secs(2);

/// Probes come one by one, and each in haste; so do the questions of an operator's browser, but for its one stream.
const OPERATIONS_LIMITS: acceptor::Limits = acceptor::Limits {
    connections_max: 1000,
    handshake_timeout: Duration::from_secs(10),
    // Twice as long as probes are apart that keep their connection.
    idle_timeout: Duration::from_mins(1),
    age_max: Duration::from_hours(1),
};

/// A broker that listens but does not serve yet.
#[derive(Debug)]
pub struct Server {
    acceptor: Acceptor,
    /// For probes and operators.
    operations: Option<Acceptor>,
    authenticator: CurrentAuthenticator,
    broker: Arc<Broker>,
    endpoint: String,
    drain_notice: Duration,
    drain_grace: Duration,
    telemetry: Telemetry,
    config: Config,
}

/// Puts another configuration into effect, as far as that needs no restart.
#[derive(Debug)]
pub struct Reloader {
    broker: Arc<Broker>,
    authenticator: CurrentAuthenticator,
    telemetry: Telemetry,
    /// What is in effect.
    config: Config,
}

impl Reloader {
    /// Takes a configuration that was loaded anew: its profiles, for the sessions that begin from now on, and what its
    /// principals may do and prove themselves by, for all calls. One with a problem changes nothing.
    pub fn reload(&mut self, loaded: Result<Config, ConfigError>) {
        let checked =
            loaded.map_err(|error| error.to_string()).and_then(|config| match self.missing(&config.profiles) {
                None => Ok(config),
                Some(problem) => Err(problem),
            });
        let config = match checked {
            Ok(config) => config,
            Err(problems) => return error!(%problems, "configuration refused: nothing has changed"),
        };
        let before = &self.config;
        for (section, changed) in [
            ("listen", config.listen != before.listen),
            ("endpoint", config.endpoint != before.endpoint),
            ("owner", config.owner != before.owner),
            ("default_engine", config.default_engine != before.default_engine),
            ("commit_token_key", config.commit_token_key != before.commit_token_key),
            ("drain_notice", config.drain_notice != before.drain_notice),
            ("drain_grace", config.drain_grace != before.drain_grace),
            ("operations", config.operations != before.operations),
            ("limits", config.limits != before.limits || config.connections != before.connections),
            ("engines", config.engines != before.engines),
        ] {
            if changed {
                warn!(section, "needs a restart to take effect");
            }
        }
        if config.telemetry.query_text != before.telemetry.query_text {
            warn!(section = "telemetry.query_text", "needs a restart to take effect");
        }
        if config.telemetry.log != before.telemetry.log {
            self.telemetry.set_log(&config.telemetry.log);
        }
        if config.authentication != before.authentication {
            self.authenticator.set(config.authentication.clone());
        }
        let (profiles, principals) = (config.profiles.profiles.len(), config.profiles.principals.len());
        self.config.profiles.clone_from(&config.profiles);
        self.config.telemetry = config.telemetry;
        self.config.authentication = config.authentication;
        self.broker.set_profiles(config.profiles);
        info!(profiles, principals, "profiles reloaded");
    }

    /// What is wrong with profiles whose engines are not running.
    fn missing(&self, profiles: &Profiles) -> Option<String> {
        profiles.profiles.iter().find_map(|(name, profile)| {
            let missing = profile.engines.iter().find(|engine| !self.config.engines.contains_key(*engine))?;
            Some(format!("profiles.{name}.engines: names {missing:?}, which needs a restart to be there"))
        })
    }
}

impl Server {
    /// Makes the engines and takes the port. Needs no PostgreSQL.
    ///
    /// # Errors
    /// The port's with its address, a certificate's with its file.
    pub async fn bind(config: Config, telemetry: Telemetry) -> io::Result<Self> {
        let running = config.clone();
        let Config {
            listen,
            endpoint,
            owner,
            default_engine,
            commit_token_key,
            drain_notice,
            drain_grace,
            operations,
            telemetry: _,
            profiles,
            limits,
            connections,
            authentication,
            engines,
        } = config;
        let acceptor = Acceptor::bind(&listen.addresses, listen.tls, connections).await?;
        let operations = match operations {
            None => None,
            Some(address) => Some(Acceptor::bind(&[address], None, OPERATIONS_LIMITS).await?),
        };
        let addresses = acceptor.addresses();
        let endpoint = endpoint.unwrap_or_else(|| addresses[0].to_string());
        let engines: BTreeMap<String, Arc<dyn Engine>> = engines
            .into_iter()
            .map(|(name, engine)| {
                let EngineConfig { connect, pool, overridable, idempotency_table } = engine;
                let connect = ConnectOptions { nets: profiles.usual_nets(), ..connect };
                let table = idempotency_table.as_ref();
                let made = PostgresEngine::new(name.clone(), connect, pool, overridable, table);
                (name, Arc::new(made) as Arc<dyn Engine>)
            })
            .collect();
        let commit_tokens = commit_token_key.map_or_else(
            || {
                warn!("commit tokens are this broker's own and end with it: set commit_token_key for all replicas");
                CommitTokens::new(&random::<{ CommitTokens::KEY_BYTES_MIN }>())
            },
            |key| CommitTokens::new(key.expose().as_bytes()),
        );
        let observer = telemetry.observer();
        let broker = Arc::new(Broker::new(owner, engines, default_engine, profiles, limits, commit_tokens, observer));
        telemetry.watch(&broker);
        let authenticator = CurrentAuthenticator::new(Authenticator::new(authentication));
        Ok(Self {
            acceptor,
            operations,
            authenticator,
            broker,
            endpoint,
            drain_notice,
            drain_grace,
            telemetry,
            config: running,
        })
    }

    /// What takes another configuration while it runs.
    pub fn reloader(&self) -> Reloader {
        let Self { broker, authenticator, telemetry, config, .. } = self;
        Reloader {
            broker: broker.clone(),
            authenticator: authenticator.clone(),
            telemetry: telemetry.clone(),
            config: config.clone(),
        }
    }

    /// Where it listens.
    pub fn addresses(&self) -> Vec<Address> {
        self.acceptor.addresses()
    }

    /// Where probes are answered, if anywhere.
    pub fn operations_address(&self) -> Option<Address> {
        self.operations.as_ref()?.addresses().into_iter().next()
    }

    /// Serves until the first of `signals`, then drains and stops; the second hurries.
    ///
    /// # Errors
    /// The transport's.
    pub async fn run(self, signals: impl Stream<Item = ()>) -> Result<(), transport::Error> {
        let Self {
            acceptor,
            operations,
            authenticator,
            broker,
            endpoint,
            drain_notice,
            drain_grace,
            telemetry,
            config: _,
        } = self;
        let mut signals = pin!(signals);
        let stop = CancellationToken::new();
        let operations = operations.map(|acceptor| {
            let metrics = Arc::new(move || telemetry.render());
            (acceptor, Operations::new(broker.clone(), authenticator.clone(), metrics, stop.clone()))
        });
        let gate = Gate::new(broker.clone(), authenticator);
        let (mut readiness, serving) =
            transport::serve(broker.clone(), gate, endpoint, acceptor, operations, stop.clone()).await;
        let mut serving = pin!(serving);
        let stopping = async {
            // Readiness is looked after until the drain begins, and then says no for good.
            let asked = tokio::select! {
                Some(()) = signals.next() => None,
                grace = broker.drain_asked() => grace,
                () = watch_engines(&broker, &mut readiness) => None,
            };
            readiness.set(false).await;
            let draining = async {
                // Who looks at readiness has time to notice, and what is on its way here meanwhile is served.
                sleep(drain_notice).await;
                broker.drain(asked.map_or(drain_grace, |grace| grace.min(drain_grace))).await;
            };
            tokio::select! {
                () = draining => {}
                Some(()) = signals.next() => {
                    warn!("a second signal: draining without grace");
                    broker.drain(Duration::ZERO).await;
                }
            }
            stop.cancel();
        };
        tokio::select! {
            served = &mut serving => return served,
            () = stopping => {}
        }
        let stopped = timeout(TRANSPORT_GRACE, serving).await;
        info!("stopped");
        // Who still holds a call open after the grace loses the connection.
        stopped.unwrap_or(Ok(()))
    }
}

/// Keeps readiness true to the engines: ready as soon as one of them answers, and until several looks in a row have found
/// none that does. Never returns.
async fn watch_engines(broker: &Broker, readiness: &mut Readiness) {
    /// How soon a database that comes is noticed.
    const WHILE_DOWN: Duration = Duration::from_secs(1);
    /// How soon one that goes is noticed; callers notice at once.
    const WHILE_UP: Duration = Duration::from_secs(5);
    /// How many looks must find nothing: a quick restart of PostgreSQL is over before, and callers are not sent away for it.
    const LOOKS: u32 = 5;

    let mut found_nothing = 0;
    let mut reachable: BTreeMap<&str, bool> = BTreeMap::new();
    loop {
        for (name, engine) in broker.engines() {
            let answer = engine.probe().await;
            broker.observer().observe(Event::EngineProbed { engine: name, reachable: answer.is_ok() });
            if reachable.insert(name, answer.is_ok()) != Some(answer.is_ok()) {
                match &answer {
                    Ok(()) => info!(engine = %name, "engine is reachable"),
                    Err(error) => warn!(engine = %name, cause = %error, "engine is not reachable"),
                }
            }
        }
        found_nothing = if reachable.values().any(|reachable| *reachable) { 0 } else { found_nothing + 1 };
        if found_nothing == 0 {
            readiness.set(true).await;
        } else if found_nothing >= LOOKS {
            readiness.set(false).await;
        }
        sleep(if reachable.values().all(|reachable| *reachable) { WHILE_UP } else { WHILE_DOWN }).await;
    }
}
