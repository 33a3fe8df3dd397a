//! The system catalogs, every row and column of them: PostgreSQL's own use of its types, as psql prints it.

use std::iter::Peekable;
use std::str::Chars;

use session_broker::grpc::pb;

use crate::support::{Broker, Database};
use pb::value::Kind;

/// What is read: a catalog or a view, and in which order.
const CATALOGS: [(&str, &str); 27] = [
    ("pg_aggregate", "aggfnoid::oid"),
    ("pg_amop", "oid"),
    ("pg_amproc", "oid"),
    ("pg_attrdef", "oid"),
    ("pg_attribute", "attrelid, attnum"),
    ("pg_cast", "oid"),
    ("pg_class", "oid"),
    ("pg_collation", "oid"),
    ("pg_constraint", "oid"),
    // Other tests make databases and roles meanwhile.
    ("pg_database WHERE datname IN ('postgres', 'template0', 'template1', current_database())", "oid"),
    ("pg_description", "objoid, classoid, objsubid"),
    ("pg_index", "indexrelid"),
    ("pg_namespace", "oid"),
    ("pg_opclass", "oid"),
    ("pg_operator", "oid"),
    ("pg_proc", "oid"),
    ("pg_range", "rngtypid"),
    ("pg_rewrite", "oid"),
    (r"pg_roles WHERE rolname IN ('postgres', 'broker') OR rolname LIKE 'pg\_%'", "oid"),
    // What no session sets for itself.
    ("pg_settings WHERE context <> 'user' OR category LIKE 'Query Tuning%'", "name"),
    ("pg_statistic", "starelid, staattnum, stainherit"),
    ("pg_statistic_ext", "oid"),
    ("pg_statistic_ext_data", "stxoid"),
    ("pg_stats", "schemaname, tablename, attname, inherited"),
    ("pg_trigger", "oid"),
    ("pg_ts_config_map", "mapcfg, maptokentype, mapseqno"),
    ("pg_type", "oid"),
];

/// Makes the catalogs say more: statistics of all sorts, values for rows that were there before their column, defaults,
/// constraints, grants, a partition and a trigger.
const MORE: &str = r#"
    CREATE TYPE mood AS ENUM ('sad', 'it''s "so"');
    CREATE TABLE sample (id int PRIMARY KEY DEFAULT 7, n int NOT NULL CHECK (n > -1), note text DEFAULT 'a, b',
        at timestamptz, span tstzrange, tags text[], mood mood, EXCLUDE USING gist (span WITH &&) WHERE (id < 0))
        WITH (fillfactor = 70, autovacuum_enabled = false);
    INSERT INTO sample SELECT id, id % 7, 'note, "' || id % 5 || '"', timestamptz '2026-11-22 10:00:00.5+00' + id % 3
        * interval '1 day', tstzrange('2026-11-22 10:00:00+00', NULL), ARRAY['a', NULL, '{"b"}'], 'sad'
        FROM generate_series(1, 500) AS id;
    ALTER TABLE sample ADD COLUMN moment timestamptz DEFAULT '2026-11-22 10:00:00+00';
    ALTER TABLE sample ADD COLUMN words text[] DEFAULT '[0:1]={"a,b",NULL}';
    CREATE STATISTICS related (ndistinct, dependencies, mcv) ON n, note FROM sample;
    CREATE STATISTICS expressed ON (n + 1), (note || 'x') FROM sample;
    CREATE TABLE parted (id int) PARTITION BY RANGE (id);
    CREATE TABLE part PARTITION OF parted FOR VALUES FROM (0) TO (10);
    CREATE FUNCTION quiet() RETURNS trigger LANGUAGE plpgsql SET work_mem = '1MB' AS 'BEGIN RETURN NULL; END';
    CREATE TRIGGER quiet AFTER UPDATE OF n ON sample FOR EACH ROW WHEN (NEW.n > 1) EXECUTE FUNCTION quiet('a', 'b');
    GRANT SELECT (id), UPDATE (n) ON sample TO broker;
    GRANT SELECT ON sample, pg_statistic, pg_statistic_ext_data TO broker WITH GRANT OPTION;
"#;

