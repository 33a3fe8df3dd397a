//! The signatures of tokens: the algorithms that there are, and ring to verify them with.
//!
//! It signs nothing and knows no claims. Invariant: an algorithm with a shared secret, or with none, has no name here,
//! so that none can be configured or accepted.

use jsonwebtoken::crypto::{self, CryptoProvider, KeyUtils};
use jsonwebtoken::errors::{self, ErrorKind};
use jsonwebtoken::signature::{self, Verifier};
use jsonwebtoken::{Algorithm as JwsAlgorithm, DecodingKey, DecodingKeyKind};
use ring::error::Unspecified;
use ring::signature::{
    ECDSA_P256_SHA256_FIXED, ECDSA_P384_SHA384_FIXED, ED25519, RSA_PKCS1_2048_8192_SHA256, RSA_PKCS1_2048_8192_SHA384,
    RSA_PKCS1_2048_8192_SHA512, RSA_PSS_2048_8192_SHA256, RSA_PSS_2048_8192_SHA384, RSA_PSS_2048_8192_SHA512,
    RsaParameters, RsaPublicKeyComponents, UnparsedPublicKey, VerificationAlgorithm,
};

/// A signature's algorithm, as a token's `alg` names it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Algorithm {
    /// RSA with PKCS #1 v1.5 padding and SHA-256.
    Rs256,
    /// The same with SHA-384.
    Rs384,
    /// The same with SHA-512.
    Rs512,
    /// RSA with PSS padding and SHA-256.
    Ps256,
    /// The same with SHA-384.
    Ps384,
    /// The same with SHA-512.
    Ps512,
    /// ECDSA on P-256 with SHA-256.
    Es256,
    /// ECDSA on P-384 with SHA-384.
    Es384,
    /// EdDSA, on Ed25519 only.
    EdDsa,
}

impl Algorithm {
    /// Every algorithm with its word.
    pub const WORDS: &[(&str, Self)] = &[
        ("RS256", Self::Rs256),
        ("RS384", Self::Rs384),
        ("RS512", Self::Rs512),
        ("PS256", Self::Ps256),
        ("PS384", Self::Ps384),
        ("PS512", Self::Ps512),
        ("ES256", Self::Es256),
        ("ES384", Self::Es384),
        ("EdDSA", Self::EdDsa),
    ];

    /// Those for RSA keys.
    pub(super) const RSA: &[Self] = &[Self::Rs256, Self::Rs384, Self::Rs512, Self::Ps256, Self::Ps384, Self::Ps512];

    /// The algorithm's word.
    pub fn word(self) -> &'static str {
        match self {
            Self::Rs256 => "RS256",
            Self::Rs384 => "RS384",
            Self::Rs512 => "RS512",
            Self::Ps256 => "PS256",
            Self::Ps384 => "PS384",
            Self::Ps512 => "PS512",
            Self::Es256 => "ES256",
            Self::Es384 => "ES384",
            Self::EdDsa => "EdDSA",
        }
    }

    /// The algorithm of that word.
    pub fn parse(word: &str) -> Option<Self> {
        Self::WORDS.iter().find(|(known, _)| *known == word).map(|(_, algorithm)| *algorithm)
    }

    pub(super) fn jws(self) -> JwsAlgorithm {
        match self {
            Self::Rs256 => JwsAlgorithm::RS256,
            Self::Rs384 => JwsAlgorithm::RS384,
            Self::Rs512 => JwsAlgorithm::RS512,
            Self::Ps256 => JwsAlgorithm::PS256,
            Self::Ps384 => JwsAlgorithm::PS384,
            Self::Ps512 => JwsAlgorithm::PS512,
            Self::Es256 => JwsAlgorithm::ES256,
            Self::Es384 => JwsAlgorithm::ES384,
            Self::EdDsa => JwsAlgorithm::EdDSA,
        }
    }
}

/// What verifies, and signs nothing.
static RING: CryptoProvider = CryptoProvider {
    signer_factory: |_, _| Err(ErrorKind::UnsupportedAlgorithm.into()),
    verifier_factory: |algorithm, key| verifier(*algorithm, key),
    // They serve the making of key sets, which are only read here.
    key_utils: KeyUtils::new_unimplemented(),
};

