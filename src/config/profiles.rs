//! The profiles, whose they are, and the classes of statements within them.
//!
//! Every profile takes from the default one what it does not say. Invariant: a lease that would end
//! before its time, and a class that would have more than its profile, are problems where they were written.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::{self, Display};
use std::num::NonZeroU32;
use std::ops::RangeInclusive;
use std::time::Duration;

use humantime::format_duration;

use super::EngineConfig;
use super::section::{Section, is_setting_name, key, list};
use crate::broker::grant::{Grant, Quotas};
use crate::broker::principal::Principal;
use crate::broker::profile::{Class, Limits, Profile, Profiles};
use crate::identity::Authentication;

const MILLISECOND: Duration = Duration::from_millis(1);
const DAY: Duration = Duration::from_hours(24);
const TIMES: RangeInclusive<Duration> = MILLISECOND..=DAY;
const ROWS: RangeInclusive<i64> = 1..=100_000_000;
/// Larger results belong into a stream; this bounds what one call may hold in memory.
const BYTES: RangeInclusive<i64> = 1024..=256 * 1024 * 1024;

const DEPTHS: RangeInclusive<i64> = 1..=6;

/// The longest name of a profile or a class: a word or two.
const NAME_BYTES_MAX: usize = 63;

pub(super) fn read(
    root: &mut Section<'_>,
    engines: &BTreeMap<String, EngineConfig>,
    limits: &Limits,
    authentication: &Authentication,
) -> Profiles {
    let mut section = root.section("profiles");
    let default = profile(section.section(Profiles::DEFAULT), &Profile::default(), engines);
    let mut profiles = BTreeMap::new();
    for name in section.keys() {
        check_name(&mut section, &name);
        profiles.insert(name.clone(), profile(section.section(&name), &default, engines));
    }
    profiles.insert(Profiles::DEFAULT.to_owned(), default);
    section.finish();
    let mut section = root.section("principals");
    let mut principals = BTreeMap::new();
    for name in section.keys() {
        if !Principal::is_name(&name) {
            let max = Principal::NAME_BYTES_MAX;
            section.problem(&name, &format!("must be named with 1 to {max} bytes without control characters"));
        }
        let quotas = usual_quotas(&name, limits, authentication);
        principals.insert(name.clone(), grant(section.section(&name), &profiles, quotas));
    }
    section.finish();
    Profiles { profiles, principals: principals.into_iter().collect() }
}

/// What a principal may take that is given no quotas: two fifths of all there is, so that one gone wild leaves room for two
/// others. Where nobody can say who they are, the anonymous principal is everyone, and may have all of it.
fn usual_quotas(principal: &str, limits: &Limits, authentication: &Authentication) -> Quotas {
    /// As with a pool, of the callers that may wait for it.
    const TRANSACTIONS_MAX: usize = 400;
    const LISTENERS_MAX: usize = 400;
    if principal == Principal::anonymous().name() && !authentication.names_anybody() {
        return Quotas::default();
    }
    Quotas {
        sessions_max: Some((limits.sessions_max * 2 / 5).max(1)),
        transactions_max: Some(TRANSACTIONS_MAX),
        calls_max: Some((limits.calls_max * 2 / 5).max(1)),
        // As of the listeners that an engine has.
        listeners_max: Some(LISTENERS_MAX),
        // How much a call may cost is bounded by the others; how often is the operator's to say.
        calls_per_second: None,
    }
}

/// What a principal may have.
fn grant(mut section: Section<'_>, profiles: &BTreeMap<String, Profile>, usual: Quotas) -> Grant {
    const COUNTS: RangeInclusive<i64> = 1..=10_000_000;
    let own = if section.has("profiles") { section.list("profiles") } else { Grant::default().profiles };
    if own.is_empty() {
        section.problem("profiles", "is empty: name the profiles it may ask for, its own first");
    }
    for name in own.iter().filter(|name| !profiles.contains_key(*name)) {
        section.problem("profiles", &format!("names {name:?}, which is not among the profiles"));
    }
    let admin = section.flag("admin", false);
    let mut count = |key: &str, usual: Option<usize>| section.optional_number(key, COUNTS).or(usual);
    let (sessions_max, transactions_max) =
        (count("sessions_max", usual.sessions_max), count("transactions_max", usual.transactions_max));
    let (calls_max, listeners_max) = (count("calls_max", usual.calls_max), count("listeners_max", usual.listeners_max));
    let rate: Option<u32> = section.optional_number("calls_per_second", 1..=1_000_000);
    let calls_per_second = rate.and_then(NonZeroU32::new).or(usual.calls_per_second);
    section.finish();
    Grant {
        profiles: own,
        admin,
        quotas: Quotas { sessions_max, transactions_max, calls_max, listeners_max, calls_per_second },
    }
}

