//! Who calls: tokens, certificates and JWTs on the authenticator alone, with an issuer that the tests play.
//!
//! Promises about keys that change are tested with a paused clock: the issuer is asked by a blocking task, during which
//! the clock stands still.

use std::collections::BTreeMap;
use std::io::{Read as _, Write as _};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use futures_util::future::join_all;
use jsonwebtoken::get_current_timestamp;
use rcgen::{BasicConstraints, CertificateParams, DistinguishedName, DnType, IsCa, Issuer as Authority, SanType};
use ring::hmac;
use ring::rand::SystemRandom;
use ring::signature::{
    ECDSA_P256_SHA256_FIXED_SIGNING, ECDSA_P384_SHA384_FIXED_SIGNING, EcdsaKeyPair, EcdsaSigningAlgorithm,
    Ed25519KeyPair, KeyPair as _, RSA_PKCS1_SHA256, RSA_PSS_SHA256, RsaEncoding, RsaKeyPair, RsaPublicKeyComponents,
};
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::{ServerConfig, ServerConnection, StreamOwned};
use serde_json::{Value, json};
use session_broker::broker::principal::Principal;
use session_broker::identity::{
    Algorithm, Authentication, Authenticator, CertificateName, JwtOptions, KeySource, KeyUrl, TokenDigest,
    Unauthenticated,
};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::{advance, sleep};
use tokio_util::task::AbortOnDropHandle;

const ISSUER: &str = "https://issuer.example";
const AUDIENCE: &str = "session-broker";

/// Longer than any look at the keys is put off.
const PAUSE: Duration = Duration::from_secs(11);

/// Made for these tests, and used for nothing else: ring makes no RSA keys.
const TEST_RSA_KEY: &str = "\
    MIIEvQIBADANBgkqhkiG9w0BAQEFAASCBKcwggSjAgEAAoIBAQDlEFNPaem9tdRu3Rc8it0jJP0E/jKJ62Qg9rue8ML2GgqTJpgOPQDb4D+t\
    AlqJ9Z/8/AeqrNGrlahtv6QIfxYngVwpmf42WMNXWpqrEHkp/vei09PqmFsE3W9lTimlFNqjAFYwyJm25MqFzsGlTTR1nQd7N9IYNMrvgQvj\
    U+NY5kMUns+1uPsl93/ZhgjJHJhcqxoc6/4vz20jBSMs0qQFF7csLm0PFSy+wN9xNinmTP8GfETW+L4OvxWr/zWyhzedB3Vz4JHNUGHmsy54\
    y/MRcXmweVzxJ3UwXxIanlw/hkrqz//HJjGuk1mX7SZUUGYyOqbCfQi0aXePPqDv7h1dAgMBAAECggEAAcFlhg0Hfcz0LxJSMIRW7ANHTh+9\
    lul/J7KEXxQ0xkqOTLDlxuwoQscd7c9ADuEbRAbRbzkqVTCNLSQkF22T56MZ5/a2aEe3XYbD+y4h45TA5JZPgDOBNREWXrYh4xI9F7Uzs+WB\
    qhFoTOy39rKYBZO5wDO+EDHtYTcBtpEIw8BiSfBSkO6ARM1YBxmGXu10Btl4+OKJo1yw9gMrX3oLQ7UAcOl+MCO4XVHQxv724ElPnXKDN2w1\
    WZOfGPORwsoW2o1U/MHi/2KWgUbRGHd5fEqV9iIuwK9APbRLc+AFFJdlVg28Wtap3lD+0zbmzfVCu41byWqvkBlLC+OX2Xih6QKBgQD66DeS\
    rC4o7JeRE4GJ2pZqjfJHQNIe0Em3+E06W+t6fh3NGga760HBRCOzQFmbGGh59mz+g2YsvB6azsAKWoIZtdsk5K1cVRjE7I+5mJykED90uBzG\
    LoGBkdQyHsliThznOiIT+SVbWqYl4h4yDa8TTOiPzbRXo3pD8UMIBt7EdQKBgQDptpq3XVrOgGvevxwVs52FczrjwLMHDc0oIRhNaJU7PTAf\
    YRDU4RnieaFUC0ZjGLlfVxlCBuZnIG91mkNEIvWgD5mgaQlIce4EQv1rz7YF2ox9qKWI8EPe/8AvyytETa48mI8hadYr119ueWuNQmRRFGwK\
    Er5AySOgmfYfseS4SQKBgDwtEZcF4JREGh3bVcggOs8XeDIKo9psDiInVS5X+WQJd1BHm7HaPI0DsKQ/HL6L3hLSPVXVYd38yEJMr9ZL2sQb\
    z5FLnyBz8FraeaYDqh3XH8D4nz4QzVKsDP5wT9BZ96ilUqMDsCf2175iOue6THEOkwBaT5RtStect3znWOo5AoGBAJqc7yW3YMeUNciabZ39\
    wYvze1YIuWdFPh/6JPWw5mjWReu8b0Il2NX22T+cZehRBvGH0XHY1rwKvTHz5+Q/rHdDWsLAOh/vHyM6niSguS6OMrs+wqQhLwVr9Fyp7+mz\
    6jy0QJw+RC2kwcF4GirNbUgmVoMjezGo3yT0Ndsp+MHhAoGAInqBapVtWYldD+WfUc30aixDNmBMstIvASIpuCMSE/4XyQ1YlGtnMQFgM7Dt\
    ReGEH4PiBzL+jagPmlOosu9w8KoZf8LkXq2XUCNwSNjiecZwic5JCKIPJMof5L7SXvOSFu7nFpL3Q0ex+SBOfVEjeyE7ymZdxVOuEhBXiq5/\
    SLA=";

