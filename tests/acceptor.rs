//! Listening: who is let in, what they must prove, and how long they may stay. No call is made.
//!
//! The sockets are real, and the clock is moved: nothing here waits for a limit to pass.

use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt;
use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams, DnType, IsCa, Issuer, KeyIdMethod, KeyPair,
    RevokedCertParams, SerialNumber, date_time_ymd,
};
use rustls::crypto::ring;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::{ClientConfig, RootCertStore};
use session_broker::acceptor::{Acceptor, Address, ClientTrust, Clients, Connection, Limits, Tls};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpStream, UnixStream};
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};
use tokio::task::{JoinHandle, yield_now};
use tokio::time::timeout;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

const PREFACE: &[u8; 24] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
const SECOND: Duration = Duration::from_secs(1);
const MINUTE: Duration = Duration::from_mins(1);

/// What does not happen within ten seconds does not happen.
async fn soon<T>(future: impl Future<Output = T>) -> T {
    timeout(10 * SECOND, future).await.expect("it happens")
}

/// Lets so much time pass at once.
async fn pass(time: Duration) {
    tokio::time::pause();
    tokio::time::advance(time).await;
    tokio::time::resume();
}

/// An authority of the tests' own.
struct Authority {
    issuer: Issuer<'static, KeyPair>,
    certificate: CertificateDer<'static>,
    pem: String,
}

/// A certificate and its key.
struct Identity {
    certificate: CertificateDer<'static>,
    pem: String,
    key: String,
}

impl Authority {
    fn new(name: &str) -> Self {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().unwrap();
        let certificate = params.self_signed(&key).unwrap();
        Self { certificate: certificate.der().clone(), pem: certificate.pem(), issuer: Issuer::new(params, key) }
    }

    fn issue(&self, name: &str, serial: u8) -> Identity {
        let mut params = CertificateParams::new(vec![name.to_owned()]).unwrap();
        params.distinguished_name.push(DnType::CommonName, name);
        params.serial_number = Some(SerialNumber::from_slice(&[serial]));
        let key = KeyPair::generate().unwrap();
        let certificate = params.signed_by(&key, &self.issuer).unwrap();
        Identity { certificate: certificate.der().clone(), pem: certificate.pem(), key: key.serialize_pem() }
    }

    /// The list of those revoked, good until a year.
    fn revoke(&self, serials: &[u8], last_year: i32) -> String {
        let revoked = |serial: &u8| RevokedCertParams {
            serial_number: SerialNumber::from_slice(&[*serial]),
            revocation_time: date_time_ymd(2020, 1, 1),
            reason_code: None,
            invalidity_date: None,
        };
        let list = CertificateRevocationListParams {
            this_update: date_time_ymd(2020, 1, 1),
            next_update: date_time_ymd(last_year, 1, 1),
            crl_number: SerialNumber::from_slice(&[1]),
            issuing_distribution_point: None,
            revoked_certs: serials.iter().map(revoked).collect(),
            key_identifier_method: KeyIdMethod::Sha256,
        };
        list.signed_by(&self.issuer).unwrap().pem().unwrap()
    }
}

/// An authority, and files for an acceptor that it vouches for.
struct Site {
    authority: Authority,
    files: tempfile::TempDir,
}

impl Site {
    fn new() -> Self {
        let site = Self { authority: Authority::new("the authority"), files: tempfile::tempdir().unwrap() };
        site.put("ca.crt", &site.authority.pem);
        site.put_server(&site.authority.issue("localhost", 1));
        site
    }

    fn path(&self, name: &str) -> PathBuf {
        self.files.path().join(name)
    }

    /// Puts a file there in one step, as those do who renew certificates.
    fn put(&self, name: &str, text: &str) {
        fs::write(self.path("new"), text).unwrap();
        fs::rename(self.path("new"), self.path(name)).unwrap();
    }

    fn put_server(&self, identity: &Identity) {
        self.put("tls.crt", &identity.pem);
        self.put("tls.key", &identity.key);
    }

    fn trust(&self) -> ClientTrust {
        ClientTrust { authority: self.path("ca.crt"), revoked: None }
    }

    /// The same, with a list of those revoked.
    fn trust_but(&self, list: &str) -> ClientTrust {
        self.put("crl.pem", list);
        ClientTrust { revoked: Some(self.path("crl.pem")), ..self.trust() }
    }

    async fn listen(&self, clients: Clients) -> Listening {
        self.listen_within(clients, Limits::default()).await
    }