fn profile(mut section: Section<'_>, base: &Profile, engines: &BTreeMap<String, EngineConfig>) -> Profile {
    // What was taken over was checked where it was written.
    let says = |section: &Section<'_>, keys: &[&str]| keys.iter().any(|key| section.has(key));
    let says_leases = says(&section, &["lease_ttl", "lease_ttl_min", "lease_ttl_max"]);
    let says_idleness = says(&section, &["session_idle_timeout", "lease_ttl_max"]);
    let mut duration = |key: &str, base: Duration| section.duration(key, base, TIMES);
    let mut profile = Profile {
        lease_ttl: duration("lease_ttl", base.lease_ttl),
        lease_ttl_min: duration("lease_ttl_min", base.lease_ttl_min),
        lease_ttl_max: duration("lease_ttl_max", base.lease_ttl_max),
        session_age_max: duration("session_age_max", base.session_age_max),
        session_idle_timeout: duration("session_idle_timeout", base.session_idle_timeout),
        idle_in_transaction_timeout: duration("idle_in_transaction_timeout", base.idle_in_transaction_timeout),
        transaction_timeout: duration("transaction_timeout", base.transaction_timeout),
        statement_timeout: duration("statement_timeout", base.statement_timeout),
        ..base.clone()
    };
    profile.disconnect_grace = section.duration("disconnect_grace", base.disconnect_grace, Duration::ZERO..=DAY);
    profile.result_rows_max = section.number("result_rows_max", base.result_rows_max, ROWS);
    profile.result_bytes_max = section.number("result_bytes_max", base.result_bytes_max, BYTES);
    profile.value_bytes_max = section.number("value_bytes_max", base.value_bytes_max, BYTES);
    profile.parameters_bytes_max = section.number("parameters_bytes_max", base.parameters_bytes_max, BYTES);
    profile.list_depth_max = section.number("list_depth_max", base.list_depth_max, DEPTHS);
    profile.session_queue_max = section.number("session_queue_max", base.session_queue_max, 1..=10_000);
    if says_leases && profile.lease_ttl_min > profile.lease_ttl_max {
        section.problem("lease_ttl_min", "is longer than lease_ttl_max");
    } else if says_leases && !(profile.lease_ttl_min..=profile.lease_ttl_max).contains(&profile.lease_ttl) {
        section.problem("lease_ttl", "must lie between lease_ttl_min and lease_ttl_max");
    }
    if says_idleness && profile.session_idle_timeout < profile.lease_ttl_max {
        section.problem("session_idle_timeout", "is shorter than lease_ttl_max: a lease would end before its time");
    }
    if section.has("engines") {
        profile.engines = section.list("engines");
        for name in profile.engines.iter().filter(|name| !engines.contains_key(*name)) {
            section.problem("engines", &format!("names {name:?}, which is not among the engines"));
        }
    }
    if section.has("connect_options") {
        let names: BTreeSet<_> = section.list("connect_options").into_iter().collect();
        for name in names.iter().filter(|name| !engines.values().any(|engine| engine.overridable.contains(*name))) {
            section.problem("connect_options", &format!("names {name:?}, which no engine has among its overridable"));
        }
        profile.connect_options = Some(names);
    }
    if section.has("roles") {
        profile.roles = section.list("roles").into_iter().collect();
        if profile.roles.iter().any(|role| role.is_empty() || role.contains(char::is_control)) {
            section.problem("roles", "must be names of roles");
        }
    }
    if section.has("settings") {
        profile.settings = section.list("settings").into_iter().collect();
        for name in profile.settings.iter().filter(|name| !is_setting_name(name)) {
            section.problem("settings", &format!("names {name:?}, which can be no run-time parameter"));
        }
    }
    if section.has("classes") {
        profile.classes = classes(section.section("classes"), &profile);
    }
    section.finish();
    profile
}

fn classes(mut section: Section<'_>, profile: &Profile) -> BTreeMap<String, Class> {
    let mut classes = BTreeMap::new();
    for name in section.keys() {
        check_name(&mut section, &name);
        classes.insert(name.clone(), class(section.section(&name), profile));
    }
    section.finish();
    classes
}