/// A key of an issuer.
struct SigningKey {
    id: &'static str,
    pair: Pair,
}

enum Pair {
    P256(EcdsaKeyPair),
    P384(EcdsaKeyPair),
    Ed25519(Ed25519KeyPair),
    Rsa(RsaKeyPair),
}

impl SigningKey {
    fn p256(id: &'static str) -> Self {
        Self { id, pair: Pair::P256(ecdsa(&ECDSA_P256_SHA256_FIXED_SIGNING)) }
    }

    fn p384(id: &'static str) -> Self {
        Self { id, pair: Pair::P384(ecdsa(&ECDSA_P384_SHA384_FIXED_SIGNING)) }
    }

    fn ed25519(id: &'static str) -> Self {
        let document = Ed25519KeyPair::generate_pkcs8(&SystemRandom::new()).unwrap();
        Self { id, pair: Pair::Ed25519(Ed25519KeyPair::from_pkcs8(document.as_ref()).unwrap()) }
    }

    fn rsa(id: &'static str) -> Self {
        Self { id, pair: Pair::Rsa(RsaKeyPair::from_pkcs8(&STANDARD.decode(TEST_RSA_KEY).unwrap()).unwrap()) }
    }

    /// What the issuer publishes of it.
    fn jwk(&self) -> Value {
        let point = |curve: &str, point: &[u8]| {
            let (x, y) = point[1..].split_at(point.len() / 2);
            json!({ "kty": "EC", "crv": curve, "kid": self.id, "x": encoded(x), "y": encoded(y) })
        };
        match &self.pair {
            Pair::P256(pair) => point("P-256", pair.public_key().as_ref()),
            Pair::P384(pair) => point("P-384", pair.public_key().as_ref()),
            Pair::Ed25519(pair) => {
                json!({ "kty": "OKP", "crv": "Ed25519", "kid": self.id, "x": encoded(pair.public_key().as_ref()) })
            }
            Pair::Rsa(pair) => {
                let RsaPublicKeyComponents { n, e } = RsaPublicKeyComponents::<Vec<u8>>::from(pair.public());
                json!({ "kty": "RSA", "kid": self.id, "n": encoded(&n), "e": encoded(&e) })
            }
        }
    }

    /// A token of these claims, which names the key.
    fn token(&self, algorithm: &str, claims: &Value) -> String {
        self.signed(&json!({ "typ": "JWT", "alg": algorithm, "kid": self.id }), claims)
    }

    fn signed(&self, header: &Value, claims: &Value) -> String {
        let message = message(header, claims);
        let signature = self.signature(header["alg"].as_str().unwrap(), message.as_bytes());
        format!("{message}.{}", encoded(&signature))
    }

    fn signature(&self, algorithm: &str, message: &[u8]) -> Vec<u8> {
        let random = SystemRandom::new();
        match &self.pair {
            Pair::P256(pair) | Pair::P384(pair) => pair.sign(&random, message).unwrap().as_ref().to_vec(),
            Pair::Ed25519(pair) => pair.sign(message).as_ref().to_vec(),
            Pair::Rsa(pair) => {
                let padding: &'static dyn RsaEncoding =
                    if algorithm == "PS256" { &RSA_PSS_SHA256 } else { &RSA_PKCS1_SHA256 };
                let mut signature = vec![0; pair.public().modulus_len()];
                pair.sign(padding, &random, message, &mut signature).unwrap();
                signature
            }
        }
    }
}

fn ecdsa(algorithm: &'static EcdsaSigningAlgorithm) -> EcdsaKeyPair {
    let random = SystemRandom::new();
    let document = EcdsaKeyPair::generate_pkcs8(algorithm, &random).unwrap();
    EcdsaKeyPair::from_pkcs8(algorithm, document.as_ref(), &random).unwrap()
}

fn encoded(bytes: &[u8]) -> String {
    URL_SAFE_NO_PAD.encode(bytes)
}

/// What of a token is signed.
fn message(header: &Value, claims: &Value) -> String {
    format!("{}.{}", encoded(header.to_string().as_bytes()), encoded(claims.to_string().as_bytes()))
}

fn set(keys: &[&SigningKey]) -> String {
    json!({ "keys": keys.iter().map(|key| key.jwk()).collect::<Vec<_>>() }).to_string()
}

