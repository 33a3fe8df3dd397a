//! What a principal may do, and why: for operators that wonder.
//!
//! Decides nothing: it tells what the configuration decides. Invariant: it is shown no secret, so it shows none.

use std::collections::BTreeSet;
use std::fmt::{self, Display, Formatter};

use super::section::key;
use super::{Config, EngineConfig};
use crate::broker::grant::{Grant, Quotas};
use crate::broker::principal::Principal;
use crate::broker::profile::Profile;
use crate::identity::CertificateName;

/// What a principal may do by a configuration.
#[derive(Debug)]
pub struct Explained<'a> {
    config: &'a Config,
    principal: Principal,
}

impl Config {
    /// Explains what the principal of that name may do.
    pub fn explain(&self, principal: &str) -> Explained<'_> {
        Explained { config: self, principal: Principal::new(principal) }
    }
}

impl Display for Explained<'_> {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let Self { config, principal } = self;
        writeln!(f, "principal {principal}")?;
        let proofs = self.proofs();
        match proofs[..] {
            [] => writeln!(f, "  cannot prove who it is: nothing in [authentication] can name it")?,
            _ => writeln!(f, "  is who shows {}", proofs.join(", or "))?,
        }
        let Some((name, grant)) = config.profiles.principals.of(principal) else {
            let own = key(principal.name());
            return writeln!(f, "  may do nothing: there is neither [principals.{own}] nor a pattern that it meets");
        };
        writeln!(f, "  may do what [principals.{}] grants:", key(name))?;
        let Grant { profiles, admin, quotas } = &**grant;
        let may = if *admin { "yes" } else { "no: admin is false" };
        writeln!(f, "    operators' calls: {may}")?;
        show_quotas(f, quotas)?;
        for (index, name) in profiles.iter().enumerate() {
            let usual = if index == 0 { ", its own when it asks for none" } else { "" };
            writeln!(f, "    profile {name}{usual}:")?;
            self.show_profile(f, &config.profiles.profiles[name])?;
        }
        for name in config.profiles.profiles.keys().filter(|name| !profiles.contains(name)) {
            writeln!(f, "    profile {name}: no: it is not among its profiles")?;
        }
        for name in config.engines.keys().filter(|engine| !self.may_have(engine, profiles)) {
            writeln!(f, "    engine {name}: no: it is among the engines of none of its profiles")?;
        }
        Ok(())
    }
}

impl Explained<'_> {
    /// By what its caller can be believed to be it.
    fn proofs(&self) -> Vec<String> {
        let authentication = &self.config.authentication;
        if self.principal == Principal::anonymous() {
            return authentication.anonymous.then(|| "nothing".to_owned()).into_iter().collect();
        }
        let name = self.principal.name();
        let tokens = authentication.tokens.get(name).map_or(0, Vec::len);
        let token = (tokens > 0).then(|| format!("one of its {tokens} static tokens"));
        let jwt = authentication.jwt.as_ref().map(|jwt| {
            let (claim, issuer, audience) = (&jwt.principal_claim, &jwt.issuer, &jwt.audience);
            format!("a JWT of {issuer} for {audience} with {name:?} as its {claim}")
        });
        let certificate = authentication.certificate.map(|part| {
            let part = match part {
                CertificateName::Uri => "URI",
                CertificateName::Dns => "DNS name",
                CertificateName::CommonName => "common name",
            };
            format!("a client certificate with {name:?} as its {part}")
        });
        [token, jwt, certificate].into_iter().flatten().collect()
    }

    fn may_have(&self, engine: &str, profiles: &[String]) -> bool {
        profiles.iter().any(|name| has_engine(&self.config.profiles.profiles[name], engine))
    }

    fn show_profile(&self, f: &mut Formatter<'_>, profile: &Profile) -> fmt::Result {
        for (name, EngineConfig { overridable, .. }) in &self.config.engines {
            if !has_engine(profile, name) {
                continue;
            }
            let allowed = |option: &&String| profile.connect_options.as_ref().is_none_or(|own| own.contains(*option));
            let options: BTreeSet<_> = overridable.iter().filter(allowed).cloned().collect();
            writeln!(f, "      engine {name}, with connection options of its own: {}", words(&options))?;
        }
        writeln!(f, "      roles: {}\n      settings: {}", words(&profile.roles), words(&profile.settings))
    }
}