fn class(mut section: Section<'_>, profile: &Profile) -> Class {
    let class = Class {
        statement_timeout: section.optional_duration("statement_timeout", TIMES),
        result_rows_max: section.optional_number("result_rows_max", ROWS),
        result_bytes_max: section.optional_number("result_bytes_max", BYTES),
    };
    let mut exceeds = |key: &str, exceeds: bool| {
        if exceeds {
            section.problem(key, "is more than the profile's own, which bounds it: raise that one");
        }
    };
    exceeds("statement_timeout", class.statement_timeout > Some(profile.statement_timeout));
    exceeds("result_rows_max", class.result_rows_max > Some(profile.result_rows_max));
    exceeds("result_bytes_max", class.result_bytes_max > Some(profile.result_bytes_max));
    section.finish();
    class
}

fn check_name(section: &mut Section<'_>, name: &str) {
    if !(1..=NAME_BYTES_MAX).contains(&name.len()) || name.contains(char::is_control) {
        let problem = format!("must be named with 1 to {NAME_BYTES_MAX} bytes without control characters");
        section.problem(name, &problem);
    }
}

/// The profiles as TOML.
pub(super) struct Shown<'a>(pub(super) &'a Profiles);

impl Display for Shown<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Profiles { profiles, principals } = self.0;
        for (name, profile) in profiles {
            show_profile(f, &key(name), profile)?;
        }
        principals.iter().try_for_each(|(name, grant)| show_grant(f, &key(name), grant))
    }
}

fn show_grant(f: &mut fmt::Formatter<'_>, name: &str, grant: &Grant) -> fmt::Result {
    let Grant { profiles, admin, quotas } = grant;
    let Quotas { sessions_max, transactions_max, calls_max, listeners_max, calls_per_second } = quotas;
    writeln!(f, "\n[principals.{name}]\nprofiles = {profiles:?}\nadmin = {admin}")?;
    for (key, count) in [
        ("sessions_max", sessions_max),
        ("transactions_max", transactions_max),
        ("calls_max", calls_max),
        ("listeners_max", listeners_max),
    ] {
        if let Some(count) = count {
            writeln!(f, "{key} = {count}")?;
        }
    }
    calls_per_second.map_or(Ok(()), |rate| writeln!(f, "calls_per_second = {rate}"))
}