/// The claims of billing's token that is good for ten minutes.
fn claims() -> Value {
    json!({ "iss": ISSUER, "aud": AUDIENCE, "sub": "billing", "exp": get_current_timestamp() + 600 })
}

/// The same but for one claim; null leaves it out.
fn claims_but(name: &str, value: Value) -> Value {
    let mut claims = claims();
    claims[name] = value;
    if claims[name].is_null() {
        claims.as_object_mut().unwrap().remove(name);
    }
    claims
}

/// As many different tokens as wanted.
fn numbered_claims(number: usize) -> Value {
    claims_but("jti", json!(number))
}

fn believing(keys: KeySource) -> JwtOptions {
    let algorithms = ["RS256", "PS256", "ES256", "ES384", "EdDSA"].map(|word| Algorithm::parse(word).unwrap()).to_vec();
    JwtOptions { algorithms, ..JwtOptions::new(ISSUER.into(), AUDIENCE.into(), keys) }
}

fn authenticator(jwt: JwtOptions) -> Authenticator {
    Authenticator::new(Authentication { jwt: Some(jwt), ..Authentication::default() })
}

/// Who shows that token.
async fn caller(authenticator: &Authenticator, token: &str) -> Result<Principal, Unauthenticated> {
    let header = format!("Bearer {token}");
    authenticator.authenticate(None, Some(header.as_bytes())).await
}

fn billing() -> Principal {
    Principal::new("billing")
}

/// The issuer's keys in a file.
struct KeyFile(TempDir);

impl KeyFile {
    fn holding(document: &str) -> Self {
        let file = Self(tempfile::tempdir().unwrap());
        file.write(document);
        file
    }

    fn path(&self) -> PathBuf {
        self.0.path().join("keys.json")
    }

    /// Puts it in its place as a whole.
    fn write(&self, document: &str) {
        let next = self.0.path().join("next.json");
        std::fs::write(&next, document).unwrap();
        std::fs::rename(next, self.path()).unwrap();
    }

    fn source(&self) -> KeySource {
        KeySource::File(self.path())
    }
}

/// What the issuer answers when it is asked for its keys.
#[derive(Clone)]
enum Answer {
    Document(String),
    Redirect,
    /// It closes the connection.
    Nothing,
}

/// An issuer that publishes its keys over HTTP on loopback.
struct Issuer {
    address: SocketAddr,
    answer: Arc<Mutex<Answer>>,
    requests: Arc<AtomicUsize>,
    _task: AbortOnDropHandle<()>,
}

impl Issuer {
    async fn publishing(document: String) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let answer = Arc::new(Mutex::new(Answer::Document(document)));
        let requests = Arc::<AtomicUsize>::default();
        let task = tokio::spawn(publish(listener, answer.clone(), requests.clone()));
        Self { address, answer, requests, _task: AbortOnDropHandle::new(task) }
    }

    fn answer(&self, answer: Answer) {
        *self.answer.lock().unwrap() = answer;
    }

    fn requests(&self) -> usize {
        self.requests.load(Ordering::SeqCst)
    }

    /// Lets so much time pass, and the refresh that is due then.
    async fn refreshed_after(&self, time: Duration) {
        let requests = self.requests();
        advance(time).await;
        while self.requests() == requests {
            sleep(Duration::from_millis(1)).await;
        }
        // The clock goes on when no blocking task is left, and all have done what they could.
        sleep(Duration::from_millis(1)).await;
    }

    fn source(&self) -> KeySource {
        let url = KeyUrl::parse(&format!("http://{}/keys", self.address)).unwrap();
        KeySource::Url { url, authority: None }
    }

    fn authenticator(&self) -> Authenticator {
        authenticator(believing(self.source()))
    }
}

async fn publish(listener: TcpListener, answer: Arc<Mutex<Answer>>, requests: Arc<AtomicUsize>) {
    loop {
        let (mut stream, _) = listener.accept().await.unwrap();
        read_request(&mut stream).await;
        requests.fetch_add(1, Ordering::SeqCst);
        let answer = answer.lock().unwrap().clone();
        let response = match answer {
            Answer::Document(document) => response(&document),
            Answer::Redirect => "HTTP/1.1 302 Found\r\nLocation: /other\r\nContent-Length: 0\r\n\r\n".to_owned(),
            Answer::Nothing => continue,
        };
        // An asker that has read enough closes.
        let _ = stream.write_all(response.as_bytes()).await;
        let _ = stream.shutdown().await;
    }
}

async fn read_request(stream: &mut TcpStream) {
    let mut request = Vec::new();
    while !request.ends_with(b"\r\n\r\n") && stream.read_buf(&mut request).await.unwrap_or(0) > 0 {}
}

fn response(document: &str) -> String {
    format!("HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: {}\r\n\r\n{document}", document.len())
}

#[tokio::test]
async fn who_shows_nothing_is_nobody_unless_everybody_is_let_in() {
    let closed = Authenticator::new(Authentication::default());
    assert_eq!(closed.authenticate(None, None).await, Err(Unauthenticated::Missing));
    let open = Authenticator::new(Authentication { anonymous: true, ..Authentication::default() });
    assert_eq!(open.authenticate(None, None).await.unwrap().name(), "anonymous");
    // Nothing is configured that it could be right by.
    assert_eq!(caller(&open, "token").await, Err(Unauthenticated::UnknownToken));
}

