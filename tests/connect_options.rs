//! Every connection option, seen where it must arrive: in PostgreSQL, on the wire, or in a refusal.

use std::path::PathBuf;
use std::sync::LazyLock;

use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair, date_time_ymd};
use session_broker::grpc::pb;
use tokio::io::AsyncReadExt;
use tokio::net::TcpListener;
use tonic::Code;

use crate::support::{Broker, Failure, Server, Session, first_row, text};

/// A certificate and its key, as PEM.
struct Identity {
    certificate: String,
    key: String,
}

/// An authority of the tests' own.
struct Authority {
    issuer: Issuer<'static, KeyPair>,
    certificate: String,
}

impl Authority {
    fn new(name: &str) -> Self {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().unwrap();
        let certificate = params.self_signed(&key).unwrap().pem();
        Self { issuer: Issuer::new(params, key), certificate }
    }

    fn issue(&self, name: &str, last_year: i32) -> Identity {
        let mut params = CertificateParams::new(vec![name.to_owned()]).unwrap();
        params.distinguished_name.push(DnType::CommonName, name);
        params.not_after = date_time_ymd(last_year, 1, 1);
        let key = KeyPair::generate().unwrap();
        let certificate = params.signed_by(&key, &self.issuer).unwrap().pem();
        Identity { certificate, key: key.serialize_pem() }
    }
}

/// A server that encrypts as `db.test`, and files to reach it with.
struct Encrypted {
    server: Server,
    files: tempfile::TempDir,
}

static ENCRYPTED: LazyLock<Encrypted> = LazyLock::new(|| {
    let authority = Authority::new("the authority");
    let server = Server::start();
    let identity = authority.issue("db.test", 2099);
    server.encrypt(&identity.certificate, &identity.key, &authority.certificate);
    let files = tempfile::tempdir().unwrap();
    let caller = authority.issue("broker", 2099);
    for (name, text) in [
        ("ca.pem", &authority.certificate),
        ("other.pem", &Authority::new("another authority").certificate),
        ("client.crt", &caller.certificate),
        ("client.key", &caller.key),
    ] {
        std::fs::write(files.path().join(name), text).unwrap();
    }
    Encrypted { server, files }
});

impl Encrypted {
    fn file(&self, name: &str) -> PathBuf {
        self.files.path().join(name)
    }

    /// The keys of an engine that knows the server as `host`.
    fn engine(&self, host: &str, more: &str) -> String {
        format!("host = {host:?}\nhostaddr = \"127.0.0.1\"\n{}\n{more}", self.server.login())
    }
}

/// A session of an engine with these keys, and its broker.
async fn session(engine: &str) -> (Broker, Session) {
    let broker = Broker::start_engine(engine).await;
    let session = broker.session().await;
    (broker, session)
}

/// The first row of a query, as texts.
async fn query(engine: &str, sql: &str) -> Result<Vec<String>, Failure> {
    let (_broker, session) = session(engine).await;
    let result = session.execute(sql).await?;
    let texts = first_row(&result).into_iter().map(|kind| match kind {
        pb::value::Kind::StringValue(text) => text,
        pb::value::Kind::BoolValue(value) => value.to_string(),
        other => panic!("{other:?} is no text"),
    });
    Ok(texts.collect())
}

/// Why an engine with these keys has no connection.
async fn refusal(engine: &str) -> String {
    let failure = query(engine, "SELECT 'in'").await.unwrap_err();
    assert_eq!((failure.code, failure.reason.as_str()), (Code::Unavailable, "ENGINE_UNREACHABLE"), "{failure:?}");
    failure.message
}

