//! Static bearer tokens: which principal has which, known by their digests only.
//!
//! It knows nothing of signatures. Invariant: how long a look-up takes tells nothing of how near a token is to a right
//! one.

use std::collections::BTreeMap;
use std::fmt::{self, Write};

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use subtle::{ConditionallySelectable, ConstantTimeEq};

use super::{named, sha256};
use crate::broker::principal::Principal;
use crate::hex;
use crate::random::random;
use crate::secret::Secret;

/// What the digest's text starts with.
const PREFIX: &str = "sha256:";

/// The SHA-256 of a static bearer token. It lets nobody in, provided that the token was drawn at random.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TokenDigest([u8; 32]);

impl TokenDigest {
    /// That of a token.
    pub fn of(token: &str) -> Self {
        Self(sha256(token.as_bytes()))
    }

    /// The digest that reads `sha256:` and 64 hexadecimal digits.
    pub fn parse(text: &str) -> Option<Self> {
        let (pairs, []) = text.strip_prefix(PREFIX)?.as_bytes().as_chunks::<2>() else { return None };
        let digit = |byte: u8| char::from(byte).to_digit(16).and_then(|digit| u8::try_from(digit).ok());
        let byte = |[high, low]: &[u8; 2]| Some((digit(*high)? << 4) | digit(*low)?);
        let bytes: Option<Vec<u8>> = pairs.iter().map(byte).collect();
        Some(Self(bytes?.try_into().ok()?))
    }
}

impl fmt::Display for TokenDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(PREFIX)?;
        hex::digits(&self.0).try_for_each(|digit| f.write_char(digit))
    }
}

/// Draws a static token of 256 random bits. Its digest is for the configuration, itself for the caller.
pub fn draw_token() -> (Secret, TokenDigest) {
    // The prefix lets scanners find what was committed or logged by mistake.
    let token = format!("sbt_{}", URL_SAFE_NO_PAD.encode(random::<32>()));
    let digest = TokenDigest::of(&token);
    (Secret::new(token), digest)
}

/// The static tokens of all principals.
pub(super) struct StaticTokens(Vec<(TokenDigest, Principal)>);

impl StaticTokens {
    /// Those of the principals by name. A name that nobody may have lets nobody in.
    pub(super) fn new(tokens: BTreeMap<String, Vec<TokenDigest>>) -> Self {
        let mut all = Vec::new();
        for (name, digests) in tokens {
            if let Some(principal) = named(&name) {
                all.extend(digests.into_iter().map(|digest| (digest, principal.clone())));
            }
        }
        Self(all)
    }

    /// Whose token it is. Every digest is compared, whatever the others said.
    pub(super) fn principal(&self, token: &str) -> Option<Principal> {
        let TokenDigest(shown) = TokenDigest::of(token);
        let mut found = u64::MAX;
        for (index, (digest, _)) in (0_u64..).zip(&self.0) {
            found.conditional_assign(&index, digest.0.ct_eq(&shown));
        }
        let (_, principal) = self.0.get(usize::try_from(found).ok()?)?;
        Some(principal.clone())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_digest_reads_as_it_is_written() {
        let digest = TokenDigest::of("abc");
        let text = "sha256:ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        assert_eq!(digest.to_string(), text);
        assert_eq!(TokenDigest::parse(text), Some(digest));
        assert_eq!(TokenDigest::parse(&text.replace("ba78", "BA78")), Some(digest));
    }

    #[test]
    fn what_is_no_digest_is_refused() {
        let hex = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        for text in [
            "",
            "sha256:",
            hex,
            &format!("md5:{hex}"),
            &format!("sha256:{hex}0"),
            &format!("sha256:{hex}00"),
            &format!("sha256:{}", &hex[2..]),
            &format!("sha256:{}", hex.replace('b', "g")),
            &format!("sha256:{}", hex.replace("ba", "\u{e4}")),
        ] {
            assert_eq!(TokenDigest::parse(text), None, "{text:?}");
        }
    }

    #[test]
    fn a_drawn_token_is_new_each_time_and_has_its_digest() {
        let ((first, digest), (second, _)) = (draw_token(), draw_token());
        assert!(first.expose().starts_with("sbt_"));
        assert_ne!(first.expose(), second.expose());
        assert_eq!(digest, TokenDigest::of(first.expose()));
    }

    #[test]
    fn a_token_is_its_principals_wherever_its_digest_stands() {
        let digests = |tokens: &[&str]| tokens.iter().map(|token| TokenDigest::of(token)).collect::<Vec<_>>();
        let tokens = StaticTokens::new(BTreeMap::from([
            ("anonymous".to_owned(), digests(&["e"])),
            ("billing".to_owned(), digests(&["a", "b"])),
            ("shipping".to_owned(), digests(&["c", "d"])),
        ]));
        let name = |token: &str| tokens.principal(token).map(|principal| principal.name().to_owned());
        for (token, principal) in [("a", "billing"), ("b", "billing"), ("c", "shipping"), ("d", "shipping")] {
            assert_eq!(name(token).as_deref(), Some(principal));
        }
        for token in ["", "e", "A", "ab"] {
            assert_eq!(name(token), None);
        }
    }
}
