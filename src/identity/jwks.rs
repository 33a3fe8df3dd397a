//! The issuer's keys: read where it publishes them, kept fresh by one task, and exchanged as a whole.
//!
//! It knows no token. Invariants: a set that cannot be had or used leaves the old one in use, for a day; whoever has
//! the keys refreshed waits for the one refresh that is on its way; a key is good for algorithms of its own kind only.

use std::fs::File;
use std::io::{self, Read};
use std::net::IpAddr;
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use jsonwebtoken::DecodingKey;
use jsonwebtoken::jwk::{
    AlgorithmParameters, CommonParameters, EllipticCurve, EllipticCurveKeyParameters, Jwk, KeyAlgorithm, KeyOperations,
    OctetKeyPairParameters, PublicKeyUse, RSAKeyParameters,
};
use serde_json::Value;
use tokio::sync::{Notify, watch};
use tokio::task::spawn_blocking;
use tokio::time::{Instant, sleep_until};
use tokio_util::task::AbortOnDropHandle;
use tracing::{error, info, warn};
use ureq::http::Uri;
use ureq::tls::Certificate;

use super::{Algorithm, Unauthenticated, sha256};
use crate::https;

/// Within which the issuer must have answered, to the last byte. Who waits for its keys waits as long.
const FETCH_TIMEOUT: Duration = Duration::from_secs(5);

/// The longest key set. One with a hundred keys and their certificate chains is smaller.
const SET_BYTES_MAX: u64 = 1024 * 1024;

/// After which a refresh that failed is tried again.
const RETRY: Duration = Duration::from_secs(10);

/// How long the old keys stay in use while no refresh succeeds: an issuer that is down overnight stops nobody, and a
/// key that was taken back is not believed for good.
const KEPT: Duration = Duration::from_hours(24);

/// Where the issuer's keys are, a JSON Web Key Set.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum KeySource {
    /// In a file, which may be exchanged at any time.
    File(PathBuf),
    /// Behind a URL.
    Url {
        /// The URL.
        url: KeyUrl,
        /// A file of root certificates to verify its host with; `None`: the system's.
        authority: Option<PathBuf>,
    },
}

/// A URL that may be asked for keys: over TLS, or on this machine. It holds no secret.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeyUrl(String);

impl KeyUrl {
    /// The URL that reads `text`; `None` when it is none, is neither https nor http to a loopback host, or has a login.
    pub fn parse(text: &str) -> Option<Self> {
        let uri: Uri = text.parse().ok()?;
        let host = uri.host().filter(|host| !host.is_empty())?;
        let is_safe = match uri.scheme_str()? {
            "https" => true,
            "http" => is_loopback(host),
            _ => false,
        };
        let has_login = uri.authority().is_some_and(|authority| authority.as_str().contains('@'));
        (is_safe && !has_login).then(|| Self(text.to_owned()))
    }

    /// The URL as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Whether it is over TLS.
    pub fn is_encrypted(&self) -> bool {
        self.0.get(..6).is_some_and(|scheme| scheme.eq_ignore_ascii_case("https:"))
    }
}

fn is_loopback(host: &str) -> bool {
    let address = host.trim_matches(['[', ']']).parse::<IpAddr>();
    host.eq_ignore_ascii_case("localhost") || address.is_ok_and(|address| address.is_loopback())
}

/// When to look at the keys besides at the regular times.
#[derive(Debug, Clone, Copy)]
enum Cue {
    /// When a token comes. To look whether a file has changed costs little.
    Token,
    /// When a token comes whose key is unknown.
    UnknownKey,
}

impl Cue {
    fn of(source: &KeySource) -> Self {
        match source {
            KeySource::File(_) => Self::Token,
            KeySource::Url { .. } => Self::UnknownKey,
        }
    }

    /// How long after a look no other is taken. Anybody can make up unknown keys.
    fn pause(self) -> Duration {
        match self {
            Self::Token => Duration::from_secs(1),
            Self::UnknownKey => Duration::from_secs(10),
        }
    }
}

/// The keys, and the task that keeps them fresh.
pub(super) struct Keys {
    state: watch::Receiver<State>,
    cue: Cue,
    wanted: Arc<Notify>,
    _task: AbortOnDropHandle<()>,
}

