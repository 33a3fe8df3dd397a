use proptest::prelude::*;

use super::*;
use crate::broker::statement::WireFormat;

fn message(tag: u8, body: &[u8]) -> Vec<u8> {
    let length = u32::try_from(body.len() + 4).unwrap();
    [&[tag], length.to_be_bytes().as_slice(), body].concat()
}

/// What of these pieces, each read after what was held back, is passed on.
fn read(wire: &Wire, pieces: &[&[u8]]) -> Vec<u8> {
    let mut incoming = Incoming::default();
    let mut passed = BytesMut::new();
    for piece in pieces {
        let mut news = [incoming.held(), piece].concat();
        let count = incoming.pass(&mut news, wire);
        incoming.put(&news[..count], &mut passed);
    }
    passed.to_vec()
}

/// What goes when the driver writes these pieces.
fn write(wire: &Wire, outgoing: &mut Outgoing, pieces: &[&[u8]]) -> Vec<u8> {
    let mut written = Vec::new();
    for piece in pieces {
        if outgoing.is_changing() || wire.changes_binds() {
            outgoing.pass(piece, wire, Pass::Changed).unwrap();
            written.extend_from_slice(&outgoing.changed.split());
        } else {
            outgoing.pass(piece, wire, Pass::AsItIs).unwrap();
            written.extend_from_slice(piece);
        }
    }
    written
}

fn pieces<'a>(stream: &'a [u8], cuts: &[prop::sample::Index]) -> Vec<&'a [u8]> {
    let mut at: Vec<usize> = cuts.iter().map(|cut| cut.index(stream.len() + 1)).collect();
    at.extend([0, stream.len()]);
    at.sort_unstable();
    at.windows(2).map(|cut| &stream[cut[0]..cut[1]]).collect()
}

#[test]
fn the_startup_message_has_no_tag() {
    let (wire, startup) = (Wire::new(), message(0, b"user\0x\0\0"));
    let query = message(b'Q', b"x");
    let written = write(&wire, &mut Outgoing::new(), &[&startup[1..], &query]);
    assert_eq!((written, wire.lock().owed.len()), ([&startup[1..], &query].concat(), 2));
}

#[tokio::test]
async fn a_wire_is_settled_when_every_request_has_its_ready_for_query() {
    let wire = Wire::new();
    wire.received(b'Z', b"I");
    wire.sent(b'Q');
    wire.sent(b'S');
    wire.received(b'C', b"BEGIN\0");
    wire.received(b'Z', b"T");
    wire.received(b'Z', b"E");
    assert_eq!(wire.settled().await, Ok(TransactionStatus::Failed));
    assert_eq!(wire.next_tag().as_deref(), Some("BEGIN"));
}

#[test]
fn a_copy_has_one_sync_that_is_counted_when_it_begins() {
    let (wire, mut outgoing) = (Wire::new(), Outgoing::new());
    write(&wire, &mut outgoing, &[&message(0, b"\0")[1..]]);
    wire.received(b'Z', b"I");
    wire.expect(Bind { sync: Sync::Waits, ..Bind::default() });
    let begin = [message(b'B', &[0; 8]), message(b'E', b"\0\0\0\0\0"), message(b'S', b"")];
    let written = write(&wire, &mut outgoing, &[&begin.concat()]);
    assert_eq!((written, wire.lock().owed.len()), (begin[..2].concat(), 1));
    let end = [message(b'd', b"data"), message(b'c', b""), message(b'S', b"")].concat();
    assert_eq!((write(&wire, &mut outgoing, &[&end]), wire.lock().owed.len()), (end, 1));
    write(&wire, &mut outgoing, &[&message(b'S', b"")]);
    assert_eq!(wire.lock().owed.len(), 2);
}

#[test]
fn a_cancelled_request_is_counted_by_its_sqlstate() {
    let wire = Wire::new();
    wire.received(b'E', b"SFEHLER\0VERROR\0C57014\0Mstopped\0");
    wire.received(b'E', b"SERROR\0VERROR\0C25P02\0MC57014\0");
    assert_eq!(wire.cancelled(), 1);
}

#[tokio::test]
async fn rows_that_nobody_wants_do_not_get_through() {
    let wire = Wire::new();
    let (row, tag) = (message(b'D', b"row"), message(b'C', b"SELECT 1\0"));
    wire.without_rows(async { assert_eq!(read(&wire, &[&row, &tag]), tag) }).await;
    assert_eq!(read(&wire, &[&row, &tag]), [row, tag].concat());
}

#[tokio::test]
async fn a_lost_connection_owes_nothing_any_more() {
    let wire = Wire::new();
    wire.lose("cut".into());
    assert_eq!(wire.settled().await, Err(Lost("cut".into())));
    assert_eq!(wire.lost().await, Lost("cut".into()));
}

