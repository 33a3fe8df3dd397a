//! Values, both ways, against what psql prints for the same.

use session_broker::grpc::pb;

use crate::support::{Broker, Database, Session, first_row, int, text};
use pb::value::Kind;

/// A type, and literals of it from its middle and its edges.
const VALUES: [(&str, &[&str]); 20] = [
    ("bool", &["true", "false"]),
    ("int2", &["-32768", "0", "32767"]),
    ("int4", &["-2147483648", "0", "2147483647"]),
    ("int8", &["-9223372036854775808", "0", "9223372036854775807"]),
    ("oid", &["0", "4294967295"]),
    ("float4", &["0", "-0", "1.5", "3.4028235e+38", "1e-45", "NaN", "Infinity", "-Infinity"]),
    ("float8", &["0", "-0", "0.1", "1.7976931348623157e+308", "5e-324", "NaN", "Infinity", "-Infinity"]),
    (
        "numeric",
        &[
            "0",
            "0.00",
            "-1.50",
            "1e-400",
            "1e400",
            "123456789012345678901234567890.000000001",
            "NaN",
            "Infinity",
            "-Infinity",
        ],
    ),
    ("text", &["", "plain", "üñí 𝄞 \"q\" \\ {a,b}", "NULL"]),
    ("varchar(5)", &["abc"]),
    ("char(5)", &["ab   "]),
    ("name", &["pg_class"]),
    ("uuid", &["00112233-4455-6677-8899-aabbccddeeff"]),
    ("json", &["{\"a\" :  [1, null]}", "\"x\""]),
    ("jsonb", &["{\"a\": [1, null]}", "null"]),
    ("date", &["2026-11-22", "4714-11-24 BC", "5874897-12-31", "infinity", "-infinity"]),
    ("time", &["00:00:00", "10:11:12.5", "24:00:00"]),
    (
        "timestamp",
        &["2026-11-22 10:00:00.5", "4714-11-24 00:00:00 BC", "294276-12-31 23:59:59.999999", "infinity", "-infinity"],
    ),
    ("timestamptz", &["2026-11-22 10:00:00.000001+00", "0044-03-15 00:00:00+00 BC", "infinity", "-infinity"]),
    ("interval", &["1 mon 2 days 03:04:05", "-1 years +2 days -00:00:00.5", "00:00:00", "178000000 years"]),
];

/// A value as psql would print it, so that the two can be compared.
fn printed(kind: &Kind) -> String {
    match kind {
        Kind::NullValue(_) => "NULL".into(),
        Kind::BoolValue(value) => value.to_string(),
        Kind::IntValue(value) => value.to_string(),
        Kind::DoubleValue(value) => format!("{value:?}"),
        Kind::StringValue(value) => value.clone(),
        Kind::BytesValue(value) => value.iter().fold("\\x".into(), |hex, byte| format!("{hex}{byte:02x}")),
        Kind::ListValue(_) => panic!("arrays are compared by their elements"),
    }
}

/// What psql prints, with the spellings of Rust's numbers.
fn witness(type_name: &str, psql: &str) -> String {
    match type_name {
        // The broker carries a float4 as the float8 of the same value.
        "float4" => psql.parse().map_or_else(|_| psql.into(), |value: f32| format!("{:?}", f64::from(value))),
        "float8" => psql.parse().map_or_else(|_| psql.into(), |value: f64| format!("{value:?}")),
        _ => psql.into(),
    }
}

pub(crate) fn quoted(literal: &str) -> String {
    format!("'{}'", literal.replace('\'', "''"))
}

