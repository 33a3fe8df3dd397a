//! Who calls: what a caller shows, a verified client certificate or an `Authorization` header, becomes a principal.
//!
//! It knows no RPCs and no database, and nothing of what a principal may do. Invariants: a credential that is shown
//! decides, so that a wrong one is refused whatever else would do; nobody who proves to be somebody is called what the
//! anonymous principal is; no token and no claim is shown by an error or a log.

mod certificate;
mod token;

mod jwks;
mod jwt;
mod signature;

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, PoisonError, RwLock};

use http::header::AUTHORIZATION;
use http::{HeaderMap, HeaderValue};
use ring::digest;
use rustls::pki_types::CertificateDer;

pub use certificate::CertificateName;
pub use jwks::{KeySource, KeyUrl};
pub use jwt::JwtOptions;
pub use signature::Algorithm;
pub use token::{TokenDigest, draw_token};

use crate::broker::principal::Principal;
use jwt::JwtVerifier;
use token::StaticTokens;

/// The longest token. Larger headers are refused by most of what stands before a broker, and a JWT that lists a hundred
/// groups of its bearer has half of it.
const TOKEN_BYTES_MAX: usize = 8 * 1024;

/// By what callers prove who they are; several at once.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Authentication {
    /// Whether those who show nothing are let in, as the anonymous principal.
    pub anonymous: bool,
    /// Which part of a client certificate names the principal; `None`: certificates name nobody.
    pub certificate: Option<CertificateName>,
    /// The static bearer tokens of each principal; several while one is replaced by another.
    pub tokens: BTreeMap<String, Vec<TokenDigest>>,
    /// The JSON Web Tokens that are believed.
    pub jwt: Option<JwtOptions>,
}

impl Authentication {
    /// Whether there is a way to prove who one is.
    pub fn names_anybody(&self) -> bool {
        let Self { anonymous: _, certificate, tokens, jwt } = self;
        certificate.is_some() || !tokens.is_empty() || jwt.is_some()
    }
}

/// Why a caller is nobody. All but one are for the caller to mend.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Unauthenticated {
    /// Nothing was shown, and the anonymous principal is not let in.
    #[error("credentials are missing: send authorization: Bearer TOKEN, or connect with a client certificate")]
    Missing,
    /// There are several headers, of which any may be meant.
    #[error("there is more than one authorization header: send one")]
    Repeated,
    /// The header is no bearer credential, or what it holds is no token.
    #[error("credentials are malformed: send authorization: Bearer TOKEN, with a token of at most 8 KiB")]
    Malformed,
    /// No principal has this static token.
    #[error("token is unknown: send one that this broker's configuration lists the digest of")]
    UnknownToken,
    /// The JWT's time is over.
    #[error("token has expired: get a new one from its issuer")]
    Expired,
    /// The JWT's time is still to come.
    #[error("token is not valid yet: try again later, or set the clocks right")]
    NotYetValid,
    /// The JWT is not from the issuer that is believed.
    #[error("token is from another issuer: get one from the issuer that this broker believes")]
    WrongIssuer,
    /// The JWT is for somebody else.
    #[error("token is for another audience: ask its issuer for one whose aud is this broker's")]
    WrongAudience,
    /// The JWT's `alg` is not among the accepted ones, or not one for its key.
    #[error("token's alg is not accepted: have it signed with one that this broker is configured to accept")]
    WrongAlgorithm,
    /// The JWT was not signed with the key that it names, or was changed since.
    #[error("token's signature is invalid: get a new one from its issuer")]
    InvalidSignature,
    /// The JWT's `kid` names no key of the issuer, or is missing although there are several.
    #[error("token's key is unknown: have its kid name a key that its issuer publishes")]
    UnknownKey,
    /// The JWT says too little.
    #[error("token lacks a claim or has it in another type: it needs iss, aud, exp and the one that names the caller")]
    IncompleteClaims,
    /// What names the caller is a name that nobody may have.
    #[error("token names nobody: a caller's name has 1 to 253 bytes, no control characters, and is not \"anonymous\"")]
    InvalidName,
    /// The certificate has no such name as is asked for, several of them, or one that nobody may have.
    #[error("client certificate names nobody: it needs exactly one name of the kind that this broker reads")]
    UnnamedCertificate,
    /// The issuer's keys are not to be had. It is not the caller's fault, and may be over soon.
    #[error("token cannot be verified now, for want of its issuer's keys: try again in a moment")]
    KeysUnavailable,
}