#[tokio::test]
async fn a_static_token_is_its_principals_and_so_is_the_one_that_replaces_it() {
    let digests = |tokens: &[&str]| tokens.iter().map(|token| TokenDigest::of(token)).collect::<Vec<_>>();
    let tokens = BTreeMap::from([
        ("billing".to_owned(), digests(&["old", "new"])),
        ("shipping".to_owned(), digests(&["x.y.z"])),
        ("anonymous".to_owned(), digests(&["nobody"])),
    ]);
    let authenticator = Authenticator::new(Authentication { tokens, ..Authentication::default() });
    assert_eq!(caller(&authenticator, "old").await, Ok(billing()));
    assert_eq!(caller(&authenticator, "new").await, Ok(billing()));
    // Without JWTs, one that is written like them is a token as any other.
    assert_eq!(caller(&authenticator, "x.y.z").await, Ok(Principal::new("shipping")));
    for wrong in ["older", "Old", "nobody", &"a".repeat(8 * 1024)] {
        assert_eq!(caller(&authenticator, wrong).await, Err(Unauthenticated::UnknownToken));
    }
}

/// A certificate with one name of each kind.
fn certificate() -> CertificateDer<'static> {
    let mut distinguished_name = DistinguishedName::new();
    distinguished_name.push(DnType::CommonName, "orders");
    let subject_alt_names = vec![
        SanType::DnsName("orders.shop".try_into().unwrap()),
        SanType::URI("spiffe://shop/orders".try_into().unwrap()),
    ];
    let mut params = CertificateParams::default();
    (params.distinguished_name, params.subject_alt_names) = (distinguished_name, subject_alt_names);
    params.self_signed(&rcgen::KeyPair::generate().unwrap()).unwrap().der().clone()
}

#[tokio::test]
async fn a_certificate_names_its_holder_when_certificates_count() {
    let certificate = certificate();
    for (name, expected) in [
        (CertificateName::Uri, "spiffe://shop/orders"),
        (CertificateName::Dns, "orders.shop"),
        (CertificateName::CommonName, "orders"),
    ] {
        let authenticator = Authenticator::new(Authentication { certificate: Some(name), ..Authentication::default() });
        assert_eq!(authenticator.authenticate(Some(&certificate), None).await.unwrap().name(), expected);
        assert_eq!(authenticator.authenticate(None, None).await, Err(Unauthenticated::Missing));
    }
    let others = Authenticator::new(Authentication::default());
    assert_eq!(others.authenticate(Some(&certificate), None).await, Err(Unauthenticated::Missing));
}

#[tokio::test]
async fn a_credential_that_is_shown_decides() {
    let authenticator = Authenticator::new(Authentication {
        anonymous: true,
        certificate: Some(CertificateName::Dns),
        tokens: BTreeMap::from([("billing".to_owned(), vec![TokenDigest::of("token")])]),
        jwt: None,
    });
    let named = certificate();
    let nameless = rcgen::generate_simple_self_signed(Vec::<String>::new()).unwrap().cert.der().clone();
    for (certificate, authorization, expected) in [
        (Some(&named), Some("Bearer token"), Ok(billing())),
        (Some(&named), Some("Bearer other"), Err(Unauthenticated::UnknownToken)),
        (Some(&named), Some("Basic token"), Err(Unauthenticated::Malformed)),
        (Some(&named), Some(""), Err(Unauthenticated::Malformed)),
        (Some(&named), None, Ok(Principal::new("orders.shop"))),
        (Some(&nameless), None, Err(Unauthenticated::UnnamedCertificate)),
        (None, None, Ok(Principal::anonymous())),
    ] {
        let caller = authenticator.authenticate(certificate, authorization.map(str::as_bytes)).await;
        assert_eq!(caller, expected, "{authorization:?}");
    }
}

#[tokio::test]
async fn a_token_that_is_drawn_lets_its_bearer_in_by_the_digest_printed_beside_it() {
    let printed = Command::new(env!("CARGO_BIN_EXE_session-broker")).arg("token").output().unwrap();
    assert!(printed.status.success());
    let lines = String::from_utf8(printed.stdout).unwrap();
    let [token, digest] = lines.lines().collect::<Vec<_>>()[..] else { panic!("{lines}") };
    let digest = TokenDigest::parse(digest).unwrap();
    let tokens = BTreeMap::from([("billing".to_owned(), vec![digest])]);
    let authenticator = Authenticator::new(Authentication { tokens, ..Authentication::default() });
    assert_eq!(caller(&authenticator, token).await, Ok(billing()));
    // What tells the two lines apart does not repeat them.
    assert!(!String::from_utf8(printed.stderr).unwrap().contains(token));
}