    async fn listen_within(&self, clients: Clients, limits: Limits) -> Listening {
        let tls = Tls { certificate: self.path("tls.crt"), key: self.path("tls.key"), clients };
        Listening::start(&[any_port()], Some(tls), limits).await
    }

    /// A client that trusts the authority, and shows a certificate if it has one.
    fn client(&self, identity: Option<&Identity>) -> TlsConnector {
        let mut roots = RootCertStore::empty();
        roots.add(self.authority.certificate.clone()).unwrap();
        let builder = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(roots);
        let mut config = match identity {
            None => builder.with_no_client_auth(),
            Some(Identity { certificate, pem: _, key }) => {
                let key = PrivateKeyDer::from_pem_slice(key.as_bytes()).unwrap();
                builder.with_client_auth_cert(vec![certificate.clone()], key).unwrap()
            }
        };
        config.alpn_protocols = vec![b"h2".to_vec()];
        TlsConnector::from(Arc::new(config))
    }
}

fn any_port() -> Address {
    Address::Tcp("127.0.0.1:0".into())
}

/// An acceptor whose connections are kept until they are asked for.
struct Listening {
    addresses: Vec<Address>,
    connections: UnboundedReceiver<Connection>,
    task: JoinHandle<()>,
}

impl Listening {
    async fn start(addresses: &[Address], tls: Option<Tls>, limits: Limits) -> Self {
        let acceptor = Acceptor::bind(addresses, tls, limits).await.unwrap();
        let addresses = acceptor.addresses();
        let (sender, connections) = unbounded_channel();
        let task = tokio::spawn(async move {
            let mut incoming = pin!(acceptor.into_stream());
            while let Some(connection) = incoming.next().await {
                sender.send(connection.unwrap()).unwrap();
            }
        });
        Self { addresses, connections, task }
    }

    async fn plain(limits: Limits) -> Self {
        Self::start(&[any_port()], None, limits).await
    }

    /// The first address.
    async fn connect(&self) -> TcpStream {
        TcpStream::connect(self.addresses[0].to_string()).await.unwrap()
    }

    async fn next(&mut self) -> Connection {
        soon(self.connections.recv()).await.unwrap()
    }

    /// A client's connection, and what the acceptor makes of it; or how the client is turned away.
    async fn enter(&mut self, client: &TlsConnector) -> io::Result<(TlsStream<TcpStream>, Connection)> {
        let stream = self.connect().await;
        let mut stream = soon(client.connect(ServerName::try_from("localhost").unwrap(), stream)).await?;
        let mut byte = [0];
        let entered = soon(async {
            tokio::select! {
                connection = self.connections.recv() => Ok(connection.unwrap()),
                read = stream.read(&mut byte) => Err(read.expect_err("a client that is turned away is told so")),
            }
        })
        .await;
        entered.map(|connection| (stream, connection))
    }

    /// Drops the stream of connections.
    async fn stop(self) {
        self.task.abort();
        let _ = self.task.await;
    }
}

/// Bytes go both ways.
async fn exchange(client: &mut (impl AsyncRead + AsyncWrite + Unpin), connection: &mut Connection) {
    show_preface(client, connection).await;
    soon(connection.write_all(b"answer")).await.unwrap();
    soon(connection.flush()).await.unwrap();
    let mut answer = [0; 6];
    soon(client.read_exact(&mut answer)).await.unwrap();
    assert_eq!(&answer, b"answer");
}

async fn show_preface(client: &mut (impl AsyncWrite + Unpin), connection: &mut Connection) {
    send(client, connection, PREFACE).await;
}

/// Some bytes arrive.
async fn send(client: &mut (impl AsyncWrite + Unpin), connection: &mut Connection, bytes: &[u8]) {
    soon(client.write_all(bytes)).await.unwrap();
    soon(client.flush()).await.unwrap();
    let mut arrived = vec![0; bytes.len()];
    soon(connection.read_exact(&mut arrived)).await.unwrap();
    assert_eq!(arrived, bytes);
}

/// What somebody finds who has been reading for so long: bytes, or the end.
async fn read_for(mut connection: Connection, time: Duration) -> usize {
    let reading = tokio::spawn(async move { connection.read(&mut [0; 64]).await.unwrap() });
    yield_now().await;
    pass(time).await;
    soon(reading).await.unwrap()
}

/// Whether the other side has closed.
async fn is_closed(client: &mut (impl AsyncRead + Unpin)) -> bool {
    matches!(soon(client.read(&mut [0; 64])).await, Ok(0) | Err(_))
}

