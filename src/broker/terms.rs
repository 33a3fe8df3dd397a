//! What a session lives by: its profile, and what its caller has asked for within it.
//!
//! Sessions that ask for nothing of their own share their terms. Invariant: terms never change; another configuration
//! makes others, for the sessions that begin after it.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use super::BeginSession;
use super::connect::ConnectOverrides;
use super::engine::{Nets, TransactionOptions};
use super::error::{Bound, Error};
use super::grant::{Grant, Grants};
use super::principal::Principal;
use super::profile::{Class, Profile, Profiles};
use super::statement::{Parameter, ResultLimits, Statement};

/// The most settings of a session, and the longest value in bytes: a tenant, a user, a locale and room to grow.
const SETTINGS_MAX: usize = 16;
const SETTING_BYTES_MAX: usize = 1024;

/// What sessions may begin by.
#[derive(Debug)]
pub(super) struct Offers {
    /// What a session gets that asks for nothing of its own, by its profile's name.
    usual: BTreeMap<String, Arc<Terms>>,
    principals: Grants,
}

/// What a session lives by.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Terms {
    pub(super) profile_name: Arc<str>,
    pub(super) profile: Arc<Profile>,
    /// How its transactions begin.
    pub(super) transaction: Arc<TransactionOptions>,
    /// What its connections are to be.
    pub(super) connect: Arc<ConnectOverrides>,
    pub(super) statement_timeout: Duration,
    pub(super) transaction_timeout: Duration,
}

impl Offers {
    /// # Panics
    /// When a principal has a profile that is not there, or none.
    pub(super) fn new(Profiles { profiles, principals }: Profiles) -> Self {
        for (_, Grant { profiles: own, .. }) in principals.iter() {
            let there = own.iter().all(|name| profiles.contains_key(name));
            assert!(!own.is_empty() && there, "the configuration names existing profiles");
        }
        let connect: Arc<ConnectOverrides> = Arc::default();
        let usual = profiles.into_iter().map(|(name, profile)| {
            let terms = Terms::new(name.as_str().into(), profile.into(), connect.clone(), &BeginSession::default());
            (name, Arc::new(terms))
        });
        Self { usual: usual.collect(), principals }
    }

    /// What the principal may have.
    pub(super) fn grant(&self, principal: &Principal) -> Result<&Arc<Grant>, Error> {
        let grant = self.principals.of(principal).map(|(_, grant)| grant);
        grant.ok_or_else(|| Error::Forbidden(format!("principal {principal} may do nothing here: it has no grant")))
    }

    /// The profiles whose sessions may have that engine, by name.
    pub(super) fn profiles_of(&self, engine: &str) -> Vec<String> {
        let offered = self.usual.iter().filter(|(_, terms)| terms.engine(engine, engine).is_ok());
        offered.map(|(name, _)| name.clone()).collect()
    }

    /// The terms of a session as asked for.
    pub(super) fn terms(&self, principal: &Principal, request: &BeginSession) -> Result<Arc<Terms>, Error> {
        let own = &self.grant(principal)?.profiles;
        let name = match request.profile.as_str() {
            "" => &own[0],
            asked => own.iter().find(|name| *name == asked).ok_or_else(|| {
                let problem = format!("is no profile of principal {principal}: use one of {}", own.join(", "));
                Error::invalid("profile", problem)
            })?,
        };
        let usual = &self.usual[name];
        let Terms { profile_name, profile, connect, .. } = &**usual;
        check(request, profile)?;
        let connect = if request.connect.is_empty() { connect.clone() } else { request.connect.clone().into() };
        let terms = Terms::new(profile_name.clone(), profile.clone(), connect, request);
        Ok(if terms == **usual { usual.clone() } else { terms.into() })
    }
}

