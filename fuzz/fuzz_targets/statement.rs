//! The guard against transaction control, given any SQL.

#![no_main]

use libfuzzer_sys::fuzz_target;
use session_broker::broker::bulk::Source;
use session_broker::broker::statement::Statement;

fuzz_target!(|sql: &str| {
    let _ = Statement::new(sql.to_owned(), Vec::new());
    let _ = Source::query(sql);
});
