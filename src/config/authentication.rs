//! The `[authentication]` section: by what callers prove who they are.
//!
//! It knows what can be configured, not how it is proved. Invariants: there is a way for somebody to call; no problem
//! repeats what may be a token.

use std::collections::BTreeMap;
use std::fmt;
use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::time::Duration;

use humantime::format_duration;

use super::section::{Section, key};
use crate::identity::{Algorithm, Authentication, CertificateName, JwtOptions, KeySource, KeyUrl, TokenDigest, named};

/// Each refresh asks the issuer once; less than a second would be an attack on it.
const REFRESHES: RangeInclusive<Duration> = Duration::from_secs(1)..=Duration::from_hours(24);

pub(super) fn read(root: &mut Section<'_>) -> Authentication {
    let mut section = root.section("authentication");
    // What is tried and wrong has a problem of its own.
    let is_tried = section.has("certificate") || section.has("jwt");
    let certificate_names: Vec<_> = CertificateName::WORDS.iter().map(|(word, name)| (*word, Some(*name))).collect();
    let authentication = Authentication {
        anonymous: section.flag("anonymous", false),
        certificate: section.word("certificate", &certificate_names, None),
        tokens: tokens(section.section("tokens")),
        jwt: jwt(&mut section),
    };
    section.finish();
    if !is_tried && !authentication.anonymous && authentication.tokens.is_empty() {
        let problem = "nobody could call: set certificate, add [authentication.tokens] or [authentication.jwt], or let \
                       everybody in with anonymous = true";
        root.problem("authentication", problem);
    }
    authentication
}

/// Each principal's static tokens, by their digests.
fn tokens(mut section: Section<'_>) -> BTreeMap<String, Vec<TokenDigest>> {
    let mut tokens = BTreeMap::<String, Vec<TokenDigest>>::new();
    for name in section.keys() {
        if named(&name).is_none() {
            let problem = "must be a principal's name: 1 to 253 bytes without control characters, not \"anonymous\"";
            section.problem(&name, problem);
        }
        let mut digests = Vec::<TokenDigest>::new();
        let texts = section.list(&name);
        if texts.is_empty() {
            section.problem(&name, "is empty: list the digests of its tokens");
        }
        for (index, text) in texts.iter().enumerate() {
            // What stands here by mistake may be the token itself.
            let place = format!("{name}[{index}]");
            let is_known = |digest: &TokenDigest| tokens.values().flatten().chain(&digests).any(|own| own == digest);
            match TokenDigest::parse(text) {
                None => section.problem(&place, "must be what `session-broker token` prints: sha256: and 64 digits"),
                Some(digest) if is_known(&digest) => section.problem(&place, "is given twice: draw a token for each"),
                Some(digest) => digests.push(digest),
            }
        }
        tokens.insert(name, digests);
    }
    section.finish();
    tokens
}

fn jwt(section: &mut Section<'_>) -> Option<JwtOptions> {
    let is_given = section.has("jwt");
    let mut section = section.section("jwt");
    if !is_given {
        return None;
    }
    let issuer = required(&mut section, "issuer", "the iss of its tokens");
    let audience = required(&mut section, "audience", "the aud that its tokens have for this broker");
    let keys = key_source(&mut section);
    let algorithms = algorithms(&mut section);
    let principal_claim = section.text("principal_claim").unwrap_or_else(|| JwtOptions::PRINCIPAL_CLAIM.to_owned());
    if principal_claim.is_empty() {
        section.problem("principal_claim", "is empty: name the claim that names the caller");
    }
    let refresh = section.duration("jwks_refresh", JwtOptions::REFRESH, REFRESHES);
    section.finish();
    Some(JwtOptions { issuer: issuer?, audience: audience?, keys: keys?, algorithms, principal_claim, refresh })
}

fn required(section: &mut Section<'_>, key: &str, what: &str) -> Option<String> {
    if !section.has(key) {
        section.problem(key, &format!("is missing: give {what}"));
    }
    let text = section.text(key)?;
    if text.is_empty() {
        section.problem(key, &format!("is empty: give {what}"));
    }
    Some(text)
}