#[tokio::test]
async fn bytes_go_both_ways_over_tcp_and_the_peer_is_known() {
    let mut listening = Listening::plain(Limits::default()).await;
    let mut client = listening.connect().await;
    let mut connection = listening.next().await;
    exchange(&mut client, &mut connection).await;
    let peer = connection.peer();
    assert_eq!(peer.address(), Some(client.local_addr().unwrap()));
    assert_eq!(peer.certificate(), None);
}

#[tokio::test]
async fn a_port_that_is_taken_is_named() {
    let listening = Listening::plain(Limits::default()).await;
    let error = Acceptor::bind(&listening.addresses, None, Limits::default()).await.unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::AddrInUse);
    assert!(error.to_string().contains(&listening.addresses[0].to_string()), "{error}");
}

#[tokio::test]
async fn an_end_to_the_stream_is_an_end_to_listening() {
    let listening = Listening::plain(Limits::default()).await;
    let address = listening.addresses[0].to_string();
    listening.stop().await;
    assert_eq!(TcpStream::connect(address).await.unwrap_err().kind(), io::ErrorKind::ConnectionRefused);
}

#[tokio::test]
async fn a_unix_socket_is_one_address_of_several_and_goes_with_its_acceptor() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("broker.sock");
    let addresses = [any_port(), Address::Unix(path.clone())];
    let mut listening = Listening::start(&addresses, None, Limits::default()).await;
    assert_eq!(listening.addresses[1], addresses[1]);
    assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o660);
    let mut client = UnixStream::connect(&path).await.unwrap();
    let mut connection = listening.next().await;
    exchange(&mut client, &mut connection).await;
    assert_eq!(connection.peer().address(), None);
    let mut client = listening.connect().await;
    let mut connection = listening.next().await;
    exchange(&mut client, &mut connection).await;
    listening.stop().await;
    assert!(!path.exists());
}

#[tokio::test]
async fn a_stale_unix_socket_is_replaced_and_nothing_else_is() {
    let directory = tempfile::tempdir().unwrap();
    let bind = async |name: &str| {
        let address = Address::Unix(directory.path().join(name));
        Acceptor::bind(&[address], None, Limits::default()).await
    };
    let stale = directory.path().join("stale.sock");
    drop(std::os::unix::net::UnixListener::bind(&stale).unwrap());
    let live = bind("stale.sock").await.unwrap();
    assert_eq!(bind("stale.sock").await.unwrap_err().kind(), io::ErrorKind::AddrInUse);
    assert!(UnixStream::connect(&stale).await.is_ok());
    // What took its place is not its own to remove.
    fs::remove_file(&stale).unwrap();
    fs::write(&stale, "").unwrap();
    drop(live);
    assert!(stale.exists());
    let error = bind("stale.sock").await.unwrap_err();
    assert!(error.to_string().contains("stale.sock"), "{error}");
    assert!(stale.exists());
}

#[tokio::test]
async fn tls_carries_http2_and_asks_for_no_certificate() {
    let site = Site::new();
    let mut listening = site.listen(Clients::Unasked).await;
    let (mut client, mut connection) = listening.enter(&site.client(None)).await.unwrap();
    assert_eq!(client.get_ref().1.alpn_protocol(), Some(b"h2".as_slice()));
    exchange(&mut client, &mut connection).await;
    assert_eq!(connection.peer().certificate(), None);
    assert_eq!(connection.peer().address(), Some(client.get_ref().0.local_addr().unwrap()));
}

#[tokio::test]
async fn plain_text_is_not_taken_for_tls() {
    let site = Site::new();
    let mut listening = site.listen(Clients::Unasked).await;
    let mut client = listening.connect().await;
    client.write_all(PREFACE).await.unwrap();
    let mut answer = Vec::new();
    // An alert, and the end.
    let _ = soon(client.read_to_end(&mut answer)).await;
    assert!(listening.connections.try_recv().is_err());
}

#[tokio::test]
async fn a_required_certificate_must_be_there_and_of_the_authority() {
    let site = Site::new();
    let good = site.authority.issue("billing", 2);
    let of_another = Authority::new("another authority").issue("billing", 2);
    let mut listening = site.listen(Clients::Required(site.trust())).await;
    let (mut client, mut connection) = listening.enter(&site.client(Some(&good))).await.unwrap();
    exchange(&mut client, &mut connection).await;
    assert_eq!(connection.peer().certificate(), Some(&good.certificate));
    listening.enter(&site.client(None)).await.unwrap_err();
    listening.enter(&site.client(Some(&of_another))).await.unwrap_err();
}

