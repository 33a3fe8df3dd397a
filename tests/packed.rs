//! Packed rows: PostgreSQL's own bytes, as documented for those who unpack them, and the same data as VALUES.

use session_broker::grpc::pb;
use tonic::Code;

use crate::support::{Broker, Database, Session, Streamed, int, kinds_of, null, text};
use crate::types::{TYPES, database_with_types};
use crate::values::quoted;
use pb::value::Kind;
use pb::{Column, ResultFormat, TransactionState, WireFormat};

/// The domains of `types`.
const DOMAINS: [&str; 7] = ["small", "smaller", "price", "label", "feeling", "area", "couple"];

/// The types whose values are packed in PostgreSQL's binary form, by their names in pg_type, and so are arrays of them.
/// The enum is one of `types`.
const BINARY: [&str; 23] = [
    "bool",
    "int2",
    "int4",
    "int8",
    "oid",
    "float4",
    "float8",
    "numeric",
    "bytea",
    "text",
    "varchar",
    "bpchar",
    "name",
    "json",
    "jsonb",
    "uuid",
    "date",
    "time",
    "timetz",
    "timestamp",
    "timestamptz",
    "interval",
    "mood",
];

/// One of each way to pack a value.
const VECTOR: &str = "SELECT 1::int4 AS a, -2::int8 AS b, 'né'::text AS c, 1.5::float8 AS d, \
     '2026-11-22 10:00:00.5+00'::timestamptz AS e, NULL::int4 AS f, '10.0.0.1'::inet AS g, ''::text AS h";

/// [`VECTOR`] packed, and the format of each column.
const PACKED: [(&[u8], WireFormat); 8] = [
    (b"\x00\x00\x00\x04\x00\x00\x00\x01", WireFormat::Binary),
    (b"\x00\x00\x00\x08\xff\xff\xff\xff\xff\xff\xff\xfe", WireFormat::Binary),
    (b"\x00\x00\x00\x03n\xc3\xa9", WireFormat::Binary),
    (b"\x00\x00\x00\x08\x3f\xf8\x00\x00\x00\x00\x00\x00", WireFormat::Binary),
    // Microseconds from 2000-01-01 00:00:00 UTC.
    (b"\x00\x00\x00\x08\x00\x03\x03\xd9\x4f\x21\x49\x20", WireFormat::Binary),
    (b"\xff\xff\xff\xff", WireFormat::Binary),
    (b"\x00\x00\x00\x0810.0.0.1", WireFormat::Text),
    (b"\x00\x00\x00\x00", WireFormat::Binary),
];

/// A thousand rows of all sorts.
const MIXED: &str = "\
    SELECT n AS i4, n * 5000000000 AS i8, (n % 100)::int2 AS i2, n::oid AS o, n % 2 = 0 AS b, n / 7.0::float8 AS f8, \
        (n / 7.0)::float4 AS f4, repeat('é', n % 50) AS t, decode(md5(n::text), 'hex') AS raw, \
        '10.0.0.0'::inet + n AS address, int4range(n, n + 5) AS span, \
        CASE WHEN n % 3 = 0 THEN 'sparse' END AS sparse, CASE WHEN n % 3 = 1 THEN n END AS sparse_number \
    FROM generate_series(1, 1000) AS n";