proptest! {
    #[test]
    fn what_comes_is_passed_on_however_it_is_cut_but_for_rows_that_are_too_large(
        bodies in prop::collection::vec((prop_oneof![Just(b'D'), Just(b'd'), Just(b'C'), any::<u8>()], 0..100_usize), 0..8),
        cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..20),
    ) {
        let wire = Wire::new();
        wire.take_out_rows(50);
        let messages: Vec<_> = bodies.iter().map(|(tag, length)| message(*tag, &vec![b'x'; *length])).collect();
        let passes = |(tag, length): &(u8, usize)| !matches!(tag, b'D' | b'd') || *length <= 50;
        let expected: Vec<u8> =
            bodies.iter().zip(&messages).filter(|(body, _)| passes(body)).flat_map(|(_, m)| m.clone()).collect();
        prop_assert_eq!(read(&wire, &pieces(&messages.concat(), &cuts)), expected);
        let taken_out = wire.lock().row_taken_out || wire.lock().tags.iter().any(|tag| tag.row_taken_out);
        prop_assert_eq!(taken_out, !bodies.iter().all(passes));
        let tags = bodies.iter().filter(|(tag, _)| *tag == b'C').count();
        prop_assert_eq!(wire.lock().tags.len(), tags);
    }

    #[test]
    fn a_bind_asks_for_its_formats_however_it_is_cut(
        binds in prop::collection::vec((0..4_usize, 0..20_usize), 1..5),
        cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..20),
    ) {
        let wire = Wire::new();
        let mut outgoing = Outgoing::new();
        write(&wire, &mut outgoing, &[&message(0, b"\0")[1..]]);
        let (mut driver, mut expected) = (Vec::new(), Vec::new());
        for (columns, length) in binds {
            let formats = (columns > 0).then(|| vec![WireFormat::Text; columns].into());
            wire.expect(Bind { formats, ..Bind::default() });
            let start = vec![b'p'; length];
            driver.extend(message(b'B', &[&start[..], &Outgoing::ALL_BINARY].concat()));
            driver.extend(message(b'S', b""));
            let asked = match columns {
                0 => Outgoing::ALL_BINARY.to_vec(),
                columns => [&u16::try_from(columns).unwrap().to_be_bytes()[..], &vec![0; 2 * columns]].concat(),
            };
            expected.extend(message(b'B', &[start, asked].concat()));
            expected.extend(message(b'S', b""));
        }
        prop_assert_eq!(write(&wire, &mut outgoing, &pieces(&driver, &cuts)), expected);
        prop_assert!(!wire.changes_binds());
    }

    #[test]
    fn requests_that_share_a_sync_are_answered_as_if_each_had_its_own(
        count in 1..6_usize,
        failing in prop::option::of(0..6_usize),
        cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..20),
    ) {
        let (wire, mut outgoing) = (Wire::new(), Outgoing::new());
        write(&wire, &mut outgoing, &[&message(0, b"\0")[1..]]);
        wire.received(b'Z', b"I");
        let request = [message(b'B', &[0; 8]), message(b'E', b"\0\0\0\0\0")].concat();
        let sync = message(b'S', b"");
        for index in 0..count {
            let sync = if index + 1 < count { Sync::Joins } else { Sync::Goes };
            wire.expect(Bind { sync, ..Bind::default() });
        }
        let driver = [request.clone(), sync.clone()].concat().repeat(count);
        let written = write(&wire, &mut outgoing, &pieces(&driver, &cuts));
        prop_assert_eq!(written, [request.repeat(count), sync].concat());
        prop_assert_eq!((wire.lock().owed.len(), wire.changes_binds()), (1, false));

        let failing = failing.filter(|failing| *failing < count);
        let answer = [message(b'2', b""), message(b'C', b"SELECT 0\0")].concat();
        let (error, ready) = (message(b'E', b"SERROR\0C22012\0\0"), |status| message(b'Z', &[status]));
        let mut aborted = BytesMut::new();
        Told::Aborted(1).write(&mut aborted);
        let (server, expected) = match failing {
            None => {
                let server = [answer.repeat(count), ready(b'T')].concat();
                (server, [answer, ready(b'T')].concat().repeat(count))
            }
            Some(failing) => {
                let server = [answer.repeat(failing), error.clone(), ready(b'E')].concat();
                let before = [answer, ready(b'T')].concat().repeat(failing);
                (server, [before, error, ready(b'E'), aborted.repeat(count - 1 - failing)].concat())
            }
        };
        prop_assert_eq!(read(&wire, &pieces(&server, &cuts)), expected);
        prop_assert!(wire.lock().owed.is_empty());
    }

    #[test]
    fn hostile_bytes_are_looked_at_without_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        read(&Wire::new(), &[&bytes]);
    }
}