#[derive(Debug, Default)]
struct State {
    /// `None` when they have never been had, or not for too long.
    keys: Option<Arc<KeySet>>,
    /// How many refreshes have ended.
    refreshes: u64,
    /// When the last one that was asked for has.
    asked: Option<Instant>,
}

impl State {
    /// Whether a refresh may be asked for.
    fn admits(&self, cue: Cue) -> bool {
        self.asked.is_none_or(|asked| asked.elapsed() >= cue.pause())
    }
}

impl Keys {
    /// Call it on a tokio runtime.
    pub(super) fn new(source: KeySource, period: Duration) -> Self {
        let (publish, state) = watch::channel(State::default());
        let wanted = Arc::<Notify>::default();
        let cue = Cue::of(&source);
        let keeper = Keeper {
            source,
            period,
            cue,
            wanted: wanted.clone(),
            publish,
            stamp: None,
            document: None,
            generation: 0,
            health: Health::Good,
        };
        Self { state, cue, wanted, _task: AbortOnDropHandle::new(tokio::spawn(keeper.keep())) }
    }

    /// The present keys. Waits for the first look at them.
    ///
    /// # Cancel safety
    /// Dropping the future leaves nothing behind.
    pub(super) async fn current(&self) -> Option<Arc<KeySet>> {
        self.ended_after(0).await;
        match self.cue {
            Cue::Token => self.refreshed().await,
            Cue::UnknownKey => self.state.borrow().keys.clone(),
        }
    }

    /// The keys after a refresh, unless there was one a moment ago.
    ///
    /// # Cancel safety
    /// Dropping the future leaves nothing behind; the refresh goes on.
    pub(super) async fn refreshed(&self) -> Option<Arc<KeySet>> {
        let refreshes = {
            let state = self.state.borrow();
            if !state.admits(self.cue) {
                return state.keys.clone();
            }
            state.refreshes
        };
        // Should the keeper find that it was asked a moment ago, another refresh has ended since, and that will do.
        self.wanted.notify_one();
        self.ended_after(refreshes).await;
        self.state.borrow().keys.clone()
    }

    /// Waits until more refreshes than these have ended.
    async fn ended_after(&self, refreshes: u64) {
        if self.state.borrow().refreshes > refreshes {
            return;
        }
        let mut state = self.state.clone();
        // An error says that the task is gone, and the runtime with it.
        let _ = state.wait_for(|state| state.refreshes > refreshes).await;
    }
}

/// How the refreshes go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Health {
    Good,
    /// They have failed since then, and the old keys are in use.
    Failing(Instant),
    /// They fail, and there are no keys.
    Without,
}

/// The task that keeps the keys fresh.
struct Keeper {
    source: KeySource,
    period: Duration,
    cue: Cue,
    wanted: Arc<Notify>,
    publish: watch::Sender<State>,
    /// Of the file that the present keys are from.
    stamp: Option<Stamp>,
    /// The digest of what the present keys were read from.
    document: Option<[u8; 32]>,
    generation: u64,
    health: Health,
}

impl Keeper {
    async fn keep(mut self) {
        let mut asked = false;
        loop {
            let pause = match self.refresh().await {
                Ok(()) => {
                    self.succeeded();
                    self.period
                }
                Err(cause) => {
                    self.failed(&cause);
                    self.period.min(RETRY)
                }
            };
            let now = Instant::now();
            self.publish.send_modify(|state| {
                state.refreshes += 1;
                if asked {
                    state.asked = Some(now);
                }
            });
            asked = self.due(now + pause).await;
        }
    }

    /// Waits until the next refresh is due, at the latest at `regular`. Whether it was asked for.
    async fn due(&self, regular: Instant) -> bool {
        loop {
            tokio::select! {
                () = sleep_until(regular) => return false,
                () = self.wanted.notified() => {
                    if self.publish.borrow().admits(self.cue) {
                        return true;
                    }
                }
            }
        }
    }

