//! JSON Web Tokens: whom a token names that the issuer signed for us.
//!
//! It knows where the keys are kept, not how they come there. Invariants: a token's algorithm is held against the
//! configured ones before any key is looked at, and against its key after; a token that was verified once is held
//! against the clock and the present keys each time.

use std::num::NonZeroUsize;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use jsonwebtoken::errors::ErrorKind;
use jsonwebtoken::{DecodingKey, Validation};
use lru::LruCache;
use serde_json::{Map, Value};

use super::jwks::{KeySource, Keys};
use super::{Algorithm, Unauthenticated, named, sha256, signature};
use crate::broker::principal::Principal;

/// How far the issuer's clock and ours may be apart, in seconds. Machines that keep time differ by much less; a token
/// that was meant for five minutes lives a tenth longer at most.
const LEEWAY: u64 = 30;

/// How many verified tokens are remembered: as many callers with a token each, in some 2 MiB.
const VERIFIED_MAX: NonZeroUsize = NonZeroUsize::new(10_000).expect("it is not zero");

/// Which tokens are believed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct JwtOptions {
    /// The `iss` that a token must have.
    pub issuer: String,
    /// What a token's `aud` must be, or have among others.
    pub audience: String,
    /// Where the issuer publishes its keys.
    pub keys: KeySource,
    /// The algorithms that are accepted.
    pub algorithms: Vec<Algorithm>,
    /// The claim that names the principal.
    pub principal_claim: String,
    /// How often the keys are fetched anew. A key that the issuer takes back is believed for so long.
    pub refresh: Duration,
}

impl JwtOptions {
    /// One of each family, those that issuers use unless told otherwise.
    pub const ALGORITHMS: &[Algorithm] = &[Algorithm::Rs256, Algorithm::Es256, Algorithm::EdDsa];
    /// The claim that names the subject of a token.
    pub const PRINCIPAL_CLAIM: &str = "sub";
    /// As long as tokens themselves are commonly meant for.
    pub const REFRESH: Duration = Duration::from_mins(5);

    /// The tokens of `issuer` for `audience`, with the defaults.
    pub fn new(issuer: String, audience: String, keys: KeySource) -> Self {
        Self {
            issuer,
            audience,
            keys,
            algorithms: Self::ALGORITHMS.to_vec(),
            principal_claim: Self::PRINCIPAL_CLAIM.to_owned(),
            refresh: Self::REFRESH,
        }
    }
}

/// Whether a bearer token is written as a signed JWT is: three parts with dots between them.
pub(super) fn is_compact(token: &str) -> bool {
    token.bytes().filter(|byte| *byte == b'.').count() == 2
}

/// Verifies tokens.
pub(super) struct JwtVerifier {
    issuer: String,
    algorithms: Vec<Algorithm>,
    principal_claim: String,
    /// What is asked of each token. Its algorithms are filled in for each.
    validation: Validation,
    keys: Keys,
    verified: Mutex<Verified>,
}

/// What of a token's header counts. Where it says that its key is to be found is not believed.
struct Header {
    algorithm: Algorithm,
    key_id: Option<String>,
}

impl JwtVerifier {
    /// Call it on a tokio runtime.
    pub(super) fn new(options: JwtOptions) -> Self {
        let JwtOptions { issuer, audience, keys, algorithms, principal_claim, refresh } = options;
        signature::install();
        let mut validation = Validation { leeway: LEEWAY, validate_nbf: true, ..Validation::default() };
        validation.set_required_spec_claims(&["exp", "iss", "aud"]);
        validation.set_issuer(&[&issuer]);
        validation.set_audience(&[&audience]);
        Self {
            issuer,
            algorithms,
            principal_claim,
            validation,
            keys: Keys::new(keys, refresh),
            verified: Mutex::new(Verified { generation: 0, tokens: LruCache::new(VERIFIED_MAX) }),
        }
    }