#[tokio::test]
async fn a_token_of_the_issuer_names_the_caller_whatever_it_is_signed_with() {
    let (p256, p384) = (SigningKey::p256("p256"), SigningKey::p384("p384"));
    let (ed25519, rsa) = (SigningKey::ed25519("ed25519"), SigningKey::rsa("rsa"));
    let file = KeyFile::holding(&set(&[&p256, &p384, &ed25519, &rsa]));
    let authenticator = authenticator(believing(file.source()));
    for (key, algorithm) in [(&p256, "ES256"), (&p384, "ES384"), (&ed25519, "EdDSA"), (&rsa, "RS256"), (&rsa, "PS256")]
    {
        let token = key.token(algorithm, &claims());
        // The second time it is remembered.
        for _ in 0..2 {
            assert_eq!(caller(&authenticator, &token).await, Ok(billing()), "{algorithm}");
        }
    }
}

#[tokio::test]
async fn claims_may_be_written_in_every_way_that_the_standard_allows() {
    let key = SigningKey::ed25519("a");
    let file = KeyFile::holding(&set(&[&key]));
    let authenticator = authenticator(believing(file.source()));
    let now = get_current_timestamp();
    for claims in [
        claims_but("aud", json!(["other", AUDIENCE])),
        claims_but("exp", json!(Duration::from_secs(now + 600).as_secs_f64() + 0.5)),
        claims_but("nbf", json!(now - 10)),
        // The clocks need not agree to the second.
        claims_but("nbf", json!(now + 10)),
        claims_but("exp", json!(now - 10)),
    ] {
        assert_eq!(caller(&authenticator, &key.token("EdDSA", &claims)).await, Ok(billing()), "{claims}");
    }
    // Of a single key a token need not say which it is.
    let without_id = key.signed(&json!({ "alg": "EdDSA" }), &claims());
    assert_eq!(caller(&authenticator, &without_id).await, Ok(billing()));
}

#[tokio::test]
async fn a_token_whose_claims_are_wrong_is_refused_for_what_is_wrong() {
    let key = SigningKey::ed25519("a");
    let file = KeyFile::holding(&set(&[&key]));
    let authenticator = authenticator(believing(file.source()));
    let now = get_current_timestamp();
    for (claims, expected) in [
        (claims_but("exp", json!(now - 60)), Unauthenticated::Expired),
        (claims_but("exp", json!(0)), Unauthenticated::Expired),
        (claims_but("nbf", json!(now + 300)), Unauthenticated::NotYetValid),
        (claims_but("aud", json!("other")), Unauthenticated::WrongAudience),
        (claims_but("aud", json!(["other"])), Unauthenticated::WrongAudience),
        (claims_but("aud", json!([])), Unauthenticated::WrongAudience),
        (claims_but("iss", json!("https://other.example")), Unauthenticated::WrongIssuer),
        (claims_but("iss", json!([ISSUER])), Unauthenticated::WrongIssuer),
        (claims_but("exp", json!(null)), Unauthenticated::IncompleteClaims),
        (claims_but("exp", json!("soon")), Unauthenticated::IncompleteClaims),
        (claims_but("nbf", json!("now")), Unauthenticated::IncompleteClaims),
        (claims_but("aud", json!(null)), Unauthenticated::IncompleteClaims),
        (claims_but("iss", json!(null)), Unauthenticated::IncompleteClaims),
        (claims_but("sub", json!(null)), Unauthenticated::IncompleteClaims),
        (claims_but("sub", json!(7)), Unauthenticated::IncompleteClaims),
        (claims_but("sub", json!("")), Unauthenticated::IncompleteClaims),
        (claims_but("sub", json!("anonymous")), Unauthenticated::InvalidName),
        (claims_but("sub", json!("a\nb")), Unauthenticated::InvalidName),
        (claims_but("sub", json!("a".repeat(254))), Unauthenticated::InvalidName),
        (json!([]), Unauthenticated::Malformed),
    ] {
        assert_eq!(caller(&authenticator, &key.token("EdDSA", &claims)).await, Err(expected), "{claims}");
    }
}

#[tokio::test]
async fn another_claim_may_name_the_caller() {
    let key = SigningKey::ed25519("a");
    let file = KeyFile::holding(&set(&[&key]));
    let options = JwtOptions { principal_claim: "client_id".into(), ..believing(file.source()) };
    let authenticator = authenticator(options);
    for (name, expected) in [
        (json!("shipping"), Ok(Principal::new("shipping"))),
        (json!(["shipping"]), Err(Unauthenticated::IncompleteClaims)),
        (json!(null), Err(Unauthenticated::IncompleteClaims)),
    ] {
        let token = key.token("EdDSA", &claims_but("client_id", name));
        assert_eq!(caller(&authenticator, &token).await, expected);
    }
}