    async fn refresh(&mut self) -> Result<(), String> {
        let (source, stamp) = (self.source.clone(), self.stamp);
        let looked = spawn_blocking(move || source.look(stamp)).await;
        let Look::Read { stamp, document } = looked.map_err(|error| error.to_string())?? else { return Ok(()) };
        let digest = sha256(&document);
        if self.document != Some(digest) {
            let (keys, skipped) = KeySet::parse(&document, self.generation + 1)?;
            self.generation = keys.generation;
            info!(keys = keys.keys.len(), "signing keys loaded");
            for why in skipped {
                warn!("signing key skipped: {why}");
            }
            self.publish.send_modify(|state| state.keys = Some(Arc::new(keys)));
            self.document = Some(digest);
        }
        self.stamp = stamp;
        Ok(())
    }

    fn succeeded(&mut self) {
        if self.health != Health::Good {
            info!("signing keys are refreshed again");
        }
        self.health = Health::Good;
    }

    fn failed(&mut self, cause: &str) {
        let has_keys = self.publish.borrow().keys.is_some();
        self.health = match self.health {
            Health::Good if has_keys => {
                warn!("cannot refresh the signing keys, the old ones stay in use for a day: {cause}");
                Health::Failing(Instant::now())
            }
            Health::Good => {
                error!("cannot load the signing keys, no token of their issuer is believed: {cause}");
                Health::Without
            }
            Health::Failing(since) if since.elapsed() < KEPT => self.health,
            Health::Failing(_) => {
                error!("cannot refresh the signing keys for a day, no token of their issuer is believed: {cause}");
                self.publish.send_modify(|state| state.keys = None);
                (self.stamp, self.document) = (None, None);
                Health::Without
            }
            Health::Without => Health::Without,
        };
    }
}

/// What tells that a file is another than it was.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Stamp {
    modified: SystemTime,
    length: u64,
}

/// What a look at the keys' source has found.
enum Look {
    Unchanged,
    Read {
        /// Of a file.
        stamp: Option<Stamp>,
        document: Vec<u8>,
    },
}

impl KeySource {
    /// Looks whether there is another key set than the file of that stamp had. It blocks.
    fn look(&self, last: Option<Stamp>) -> Result<Look, String> {
        match self {
            Self::File(path) => read(path, last).map_err(|error| format!("{}: {error}", path.display())),
            Self::Url { url, authority } => {
                let document = fetch(url, authority.as_deref())?;
                Ok(Look::Read { stamp: None, document })
            }
        }
    }
}

fn read(path: &Path, last: Option<Stamp>) -> io::Result<Look> {
    let file = File::open(path)?;
    let metadata = file.metadata()?;
    let stamp = Stamp { modified: metadata.modified()?, length: metadata.len() };
    if last == Some(stamp) {
        return Ok(Look::Unchanged);
    }
    if stamp.length > SET_BYTES_MAX {
        return Err(io::Error::other(format!("is larger than {SET_BYTES_MAX} bytes")));
    }
    let mut document = Vec::new();
    file.take(SET_BYTES_MAX).read_to_end(&mut document)?;
    Ok(Look::Read { stamp: Some(stamp), document })
}

fn fetch(url: &KeyUrl, authority: Option<&Path>) -> Result<Vec<u8>, String> {
    // In plain text, on this machine, there is nobody to verify.
    let roots = if url.is_encrypted() { roots(authority)? } else { Vec::new() };
    // Whoever redirected us, or stood between us and the issuer, could give us keys of their own.
    let agent = https::agent(&roots, None, FETCH_TIMEOUT);
    let mut response = agent.get(url.as_str()).call().map_err(|error| error.to_string())?;
    let status = response.status().as_u16();
    if status != 200 {
        return Err(format!("the issuer answered with status {status} instead of 200"));
    }
    response.body_mut().with_config().limit(SET_BYTES_MAX).read_to_vec().map_err(|error| error.to_string())
}

/// The root certificates to verify the issuer's host with, read anew, so that they can be changed without a restart.
fn roots(authority: Option<&Path>) -> Result<Vec<Certificate<'static>>, String> {
    let roots = authority.map_or_else(|| Ok(https::system_roots()), https::certificates)?;
    if roots.is_empty() {
        return Err("there are no root certificates to verify the issuer's host with: name a file of them".into());
    }
    Ok(roots)
}

