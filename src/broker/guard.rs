//! Refuses SQL that would begin, end or divert the transaction behind the broker's back.
//!
//! Only the statement's leading words decide, so no quoting rule can hide them, and PostgreSQL itself refuses a second
//! statement in one Execute. Invariant: nothing PostgreSQL's parser takes for transaction control gets through; should
//! a way be found, the transaction task still sees the server idle and discards the connection.

/// What a statement's leading word says of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// SELECT, WITH, VALUES or TABLE: it reads, and may do whatever its functions do.
    Query,
    /// INSERT, UPDATE, DELETE or MERGE.
    Change,
    /// Anything else.
    Other,
}

/// The words that statements are counted by. All others are `OTHER`, so that callers make no more of them.
const OPERATIONS: [&str; 35] = [
    "ALTER",
    "ANALYZE",
    "CALL",
    "CHECKPOINT",
    "CLOSE",
    "CLUSTER",
    "COMMENT",
    "CREATE",
    "DEALLOCATE",
    "DECLARE",
    "DELETE",
    "DISCARD",
    "DO",
    "DROP",
    "EXECUTE",
    "EXPLAIN",
    "FETCH",
    "GRANT",
    "INSERT",
    "LISTEN",
    "LOCK",
    "MERGE",
    "MOVE",
    "NOTIFY",
    "PREPARE",
    "REFRESH",
    "REINDEX",
    "RESET",
    "REVOKE",
    "SET",
    "SHOW",
    "TRUNCATE",
    "UNLISTEN",
    "UPDATE",
    "VACUUM",
];

/// Tells what `sql` is and does, in a word, or what is wrong with it and which RPC to use instead.
pub(super) fn check(sql: &str) -> Result<(Kind, &'static str), String> {
    let mut tokens = Tokens(sql);
    // PostgreSQL drops empty statements: "; COMMIT" is a COMMIT.
    let Some(first) = tokens.find(|token| !matches!(token, Token::Other(';'))) else {
        return Err("holds no statement".into());
    };
    let instead = match first.keyword().as_str() {
        "BEGIN" | "START" => "a transaction begins by itself with the first Execute",
        "COMMIT" | "END" => "call Commit, or set commit on the last Execute",
        "ROLLBACK" | "ABORT" => "call Rollback",
        "SAVEPOINT" => "call CreateSavepoint",
        "RELEASE" => "call ReleaseSavepoint",
        "PREPARE" if tokens.next().is_some_and(|token| token.keyword() == "TRANSACTION") => {
            "call Commit; two-phase commit is not offered"
        }
        "COPY" => return Err("is a COPY, which Execute cannot do: use INSERT or SELECT".into()),
        "SELECT" | "WITH" | "VALUES" | "TABLE" => return Ok((Kind::Query, "SELECT")),
        "" if matches!(first, Token::Other('(')) => return Ok((Kind::Query, "SELECT")),
        word => {
            let operation = OPERATIONS.into_iter().find(|operation| *operation == word);
            let kind = match word {
                "INSERT" | "UPDATE" | "DELETE" | "MERGE" => Kind::Change,
                _ => Kind::Other,
            };
            return Ok((kind, operation.unwrap_or("OTHER")));
        }
    };
    Err(format!("{} controls the transaction: {instead}", first.keyword()))
}

/// The table that a statement is first seen to be about, as it is written. It is looked for before the first quote only,
/// behind which there may be a value.
pub(super) fn target(sql: &str) -> Option<&str> {
    let unquoted = &sql[..sql.find(['\'', '"', '$']).unwrap_or(sql.len())];
    let mut tokens = Tokens(unquoted);
    tokens.find(|token| matches!(token.keyword().as_str(), "FROM" | "INTO" | "UPDATE" | "TABLE"))?;
    let mut rest = tokens.0;
    loop {
        let start = skip_trivia(rest);
        let end = start.find(|c| !is_word(c) && c != '.').unwrap_or(start.len());
        let name = &start[..end];
        rest = &start[end..];
        // They stand before a name.
        if ["EXISTS", "IF", "LATERAL", "NOT", "ONLY"].contains(&name.to_ascii_uppercase().as_str()) {
            continue;
        }
        // One that is cut short by a quote is not all of it.
        let is_whole = !rest.is_empty() || unquoted.len() == sql.len();
        return (is_whole && name.starts_with(is_word_start)).then_some(name);
    }
}