fn has_engine(profile: &Profile, engine: &str) -> bool {
    profile.engines.is_empty() || profile.engines.iter().any(|own| own == engine)
}

fn show_quotas(f: &mut Formatter<'_>, quotas: &Quotas) -> fmt::Result {
    let Quotas { sessions_max, transactions_max, calls_max, listeners_max, calls_per_second } = quotas;
    let count = |count: &Option<usize>| count.map_or_else(|| "as many as there are".to_owned(), |max| max.to_string());
    writeln!(f, "    sessions: {}", count(sessions_max))?;
    writeln!(f, "    open transactions: {}", count(transactions_max))?;
    writeln!(f, "    calls at work: {}", count(calls_max))?;
    writeln!(f, "    listeners: {}", count(listeners_max))?;
    let rate = calls_per_second.map_or_else(|| "no limit".to_owned(), |rate| rate.to_string());
    writeln!(f, "    calls a second: {rate}")
}

fn words(words: &BTreeSet<String>) -> String {
    if words.is_empty() { "none".into() } else { words.iter().map(String::as_str).collect::<Vec<_>>().join(", ") }
}

#[cfg(test)]
mod tests {
    use crate::config::tests::load;

    const TEXT: &str = r#"
        default_engine = "main"
        [engines.main]
        url = "postgresql://u:hush@localhost/db"
        overridable = ["application_name", "search_path"]
        [engines.warehouse]
        url = "postgresql://u:hush@localhost/warehouse"
        [profiles.report]
        engines = ["main"]
        connect_options = ["search_path"]
        roles = ["reader"]
        [principals.billing]
        profiles = ["report"]
        calls_per_second = 50
        [principals."ops/*"]
        admin = true
        [tls]
        certificate = "a"
        key = "b"
        client_ca = "c"
        [authentication]
        certificate = "cn"
        [authentication.tokens]
        billing = "sha256:0000000000000000000000000000000000000000000000000000000000000000"
    "#;

    fn explained(principal: &str) -> String {
        load(TEXT, &[]).unwrap().explain(principal).to_string()
    }

    #[test]
    fn it_is_told_what_a_principal_may_do_and_why_not_what_it_may_not() {
        let billing = explained("billing");
        for line in [
            "one of its 1 static tokens, or a client certificate with \"billing\" as its common name",
            "may do what [principals.billing] grants:",
            "operators' calls: no: admin is false",
            "sessions: 40000",
            "calls a second: 50",
            "profile report, its own when it asks for none:",
            "engine main, with connection options of its own: search_path\n",
            "roles: reader",
            "settings: none",
            "profile default: no: it is not among its profiles",
            "engine warehouse: no: it is among the engines of none of its profiles",
        ] {
            assert!(billing.contains(line), "{line:?} is not in\n{billing}");
        }
        assert!(!billing.contains("hush") && !billing.contains("sha256"), "{billing}");
    }

    #[test]
    fn a_pattern_is_named_and_nobody_is_told_that_it_may_do_nothing() {
        let operator = explained("ops/anna");
        assert!(
            operator.contains("[principals.\"ops/*\"]") && operator.contains("operators' calls: yes"),
            "{operator}"
        );
        assert!(explained("shipping").contains("may do nothing"), "{}", explained("shipping"));
        let anonymous = explained("anonymous");
        assert!(anonymous.contains("cannot prove who it is") && anonymous.contains("may do nothing"), "{anonymous}");
    }
}