/// The issuer's keys at one time.
#[derive(Debug)]
pub(super) struct KeySet {
    /// Higher than that of any set before.
    generation: u64,
    /// At least one.
    keys: Vec<Key>,
}

#[derive(Debug)]
struct Key {
    id: Option<String>,
    /// Those that it may be used with; at least one.
    algorithms: Vec<Algorithm>,
    decoding: DecodingKey,
}

impl KeySet {
    pub(super) fn generation(&self) -> u64 {
        self.generation
    }

    /// Whether there is a key of that id.
    pub(super) fn has(&self, id: &str) -> bool {
        self.keys.iter().any(|key| key.id.as_deref() == Some(id))
    }

    /// The key of that id, or the only one, to verify a signature of that algorithm with.
    pub(super) fn find(&self, id: Option<&str>, algorithm: Algorithm) -> Result<&DecodingKey, Unauthenticated> {
        let named: Vec<&Key> = match (id, self.keys.as_slice()) {
            (Some(id), keys) => keys.iter().filter(|key| key.id.as_deref() == Some(id)).collect(),
            (None, [only]) => vec![only],
            (None, _) => Vec::new(),
        };
        if named.is_empty() {
            return Err(Unauthenticated::UnknownKey);
        }
        let fitting = named.into_iter().find(|key| key.algorithms.contains(&algorithm));
        fitting.map(|key| &key.decoding).ok_or(Unauthenticated::WrongAlgorithm)
    }

    /// The set that a document lists, and why keys of it are left out.
    fn parse(document: &[u8], generation: u64) -> Result<(Self, Vec<String>), String> {
        let document: Value =
            serde_json::from_slice(document).map_err(|error| format!("the set is no JSON: {error}"))?;
        let listed = document.get("keys").and_then(Value::as_array).ok_or("the set has no list named keys")?;
        let (mut keys, mut skipped) = (Vec::new(), Vec::new());
        for (index, listed) in listed.iter().enumerate() {
            match Key::parse(listed) {
                Ok(key) => keys.push(key),
                Err(why) => skipped.push(format!("keys[{index}] {why}")),
            }
        }
        if keys.is_empty() {
            return Err(format!("the set has no key that can be used: {}", skipped.join(", ")));
        }
        Ok((Self { generation, keys }, skipped))
    }
}

impl Key {
    fn parse(listed: &Value) -> Result<Self, &'static str> {
        let Ok(Jwk { common, algorithm }) = serde_json::from_value(listed.clone()) else { return Err("is no JWK") };
        let CommonParameters { public_key_use, key_operations, key_algorithm, key_id, .. } = common;
        let is_for_signatures = matches!(public_key_use, None | Some(PublicKeyUse::Signature));
        if !is_for_signatures || key_operations.is_some_and(|operations| !operations.contains(&KeyOperations::Verify)) {
            return Err("is not for signatures");
        }
        let (of_its_kind, key): (&[Algorithm], _) = match &algorithm {
            AlgorithmParameters::RSA(parameters) => (Algorithm::RSA, rsa_key(parameters)?),
            AlgorithmParameters::EllipticCurve(parameters) => match parameters.curve {
                EllipticCurve::P256 => (&[Algorithm::Es256], elliptic_curve_key(parameters, 32)?),
                EllipticCurve::P384 => (&[Algorithm::Es384], elliptic_curve_key(parameters, 48)?),
                _ => return Err("is on a curve other than P-256 and P-384"),
            },
            AlgorithmParameters::OctetKeyPair(parameters) => (&[Algorithm::EdDsa], ed25519_key(parameters)?),
            _ => return Err("is neither an RSA key nor one on P-256, P-384 or Ed25519"),
        };
        let fits = |algorithm: &Algorithm| key_algorithm.is_none_or(|own| own == KeyAlgorithm::from(algorithm.jws()));
        let algorithms: Vec<_> = of_its_kind.iter().copied().filter(fits).collect();
        if algorithms.is_empty() {
            return Err("has an alg that is unknown or not one of its kind");
        }
        Ok(Self { id: key_id, algorithms, decoding: key })
    }
}

