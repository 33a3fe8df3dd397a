//! Who holds what a backend waits for, asked on connections apart from the pool.
//!
//! When everybody waits for locks the pool is empty, and that is when the question is asked. Invariant: each server is
//! asked on one connection, one question at a time; one that cannot be asked is left alone for [`PAUSE`].

use std::collections::HashMap;
use std::sync::{Arc, Mutex as StdMutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::Mutex;
use tokio::time::{Instant, timeout};
use tokio_postgres::SimpleQueryMessage;

use super::opener::{Backend, OpenError};
use super::pool::Pool;
use crate::broker::engine::Blocker;

/// How long a server may take to answer.
const WAIT: Duration = Duration::from_secs(1);

/// How long a server is left alone that could not be asked.
const PAUSE: Duration = Duration::from_secs(5);

/// How long a connection is kept that nobody asks on.
const UNUSED: Duration = Duration::from_secs(30);

/// The servers that have been asked, by where they are.
#[derive(Default)]
pub(super) struct Blockers(StdMutex<HashMap<String, Arc<Mutex<Server>>>>);

#[derive(Default)]
struct Server {
    backend: Option<Backend>,
    /// Until when it is left alone.
    pause: Option<Instant>,
}

impl Blockers {
    /// Who stands in the way of a backend of the server at `host`.
    pub(super) async fn of(&self, pool: &Pool, host: &str, pid: i32) -> Result<Vec<Blocker>, OpenError> {
        let server = self.servers().entry(host.to_owned()).or_default().clone();
        let mut server = server.lock().await;
        // Taken out, so that a connection in the middle of an answer is closed when this future is dropped.
        let backend = server.backend.take().filter(Backend::is_usable);
        let now = Instant::now();
        if backend.is_none() && server.pause.is_some_and(|pause| now < pause) {
            return Err(OpenError::Failed("the server could not be asked a moment ago".into()));
        }
        server.pause = Some(now + PAUSE);
        let mut backend = match backend {
            Some(backend) => backend,
            None => pool.open_apart(host).await?,
        };
        let answers = timeout(WAIT, backend.client.simple_query(&question(pid))).await;
        let answers = answers.map_err(|_| OpenError::Failed("the server did not say in time".into()))?;
        let answers = answers.map_err(|error| OpenError::Failed(error.to_string()))?;
        backend.used();
        *server = Server { backend: Some(backend), pause: None };
        Ok(answers.iter().filter_map(read).collect())
    }

    /// Closes what nobody has asked on for a while, and forgets servers that are not asked any more.
    pub(super) fn maintain(&self) {
        let is_needed = |server: &Server| {
            let is_used = server.backend.as_ref().is_some_and(|backend| backend.idle_for() < UNUSED);
            is_used || server.pause.is_some_and(|pause| Instant::now() < pause)
        };
        // One that is being asked is needed.
        self.servers().retain(|_, server| server.try_lock().map_or(true, |server| is_needed(&server)));
    }

    fn servers(&self) -> MutexGuard<'_, HashMap<String, Arc<Mutex<Server>>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn question(pid: i32) -> String {
    // Parallel workers block for their leader, which is told once.
    format!(
        "SELECT blocking.pid, holder.usename, holder.application_name, holder.state \
         FROM (SELECT DISTINCT pg_catalog.unnest(pg_catalog.pg_blocking_pids({pid})) AS pid) AS blocking \
         LEFT JOIN pg_catalog.pg_stat_activity AS holder ON holder.pid OPERATOR(pg_catalog.=) blocking.pid ORDER BY 1"
    )
}

fn read(answer: &SimpleQueryMessage) -> Option<Blocker> {
    let SimpleQueryMessage::Row(row) = answer else { return None };
    let text = |column| row.get(column).unwrap_or_default().to_owned();
    Some(Blocker { pid: row.get(0)?.parse().ok()?, user: text(1), application_name: text(2), state: text(3) })
}