#[tokio::test(flavor = "multi_thread")]
async fn every_value_comes_out_as_psql_prints_it_and_goes_back_in() {
    let database = Database::create();
    let broker = Broker::start(&database).await;
    let session = broker.session().await;
    for (type_name, literals) in VALUES {
        for literal in literals {
            let value = format!("{}::{type_name}", quoted(literal));
            let out = session.execute(&format!("SELECT {value}")).await.unwrap();
            let kind = first_row(&out).remove(0);
            // A cast to text drops a bpchar's padding, which psql's own output keeps.
            let psql = database.psql(&format!(
                "SELECT {}",
                if type_name == "bool" { format!("{value}::text") } else { value.clone() }
            ));
            assert_eq!(printed(&kind), witness(type_name, &psql), "{value}");
            // Back in, in its own kind and in PostgreSQL's text form, it is the same value to PostgreSQL.
            for parameter in [kind.clone(), text(&psql)] {
                let same = format!("SELECT $1::{type_name}::text IS NOT DISTINCT FROM {value}::text");
                let back = session.run(session.statement(&same, vec![parameter])).await.unwrap();
                assert_eq!(first_row(&back), [Kind::BoolValue(true)], "{value}");
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn arrays_of_every_type_come_out_and_go_back_in() {
    let database = Database::create();
    let broker = Broker::start(&database).await;
    let session = broker.session().await;
    for (type_name, literals) in VALUES {
        let elements: Vec<_> = literals.iter().map(|literal| quoted(literal)).collect();
        let array = format!("ARRAY[{}, NULL]::{type_name}[]", elements.join(", "));
        let out = session.execute(&format!("SELECT {array}")).await.unwrap();
        let Kind::ListValue(list) = first_row(&out).remove(0) else { panic!("{array} is no list") };
        assert!(list.lower_bounds.is_empty());
        for (value, literal) in list.values.iter().zip(literals.iter()) {
            let alone = session.execute(&format!("SELECT {}::{type_name}", quoted(literal))).await.unwrap();
            let alone = first_row(&alone).remove(0);
            assert_eq!(printed(value.kind.as_ref().unwrap()), printed(&alone), "{array}");
        }
        assert_eq!(list.values.len(), literals.len() + 1);
        assert_eq!(list.values.last().unwrap().kind, Some(Kind::NullValue(0)));
        let same = format!("SELECT $1::{type_name}[]::text IS NOT DISTINCT FROM {array}::text");
        let back = session.run(session.statement(&same, vec![Kind::ListValue(list)])).await.unwrap();
        assert_eq!(first_row(&back), [Kind::BoolValue(true)], "{array}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn array_bounds_and_emptiness_are_kept() {
    let database = Database::create();
    let broker = Broker::start(&database).await;
    let session = broker.session().await;
    for (array, bounds, count) in [("[-1:1]={1,2,3}", vec![-1], 3), ("{}", vec![], 0), ("[1:2]={1,2}", vec![], 2)] {
        let out = session.execute(&format!("SELECT '{array}'::int4[]")).await.unwrap();
        let Kind::ListValue(list) = first_row(&out).remove(0) else { panic!("no list") };
        assert_eq!((list.lower_bounds.clone(), list.values.len()), (bounds, count));
        let same = format!("SELECT $1::int4[] = '{array}'::int4[]");
        let back = session.run(session.statement(&same, vec![Kind::ListValue(list)])).await.unwrap();
        assert_eq!(first_row(&back), [Kind::BoolValue(true)]);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn bytea_enums_domains_nulls_and_void_are_carried() {
    let database = Database::create();
    database.psql("CREATE TYPE mood AS ENUM ('sad', 'happy'); CREATE DOMAIN small AS int2 CHECK (VALUE < 10)");
    let broker = Broker::start(&database).await;
    let session = broker.session().await;
    let all: Vec<u8> = (0..=255).collect();
    let bytes = Kind::BytesValue(all.into());
    let sql = "SELECT $1::bytea, $2::mood, $3::small, $4::text, pg_sleep(0), 'x', ARRAY['happy'::mood]";
    let parameters = vec![bytes.clone(), text("happy"), int(9), Kind::NullValue(0)];
    // Twice, and in two transactions: type look-ups are kept by the connection, across its reset.
    for _ in 0..2 {
        let row = first_row(&session.run(session.statement(sql, parameters.clone())).await.unwrap());
        assert_eq!(row[..6], [bytes.clone(), text("happy"), int(9), Kind::NullValue(0), text(""), text("x")]);
        let Kind::ListValue(list) = &row[6] else { panic!("no list") };
        assert_eq!(list.values[0].kind, Some(text("happy")));
        session.commit().await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn random_numbers_and_moments_match_psql() {
    let database = Database::create();
    let broker = Broker::start(&database).await;
    let session = broker.session().await;
    // The seed makes both sides compute the same rows.
    let sql = "SELECT setseed(0.42) IS NULL, n, ((random() - 0.5) * 10 ^ (random() * 300))::float8 AS f, \
         ((random() - 0.5) * 1e15)::numeric * 10::numeric ^ (random() * 40 - 20)::int AS d, \
         '0001-01-01'::timestamptz + random() * interval '200000 years' AS t, \
         (random() * 1000)::int * interval '1 month' - random() * interval '9999 days' AS i, \
         md5(random()::text)::uuid AS u, decode(md5(random()::text), 'hex') AS b FROM generate_series(1, 500) n";
    let ours = session.execute(sql).await.unwrap();
    let psql = database.psql(sql);
    let witness: Vec<Vec<&str>> = psql.lines().map(|line| line.split('|').collect()).collect();
    assert_eq!(ours.rows.len(), witness.len());
    for (row, line) in ours.rows.iter().zip(&witness) {
        for (value, psql) in row.values[2..].iter().zip(&line[2..]) {
            match value.kind.as_ref().unwrap() {
                Kind::DoubleValue(value) => assert_eq!(psql.parse(), Ok(*value)),
                kind => assert_eq!(printed(kind), *psql),
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_parameter_can_name_the_type_that_postgresql_cannot_infer() {
    let database = Database::create();
    let broker = Broker::start(&database).await;
    let session = broker.session().await;
    let typed = async |session: &Session, parameters: Vec<(Kind, &str)>, sql: &str| {
        let parameters = parameters
            .into_iter()
            .map(|(kind, name)| pb::Parameter { value: Some(pb::Value { kind: Some(kind) }), r#type: name.into() })
            .collect();
        let request = pb::ExecuteRequest { parameters, ..session.statement(sql, vec![]) };
        first_row(&session.run(request).await.unwrap())
    };
    let sql = "SELECT pg_typeof($1)::text, $2 + 1, pg_typeof($3)::text";
    let list = Kind::ListValue(pb::ListValue { values: vec![], lower_bounds: vec![] });
    let row = typed(
        &session,
        vec![(text("00112233-4455-6677-8899-aabbccddeeff"), "uuid"), (int(1), ""), (list, "int4[]")],
        sql,
    );
    assert_eq!(row.await, [text("uuid"), int(2), text("integer[]")]);
}

#[tokio::test(flavor = "multi_thread")]
async fn columns_and_tags_are_postgresqls_own() {
    let database = Database::create();
    let broker = Broker::start(&database).await;
    let session = broker.session().await;
    let oid: u32 = database.psql("SELECT 'accounts'::regclass::oid").parse().unwrap();
    let result =
        session.execute("SELECT balance, balance + 1 AS balance, 'x'::varchar(7) FROM accounts").await.unwrap();
    let columns: Vec<_> = result
        .columns
        .iter()
        .map(|c| (c.name.as_str(), c.type_name.as_str(), c.type_oid, c.type_modifier, c.table_oid, c.column_number))
        .collect();
    let expected = [
        ("balance", "numeric", 1700, -1, oid, 2),
        ("balance", "numeric", 1700, -1, 0, 0),
        ("varchar", "varchar", 1043, 11, 0, 0),
    ];
    assert_eq!(columns, expected);
    for (sql, tag, rows, count) in [
        ("CREATE TEMP TABLE t (n int)", "CREATE TABLE", 0, 0),
        ("INSERT INTO t SELECT generate_series(1, 3) RETURNING n", "INSERT 0 3", 3, 3),
        ("UPDATE t SET n = n WHERE n > 1", "UPDATE 2", 0, 2),
        ("DELETE FROM t", "DELETE 3", 0, 3),
        ("SELECT FROM generate_series(1, 4)", "SELECT 4", 4, 4),
        ("SET LOCAL work_mem = '1MB'", "SET", 0, 0),
        ("SHOW work_mem", "SHOW", 1, 1),
    ] {
        let result = session.execute(sql).await.unwrap();
        assert_eq!((result.command_tag.as_str(), result.rows.len(), result.row_count), (tag, rows, count), "{sql}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_statement_that_changes_the_encoding_fails_its_transaction() {
    let database = Database::create();
    let broker = Broker::start(&database).await;
    let session = broker.session().await;
    for sql in ["SET client_encoding = 'LATIN1'", "SELECT set_config('client_encoding', 'LATIN1', true)"] {
        session.execute("UPDATE accounts SET balance = 7").await.unwrap();
        let failure = session.execute(sql).await.unwrap_err();
        assert_eq!(failure.reason, "RESULT_UNRETURNABLE");
        assert_eq!(failure.transaction_state(), pb::TransactionState::Failed);
        session.rollback().await.unwrap();
        let result = session.execute_and_commit("SELECT 'é'").await.unwrap();
        assert_eq!(first_row(&result), [text("é")]);
    }
    assert_eq!(database.balances(), "100 100");
}