    /// Whom the token names.
    ///
    /// # Cancel safety
    /// Dropping the future leaves nothing behind; a refresh of the keys goes on without it.
    pub(super) async fn principal(&self, token: &str) -> Result<Principal, Unauthenticated> {
        let Header { algorithm, key_id } = self.header(token)?;
        let digest = sha256(token.as_bytes());
        let mut keys = self.keys.current().await.ok_or(Unauthenticated::KeysUnavailable)?;
        let known = self.verified().get(&digest, keys.generation(), wall_clock());
        if let Some(known) = known {
            return known;
        }
        if let Some(id) = &key_id
            && !keys.has(id)
        {
            keys = self.keys.refreshed().await.ok_or(Unauthenticated::KeysUnavailable)?;
        }
        let key = keys.find(key_id.as_deref(), algorithm)?;
        let (principal, expires) = self.verify(token, key, algorithm)?;
        self.verified().put(digest, keys.generation(), principal.clone(), expires);
        Ok(principal)
    }

    fn header(&self, token: &str) -> Result<Header, Unauthenticated> {
        let (header, _) = token.split_once('.').ok_or(Unauthenticated::Malformed)?;
        let header = URL_SAFE_NO_PAD.decode(header).map_err(|_| Unauthenticated::Malformed)?;
        let header: Map<String, Value> = serde_json::from_slice(&header).map_err(|_| Unauthenticated::Malformed)?;
        // What a token calls critical must be understood, and none of it is.
        if header.contains_key("crit") {
            return Err(Unauthenticated::Malformed);
        }
        let algorithm = header.get("alg").and_then(Value::as_str).ok_or(Unauthenticated::Malformed)?;
        let algorithm = Algorithm::parse(algorithm).filter(|algorithm| self.algorithms.contains(algorithm));
        let key_id = match header.get("kid") {
            None => None,
            Some(Value::String(id)) => Some(id.clone()),
            Some(_) => return Err(Unauthenticated::Malformed),
        };
        Ok(Header { algorithm: algorithm.ok_or(Unauthenticated::WrongAlgorithm)?, key_id })
    }

    /// Whom the token names, and when it expires, in seconds since 1970.
    fn verify(
        &self,
        token: &str,
        key: &DecodingKey,
        algorithm: Algorithm,
    ) -> Result<(Principal, u64), Unauthenticated> {
        let validation = Validation { algorithms: vec![algorithm.jws()], ..self.validation.clone() };
        let decoded = jsonwebtoken::decode::<Map<String, Value>>(token, key, &validation);
        let claims = decoded.map_err(|error| refused(error.kind()))?.claims;
        // The library lets a list of issuers pass that has ours in it.
        if claims.get("iss").and_then(Value::as_str) != Some(self.issuer.as_str()) {
            return Err(Unauthenticated::WrongIssuer);
        }
        let expires = claims.get("exp").and_then(seconds).ok_or(Unauthenticated::IncompleteClaims)?;
        let name = claims.get(&self.principal_claim).and_then(Value::as_str);
        let name = name.filter(|name| !name.is_empty()).ok_or(Unauthenticated::IncompleteClaims)?;
        Ok((named(name).ok_or(Unauthenticated::InvalidName)?, expires))
    }