fn rsa_key(parameters: &RSAKeyParameters) -> Result<DecodingKey, &'static str> {
    const BYTES: RangeInclusive<usize> = 2048 / 8..=8192 / 8;

    let RSAKeyParameters { key_type: _, n, e } = parameters;
    // Some issuers write a zero before the number, which ring does not take.
    let number = |text: &str| -> Result<Vec<u8>, &'static str> {
        let bytes = URL_SAFE_NO_PAD.decode(text).map_err(|_| "is not written in base64url")?;
        Ok(bytes.into_iter().skip_while(|byte| *byte == 0).collect())
    };
    let (n, e) = (number(n)?, number(e)?);
    let is_short = n.len() == *BYTES.start() && n[0] < 0x80;
    if is_short || !BYTES.contains(&n.len()) {
        return Err("is an RSA key of less than 2048 or more than 8192 bits");
    }
    Ok(DecodingKey::from_rsa_raw_components(&n, &e))
}

/// A point whose coordinates have so many bytes.
fn elliptic_curve_key(parameters: &EllipticCurveKeyParameters, size: usize) -> Result<DecodingKey, &'static str> {
    let EllipticCurveKeyParameters { key_type: _, curve: _, x, y } = parameters;
    let key = DecodingKey::from_ec_components(x, y).map_err(|_| "is not written in base64url")?;
    sized(key, 1 + 2 * size)
}

fn ed25519_key(parameters: &OctetKeyPairParameters) -> Result<DecodingKey, &'static str> {
    let OctetKeyPairParameters { key_type: _, curve, x } = parameters;
    if *curve != EllipticCurve::Ed25519 {
        return Err("is on a curve other than Ed25519");
    }
    let key = DecodingKey::from_ed_components(x).map_err(|_| "is not written in base64url")?;
    sized(key, 32)
}