impl Terms {
    fn new(
        profile_name: Arc<str>,
        profile: Arc<Profile>,
        connect: Arc<ConnectOverrides>,
        request: &BeginSession,
    ) -> Self {
        let statement_timeout = request.statement_timeout.unwrap_or(profile.statement_timeout);
        let transaction_timeout = request.transaction_timeout.unwrap_or(profile.transaction_timeout);
        let transaction = TransactionOptions {
            isolation_level: request.isolation_level,
            read_only: request.read_only.then_some(true),
            deferrable: request.deferrable.then_some(true),
            lock_timeout: request.lock_timeout,
            role: request.role.clone(),
            settings: request.settings.clone(),
            nets: Nets::under(statement_timeout, transaction_timeout),
        };
        Self { profile_name, profile, transaction: transaction.into(), connect, statement_timeout, transaction_timeout }
    }

    /// The lease granted.
    pub(super) fn lease_ttl(&self, asked: Option<Duration>) -> Result<Duration, Error> {
        /// No profile grants more: who asks for it has mistaken the unit.
        const MAX: Duration = Duration::from_hours(24);
        match asked {
            None => Ok(self.profile.lease_ttl),
            Some(Duration::ZERO) => Err(Error::invalid("lease_ttl", "must be positive: leave it out for the default")),
            Some(asked) if asked > MAX => Err(Error::invalid("lease_ttl", "is longer than 24h: give seconds")),
            Some(asked) => Ok(asked.clamp(self.profile.lease_ttl_min, self.profile.lease_ttl_max)),
        }
    }

    /// The engine's name, of one that a session may have.
    pub(super) fn engine<'a>(&'a self, asked: &'a str, default: &'a str) -> Result<&'a str, Error> {
        let own = &self.profile.engines;
        let may_have = |engine: &str| own.is_empty() || own.iter().any(|own| own == engine);
        match asked {
            "" if may_have(default) => Ok(default),
            "" => Ok(&own[0]),
            asked if may_have(asked) => Ok(asked),
            _ => {
                let problem = format!("is none of profile {}'s: use one of {}", self.profile_name, own.join(", "));
                Err(Error::invalid("engine", problem))
            }
        }
    }

    /// The class of that name.
    pub(super) fn class(&self, name: &str) -> Result<Class, Error> {
        self.profile.classes.get(name).copied().ok_or_else(|| {
            let known: Vec<_> = self.profile.classes.keys().map(String::as_str).collect();
            let instead = match known[..] {
                [] => "it has none: leave it out".to_owned(),
                _ => format!("use one of {}", known.join(", ")),
            };
            Error::invalid("class", format!("is no class of profile {}: {instead}", self.profile_name))
        })
    }

    /// How large a result of that class may be.
    pub(super) fn result_limits(&self, class: Class, rows_max: Option<u64>) -> ResultLimits {
        let Profile { result_rows_max, result_bytes_max, value_bytes_max, .. } = *self.profile;
        ResultLimits {
            rows_max: [rows_max, class.result_rows_max].into_iter().flatten().fold(result_rows_max, u64::min),
            bytes_max: class.result_bytes_max.unwrap_or(usize::MAX).min(result_bytes_max),
            value_bytes_max,
        }
    }

    /// How large what is passed on as it comes may be; no class narrows it.
    pub(super) fn stream_limits(&self, _class: Class, rows_max: Option<u64>) -> ResultLimits {
        let Profile { result_bytes_max, value_bytes_max, .. } = *self.profile;
        ResultLimits { rows_max: rows_max.unwrap_or(u64::MAX), bytes_max: result_bytes_max, value_bytes_max }
    }

    /// Says what is too large or too deep in what statements bring, and which statement's it is.
    pub(super) fn check_parameters(&self, statements: &[Statement]) -> Result<(), (usize, Error)> {
        let Profile { parameters_bytes_max, value_bytes_max, list_depth_max, .. } = *self.profile;
        let mut bytes: usize = 0;
        for (index, statement) in statements.iter().enumerate() {
            for (number, Parameter { value, .. }) in statement.parameters().iter().enumerate() {
                let invalid = |problem| (index, Error::invalid(format!("parameters[{number}].value"), problem));
                let value_bytes = value.data_len();
                if value_bytes > value_bytes_max {
                    let limit = format!("the profile's value_bytes_max is {value_bytes_max}");
                    return Err(invalid(format!("takes {value_bytes} bytes, {limit}: split it")));
                }
                if value.list_depth() > list_depth_max {
                    let limit = format!("the profile's list_depth_max is {list_depth_max}");
                    return Err(invalid(format!("nests lists {} deep, {limit}", value.list_depth())));
                }
                bytes += value_bytes;
            }
            if bytes > parameters_bytes_max {
                let limit = format!("the profile's parameters_bytes_max is {parameters_bytes_max}");
                let problem = format!("take {bytes} bytes with those before, {limit}: use more calls, or CopyIn");
                return Err((index, Error::invalid("parameters", problem)));
            }
        }
        Ok(())
    }

    /// The longest a statement of that class may run, and which limit says so.
    pub(super) fn statement_timeout(&self, class: Class, asked: Option<Duration>) -> (Duration, Bound) {
        let mut shortest = (self.profile.statement_timeout, Bound::Profile);
        for (timeout, bound) in [
            (Some(self.statement_timeout), Bound::StatementTimeout),
            (class.statement_timeout, Bound::Class),
            (asked, Bound::Request),
        ] {
            if let Some(timeout) = timeout.filter(|timeout| *timeout < shortest.0) {
                shortest = (timeout, bound);
            }
        }
        shortest
    }
}

