//! What the hot pieces take, one by one: `cargo bench --bench pieces`. Each is called as a transaction calls it, without
//! gRPC and without a database.

#![allow(clippy::unwrap_used, reason = "it fails where it cannot measure")]

mod support;

use std::hint::black_box;

use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use session_broker::broker::BeginSession;
use session_broker::broker::commit::{Cluster, ClusterXid, CommitTokens};
use session_broker::broker::principal::Principal;
use session_broker::broker::statement::{Parameter, Statement};
use session_broker::broker::token::SessionToken;
use session_broker::broker::value::Value;
use session_broker::postgres::value::{Delimiters, decode, encode, format};
use tokio::runtime::Runtime;
use tokio_postgres::types::Type;

use support::{LEASE_TTL_MAX, broker};

/// How many sessions live while another is begun, looked up and ended.
const SESSIONS: usize = 100_000;

/// Reading a result's values, and printing parameters.
fn values(criterion: &mut Criterion) {
    let numeric: [u16; 8] = [4, 1, 0, 4, 12, 3456, 7890, 1200];
    let numeric: Vec<u8> = numeric.iter().flat_map(|word| word.to_be_bytes()).collect();
    let array: Vec<u8> =
        [1_u32, 0, 23, 4, 1, 4, 1, 4, 2, 4, 3, 4, 4].iter().flat_map(|word| word.to_be_bytes()).collect();
    let results: [(&str, Type, Vec<u8>); 7] = [
        ("int4", Type::INT4, 42_i32.to_be_bytes().into()),
        ("float8", Type::FLOAT8, 0.1_f64.to_be_bytes().into()),
        ("text", Type::TEXT, "a text of some thirty characters".into()),
        ("numeric", Type::NUMERIC, numeric),
        ("timestamptz", Type::TIMESTAMPTZ, 845_000_000_123_456_i64.to_be_bytes().into()),
        ("uuid", Type::UUID, (0..16).collect()),
        ("int4 array", Type::INT4_ARRAY, array),
    ];
    let delimiters = Delimiters::default();
    let mut group = criterion.benchmark_group("decode");
    group.throughput(Throughput::Elements(1));
    for (name, type_, bytes) in &results {
        let format = format(type_);
        group.bench_function(*name, |bencher| {
            bencher.iter(|| {
                let mut bytes_left = usize::MAX;
                decode(type_, format, &delimiters, Some(black_box(bytes)), &mut bytes_left).unwrap();
            });
        });
    }
    group.finish();

    let parameters = [
        ("int4", Type::INT4, Value::Int(42)),
        ("float8", Type::FLOAT8, Value::Double(0.1)),
        ("text", Type::TEXT, Value::Text("a text of some thirty characters".into())),
    ];
    let mut group = criterion.benchmark_group("encode");
    group.throughput(Throughput::Elements(1));
    for (name, type_, value) in parameters {
        let (parameters, types) = ([Parameter { value, type_name: None }], [type_]);
        group.bench_function(name, |bencher| {
            bencher.iter(|| encode(black_box(&parameters), &types, &delimiters).unwrap());
        });
    }
    group.finish();
}

/// What is looked at before a statement goes to PostgreSQL.
fn guard(criterion: &mut Criterion) {
    let long = format!("SELECT * FROM accounts WHERE id IN ({})", vec!["$1"; 1000].join(", "));
    let mut group = criterion.benchmark_group("guard");
    for (name, sql) in [
        ("a short statement", "UPDATE pgbench_accounts SET abalance = abalance + $1 WHERE aid = $2"),
        ("a long statement", &long),
    ] {
        group.throughput(Throughput::Bytes(sql.len() as u64));
        group.bench_function(name, |bencher| {
            bencher.iter_batched(
                || sql.to_owned(),
                |sql| Statement::new(sql, Vec::new()).unwrap(),
                BatchSize::SmallInput,
            );
        });
    }
    group.finish();
}

/// Session tokens and commit tokens.
fn tokens(criterion: &mut Criterion) {
    let runtime = Runtime::new().unwrap();
    let _guard = runtime.enter();
    let broker = broker(1);
    let principal = Principal::anonymous();
    let session = broker.begin_session(&principal, BeginSession::default()).unwrap().session;
    let text = session.token().expose();
    let tokens = CommitTokens::new(&[7; CommitTokens::KEY_BYTES_MIN]);
    let transaction = ClusterXid {
        cluster: Cluster { system_identifier: 1 << 60, timeline: 1, epoch: 0, database: 5 },
        xid: 1 << 40,
    };
    let sealed = tokens.seal(&principal, "main", &transaction).to_string();
    let mut group = criterion.benchmark_group("token");
    group.bench_function("session token read", |bencher| {
        bencher.iter(|| SessionToken::parse(black_box(&text)).unwrap());
    });
    group.bench_function("commit token sealed", |bencher| {
        bencher.iter(|| tokens.seal(&principal, "main", black_box(&transaction)));
    });
    group.bench_function("commit token opened", |bencher| {
        bencher.iter(|| tokens.open(&principal, black_box(&sealed)).unwrap());
    });
    group.finish();
}

/// Sessions among many.
fn registry(criterion: &mut Criterion) {
    let runtime = Runtime::new().unwrap();
    let _guard = runtime.enter();
    let broker = broker(SESSIONS);
    let principal = Principal::anonymous();
    let begin = || {
        let request = BeginSession { lease_ttl: Some(LEASE_TTL_MAX), ..BeginSession::default() };
        broker.begin_session(&principal, request).unwrap().session
    };
    let sessions: Vec<_> = (0..SESSIONS).map(|_| begin()).collect();
    let token = sessions[SESSIONS / 2].token().clone();
    let mut group = criterion.benchmark_group(format!("among {SESSIONS} sessions"));
    group.throughput(Throughput::Elements(1));
    group.bench_function("one looked up", |bencher| {
        bencher.iter(|| broker.session(&principal, black_box(&token)).unwrap());
    });
    group.bench_function("a lease renewed", |bencher| {
        bencher.iter(|| sessions[SESSIONS / 2].keep_alive().unwrap());
    });
    group.bench_function("one begun and closed", |bencher| {
        bencher.iter(|| runtime.block_on(begin().close()).unwrap());
    });
    group.finish();
}

criterion_group!(pieces, values, guard, tokens, registry);
criterion_main!(pieces);
