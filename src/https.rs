//! Asking servers that the configuration or the environment names, and no others.
//!
//! Invariant: nobody that stands between, and nobody that the server names, is asked in its place: there are neither proxies
//! nor redirects.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use rustls::crypto::ring;
use rustls::pki_types::CertificateDer;
use ureq::Agent;
use ureq::tls::{Certificate, ClientCert, RootCerts, TlsConfig};

use crate::pem;

/// The certificates in a file.
///
/// # Errors
/// What is wrong with the file, naming it.
pub(crate) fn certificates(path: &Path) -> Result<Vec<Certificate<'static>>, String> {
    pem::all(path, "certificate").map(|certificates| owned(&certificates))
}

/// The system's root certificates.
pub(crate) fn system_roots() -> Vec<Certificate<'static>> {
    owned(&rustls_native_certs::load_native_certs().certs)
}

fn owned(certificates: &[CertificateDer<'_>]) -> Vec<Certificate<'static>> {
    certificates.iter().map(|der| Certificate::from_der(der.as_ref()).to_owned()).collect()
}

/// Asks servers that these roots vouch for, as that client if as any, within that time. Every status is an answer.
pub(crate) fn agent(roots: &[Certificate<'static>], client: Option<ClientCert>, timeout: Duration) -> Agent {
    let tls = TlsConfig::builder()
        .root_certs(RootCerts::new_with_certs(roots))
        .client_cert(client)
        .unversioned_rustls_crypto_provider(Arc::new(ring::default_provider()))
        .build();
    let config = Agent::config_builder().tls_config(tls).timeout_global(Some(timeout));
    config.max_redirects(0).proxy(None).http_status_as_error(false).build().new_agent()
}