#[tokio::test]
async fn an_optional_certificate_may_be_absent_and_not_wrong() {
    let site = Site::new();
    let good = site.authority.issue("billing", 2);
    let of_another = Authority::new("another authority").issue("billing", 2);
    let mut listening = site.listen(Clients::Optional(site.trust())).await;
    let (_client, connection) = listening.enter(&site.client(None)).await.unwrap();
    assert_eq!(connection.peer().certificate(), None);
    let (_client, connection) = listening.enter(&site.client(Some(&good))).await.unwrap();
    assert_eq!(connection.peer().certificate(), Some(&good.certificate));
    listening.enter(&site.client(Some(&of_another))).await.unwrap_err();
}

#[tokio::test]
async fn a_certificate_that_is_revoked_later_is_refused_without_a_restart() {
    let site = Site::new();
    let (revoked, other) = (site.authority.issue("billing", 2), site.authority.issue("orders", 3));
    let trust = site.trust_but(&site.authority.revoke(&[9], 2099));
    let mut listening = site.listen(Clients::Required(trust)).await;
    let client = site.client(Some(&revoked));
    listening.enter(&client).await.unwrap();
    site.put("crl.pem", &site.authority.revoke(&[9, 2], 2099));
    pass(2 * SECOND).await;
    listening.enter(&client).await.unwrap_err();
    listening.enter(&site.client(Some(&other))).await.unwrap();
}

#[tokio::test]
async fn a_list_out_of_date_lets_nobody_in_and_the_list_of_another_authority_does() {
    let site = Site::new();
    let client = site.client(Some(&site.authority.issue("billing", 2)));
    let trust = site.trust_but(&site.authority.revoke(&[9], 2021));
    let mut listening = site.listen(Clients::Required(trust)).await;
    listening.enter(&client).await.unwrap_err();
    site.put("crl.pem", &Authority::new("another authority").revoke(&[2], 2099));
    pass(2 * SECOND).await;
    listening.enter(&client).await.unwrap();
}

#[tokio::test]
async fn a_renewed_certificate_is_shown_and_a_broken_one_is_not() {
    let site = Site::new();
    let mut listening = site.listen(Clients::Unasked).await;
    let client = site.client(None);
    let mut shown = async || {
        // A change is looked for once a second.
        pass(2 * SECOND).await;
        let (client, _connection) = listening.enter(&client).await.unwrap();
        client.get_ref().1.peer_certificates().unwrap()[0].clone()
    };
    let renewed = site.authority.issue("localhost", 4);
    site.put_server(&renewed);
    assert_eq!(shown().await, renewed.certificate);
    site.put("tls.key", "-----BEGIN PRIVATE KEY-----\nno key\n-----END PRIVATE KEY-----\n");
    assert_eq!(shown().await, renewed.certificate);
    // Each of them is right, but one is not the other's.
    site.put("tls.key", &site.authority.issue("localhost", 5).key);
    assert_eq!(shown().await, renewed.certificate);
    fs::remove_file(site.path("tls.key")).unwrap();
    assert_eq!(shown().await, renewed.certificate);
    let last = site.authority.issue("localhost", 6);
    site.put_server(&last);
    assert_eq!(shown().await, last.certificate);
}

#[tokio::test]
async fn a_file_of_tls_that_is_wrong_is_named_without_what_it_holds() {
    let site = Site::new();
    let tls = || Tls { certificate: site.path("tls.crt"), key: site.path("tls.key"), clients: Clients::Unasked };
    let refusal = async |tls: Tls| Acceptor::bind(&[any_port()], Some(tls), Limits::default()).await.unwrap_err();
    let error = refusal(Tls { certificate: site.path("absent.crt"), ..tls() }).await;
    assert!(error.to_string().contains("absent.crt"), "{error}");
    let error = refusal(Tls { clients: Clients::Required(site.trust_but("none")), ..tls() }).await;
    assert!(error.to_string().contains("crl.pem"), "{error}");
    site.put("tls.key", "-----BEGIN PRIVATE KEY-----\nhush\n");
    let error = refusal(tls()).await.to_string();
    assert!(error.contains("tls.key") && !error.contains("hush"), "{error}");
}

#[tokio::test]
async fn a_handshake_that_never_finishes_is_broken_off_and_delays_nobody() {
    let site = Site::new();
    let mut listening = site.listen(Clients::Unasked).await;
    let mut silent = listening.connect().await;
    let (mut client, mut connection) = listening.enter(&site.client(None)).await.unwrap();
    exchange(&mut client, &mut connection).await;
    pass(11 * SECOND).await;
    assert!(is_closed(&mut silent).await);
    send(&mut client, &mut connection, b"still there").await;
}