#[tokio::test(flavor = "multi_thread")]
async fn who_and_where_reach_postgresql() {
    let sql = "SELECT current_user::text, current_database()::text, current_setting('application_name'), \
               inet_server_port()::text";
    let engine = ENCRYPTED.engine("db.test", "ssl_mode = \"disable\"\napplication_name = \"billing\"");
    let expected = ["broker", "sample", "billing", &ENCRYPTED.server.port];
    assert_eq!(query(&engine, sql).await.unwrap(), expected);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_unix_socket_is_a_host() {
    let directory = ENCRYPTED.server.postgres.directory().display().to_string();
    let engine = format!("host = {directory:?}\n{}", ENCRYPTED.server.login());
    let row = query(&engine, "SELECT coalesce(inet_server_addr()::text, 'unix')").await.unwrap();
    assert_eq!(row, ["unix"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn hosts_are_tried_in_order_and_a_dead_one_is_passed_over() {
    let dead = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let Server { port, password, .. } = &ENCRYPTED.server;
    let url = format!("postgresql://broker:{password}@127.0.0.1:{dead},127.0.0.1:{port}/sample");
    let row = query(&format!("url = {url:?}"), "SELECT inet_server_port()::text").await.unwrap();
    assert_eq!(row, [port.as_str()]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_silent_host_leaves_time_for_the_next() {
    let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let silent_port = silent.local_addr().unwrap().port();
    let Server { port, password, .. } = &ENCRYPTED.server;
    let url = format!("postgresql://broker:{password}@127.0.0.1:{silent_port},127.0.0.1:{port}/sample");
    let row = query(&format!("url = {url:?}\nconnect_timeout = \"2s\""), "SELECT inet_server_port()::text").await;
    assert_eq!(row.unwrap(), [port.as_str()]);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_connect_timeout_covers_a_server_that_is_silent_at_login_and_at_tls() {
    for ssl_mode in ["disable", "require"] {
        let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = silent.local_addr().unwrap().port();
        let engine = format!(
            "host = \"127.0.0.1\"\nport = {port}\nuser = \"u\"\nssl_mode = {ssl_mode:?}\nconnect_timeout = \"200ms\""
        );
        assert!(refusal(&engine).await.contains("connect_timeout of 200ms"));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn run_time_parameters_reach_every_transaction_and_survive_the_reset() {
    let engine = ENCRYPTED.engine(
        "db.test",
        r#"
            ssl_mode = "disable"
            pool_size = 1
            max_overflow = 0
            search_path = ["a b", "public"]
            time_zone = "Europe/Vienna"
            client_connection_check_interval = "700ms"
            statement_timeout = "11s"
            lock_timeout = "3s"
            idle_in_transaction_session_timeout = "13s"
            server_settings = { work_mem = "3MB", "my.setting" = "a b\\c" }
        "#,
    );
    let (_broker, session) = session(&engine).await;
    let shown = [
        ("search_path", "\"a b\", \"public\""),
        ("TimeZone", "Europe/Vienna"),
        ("client_connection_check_interval", "700ms"),
        ("statement_timeout", "11s"),
        ("lock_timeout", "3s"),
        ("idle_in_transaction_session_timeout", "13s"),
        ("work_mem", "3MB"),
        ("my.setting", "a b\\c"),
    ];
    for _ in 0..2 {
        for (name, value) in shown {
            let row = first_row(&session.execute(&format!("SELECT current_setting('{name}')")).await.unwrap());
            assert_eq!(row, [text(value)], "{name}");
            session.execute(&format!("SET {name} = DEFAULT")).await.unwrap();
        }
        session.execute("SET work_mem = '9MB'").await.unwrap();
        session.commit().await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn options_of_newer_servers_arrive_there_and_are_refused_by_older_ones() {
    let newer = ENCRYPTED.server.psql("SELECT current_setting('server_version_num')::int >= 170000") == "t";
    let timeout = ENCRYPTED.engine("db.test", "ssl_mode = \"disable\"\ntransaction_timeout = \"17s\"");
    let direct = ENCRYPTED.engine("db.test", "ssl_mode = \"require\"\nssl_negotiation = \"direct\"");
    if newer {
        let shown = query(&timeout, "SELECT current_setting('transaction_timeout')").await.unwrap();
        assert_eq!(shown, ["17s"]);
        assert_eq!(query(&direct, ENCRYPTION).await.unwrap()[0], "true");
    } else {
        let refused = query(&timeout, "SELECT 'in'").await.unwrap_err();
        assert_eq!(refused.metadata["sqlstate"], "42704");
        assert!(refused.message.contains("transaction_timeout"), "{refused:?}");
        refusal(&direct).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn without_settings_of_its_own_an_engine_has_the_nets_of_the_transaction() {
    let engine = ENCRYPTED.engine("db.test", "ssl_mode = \"disable\"\nstatement_timeout = \"1h\"");
    let sql = "SELECT current_setting('statement_timeout'), current_setting('idle_in_transaction_session_timeout')";
    assert_eq!(query(&engine, sql).await.unwrap(), ["35s", "65s"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_password_file_is_read_again_for_every_connection() {
    let server = Server::start();
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), format!("{}\n", server.password)).unwrap();
    let engine = format!(
        "host = \"127.0.0.1\"\nport = {}\nuser = \"broker\"\ndatabase = \"sample\"\npassword_file = {:?}\n",
        server.port,
        file.path()
    );
    let (broker, session) = session(&engine).await;
    session.execute("SELECT 1").await.unwrap();
    server.psql("ALTER ROLE broker PASSWORD 'rotated'");
    server.psql("SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE usename = 'broker'");
    session.execute("SELECT 1").await.unwrap_err();
    std::fs::write(file.path(), "rotated").unwrap();
    broker.session().await.execute("SELECT 1").await.unwrap();
}

const ENCRYPTION: &str =
    "SELECT ssl, coalesce(version, ''), coalesce(client_dn, '') FROM pg_stat_ssl WHERE pid = pg_backend_pid()";

#[tokio::test(flavor = "multi_thread")]
async fn each_ssl_mode_encrypts_and_asks_what_it_says() {
    let encrypted = &ENCRYPTED;
    let (ca, other) = (encrypted.file("ca.pem"), encrypted.file("other.pem"));
    let engine = |host: &str, mode: &str, root: Option<&PathBuf>| {
        let root = root.map(|root| format!("ssl_root_cert = {root:?}")).unwrap_or_default();
        encrypted.engine(host, &format!("ssl_mode = {mode:?}\n{root}"))
    };
    let plain = query(&engine("db.test", "disable", None), ENCRYPTION).await.unwrap();
    assert_eq!(plain, ["false", "", ""]);
    for (host, mode, root) in [
        ("elsewhere.test", "require", None),
        ("elsewhere.test", "verify-ca", Some(&ca)),
        ("db.test", "verify-full", Some(&ca)),
    ] {
        let row = query(&engine(host, mode, root), ENCRYPTION).await.unwrap();
        assert_eq!(row, ["true", "TLSv1.3", ""], "{mode}");
    }
    for (host, mode, root, said) in [
        ("db.test", "verify-ca", Some(&other), "UnknownIssuer"),
        ("db.test", "verify-full", Some(&other), "UnknownIssuer"),
        ("db.test", "verify-full", None, "UnknownIssuer"),
        ("elsewhere.test", "verify-full", Some(&ca), "not valid for name"),
    ] {
        let message = refusal(&engine(host, mode, root)).await;
        assert!(message.contains(said), "{mode}: {message}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_certificate_reaches_postgresql() {
    let files = ["ca.pem", "client.crt", "client.key"].map(|name| ENCRYPTED.file(name));
    let [ca, cert, key] = &files;
    let more = format!("ssl_root_cert = {ca:?}\nssl_cert = {cert:?}\nssl_key = {key:?}\nssl_mode = \"verify-full\"");
    let row = query(&ENCRYPTED.engine("db.test", &more), ENCRYPTION).await.unwrap();
    assert_eq!(row[2], "/CN=broker");
    let missing = more.replace("client.key", "missing.key");
    assert!(refusal(&ENCRYPTED.engine("db.test", &missing)).await.contains("missing.key"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_statement_on_an_encrypted_connection_is_cancelled_and_the_connection_lives_on() {
    let engine = ENCRYPTED.engine("db.test", "ssl_mode = \"require\"\npool_size = 1\nmax_overflow = 0");
    let (_broker, session) = session(&engine).await;
    session.execute("SELECT 1").await.unwrap();
    let pid = session.get().await.unwrap().backend_pid;
    let request =
        pb::ExecuteRequest { timeout: crate::support::millis(50), ..session.statement("SELECT pg_sleep(60)", vec![]) };
    assert_eq!(session.run(request).await.unwrap_err().code, Code::DeadlineExceeded);
    session.rollback().await.unwrap();
    session.execute("SELECT 1").await.unwrap();
    assert_eq!(session.get().await.unwrap().backend_pid, pid);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_expired_certificate_is_refused() {
    let authority = Authority::new("the authority");
    let server = Server::start();
    let expired = authority.issue("db.test", 2020);
    server.encrypt(&expired.certificate, &expired.key, &authority.certificate);
    let ca = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(ca.path(), &authority.certificate).unwrap();
    let engine = format!(
        "host = \"db.test\"\nhostaddr = \"127.0.0.1\"\n{}ssl_root_cert = {:?}\nssl_mode = \"verify-full\"",
        server.login(),
        ca.path()
    );
    let message = refusal(&engine).await;
    assert!(message.contains("expired"), "{message}");
}

#[tokio::test(flavor = "multi_thread")]
async fn channel_binding_is_required_where_it_is_asked_for() {
    let bound =
        |mode: &str| ENCRYPTED.engine("db.test", &format!("ssl_mode = {mode:?}\nchannel_binding = \"require\""));
    assert_eq!(query(&bound("require"), "SELECT 'in'").await.unwrap(), ["in"]);
    let message = refusal(&bound("disable")).await;
    assert!(message.contains("channel binding"), "{message}");
    let unbound = ENCRYPTED.engine("db.test", "ssl_mode = \"require\"\nchannel_binding = \"disable\"");
    assert_eq!(query(&unbound, "SELECT 'in'").await.unwrap(), ["in"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn direct_negotiation_begins_with_tls_itself() {
    // A TLS handshake record begins with 0x16; the request for one with the length of its message.
    for (negotiation, first) in [("direct", 0x16), ("postgres", 0)] {
        let server = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = server.local_addr().unwrap().port();
        let engine = format!(
            "host = \"127.0.0.1\"\nport = {port}\nuser = \"u\"\nssl_mode = \"require\"\nssl_negotiation = {negotiation:?}"
        );
        let _broker = Broker::start_engine(&engine).await;
        // The broker looks whether the engine is there.
        let (mut caller, _) = server.accept().await.unwrap();
        assert_eq!(caller.read_u8().await.unwrap(), first, "{negotiation}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn target_session_attrs_choose_the_server() {
    let server = Server::start();
    server.psql("ALTER DATABASE sample SET default_transaction_read_only = on");
    let engine = |attrs: &str| {
        format!(
            "host = \"127.0.0.1\"\n{}target_session_attrs = {attrs:?}\nload_balance_hosts = \"random\"",
            server.login()
        )
    };
    for attrs in ["any", "read-only", "primary", "prefer-standby"] {
        assert_eq!(query(&engine(attrs), "SELECT 'in'").await.unwrap(), ["in"], "{attrs}");
    }
    for attrs in ["read-write", "standby"] {
        let message = refusal(&engine(attrs)).await;
        assert!(message.contains(attrs), "{message}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn random_load_balancing_uses_all_hosts() {
    let (one, two) = (Server::start(), &ENCRYPTED.server);
    one.psql(&format!("ALTER ROLE broker PASSWORD '{}'", two.password));
    let url = format!("postgresql://broker:{}@127.0.0.1:{},127.0.0.1:{}/sample", two.password, one.port, two.port);
    for (balance, both) in [("random", true), ("disable", false)] {
        let engine = format!("url = {url:?}\nload_balance_hosts = {balance:?}\npool_size = 20");
        let broker = Broker::start_engine(&engine).await;
        let mut ports = std::collections::BTreeSet::new();
        let mut sessions = Vec::new();
        for _ in 0..20 {
            let session = broker.session().await;
            let row = session.execute("SELECT inet_server_port()::text").await.unwrap();
            let pb::value::Kind::StringValue(port) = first_row(&row).remove(0) else { panic!("no port") };
            ports.insert(port);
            // The open transaction keeps its connection, so that the next session opens another.
            sessions.push(session);
        }
        assert_eq!(ports.len() == 2, both, "{balance}: {ports:?}");
    }
}
