//! Notifications: LISTEN as a stream, on one connection that heals itself. On a real PostgreSQL.

use std::collections::BTreeSet;
use std::time::Duration;

use session_broker::broker::engine::{CheckoutError, Engine};
use session_broker::broker::notification::{ChannelName, ListenEvent};
use session_broker::grpc::pb;
use session_broker::grpc::pb::notification_service_client::NotificationServiceClient;
use session_broker::postgres::engine::PostgresEngine;
use tokio::time::timeout;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Status, Streaming};

use crate::proxy::Proxy;
use crate::support::{Broker, Database, Failure, config};
use pb::listen_response::Event;

/// The broker's connections, as PostgreSQL counts them. While no session has one, the listeners' is the only one that
/// stays.
const CONNECTIONS: &str = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() \
     AND application_name = 'session-broker'";

/// What the listeners' connection was last asked.
const LAST_ASKED: &str = "SELECT query FROM pg_stat_activity WHERE datname = current_database() \
     AND application_name = 'session-broker' AND query LIKE '%LISTEN %'";

const TERMINATE: &str = "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity \
     WHERE datname = current_database() AND application_name = 'session-broker' AND query LIKE '%LISTEN %'";

/// A caller that listens.
#[derive(Debug)]
struct Listener {
    events: Streaming<pb::ListenResponse>,
    /// Kept for as long as the stream.
    _client: NotificationServiceClient<Channel>,
}

impl Listener {
    async fn open(channel: Channel, request: pb::ListenRequest) -> Result<Self, Failure> {
        let mut client = NotificationServiceClient::new(channel);
        let events = client.listen(request).await?.into_inner();
        Ok(Self { events, _client: client })
    }

    async fn message(&mut self) -> Result<Option<pb::ListenResponse>, Status> {
        timeout(Duration::from_secs(10), self.events.message()).await.expect("it comes")
    }

    async fn next(&mut self) -> Event {
        self.message().await.unwrap().expect("the stream goes on").event.expect("every message has an event")
    }

    /// The next event, a notification: its channel and its payload.
    async fn heard(&mut self) -> (String, String) {
        match self.next().await {
            Event::Notification(pb::Notification { channel, payload, .. }) => (channel, payload),
            event => panic!("{event:?} and no notification"),
        }
    }

    async fn hears(&mut self, channel: &str, payload: &str) {
        assert_eq!(self.heard().await, (channel.to_owned(), payload.to_owned()));
    }

    async fn misses(&mut self) {
        assert_eq!(self.next().await, Event::Missed(pb::Missed {}));
    }
}

fn to(channels: &[&str]) -> pb::ListenRequest {
    let channels = channels.iter().map(|channel| (*channel).to_owned()).collect();
    pb::ListenRequest { channels, ..Default::default() }
}

/// Listens, and hears of it.
async fn listening(broker: &Broker, channels: &[&str]) -> Listener {
    listening_over(broker.channel(), channels).await
}

async fn listening_over(channel: Channel, channels: &[&str]) -> Listener {
    let mut listener = Listener::open(channel, to(channels)).await.unwrap();
    assert_eq!(listener.next().await, Event::Listening(pb::Listening {}));
    listener
}

