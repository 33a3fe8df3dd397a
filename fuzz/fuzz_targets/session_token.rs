//! Session tokens and ids: what is read is written the same.

#![no_main]

use libfuzzer_sys::fuzz_target;
use session_broker::broker::token::{SessionId, SessionToken};

fuzz_target!(|text: &str| {
    if let Ok(token) = SessionToken::parse(text) {
        assert_eq!(token.expose(), text);
    }
    if let Some(id) = SessionId::parse(text) {
        assert_eq!(id.to_string(), text);
    }
});