#[tokio::test]
async fn a_token_that_its_issuer_has_not_signed_so_is_refused() {
    let (p256, rsa, stranger) = (SigningKey::p256("p256"), SigningKey::rsa("rsa"), SigningKey::p256("p256"));
    let file = KeyFile::holding(&set(&[&p256, &rsa]));
    let authenticator = authenticator(believing(file.source()));
    let header = |algorithm: &str, id: &str| json!({ "alg": algorithm, "kid": id });
    let good = p256.token("ES256", &claims());
    let (signed, signature) = good.rsplit_once('.').unwrap();
    let (good_header, _) = signed.split_once('.').unwrap();
    let tampered = encoded(claims_but("sub", json!("shipping")).to_string().as_bytes());
    let unsigned = message(&header("none", "p256"), &claims());
    let critical = json!({ "alg": "ES256", "kid": "p256", "crit": ["b64"], "b64": false });
    // The public key as everybody may read it, taken for a shared secret.
    let with_secret = message(&header("HS256", "rsa"), &claims());
    let secret = hmac::Key::new(hmac::HMAC_SHA256, rsa.jwk()["n"].as_str().unwrap().as_bytes());
    let secret_signature = encoded(hmac::sign(&secret, with_secret.as_bytes()).as_ref());
    for (token, expected) in [
        (format!("{unsigned}."), Unauthenticated::WrongAlgorithm),
        (format!("{unsigned}.{signature}"), Unauthenticated::WrongAlgorithm),
        (format!("{with_secret}.{secret_signature}"), Unauthenticated::WrongAlgorithm),
        // Known, but not among the configured ones.
        (rsa.token("RS512", &claims()), Unauthenticated::WrongAlgorithm),
        (p256.signed(&header("ES256", "rsa"), &claims()), Unauthenticated::WrongAlgorithm),
        (rsa.signed(&header("RS256", "p256"), &claims()), Unauthenticated::WrongAlgorithm),
        (p256.signed(&header("ES384", "p256"), &claims()), Unauthenticated::WrongAlgorithm),
        (stranger.token("ES256", &claims()), Unauthenticated::InvalidSignature),
        (format!("{good_header}.{tampered}.{signature}"), Unauthenticated::InvalidSignature),
        (format!("{signed}."), Unauthenticated::InvalidSignature),
        // Signed for the other padding.
        (swapped(&rsa.token("RS256", &claims()), &header("PS256", "rsa")), Unauthenticated::InvalidSignature),
        (p256.signed(&json!({ "alg": "ES256" }), &claims()), Unauthenticated::UnknownKey),
        (p256.signed(&header("ES256", "other"), &claims()), Unauthenticated::UnknownKey),
        (p256.signed(&json!({ "alg": "ES256", "kid": 7 }), &claims()), Unauthenticated::Malformed),
        (p256.signed(&critical, &claims()), Unauthenticated::Malformed),
        (format!("{signed}.{signature}="), Unauthenticated::Malformed),
        ("..".to_owned(), Unauthenticated::Malformed),
        ("e30.e30.e30".to_owned(), Unauthenticated::Malformed),
        (p256.token("ES256", &claims_but("jti", json!("a".repeat(16 * 1024)))), Unauthenticated::Malformed),
        ("not-a-jwt".to_owned(), Unauthenticated::UnknownToken),
    ] {
        assert_eq!(caller(&authenticator, &token).await, Err(expected), "{token}");
    }
    assert_eq!(caller(&authenticator, &good).await, Ok(billing()));
}

/// The token with another header, and the signature it had.
fn swapped(token: &str, header: &Value) -> String {
    let (_, rest) = token.split_once('.').unwrap();
    format!("{}.{rest}", encoded(header.to_string().as_bytes()))
}

#[tokio::test]
async fn a_key_that_says_what_it_is_for_is_used_for_nothing_else() {
    let (signing, encrypting) = (SigningKey::rsa("signing"), SigningKey::ed25519("encrypting"));
    let mut keys = [signing.jwk(), encrypting.jwk()];
    keys[0]["alg"] = json!("PS256");
    keys[1]["use"] = json!("enc");
    let file = KeyFile::holding(&json!({ "keys": keys }).to_string());
    let authenticator = authenticator(believing(file.source()));
    assert_eq!(caller(&authenticator, &signing.token("PS256", &claims())).await, Ok(billing()));
    let other = signing.token("RS256", &claims());
    assert_eq!(caller(&authenticator, &other).await, Err(Unauthenticated::WrongAlgorithm));
    let encrypting = encrypting.token("EdDSA", &claims());
    assert_eq!(caller(&authenticator, &encrypting).await, Err(Unauthenticated::UnknownKey));
}

#[tokio::test]
async fn no_error_repeats_what_was_shown() {
    let authenticator = Authenticator::new(Authentication::default());
    for shown in ["Bearer hush", "Basic hush", "hush", "Bearer hush.hush.hush"] {
        let error = authenticator.authenticate(None, Some(shown.as_bytes())).await.unwrap_err();
        assert!(!format!("{error} {error:?}").contains("hush"));
    }
}

/// Waits until no look at the keys is under way: one that began before a change may end after it. While a blocking task
/// runs, a paused clock does not go on by itself.
async fn settled() {
    sleep(Duration::from_millis(1)).await;
}

