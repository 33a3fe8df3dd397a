//! The work that is measured, the accounts that it is done on, and what a client must be able to do.
//!
//! Knows no server but PostgreSQL, and that one only to make the accounts and to count what is in them. Invariant: a
//! caller's answer is good only when it was read and says that the work is done.

use std::error::Error;
use std::sync::Arc;

use async_trait::async_trait;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use tokio_postgres::{Client, Config, NoTls};

/// Whatever went wrong, for people.
pub(crate) type Failure = Box<dyn Error + Send + Sync>;

/// Reads a balance.
pub(crate) const SELECT: &str = "SELECT abalance FROM pgbench_accounts WHERE aid = $1";

/// Changes a balance: $1 is the difference, $2 the account.
pub(crate) const UPDATE: &str = "UPDATE pgbench_accounts SET abalance = abalance + $1 WHERE aid = $2";

/// As many as `pgbench -i -s 10` makes.
const ACCOUNTS: i32 = 1_000_000;

/// How many changes a client has ready, to go through over and over. So few that their requests are encoded in no time.
pub(crate) const CHANGES: usize = 256;

/// A piece of work.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Work {
    /// BEGIN, the SELECT, the UPDATE, COMMIT.
    Transaction,
    /// The SELECT alone.
    Select,
}

impl Work {
    /// Its name in the results.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Transaction => "transaction",
            Self::Select => "select",
        }
    }
}

/// What one transaction does to one account.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Change {
    /// The account's number.
    pub(crate) account: i32,
    /// What is added to its balance.
    pub(crate) delta: i32,
}

/// A client's changes: as many as [`CHANGES`] says, the same for the same seed.
pub(crate) fn changes(seed: u64) -> Arc<[Change]> {
    let mut random = StdRng::seed_from_u64(seed);
    let mut change =
        || Change { account: random.random_range(1..=ACCOUNTS), delta: random.random_range(-5_000..=5_000) };
    (0..CHANGES).map(|_| change()).collect()
}

/// A client with a connection of whatever kind, that does one piece of work after the other.
#[async_trait]
pub(crate) trait Caller: Send {
    /// Reads the account of the change with this number, makes the change, and commits, in one transaction.
    ///
    /// # Cancel safety
    /// None is needed: nobody drops it before its end.
    async fn transaction(&mut self, number: usize) -> Result<(), Failure>;

    /// Reads the account of the change with this number.
    ///
    /// # Cancel safety
    /// As [`Caller::transaction`].
    async fn select(&mut self, number: usize) -> Result<(), Failure>;

    /// Gives back what the server holds for it, where dropping it would not do.
    ///
    /// # Cancel safety
    /// As [`Caller::transaction`].
    async fn close(&mut self) -> Result<(), Failure> {
        Ok(())
    }
}

/// Fails with what is wrong unless it is so.
pub(crate) fn ensure(so: bool, wrong: &str) -> Result<(), Failure> {
    if so { Ok(()) } else { Err(wrong.into()) }
}

/// The accounts, seen by a superuser.
pub(crate) struct Accounts(Client);

impl Accounts {
    /// Makes them, in the database of this URL, for the role `broker`. Their vacuuming is left to [`Accounts::tidy`],
    /// so that none falls into a measurement.
    pub(crate) async fn create(url: &str) -> Result<Self, Failure> {
        let (client, connection) = url.parse::<Config>()?.connect(NoTls).await?;
        // It ends with the client, and what it fails with the client's calls tell.
        tokio::spawn(connection);
        client
            .batch_execute(&format!(
                "SET ROLE broker; \
                 CREATE TABLE pgbench_accounts (aid int4 NOT NULL, bid int4, abalance int4 NOT NULL, filler char(84)) \
                     WITH (fillfactor = 90, autovacuum_enabled = off); \
                 INSERT INTO pgbench_accounts \
                     SELECT aid, 1 + (aid - 1) / 100000, 0, '' FROM generate_series(1, {ACCOUNTS}) AS aid; \
                 ALTER TABLE pgbench_accounts ADD PRIMARY KEY (aid); \
                 RESET ROLE"
            ))
            .await?;
        client.batch_execute("VACUUM ANALYZE pgbench_accounts").await?;
        Ok(Self(client))
    }

    /// Clears away what earlier rounds have left, so that each begins alike.
    pub(crate) async fn tidy(&self) -> Result<(), Failure> {
        self.0.batch_execute("VACUUM pgbench_accounts").await?;
        self.0.batch_execute("CHECKPOINT").await?;
        Ok(())
    }

    /// All balances together.
    pub(crate) async fn total(&self) -> Result<i64, Failure> {
        Ok(self.0.query_one_scalar("SELECT sum(abalance) FROM pgbench_accounts", &[]).await?)
    }

    /// The server's version and, by its clock, today's date.
    pub(crate) async fn version_and_date(&self) -> Result<(String, String), Failure> {
        let sql = "SELECT current_setting('server_version'), to_char(now() AT TIME ZONE 'UTC', 'YYYY-MM-DD HH24:MI')";
        let row = self.0.query_one(sql, &[]).await?;
        Ok((row.try_get(0)?, row.try_get(1)?))
    }
}