fn show_profile(f: &mut fmt::Formatter<'_>, name: &str, profile: &Profile) -> fmt::Result {
    let Profile {
        lease_ttl,
        lease_ttl_min,
        lease_ttl_max,
        session_age_max,
        session_idle_timeout,
        idle_in_transaction_timeout,
        transaction_timeout,
        statement_timeout,
        disconnect_grace,
        result_rows_max,
        result_bytes_max,
        value_bytes_max,
        parameters_bytes_max,
        list_depth_max,
        session_queue_max,
        engines,
        connect_options,
        roles,
        settings,
        classes,
    } = profile;
    writeln!(f, "\n[profiles.{name}]")?;
    for (key, value) in [
        ("lease_ttl", lease_ttl),
        ("lease_ttl_min", lease_ttl_min),
        ("lease_ttl_max", lease_ttl_max),
        ("session_age_max", session_age_max),
        ("session_idle_timeout", session_idle_timeout),
        ("idle_in_transaction_timeout", idle_in_transaction_timeout),
        ("transaction_timeout", transaction_timeout),
        ("statement_timeout", statement_timeout),
        ("disconnect_grace", disconnect_grace),
    ] {
        writeln!(f, "{key} = \"{}\"", format_duration(*value))?;
    }
    writeln!(f, "result_rows_max = {result_rows_max}\nresult_bytes_max = {result_bytes_max}")?;
    writeln!(f, "value_bytes_max = {value_bytes_max}\nparameters_bytes_max = {parameters_bytes_max}")?;
    writeln!(f, "list_depth_max = {list_depth_max}")?;
    writeln!(f, "session_queue_max = {session_queue_max}\nengines = {engines:?}")?;
    if let Some(names) = connect_options {
        writeln!(f, "connect_options = {}", list(names))?;
    }
    writeln!(f, "roles = {}\nsettings = {}", list(roles), list(settings))?;
    for (class, limits) in classes {
        let Class { statement_timeout, result_rows_max, result_bytes_max } = limits;
        writeln!(f, "\n[profiles.{name}.classes.{}]", key(class))?;
        if let Some(timeout) = statement_timeout {
            writeln!(f, "statement_timeout = \"{}\"", format_duration(*timeout))?;
        }
        if let Some(rows) = result_rows_max {
            writeln!(f, "result_rows_max = {rows}")?;
        }
        if let Some(bytes) = result_bytes_max {
            writeln!(f, "result_bytes_max = {bytes}")?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use crate::broker::principal::Principal;
    use crate::config::ConfigError;
    use crate::config::tests::{load, problems};

    const ENGINE: &str = "[engines.main]\nurl = \"postgresql://u@localhost/db\"\n";

    /// The lines of a section of what is printed.
    fn section<'a>(printed: &'a str, name: &str) -> Vec<&'a str> {
        let header = format!("[{name}]");
        let mut lines = printed.lines().skip_while(|line| *line != header);
        assert_eq!(lines.next(), Some(header.as_str()), "{printed}");
        lines.take_while(|line| !line.is_empty()).collect()
    }

    #[test]
    fn there_is_a_default_profile_whatever_is_said() {
        for text in [ENGINE.to_owned(), format!("{ENGINE}[profiles.report]")] {
            let printed = load(&text, &[]).unwrap().to_string();
            let default = section(&printed, "profiles.default");
            for line in [
                "lease_ttl = \"30s\"",
                "session_idle_timeout = \"5m\"",
                "idle_in_transaction_timeout = \"1m\"",
                "transaction_timeout = \"1m\"",
                "statement_timeout = \"30s\"",
                "disconnect_grace = \"5s\"",
            ] {
                assert!(default.contains(&line), "{line} is not in\n{printed}");
            }
        }
    }

    #[test]
    fn a_profile_takes_from_default_what_it_does_not_say() {
        let text = r#"
            [profiles.default]
            lease_ttl = "20s"
            result_rows_max = 100
            engines = ["main"]
            roles = ["reader"]
            settings = ["app.tenant"]
            [profiles.default.classes.quick]
            statement_timeout = "1s"
            [profiles.report]
            result_rows_max = 200
            disconnect_grace = "0s"
            roles = []
            [profiles.report.classes.few]
            result_rows_max = 10
            [profiles.heir]
        "#;
        let printed = load(&format!("{ENGINE}{text}"), &[]).unwrap().to_string();
        let (default, report) = (section(&printed, "profiles.default"), section(&printed, "profiles.report"));
        for line in ["lease_ttl = \"20s\"", "engines = [\"main\"]", "settings = [\"app.tenant\"]"] {
            assert!(default.contains(&line) && report.contains(&line), "{line} is not in both\n{printed}");
        }
        for line in ["result_rows_max = 200", "disconnect_grace = \"0s\"", "roles = []"] {
            assert!(report.contains(&line), "{line} is not in\n{printed}");
        }
        assert_eq!(section(&printed, "profiles.heir"), default);
        // Its classes are its own, or all of default's.
        assert_eq!(section(&printed, "profiles.heir.classes.quick"), ["statement_timeout = \"1s\""]);
        assert_eq!(section(&printed, "profiles.report.classes.few"), ["result_rows_max = 10"]);
        assert!(!printed.contains("[profiles.report.classes.quick]"), "{printed}");
    }

    #[test]
    fn the_anonymous_may_have_all_of_the_broker_only_where_all_are_anonymous() {
        let digest = format!("sha256:{}", "0".repeat(64));
        let quota = |authentication: &str| {
            let text = format!("{ENGINE}[principals.anonymous]\n[authentication]\nanonymous = true\n{authentication}");
            let grants = load(&text, &[]).unwrap().profiles.principals;
            let (_, grant) = grants.of(&Principal::anonymous()).unwrap();
            grant.quotas.calls_max
        };
        assert_eq!(quota(""), None);
        assert_eq!(quota(&format!("tokens = {{ billing = {digest:?} }}")), Some(4000));
    }

    #[test]
    fn the_order_of_profiles_in_the_file_does_not_matter() {
        let (default, report) =
            ("[profiles.default]\nlease_ttl = \"20s\"\n", "[profiles.report]\nlease_ttl_max = \"1m\"\n");
        let printed = |text: &str| load(&format!("{ENGINE}{text}"), &[]).unwrap().to_string();
        let first = printed(&format!("{default}{report}"));
        assert_eq!(printed(&format!("{report}{default}")), first);
        assert!(section(&first, "profiles.report").contains(&"lease_ttl = \"20s\""), "{first}");
    }

    #[test]
    fn profiles_and_principals_are_printed_as_they_are_read() {
        let text = r#"
            [profiles.default.classes."month's end"]
            statement_timeout = "30s"
            result_rows_max = 10000
            result_bytes_max = 3670016
            [profiles.report]
            engines = ["main"]
            session_idle_timeout = "1h"
            lease_ttl_max = "1h"
            [profiles."odd name"]
            roles = ['a "b"']
            [principals.billing]
            profiles = ["report", "default"]
            [principals."spiffe://shop/orders"]
            profiles = "odd name"
        "#;
        let config = load(&format!("{ENGINE}{text}"), &[]).unwrap();
        let printed = config.to_string();
        assert_eq!(load(&printed, &[]).unwrap(), config);
        assert!(section(&printed, "principals.billing").contains(&"profiles = [\"report\", \"default\"]"), "{printed}");
    }

    #[test]
    fn the_environment_reaches_profiles_and_principals() {
        let environment = [
            ("SESSION_BROKER__PROFILES__REPORT__LEASE_TTL", "45s"),
            ("SESSION_BROKER__PROFILES__REPORT__CLASSES__SLOW__STATEMENT_TIMEOUT", "20s"),
            ("SESSION_BROKER__PRINCIPALS__BILLING__PROFILES", "report, default"),
        ];
        let printed =
            load(&format!("{ENGINE}[profiles.report]\nlease_ttl = \"40s\""), &environment).unwrap().to_string();
        assert!(section(&printed, "profiles.report").contains(&"lease_ttl = \"45s\""), "{printed}");
        assert_eq!(section(&printed, "profiles.report.classes.slow"), ["statement_timeout = \"20s\""]);
        assert!(section(&printed, "principals.billing").contains(&"profiles = [\"report\", \"default\"]"), "{printed}");
    }

    #[test]
    fn every_problem_of_profiles_and_principals_is_reported_at_once_with_its_path() {
        let text = r#"
            [profile]
            lease_ttl = "1m"
            [profiles.default]
            statement_timeout = "10s"
            [profiles.report]
            engines = ["main", "warehouse"]
            lease_ttl = "1h"
            session_idle_timeout = "1m"
            statment_timeout = "5s"
            settings = ["no name"]
            [profiles.report.classes.slow]
            statement_timeout = "11s"
            result_rows_max = 10001
            result_bytes_max = 3670017
            lease_ttl = "1m"
            [profiles.long]
            lease_ttl_max = "10m"
            [principals.billing]
            profiles = []
            [principals.nobody]
            calls_per_second = 0
            admin = "perhaps"
            [profiles.narrow]
            connect_options = ["password"]
            [principals.shipping]
            profiles = ["report", "batch"]
            profile = "report"
        "#;
        let problems =
            problems(&format!("{ENGINE}{text}"), &[("SESSION_BROKER__PROFILES__LONG__LEASE_TTL_MIN", "soon")]);
        let expected = [
            "profile: unknown key: did you mean profiles?",
            "profiles.report.engines: ",
            "profiles.report.lease_ttl: ",
            "profiles.report.session_idle_timeout: ",
            "profiles.report.statment_timeout: unknown key: did you mean statement_timeout?",
            "profiles.report.settings: ",
            "profiles.report.classes.slow.statement_timeout: ",
            "profiles.report.classes.slow.result_rows_max: ",
            "profiles.report.classes.slow.result_bytes_max: ",
            "profiles.report.classes.slow.lease_ttl: unknown key",
            "profiles.long.lease_ttl_min: ",
            "profiles.long.session_idle_timeout: ",
            "principals.billing.profiles: ",
            "principals.nobody.calls_per_second: ",
            "principals.nobody.admin: ",
            "profiles.narrow.connect_options: ",
            "principals.shipping.profiles: ",
            "principals.shipping.profile: unknown key: did you mean profiles?",
        ];
        for expected in expected {
            let reported = problems.iter().filter(|problem| problem.starts_with(expected)).count();
            assert_eq!(reported, 1, "{expected:?} is not once among\n{}", problems.join("\n"));
        }
        assert_eq!(problems.len(), expected.len(), "{}", problems.join("\n"));
    }

    #[test]
    fn what_default_says_wrongly_is_reported_once_and_not_of_its_heirs() {
        let text = "[profiles.default]\nlease_ttl = \"soon\"\nroles = [\"\"]\n[profiles.report]\n[profiles.oltp]";
        let problems = problems(&format!("{ENGINE}{text}"), &[]);
        assert_eq!(problems.len(), 2, "{}", problems.join("\n"));
        assert!(problems.iter().all(|problem| problem.starts_with("profiles.default.")), "{}", problems.join("\n"));
    }

    #[test]
    fn a_class_may_have_all_that_its_profile_has_and_no_more() {
        let with = |timeout: &str| {
            let class = format!("[profiles.report.classes.slow]\nstatement_timeout = {timeout:?}");
            load(&format!("{ENGINE}[profiles.report]\nstatement_timeout = \"40s\"\n{class}"), &[])
        };
        with("40s").unwrap();
        let Err(ConfigError::Problems(problems)) = with("40001ms") else { panic!("it is taken") };
        assert!(problems[0].starts_with("profiles.report.classes.slow.statement_timeout: "), "{}", problems.join("\n"));
    }
}
