//! Every type PostgreSQL has, both ways: what comes out is what psql prints, and goes back in as the same value.
//!
//! Edges are in [`TYPES`]; what lies between them is generated.

use proptest::prelude::{BoxedStrategy, Just, Strategy, any, prop};
use proptest::prop_oneof;
use proptest::test_runner::{Config, TestRunner};
use session_broker::grpc::pb;
use tonic::Code;

use crate::support::{Broker, Database, Session, bounded, first_row, int, kinds_of, list, null, text, typed};
use crate::values::quoted;
use Travels::{Bool, Bytes, Double, Int, Text};
use pb::TransactionState;
use pb::value::Kind;

/// The kind that a type's values travel in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Travels {
    Bool,
    Int,
    Double,
    Text,
    Bytes,
}

/// A type as SQL names it, the kind that its values travel in, and literals from its middle and its edges.
type Sample = (&'static str, Travels, &'static [&'static str]);

/// The types that every PostgreSQL has, and those of [`OWN_TYPES`].
pub(crate) const TYPES: &[Sample] = &[
    ("bool", Bool, &["true", "false"]),
    ("int2", Int, &["-32768", "0", "32767"]),
    ("int4", Int, &["-2147483648", "0", "2147483647"]),
    ("int8", Int, &["-9223372036854775808", "0", "9223372036854775807"]),
    ("oid", Int, &["0", "4294967295"]),
    ("float4", Double, &["-0", "0", "1.5", "3.4028235e+38", "1e-45", "-Infinity", "Infinity", "NaN"]),
    ("float8", Double, &["-0", "0", "0.1", "1.7976931348623157e+308", "5e-324", "-Infinity", "Infinity", "NaN"]),
    (
        "numeric",
        Text,
        &[
            "-1.50",
            "0",
            "0.00",
            "1e-400",
            "1e400",
            "123456789012345678901234567890.000000001",
            "-Infinity",
            "Infinity",
            "NaN",
        ],
    ),
    ("numeric(10,2)", Text, &["-99999999.99", "0.005"]),
    ("money", Text, &["-92233720368547758.08", "0", "1234.5", "92233720368547758.07"]),
    ("bytea", Bytes, &["\\x", "\\x00ff5c27", "a\\\\b"]),
    ("\"char\"", Text, &["a", "", " ", "\""]),
    ("name", Text, &["pg_class", "", "a \"b\", {c}"]),
    ("text", Text, &["", "plain", " spaces ", "üñí 𝄞", "NULL", "tab\tline\n", "\"q\" 'q' \\ {a,b} (c)"]),
    ("varchar(5)", Text, &["", "a, b"]),
    ("char(5)", Text, &["ab", "", "\"\\{,}"]),
    ("bit(3)", Text, &["101", "000"]),
    ("varbit", Text, &["", "1", "10110011100011110000111110000011111100000011111110000000111111110000"]),
    ("uuid", Text, &["00112233-4455-6677-8899-aabbccddeeff", "ffffffff-ffff-ffff-ffff-ffffffffffff"]),
    ("json", Text, &["{\"a\" :  [1, null, \"b\\\\\"]}", "\"x\"", "null"]),
    ("jsonb", Text, &["{\"a\": [1, null, \"b\\\\\"]}", "1e3", "null"]),
    ("jsonpath", Text, &["$.\"a\"[*]?(@ > 1)", "strict $.a.b", "$"]),
    ("xml", Text, &["<a b=\"c\">d</a>", "", "text alone"]),
    ("date", Text, &["4714-11-24 BC", "0001-12-31 BC", "2026-11-22", "5874897-12-31", "-infinity", "infinity"]),
    ("time", Text, &["00:00:00", "10:11:12.5", "23:59:59.999999", "24:00:00"]),
    ("timetz", Text, &["10:11:12.5+05:30", "00:00:00-15:59:59", "24:00:00+00", "23:59:59.999999+15:59:59"]),
    (
        "timestamp",
        Text,
        &["4714-11-24 00:00:00 BC", "2026-11-22 10:00:00.5", "294276-12-31 23:59:59.999999", "-infinity", "infinity"],
    ),
    (
        "timestamptz",
        Text,
        &[
            "4714-11-24 00:00:00+00 BC",
            "0044-03-15 00:00:00+00 BC",
            "2026-11-22 10:00:00.000001+00",
            "294276-12-31 23:59:59.999999+00",
            "-infinity",
            "infinity",
        ],
    ),
    ("timestamp(3)", Text, &["2026-11-22 10:00:00.123456", "1999-12-31 23:59:59.9999"]),
    (
        "interval",
        Text,
        &[
            "-1 years +2 days -00:00:00.5",
            "00:00:00",
            "1 mon -1 day",
            "1 mon 2 days 03:04:05",
            "-178000000 years",
            "178000000 years",
            "2147483647 days",
            "876000 hours -0.000001 seconds",
        ],
    ),
    ("inet", Text, &["10.0.0.1", "10.0.0.1/8", "0.0.0.0/0", "::ffff:1.2.3.4", "2001:db8::1/64"]),
    ("cidr", Text, &["10.0.0.0/8", "10.1.2.3/32", "::/0", "2001:db8::/32"]),
    ("macaddr", Text, &["08:00:2b:01:02:03", "ff:ff:ff:ff:ff:ff"]),
    ("macaddr8", Text, &["08:00:2b:ff:fe:01:02:03", "00:00:00:00:00:00:00:00"]),
    ("point", Text, &["(1.5,-0)", "(1e+300,5e-324)", "(NaN,-Infinity)"]),
    ("line", Text, &["{1,-1,0.5}", "{0,1,-2}"]),
    ("lseg", Text, &["[(0,0),(1.5,-1)]", "[(1e+300,0),(0,0)]"]),
    ("box", Text, &["(1,1),(0,0)", "(3.25,Infinity),(-1,2)"]),
    ("path", Text, &["((0,0),(1,1),(1,0))", "[(0,0),(1,1)]"]),
    ("polygon", Text, &["((0,0),(1,1),(1,0))", "((0,0))"]),
    ("circle", Text, &["<(0,0),2.5>", "<(1,-2),0>"]),
    ("tsvector", Text, &["a:1A cat fat:2B,4C", "", "'it''s':3 'two words'"]),
    ("tsquery", Text, &["fat & (rat | !cat:AB)", "'a b':* <2> c"]),
    ("pg_lsn", Text, &["0/0", "16/B374D848", "FFFFFFFF/FFFFFFFF"]),
    ("xid", Text, &["0", "4294967295"]),
    ("xid8", Text, &["0", "18446744073709551615"]),
    ("cid", Text, &["0", "4294967295"]),
    ("tid", Text, &["(0,0)", "(4294967295,65535)"]),
    ("pg_snapshot", Text, &["10:20:10,14,15", "1:1:"]),
    ("txid_snapshot", Text, &["10:20:10,14,15", "1:1:"]),
    ("refcursor", Text, &["cursor \"1\"", ""]),
    ("aclitem", Text, &["postgres=r*w/postgres", "=r/postgres"]),
    ("int2vector", Text, &["1 2 3", "", "-32768 32767"]),
    ("oidvector", Text, &["0 4294967295", "", "1"]),
    ("regclass", Text, &["pg_class", "\"odd Table\"", "4294967294", "-"]),
    ("regcollation", Text, &["\"C\"", "\"default\"", "-"]),
    ("regconfig", Text, &["english", "simple"]),
    ("regdictionary", Text, &["simple", "english_stem"]),
    ("regnamespace", Text, &["pg_catalog", "my_schema", "-"]),
    ("regoper", Text, &["||/", "0"]),
    ("regoperator", Text, &["+(integer,integer)", "-(NONE,integer)", "0"]),
    ("regproc", Text, &["now", "-"]),
    ("regprocedure", Text, &["abs(numeric)", "now()", "-"]),
    ("regrole", Text, &["postgres", "broker", "-"]),
    ("regtype", Text, &["integer", "text[]", "my_schema.mood", "timestamp with time zone", "-"]),
    ("int4range", Text, &["[1,5)", "(,5)", "(,)", "empty"]),
    ("int8range", Text, &["[-9223372036854775808,9223372036854775807)", "empty"]),
    ("numrange", Text, &["[1.50,2.00]", "(-Infinity,)", "empty"]),
    ("tsrange", Text, &["[\"4714-11-24 00:00:00 BC\",infinity]", "(,\"2026-11-22 10:00:00.5\")"]),
    ("tstzrange", Text, &["[\"2026-11-22 10:00:00+00\",\"294276-12-31 23:59:59.999999+00\"]", "(-infinity,)"]),
    ("daterange", Text, &["[2026-01-01,2026-02-01)", "[-infinity,infinity]", "empty"]),
    ("int4multirange", Text, &["{[1,3),[5,7)}", "{}", "{(,5),[10,)}"]),
    ("int8multirange", Text, &["{[1,3),[5,7)}", "{}"]),
    ("nummultirange", Text, &["{[1.5,2],(3,4.00)}", "{}"]),
    ("tsmultirange", Text, &["{[\"2026-11-22 10:00:00\",\"2026-11-22 11:00:00\")}", "{}"]),
    ("tstzmultirange", Text, &["{[\"2026-11-22 10:00:00+00\",\"2026-11-22 11:00:00+00\")}", "{}"]),
    ("datemultirange", Text, &["{[2026-01-01,2026-02-01),[2026-03-01,)}", "{}"]),
    // From here on, those of OWN_TYPES.
    ("mood", Text, &["sad", "it's \"so\" \\ {so}, (so)", "NULL"]),
    ("small", Int, &["-32768", "9"]),
    ("smaller", Int, &["-32768", "4"]),
    ("price", Text, &["-0.10", "99999999.99"]),
    ("label", Text, &["", "a, b"]),
    ("feeling", Text, &["sad", "NULL"]),
    ("area", Text, &["(1,1),(0,0)", "(3,4),(-1,2)"]),
    ("pair", Text, &["(1,\"a,b\")", "(,)", "(1,\"\")", "(-5,\"q\"\"uote \\\\ (back) {brace}\")"]),
    ("couple", Text, &["(1,\"a,b\")", "(,)"]),
    (
        "nested",
        Text,
        &[
            "(\"(1,\"\"x y\"\")\",\"{\"\"(1,a)\"\",NULL}\",\"2026-11-22 10:00:00+00\",\"{\"\"a\"\": 1}\")",
            "(\"(,)\",{},,null)",
            "(,,,)",
        ],
    ),
    ("texts", Text, &["[\"a,b\",\"c\"\"d\"]", "[\"a\\\\b\",z)", "(,)", "empty"]),
    ("texts_multirange", Text, &["{[a,b],[\"x,y\",)}", "{}"]),
    ("odd", Text, &["a,b", "", "c:d"]),
    ("spot", Text, &["(1,2)", "(-0.5,1e+300)"]),
];

/// Types of each sort that there may be, for [`TYPES`]: `odd` is one that only its makers know, without a binary form
/// and with another sign between an array's elements; so is `spot`, which has elements and is no array.
const OWN_TYPES: &str = r#"
    CREATE SCHEMA my_schema;
    GRANT USAGE ON SCHEMA my_schema TO broker;
    CREATE TYPE my_schema.mood AS ENUM ('fine');
    CREATE TYPE mood AS ENUM ('sad', 'happy', 'it''s "so" \ {so}, (so)', 'NULL');
    CREATE DOMAIN small AS int2 CHECK (VALUE < 10);
    CREATE DOMAIN smaller AS small CHECK (VALUE < 5);
    CREATE DOMAIN price AS numeric(10, 2);
    CREATE DOMAIN label AS text;
    CREATE DOMAIN feeling AS mood;
    CREATE DOMAIN area AS box;
    CREATE DOMAIN numbers AS int4[];
    CREATE TYPE pair AS (a int, b text);
    CREATE DOMAIN couple AS pair;
    CREATE TYPE nested AS (p pair, ps pair[], t timestamptz, j jsonb);
    CREATE TYPE texts AS RANGE (subtype = text, collation = "C");
    CREATE TYPE odd;
    CREATE FUNCTION odd_in(cstring) RETURNS odd LANGUAGE internal IMMUTABLE STRICT AS 'textin';
    CREATE FUNCTION odd_out(odd) RETURNS cstring LANGUAGE internal IMMUTABLE STRICT AS 'textout';
    CREATE TYPE odd (INPUT = odd_in, OUTPUT = odd_out, LIKE = text, DELIMITER = ':');
    CREATE TYPE spot;
    CREATE FUNCTION spot_in(cstring) RETURNS spot LANGUAGE internal IMMUTABLE STRICT AS 'point_in';
    CREATE FUNCTION spot_out(spot) RETURNS cstring LANGUAGE internal IMMUTABLE STRICT AS 'point_out';
    CREATE TYPE spot (INPUT = spot_in, OUTPUT = spot_out, INTERNALLENGTH = 16, ALIGNMENT = double, ELEMENT = float8,
        DELIMITER = ';');
    CREATE TABLE "odd Table" (id int);
"#;

/// Types of extensions, where the extension is installed.
const EXTENSIONS: &[(&str, Sample)] = &[
    ("hstore", ("hstore", Text, &["\"a\"=>\"1\", \"b\"=>NULL", "", "\"c d\"=>\"\\\"\""])),
    ("citext", ("citext", Text, &["Ünï, \"q\"", ""])),
    ("ltree", ("ltree", Text, &["Top.Science", ""])),
    ("ltree", ("lquery", Text, &["Top.*{1,2}.a|b", "*"])),
    ("cube", ("cube", Text, &["(1, 2),(3, 4)", "(0)"])),
];

/// A database with [`OWN_TYPES`].
pub(crate) fn database_with_types() -> Database {
    let database = Database::create();
    database.psql(OWN_TYPES);
    database
}

#[tokio::test(flavor = "multi_thread")]
async fn every_type_alone_and_in_arrays_comes_out_as_psql_prints_it_and_goes_back_in() {
    let database = database_with_types();
    let broker = Broker::start(&database).await;
    let session = broker.session().await;
    for sample in TYPES {
        holds_for(&database, &session, *sample).await;
        // A transaction lasts a minute at most.
        session.rollback().await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn types_of_extensions_come_out_as_psql_prints_them_and_go_back_in() {
    let database = Database::create();
    let broker = Broker::start(&database).await;
    let session = broker.session().await;
    for (extension, sample) in EXTENSIONS {
        let available = format!("SELECT count(*) FROM pg_available_extensions WHERE name = '{extension}'");
        if database.psql(&available) == "1" {
            database.psql(&format!("CREATE EXTENSION IF NOT EXISTS {extension}"));
            holds_for(&database, &session, *sample).await;
        }
    }
}

#[test]
fn the_table_has_every_type_of_which_postgresql_reads_literals() {
    /// Those that PostgreSQL makes itself and reads from nobody.
    const UNREADABLE: &str = "gtsvector pg_brin_bloom_summary pg_brin_minmax_multi_summary pg_dependencies \
         pg_mcv_list pg_ndistinct pg_node_tree";

    let database = database_with_types();
    let tabled: Vec<_> = TYPES.iter().map(|(name, ..)| format!("{}::regtype", quoted(name))).collect();
    let untabled = database.psql(&format!(
        "SELECT string_agg(typname, ' ' ORDER BY typname) FROM pg_type AS type \
         WHERE typnamespace = 'pg_catalog'::regnamespace AND typtype IN ('b', 'r', 'm') \
         AND NOT EXISTS (SELECT FROM pg_type AS element WHERE element.typarray = type.oid) \
         AND oid <> ALL (ARRAY[{}]::oid[])",
        tabled.join(", ")
    ));
    assert_eq!(untabled, UNREADABLE);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_has_no_literal_comes_out_as_psql_prints_it() {
    let database = database_with_types();
    let broker = Broker::start(&database).await;
    let session = broker.session().await;
    for value in [
        "ROW(1, NULL, 'a b', ARRAY[1, 2], ROW('x\"y'))",
        "(SELECT account FROM accounts AS account WHERE id = 1)",
        "'x'::cstring",
        "'untyped'",
        "pg_sleep(0)",
        // Its binary form names an encoding, what PostgreSQL prints does not.
        "'<?xml version=\"1.0\" encoding=\"UTF-8\"?><a/>'::xml",
        "(SELECT ev_action FROM pg_rewrite ORDER BY oid LIMIT 1)",
        "(SELECT proargdefaults FROM pg_proc WHERE proargdefaults IS NOT NULL ORDER BY oid LIMIT 1)",
    ] {
        let (kinds, printed) = out(&database, &session, &[value.to_owned(), "NULL".to_owned()]).await;
        assert_eq!(kinds, [text(printed[0].as_deref().unwrap()), null()], "{value}");
    }
    let records = session.execute("SELECT ARRAY[ROW(1, 'x'), NULL, ROW(2, NULL)]").await.unwrap();
    assert_eq!(first_row(&records), [list(vec![text("(1,x)"), null(), text("(2,)")])]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_domain_over_an_array_travels_as_the_array() {
    let database = database_with_types();
    let broker = Broker::start(&database).await;
    let session = broker.session().await;
    let numbers = bounded(vec![int(1), null()], vec![0]);
    for parameter in [numbers.clone(), text("[0:1]={1,NULL}")] {
        let result = session.run(session.statement("SELECT $1::numbers", vec![parameter])).await.unwrap();
        assert_eq!((first_row(&result), result.columns[0].type_name.as_str()), (vec![numbers.clone()], "_int4"));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_parameter_can_name_every_type_and_its_arrays() {
    let database = database_with_types();
    let broker = Broker::start(&database).await;
    let session = broker.session().await;
    // As pg_type has the names, without modifiers; a domain's is its base type's.
    let columns = TYPES.iter().map(|(name, ..)| format!("NULL::{name}")).collect::<Vec<_>>().join(", ");
    let columns = session.execute(&format!("SELECT {columns}")).await.unwrap().columns;
    let names: Vec<_> = columns.iter().map(|column| column.type_name.as_str()).collect();
    let literals: Vec<_> = TYPES.iter().map(|(_, _, literals)| literals[0]).collect();
    let alone = |(name, literal): (&&str, &&str)| format!("{}::\"{name}\"", quoted(literal));
    let in_array = |(name, literal): (&&str, &&str)| format!("ARRAY[{}]::\"{name}\"[]", quoted(literal));
    let named = names.iter().zip(&literals);
    let values: Vec<_> = named.clone().map(alone).chain(named.clone().map(in_array)).collect();
    let expected = first_row(&session.execute(&format!("SELECT {}", values.join(", "))).await.unwrap());
    let parameters = named.clone().map(|(name, literal)| typed(text(literal), name));
    let arrays = named.map(|(name, literal)| typed(list(vec![text(literal)]), &format!("{name}[]")));
    let parameters: Vec<_> = parameters.chain(arrays).collect();
    let places: Vec<_> = (1..=parameters.len()).map(|n| format!("${n}")).collect();
    let sql = format!("SELECT {}", places.join(", "));
    let back = session.run(pb::ExecuteRequest { parameters, ..session.statement(&sql, vec![]) }).await.unwrap();
    for ((back, expected), value) in first_row(&back).iter().zip(&expected).zip(&values) {
        assert_eq!(back, expected, "{value}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_parameter_can_name_a_type_in_a_schema_and_a_domain() {
    let database = database_with_types();
    let broker = Broker::start(&database).await;
    let session = broker.session().await;
    let parameters = vec![
        typed(text("fine"), "my_schema.mood"),
        typed(list(vec![text("fine"), null()]), "my_schema.mood[]"),
        typed(text("sad"), "mood"),
        typed(int(9), "small"),
        typed(null(), "my_schema.mood"),
    ];
    let sql = "SELECT $1, $2, $3, $4, $5, pg_typeof($1)::text, pg_typeof($4)::text";
    // Twice, and in two transactions: type look-ups are kept by the connection, across its reset.
    for _ in 0..2 {
        let request = pb::ExecuteRequest { parameters: parameters.clone(), ..session.statement(sql, vec![]) };
        let result = session.run(request).await.unwrap();
        let fine = list(vec![text("fine"), null()]);
        let expected = [text("fine"), fine, text("sad"), int(9), null(), text("my_schema.mood"), text("small")];
        assert_eq!(first_row(&result), expected);
        assert_eq!(result.columns[0].type_name, "mood");
        let oid = database.psql("SELECT 'my_schema.mood'::regtype::oid");
        assert_eq!(result.columns[0].type_oid.to_string(), oid);
        session.commit().await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_type_that_is_not_there_is_refused_with_nothing_run() {
    let database = database_with_types();
    let broker = Broker::start(&database).await;
    let session = broker.session().await;
    session.execute("UPDATE accounts SET balance = 7").await.unwrap();
    for name in [
        "nosuch",
        "nosuch[]",
        "my_schema.nosuch",
        "nosuch.mood",
        "int4[",
        "int4; DROP TABLE accounts",
        "int4'",
        "nul\0",
        " ",
    ] {
        let parameters = vec![typed(int(1), "int4"), typed(text("1"), name)];
        let request = pb::ExecuteRequest { parameters, ..session.statement("SELECT $1, $2", vec![]) };
        let refused = session.run(request).await.unwrap_err();
        assert_eq!((refused.code, refused.reason.as_str()), (Code::InvalidArgument, "INVALID_REQUEST"), "{name}");
        assert_eq!(refused.field.as_deref(), Some("parameters[1].type"), "{refused:?}");
        assert_eq!(refused.transaction_state(), TransactionState::Open, "{name}");
    }
    session.commit().await.unwrap();
    assert_eq!(database.balances(), "7 7");
}

#[tokio::test(flavor = "multi_thread")]
async fn moments_are_told_in_utc_whatever_the_sessions_time_zone() {
    let database = Database::create();
    let broker = Broker::start(&database).await;
    let session = broker.session().await;
    session.execute("SET LOCAL TimeZone = 'Asia/Kolkata'").await.unwrap();
    let moment = text("2026-11-22 10:00:00.5+00");
    let sql = "SELECT $1::timestamptz, ARRAY[[$1::timestamptz]], $1::timestamptz::text, tstzrange($1, NULL), \
         ROW($1::timestamptz), ARRAY[tstzrange($1, NULL)]";
    let row = first_row(&session.run(session.statement(sql, vec![moment.clone()])).await.unwrap());
    let within = text("[\"2026-11-22 15:30:00.5+05:30\",)");
    let expected = [
        moment.clone(),
        list(vec![list(vec![moment])]),
        text("2026-11-22 15:30:00.5+05:30"),
        within.clone(),
        text("(\"2026-11-22 15:30:00.5+05:30\")"),
        list(vec![within]),
    ];
    assert_eq!(row, expected);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_kind_goes_into_every_type_it_makes_sense_in() {
    let database = Database::create();
    let broker = Broker::start(&database).await;
    let session = broker.session().await;
    let bytes = Kind::BytesValue(vec![0, 0xff].into());
    for (kind, type_name, literal) in [
        (Kind::BoolValue(true), "bool", "true"),
        (int(-32768), "int2", "-32768"),
        (int(i32::MAX.into()), "int4", "2147483647"),
        (int(i64::MIN), "int8", "-9223372036854775808"),
        (int(u32::MAX.into()), "oid", "4294967295"),
        (int(i64::MAX), "numeric", "9223372036854775807"),
        (int(-(1 << 24)), "float4", "-16777216"),
        (int(1 << 53), "float8", "9007199254740992"),
        (int(i64::MIN), "float4", "-9223372036854775808"),
        (int(-5), "money", "-5"),
        (Kind::DoubleValue(0.1), "float8", "0.1"),
        (Kind::DoubleValue(-0.0), "float8", "-0"),
        (Kind::DoubleValue(0.5), "float4", "0.5"),
        (Kind::DoubleValue(f64::NEG_INFINITY), "float4", "-Infinity"),
        (Kind::DoubleValue(-1.5), "numeric", "-1.5"),
        (Kind::DoubleValue(f64::NAN), "numeric", "NaN"),
        (Kind::DoubleValue(f64::INFINITY), "numeric", "Infinity"),
        (bytes.clone(), "bytea", "\\x00ff"),
        (text("\\x00ff"), "bytea", "\\x00ff"),
        (text("t"), "bool", "true"),
        (text(" 42 "), "int4", "42"),
        (text("[0:1]={1,NULL}"), "int4[]", "[0:1]={1,NULL}"),
        (list(vec![int(1), null()]), "numeric[]", "{1,NULL}"),
        (list(vec![Kind::DoubleValue(0.5), int(2), text("NaN")]), "float8[]", "{0.5,2,NaN}"),
        (list(vec![bytes, text("\\x5c")]), "bytea[]", "{\"\\\\x00ff\",\"\\\\x5c\"}"),
        (list(vec![list(vec![Kind::BoolValue(true)]), list(vec![text("f")])]), "bool[]", "{{t},{f}}"),
        (list(vec![text("10.0.0.1"), null()]), "inet[]", "{10.0.0.1,NULL}"),
        (list(vec![int(5)]), "money[]", "{5}"),
        (list(vec![]), "tsrange[]", "{}"),
        (null(), "box[]", "{}"),
    ] {
        let expected = if kind == null() { format!("NULL::{type_name}") } else { quoted(literal) };
        let sql = format!("SELECT $1::{type_name}::text IS NOT DISTINCT FROM {expected}::{type_name}::text");
        let same = session.run(session.statement(&sql, vec![kind])).await.unwrap();
        assert_eq!(first_row(&same), [Kind::BoolValue(true)], "{literal} as {type_name}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn any_integers_come_back_the_same() {
    let database = Database::create();
    let broker = Broker::start(&database).await;
    let session = broker.session().await;
    for_all(
        &prop::collection::vec((any::<i64>(), any::<i32>(), any::<i16>()), 1..100),
        async |numbers: Vec<(i64, i32, i16)>| {
            let sql = "SELECT a, a::text, b, b::text, c, c::text \
             FROM unnest($1::int8[], $2::int4[], $3::int2[]) AS numbers (a, b, c)";
            let of = |number: fn(&(i64, i32, i16)) -> i64| list(numbers.iter().map(|one| int(number(one))).collect());
            let rows = ask(&session, sql, vec![of(|one| one.0), of(|one| one.1.into()), of(|one| one.2.into())]).await;
            let both = |number: i64| [int(number), text(&number.to_string())];
            let expected: Vec<_> =
                numbers.iter().map(|(a, b, c)| [both(*a), both((*b).into()), both((*c).into())].concat()).collect();
            assert_eq!(rows, expected);
        },
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn any_floats_come_back_the_same_to_the_bit() {
    let database = Database::create();
    let broker = Broker::start(&database).await;
    let session = broker.session().await;
    // All NaNs are one to PostgreSQL.
    let bits = |number: f64| if number.is_nan() { f64::NAN.to_bits() } else { number.to_bits() };
    for_all(&prop::collection::vec((any::<u64>(), any::<u32>()), 1..100), async |patterns: Vec<(u64, u32)>| {
        let doubles: Vec<_> = patterns.iter().map(|(bits, _)| f64::from_bits(*bits)).collect();
        let singles: Vec<_> = patterns.iter().map(|(_, bits)| f64::from(f32::from_bits(*bits))).collect();
        let sql = "SELECT a, a::text, b, b::text FROM unnest($1::float8[], $2::float4[]) AS numbers (a, b)";
        let all = |numbers: &[f64]| list(numbers.iter().copied().map(Kind::DoubleValue).collect());
        let rows = ask(&session, sql, vec![all(&doubles), all(&singles)]).await;
        assert_eq!(rows.len(), patterns.len());
        for (row, (double, single)) in rows.iter().zip(doubles.iter().zip(&singles)) {
            let [Kind::DoubleValue(a), Kind::StringValue(a_text), Kind::DoubleValue(b), Kind::StringValue(b_text)] =
                row.as_slice()
            else {
                panic!("{row:?}");
            };
            let printed = (bits(a_text.parse().unwrap()), bits(b_text.parse::<f32>().unwrap().into()));
            assert_eq!((bits(*a), bits(*b)), (bits(*double), bits(*single)));
            assert_eq!(printed, (bits(*double), bits(*single)));
        }
    });
}

#[tokio::test(flavor = "multi_thread")]
async fn any_numerics_come_back_with_all_their_digits() {
    let database = Database::create();
    let broker = Broker::start(&database).await;
    let session = broker.session().await;
    for_all(&prop::collection::vec(numeric(), 1..100), async |numbers: Vec<String>| {
        let array = list(numbers.iter().map(|number| text(number)).collect());
        let rows = ask(&session, "SELECT n, n::text FROM unnest($1::numeric[]) AS n", vec![array]).await;
        let expected: Vec<_> = numbers.iter().map(|number| vec![text(number), text(number)]).collect();
        assert_eq!(rows, expected);
    });
}

#[tokio::test(flavor = "multi_thread")]
async fn any_texts_come_back_with_all_their_characters() {
    let database = Database::create();
    let broker = Broker::start(&database).await;
    let session = broker.session().await;
    for_all(&prop::collection::vec(some_text(), 1..100), async |texts: Vec<String>| {
        let array = list(texts.iter().map(|one| text(one)).collect());
        let whole = texts.concat();
        let sql = "SELECT t, encode(convert_to(t, 'UTF8'), 'hex'), $2::text FROM unnest($1::text[]) AS t";
        let rows = ask(&session, sql, vec![array, text(&whole)]).await;
        let hex = |one: &str| one.bytes().map(|byte| format!("{byte:02x}")).collect::<Vec<_>>().concat();
        let expected: Vec<_> = texts.iter().map(|one| vec![text(one), text(&hex(one)), text(&whole)]).collect();
        assert_eq!(rows, expected);
    });
}

#[tokio::test(flavor = "multi_thread")]
async fn any_moments_are_printed_as_postgresql_does_and_read_back() {
    /// From 4714-11-24 BC to 294276-12-31, in days from 2000-01-01.
    const DAYS: std::ops::RangeInclusive<i64> = -2_451_545..=106_751_982;
    const MICROSECONDS: std::ops::Range<i64> = 0..86_400_000_000;
    const MADE: &str = "\
        SELECT moment, moment::text, moment AT TIME ZONE 'UTC', (moment AT TIME ZONE 'UTC')::text, \
            moment::date, moment::date::text, moment::time, moment::time::text \
        FROM unnest($1::int4[], $2::int8[]) AS parts (days, micros), LATERAL (SELECT timestamp '2000-01-01' \
            + days * interval '1 day' + micros * interval '1 microsecond' AS moment) AS made";
    const READ: &str = "\
        SELECT a, a::text, b, b::text, c, c::text, d, d::text \
        FROM unnest($1::timestamp[], $2::timestamptz[], $3::date[], $4::time[]) AS read (a, b, c, d)";

    let database = Database::create();
    let broker = Broker::start(&database).await;
    let session = broker.session().await;
    for_all(&prop::collection::vec((DAYS, MICROSECONDS), 1..100), async |moments: Vec<(i64, i64)>| {
        let days = list(moments.iter().map(|(days, _)| int(*days)).collect());
        let micros = list(moments.iter().map(|(_, micros)| int(*micros)).collect());
        let made = ask(&session, MADE, vec![days, micros]).await;
        assert_eq!(made.len(), moments.len());
        assert_pairs(&made);
        let column = |index: usize| list(made.iter().map(|row| row[index].clone()).collect());
        let read = ask(&session, READ, vec![column(0), column(2), column(4), column(6)]).await;
        assert_eq!(read, made);
    });
}

#[tokio::test(flavor = "multi_thread")]
async fn any_dates_are_printed_as_postgresql_does_and_read_back() {
    /// From 4714-11-24 BC to 5874897-12-31, in days from 2000-01-01.
    const DAYS: std::ops::RangeInclusive<i64> = -2_451_545..=2_145_031_948;

    let database = Database::create();
    let broker = Broker::start(&database).await;
    let session = broker.session().await;
    for_all(&prop::collection::vec(DAYS, 1..100), async |days: Vec<i64>| {
        let sql = "SELECT day, day::text FROM unnest($1::int4[]) AS n, \
             LATERAL (SELECT date '2000-01-01' + n AS day) AS made";
        let made = ask(&session, sql, vec![list(days.iter().copied().map(int).collect())]).await;
        assert_eq!(made.len(), days.len());
        assert_pairs(&made);
        let dates = list(made.iter().map(|row| row[0].clone()).collect());
        let read = ask(&session, "SELECT day, day::text FROM unnest($1::date[]) AS day", vec![dates]).await;
        assert_eq!(read, made);
    });
}

#[tokio::test(flavor = "multi_thread")]
async fn any_intervals_are_printed_as_postgresql_does_and_read_back() {
    /// What a double, by which PostgreSQL multiplies, holds exactly.
    const MICROSECONDS: std::ops::Range<i64> = -(1 << 52)..(1 << 52);
    const MADE: &str = "\
        SELECT length, length::text FROM unnest($1::int4[], $2::int4[], $3::int8[]) AS parts (months, days, micros), \
            LATERAL (SELECT months * interval '1 month' + days * interval '1 day' \
                + micros * interval '1 microsecond' AS length) AS made";

    let database = Database::create();
    let broker = Broker::start(&database).await;
    let session = broker.session().await;
    let small = -40_i32..40;
    let part = prop_oneof![any::<i32>(), small];
    let parts = (part.clone(), part, prop_oneof![MICROSECONDS, -100_000_000_i64..100_000_000]);
    for_all(&prop::collection::vec(parts, 1..100), async |parts: Vec<(i32, i32, i64)>| {
        let months = list(parts.iter().map(|(months, ..)| int((*months).into())).collect());
        let days = list(parts.iter().map(|(_, days, _)| int((*days).into())).collect());
        let micros = list(parts.iter().map(|(.., micros)| int(*micros)).collect());
        let made = ask(&session, MADE, vec![months, days, micros]).await;
        assert_eq!(made.len(), parts.len());
        assert_pairs(&made);
        let lengths = list(made.iter().map(|row| row[0].clone()).collect());
        let sql = "SELECT length, length::text FROM unnest($1::interval[]) AS length";
        assert_eq!(ask(&session, sql, vec![lengths]).await, made);
    });
}

#[tokio::test(flavor = "multi_thread")]
async fn any_arrays_come_back_with_their_dimensions_and_lower_bounds() {
    let database = Database::create();
    let broker = Broker::start(&database).await;
    let session = broker.session().await;
    let numbers = any::<i32>().prop_map(|number| int(number.into())).boxed();
    let texts = some_text().prop_map(|some| text(&some)).boxed();
    for (element, type_name) in [(numbers, "int4"), (texts, "text")] {
        for_all(&prop::collection::vec(array(element), 1..10), async |arrays: Vec<Array>| {
            let column = |n: usize| {
                let array = format!("${n}::{type_name}[]");
                // Where a NULL is, is told by its own function: no text can be mistaken for it.
                format!("{array}, array_dims({array}), (SELECT array_agg(e) FROM unnest({array}) AS e)")
            };
            let columns: Vec<_> = (1..=arrays.len()).map(column).collect();
            let parameters = arrays.iter().map(Array::nested).collect();
            let rows = ask(&session, &format!("SELECT {}", columns.join(", ")), parameters).await;
            let expected = arrays
                .iter()
                .flat_map(|array| [array.nested(), text(&array.dimensions_text()), list(array.elements.clone())]);
            assert_eq!(rows, [expected.collect::<Vec<_>>()]);
        });
    }
}

/// An array by its shape and its elements, row by row.
#[derive(Debug, Clone)]
struct Array {
    /// The length of each dimension and its lower bound, the outermost first.
    dimensions: Vec<(usize, i32)>,
    elements: Vec<Kind>,
}

impl Array {
    fn nested(&self) -> Kind {
        // From the innermost dimension out.
        let mut rows = self.elements.clone();
        for (length, _) in self.dimensions[1..].iter().rev() {
            rows = rows.chunks(*length).map(|row| list(row.to_vec())).collect();
        }
        let bounds = self.dimensions.iter().map(|(_, bound)| *bound);
        if bounds.clone().all(|bound| bound == 1) { list(rows) } else { bounded(rows, bounds.collect()) }
    }

    /// As array_dims has it: `[1:2][0:0]`.
    fn dimensions_text(&self) -> String {
        let last = |length: usize, bound: i32| bound + i32::try_from(length).unwrap() - 1;
        let dimension = |(length, bound): &(usize, i32)| format!("[{bound}:{}]", last(*length, *bound));
        self.dimensions.iter().map(dimension).collect::<Vec<_>>().concat()
    }
}

/// Arrays of up to four dimensions.
fn array(element: BoxedStrategy<Kind>) -> impl Strategy<Value = Array> {
    let dimensions = prop::collection::vec((1..=3_usize, prop_oneof![Just(1), -3..=3_i32]), 1..=4);
    dimensions.prop_flat_map(move |dimensions| {
        let count = dimensions.iter().map(|(length, _)| length).product::<usize>();
        let element = prop::option::of(element.clone()).prop_map(|element| element.unwrap_or_else(null));
        let elements = prop::collection::vec(element, count);
        elements.prop_map(move |elements| Array { dimensions: dimensions.clone(), elements })
    })
}

/// Numerics of up to 50 digits, as PostgreSQL prints them.
fn numeric() -> impl Strategy<Value = String> {
    let digits = |count_max: usize| {
        let digits = prop::collection::vec(prop::char::range('0', '9'), 0..=count_max);
        digits.prop_map(|digits| digits.into_iter().collect::<String>())
    };
    (any::<bool>(), digits(30), digits(20)).prop_map(|(negative, whole, fraction)| {
        let whole = whole.trim_start_matches('0');
        let whole = if whole.is_empty() { "0" } else { whole };
        let point = if fraction.is_empty() { "" } else { "." };
        let number = format!("{whole}{point}{fraction}");
        let is_zero = number.chars().all(|c| matches!(c, '0' | '.'));
        if negative && !is_zero { format!("-{number}") } else { number }
    })
}

/// Texts of all characters but NUL, and more than their share of those that mean something in an array's literal.
fn some_text() -> impl Strategy<Value = String> {
    let significant = prop::sample::select(vec!['"', '\\', '{', '}', ',', ';', '\'', '(', ')', ' ', '\t', '\n', '\r']);
    let character = prop_oneof![any::<char>(), significant].prop_map(|c| if c == '\0' { '0' } else { c });
    let any_text = prop::collection::vec(character, 0..30).prop_map(|chars| chars.into_iter().collect::<String>());
    prop_oneof![9 => any_text, 1 => Just("NULL".to_owned())]
}

/// Tries generated values; what fails is shrunk to the least that does.
fn for_all<S: Strategy>(strategy: &S, holds: impl AsyncFn(S::Value)) {
    const CASES: u32 = 16;

    let runtime = tokio::runtime::Handle::current();
    let config = Config { failure_persistence: None, ..Config::with_cases(CASES) };
    let tried = tokio::task::block_in_place(|| {
        TestRunner::new(config).run(strategy, move |value| {
            runtime.block_on(holds(value));
            Ok(())
        })
    });
    tried.unwrap_or_else(|error| panic!("{error}"));
}

/// The rows of a statement in a transaction of its own, so that one that fails leaves nothing to the next.
async fn ask(session: &Session, sql: &str, parameters: Vec<Kind>) -> Vec<Vec<Kind>> {
    let request = pb::ExecuteRequest { commit: true, ..session.statement(sql, parameters) };
    let result = session.run(request).await.unwrap_or_else(|failure| panic!("{sql}: {failure:?}"));
    result.rows.iter().map(kinds_of).collect()
}

/// Each value is followed by the text that PostgreSQL made of it.
fn assert_pairs(rows: &[Vec<Kind>]) {
    for row in rows {
        for pair in row.chunks(2) {
            assert_eq!(pair[0], pair[1]);
        }
    }
}

/// A type's values come out as psql prints them, alone and in arrays, and go back in.
async fn holds_for(database: &Database, session: &Session, (name, travels, literals): Sample) {
    let mut values: Vec<_> = literals.iter().map(|literal| format!("{}::{name}", quoted(literal))).collect();
    values.push(format!("NULL::{name}"));
    let (kinds, printed) = out(database, session, &values).await;
    for ((kind, printed), value) in kinds.iter().zip(&printed).zip(&values) {
        let expected = printed.as_deref().map_or_else(null, |printed| carried(name, travels, printed));
        // NaN equals itself here, and zero not minus zero.
        assert_eq!(format!("{kind:?}"), format!("{expected:?}"), "{value}");
    }
    goes_back(session, name, &values, &printed).await;
    let (first, last) = (kinds[0].clone(), kinds[literals.len() - 1].clone());
    goes_back_as(session, name, &values, kinds).await;
    arrays_hold_for(database, session, name, [literals[0], literals[literals.len() - 1]], [first, last]).await;
}

/// Arrays of these two elements and NULL, of none to three dimensions.
async fn arrays_hold_for(database: &Database, session: &Session, name: &str, elements: [&str; 2], kinds: [Kind; 2]) {
    let [a, b] = elements.map(quoted);
    let one = format!("ARRAY[{a}, {b}, NULL]::{name}[]");
    let two = format!("ARRAY[[{a}, NULL], [{b}, {a}]]::{name}[]");
    let three = format!("ARRAY[[[{a}], [{b}]], [[NULL], [{a}]]]::{name}[]");
    let starting = |bounds: &str, array: &str| format!("('{bounds}=' || ({array})::text)::{name}[]");
    let arrays = [
        format!("'{{}}'::{name}[]"),
        starting("[5:7]", &one),
        starting("[-1:0][1:2]", &two),
        starting("[1:2][0:1][7:7]", &three),
        one,
        two,
        three,
    ];
    let [a, b] = kinds;
    let one = vec![a.clone(), b.clone(), null()];
    let two = vec![list(vec![a.clone(), null()]), list(vec![b.clone(), a.clone()])];
    let three = vec![list(vec![list(vec![a.clone()]), list(vec![b])]), list(vec![list(vec![null()]), list(vec![a])])];
    let expected = vec![
        list(vec![]),
        bounded(one.clone(), vec![5]),
        bounded(two.clone(), vec![-1, 1]),
        bounded(three.clone(), vec![1, 0, 7]),
        list(one),
        list(two),
        list(three),
    ];
    let (kinds, printed) = out(database, session, &arrays).await;
    for ((kind, expected), array) in kinds.iter().zip(&expected).zip(&arrays) {
        assert_eq!(format!("{kind:?}"), format!("{expected:?}"), "{array}");
    }
    let array = format!("{name}[]");
    goes_back(session, &array, &arrays, &printed).await;
    goes_back_as(session, &array, &arrays, kinds).await;
}

/// What the broker gives for these values, and what psql prints.
async fn out(database: &Database, session: &Session, values: &[String]) -> (Vec<Kind>, Vec<Option<String>>) {
    let sql = format!("SELECT {}", values.join(", "));
    let result = session.execute(&sql).await.unwrap_or_else(|failure| panic!("{sql}: {failure:?}"));
    (first_row(&result), database.cells(&sql).remove(0))
}

/// The texts, as parameters, are these values.
async fn goes_back(session: &Session, type_name: &str, values: &[String], texts: &[Option<String>]) {
    let parameters = texts.iter().map(|some| some.as_deref().map_or_else(null, text)).collect();
    goes_back_as(session, type_name, values, parameters).await;
}

/// The parameters are these values to PostgreSQL.
async fn goes_back_as(session: &Session, type_name: &str, values: &[String], parameters: Vec<Kind>) {
    let same = |(n, value): (usize, &String)| format!("${n}::{type_name}::text IS NOT DISTINCT FROM ({value})::text");
    let same: Vec<_> = (1..).zip(values).map(same).collect();
    let sql = format!("SELECT {}", same.join(", "));
    let back = session.run(session.statement(&sql, parameters)).await;
    let back = back.unwrap_or_else(|failure| panic!("{sql}: {failure:?}"));
    for (same, value) in first_row(&back).iter().zip(values) {
        assert_eq!(*same, Kind::BoolValue(true), "{value}");
    }
}

/// The kind that carries what psql prints.
fn carried(name: &str, travels: Travels, printed: &str) -> Kind {
    match travels {
        Bool => Kind::BoolValue(printed == "t"),
        Int => int(printed.parse().unwrap()),
        // The broker carries a float4 as the float8 of the same value.
        Double if name == "float4" => Kind::DoubleValue(printed.parse::<f32>().unwrap().into()),
        Double => Kind::DoubleValue(printed.parse().unwrap()),
        Text => text(printed),
        Bytes => {
            let digits = printed.strip_prefix("\\x").unwrap();
            let byte = |at: usize| u8::from_str_radix(&digits[at..at + 2], 16).unwrap();
            Kind::BytesValue((0..digits.len()).step_by(2).map(byte).collect())
        }
    }
}