    fn verified(&self) -> MutexGuard<'_, Verified> {
        self.verified.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Why the library refuses a token. The signature is verified before the claims are read: who hears of a claim that is
/// wrong has a token of the issuer's.
fn refused(kind: &ErrorKind) -> Unauthenticated {
    match kind {
        ErrorKind::InvalidSignature => Unauthenticated::InvalidSignature,
        ErrorKind::ExpiredSignature => Unauthenticated::Expired,
        ErrorKind::ImmatureSignature => Unauthenticated::NotYetValid,
        ErrorKind::InvalidIssuer => Unauthenticated::WrongIssuer,
        ErrorKind::InvalidAudience => Unauthenticated::WrongAudience,
        ErrorKind::MissingRequiredClaim(_) | ErrorKind::InvalidClaimFormat(_) => Unauthenticated::IncompleteClaims,
        ErrorKind::InvalidAlgorithm | ErrorKind::UnsupportedAlgorithm => Unauthenticated::WrongAlgorithm,
        _ => Unauthenticated::Malformed,
    }
}

/// A time in a claim, which may have a fraction, in whole seconds.
fn seconds(claim: &Value) -> Option<u64> {
    let rounded = || Duration::try_from_secs_f64(claim.as_f64()?).ok();
    claim.as_u64().or_else(|| Some(rounded()?.as_secs()))
}

/// Seconds since 1970.
#[allow(clippy::disallowed_methods, reason = "a token expires by its issuer's clock, which is everybody's")]
fn wall_clock() -> u64 {
    // A clock before 1970 is wrong, and everything has expired by it.
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(u64::MAX, |since| since.as_secs())
}

/// The tokens that the present keys have verified, by their digests: whom each names, and when it expires.
struct Verified {
    /// Of the keys.
    generation: u64,
    tokens: LruCache<[u8; 32], (Principal, u64)>,
}

impl Verified {
    /// What is known of a token at `now`; `None` when the keys must say.
    fn get(&mut self, token: &[u8; 32], generation: u64, now: u64) -> Option<Result<Principal, Unauthenticated>> {
        if !self.is_of(generation) {
            return None;
        }
        let (principal, expires) = self.tokens.get(token)?;
        let expired = expires.saturating_add(LEEWAY) < now;
        Some(if expired { Err(Unauthenticated::Expired) } else { Ok(principal.clone()) })
    }

    fn put(&mut self, token: [u8; 32], generation: u64, principal: Principal, expires: u64) {
        if self.is_of(generation) {
            self.tokens.put(token, (principal, expires));
        }
    }

    /// Whether the tokens are those of that generation of keys. A newer one forgets all that older ones have verified.
    fn is_of(&mut self, generation: u64) -> bool {
        if generation > self.generation {
            self.generation = generation;
            self.tokens.clear();
        }
        generation == self.generation
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    const TOKEN: [u8; 32] = [7; 32];

    fn verified() -> Verified {
        let mut verified = Verified { generation: 0, tokens: LruCache::new(VERIFIED_MAX) };
        verified.put(TOKEN, 1, Principal::new("billing"), 1000);
        verified
    }

    #[test]
    fn a_token_that_was_verified_is_held_against_the_clock_each_time() {
        let mut verified = verified();
        assert_eq!(verified.get(&TOKEN, 1, 0), Some(Ok(Principal::new("billing"))));
        assert_eq!(verified.get(&TOKEN, 1, 1000 + LEEWAY), Some(Ok(Principal::new("billing"))));
        assert_eq!(verified.get(&TOKEN, 1, 1001 + LEEWAY), Some(Err(Unauthenticated::Expired)));
        assert_eq!(verified.get(&TOKEN, 1, u64::MAX), Some(Err(Unauthenticated::Expired)));
        assert_eq!(verified.get(&[8; 32], 1, 0), None);
    }

    #[test]
    fn new_keys_forget_what_older_ones_have_verified() {
        let mut verified = verified();
        assert_eq!(verified.get(&TOKEN, 2, 0), None);
        assert_eq!(verified.get(&TOKEN, 1, 0), None);
        // A call that began with the older keys ends after the newer ones have come.
        verified.put(TOKEN, 1, Principal::new("billing"), 1000);
        assert_eq!(verified.get(&TOKEN, 1, 0), None);
        assert_eq!(verified.get(&TOKEN, 2, 0), None);
    }

    #[test]
    fn times_are_numbers_that_are_not_negative() {
        for (claim, expected) in [
            (json!(1000), Some(1000)),
            (json!(1000.9), Some(1000)),
            (json!(u64::MAX), Some(u64::MAX)),
            (json!(-1), None),
            (json!(1e300), None),
            (json!("1000"), None),
            (json!(null), None),
        ] {
            assert_eq!(seconds(&claim), expected, "{claim}");
        }
    }

    #[test]
    fn three_parts_are_a_jwt() {
        for (token, expected) in [("a.b.c", true), ("..", true), ("a.b", false), ("a.b.c.d", false), ("abc", false)] {
            assert_eq!(is_compact(token), expected, "{token}");
        }
    }
}