#[tokio::test(flavor = "multi_thread")]
async fn the_documented_bytes_are_what_comes() {
    let database = Database::create();
    let broker = Broker::start(&database).await;
    let session = broker.session().await;
    let bytes = PACKED.map(|(bytes, _)| bytes).concat();
    let formats = PACKED.map(|(_, format)| format);
    let of = |columns: &[Column]| columns.iter().map(Column::wire_format).collect::<Vec<_>>();
    let executed = execute(&session, VECTOR).await;
    assert_eq!(executed.packed_rows[..], bytes[..]);
    assert_eq!(of(&executed.columns), formats);
    assert_eq!((executed.rows.len(), executed.row_count, executed.command_tag.as_str()), (0, 1, "SELECT 1"));
    let streamed = stream(&session, VECTOR).await;
    assert_eq!(streamed.chunks.len(), 1);
    let chunk = &streamed.chunks[0];
    assert_eq!(chunk.packed_rows[..], bytes[..]);
    assert_eq!((chunk.rows.len(), chunk.row_count), (0, 1));
    assert_eq!(streamed.columns, executed.columns);
    // With values, nothing is packed.
    let values = session.execute(VECTOR).await.unwrap();
    assert_eq!(of(&values.columns), [WireFormat::Unspecified; 8]);
    assert!(values.packed_rows.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn every_type_is_packed_as_postgresql_sends_or_prints_it() {
    let database = database_with_types();
    let broker = Broker::start(&database).await;
    let session = broker.session().await;
    let oids: Vec<_> = TYPES.iter().map(|(name, ..)| format!("{}::regtype", quoted(name))).collect();
    let senders = format!(
        "SELECT typsend FROM unnest(ARRAY[{}]::oid[]) WITH ORDINALITY AS named (oid, n) \
         JOIN pg_type USING (oid) ORDER BY n",
        oids.join(", ")
    );
    let senders = database.cells(&senders);
    assert_eq!(senders.len(), TYPES.len());
    for ((name, _, literals), sender) in TYPES.iter().zip(&senders) {
        let probe = session.execute(&format!("SELECT NULL::{name}")).await.unwrap();
        // A domain's is its base type's.
        let type_name = probe.columns[0].type_name.as_str();
        let is_binary = BINARY.contains(&type_name);
        let sender = is_binary.then(|| sender[0].as_deref().unwrap());
        let alone = literals.iter().map(|literal| format!("{}::{name}::\"{type_name}\"", quoted(literal)));
        is_packed(&database, &session, &alone.collect::<Vec<_>>(), sender).await;
        let [a, b] = [literals[0], literals[literals.len() - 1]].map(quoted);
        let arrays = [
            format!("ARRAY[{a}, NULL, {b}]::{name}[]"),
            format!("ARRAY[[{a}], [{b}]]::{name}[]"),
            format!("'{{}}'::{name}[]"),
        ];
        // Nobody could know what an array of a domain is made of.
        let is_domain = DOMAINS.contains(name);
        is_packed(&database, &session, &arrays, (is_binary && !is_domain).then_some("array_send")).await;
        // A transaction lasts a minute at most.
        session.rollback().await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn unpacked_rows_are_the_values() {
    let database = Database::create();
    let broker = Broker::start(&database).await;
    let session = broker.session().await;
    let values = session.execute(MIXED).await.unwrap();
    let expected: Vec<_> = values.rows.iter().map(kinds_of).collect();
    let executed = execute(&session, MIXED).await;
    assert_eq!(decoded(&executed.columns, &executed.packed_rows), expected);
    assert_eq!(executed.row_count, 1000);
    let streamed = stream(&session, MIXED).await;
    let rows: Vec<_> =
        streamed.chunks.iter().flat_map(|chunk| decoded(&streamed.columns, &chunk.packed_rows)).collect();
    assert_eq!(rows, expected);
    assert_eq!(streamed.chunks.iter().map(|chunk| chunk.row_count).sum::<u32>(), 1000);
    // But for how they are packed, the columns are the same.
    let plain = |column| Column { wire_format: WireFormat::Unspecified.into(), ..column };
    assert_eq!(executed.columns.into_iter().map(plain).collect::<Vec<_>>(), values.columns);
}

#[tokio::test(flavor = "multi_thread")]
async fn rows_without_columns_are_counted_and_results_without_rows_are_empty() {
    let database = Database::create();
    let broker = Broker::start(&database).await;
    let session = broker.session().await;
    for (sql, columns, count, tag) in [
        ("SELECT FROM generate_series(1, 4)", 0, 4, "SELECT 4"),
        ("SELECT 1 WHERE false", 1, 0, "SELECT 0"),
        ("UPDATE accounts SET balance = 7", 0, 2, "UPDATE 2"),
        ("CREATE TABLE made (id int)", 0, 0, "CREATE TABLE"),
    ] {
        let executed = execute(&session, sql).await;
        assert_eq!((executed.columns.len(), executed.row_count, executed.command_tag.as_str()), (columns, count, tag));
        assert!(executed.packed_rows.is_empty() && executed.rows.is_empty());
        session.rollback().await.unwrap();
        let streamed = stream(&session, sql).await;
        let trailer = streamed.end.unwrap();
        assert_eq!((streamed.columns.len(), trailer.row_count, trailer.command_tag.as_str()), (columns, count, tag));
        assert!(streamed.chunks.iter().all(|chunk| chunk.packed_rows.is_empty()));
        session.rollback().await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn packed_rows_are_within_the_same_limits() {
    let database = Database::create();
    let limits = "[profiles.default]\nresult_rows_max = 100\nresult_bytes_max = 4096";
    let broker = Broker::start_with(&database, "", limits).await;
    let session = broker.session().await;
    for (sql, max_rows) in [
        ("SELECT generate_series(1, 101)", 0),
        ("SELECT generate_series(1, 6)", 5),
        ("SELECT repeat('x', 5000)", 0),
        ("SELECT repeat('x', 500) FROM generate_series(1, 50)", 0),
    ] {
        let request = pb::ExecuteRequest { max_rows, ..packed(&session, sql) };
        let failure = session.run(request).await.unwrap_err();
        assert_eq!((failure.code, failure.reason.as_str()), (Code::ResourceExhausted, "RESULT_TOO_LARGE"), "{sql}");
        assert_eq!(failure.transaction_state(), TransactionState::Failed);
        session.rollback().await.unwrap();
    }
    let exact = execute(&session, "SELECT generate_series(1, 100)").await;
    assert_eq!((exact.row_count, exact.packed_rows.len()), (100, 800));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_repeated_call_gives_its_packed_answer_again() {
    let database = Database::create();
    let broker = Broker::start(&database).await;
    let session = broker.session().await;
    let sql = "UPDATE accounts SET balance = balance + 1 RETURNING id, balance";
    let numbered = pb::ExecuteRequest { seq: 1, ..packed(&session, sql) };
    let first = session.run(numbered.clone()).await.unwrap();
    assert!(!first.packed_rows.is_empty());
    let again = session.run(numbered.clone()).await.unwrap();
    assert_eq!((&again.packed_rows, &again.columns), (&first.packed_rows, &first.columns));
    // In another format, it is another call.
    let other = pb::ExecuteRequest { result_format: ResultFormat::Values.into(), ..numbered };
    assert_eq!(session.run(other).await.unwrap_err().reason, "INVALID_REQUEST");
    session.commit().await.unwrap();
    assert_eq!(database.balances(), "101 101");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_format_that_there_is_not_is_refused_with_nothing_run() {
    let database = Database::create();
    let broker = Broker::start(&database).await;
    let session = broker.session().await;
    session.execute("SELECT 1").await.unwrap();
    let sql = "UPDATE accounts SET balance = 7";
    let executed = pb::ExecuteRequest { result_format: 9, ..session.statement(sql, vec![]) };
    let streamed = pb::ExecuteStreamRequest { result_format: 9, ..session.streaming(sql, vec![]) };
    for failure in [session.run(executed).await.unwrap_err(), session.stream(streamed).await.end.unwrap_err()] {
        assert_eq!((failure.code, failure.field.as_deref()), (Code::InvalidArgument, Some("result_format")));
        assert_eq!(failure.transaction_state(), TransactionState::Open);
    }
    session.commit().await.unwrap();
    assert_eq!(database.balances(), "100 100");
}

fn packed(session: &Session, sql: &str) -> pb::ExecuteRequest {
    pb::ExecuteRequest { result_format: ResultFormat::Packed.into(), ..session.statement(sql, vec![]) }
}

async fn execute(session: &Session, sql: &str) -> pb::ExecuteResponse {
    session.run(packed(session, sql)).await.unwrap_or_else(|failure| panic!("{sql}: {failure:?}"))
}

async fn stream(session: &Session, sql: &str) -> Streamed {
    let result_format = ResultFormat::Packed.into();
    let streamed = session.stream(pb::ExecuteStreamRequest { result_format, ..session.streaming(sql, vec![]) }).await;
    assert!(streamed.end.is_ok(), "{sql}: {:?}", streamed.end);
    streamed
}

/// The values are packed in binary as the function `sender` makes them, or without one as psql prints them.
async fn is_packed(database: &Database, session: &Session, values: &[String], sender: Option<&str>) {
    let (format, expected) = if let Some(sender) = sender {
        // PostgreSQL's own words for it, packed as they are.
        let sent: Vec<_> = values.iter().map(|value| format!("{sender}({value})")).collect();
        let executed = execute(session, &format!("SELECT {}", sent.join(", "))).await;
        (WireFormat::Binary, unpacked(&executed.packed_rows, values.len()).remove(0))
    } else {
        let printed = database.cells(&format!("SELECT {}, 'witness'", values.join(", "))).remove(0);
        (WireFormat::Text, printed.into_iter().map(|cell| cell.map(String::into_bytes)).collect())
    };
    let executed = execute(session, &format!("SELECT {}", values.join(", "))).await;
    let packed = unpacked(&executed.packed_rows, values.len()).remove(0);
    for (((packed, expected), column), value) in packed.iter().zip(&expected).zip(&executed.columns).zip(values) {
        assert_eq!((packed, column.wire_format()), (expected, format), "{value}");
    }
}

/// Each row's columns, as the protocol says they are packed.
fn unpacked(mut rest: &[u8], columns: usize) -> Vec<Vec<Option<Vec<u8>>>> {
    let mut rows = Vec::new();
    while !rest.is_empty() {
        let mut row = Vec::with_capacity(columns);
        for _ in 0..columns {
            let (length, after) = rest.split_first_chunk::<4>().unwrap();
            rest = after;
            row.push(match i32::from_be_bytes(*length) {
                -1 => None,
                length => {
                    let (value, after) = rest.split_at(length.try_into().unwrap());
                    rest = after;
                    Some(value.to_vec())
                }
            });
        }
        rows.push(row);
    }
    rows
}

/// Rows of [`MIXED`] as values.
fn decoded(columns: &[Column], packed: &[u8]) -> Vec<Vec<Kind>> {
    let row = |row: Vec<Option<Vec<u8>>>| {
        row.into_iter().zip(columns).map(|(bytes, column)| bytes.map_or_else(null, |bytes| value(column, &bytes)))
    };
    unpacked(packed, columns.len()).into_iter().map(|bytes| row(bytes).collect()).collect()
}

fn value(column: &Column, bytes: &[u8]) -> Kind {
    let string = || text(std::str::from_utf8(bytes).unwrap());
    if column.wire_format() == WireFormat::Text {
        return string();
    }
    match column.type_name.as_str() {
        "bool" => Kind::BoolValue(bytes == [1]),
        "int2" => int(i16::from_be_bytes(bytes.try_into().unwrap()).into()),
        "int4" => int(i32::from_be_bytes(bytes.try_into().unwrap()).into()),
        "int8" => int(i64::from_be_bytes(bytes.try_into().unwrap())),
        "oid" => int(u32::from_be_bytes(bytes.try_into().unwrap()).into()),
        "float4" => Kind::DoubleValue(f32::from_be_bytes(bytes.try_into().unwrap()).into()),
        "float8" => Kind::DoubleValue(f64::from_be_bytes(bytes.try_into().unwrap())),
        "bytea" => Kind::BytesValue(bytes.to_vec().into()),
        "text" => string(),
        other => panic!("no column of the mixed rows is of type {other}"),
    }
}
