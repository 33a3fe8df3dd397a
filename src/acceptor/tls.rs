//! TLS towards clients, by rustls: the certificate that is shown to them, and what they must show.
//!
//! Knows files, and nothing of sockets. Files are read again when they change, so certificates are renewed and revoked
//! without a restart. Invariant: what is in effect was read as a whole and fits together; a change that does not leaves
//! it in effect.

use std::fmt;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use rustls::crypto::{CryptoProvider, ring};
use rustls::pki_types::{CertificateDer, CertificateRevocationListDer, PrivateKeyDer};
use rustls::server::danger::ClientCertVerifier;
use rustls::server::{ClientCertVerifierBuilder, NoServerSessionStorage, WebPkiClientVerifier};
use rustls::{RootCertStore, ServerConfig};
use tokio::time::Instant;
use tracing::{error, info};

use crate::pem;

/// How connections over TCP are encrypted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tls {
    /// The server's certificate and those between it and its authority, PEM.
    pub certificate: PathBuf,
    /// The certificate's key, PEM.
    pub key: PathBuf,
    /// What is asked of clients.
    pub clients: Clients,
}

/// Whether clients show a certificate.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Clients {
    /// They are not asked.
    Unasked,
    /// They may; one that is shown is verified.
    Optional(ClientTrust),
    /// They must.
    Required(ClientTrust),
}

/// Which certificates of clients are good.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClientTrust {
    /// The authorities that vouch for them, PEM.
    pub authority: PathBuf,
    /// Lists of revoked certificates, PEM. An authority without a list has revoked none; one whose list is out of date
    /// vouches for nobody.
    pub revoked: Option<PathBuf>,
}

impl Tls {
    fn files(&self) -> Vec<&Path> {
        let Self { certificate, key, clients } = self;
        let trust = match clients {
            Clients::Unasked => None,
            Clients::Optional(trust) | Clients::Required(trust) => Some(trust),
        };
        let trusted = trust.into_iter().flat_map(|ClientTrust { authority, revoked }| {
            std::iter::once(authority.as_path()).chain(revoked.as_deref())
        });
        [certificate.as_path(), key.as_path()].into_iter().chain(trusted).collect()
    }
}

/// What handshakes go by.
pub(super) struct Encryption {
    tls: Tls,
    state: Mutex<State>,
}

struct State {
    config: Arc<ServerConfig>,
    /// The files before they were read.
    versions: Vec<Option<Version>>,
    /// What was wrong with them the last time, if they have changed since to what cannot be used.
    refused: Option<String>,
    looked: Instant,
}

/// What changes with a file; `None` where there is no file.
#[derive(PartialEq, Eq)]
struct Version {
    /// Device and number: another file may have come under the name, as Kubernetes swaps them by a link.
    identity: (u64, u64),
    /// Seconds and nanoseconds.
    modified: (i64, i64),
    bytes: u64,
}

impl Encryption {
    /// Reads the files.
    ///
    /// # Errors
    /// What is wrong with one, naming it.
    pub(super) fn read(tls: Tls, now: Instant) -> io::Result<Self> {
        // Before they are read: a change in between is seen the next time.
        let versions = versions(&tls);
        let config = server_config(&tls).map_err(|problem| io::Error::new(io::ErrorKind::InvalidData, problem))?;
        Ok(Self { tls, state: Mutex::new(State { config: Arc::new(config), versions, refused: None, looked: now }) })
    }

    /// What a handshake that begins now goes by. May read files: not to be called where nothing may block.
    pub(super) fn current(&self, now: Instant) -> Arc<ServerConfig> {
        /// A revoked certificate is refused a second later; a storm of connections does not look at files for each.
        const LOOK_INTERVAL: Duration = Duration::from_secs(1);

        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if now.saturating_duration_since(state.looked) >= LOOK_INTERVAL {
            state.looked = now;
            self.look(&mut state);
        }
        state.config.clone()
    }

    fn look(&self, state: &mut State) {
        let versions = versions(&self.tls);
        if versions == state.versions {
            state.refused = None;
            return;
        }
        let certificate = self.tls.certificate.display();
        match server_config(&self.tls) {
            Ok(config) => {
                (state.config, state.versions, state.refused) = (Arc::new(config), versions, None);
                info!(%certificate, "TLS files reloaded");
            }
            // Tried again at the next look: what is in the way may pass without a change of the files.
            Err(problem) if state.refused.as_ref() == Some(&problem) => {}
            Err(problem) => {
                error!(%certificate, %problem, "TLS files refused: those before stay in effect");
                state.refused = Some(problem);
            }
        }
    }
}

impl fmt::Debug for Encryption {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Encryption").field("tls", &self.tls).finish_non_exhaustive()
    }
}

fn versions(tls: &Tls) -> Vec<Option<Version>> {
    let version = |path: &Path| {
        let file = fs::metadata(path).ok()?;
        let identity = (file.dev(), file.ino());
        Some(Version { identity, modified: (file.mtime(), file.mtime_nsec()), bytes: file.len() })
    };
    tls.files().into_iter().map(version).collect()
}

fn server_config(tls: &Tls) -> Result<ServerConfig, String> {
    let Tls { certificate, key, clients } = tls;
    let provider = Arc::new(ring::default_provider());
    let chain = pem::all::<CertificateDer<'static>>(certificate, "certificate")?;
    let key_der = pem::one::<PrivateKeyDer<'static>>(key, "private key")?;
    let mut config = ServerConfig::builder_with_provider(provider.clone())
        .with_safe_default_protocol_versions()
        .map_err(|error| error.to_string())?
        .with_client_cert_verifier(verifier(clients, &provider)?)
        .with_single_cert(chain, key_der)
        .map_err(|error| format!("{} with {}: {error}", certificate.display(), key.display()))?;
    config.alpn_protocols = vec![b"h2".to_vec()];
    // A session that is resumed is not verified again, and its certificate may have been revoked since. Connections are
    // few and long: nothing is lost.
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    Ok(config)
}

fn verifier(clients: &Clients, provider: &Arc<CryptoProvider>) -> Result<Arc<dyn ClientCertVerifier>, String> {
    match clients {
        Clients::Unasked => Ok(WebPkiClientVerifier::no_client_auth()),
        Clients::Optional(trust) => build(trust, trusting(trust, provider)?.allow_unauthenticated()),
        Clients::Required(trust) => build(trust, trusting(trust, provider)?),
    }
}

fn trusting(trust: &ClientTrust, provider: &Arc<CryptoProvider>) -> Result<ClientCertVerifierBuilder, String> {
    let ClientTrust { authority, revoked } = trust;
    let mut roots = RootCertStore::empty();
    for certificate in pem::all::<CertificateDer<'static>>(authority, "certificate")? {
        roots.add(certificate).map_err(|error| format!("{}: {error}", authority.display()))?;
    }
    let builder = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider.clone());
    let Some(revoked) = revoked else { return Ok(builder) };
    let lists = pem::all::<CertificateRevocationListDer<'static>>(revoked, "revocation list")?;
    Ok(builder.with_crls(lists).allow_unknown_revocation_status().enforce_revocation_expiration())
}

fn build(trust: &ClientTrust, builder: ClientCertVerifierBuilder) -> Result<Arc<dyn ClientCertVerifier>, String> {
    // There are authorities: what is left to be wrong is a list.
    let file = trust.revoked.as_ref().unwrap_or(&trust.authority);
    builder.build().map_err(|error| format!("{}: {error}", file.display()))
}