/// Where the keys are, when that is said once.
fn key_source(section: &mut Section<'_>) -> Option<KeySource> {
    let given = (section.has("jwks_url"), section.has("jwks_file"));
    let (url, file) = (section.text("jwks_url"), section.text("jwks_file"));
    let authority = section.text("jwks_ca").map(PathBuf::from);
    match given {
        (false, false) => {
            section.problem("jwks_url", "is missing: say where the issuer's keys are, with it or with jwks_file");
            None
        }
        (true, true) => {
            section.problem("jwks_file", "is given besides jwks_url: give one of them");
            None
        }
        (false, true) => {
            if authority.is_some() {
                section.problem("jwks_ca", "has no effect on jwks_file: leave it out");
            }
            file.map(|path| KeySource::File(path.into()))
        }
        (true, false) => {
            let url = KeyUrl::parse(&url?);
            match &url {
                None => section.problem("jwks_url", "must be an https URL without a login; http is for loopback only"),
                Some(url) if authority.is_some() && !url.is_encrypted() => {
                    section.problem("jwks_ca", "has no effect on an http URL: leave it out");
                }
                Some(_) => {}
            }
            Some(KeySource::Url { url: url?, authority })
        }
    }
}

fn algorithms(section: &mut Section<'_>) -> Vec<Algorithm> {
    if !section.has("algorithms") {
        return JwtOptions::ALGORITHMS.to_vec();
    }
    let words = section.list("algorithms");
    if words.is_empty() {
        section.problem("algorithms", "is empty: name those that the issuer signs with");
    }
    let mut algorithms = Vec::new();
    for word in words {
        match Algorithm::parse(&word) {
            Some(algorithm) if algorithms.contains(&algorithm) => {}
            Some(algorithm) => algorithms.push(algorithm),
            None => {
                let known: Vec<_> = Algorithm::WORDS.iter().map(|(word, _)| *word).collect();
                section.problem("algorithms", &format!("names {word:?}: known are {}", known.join(", ")));
            }
        }
    }
    algorithms
}

/// The section as TOML.
pub(super) struct Shown<'a>(pub(super) &'a Authentication);

impl fmt::Display for Shown<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Authentication { anonymous, certificate, tokens, jwt } = self.0;
        writeln!(f, "\n[authentication]\nanonymous = {anonymous}")?;
        if let Some(name) = certificate {
            writeln!(f, "certificate = {:?}", name.word())?;
        }
        if !tokens.is_empty() {
            writeln!(f, "\n[authentication.tokens]")?;
        }
        for (name, digests) in tokens {
            let digests: Vec<_> = digests.iter().map(ToString::to_string).collect();
            writeln!(f, "{} = {digests:?}", key(name))?;
        }
        jwt.as_ref().map_or(Ok(()), |jwt| show_jwt(f, jwt))
    }
}

