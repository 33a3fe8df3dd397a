//! A connection cut around COMMIT, by a proxy that reads what passes: the commit is never reported as what it is not.

use std::sync::Arc;

use session_broker::grpc::pb;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Notify;
use tonic::Code;

use crate::support::{Broker, Database};
use pb::{Outcome, retry_advice::Scope};

/// Where the proxy cuts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Cut {
    /// COMMIT never reaches PostgreSQL.
    Before,
    /// COMMIT does, and its answer never comes back.
    After,
}

/// A proxy before `database` that cuts every connection at its COMMIT, and tells when PostgreSQL has hung up too.
async fn proxy(database: &Database, cut: Cut) -> (String, Arc<Notify>) {
    let url = database.url();
    let real = url.split('@').nth(1).unwrap().split('/').next().unwrap().to_owned();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = url.replace(&real, &listener.local_addr().unwrap().to_string());
    let over = Arc::new(Notify::new());
    let told = over.clone();
    tokio::spawn(async move {
        loop {
            let (caller, _) = listener.accept().await.unwrap();
            let server = TcpStream::connect(&real).await.unwrap();
            tokio::spawn(pass(caller, server, cut, told.clone()));
        }
    });
    (url, over)
}

async fn pass(mut caller: TcpStream, mut server: TcpStream, cut: Cut, over: Arc<Notify>) {
    let (mut asked, mut answered) = ([0; 8192], [0; 8192]);
    loop {
        tokio::select! {
            count = caller.read(&mut asked) => {
                let request = &asked[..count.unwrap_or(0)];
                if request.is_empty() {
                    return;
                }
                if !request.windows(7).any(|text| text == b"COMMIT\0") {
                    server.write_all(request).await.unwrap();
                    continue;
                }
                if cut == Cut::After {
                    server.write_all(request).await.unwrap();
                }
                drop(caller);
                // PostgreSQL deals with what it has, and closes when it finds nobody there.
                server.shutdown().await.unwrap();
                while server.read(&mut answered).await.is_ok_and(|count| count > 0) {}
                over.notify_one();
                return;
            }
            count = server.read(&mut answered) => match count.unwrap_or(0) {
                0 => return,
                count => caller.write_all(&answered[..count]).await.unwrap(),
            }
        }
    }
}

async fn lost_commit(cut: Cut) -> (Database, Outcome) {
    let database = Database::create();
    let (url, over) = proxy(&database, cut).await;
    let broker = Broker::start_at(&url, "", "").await;
    let session = broker.session().await;
    session.execute("UPDATE accounts SET balance = 7 WHERE id = 1").await.unwrap();
    let mut outcome = Outcome::Unspecified;
    // Repeated, it says the same, and after the session has ended still.
    for round in 0..3 {
        let lost = session.commit().await.unwrap_err();
        assert_eq!((lost.code, lost.reason.as_str()), (Code::Unknown, "COMMIT_UNKNOWN"), "{lost:?}");
        assert_eq!(lost.advice, Scope::ResolveCommit);
        outcome = lost.commit.unwrap().outcome();
        if round == 1 {
            session.close().await.unwrap();
        }
    }
    over.notified().await;
    (database, outcome)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_commit_that_never_arrived_is_unknown_not_committed() {
    let (database, outcome) = lost_commit(Cut::Before).await;
    assert_eq!((outcome, database.balances().as_str()), (Outcome::Unknown, "100 100"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_commit_whose_answer_was_lost_is_unknown_not_failed() {
    let (database, outcome) = lost_commit(Cut::After).await;
    assert_eq!((outcome, database.balances().as_str()), (Outcome::Unknown, "7 100"));
}
