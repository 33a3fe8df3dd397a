//! The wall clock jumps, and no lease with it. The broker runs as a process of its own, with a wall clock that is ours
//! to set.

use std::path::PathBuf;
use std::process::Command;

use session_broker::grpc::pb;
use tempfile::TempDir;

use crate::command_line::Program;
use crate::python::run;
use crate::support::{Database, Session, seconds};
use pb::EndReason;

const HOUR: i64 = 60 * 60;

/// A wall clock of a process's own.
struct WallClock(TempDir);

impl WallClock {
    fn make() -> Self {
        let clock = Self(tempfile::tempdir().unwrap());
        let library = ["-shared", "-fPIC", "tests/wall_clock.c", "-o"];
        run(Command::new("cc").args(library).arg(clock.library()));
        clock.jump(0);
        clock
    }

    fn library(&self) -> PathBuf {
        self.0.path().join("wall_clock.so")
    }

    fn offset(&self) -> PathBuf {
        self.0.path().join("offset")
    }

    /// For the process whose clock it is.
    fn environment(&self) -> [(&'static str, PathBuf); 2] {
        [("LD_PRELOAD", self.library()), ("WALL_CLOCK_OFFSET", self.offset())]
    }

    /// From now on it is so many seconds fast.
    fn jump(&self, offset: i64) {
        std::fs::write(self.offset(), offset.to_string()).unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wall_clock_that_jumps_ends_no_lease_and_lengthens_none() {
    let database = Database::create();
    let clock = WallClock::make();
    let broker = Program::serve_under(&clock.environment(), &database.url(), "");
    let lasting = broker.session().await;
    lasting.execute("UPDATE accounts SET balance = 7 WHERE id = 1").await.unwrap();
    let before = expire_time(&broker).await;
    for offset in [HOUR, -HOUR] {
        let request = pb::BeginSessionRequest { lease_ttl: seconds(1), ..Default::default() };
        let brief = Session::begin(broker.client(), request).await.unwrap();
        clock.jump(offset);
        // What it tells of the wall clock shows that the broker's has jumped.
        let moved = expire_time(&broker).await - before;
        assert!((moved - offset).abs() < 60, "{moved}");
        let state = lasting.get().await.unwrap().state.unwrap();
        assert!((1..=30).contains(&state.lease_remaining.as_ref().unwrap().seconds), "{state:?}");
        assert!((1..=60).contains(&state.transaction_remaining.as_ref().unwrap().seconds), "{state:?}");
        assert!((29 * 60..=30 * 60).contains(&state.session_remaining.as_ref().unwrap().seconds), "{state:?}");
        lasting.keep_alive().await.unwrap();
        assert_eq!(brief.ended().await, EndReason::LeaseExpired);
    }
    lasting.commit().await.unwrap();
    assert_eq!(database.balances(), "7 100");
}

/// When a session begun now ends by its maximum age: half an hour from now, by the broker's wall clock.
async fn expire_time(broker: &Program) -> i64 {
    let begun = broker.client().begin_session(pb::BeginSessionRequest::default()).await.unwrap();
    begun.into_inner().expire_time.unwrap().seconds
}
