//! What is known of a commit: the transaction's id, the token a caller can ask with, and what PostgreSQL says of it.
//!
//! Knows no SQL. Invariants: a token that opens was sealed by a broker with the same key, for the same principal; what it
//! says names one transaction of one cluster, whatever servers have come and gone since.

use std::fmt;
use std::sync::Arc;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD as BASE64;
use ring::hmac;

use super::principal::Principal;

/// A transaction that PostgreSQL has given an id.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TransactionId {
    /// The xid8.
    pub xid: u64,
    /// `None` when the server did not tell which cluster it is.
    pub commit_token: Option<CommitToken>,
}

/// What a caller asks with what became of its transaction. It opens nothing else.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CommitToken(Arc<str>);

impl fmt::Display for CommitToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Where transaction ids mean what they mean.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cluster {
    /// Of the cluster and all its standbys.
    pub system_identifier: u64,
    /// Counts its failovers; a promoted standby may give ids out again.
    pub timeline: u32,
    /// Changes when the server crashes: ids of which nothing had reached the disk are then given out again.
    pub epoch: i64,
    /// `pg_database.oid`.
    pub database: u32,
}

/// One transaction of one cluster.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ClusterXid {
    /// The cluster.
    pub cluster: Cluster,
    /// The xid8.
    pub xid: u64,
}

/// What PostgreSQL says of a transaction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Resolution {
    /// It is durable.
    Committed,
    /// None of its writes happened, or will.
    RolledBack,
    /// It is neither yet.
    InProgress,
    /// Nobody can tell.
    Unknown(UnknownReason),
}

/// Why nobody can tell what became of a transaction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum UnknownReason {
    /// The server belongs to another cluster.
    OtherCluster,
    /// The cluster has failed over since.
    OtherTimeline,
    /// Its database has been dropped.
    DatabaseDropped,
    /// The server seems to have crashed since.
    ServerCrashed,
    /// PostgreSQL has forgotten.
    TooOld,
    /// The server is a standby.
    InRecovery,
}

/// The text is no commit token of this key and principal.
#[derive(Debug, PartialEq, Eq)]
pub struct ForgedToken;

/// Seals and opens commit tokens.
pub struct CommitTokens(hmac::Key);

impl CommitTokens {
    /// The shortest key: as long as the seal.
    pub const KEY_BYTES_MIN: usize = 32;

    /// The bytes of a [`ClusterXid`], and those of the seal.
    const XID_BYTES: usize = 32;
    const SEAL_BYTES: usize = 32;

    /// With this key, which all brokers share that are to open each other's tokens.
    pub fn new(key: &[u8]) -> Self {
        Self(hmac::Key::new(hmac::HMAC_SHA256, key))
    }

    /// A token for a transaction of `principal` on the engine of that name.
    pub fn seal(&self, principal: &Principal, engine: &str, transaction: &ClusterXid) -> CommitToken {
        let ClusterXid { cluster: Cluster { system_identifier, timeline, epoch, database }, xid } = transaction;
        let mut bytes = Vec::with_capacity(Self::XID_BYTES + engine.len() + Self::SEAL_BYTES);
        bytes.extend(system_identifier.to_be_bytes());
        bytes.extend(timeline.to_be_bytes());
        bytes.extend(database.to_be_bytes());
        bytes.extend(epoch.to_be_bytes());
        bytes.extend(xid.to_be_bytes());
        bytes.extend(engine.as_bytes());
        let seal = hmac::sign(&self.0, &Self::sealed(principal, &bytes));
        bytes.extend(seal.as_ref());
        CommitToken(BASE64.encode(bytes).into())
    }

    /// The engine's name and the transaction in a token of `principal`.
    ///
    /// # Errors
    /// [`ForgedToken`] for what this key has not sealed for that principal.
    pub fn open(&self, principal: &Principal, text: &str) -> Result<(String, ClusterXid), ForgedToken> {
        /// An engine's name is short, and so is a token.
        const TEXT_BYTES_MAX: usize = 1024;

        let text = Some(text).filter(|text| text.len() <= TEXT_BYTES_MAX).ok_or(ForgedToken)?;
        let bytes = BASE64.decode(text).map_err(|_| ForgedToken)?;
        let (bytes, seal) = bytes
            .len()
            .checked_sub(Self::SEAL_BYTES)
            .and_then(|length| bytes.split_at_checked(length))
            .ok_or(ForgedToken)?;
        hmac::verify(&self.0, &Self::sealed(principal, bytes), seal).map_err(|_| ForgedToken)?;
        let mut rest = bytes;
        let transaction = ClusterXid {
            cluster: Cluster {
                system_identifier: u64::from_be_bytes(take(&mut rest)?),
                timeline: u32::from_be_bytes(take(&mut rest)?),
                database: u32::from_be_bytes(take(&mut rest)?),
                epoch: i64::from_be_bytes(take(&mut rest)?),
            },
            xid: u64::from_be_bytes(take(&mut rest)?),
        };
        Ok((String::from_utf8(rest.to_vec()).map_err(|_| ForgedToken)?, transaction))
    }

    /// What the seal covers: whose token it is, and what it says.
    fn sealed(principal: &Principal, bytes: &[u8]) -> Vec<u8> {
        // No principal's name holds NUL, so the two cannot be told apart in two ways.
        [b"commit token of ", principal.to_string().as_bytes(), b"\0", bytes].concat()
    }
}

impl fmt::Debug for CommitTokens {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("CommitTokens")
    }
}

fn take<const N: usize>(bytes: &mut &[u8]) -> Result<[u8; N], ForgedToken> {
    let (first, rest) = bytes.split_first_chunk().ok_or(ForgedToken)?;
    *bytes = rest;
    Ok(*first)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const TRANSACTION: ClusterXid = ClusterXid {
        cluster: Cluster { system_identifier: u64::MAX, timeline: 3, epoch: -1, database: 5 },
        xid: 1 << 40,
    };

    fn sealed() -> (CommitTokens, String) {
        let tokens = CommitTokens::new(&[7; 32]);
        let token = tokens.seal(&Principal::new("p"), "main", &TRANSACTION).to_string();
        (tokens, token)
    }

    #[test]
    fn a_token_says_what_was_sealed() {
        let (tokens, token) = sealed();
        assert_eq!(tokens.open(&Principal::new("p"), &token), Ok(("main".into(), TRANSACTION)));
    }

    #[test]
    fn a_token_opens_for_its_own_principal_and_key_only() {
        let (tokens, token) = sealed();
        assert_eq!(tokens.open(&Principal::new("q"), &token), Err(ForgedToken));
        assert_eq!(CommitTokens::new(&[8; 32]).open(&Principal::new("p"), &token), Err(ForgedToken));
    }

    proptest! {
        #[test]
        fn a_token_changed_anywhere_is_forged(at in any::<prop::sample::Index>(), to in "[A-Za-z0-9_-]") {
            let (tokens, token) = sealed();
            let at = at.index(token.len());
            let changed = format!("{}{to}{}", &token[..at], &token[at + 1..]);
            prop_assume!(changed != token);
            prop_assert_eq!(tokens.open(&Principal::new("p"), &changed), Err(ForgedToken));
            prop_assert_eq!(tokens.open(&Principal::new("p"), &token[..at]), Err(ForgedToken));
        }

        #[test]
        fn any_text_is_opened_without_panic(text in "\\PC*|[A-Za-z0-9_-]{0,200}") {
            let (tokens, _) = sealed();
            prop_assert_eq!(tokens.open(&Principal::new("p"), &text), Err(ForgedToken));
        }
    }
}