fn sized(key: DecodingKey, size: usize) -> Result<DecodingKey, &'static str> {
    let is_sized = key.try_get_as_bytes().is_ok_and(|bytes| bytes.len() == size);
    if is_sized { Ok(key) } else { Err("has not as many bytes as its curve asks for") }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn encoded(bytes: &[u8]) -> String {
        URL_SAFE_NO_PAD.encode(bytes)
    }

    fn rsa(modulus: &[u8]) -> Value {
        json!({ "kty": "RSA", "n": encoded(modulus), "e": "AQAB" })
    }

    fn point(curve: &str, size: usize) -> Value {
        json!({ "kty": "EC", "crv": curve, "x": encoded(&vec![1; size]), "y": encoded(&vec![2; size]) })
    }

    fn edwards(curve: &str, size: usize) -> Value {
        json!({ "kty": "OKP", "crv": curve, "x": encoded(&vec![1; size]) })
    }

    fn with(mut key: Value, name: &str, value: Value) -> Value {
        key[name] = value;
        key
    }

    fn algorithms(key: &Value) -> Option<Vec<&'static str>> {
        Key::parse(key).ok().map(|key| key.algorithms.iter().map(|algorithm| algorithm.word()).collect())
    }

    #[test]
    fn a_key_is_good_for_the_algorithms_of_its_own_kind() {
        let all_of_rsa = vec!["RS256", "RS384", "RS512", "PS256", "PS384", "PS512"];
        for (key, expected) in [
            (rsa(&[0xff; 256]), all_of_rsa.clone()),
            (rsa(&[[0_u8].as_slice(), &[0xff; 256]].concat()), all_of_rsa.clone()),
            (rsa(&[0xff; 1024]), all_of_rsa),
            (with(rsa(&[0xff; 256]), "alg", json!("PS384")), vec!["PS384"]),
            (point("P-256", 32), vec!["ES256"]),
            (point("P-384", 48), vec!["ES384"]),
            (edwards("Ed25519", 32), vec!["EdDSA"]),
            (with(edwards("Ed25519", 32), "use", json!("sig")), vec!["EdDSA"]),
            (with(edwards("Ed25519", 32), "key_ops", json!(["verify"])), vec!["EdDSA"]),
        ] {
            assert_eq!(algorithms(&key), Some(expected), "{key}");
        }
    }

    #[test]
    fn a_key_that_cannot_be_used_is_skipped() {
        let good = || edwards("Ed25519", 32);
        let mut short = [0xff; 256];
        short[0] = 0x7f;
        let unusable = [
            json!(null),
            json!({}),
            json!({ "kty": "oct", "k": encoded(b"secret") }),
            json!({ "kty": "RSA", "n": encoded(&[0xff; 256]) }),
            json!({ "kty": "RSA", "n": "not base64url!", "e": "AQAB" }),
            rsa(&[0xff; 128]),
            rsa(&[0xff; 255]),
            rsa(&short),
            rsa(&[0xff; 1025]),
            rsa(&[0; 256]),
            point("P-256", 31),
            point("P-256", 48),
            point("P-521", 66),
            point("secp256k1", 32),
            edwards("Ed25519", 31),
            edwards("Ed448", 57),
            with(good(), "use", json!("enc")),
            with(good(), "key_ops", json!(["encrypt"])),
            with(good(), "alg", json!("ES256")),
            with(good(), "alg", json!("HS256")),
            with(good(), "alg", json!("ES512")),
            with(good(), "kid", json!(7)),
        ];
        for key in &unusable {
            assert_eq!(algorithms(key), None, "{key}");
        }
        let mut listed = unusable.to_vec();
        listed.push(good());
        let (set, skipped) = KeySet::parse(json!({ "keys": listed }).to_string().as_bytes(), 1).unwrap();
        assert_eq!((set.keys.len(), skipped.len()), (1, unusable.len()));
    }

    #[test]
    fn a_set_without_a_usable_key_is_none() {
        let secret = json!({ "keys": [{ "kty": "oct", "k": "aHVzaA" }] }).to_string();
        for document in ["", "[]", "{}", "{\"keys\":{}}", "{\"keys\":[]}", &secret] {
            let error = KeySet::parse(document.as_bytes(), 1).unwrap_err();
            assert!(!error.contains("aHVzaA"), "{error}");
        }
    }

    #[test]
    fn a_key_is_found_by_its_id_or_as_the_only_one() {
        let set = |keys: Value| KeySet::parse(json!({ "keys": keys }).to_string().as_bytes(), 1).unwrap().0;
        let (ed, es) = (edwards("Ed25519", 32), point("P-256", 32));
        let only = set(json!([ed]));
        assert!(only.find(None, Algorithm::EdDsa).is_ok());
        assert_eq!(only.find(None, Algorithm::Es256).unwrap_err(), Unauthenticated::WrongAlgorithm);
        assert_eq!(only.find(Some("a"), Algorithm::EdDsa).unwrap_err(), Unauthenticated::UnknownKey);
        let both = set(json!([with(ed.clone(), "kid", json!("a")), with(es, "kid", json!("a")), ed]));
        assert!(both.find(Some("a"), Algorithm::EdDsa).is_ok() && both.find(Some("a"), Algorithm::Es256).is_ok());
        assert_eq!(both.find(Some("a"), Algorithm::Rs256).unwrap_err(), Unauthenticated::WrongAlgorithm);
        assert_eq!(both.find(Some("b"), Algorithm::EdDsa).unwrap_err(), Unauthenticated::UnknownKey);
        assert_eq!(both.find(None, Algorithm::EdDsa).unwrap_err(), Unauthenticated::UnknownKey);
        assert!(both.has("a") && !both.has("b"));
    }

    #[test]
    fn keys_are_asked_for_over_tls_or_on_this_machine() {
        for url in [
            "https://issuer.example/keys",
            "https://issuer.example:8443/keys?tenant=a",
            "http://127.0.0.1:8080/keys",
            "http://127.1.2.3/keys",
            "http://[::1]:8080/keys",
            "http://localhost/keys",
        ] {
            assert_eq!(KeyUrl::parse(url).map(|url| url.as_str().to_owned()).as_deref(), Some(url));
        }
        for url in [
            "",
            "/keys",
            "issuer.example",
            "http://issuer.example/keys",
            "http://localhost.example/keys",
            "http://10.0.0.1/keys",
            "https:///keys",
            "https://user:hush@issuer.example/keys",
            "ftp://issuer.example/keys",
            "file:///keys",
        ] {
            assert_eq!(KeyUrl::parse(url), None, "{url:?}");
        }
    }
}
