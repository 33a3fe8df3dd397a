//! A session's two names: the id, which logs may show, and the token, which opens it.
//!
//! A token reads `OWNER.ID.SECRET`: the replica that holds the session, the id, and 128 random bits. Invariant: the
//! secret is compared in constant time and shown by nothing but [`SessionToken::expose`].

use std::fmt::{self, Write};
use std::sync::Arc;

use subtle::ConstantTimeEq;

use crate::hex;
use crate::random::random;

/// The loggable name of a session: 128 random bits. It opens nothing.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SessionId([u8; 16]);

/// The part of a token that proves its bearer was given it.
#[derive(Clone, Copy)]
pub(super) struct Secret([u8; 16]);

/// What a caller presents with every call.
#[derive(Clone)]
pub struct SessionToken {
    owner: Arc<str>,
    id: SessionId,
    secret: Secret,
}

/// The text is no session token.
#[derive(Debug, PartialEq, Eq)]
pub struct MalformedToken;

impl SessionToken {
    /// The longest text that can be a token: an owner's name of 253 bytes, as in DNS, and the rest.
    const TEXT_BYTES_MAX: usize = 253 + 2 + 64;

    /// A fresh token for a session held by `owner`.
    pub(super) fn generate(owner: &Arc<str>) -> Self {
        Self { owner: owner.clone(), id: SessionId(random()), secret: Secret(random()) }
    }

    /// Reads a token's text.
    ///
    /// # Errors
    /// [`MalformedToken`] when no broker can have made it.
    pub fn parse(text: &str) -> Result<Self, MalformedToken> {
        if text.len() > Self::TEXT_BYTES_MAX {
            return Err(MalformedToken);
        }
        let mut parts = text.rsplitn(3, '.');
        let secret = parts.next().and_then(unhex).ok_or(MalformedToken)?;
        let id = parts.next().and_then(unhex).ok_or(MalformedToken)?;
        let owner = parts.next().filter(|owner| !owner.is_empty()).ok_or(MalformedToken)?;
        Ok(Self { owner: owner.into(), id: SessionId(id), secret: Secret(secret) })
    }

    /// The text to hand to the caller, and to nobody else.
    pub fn expose(&self) -> String {
        format!("{}.{}.{}", self.owner, self.id, hex::digits(&self.secret.0).collect::<String>())
    }

    /// The session's loggable name.
    pub fn id(&self) -> SessionId {
        self.id
    }

    /// The replica that holds the session.
    pub fn owner(&self) -> &str {
        &self.owner
    }

    pub(super) fn secret(&self) -> Secret {
        self.secret
    }
}

impl fmt::Debug for SessionToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SessionToken({}.{}.…)", self.owner, self.id)
    }
}

impl Secret {
    /// Compares in constant time.
    pub(super) fn matches(&self, other: &Self) -> bool {
        self.0.ct_eq(&other.0).into()
    }
}

impl SessionId {
    /// Reads an id's text, as it is shown.
    pub fn parse(text: &str) -> Option<Self> {
        unhex(text).map(Self)
    }

    /// A number drawn with it, to tell sessions apart by.
    pub(super) fn lot(self) -> u8 {
        self.0[0]
    }
}

impl fmt::Display for SessionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        hex::digits(&self.0).try_for_each(|digit| f.write_char(digit))
    }
}

impl fmt::Debug for SessionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

fn unhex(text: &str) -> Option<[u8; 16]> {
    let canonical = text.len() == 32 && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
    let number = canonical.then(|| u128::from_str_radix(text, 16).ok()).flatten()?;
    Some(number.to_be_bytes())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_token_survives_its_text_even_with_dots_in_the_owner() {
        let token = SessionToken::generate(&"broker-0.brokers.svc".into());
        let read = SessionToken::parse(&token.expose()).unwrap();
        assert_eq!(read.owner(), "broker-0.brokers.svc");
        assert_eq!(read.id(), token.id());
        assert!(read.secret().matches(&token.secret()));
    }

    #[test]
    fn debug_never_shows_the_secret() {
        let token = SessionToken::generate(&"b".into());
        let secret = token.expose().rsplit('.').next().unwrap().to_owned();
        assert!(!format!("{token:?}").contains(&secret));
    }

    #[test]
    fn what_no_broker_made_is_malformed() {
        let good = SessionToken::generate(&"b".into()).expose();
        let upper = good.to_uppercase();
        for text in ["", ".", "..", "b.x.y", &good[1..], &good[..good.len() - 1], &upper, &"a".repeat(1000)] {
            assert_eq!(SessionToken::parse(text).err(), Some(MalformedToken), "{text:?}");
        }
    }

    proptest! {
        #[test]
        fn any_text_is_parsed_without_panic(text in "\\PC*|[0-9a-f.+-]{0,80}") {
            let _ = SessionToken::parse(&text);
        }
    }
}
