//! The name that a client certificate gives.
//!
//! It verifies nothing: whoever made the connection has. Invariant: a certificate with several names of the kind that
//! is asked for names nobody, for nobody could tell which one is meant.

use rustls::pki_types::CertificateDer;
use x509_cert::der::asn1::{Any, ObjectIdentifier};
use x509_cert::der::{Decode, Tag, Tagged};
use x509_cert::ext::pkix::SubjectAltName;
use x509_cert::ext::pkix::name::GeneralName;
use x509_cert::{Certificate, TbsCertificate};

use super::named;
use crate::broker::principal::Principal;

const COMMON_NAME: ObjectIdentifier = ObjectIdentifier::new_unwrap("2.5.4.3");

/// Which part of a client certificate names the principal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CertificateName {
    /// The URI among the subject's alternative names, such as a SPIFFE ID.
    Uri,
    /// The DNS name among them.
    Dns,
    /// The subject's common name.
    CommonName,
}

impl CertificateName {
    /// Every part with its word.
    pub const WORDS: &[(&str, Self)] = &[("uri", Self::Uri), ("dns", Self::Dns), ("cn", Self::CommonName)];

    /// The part's word.
    pub fn word(self) -> &'static str {
        match self {
            Self::Uri => "uri",
            Self::Dns => "dns",
            Self::CommonName => "cn",
        }
    }
}

/// Whom the certificate names.
pub(super) fn principal(certificate: &CertificateDer<'_>, name: CertificateName) -> Option<Principal> {
    let certificate = Certificate::from_der(certificate.as_ref()).ok()?.tbs_certificate;
    let names = match name {
        CertificateName::Uri => alternative_names(&certificate, |name| match name {
            GeneralName::UniformResourceIdentifier(uri) => Some(uri.as_str()),
            _ => None,
        })?,
        CertificateName::Dns => alternative_names(&certificate, |name| match name {
            GeneralName::DnsName(name) => Some(name.as_str()),
            _ => None,
        })?,
        CertificateName::CommonName => common_names(&certificate)?,
    };
    let [name] = <[String; 1]>::try_from(names).ok()?;
    named(&name)
}

fn alternative_names(
    certificate: &TbsCertificate,
    wanted: impl Fn(&GeneralName) -> Option<&str>,
) -> Option<Vec<String>> {
    let (_, SubjectAltName(names)) = certificate.get::<SubjectAltName>().ok()??;
    Some(names.iter().filter_map(|name| wanted(name).map(str::to_owned)).collect())
}

fn common_names(certificate: &TbsCertificate) -> Option<Vec<String>> {
    let attributes = certificate.subject.0.iter().flat_map(|part| part.0.iter());
    attributes.filter(|attribute| attribute.oid == COMMON_NAME).map(|attribute| text(&attribute.value)).collect()
}

/// The text of a name, in the encodings that today's certificates must use.
fn text(value: &Any) -> Option<String> {
    match value.tag() {
        Tag::Utf8String | Tag::PrintableString => String::from_utf8(value.value().to_vec()).ok(),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use rcgen::{CertificateParams, DistinguishedName, DnType, DnValue, KeyPair, SanType};

    use super::*;

    fn certificate(common_names: &[&str], alternative_names: Vec<SanType>) -> CertificateDer<'static> {
        let mut distinguished_name = DistinguishedName::new();
        distinguished_name.push(DnType::OrganizationName, "Shop");
        for (index, name) in common_names.iter().enumerate() {
            // The second stands under the same identifier, which the first has a name for.
            let kind = if index == 0 { DnType::CommonName } else { DnType::CustomDnType(vec![2, 5, 4, 3]) };
            distinguished_name.push(kind, *name);
        }
        self_signed(distinguished_name, alternative_names)
    }

    fn self_signed(distinguished_name: DistinguishedName, subject_alt_names: Vec<SanType>) -> CertificateDer<'static> {
        let mut params = CertificateParams::default();
        (params.distinguished_name, params.subject_alt_names) = (distinguished_name, subject_alt_names);
        params.self_signed(&KeyPair::generate().unwrap()).unwrap().der().clone()
    }

    fn uri(uri: &str) -> SanType {
        SanType::URI(uri.try_into().unwrap())
    }

    fn dns(name: &str) -> SanType {
        SanType::DnsName(name.try_into().unwrap())
    }

    fn named_by(name: CertificateName, certificate: &CertificateDer<'_>) -> Option<String> {
        principal(certificate, name).map(|principal| principal.name().to_owned())
    }

    #[test]
    fn the_one_name_of_the_kind_that_is_asked_for_counts() {
        let shown = certificate(&["orders"], vec![dns("orders.shop"), uri("spiffe://shop/orders")]);
        for (kind, name) in [
            (CertificateName::Uri, "spiffe://shop/orders"),
            (CertificateName::Dns, "orders.shop"),
            (CertificateName::CommonName, "orders"),
        ] {
            assert_eq!(named_by(kind, &shown).as_deref(), Some(name));
        }
    }

    #[test]
    fn none_or_several_name_nobody() {
        let several = certificate(&["a", "b"], vec![dns("a"), dns("b"), uri("a:a"), uri("b:b")]);
        let none = certificate(&[], vec![SanType::Rfc822Name("a@shop".try_into().unwrap())]);
        let bare = certificate(&[], Vec::new());
        for (_, kind) in CertificateName::WORDS {
            for certificate in [&several, &none, &bare] {
                assert_eq!(named_by(*kind, certificate), None, "{kind:?}");
            }
        }
    }

    #[test]
    fn a_name_that_nobody_may_have_names_nobody() {
        for name in ["anonymous", "a\u{7}b"] {
            let shown = certificate(&[name], vec![dns(name), uri(name)]);
            for (_, kind) in CertificateName::WORDS {
                assert_eq!(named_by(*kind, &shown), None, "{kind:?} {name:?}");
            }
        }
    }

    #[test]
    fn a_common_name_counts_in_both_encodings_of_today() {
        let mut printable = DistinguishedName::new();
        printable.push(DnType::CommonName, DnValue::PrintableString("orders".try_into().unwrap()));
        let printable = self_signed(printable, Vec::new());
        assert_eq!(named_by(CertificateName::CommonName, &printable).as_deref(), Some("orders"));
        let utf8 = certificate(&["m\u{fc}ller"], Vec::new());
        assert_eq!(named_by(CertificateName::CommonName, &utf8).as_deref(), Some("m\u{fc}ller"));
    }

    #[test]
    fn every_kind_has_its_word() {
        for (word, kind) in CertificateName::WORDS {
            assert_eq!(kind.word(), *word);
        }
    }
}