impl Unauthenticated {
    /// Whether the same credentials may do a little later, without anything that the caller could mend.
    pub fn is_temporary(self) -> bool {
        match self {
            Self::KeysUnavailable => true,
            Self::Missing
            | Self::Repeated
            | Self::Malformed
            | Self::UnknownToken
            | Self::Expired
            | Self::NotYetValid
            | Self::WrongIssuer
            | Self::WrongAudience
            | Self::WrongAlgorithm
            | Self::InvalidSignature
            | Self::UnknownKey
            | Self::IncompleteClaims
            | Self::InvalidName
            | Self::UnnamedCertificate => false,
        }
    }
}

/// Tells who calls.
pub struct Authenticator {
    anonymous: bool,
    certificate: Option<CertificateName>,
    tokens: StaticTokens,
    jwt: Option<(JwtOptions, Arc<JwtVerifier>)>,
}

/// The authenticator in effect, which can be exchanged while calls come.
#[derive(Debug, Clone)]
pub struct CurrentAuthenticator(Arc<RwLock<Arc<Authenticator>>>);

impl CurrentAuthenticator {
    /// That one, until another is set.
    pub fn new(authenticator: Authenticator) -> Self {
        Self(Arc::new(RwLock::new(Arc::new(authenticator))))
    }

    /// The one in effect.
    pub fn get(&self) -> Arc<Authenticator> {
        self.0.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Puts another into effect. It keeps the keys of an issuer that is believed as before.
    pub fn set(&self, authentication: Authentication) {
        let authenticator = Arc::new(Authenticator::succeeding(Some(&self.get()), authentication));
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = authenticator;
    }
}

impl Authenticator {
    /// Call it on a tokio runtime: with JWTs it starts the task that keeps their keys fresh, which ends with it. It
    /// does not wait for the keys; who comes before them does.
    pub fn new(authentication: Authentication) -> Self {
        Self::succeeding(None, authentication)
    }

    fn succeeding(before: Option<&Self>, authentication: Authentication) -> Self {
        let Authentication { anonymous, certificate, tokens, jwt } = authentication;
        let before = before.and_then(|before| before.jwt.as_ref());
        let jwt = jwt.map(|options| match before {
            Some((same, verifier)) if *same == options => (options, verifier.clone()),
            _ => (options.clone(), Arc::new(JwtVerifier::new(options))),
        });
        Self { anonymous, certificate, tokens: StaticTokens::new(tokens), jwt }
    }

    /// Who shows this: the certificate that the connection was made with, once it is verified, and the `Authorization`
    /// header of the call.
    ///
    /// # Errors
    /// [`Unauthenticated`]: why it is nobody.
    ///
    /// # Cancel safety
    /// Dropping the future leaves nothing behind. It waits for nothing but the issuer's keys, a few seconds at most.
    pub async fn authenticate(
        &self,
        certificate: Option<&CertificateDer<'_>>,
        authorization: Option<&[u8]>,
    ) -> Result<Principal, Unauthenticated> {
        if let Some(authorization) = authorization {
            let token = bearer_token(authorization)?;
            return match &self.jwt {
                Some((_, jwt)) if jwt::is_compact(token) => jwt.principal(token).await,
                _ => self.tokens.principal(token).ok_or(Unauthenticated::UnknownToken),
            };
        }
        match (certificate, self.certificate) {
            (Some(certificate), Some(name)) => {
                certificate::principal(certificate, name).ok_or(Unauthenticated::UnnamedCertificate)
            }
            _ if self.anonymous => Ok(Principal::anonymous()),
            _ => Err(Unauthenticated::Missing),
        }
    }
}

impl fmt::Debug for Authenticator {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Authenticator").finish_non_exhaustive()
    }
}