fn show_jwt(f: &mut fmt::Formatter<'_>, jwt: &JwtOptions) -> fmt::Result {
    let JwtOptions { issuer, audience, keys, algorithms, principal_claim, refresh } = jwt;
    writeln!(f, "\n[authentication.jwt]\nissuer = {issuer:?}\naudience = {audience:?}")?;
    match keys {
        KeySource::File(path) => writeln!(f, "jwks_file = {:?}", path.display().to_string())?,
        KeySource::Url { url, authority } => {
            writeln!(f, "jwks_url = {:?}", url.as_str())?;
            if let Some(path) = authority {
                writeln!(f, "jwks_ca = {:?}", path.display().to_string())?;
            }
        }
    }
    let algorithms: Vec<_> = algorithms.iter().map(|algorithm| algorithm.word()).collect();
    writeln!(f, "algorithms = {algorithms:?}\nprincipal_claim = {principal_claim:?}")?;
    writeln!(f, "jwks_refresh = \"{}\"", format_duration(*refresh))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::tests::{load, problems};

    const ENGINE: &str = "[engines.main]\nurl = \"postgresql://u@localhost/db\"\n\
        [tls]\ncertificate = \"a\"\nkey = \"b\"\nclient_ca = \"c\"\n";
    const DIGEST: &str = "sha256:ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
    const OTHER: &str = "sha256:3e23e8160039594a33894f6564e1b1348bbd7a0088d42c4acb73eeaed59c009d";

    fn read(text: &str, environment: &[(&str, &str)]) -> Authentication {
        load(&format!("{ENGINE}{text}"), environment).unwrap().authentication
    }

    #[test]
    fn every_method_is_read() {
        let text = format!(
            r#"
            [authentication]
            certificate = "dns"
            [authentication.tokens]
            billing = ["{DIGEST}"]
            "spiffe://shop/orders" = "{OTHER}"
            [authentication.jwt]
            issuer = "https://issuer.example"
            audience = "session-broker"
            jwks_url = "https://issuer.example/keys"
            jwks_ca = "ca.pem"
            algorithms = ["PS256", "ES384", "PS256"]
            principal_claim = "client_id"
            jwks_refresh = "1m"
            "#
        );
        let digest = |text: &str| TokenDigest::parse(text).unwrap();
        let url = KeyUrl::parse("https://issuer.example/keys").unwrap();
        assert_eq!(
            read(&text, &[]),
            Authentication {
                anonymous: false,
                certificate: Some(CertificateName::Dns),
                tokens: BTreeMap::from([
                    ("billing".into(), vec![digest(DIGEST)]),
                    ("spiffe://shop/orders".into(), vec![digest(OTHER)]),
                ]),
                jwt: Some(JwtOptions {
                    issuer: "https://issuer.example".into(),
                    audience: "session-broker".into(),
                    keys: KeySource::Url { url, authority: Some("ca.pem".into()) },
                    algorithms: vec![Algorithm::Ps256, Algorithm::Es384],
                    principal_claim: "client_id".into(),
                    refresh: Duration::from_mins(1),
                }),
            }
        );
    }

    #[test]
    fn a_jwt_needs_its_issuer_its_audience_and_the_keys() {
        let text = "[authentication.jwt]\nissuer = \"i\"\naudience = \"a\"\njwks_file = \"keys.json\"";
        let expected = JwtOptions::new("i".into(), "a".into(), KeySource::File("keys.json".into()));
        assert_eq!(read(text, &[]).jwt, Some(expected));
    }

    #[test]
    fn the_environment_reaches_every_method() {
        let tokens = format!("{DIGEST}, {OTHER}");
        let environment = [
            ("SESSION_BROKER__AUTHENTICATION__CERTIFICATE", "uri"),
            ("SESSION_BROKER__AUTHENTICATION__TOKENS__BILLING", tokens.as_str()),
            ("SESSION_BROKER__AUTHENTICATION__JWT__ISSUER", "i"),
            ("SESSION_BROKER__AUTHENTICATION__JWT__AUDIENCE", "a"),
            ("SESSION_BROKER__AUTHENTICATION__JWT__JWKS_FILE", "keys.json"),
            ("SESSION_BROKER__AUTHENTICATION__JWT__ALGORITHMS", "RS256, ES256"),
        ];
        let read = read("[authentication]\nanonymous = false", &environment);
        assert_eq!((read.anonymous, read.certificate), (false, Some(CertificateName::Uri)));
        assert_eq!(read.tokens["billing"].len(), 2);
        assert_eq!(read.jwt.unwrap().algorithms, [Algorithm::Rs256, Algorithm::Es256]);
    }

    #[test]
    fn authentication_is_printed_as_it_is_read() {
        let jwt = "[authentication.jwt]\nissuer = \"i \\\"x\\\"\"\naudience = \"a\"";
        for text in [
            "[authentication]\nanonymous = true".to_owned(),
            format!("[authentication]\ncertificate = \"cn\"\ntokens = {{ \"odd name\" = [{DIGEST:?}, {OTHER:?}] }}"),
            format!("{jwt}\njwks_file = \"keys.json\"\njwks_refresh = \"90s\""),
            format!("{jwt}\njwks_url = \"https://i.example/k\"\njwks_ca = \"ca.pem\"\nalgorithms = \"EdDSA\""),
        ] {
            let config = load(&format!("{ENGINE}{text}"), &[]).unwrap();
            assert_eq!(load(&config.to_string(), &[]).unwrap(), config, "{config}");
        }
    }

    #[test]
    fn there_is_a_way_for_somebody_to_call() {
        for text in ["[authentication]", "[authentication]\nanonymous = false", "[authentication.tokens]"] {
            let problems = problems(&format!("{ENGINE}{text}"), &[]);
            assert_eq!(problems.len(), 1, "{}", problems.join("\n"));
            assert!(problems[0].starts_with("authentication: "), "{}", problems[0]);
        }
    }

    #[test]
    fn every_problem_is_reported_with_its_path_and_without_what_may_be_a_token() {
        let text = format!(
            r#"
            [authentication]
            anonymous = "perhaps"
            certificate = "email"
            tokns = {{}}
            [authentication.tokens]
            anonymous = "{OTHER}"
            billing = ["{DIGEST}", "hush"]
            orders = []
            shipping = "{DIGEST}"
            [authentication.jwt]
            issuer = ""
            jwks_url = "http://issuer.example/keys"
            algorithms = ["RS256", "HS256", "none"]
            principal_claim = ""
            jwks_refresh = "500ms"
            isuer = "i"
            "#
        );
        let problems = problems(&format!("{ENGINE}{text}"), &[]);
        let expected = [
            "authentication.anonymous: ",
            "authentication.certificate: must be one of uri, dns, cn",
            "authentication.tokns: unknown key: did you mean tokens?",
            "authentication.tokens.anonymous: ",
            "authentication.tokens.billing[1]: ",
            "authentication.tokens.orders: ",
            "authentication.tokens.shipping[0]: ",
            "authentication.jwt.issuer: ",
            "authentication.jwt.audience: is missing",
            "authentication.jwt.jwks_url: ",
            "authentication.jwt.algorithms: names \"HS256\"",
            "authentication.jwt.algorithms: names \"none\"",
            "authentication.jwt.principal_claim: ",
            "authentication.jwt.jwks_refresh: ",
            "authentication.jwt.isuer: unknown key: did you mean issuer?",
        ];
        for expected in expected {
            let reported = problems.iter().filter(|problem| problem.starts_with(expected)).count();
            assert_eq!(reported, 1, "{expected:?} is not once among\n{}", problems.join("\n"));
        }
        assert_eq!(problems.len(), expected.len(), "{}", problems.join("\n"));
        assert!(!problems.join("\n").contains("hush"), "{}", problems.join("\n"));
    }

    #[test]
    fn where_the_keys_are_is_said_once_and_nothing_in_vain() {
        let jwt = "[authentication.jwt]\nissuer = \"i\"\naudience = \"a\"\n";
        for (keys, named) in [
            ("", "jwks_url: is missing"),
            ("jwks_url = \"https://i.example\"\njwks_file = \"k\"", "jwks_file: "),
            ("jwks_file = \"k\"\njwks_ca = \"ca.pem\"", "jwks_ca: "),
            ("jwks_url = \"http://localhost/k\"\njwks_ca = \"ca.pem\"", "jwks_ca: "),
            ("jwks_url = \"https://u:hush@i.example\"", "jwks_url: "),
            ("jwks_url = 7", "jwks_url: "),
        ] {
            let problems = problems(&format!("{ENGINE}{jwt}{keys}"), &[]);
            assert_eq!(problems.len(), 1, "{keys}: {}", problems.join("\n"));
            assert!(problems[0].starts_with(&format!("authentication.jwt.{named}")), "{keys}: {}", problems[0]);
            assert!(!problems[0].contains("hush"), "{}", problems[0]);
        }
    }
}