/// Has signatures verified by ring, in the whole process.
pub(super) fn install() {
    // An error says that it is installed already.
    let _ = RING.install_default();
}

fn verifier(algorithm: JwsAlgorithm, key: &DecodingKey) -> errors::Result<Box<dyn crypto::JwtVerifier>> {
    if key.family() != algorithm.family() {
        return Err(ErrorKind::InvalidAlgorithm.into());
    }
    let method = match algorithm {
        JwsAlgorithm::RS256 => Method::Rsa(&RSA_PKCS1_2048_8192_SHA256),
        JwsAlgorithm::RS384 => Method::Rsa(&RSA_PKCS1_2048_8192_SHA384),
        JwsAlgorithm::RS512 => Method::Rsa(&RSA_PKCS1_2048_8192_SHA512),
        JwsAlgorithm::PS256 => Method::Rsa(&RSA_PSS_2048_8192_SHA256),
        JwsAlgorithm::PS384 => Method::Rsa(&RSA_PSS_2048_8192_SHA384),
        JwsAlgorithm::PS512 => Method::Rsa(&RSA_PSS_2048_8192_SHA512),
        JwsAlgorithm::ES256 => Method::Curve(&ECDSA_P256_SHA256_FIXED),
        JwsAlgorithm::ES384 => Method::Curve(&ECDSA_P384_SHA384_FIXED),
        JwsAlgorithm::EdDSA => Method::Curve(&ED25519),
        _ => return Err(ErrorKind::UnsupportedAlgorithm.into()),
    };
    Ok(Box::new(RingVerifier { algorithm, method, key: key.clone() }))
}

/// How ring verifies, which depends on what a key is made of.
#[derive(Clone, Copy)]
enum Method {
    Rsa(&'static RsaParameters),
    Curve(&'static dyn VerificationAlgorithm),
}

struct RingVerifier {
    algorithm: JwsAlgorithm,
    method: Method,
    key: DecodingKey,
}

impl Verifier<Vec<u8>> for RingVerifier {
    fn verify(&self, message: &[u8], signature: &Vec<u8>) -> Result<(), signature::Error> {
        let verified = match (self.method, self.key.kind()) {
            (Method::Rsa(parameters), DecodingKeyKind::RsaModulusExponent { n, e }) => {
                RsaPublicKeyComponents { n, e }.verify(parameters, message, signature)
            }
            (Method::Curve(algorithm), DecodingKeyKind::SecretOrDer(point)) => {
                UnparsedPublicKey::new(algorithm, point).verify(message, signature)
            }
            (Method::Rsa(_), DecodingKeyKind::SecretOrDer(_))
            | (Method::Curve(_), DecodingKeyKind::RsaModulusExponent { .. }) => Err(Unspecified),
        };
        verified.map_err(|Unspecified| signature::Error::new())
    }
}

impl crypto::JwtVerifier for RingVerifier {
    fn algorithm(&self) -> JwsAlgorithm {
        self.algorithm
    }
}

#[cfg(test)]
mod tests {
    use jsonwebtoken::EncodingKey;

    use super::*;

    #[test]
    fn every_algorithm_has_its_word_and_there_is_no_secret_one() {
        for (word, algorithm) in Algorithm::WORDS {
            assert_eq!((algorithm.word(), Algorithm::parse(word)), (*word, Some(*algorithm)));
        }
        for word in ["none", "None", "HS256", "HS384", "HS512", "rs256", "ES512", ""] {
            assert_eq!(Algorithm::parse(word), None, "{word:?}");
        }
    }

    #[test]
    fn nothing_is_signed_and_no_secret_verified() {
        let signed = (RING.signer_factory)(&JwsAlgorithm::HS256, &EncodingKey::from_secret(b"secret"));
        assert!(signed.is_err());
        let secret = DecodingKey::from_secret(b"secret");
        for algorithm in [JwsAlgorithm::HS256, JwsAlgorithm::HS384, JwsAlgorithm::HS512, JwsAlgorithm::RS256] {
            assert!((RING.verifier_factory)(&algorithm, &secret).is_err());
        }
    }
}