/// A query as a part of another statement: without the empty statements before and behind it. Comments that look like the
/// end of a quoted text are left for PostgreSQL to refuse.
pub(super) fn bare(sql: &str) -> &str {
    let mut query = skip_trivia(sql);
    while let Some(rest) = query.strip_prefix(';') {
        query = skip_trivia(rest);
    }
    let is_end = |rest: &str| {
        let is_unquoted = !rest.contains(['\'', '"', '$']);
        is_unquoted && Tokens(rest).all(|token| matches!(token, Token::Other(';')))
    };
    let end = query.match_indices(';').find(|(at, _)| is_end(&query[*at..]));
    end.map_or(query, |(at, _)| &query[..at])
}

enum Token<'a> {
    /// An identifier or a keyword.
    Word(&'a str),
    /// Any other character.
    Other(char),
}

impl Token<'_> {
    fn keyword(&self) -> String {
        match self {
            Self::Word(word) => word.to_ascii_uppercase(),
            Self::Other(_) => String::new(),
        }
    }
}

/// The leading tokens of a statement, comments and space left out.
struct Tokens<'a>(&'a str);

impl<'a> Iterator for Tokens<'a> {
    type Item = Token<'a>;

    fn next(&mut self) -> Option<Token<'a>> {
        let rest = skip_trivia(self.0);
        let first = rest.chars().next()?;
        let (token, length) = if is_word_start(first) {
            let end = rest.find(|c| !is_word(c)).unwrap_or(rest.len());
            (Token::Word(&rest[..end]), end)
        } else {
            (Token::Other(first), first.len_utf8())
        };
        self.0 = &rest[length..];
        Some(token)
    }
}

fn is_word_start(c: char) -> bool {
    c.is_ascii_alphabetic() || c == '_' || !c.is_ascii()
}

fn is_word(c: char) -> bool {
    is_word_start(c) || c.is_ascii_digit() || c == '$'
}

/// What follows white space and comments, which nest as PostgreSQL's do.
fn skip_trivia(sql: &str) -> &str {
    let mut rest = sql;
    loop {
        rest = rest.trim_start_matches([' ', '\t', '\n', '\r', '\x0b', '\x0c']);
        if rest.starts_with("--") {
            rest = rest.find(['\n', '\r']).map_or("", |end| &rest[end..]);
        } else if rest.starts_with("/*") {
            rest = skip_block_comment(rest);
        } else {
            return rest;
        }
    }
}

