//! Messages of the extended query protocol that the driver has no words for.

use bytes::{BufMut, BytesMut};

/// The end of a group of requests.
pub(in crate::postgres) fn sync(to: &mut BytesMut) {
    put(b'S', to, |_| {});
}

/// Has PostgreSQL prepare a statement without parameters.
pub(in crate::postgres) fn parse(name: &str, sql: &str, to: &mut BytesMut) {
    put(b'P', to, |to| {
        put_text(name, to);
        put_text(sql, to);
        to.put_u16(0);
    });
}

/// Has PostgreSQL run a statement without parameters, and return what it returns in text.
pub(in crate::postgres) fn run(name: &str, to: &mut BytesMut) {
    put(b'B', to, |to| {
        put_text("", to);
        put_text(name, to);
        to.put_slice(&[0; 6]);
    });
    put(b'E', to, |to| {
        put_text("", to);
        to.put_u32(0);
    });
}

/// A row of texts, but for its header.
pub(in crate::postgres) fn put_row(values: &[&str], to: &mut BytesMut) {
    to.put_u16(u16::try_from(values.len()).unwrap_or(u16::MAX));
    for value in values {
        to.put_u32(u32::try_from(value.len()).unwrap_or(u32::MAX));
        to.put_slice(value.as_bytes());
    }
}

fn put(tag: u8, to: &mut BytesMut, body: impl FnOnce(&mut BytesMut)) {
    to.put_u8(tag);
    let at = to.len();
    to.put_u32(0);
    body(to);
    let length = u32::try_from(to.len() - at).unwrap_or(u32::MAX);
    to[at..at + 4].copy_from_slice(&length.to_be_bytes());
}

fn put_text(text: &str, to: &mut BytesMut) {
    to.put_slice(text.as_bytes());
    to.put_u8(0);
}
