//! Who holds what a backend waits for, asked on connections apart from the pool.
//!
//! When everybody waits for locks the pool is empty, and that is when the question is asked. Invariant: whatever is
//! asked, each server is asked at most once in [`KEPT`], for all its backends together.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::Mutex;
use tokio::time::{Instant, timeout};
use tokio_postgres::SimpleQueryMessage;

use super::opener::{Backend, OpenError};
use super::pool::Pool;
use crate::broker::engine::Blocker;

/// How long an answer is good for.
const KEPT: Duration = Duration::from_millis(500);

/// How long a server may take to answer.
const WAIT: Duration = Duration::from_secs(1);

/// How long a connection is kept that nobody asks on.
const UNUSED: Duration = Duration::from_secs(30);

/// Every backend that waits for a lock, with each that stands in its way. Parallel workers wait on behalf of their leader.
const QUESTION: &str = "SELECT waiting.pid, blocking.pid, holder.usename, holder.application_name, holder.state \
    FROM pg_catalog.pg_stat_activity AS waiting, \
    LATERAL (SELECT DISTINCT pg_catalog.unnest(pg_catalog.pg_blocking_pids(waiting.pid)) AS pid) AS blocking \
    LEFT JOIN pg_catalog.pg_stat_activity AS holder ON holder.pid OPERATOR(pg_catalog.=) blocking.pid \
    WHERE waiting.wait_event_type OPERATOR(pg_catalog.=) 'Lock' ORDER BY 1, 2";

type Answer = Arc<HashMap<i32, Vec<Blocker>>>;

/// The servers' answers, by where the servers are.
#[derive(Default)]
pub(super) struct Blockers(Mutex<HashMap<String, Asked>>);

struct Asked {
    backend: Backend,
    /// The last answer, and when it came.
    answer: Option<(Instant, Answer)>,
}

impl Blockers {
    /// Who stands in the way of a backend of the server at `host`.
    pub(super) async fn of(&self, pool: &Pool, host: &str, pid: i32) -> Result<Vec<Blocker>, OpenError> {
        let mut servers = self.0.lock().await;
        servers.retain(|_, asked| asked.backend.is_usable() && asked.backend.idle_for() < UNUSED);
        // Taken out, so that a connection in the middle of an answer is closed when this future is dropped.
        let mut asked = match servers.remove(host) {
            Some(asked) => asked,
            None => Asked { backend: pool.open_apart(host).await?, answer: None },
        };
        let answer = match &asked.answer {
            Some((at, answer)) if at.elapsed() < KEPT => answer.clone(),
            _ => {
                let answers = timeout(WAIT, asked.backend.client.simple_query(QUESTION)).await;
                let answers = answers.map_err(|_| OpenError::Failed("the server did not say in time".into()))?;
                let answer = Arc::new(read(&answers.map_err(|error| OpenError::Failed(error.to_string()))?));
                asked.backend.used();
                asked.answer = Some((Instant::now(), answer.clone()));
                answer
            }
        };
        servers.insert(host.to_owned(), asked);
        Ok(answer.get(&pid).cloned().unwrap_or_default())
    }

    /// Closes what nobody has asked on for a while.
    pub(super) fn maintain(&self) {
        // Whoever has it does the same.
        if let Ok(mut servers) = self.0.try_lock() {
            servers.retain(|_, asked| asked.backend.idle_for() < UNUSED);
        }
    }
}

/// The blockers of each backend that waits.
fn read(answers: &[SimpleQueryMessage]) -> HashMap<i32, Vec<Blocker>> {
    let mut blockers: HashMap<i32, Vec<Blocker>> = HashMap::new();
    for answer in answers {
        let SimpleQueryMessage::Row(row) = answer else { continue };
        let number = |column| row.get(column).and_then(|text: &str| text.parse().ok());
        let text = |column| row.get(column).unwrap_or_default().to_owned();
        let (Some(waiting), Some(pid)) = (number(0), number(1)) else { continue };
        let blocker = Blocker { pid, user: text(2), application_name: text(3), state: text(4) };
        blockers.entry(waiting).or_default().push(blocker);
    }
    blockers
}
