//! Encryption towards PostgreSQL: what the server must prove, by rustls.
//!
//! Invariant: `verify-full` is the only mode that proves who is at the other end; no mode falls back to plain text.

use std::sync::{Arc, OnceLock};

use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, ring};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::{CertificateError, ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme};
use tokio_postgres_rustls::MakeRustlsConnect;

use super::options::{SslMode, Tls};
use crate::pem;

/// Makes TLS connections as `tls` says. Certificates are read anew, so that they can be changed without a restart.
///
/// # Errors
/// What is wrong with a certificate or key, with its file.
pub(super) fn connector(tls: &Tls) -> Result<MakeRustlsConnect, String> {
    let provider = Arc::new(ring::default_provider());
    let builder = ClientConfig::builder_with_provider(provider.clone())
        .with_safe_default_protocol_versions()
        .map_err(|error| error.to_string())?
        .dangerous()
        .with_custom_certificate_verifier(verifier(tls, &provider)?);
    let mut config = match &tls.identity {
        None => builder.with_no_client_auth(),
        Some((certificate, key)) => {
            let chain = pem::all(certificate, "certificate")?;
            let key_der = pem::one::<PrivateKeyDer<'static>>(key, "private key")?;
            builder
                .with_client_auth_cert(chain, key_der)
                .map_err(|error| format!("{} with {}: {error}", certificate.display(), key.display()))?
        }
    };
    // What a server that is spoken to directly goes by.
    config.alpn_protocols = vec![b"postgresql".to_vec()];
    Ok(MakeRustlsConnect::new(config))
}

fn verifier(tls: &Tls, provider: &Arc<CryptoProvider>) -> Result<Arc<dyn ServerCertVerifier>, String> {
    let demand = match tls.mode {
        // Of a connection in plain text nothing is asked, and it never comes here.
        SslMode::Disable | SslMode::Require => Demand::Nothing(provider.clone()),
        SslMode::VerifyCa => Demand::Authority(authority(tls, provider)?),
        SslMode::VerifyFull => return Ok(authority(tls, provider)?),
    };
    Ok(Arc::new(demand))
}

/// Verifies that an authority vouches for the server and names the host.
fn authority(tls: &Tls, provider: &Arc<CryptoProvider>) -> Result<Arc<WebPkiServerVerifier>, String> {
    let roots = match &tls.root_cert {
        Some(path) => {
            let mut roots = RootCertStore::empty();
            for certificate in pem::all::<CertificateDer<'static>>(path, "certificate")? {
                roots.add(certificate).map_err(|error| format!("{}: {error}", path.display()))?;
            }
            Arc::new(roots)
        }
        None => system_roots(),
    };
    WebPkiServerVerifier::builder_with_provider(roots, provider.clone()).build().map_err(|error| error.to_string())
}

/// What the operating system trusts, read once: it takes tens of milliseconds.
fn system_roots() -> Arc<RootCertStore> {
    static ROOTS: OnceLock<Arc<RootCertStore>> = OnceLock::new();
    let load = || {
        let mut roots = RootCertStore::empty();
        roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
        Arc::new(roots)
    };
    ROOTS.get_or_init(load).clone()
}

/// Asks less of a server than its name.
#[derive(Debug)]
enum Demand {
    Nothing(Arc<CryptoProvider>),
    Authority(Arc<WebPkiServerVerifier>),
}

impl ServerCertVerifier for Demand {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        use rustls::Error::InvalidCertificate;
        match self {
            Self::Nothing(_) => Ok(ServerCertVerified::assertion()),
            Self::Authority(verifier) => {
                match verifier.verify_server_cert(end_entity, intermediates, server_name, ocsp_response, now) {
                    // The name is looked at last: all else is in order.
                    Err(InvalidCertificate(
                        CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. },
                    )) => Ok(ServerCertVerified::assertion()),
                    verified => verified,
                }
            }
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        match self {
            Self::Nothing(provider) => {
                let algorithms = &provider.signature_verification_algorithms;
                rustls::crypto::verify_tls12_signature(message, cert, dss, algorithms)
            }
            Self::Authority(verifier) => verifier.verify_tls12_signature(message, cert, dss),
        }
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        match self {
            Self::Nothing(provider) => {
                let algorithms = &provider.signature_verification_algorithms;
                rustls::crypto::verify_tls13_signature(message, cert, dss, algorithms)
            }
            Self::Authority(verifier) => verifier.verify_tls13_signature(message, cert, dss),
        }
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        match self {
            Self::Nothing(provider) => provider.signature_verification_algorithms.supported_schemes(),
            Self::Authority(verifier) => verifier.supported_verify_schemes(),
        }
    }
}