fn skip_block_comment(sql: &str) -> &str {
    let mut depth = 0_usize;
    let mut at = 0;
    while let Some(pair) = sql.as_bytes().get(at..at + 2) {
        match pair {
            b"/*" => depth += 1,
            b"*/" => depth -= 1,
            _ => {
                at += 1;
                continue;
            }
        }
        at += 2;
        if depth == 0 {
            return &sql[at..];
        }
    }
    // Unterminated: nothing but comment is left.
    ""
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::{Kind, bare, check, target};

    #[test]
    fn a_bare_query_has_nothing_before_or_behind_it() {
        for (sql, expected) in [
            ("SELECT 1", "SELECT 1"),
            ("; -- first\n SELECT 1;;", "SELECT 1"),
            ("SELECT 1; -- note", "SELECT 1"),
            ("SELECT 1 /* ; */; /* ; */ ;", "SELECT 1 /* ; */"),
            ("SELECT ';'", "SELECT ';'"),
            ("SELECT ';-- '", "SELECT ';-- '"),
            ("SELECT $$;$$", "SELECT $$;$$"),
            ("SELECT \";\" FROM t;", "SELECT \";\" FROM t"),
        ] {
            assert_eq!(bare(sql), expected, "{sql}");
        }
    }

    #[test]
    fn transaction_control_is_refused_however_it_is_dressed() {
        for sql in [
            "COMMIT",
            "commit;",
            " \t\r\n\x0c Commit work",
            "-- note\nCOMMIT",
            "-- note\rCOMMIT",
            "/* a /* nested */ comment */COMMIT",
            ";;COMMIT",
            "; /* x */ ; -- y\n end",
            "COMMIT/**/AND/**/CHAIN",
            "COMMIT PREPARED 'x'",
            "ROLLBACK TO a",
            "ROLLBACK PREPARED 'x'",
            "abort",
            "BEGIN",
            "START TRANSACTION",
            "END",
            "SAVEPOINT a",
            "RELEASE a",
            "PREPARE/**/TRANSACTION 'x'",
            "COPY t FROM STDIN",
            "copy (select E'\\'') to stdout",
        ] {
            assert!(check(sql).is_err(), "{sql:?} was let through");
        }
    }

    #[test]
    fn statements_that_only_look_like_it_are_let_through() {
        for sql in [
            "SELECT 'COMMIT'",
            "SELECT 1 -- COMMIT",
            "PREPARE transaction_plan AS SELECT 1",
            "SELECT commit FROM \"end\"",
            "(SELECT 1)",
            "COMMITTED",
            "commit$1",
            "/* COMMIT */ SELECT 1",
            "SET TRANSACTION READ ONLY",
            "VALUES (1)",
        ] {
            assert!(check(sql).is_ok(), "{sql:?}");
        }
    }

    #[test]
    fn the_leading_word_tells_kind_and_operation() {
        for (sql, kind, operation) in [
            ("select 1", Kind::Query, "SELECT"),
            ("/* x */ ((SELECT 1))", Kind::Query, "SELECT"),
            ("With a AS (SELECT 1) INSERT INTO t TABLE a", Kind::Query, "SELECT"),
            ("merge into t", Kind::Change, "MERGE"),
            ("SET x = 1", Kind::Other, "SET"),
            ("selection", Kind::Other, "OTHER"),
        ] {
            assert_eq!(check(sql), Ok((kind, operation)), "{sql:?}");
        }
    }

    #[test]
    fn a_target_is_a_table_and_never_a_value() {
        for (sql, expected) in [
            ("SELECT a, b FROM accounts WHERE id = $1", Some("accounts")),
            ("select 1 from only shop.accounts", Some("shop.accounts")),
            ("INSERT INTO accounts (id) VALUES ('secret')", Some("accounts")),
            ("UPDATE accounts SET owner = 'secret'", Some("accounts")),
            ("DELETE FROM accounts", Some("accounts")),
            ("DROP TABLE IF EXISTS accounts", Some("accounts")),
            ("SELECT 'x from secret'", None),
            ("SELECT $$ from secret$$", None),
            ("SELECT 1 FROM \"secret\"", None),
            ("SELECT 1 FROM shop.\"secret\"", None),
            ("SELECT 1 FROM (SELECT 2)", None),
            ("SELECT extract(year FROM 20261122)", None),
            ("SELECT 1", None),
        ] {
            assert_eq!(target(sql), expected, "{sql:?}");
        }
    }

    #[test]
    fn nothing_but_comments_is_no_statement() {
        for sql in ["", "  ", ";", "-- only", "/* only */ ;", "/* open"] {
            assert_eq!(check(sql), Err("holds no statement".into()), "{sql:?}");
        }
    }

    proptest! {
        #[test]
        fn any_text_is_judged_without_panic(sql in "\\PC*|[-/*;'\"$ \\nA-Za-zé]{0,40}") {
            let _ = check(&sql);
        }

        #[test]
        fn commit_behind_any_trivia_is_refused(trivia in "([ \\t\\n;]|/\\*[a-z ]{0,5}\\*/|--[a-z ]{0,5}\\n){0,8}") {
            let sql = format!("{trivia}CoMMit");
            prop_assert!(check(&sql).is_err());
        }
    }
}
