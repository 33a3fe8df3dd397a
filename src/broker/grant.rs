//! What a principal may have: profiles, how much of the broker, and an operator's calls.
//!
//! Invariant: who is named by no grant may do nothing.

use std::collections::BTreeMap;
use std::num::NonZeroU32;
use std::sync::Arc;

use super::principal::Principal;
use super::profile::Profiles;

/// What behind a name stands for any end of it.
const ANY_END: char = '*';

/// Whose what is: by a principal's name, or by the beginning of names, `spiffe://shop/*`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Grants(BTreeMap<String, Arc<Grant>>);

/// What a principal may have.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Grant {
    /// The profiles that it may ask for, never none, the first when it asks for none.
    pub profiles: Vec<String>,
    /// Whether it may make an operator's calls.
    pub admin: bool,
    /// How much of the broker it may take.
    pub quotas: Quotas,
}

/// How much of the broker a principal may take at a time. `None`: as much as there is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Quotas {
    /// Live sessions.
    pub sessions_max: Option<usize>,
    /// Open transactions, and those that wait for a connection.
    pub transactions_max: Option<usize>,
    /// Calls until their answer has been taken; a stream until it begins.
    pub calls_max: Option<usize>,
    /// Open streams of notifications.
    pub listeners_max: Option<usize>,
    /// Calls a second, a second's worth of which may come at once.
    pub calls_per_second: Option<NonZeroU32>,
}

impl Default for Grant {
    fn default() -> Self {
        Self { profiles: vec![Profiles::DEFAULT.to_owned()], admin: false, quotas: Quotas::default() }
    }
}

impl Grants {
    /// For everybody, anonymous or not.
    pub fn for_everybody(grant: Grant) -> Self {
        let grant = Arc::new(grant);
        let anonymous = Principal::anonymous().name().to_owned();
        Self([(anonymous, grant.clone()), (ANY_END.to_string(), grant)].into())
    }

    /// The principal's, and the name it stands under: its own, or the longest beginning of it. The anonymous principal has
    /// only what stands under its own name: a beginning is for those who prove who they are.
    pub fn of(&self, principal: &Principal) -> Option<(&str, &Arc<Grant>)> {
        let name = principal.name();
        let exact = self.0.get_key_value(name).filter(|(name, _)| !name.ends_with(ANY_END));
        let pattern = || {
            let fits =
                |pattern: &str| pattern.strip_suffix(ANY_END).is_some_and(|beginning| name.starts_with(beginning));
            let fitting = self.0.iter().filter(|(pattern, _)| *principal != Principal::anonymous() && fits(pattern));
            fitting.max_by_key(|(pattern, _)| pattern.len())
        };
        exact.or_else(pattern).map(|(name, grant)| (name.as_str(), grant))
    }

    /// All, by name.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Grant)> {
        self.0.iter().map(|(name, grant)| (name.as_str(), &**grant))
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl FromIterator<(String, Grant)> for Grants {
    fn from_iter<I: IntoIterator<Item = (String, Grant)>>(grants: I) -> Self {
        Self(grants.into_iter().map(|(name, grant)| (name, Arc::new(grant))).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_own_name_goes_before_the_longest_beginning_and_nobody_else_has_anything() {
        let names = ["billing", "spiffe://shop/*", "spiffe://shop/orders*", "spiffe://shop/orders", "*x"];
        let grants: Grants = names.map(|name| (name.to_owned(), Grant::default())).into_iter().collect();
        for (principal, expected) in [
            ("billing", Some("billing")),
            ("billing2", None),
            ("spiffe://shop/orders", Some("spiffe://shop/orders")),
            ("spiffe://shop/orders2", Some("spiffe://shop/orders*")),
            ("spiffe://shop/", Some("spiffe://shop/*")),
            ("spiffe://shop", None),
            // No name is a pattern, and a star elsewhere is a star.
            ("spiffe://shop/*", Some("spiffe://shop/*")),
            ("ax", None),
            ("*x", Some("*x")),
            ("anonymous", None),
            ("", None),
        ] {
            let found = grants.of(&Principal::new(principal)).map(|(name, _)| name);
            assert_eq!(found, expected, "{principal:?}");
        }
    }

    #[test]
    fn a_beginning_is_not_for_the_anonymous() {
        let any: Grants = [("*".to_owned(), Grant::default())].into_iter().collect();
        assert!(any.of(&Principal::anonymous()).is_none());
        assert!(any.of(&Principal::new("billing")).is_some());
        assert!(Grants::for_everybody(Grant::default()).of(&Principal::anonymous()).is_some());
    }
}
