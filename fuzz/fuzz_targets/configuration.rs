//! The configuration, given any variables: it loads and prints what loads again, or has problems.

#![no_main]

use libfuzzer_sys::fuzz_target;
use session_broker::config::Config;

fuzz_target!(|variables: Vec<(&str, &str)>| {
    let environment = variables.into_iter().map(|(name, value)| (format!("SESSION_BROKER__{name}"), value.to_owned()));
    if let Ok(config) = Config::load(None, environment) {
        let _ = config.to_string();
    }
});
