//! Savepoints: what they keep and what they undo, by any name, on a real PostgreSQL; and random lives against a model.

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use session_broker::grpc::pb;
use tonic::Code;

use crate::support::{Broker, Database, Failure, Session, int};
use pb::{Outcome, TransactionState};

#[tokio::test(flavor = "multi_thread")]
async fn what_came_after_a_savepoint_is_undone_and_what_came_before_is_kept() {
    let database = Database::create();
    let broker = Broker::start(&database).await;
    let session = broker.session().await;
    insert(&session, 3).await;
    session.savepoint("a").await.unwrap();
    insert(&session, 4).await;
    assert_eq!(session.rollback_to("a").await.unwrap().transaction_state(), TransactionState::Open);
    insert(&session, 5).await;
    assert_eq!(session.commit().await.unwrap().outcome(), Outcome::Committed);
    assert_eq!(ids(&database), "1 2 3 5");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_released_savepoint_keeps_what_was_done_since() {
    let database = Database::create();
    let broker = Broker::start(&database).await;
    let session = broker.session().await;
    session.savepoint("outer").await.unwrap();
    insert(&session, 3).await;
    session.savepoint("inner").await.unwrap();
    insert(&session, 4).await;
    assert_eq!(session.release("outer").await.unwrap().transaction_state(), TransactionState::Open);
    refused(&session.release("inner").await.unwrap_err(), "name");
    session.commit().await.unwrap();
    assert_eq!(ids(&database), "1 2 3 4");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_savepoint_begins_the_transaction_when_there_is_none() {
    let database = Database::create();
    let broker = Broker::start(&database).await;
    let session = broker.session().await;
    assert_eq!(session.savepoint("a").await.unwrap().transaction_state(), TransactionState::Open);
    assert_ne!(session.get().await.unwrap().backend_pid, 0);
    insert(&session, 3).await;
    session.rollback_to("a").await.unwrap();
    session.commit().await.unwrap();
    assert_eq!((ids(&database).as_str(), database.open_transactions().as_str()), ("1 2", "0"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failed_transaction_goes_on_from_its_savepoint() {
    let database = Database::create();
    let broker = Broker::start(&database).await;
    let session = broker.session().await;
    insert(&session, 3).await;
    session.savepoint("a").await.unwrap();
    insert(&session, 4).await;
    let failed = session.execute("INSERT INTO accounts VALUES (4, 1)").await.unwrap_err();
    assert_eq!((failed.code, failed.transaction_state()), (Code::AlreadyExists, TransactionState::Failed));
    assert_eq!(session.rollback_to("a").await.unwrap().transaction_state(), TransactionState::Open);
    assert_eq!(session.commit().await.unwrap().outcome(), Outcome::Committed);
    assert_eq!(ids(&database), "1 2 3");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failed_transaction_takes_no_savepoint_and_releases_none() {
    let database = Database::create();
    let broker = Broker::start(&database).await;
    let session = broker.session().await;
    session.savepoint("a").await.unwrap();
    session.execute("SELECT 1 / 0").await.unwrap_err();
    for failure in [session.savepoint("b").await.unwrap_err(), session.release("a").await.unwrap_err()] {
        assert_eq!((failure.code, failure.metadata["sqlstate"].as_str()), (Code::FailedPrecondition, "25P02"));
        assert_eq!(failure.transaction_state(), TransactionState::Failed);
    }
    refused(&session.release("unknown").await.unwrap_err(), "name");
    refused(&session.rollback_to("unknown").await.unwrap_err(), "savepoint");
    assert_eq!(standing(&session).await, TransactionState::Failed);
    session.rollback_to("a").await.unwrap();
    insert(&session, 3).await;
    session.commit().await.unwrap();
    assert_eq!(ids(&database), "1 2 3");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_name_used_twice_means_the_newest_until_that_is_released() {
    let database = Database::create();
    let broker = Broker::start(&database).await;
    let session = broker.session().await;
    insert(&session, 3).await;
    session.savepoint("a").await.unwrap();
    insert(&session, 4).await;
    session.savepoint("a").await.unwrap();
    insert(&session, 5).await;
    session.rollback_to("a").await.unwrap();
    assert_eq!(seen(&session).await, 4);
    session.release("a").await.unwrap();
    session.rollback_to("a").await.unwrap();
    session.commit().await.unwrap();
    assert_eq!(ids(&database), "1 2 3");
}

#[tokio::test(flavor = "multi_thread")]
async fn rolling_back_to_a_savepoint_keeps_it_and_forgets_those_after_it() {
    let database = Database::create();
    let broker = Broker::start(&database).await;
    let session = broker.session().await;
    session.savepoint("outer").await.unwrap();
    for id in [3, 4] {
        insert(&session, id).await;
        session.savepoint("inner").await.unwrap();
        insert(&session, id + 10).await;
        session.rollback_to("outer").await.unwrap();
        refused(&session.rollback_to("inner").await.unwrap_err(), "savepoint");
        refused(&session.release("inner").await.unwrap_err(), "name");
        assert_eq!(seen(&session).await, 2);
    }
    session.release("outer").await.unwrap();
    insert(&session, 5).await;
    session.commit().await.unwrap();
    assert_eq!(ids(&database), "1 2 5");
}

#[tokio::test(flavor = "multi_thread")]
async fn any_name_of_63_bytes_is_a_savepoints() {
    let database = Database::create();
    let broker = Broker::start(&database).await;
    let session = broker.session().await;
    let longest = format!("{}x", "é".repeat(31));
    for name in [
        "a",
        " ",
        "two words",
        "select",
        "\"",
        "\"quoted\"",
        "a\"; ROLLBACK; --",
        "it's",
        "back\\slash",
        "$1",
        "line\nbreak",
        "Ünïcödé 𝄞",
        &longest,
    ] {
        session.savepoint(name).await.unwrap();
        insert(&session, 3).await;
        session.rollback_to(name).await.unwrap();
        session.release(name).await.unwrap();
        refused(&session.release(name).await.unwrap_err(), "name");
    }
    session.commit().await.unwrap();
    assert_eq!(ids(&database), "1 2");
}

#[tokio::test(flavor = "multi_thread")]
async fn names_in_upper_and_lower_case_are_two() {
    let database = Database::create();
    let broker = Broker::start(&database).await;
    let session = broker.session().await;
    session.savepoint("name").await.unwrap();
    insert(&session, 3).await;
    session.savepoint("NAME").await.unwrap();
    insert(&session, 4).await;
    refused(&session.rollback_to("Name").await.unwrap_err(), "savepoint");
    session.rollback_to("NAME").await.unwrap();
    assert_eq!(seen(&session).await, 3);
    session.rollback_to("name").await.unwrap();
    assert_eq!(seen(&session).await, 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_name_that_cannot_be_or_is_not_there_is_refused_and_harms_nothing() {
    let database = Database::create();
    let broker = Broker::start(&database).await;
    let session = broker.session().await;
    insert(&session, 3).await;
    session.savepoint("kept").await.unwrap();
    session.savepoint("released").await.unwrap();
    session.release("released").await.unwrap();
    let (long, wide) = ("x".repeat(64), "é".repeat(32));
    for name in ["", &long, &wide, "nul\0"] {
        refused(&session.savepoint(name).await.unwrap_err(), "name");
        assert_eq!(standing(&session).await, TransactionState::Open);
    }
    for name in ["unknown", "released", "KEPT", "nul\0", &long, &wide] {
        refused(&session.release(name).await.unwrap_err(), "name");
        refused(&session.rollback_to(name).await.unwrap_err(), "savepoint");
        assert_eq!(standing(&session).await, TransactionState::Open);
    }
    refused(&session.release("").await.unwrap_err(), "name");
    insert(&session, 4).await;
    session.rollback_to("kept").await.unwrap();
    assert_eq!(session.commit().await.unwrap().outcome(), Outcome::Committed);
    assert_eq!(ids(&database), "1 2 3");
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_transaction_there_is_no_savepoint_and_a_refusal_begins_none() {
    let database = Database::create();
    let broker = Broker::start(&database).await;
    let session = broker.session().await;
    refused(&session.savepoint("").await.unwrap_err(), "name");
    refused(&session.release("a").await.unwrap_err(), "name");
    refused(&session.rollback_to("a").await.unwrap_err(), "savepoint");
    let description = session.get().await.unwrap();
    assert_eq!(description.state.unwrap().transaction_state(), TransactionState::None);
    assert_eq!(description.backend_pid, 0);
    assert_eq!(session.commit().await.unwrap().outcome(), Outcome::NothingWritten);
}

#[tokio::test(flavor = "multi_thread")]
async fn savepoints_are_forgotten_with_their_transaction() {
    let database = Database::create();
    let broker = Broker::start(&database).await;
    let session = broker.session().await;
    for ending in 0..3 {
        session.savepoint("a").await.unwrap();
        match ending {
            0 => drop(session.commit().await.unwrap()),
            1 => drop(session.rollback().await.unwrap()),
            _ => drop(session.execute_and_commit("SELECT 1").await.unwrap()),
        }
        insert(&session, 3).await;
        refused(&session.release("a").await.unwrap_err(), "name");
        refused(&session.rollback_to("a").await.unwrap_err(), "savepoint");
        assert_eq!(seen(&session).await, 3);
        session.rollback().await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_transaction_has_a_thousand_savepoints_at_most() {
    let database = Database::create();
    let broker = Broker::start(&database).await;
    let session = broker.session().await;
    insert(&session, 3).await;
    for n in 0..1000 {
        session.savepoint(&format!("s{n}")).await.unwrap();
    }
    refused(&session.savepoint("more").await.unwrap_err(), "name");
    assert_eq!(standing(&session).await, TransactionState::Open);
    session.release("s999").await.unwrap();
    session.savepoint("more").await.unwrap();
    refused(&session.savepoint("still more").await.unwrap_err(), "name");
    session.rollback_to("s0").await.unwrap();
    session.savepoint("still more").await.unwrap();
    assert_eq!(session.commit().await.unwrap().outcome(), Outcome::Committed);
    assert_eq!(ids(&database), "1 2 3");
}

#[tokio::test(flavor = "multi_thread")]
async fn savepoints_at_random_leave_what_the_model_says() {
    const SEEDS: u64 = 40;
    const STEPS: i64 = 25;

    let database = Database::create();
    database.psql("CREATE TABLE steps (seed int8, n int8); ALTER TABLE steps OWNER TO broker");
    let broker = Broker::start(&database).await;
    for seed in 0..SEEDS {
        let session = broker.session().await;
        let mut random = StdRng::seed_from_u64(seed);
        let mut model = Model::default();
        let mut life = Vec::new();
        for n in 0..STEPS {
            let step = Step::random(&mut random);
            life.push(step);
            let refusal = make(&session, step, seed, n).await;
            assert_eq!(refusal, model.take(step, n), "seed {seed}: {life:?}");
        }
        assert_eq!(session.commit().await.is_ok(), !model.failed, "seed {seed}: {life:?}");
        let rows = format!("SELECT coalesce(string_agg(n::text, ' ' ORDER BY n), '') FROM steps WHERE seed = {seed}");
        assert_eq!(database.psql(&rows), model.committed(), "seed {seed}: {life:?}");
    }
}

/// A step of a transaction's life.
#[derive(Debug, Clone, Copy)]
enum Step {
    Insert,
    Fail,
    Create(&'static str),
    Release(&'static str),
    RollBackTo(&'static str),
}

impl Step {
    fn random(random: &mut StdRng) -> Self {
        const NAMES: [&str; 3] = ["a", "A", "b"];
        let name = NAMES[random.random_range(0..NAMES.len())];
        match random.random_range(0..10_u8) {
            0..=2 => Self::Insert,
            3 => Self::Fail,
            4..=6 => Self::Create(name),
            7 => Self::Release(name),
            _ => Self::RollBackTo(name),
        }
    }
}

/// What PostgreSQL's manual says of savepoints.
#[derive(Default)]
struct Model {
    rows: Vec<i64>,
    /// The names, oldest first, with the rows there were.
    savepoints: Vec<(&'static str, Vec<i64>)>,
    failed: bool,
}

impl Model {
    /// Takes a step, which inserts `n` if it inserts. Says with which code it is refused, if it is.
    fn take(&mut self, step: Step, n: i64) -> Option<Code> {
        match step {
            Step::Insert | Step::Fail | Step::Create(_) if self.failed => return Some(Code::FailedPrecondition),
            Step::Insert => self.rows.push(n),
            Step::Fail => {
                self.failed = true;
                return Some(Code::InvalidArgument);
            }
            Step::Create(name) => self.savepoints.push((name, self.rows.clone())),
            Step::Release(name) => match self.newest(name) {
                None => return Some(Code::InvalidArgument),
                Some(_) if self.failed => return Some(Code::FailedPrecondition),
                Some(at) => self.savepoints.truncate(at),
            },
            Step::RollBackTo(name) => match self.newest(name) {
                None => return Some(Code::InvalidArgument),
                Some(at) => {
                    self.savepoints.truncate(at + 1);
                    self.rows.clone_from(&self.savepoints[at].1);
                    self.failed = false;
                }
            },
        }
        None
    }

    fn newest(&self, name: &str) -> Option<usize> {
        self.savepoints.iter().rposition(|(known, _)| *known == name)
    }

    /// The rows that a commit leaves.
    fn committed(&self) -> String {
        if self.failed {
            return String::new();
        }
        self.rows.iter().map(ToString::to_string).collect::<Vec<_>>().join(" ")
    }
}

/// Takes the step on a real session. Says with which code it was refused, if it was.
async fn make(session: &Session, step: Step, seed: u64, n: i64) -> Option<Code> {
    let made = match step {
        Step::Insert => session.execute(&format!("INSERT INTO steps VALUES ({seed}, {n})")).await.map(drop),
        Step::Fail => session.execute("SELECT 1 / 0").await.map(drop),
        Step::Create(name) => session.savepoint(name).await.map(drop),
        Step::Release(name) => session.release(name).await.map(drop),
        Step::RollBackTo(name) => session.rollback_to(name).await.map(drop),
    };
    made.err().map(|failure| failure.code)
}

async fn insert(session: &Session, id: i64) {
    session.run(session.statement("INSERT INTO accounts VALUES ($1, 1)", vec![int(id)])).await.unwrap();
}

/// How many accounts the transaction sees.
async fn seen(session: &Session) -> usize {
    session.execute("SELECT id FROM accounts").await.unwrap().rows.len()
}

/// The accounts, as psql sees them.
fn ids(database: &Database) -> String {
    database.psql("SELECT string_agg(id::text, ' ' ORDER BY id) FROM accounts")
}

async fn standing(session: &Session) -> TransactionState {
    session.get().await.unwrap().state.unwrap().transaction_state()
}

fn refused(failure: &Failure, field: &str) {
    assert_eq!((failure.code, failure.reason.as_str()), (Code::InvalidArgument, "INVALID_REQUEST"), "{failure:?}");
    assert_eq!(failure.field.as_deref(), Some(field), "{failure:?}");
}
