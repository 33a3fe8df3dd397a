//! Clients that speak PostgreSQL's own protocol: tokio-postgres, to PostgreSQL itself or to PgBouncer.
//!
//! Knows no gRPC. Invariant: a step that is sent before the one ahead is answered is still sent after it.

use async_trait::async_trait;
use futures_util::future::join4;
use tokio_postgres::types::Type;
use tokio_postgres::{Client, Config, NoTls, Statement};

use crate::cpu::Process;
use crate::servers::{Endpoints, StatementSupport};
use crate::shape::Changes;
use crate::work::{Caller, Change, Failure, SELECT, UPDATE, ensure};

/// When a transaction's next step is sent.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Steps {
    /// When the one before has been answered: four round trips.
    Awaited,
    /// At once: one round trip.
    Pipelined,
}

/// Clients of PgBouncer.
pub(crate) async fn through_pgbouncer(
    endpoints: &Endpoints,
    clients: &[Changes],
    steps: Steps,
) -> Result<Vec<Box<dyn Caller>>, Failure> {
    connect(endpoints, Process::PgBouncer, clients, steps, endpoints.pgbouncer_statements()).await
}

/// Clients of PostgreSQL itself.
pub(crate) async fn direct(
    endpoints: &Endpoints,
    clients: &[Changes],
    steps: Steps,
) -> Result<Vec<Box<dyn Caller>>, Failure> {
    connect(endpoints, Process::Postgres, clients, steps, StatementSupport::Prepared).await
}

async fn connect(
    endpoints: &Endpoints,
    server: Process,
    clients: &[Changes],
    steps: Steps,
    statements: StatementSupport,
) -> Result<Vec<Box<dyn Caller>>, Failure> {
    let mut callers: Vec<Box<dyn Caller>> = Vec::with_capacity(clients.len());
    for changes in clients {
        let address = endpoints.address(server);
        let mut config = Config::new();
        config.host(address.ip().to_string()).port(address.port());
        config.user("broker").password(endpoints.password()).dbname("sample");
        let (client, connection) = config.connect(NoTls).await?;
        // It ends with the client, and what it fails with the client's calls tell.
        tokio::spawn(connection);
        let prepared = match statements {
            StatementSupport::Prepared => Some([client.prepare(SELECT).await?, client.prepare(UPDATE).await?]),
            StatementSupport::Unnamed => None,
        };
        callers.push(Box::new(Connected { client, prepared, steps, changes: changes.clone() }));
    }
    Ok(callers)
}

/// A client of PostgreSQL's protocol.
struct Connected {
    client: Client,
    /// The SELECT and the UPDATE; none where they are parsed each time, unnamed, in the round trip that runs them.
    prepared: Option<[Statement; 2]>,
    steps: Steps,
    changes: Changes,
}

impl Connected {
    async fn read(&self, account: i32) -> Result<(), Failure> {
        let rows = match &self.prepared {
            Some([select, _]) => self.client.query(select, &[&account]).await?,
            None => self.client.query_typed(SELECT, &[(&account, Type::INT4)]).await?,
        };
        let balance: Option<i32> = rows.first().map(|row| row.try_get(0)).transpose()?;
        ensure(balance.is_some(), "the SELECT returned no row")
    }

    async fn write(&self, Change { account, delta }: Change) -> Result<(), Failure> {
        let changed = match &self.prepared {
            Some([_, update]) => self.client.execute(update, &[&delta, &account]).await?,
            None => self.client.execute_typed(UPDATE, &[(&delta, Type::INT4), (&account, Type::INT4)]).await?,
        };
        ensure(changed == 1, "the UPDATE changed no row")
    }
}

#[async_trait]
impl Caller for Connected {
    async fn transaction(&mut self, number: usize) -> Result<(), Failure> {
        let change = self.changes[number];
        let begin = self.client.batch_execute("BEGIN");
        let (read, write) = (self.read(change.account), self.write(change));
        let commit = self.client.batch_execute("COMMIT");
        match self.steps {
            Steps::Awaited => {
                begin.await?;
                read.await?;
                write.await?;
                commit.await?;
            }
            Steps::Pipelined => {
                // Each sends when it is first polled, and they are polled in this order.
                let (begun, read, written, committed) = join4(begin, read, write, commit).await;
                begun?;
                read?;
                written?;
                committed?;
            }
        }
        Ok(())
    }

    async fn select(&mut self, number: usize) -> Result<(), Failure> {
        self.read(self.changes[number].account).await
    }
}