/// What a request shows by its header, if it has one.
///
/// # Errors
/// [`Unauthenticated::Repeated`] when it has several.
pub fn authorization(headers: &HeaderMap) -> Result<Option<&[u8]>, Unauthenticated> {
    let mut credentials = headers.get_all(AUTHORIZATION).iter();
    let authorization = credentials.next().map(HeaderValue::as_bytes);
    if credentials.next().is_some() { Err(Unauthenticated::Repeated) } else { Ok(authorization) }
}

/// The token of a bearer credential. Another scheme's is refused: who sends a credential wants to be judged by it.
fn bearer_token(authorization: &[u8]) -> Result<&str, Unauthenticated> {
    let text = str::from_utf8(authorization).map_err(|_| Unauthenticated::Malformed)?;
    let (scheme, token) = text.split_once(' ').ok_or(Unauthenticated::Malformed)?;
    let token = token.trim_matches(' ');
    let is_token = (1..=TOKEN_BYTES_MAX).contains(&token.len()) && token.bytes().all(|byte| byte.is_ascii_graphic());
    if scheme.eq_ignore_ascii_case("bearer") && is_token { Ok(token) } else { Err(Unauthenticated::Malformed) }
}

/// The principal of that name, if it is one that somebody who proves it may have.
pub(crate) fn named(name: &str) -> Option<Principal> {
    (Principal::is_name(name) && name != Principal::anonymous().name()).then(|| Principal::new(name))
}

fn sha256(bytes: &[u8]) -> [u8; digest::SHA256_OUTPUT_LEN] {
    let digest = digest::digest(&digest::SHA256, bytes);
    digest.as_ref().try_into().expect("a SHA-256 digest has that many bytes")
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use proptest::prelude::*;
    use tokio::runtime;

    use super::*;

    #[test]
    fn a_bearer_credential_is_its_scheme_and_a_token() {
        for header in ["Bearer abc", "bearer abc", "BEARER   abc", "Bearer abc "] {
            assert_eq!(bearer_token(header.as_bytes()), Ok("abc"), "{header:?}");
        }
        for header in
            ["", "Bearer", "Bearer ", "Bearer  ", "Basic abc", "abc", "Bearer a b", "Bearer a\tb", "Bearer \u{e4}"]
        {
            assert_eq!(bearer_token(header.as_bytes()), Err(Unauthenticated::Malformed), "{header:?}");
        }
    }

    #[test]
    fn a_token_longer_than_the_limit_is_not_looked_at() {
        let header = |bytes: usize| format!("Bearer {}", "a".repeat(bytes));
        assert!(bearer_token(header(TOKEN_BYTES_MAX).as_bytes()).is_ok());
        assert_eq!(bearer_token(header(TOKEN_BYTES_MAX + 1).as_bytes()), Err(Unauthenticated::Malformed));
    }

    #[test]
    fn nobody_is_named_anonymous_or_nothing_or_unreadably() {
        let longest = "a".repeat(Principal::NAME_BYTES_MAX);
        for name in ["billing", "spiffe://shop/orders", "Anonymous", &longest] {
            assert_eq!(named(name).unwrap().name(), name);
        }
        for name in ["anonymous", "", "a\nb", "a\0", &format!("{longest}a")] {
            assert_eq!(named(name), None, "{name:?}");
        }
    }

    proptest! {
        #[test]
        fn no_header_makes_it_panic_or_lets_anybody_in(
            header in any::<Vec<u8>>(),
            token in "[!-~]{0,64}(\\.[!-~]{0,64}){0,3}",
        ) {
            let absent = KeySource::File(PathBuf::from("/nonexistent/keys.json"));
            let jwt = JwtOptions::new("issuer".into(), "audience".into(), absent);
            let runtime = runtime::Builder::new_current_thread().enable_time().build().unwrap();
            runtime.block_on(async {
                let authenticator = Authenticator::new(Authentication { jwt: Some(jwt), ..Authentication::default() });
                let token = format!("Bearer {token}");
                for shown in [header.as_slice(), token.as_bytes()] {
                    assert!(authenticator.authenticate(None, Some(shown)).await.is_err());
                }
            });
        }

        #[test]
        fn no_certificate_makes_it_panic(der in any::<Vec<u8>>()) {
            let der = CertificateDer::from(der);
            for (_, name) in CertificateName::WORDS {
                prop_assert_eq!(certificate::principal(&der, *name), None);
            }
        }
    }
}
