//! What a caller shows, header and certificate: it proves somebody or nobody.

#![no_main]

use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use rustls::pki_types::CertificateDer;
use session_broker::identity::{Authentication, Authenticator, CertificateName, TokenDigest};
use tokio::runtime::{Builder, Runtime};

static RUNTIME: LazyLock<Runtime> = LazyLock::new(|| Builder::new_current_thread().build().unwrap());

static AUTHENTICATOR: LazyLock<Authenticator> = LazyLock::new(|| {
    Authenticator::new(Authentication {
        certificate: Some(CertificateName::Uri),
        tokens: [("billing".to_owned(), vec![TokenDigest::of("secret")])].into(),
        ..Authentication::default()
    })
});

fuzz_target!(|shown: (Option<&[u8]>, Option<&[u8]>)| {
    let (certificate, header) = shown;
    let certificate = certificate.map(CertificateDer::from_slice);
    let _ = RUNTIME.block_on(AUTHENTICATOR.authenticate(certificate.as_ref(), header));
});