#[tokio::test(flavor = "multi_thread")]
async fn every_row_of_the_catalogs_is_what_psql_prints() {
    let database = Database::create();
    database.psql(MORE);
    database.psql("ANALYZE");
    let broker = Broker::start(&database).await;
    let session = broker.session().await;
    for (catalog, order) in CATALOGS {
        let sql = format!("SELECT * FROM {catalog} ORDER BY {order}");
        let streamed = session.stream(session.streaming(&sql, vec![])).await;
        assert!(streamed.end.is_ok(), "{catalog}: {:?}", streamed.end);
        let (rows, printed) = (streamed.rows(), database.cells(&sql));
        assert!(!rows.is_empty(), "{catalog} is empty");
        assert_eq!(rows.len(), printed.len(), "{catalog}");
        for (n, (row, printed)) in rows.iter().zip(&printed).enumerate() {
            assert_eq!((row.len(), printed.len()), (streamed.columns.len(), row.len()), "row {n} of {catalog}");
            for ((kind, printed), column) in row.iter().zip(printed).zip(&streamed.columns) {
                let same = is_printed(kind, printed.as_deref(), &column.type_name);
                assert!(same, "row {n} of {catalog}, {}: {kind:?}, not {printed:?}", column.name);
            }
        }
        // A transaction lasts a minute at most.
        session.rollback().await.unwrap();
    }
}

/// Whether psql prints `printed` for the value of this type, or of an array of it.
fn is_printed(kind: &Kind, printed: Option<&str>, type_name: &str) -> bool {
    let Some(printed) = printed else { return matches!(kind, Kind::NullValue(_)) };
    match kind {
        Kind::NullValue(_) => false,
        Kind::BoolValue(value) => printed == if *value { "t" } else { "f" },
        Kind::IntValue(value) => printed == value.to_string(),
        Kind::DoubleValue(value) => {
            let printed =
                if type_name.ends_with("float4") { printed.parse::<f32>().map(f64::from) } else { printed.parse() };
            printed.is_ok_and(|printed| printed.to_bits() == value.to_bits())
        }
        Kind::StringValue(value) => printed == value,
        Kind::BytesValue(value) => {
            printed == value.iter().fold("\\x".to_owned(), |hex, byte| format!("{hex}{byte:02x}"))
        }
        Kind::ListValue(list) => {
            let (bounds, elements) = match printed.strip_prefix('[') {
                Some(bounded) => bounded.split_once("]=").unwrap(),
                None => ("", printed),
            };
            let bounds = bounds.split("][").filter_map(|bound| bound.split_once(':'));
            let bounds: Vec<i32> = bounds.map(|(first, _)| first.parse().unwrap()).collect();
            let mut rest = elements.chars().peekable();
            let literal = row(&mut rest);
            rest.next().is_none() && list.lower_bounds == bounds && are_printed(list, &literal, type_name)
        }
    }
}

fn are_printed(list: &pb::ListValue, literal: &[Literal], type_name: &str) -> bool {
    let same = |(value, literal): (&pb::Value, &Literal)| match (value.kind.as_ref().unwrap(), literal) {
        (Kind::ListValue(row), Literal::Row(literal)) => are_printed(row, literal, type_name),
        (Kind::ListValue(_), Literal::Element(_)) | (_, Literal::Row(_)) => false,
        (kind, Literal::Element(printed)) => is_printed(kind, printed.as_deref(), type_name),
    };
    list.values.len() == literal.len() && list.values.iter().zip(literal).all(same)
}

/// A part of an array's literal.
enum Literal {
    Element(Option<String>),
    Row(Vec<Literal>),
}

/// Reads `{1,"a b",NULL,{2}}`.
fn row(rest: &mut Peekable<Chars<'_>>) -> Vec<Literal> {
    assert_eq!(rest.next(), Some('{'));
    let mut parts = Vec::new();
    if rest.next_if_eq(&'}').is_some() {
        return parts;
    }
    loop {
        parts.push(match rest.peek() {
            Some('{') => Literal::Row(row(rest)),
            Some('"') => Literal::Element(Some(quoted(rest))),
            _ => {
                let mut bare = String::new();
                while let Some(c) = rest.next_if(|c| !matches!(c, ',' | '}')) {
                    bare.push(c);
                }
                Literal::Element((bare != "NULL").then_some(bare))
            }
        });
        match rest.next() {
            Some(',') => {}
            Some('}') => return parts,
            other => panic!("{other:?} in an array's literal"),
        }
    }
}

fn quoted(rest: &mut Peekable<Chars<'_>>) -> String {
    assert_eq!(rest.next(), Some('"'));
    let mut text = String::new();
    loop {
        match rest.next().expect("a quote closes it") {
            '"' => return text,
            '\\' => text.extend(rest.next()),
            c => text.push(c),
        }
    }
}