async fn refused(broker: &Broker, request: pb::ListenRequest) -> Failure {
    Listener::open(broker.channel(), request).await.unwrap_err()
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_notified_once_it_listens_comes_with_its_payload_and_who_sent_it() {
    let database = Database::create();
    let broker = Broker::start(&database).await;
    database.psql("NOTIFY orders, 'too early'");
    let mut listener = listening(&broker, &["orders"]).await;
    for payload in ["the first", "", "the third"] {
        let pid = database.psql(&format!("NOTIFY elsewhere; NOTIFY orders, '{payload}'; SELECT pg_backend_pid()"));
        let expected =
            pb::Notification { channel: "orders".into(), payload: payload.into(), backend_pid: pid.parse().unwrap() };
        assert_eq!(listener.next().await, Event::Notification(expected));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn names_of_channels_are_taken_as_they_are() {
    let database = Database::create();
    let broker = Broker::start(&database).await;
    let longest: Vec<_> = (0..58).map(|number| format!("{number:063}")).collect();
    let mut names = vec!["Orders", "orders", "with \"quotes\"", "x'; DROP TABLE accounts; --", "\\ and \u{fc}", "\""];
    names.extend(longest.iter().map(String::as_str));
    // As many as there may be.
    assert_eq!(names.len(), 64);
    let mut listener = listening(&broker, &names).await;
    for name in names {
        database.psql(&format!("SELECT pg_notify('{}', 'here')", name.replace('\'', "''")));
        listener.hears(name, "here").await;
    }
    assert_eq!(database.balances(), "100 100");
}

#[tokio::test(flavor = "multi_thread")]
async fn listeners_share_one_connection_and_each_hears_what_is_its_own_once() {
    let database = Database::create();
    let broker = Broker::start(&database).await;
    let mut news = listening(&broker, &["news", "news"]).await;
    let mut both = listening(&broker, &["weather", "news"]).await;
    let mut weather = listening(&broker, &["weather"]).await;
    database.wait_for(CONNECTIONS, "1");
    database.psql("NOTIFY news, '1'; NOTIFY weather, '2'; NOTIFY news, '3'");
    for (listener, expected) in [
        (&mut news, [("news", "1"), ("news", "3")].as_slice()),
        (&mut both, [("news", "1"), ("weather", "2"), ("news", "3")].as_slice()),
        (&mut weather, [("weather", "2")].as_slice()),
    ] {
        for (channel, payload) in expected {
            listener.hears(channel, payload).await;
        }
    }
    drop(both);
    database.psql("NOTIFY news, '4'; NOTIFY weather, '5'");
    news.hears("news", "4").await;
    weather.hears("weather", "5").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn postgresql_listens_for_the_first_and_no_longer_than_for_the_last() {
    let database = Database::create();
    let broker = Broker::start(&database).await;
    let mut kept = listening(&broker, &["kept"]).await;
    assert_eq!(database.psql(LAST_ASKED), "LISTEN \"kept\"");
    for _ in 0..2 {
        let first = listening(&broker, &["kept", "left"]).await;
        assert_eq!(database.psql(LAST_ASKED), "LISTEN \"left\"");
        let last = listening(&broker, &["left"]).await;
        drop(first);
        drop(last);
        database.wait_for(LAST_ASKED, "UNLISTEN \"left\"");
        database.psql("NOTIFY \"left\", 'to nobody'; NOTIFY kept, 'to one'");
        kept.hears("kept", "to one").await;
    }
    drop(kept);
    database.wait_for(LAST_ASKED, "UNLISTEN \"kept\"");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_session_notifies_comes_when_it_commits_and_never_when_it_rolls_back() {
    let database = Database::create();
    let broker = Broker::start(&database).await;
    let mut listener = listening(&broker, &["orders"]).await;
    let session = broker.session().await;
    session.execute("NOTIFY orders, 'rolled back'").await.unwrap();
    session.rollback().await.unwrap();
    session.execute("NOTIFY orders, 'committed'").await.unwrap();
    let backend_pid = session.get().await.unwrap().backend_pid;
    database.psql("NOTIFY orders, 'before the commit'");
    session.commit().await.unwrap();
    listener.hears("orders", "before the commit").await;
    let committed = pb::Notification { channel: "orders".into(), payload: "committed".into(), backend_pid };
    assert_eq!(listener.next().await, Event::Notification(committed));
}

#[tokio::test(flavor = "multi_thread")]
async fn listeners_take_nothing_from_the_pool() {
    let database = Database::create();
    let broker = Broker::start_with(&database, "pool_size = 1\nmax_overflow = 0", "").await;
    let session = broker.session().await;
    session.execute("UPDATE accounts SET balance = 7 WHERE id = 1").await.unwrap();
    let mut listener = listening(&broker, &["orders"]).await;
    database.psql("NOTIFY orders, 'while the pool is empty'");
    listener.hears("orders", "while the pool is empty").await;
    let pool = session.get().await.unwrap().pool.unwrap();
    assert_eq!((pool.open, pool.in_use, pool.opened), (1, 1, 1));
    session.commit().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backend_that_is_terminated_is_replaced_and_listeners_hear_of_the_gap() {
    let database = Database::create();
    let broker = Broker::start(&database).await;
    let mut news = listening(&broker, &["news"]).await;
    let mut both = listening(&broker, &["news", "weather"]).await;
    for round in ["first", "second"] {
        assert_eq!(database.psql(TERMINATE), "t");
        news.misses().await;
        both.misses().await;
        // One backend listens, so that each comes once.
        database.psql(&format!("NOTIFY weather, '{round}'; NOTIFY news, '{round}'"));
        news.hears("news", round).await;
        both.hears("weather", round).await;
        both.hears("news", round).await;
    }
    database.wait_for(CONNECTIONS, "1");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_is_out_of_reach_for_a_while_is_found_again() {
    let database = Database::create();
    let proxy = Proxy::start(&database.url(), Duration::ZERO).await;
    let broker = Broker::start_at(&proxy.url, "", "").await;
    let mut listener = listening(&broker, &["news"]).await;
    proxy.refuse();
    while proxy.cut(0) {}
    database.wait_for(CONNECTIONS, "0");
    database.psql("NOTIFY news, 'to nobody'");
    // Who begins now hears at once that it cannot, again and again.
    for _ in 0..2 {
        let failure = refused(&broker, to(&["news"])).await;
        assert_eq!((failure.code, failure.reason.as_str()), (Code::Unavailable, "ENGINE_UNREACHABLE"));
        assert!(failure.retry_info);
    }
    proxy.admit();
    listener.misses().await;
    database.psql("NOTIFY news, 'to one'");
    listener.hears("news", "to one").await;
    let mut late = listening(&broker, &["news"]).await;
    database.psql("NOTIFY news, 'to two'");
    listener.hears("news", "to two").await;
    late.hears("news", "to two").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_that_went_silent_is_replaced_when_it_does_not_answer() {
    let database = Database::create();
    let proxy = Proxy::start(&database.url(), Duration::ZERO).await;
    let broker = Broker::start_at(&proxy.url, "connect_timeout = \"2s\"", "").await;
    let mut news = listening(&broker, &["news"]).await;
    proxy.silence();
    // Nothing is new to listen to, and all the same somebody has to say so.
    let mut late = listening(&broker, &["news"]).await;
    news.misses().await;
    database.psql("NOTIFY news, 'to both'");
    news.hears("news", "to both").await;
    late.hears("news", "to both").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_listener_that_does_not_read_misses_some_hears_so_and_holds_up_nobody() {
    const COUNT: u32 = 1000;
    // Of what the broker, the transport and the network hold together, far more than they do.
    const HELD_MAX: u32 = 300;
    let database = Database::create();
    let broker = Broker::start(&database).await;
    let endpoint = Endpoint::from_shared(format!("http://{}", broker.address)).unwrap();
    let narrow = endpoint.initial_stream_window_size(65_535_u32).initial_connection_window_size(65_535_u32);
    let mut slow = listening_over(narrow.connect_lazy(), &["burst"]).await;
    let mut quick = listening(&broker, &["done"]).await;
    let burst = format!("SELECT pg_notify('burst', lpad(i::text, 7000, '0')) FROM generate_series(1, {COUNT}) AS i");
    database.psql(&format!("{burst}; NOTIFY done, 'and gone'"));
    // What comes in order has come to all when it has come to one.
    quick.hears("done", "and gone").await;
    let (mut last, mut told, mut missed) = (0, 0, false);
    loop {
        match slow.next().await {
            Event::Missed(pb::Missed {}) => {
                assert!(!missed, "said twice after {last}");
                missed = true;
                // There is room for it where this was the last of the burst.
                database.psql("NOTIFY burst, 'over'");
            }
            Event::Notification(notification) if notification.payload == "over" => break,
            Event::Notification(notification) => {
                let number = notification.payload.parse::<u32>().unwrap();
                assert!(number == last + 1 || (number > last && missed), "{number} after {last}");
                (last, told, missed) = (number, told + 1, false);
            }
            Event::Listening(pb::Listening {}) => panic!("said twice"),
        }
    }
    assert!((1..HELD_MAX).contains(&told), "{told} told, the last {last}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bad_request_is_refused_by_its_field() {
    let database = Database::create();
    let broker = Broker::start(&database).await;
    let (long, wide) = ("x".repeat(64), "\u{fc}".repeat(32));
    for (channels, field) in [
        (vec![], "channels"),
        (vec!["x"; 65], "channels"),
        (vec!["a", "b", ""], "channels[2]"),
        (vec![long.as_str()], "channels[0]"),
        (vec!["a", wide.as_str()], "channels[1]"),
        (vec!["nul\0"], "channels[0]"),
    ] {
        let failure = refused(&broker, to(&channels)).await;
        assert_eq!((failure.code, failure.reason.as_str()), (Code::InvalidArgument, "INVALID_REQUEST"));
        assert_eq!(failure.field.as_deref(), Some(field), "{failure:?}");
    }
    let named = |engine: &str, profile: &str| pb::ListenRequest {
        engine: engine.into(),
        profile: profile.into(),
        ..to(&["news"])
    };
    for (request, field) in [(named("nowhere", ""), "engine"), (named("", "nobody's"), "profile")] {
        let failure = refused(&broker, request).await;
        assert_eq!((failure.code, failure.field.as_deref()), (Code::InvalidArgument, Some(field)), "{failure:?}");
    }
    Listener::open(broker.channel(), named("main", "default")).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_listener_is_at_the_engine_that_its_profile_has() {
    let (main, other) = (Database::create(), Database::create());
    let (main_url, other_url) = (main.url(), other.url());
    let broker = Broker::start_engines(&format!(
        r#"
        default_engine = "main"
        [engines.main]
        url = {main_url:?}
        [engines.other]
        url = {other_url:?}
        [profiles.report]
        engines = ["other"]
        [principals.anonymous]
        profiles = ["default", "report"]
        "#
    ))
    .await;
    let by = |profile: &str, engine: &str| pb::ListenRequest {
        engine: engine.into(),
        profile: profile.into(),
        ..to(&["news"])
    };
    for (profile, engine, database) in [("", "", &main), ("", "other", &other), ("report", "", &other)] {
        let mut listener = Listener::open(broker.channel(), by(profile, engine)).await.unwrap();
        assert_eq!(listener.next().await, Event::Listening(pb::Listening {}));
        main.psql("NOTIFY news, 'main'");
        other.psql("NOTIFY news, 'other'");
        let expected = if database.name == main.name { "main" } else { "other" };
        listener.hears("news", expected).await;
    }
    let failure = refused(&broker, by("report", "main")).await;
    assert_eq!((failure.code, failure.field.as_deref()), (Code::InvalidArgument, Some("engine")));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_channel_that_postgresql_refuses_is_no_other_listeners_loss() {
    let template = Database::create();
    let latin = Database { name: format!("{}_latin", template.name) };
    template.psql(&format!(
        "CREATE DATABASE {} OWNER broker TEMPLATE template0 ENCODING 'LATIN1' LC_COLLATE 'C' LC_CTYPE 'C'",
        latin.name
    ));
    let broker = Broker::start(&latin).await;
    let mut news = listening(&broker, &["news"]).await;
    // Latin 1 has no such letters.
    let failure = refused(&broker, to(&["weather", "\u{5929}\u{6c17}"])).await;
    assert_eq!((failure.code, failure.metadata["sqlstate"].as_str()), (Code::InvalidArgument, "22P05"));
    let mut weather = listening(&broker, &["weather"]).await;
    latin.psql("NOTIFY news, 'still'; NOTIFY weather, 'too'");
    news.hears("news", "still").await;
    weather.hears("weather", "too").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn who_cannot_reach_postgresql_at_the_beginning_hears_so() {
    let nobody = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let broker = Broker::start_at(&format!("postgresql://u:p@{nobody}/db"), "", "").await;
    for _ in 0..2 {
        let failure = refused(&broker, to(&["news"])).await;
        assert_eq!((failure.code, failure.reason.as_str()), (Code::Unavailable, "ENGINE_UNREACHABLE"));
        assert_eq!(failure.metadata["engine"], "main");
        assert!(failure.message.contains(&nobody.to_string()), "{failure:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_engine_has_its_maximum_of_listeners_and_room_when_one_leaves() {
    const LISTENERS_MAX: usize = 1000;
    let database = Database::create();
    let config = config(&[("ENGINES__MAIN__URL", &database.url())]);
    let engine = config.engines["main"].clone();
    let engine = PostgresEngine::new("main".into(), engine.connect, engine.pool, BTreeSet::new(), None);
    let news = || BTreeSet::from([ChannelName::new("channels[0]", "news").unwrap()]);
    let mut listeners = Vec::new();
    for _ in 0..LISTENERS_MAX {
        listeners.push(engine.listen(news()).await.unwrap_or_else(|error| panic!("{error}")));
    }
    assert_eq!(engine.listen(news()).await.err(), Some(CheckoutError::Listeners(LISTENERS_MAX)));
    listeners.pop();
    listeners.push(engine.listen(news()).await.unwrap_or_else(|error| panic!("{error}")));
    database.psql("NOTIFY news, 'for a thousand'");
    for listener in &mut listeners {
        assert_eq!(listener.next().await, ListenEvent::Listening);
        let ListenEvent::Notification(notification) = listener.next().await else { panic!("no notification") };
        assert_eq!(notification.payload, "for a thousand");
        // What somebody notifies is nobody else's to read, in a log for example.
        assert!(!format!("{notification:?}").contains("thousand"));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_drain_ends_the_streams_and_admits_no_more() {
    let database = Database::create();
    let engine = format!("[engines.main]\nurl = {:?}", database.url());
    let broker = Broker::start_draining_for("10s", &engine).await;
    let mut listener = listening(&broker, &["news"]).await;
    let session = broker.session().await;
    session.execute("SELECT 1").await.unwrap();
    broker.begin_stop();
    let ended = Failure::from(listener.message().await.unwrap_err());
    assert_eq!((ended.code, ended.reason.as_str()), (Code::Unavailable, "DRAINING"));
    assert!(ended.retry_info);
    // The session's transaction keeps the broker.
    assert_eq!(refused(&broker, to(&["news"])).await.reason, "DRAINING");
    session.commit().await.unwrap();
    broker.stop().await;
}