#[tokio::test(start_paused = true)]
async fn keys_in_a_file_are_exchanged_without_a_restart() {
    let (old, new) = (SigningKey::ed25519("old"), SigningKey::ed25519("the-new-one"));
    let file = KeyFile::holding(&set(&[&old]));
    let authenticator = authenticator(believing(file.source()));
    let (before, after) = (old.token("EdDSA", &claims()), new.token("EdDSA", &claims()));
    assert_eq!(caller(&authenticator, &before).await, Ok(billing()));
    assert_eq!(caller(&authenticator, &after).await, Err(Unauthenticated::UnknownKey));
    settled().await;
    file.write(&set(&[&new]));
    advance(PAUSE).await;
    assert_eq!(caller(&authenticator, &after).await, Ok(billing()));
    // It was verified and remembered, with a key that is no more.
    assert_eq!(caller(&authenticator, &before).await, Err(Unauthenticated::UnknownKey));
    // What cannot be used leaves the keys as they are, and so does nothing at all.
    for broken in ["", "{\"keys\":[]}", "{}"] {
        settled().await;
        file.write(broken);
        advance(PAUSE).await;
        assert_eq!(caller(&authenticator, &after).await, Ok(billing()));
    }
    settled().await;
    std::fs::remove_file(file.path()).unwrap();
    advance(PAUSE).await;
    assert_eq!(caller(&authenticator, &after).await, Ok(billing()));
    settled().await;
    file.write(&set(&[&old]));
    advance(PAUSE).await;
    assert_eq!(caller(&authenticator, &before).await, Ok(billing()));
}

#[tokio::test(start_paused = true)]
async fn without_keys_no_token_is_verified_and_the_caller_may_try_again() {
    let key = SigningKey::ed25519("a");
    let file = KeyFile::holding("{}");
    let authenticator = authenticator(believing(file.source()));
    let refused = caller(&authenticator, &key.token("EdDSA", &claims())).await.unwrap_err();
    assert_eq!(refused, Unauthenticated::KeysUnavailable);
    assert!(refused.is_temporary());
    // What no key could make right is refused for what it is.
    let unsigned = format!("{}.", message(&json!({ "alg": "none" }), &claims()));
    let refused = caller(&authenticator, &unsigned).await.unwrap_err();
    assert_eq!(refused, Unauthenticated::WrongAlgorithm);
    assert!(!refused.is_temporary());
    file.write(&set(&[&key]));
    advance(PAUSE).await;
    assert_eq!(caller(&authenticator, &key.token("EdDSA", &claims())).await, Ok(billing()));
}

#[tokio::test(start_paused = true)]
async fn an_unknown_key_has_the_issuer_asked_once() {
    let (old, new) = (SigningKey::ed25519("old"), SigningKey::ed25519("new"));
    let issuer = Issuer::publishing(set(&[&old])).await;
    let authenticator = issuer.authenticator();
    let before = old.token("EdDSA", &claims());
    assert_eq!((caller(&authenticator, &before).await, issuer.requests()), (Ok(billing()), 1));
    assert_eq!((caller(&authenticator, &before).await, issuer.requests()), (Ok(billing()), 1));
    issuer.answer(Answer::Document(set(&[&new])));
    let after = new.token("EdDSA", &claims());
    assert_eq!((caller(&authenticator, &after).await, issuer.requests()), (Ok(billing()), 2));
    // The old key is unknown by now, and the issuer was asked a moment ago.
    for _ in 0..3 {
        assert_eq!(caller(&authenticator, &before).await, Err(Unauthenticated::UnknownKey));
    }
    assert_eq!(issuer.requests(), 2);
    advance(PAUSE).await;
    assert_eq!(caller(&authenticator, &before).await, Err(Unauthenticated::UnknownKey));
    assert_eq!(issuer.requests(), 3);
}

#[tokio::test(start_paused = true)]
async fn callers_with_unknown_keys_wait_for_the_same_answer() {
    let (old, new) = (SigningKey::ed25519("old"), SigningKey::ed25519("new"));
    let issuer = Issuer::publishing(set(&[&old])).await;
    let authenticator = issuer.authenticator();
    assert_eq!(caller(&authenticator, &old.token("EdDSA", &claims())).await, Ok(billing()));
    issuer.answer(Answer::Document(set(&[&new])));
    let tokens: Vec<_> = (0..50).map(|number| new.token("EdDSA", &numbered_claims(number))).collect();
    let answers = join_all(tokens.iter().map(|token| caller(&authenticator, token))).await;
    assert_eq!(answers, vec![Ok(billing()); 50]);
    assert_eq!(issuer.requests(), 2);
}

#[tokio::test(start_paused = true)]
async fn callers_that_come_before_the_keys_wait_for_them() {
    let key = SigningKey::ed25519("a");
    let issuer = Issuer::publishing(set(&[&key])).await;
    let authenticator = issuer.authenticator();
    let tokens: Vec<_> = (0..50).map(|number| key.token("EdDSA", &numbered_claims(number))).collect();
    let answers = join_all(tokens.iter().map(|token| caller(&authenticator, token))).await;
    assert_eq!(answers, vec![Ok(billing()); 50]);
    assert_eq!(issuer.requests(), 1);
}