#[tokio::test]
async fn who_shows_no_preface_in_time_is_closed() {
    let mut listening = Listening::plain(Limits::default()).await;
    let mut client = listening.connect().await;
    let mut connection = listening.next().await;
    send(&mut client, &mut connection, &PREFACE[..23]).await;
    assert_eq!(read_for(connection, 11 * SECOND).await, 0);
    let mut client = listening.connect().await;
    let mut connection = listening.next().await;
    send(&mut client, &mut connection, &PREFACE[..23]).await;
    send(&mut client, &mut connection, &PREFACE[23..]).await;
    pass(11 * SECOND).await;
    send(&mut client, &mut connection, b"still there").await;
}

#[tokio::test]
async fn who_makes_no_call_is_closed_whatever_it_sends() {
    let mut listening = Listening::plain(Limits::default()).await;
    let mut client = listening.connect().await;
    let mut connection = listening.next().await;
    show_preface(&mut client, &mut connection).await;
    pass(9 * MINUTE).await;
    send(&mut client, &mut connection, b"a ping").await;
    client.write_all(b"another").await.unwrap();
    pass(2 * MINUTE).await;
    assert_eq!(read_for(connection, Duration::ZERO).await, 0);
}

#[tokio::test]
async fn a_connection_is_not_idle_while_a_call_is_open() {
    let mut listening = Listening::plain(Limits::default()).await;
    let mut client = listening.connect().await;
    let mut connection = listening.next().await;
    show_preface(&mut client, &mut connection).await;
    let peer = connection.peer();
    let (long, short) = (peer.begin_call(), peer.begin_call());
    drop(short);
    pass(30 * MINUTE).await;
    send(&mut client, &mut connection, b"more").await;
    drop(long);
    pass(9 * MINUTE).await;
    send(&mut client, &mut connection, b"more").await;
    assert_eq!(read_for(connection, 2 * MINUTE).await, 0);
}

#[tokio::test]
async fn a_connection_that_is_too_old_is_closed_whatever_goes_on_over_it() {
    let mut listening = Listening::plain(Limits::default()).await;
    let mut client = listening.connect().await;
    let mut connection = listening.next().await;
    show_preface(&mut client, &mut connection).await;
    let _call = connection.peer().begin_call();
    for _ in 0..8 {
        pass(11 * MINUTE).await;
        send(&mut client, &mut connection, b"more").await;
        connection.write_all(b"an answer").await.unwrap();
    }
    // An hour, and half an hour for what had begun.
    pass(3 * MINUTE).await;
    assert_eq!(connection.write_all(b"an answer").await.unwrap_err().kind(), io::ErrorKind::TimedOut);
    assert_eq!(read_for(connection, Duration::ZERO).await, 0);
}

#[tokio::test]
async fn a_peer_that_takes_nothing_is_closed_when_its_time_is_over() {
    let mut listening = Listening::plain(Limits::default()).await;
    let mut client = listening.connect().await;
    let mut connection = listening.next().await;
    show_preface(&mut client, &mut connection).await;
    let writing = async {
        loop {
            if let Err(error) = connection.write_all(&vec![0; 64 * 1024]).await {
                return error;
            }
        }
    };
    let mut writing = pin!(writing);
    // Until the system's buffers are full.
    assert!(timeout(Duration::from_millis(300), &mut writing).await.is_err());
    pass(11 * MINUTE).await;
    assert_eq!(writing.await.kind(), io::ErrorKind::TimedOut);
    drop(client);
}

#[tokio::test]
async fn a_connection_beyond_the_limit_is_closed_at_once() {
    let limits = Limits { connections_max: 1, ..Limits::default() };
    let mut listening = Listening::plain(limits).await;
    let _first = listening.connect().await;
    let connection = listening.next().await;
    let mut second = listening.connect().await;
    assert!(is_closed(&mut second).await);
    drop(connection);
    let mut third = listening.connect().await;
    let mut connection = listening.next().await;
    exchange(&mut third, &mut connection).await;
}

#[tokio::test]
async fn a_handshake_takes_a_place_until_it_is_broken_off() {
    let site = Site::new();
    let limits = Limits { connections_max: 1, ..Limits::default() };
    let mut listening = site.listen_within(Clients::Unasked, limits).await;
    let mut silent = listening.connect().await;
    let mut second = listening.connect().await;
    assert!(is_closed(&mut second).await);
    pass(11 * SECOND).await;
    assert!(is_closed(&mut silent).await);
    listening.enter(&site.client(None)).await.unwrap();
}