/// Says what is wrong with what a caller asks for.
fn check(request: &BeginSession, profile: &Profile) -> Result<(), Error> {
    const LOCK_TIMEOUT_MAX: Duration = Duration::from_hours(24);
    within("options.statement_timeout", request.statement_timeout, profile.statement_timeout)?;
    within("options.transaction_timeout", request.transaction_timeout, profile.transaction_timeout)?;
    within("options.lock_timeout", request.lock_timeout, LOCK_TIMEOUT_MAX)?;
    check_connect_options(&request.connect, profile.connect_options.as_ref())?;
    check_role(request.role.as_deref(), &profile.roles)?;
    check_settings(&request.settings, &profile.settings)
}

fn within(field: &str, asked: Option<Duration>, max: Duration) -> Result<(), Error> {
    match asked {
        Some(asked) if asked < Duration::from_millis(1) || asked > max => {
            let max = humantime::format_duration(max);
            Err(Error::invalid(field, format!("must lie between 1ms and {max}")))
        }
        _ => Ok(()),
    }
}

fn check_connect_options(asked: &ConnectOverrides, allowed: Option<&BTreeSet<String>>) -> Result<(), Error> {
    match asked.names().find(|name| allowed.is_some_and(|allowed| !allowed.contains(name))) {
        None => Ok(()),
        Some(name) => {
            let problem = "is not among the profile's connect_options: leave it out";
            Err(Error::invalid(format!("connect_options.{name}"), problem))
        }
    }
}

fn check_role(role: Option<&str>, allowed: &BTreeSet<String>) -> Result<(), Error> {
    match role {
        Some(role) if !allowed.contains(role) => {
            Err(Error::invalid("options.role", "is not among the profile's roles: leave it out for the login role"))
        }
        _ => Ok(()),
    }
}

fn check_settings(settings: &BTreeMap<String, String>, allowed: &BTreeSet<String>) -> Result<(), Error> {
    const FIELD: &str = "options.settings";
    if settings.len() > SETTINGS_MAX {
        return Err(Error::invalid(FIELD, format!("are {}, the limit is {SETTINGS_MAX}", settings.len())));
    }
    for (name, value) in settings {
        if !allowed.contains(name) {
            return Err(Error::invalid(FIELD, "name one that is not among the profile's settings: leave it out"));
        }
        if value.len() > SETTING_BYTES_MAX || value.contains(char::is_control) {
            let problem = format!("{name} must be up to {SETTING_BYTES_MAX} bytes without control characters");
            return Err(Error::invalid(FIELD, problem));
        }
    }
    Ok(())
}