#[tokio::test(start_paused = true)]
async fn an_issuer_that_is_down_leaves_the_old_keys_in_use_for_a_day() {
    let key = SigningKey::ed25519("a");
    let issuer = Issuer::publishing(set(&[&key])).await;
    let authenticator = issuer.authenticator();
    let tokens: Vec<_> = (0..26).map(|number| key.token("EdDSA", &numbered_claims(number))).collect();
    assert_eq!(caller(&authenticator, &tokens[0]).await, Ok(billing()));
    issuer.answer(Answer::Nothing);
    // The first hour ends with the first refresh that fails.
    for token in &tokens[..24] {
        issuer.refreshed_after(Duration::from_hours(1)).await;
        assert_eq!(caller(&authenticator, token).await, Ok(billing()));
    }
    issuer.refreshed_after(Duration::from_hours(1)).await;
    for token in &tokens {
        assert_eq!(caller(&authenticator, token).await, Err(Unauthenticated::KeysUnavailable));
    }
    issuer.answer(Answer::Document(set(&[&key])));
    issuer.refreshed_after(PAUSE).await;
    assert_eq!(caller(&authenticator, &tokens[25]).await, Ok(billing()));
}

#[tokio::test(start_paused = true)]
async fn an_issuer_that_sends_elsewhere_is_not_followed() {
    let issuer = Issuer::publishing(String::new()).await;
    issuer.answer(Answer::Redirect);
    let authenticator = issuer.authenticator();
    let token = SigningKey::ed25519("a").token("EdDSA", &claims());
    assert_eq!(caller(&authenticator, &token).await, Err(Unauthenticated::KeysUnavailable));
    assert_eq!(issuer.requests(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_key_set_has_a_megabyte_and_no_more() {
    const BYTES_MAX: usize = 1024 * 1024;
    let key = SigningKey::ed25519("a");
    let document = set(&[&key]);
    let token = key.token("EdDSA", &claims());
    for (bytes, expected) in [(BYTES_MAX, Ok(billing())), (BYTES_MAX + 1, Err(Unauthenticated::KeysUnavailable))] {
        let padded = format!("{document}{}", " ".repeat(bytes - document.len()));
        let file = KeyFile::holding(&padded);
        assert_eq!(caller(&authenticator(believing(file.source())), &token).await, expected);
        let issuer = Issuer::publishing(padded).await;
        assert_eq!(caller(&issuer.authenticator(), &token).await, expected);
    }
}

/// An authority, and the address of an issuer whose host it vouches for.
fn issuer_over_tls(document: &str) -> (String, SocketAddr) {
    let mut params = CertificateParams::new(Vec::<String>::new()).unwrap();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let authority_key = rcgen::KeyPair::generate().unwrap();
    let authority = params.self_signed(&authority_key).unwrap().pem();
    let key = rcgen::KeyPair::generate().unwrap();
    let host = CertificateParams::new(vec!["127.0.0.1".to_owned()]).unwrap();
    let certificate = host.signed_by(&key, &Authority::new(params, authority_key)).unwrap();
    let private_key = PrivateKeyDer::try_from(key.serialize_der()).unwrap();
    let config = ServerConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![certificate.der().clone()], private_key)
        .unwrap();
    let (config, response) = (Arc::new(config), response(document));
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    // It ends with the process.
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = StreamOwned::new(ServerConnection::new(config.clone()).unwrap(), stream.unwrap());
            // An asker that does not believe us leaves at once.
            if stream.read(&mut [0; 4096]).is_ok_and(|read| read > 0) {
                let _ = stream.write_all(response.as_bytes());
                stream.conn.send_close_notify();
                let _ = stream.flush();
            }
        }
    });
    (authority, address)
}

#[tokio::test]
async fn keys_come_from_a_host_that_the_authority_vouches_for_and_from_no_other() {
    let key = SigningKey::ed25519("a");
    let (authority, address) = issuer_over_tls(&set(&[&key]));
    let (stranger, _) = issuer_over_tls("");
    let directory = tempfile::tempdir().unwrap();
    let token = key.token("EdDSA", &claims());
    for (name, authority, expected) in [
        ("authority.pem", Some(authority), Ok(billing())),
        ("stranger.pem", Some(stranger), Err(Unauthenticated::KeysUnavailable)),
        ("empty.pem", Some(String::new()), Err(Unauthenticated::KeysUnavailable)),
        ("absent.pem", None, Err(Unauthenticated::KeysUnavailable)),
    ] {
        let file = directory.path().join(name);
        if let Some(authority) = authority {
            std::fs::write(&file, authority).unwrap();
        }
        let url = KeyUrl::parse(&format!("https://{address}/keys")).unwrap();
        let source = KeySource::Url { url, authority: Some(file) };
        assert_eq!(caller(&authenticator(believing(source)), &token).await, expected, "{name}");
    }
}
