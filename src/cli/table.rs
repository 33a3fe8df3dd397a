//! What the command line prints: aligned tables, JSON, CSV, and the place in a statement that an error is about.
//!
//! Knows the protocol's values, and nothing of calls, files or terminals. Invariants: what is printed for people has no
//! control character but line ends and the colours put in here; a table holds no more rows than it measures.

use std::collections::HashSet;
use std::io::{self, Write};
use std::mem;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Number, Value as Json};
use unicode_width::UnicodeWidthStr;

use crate::grpc::pb;
use crate::hex;
use pb::value::Kind;

/// What stands for NULL in a table.
const NULL: &str = "(null)";

/// Whether output is coloured.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Ink {
    Plain,
    Coloured,
}

/// How a piece of text stands out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Tone {
    Bold,
    Dim,
    Red,
}

impl Ink {
    pub(super) fn paint(self, tone: Tone, text: &str) -> String {
        let code = match tone {
            Tone::Bold => 1,
            Tone::Dim => 2,
            Tone::Red => 31,
        };
        match self {
            Self::Plain => text.to_owned(),
            Self::Coloured => format!("\u{1b}[{code}m{text}\u{1b}[0m"),
        }
    }
}

/// Text that a terminal shows as it is: what would move its cursor, or turn the text around, is written out.
pub(super) fn escape(text: &str) -> String {
    // The ends of lines and paragraphs among them.
    let turns = |c: char| matches!(u32::from(c), 0x61c | 0x200e..=0x200f | 0x2028..=0x202e | 0x2066..=0x2069);
    let mut escaped = String::with_capacity(text.len());
    for c in text.chars() {
        if c.is_control() || turns(c) {
            escaped.extend(c.escape_default());
        } else {
            escaped.push(c);
        }
    }
    escaped
}

/// The line of `sql` with the character at `position`, counted from 1, and below it a caret; none when there is no such
/// place.
pub(super) fn pointed(sql: &str, position: u32) -> Option<[String; 2]> {
    /// How many characters are shown on either side.
    const SHOWN: usize = 60;

    let sql: Vec<char> = sql.chars().collect();
    let at = usize::try_from(position).ok()?.checked_sub(1).filter(|at| *at <= sql.len())?;
    let begin = sql[..at].iter().rposition(|c| *c == '\n').map_or(0, |end| end + 1);
    let end = sql[at..].iter().position(|c| *c == '\n').map_or(sql.len(), |length| at + length);
    let (from, to) = (begin.max(at.saturating_sub(SHOWN)), end.min(at + SHOWN));
    let shown = |part: &[char]| escape(&part.iter().collect::<String>());
    let before = format!("{}{}", if from > begin { "..." } else { "" }, shown(&sql[from..at]));
    let after = format!("{}{}", shown(&sql[at..to]), if to < end { "..." } else { "" });
    let caret = format!("{:width$}^", "", width = before.width());
    Some([format!("{before}{after}"), caret])
}

/// A duration for people: two units at most.
pub(super) fn short(duration: Duration) -> String {
    let seconds = duration.as_secs();
    let (minutes, hours, days) = (seconds / 60, seconds / 3600, seconds / 86_400);
    match seconds {
        0..10 => format!("{seconds}.{}s", duration.subsec_millis() / 100),
        10..60 => format!("{seconds}s"),
        60..3600 => format!("{minutes}m{:02}s", seconds % 60),
        3600..86_400 => format!("{hours}h{:02}m", minutes % 60),
        _ => format!("{days}d{:02}h", hours % 24),
    }
}

/// To which side a column's cells lean.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Align {
    Left,
    Right,
}

/// A cell of a table.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Cell {
    /// Escaped already.
    Text(String),
    Null,
}

impl Cell {
    pub(super) fn text(text: &str) -> Self {
        Self::Text(escape(text))
    }

    fn shown(&self) -> &str {
        match self {
            Self::Text(text) => text,
            Self::Null => NULL,
        }
    }
}

/// Rows in columns as wide as the first of them need.
#[derive(Debug)]
pub(super) struct Table {
    headings: Vec<(String, Align)>,
    ink: Ink,
    stage: Stage,
}

#[derive(Debug)]
enum Stage {
    /// The rows so far, and their bytes.
    Measuring(Vec<Vec<Cell>>, usize),
    /// The columns' widths.
    Measured(Vec<usize>),
}

impl Table {
    /// What decides how wide the columns are: so many rows, of so many bytes. What comes after is printed as it comes.
    const ROWS_MEASURED: usize = 1000;
    const BYTES_MEASURED: usize = 1024 * 1024;
    /// The widest that a column is made; what is wider sticks out, rather than that all others have as many blanks.
    const WIDTH_MAX: usize = 100;

    pub(super) fn new(headings: impl IntoIterator<Item = (String, Align)>, ink: Ink) -> Self {
        let headings = headings.into_iter().map(|(title, align)| (escape(&title), align)).collect();
        Self { headings, ink, stage: Stage::Measuring(Vec::new(), 0) }
    }

    pub(super) fn row(&mut self, out: &mut dyn Write, cells: Vec<Cell>) -> io::Result<()> {
        match &mut self.stage {
            Stage::Measured(_) => self.print(out, &cells),
            Stage::Measuring(rows, bytes) => {
                *bytes += cells.iter().map(|cell| cell.shown().len()).sum::<usize>();
                rows.push(cells);
                if rows.len() < Self::ROWS_MEASURED && *bytes < Self::BYTES_MEASURED { Ok(()) } else { self.end(out) }
            }
        }
    }

    /// Prints what is held back.
    pub(super) fn end(&mut self, out: &mut dyn Write) -> io::Result<()> {
        let Stage::Measuring(rows, _) = &mut self.stage else { return Ok(()) };
        let rows = mem::take(rows);
        let needed = |text: &str| text.width().min(Self::WIDTH_MAX);
        let mut widths: Vec<_> = self.headings.iter().map(|(title, _)| needed(title)).collect();
        for row in &rows {
            for (width, cell) in widths.iter_mut().zip(row) {
                *width = needed(cell.shown()).max(*width);
            }
        }
        self.stage = Stage::Measured(widths);
        self.print_headings(out)?;
        rows.iter().try_for_each(|row| self.print(out, row))
    }

    fn print_headings(&self, out: &mut dyn Write) -> io::Result<()> {
        if self.headings.is_empty() {
            return Ok(());
        }
        self.print_line(out, self.headings.iter().map(|(title, _)| (title.as_str(), Some(Tone::Bold))))?;
        let rules: Vec<String> = self.widths().iter().map(|width| "-".repeat(*width)).collect();
        self.print_line(out, rules.iter().map(|rule| (rule.as_str(), None)))
    }

    fn print(&self, out: &mut dyn Write, cells: &[Cell]) -> io::Result<()> {
        self.print_line(
            out,
            cells.iter().map(|cell| match cell {
                Cell::Text(text) => (text.as_str(), None),
                Cell::Null => (NULL, Some(Tone::Dim)),
            }),
        )
    }

    fn print_line<'a>(
        &self,
        out: &mut dyn Write,
        cells: impl Iterator<Item = (&'a str, Option<Tone>)>,
    ) -> io::Result<()> {
        let last = self.headings.len().saturating_sub(1);
        for (index, ((text, tone), ((_, align), width))) in
            cells.zip(self.headings.iter().zip(self.widths())).enumerate()
        {
            let blanks = " ".repeat(width.saturating_sub(text.width()));
            let text = tone.map_or_else(|| text.to_owned(), |tone| self.ink.paint(tone, text));
            let gap = if index == 0 { "" } else { "  " };
            match align {
                Align::Right => write!(out, "{gap}{blanks}{text}")?,
                // Nothing stands behind it.
                Align::Left if index == last => write!(out, "{gap}{text}")?,
                Align::Left => write!(out, "{gap}{text}{blanks}")?,
            }
        }
        writeln!(out)
    }

    fn widths(&self) -> &[usize] {
        match &self.stage {
            Stage::Measuring(..) => &[],
            Stage::Measured(widths) => widths,
        }
    }
}

/// Objects as a JSON array, one a line.
#[derive(Debug, Default)]
pub(super) struct Objects {
    count: u64,
}

impl Objects {
    /// Begins the next object's line.
    fn begin(&mut self, out: &mut dyn Write) -> io::Result<()> {
        out.write_all(if self.count == 0 { b"[\n" } else { b",\n" })?;
        self.count += 1;
        Ok(())
    }

    pub(super) fn object(&mut self, out: &mut dyn Write, object: &Json) -> io::Result<()> {
        self.begin(out)?;
        write!(out, "{object}")
    }

    pub(super) fn end(self, out: &mut dyn Write) -> io::Result<()> {
        out.write_all(if self.count == 0 { b"[]\n" } else { b"\n]\n" })
    }
}

/// How rows are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Format {
    /// For people.
    Table(Ink),
    /// A JSON array of an object for each row.
    JsonArray,
    /// A JSON object for each row, and nothing else.
    JsonLines,
    /// RFC 4180, with a header. NULL is an empty field, and empty text a quoted one.
    Csv,
}

/// Writes a result's rows, in memory of one row, or of those that a table measures.
#[derive(Debug)]
pub(super) struct RowWriter {
    types: Vec<String>,
    form: Form,
}

#[derive(Debug)]
enum Form {
    Table(Table),
    /// The keys, JSON already.
    JsonArray(Vec<String>, Objects),
    JsonLines(Vec<String>),
    Csv,
}

impl RowWriter {
    /// Begins with what comes before the first row.
    pub(super) fn begin(format: Format, columns: &[pb::Column], out: &mut dyn Write) -> io::Result<Self> {
        let form = match format {
            Format::Table(ink) => {
                let headings = columns.iter().map(|column| (column.name.clone(), align(&column.type_name)));
                Form::Table(Table::new(headings, ink))
            }
            Format::JsonArray => Form::JsonArray(keys(columns), Objects::default()),
            Format::JsonLines => Form::JsonLines(keys(columns)),
            Format::Csv => {
                if !columns.is_empty() {
                    write_record(out, columns.iter().map(|column| Some(column.name.clone())))?;
                }
                Form::Csv
            }
        };
        Ok(Self { types: columns.iter().map(|column| column.type_name.clone()).collect(), form })
    }

    pub(super) fn row(&mut self, values: &[pb::Value], out: &mut dyn Write) -> io::Result<()> {
        let typed = self.types.iter().map(String::as_str).zip(values);
        match &mut self.form {
            Form::Table(table) => {
                let cell = |(type_name, value): (&str, &pb::Value)| match text(type_name, value) {
                    Some(text) => Cell::text(&text),
                    None => Cell::Null,
                };
                table.row(out, typed.map(cell).collect())
            }
            Form::JsonArray(keys, objects) => {
                objects.begin(out)?;
                write_object(out, keys, typed)
            }
            Form::JsonLines(keys) => {
                write_object(out, keys, typed)?;
                writeln!(out)
            }
            Form::Csv => write_record(out, typed.map(|(type_name, value)| text(type_name, value))),
        }
    }

    /// Ends with what comes after the last row.
    pub(super) fn end(self, out: &mut dyn Write) -> io::Result<()> {
        match self.form {
            Form::Table(mut table) => table.end(out),
            Form::JsonArray(_, objects) => objects.end(out),
            Form::JsonLines(_) | Form::Csv => Ok(()),
        }
    }
}

fn align(type_name: &str) -> Align {
    match type_name {
        "int2" | "int4" | "int8" | "oid" | "float4" | "float8" | "numeric" | "money" => Align::Right,
        _ => Align::Left,
    }
}

/// The columns' names as JSON text. One that repeats has its number behind it.
fn keys(columns: &[pb::Column]) -> Vec<String> {
    let names: HashSet<&str> = columns.iter().map(|column| column.name.as_str()).collect();
    let mut taken = HashSet::new();
    columns
        .iter()
        .map(|column| {
            let mut key = column.name.clone();
            let mut number = 1_u64;
            // Nor may it take the place of a column that is called so.
            while taken.contains(&key) || number > 1 && names.contains(key.as_str()) {
                number += 1;
                key = format!("{}_{number}", column.name);
            }
            taken.insert(key.clone());
            Json::from(key).to_string()
        })
        .collect()
}

fn write_object<'a>(
    out: &mut dyn Write,
    keys: &[String],
    values: impl Iterator<Item = (&'a str, &'a pb::Value)>,
) -> io::Result<()> {
    out.write_all(b"{")?;
    for (index, (key, (type_name, value))) in keys.iter().zip(values).enumerate() {
        let separator = if index == 0 { "" } else { ", " };
        write!(out, "{separator}{key}: {}", json(type_name, value))?;
    }
    out.write_all(b"}")
}

/// A value as JSON: numbers, truth and lists as such; bytes as base64; all others, and floats that are no numbers, as
/// text.
fn json(type_name: &str, value: &pb::Value) -> Json {
    match value.kind.as_ref() {
        None | Some(Kind::NullValue(_)) => Json::Null,
        Some(Kind::BoolValue(value)) => Json::Bool(*value),
        Some(Kind::IntValue(value)) => Json::from(*value),
        Some(Kind::DoubleValue(value)) => {
            let text = float(type_name, *value);
            text.parse().ok().and_then(Number::from_f64).map_or_else(|| Json::String(text), Json::Number)
        }
        Some(Kind::StringValue(text)) => Json::String(text.clone()),
        Some(Kind::BytesValue(bytes)) => Json::String(STANDARD.encode(bytes)),
        Some(Kind::ListValue(list)) => Json::Array(list.values.iter().map(|value| json(type_name, value)).collect()),
    }
}

/// A value's text, as PostgreSQL would have it; none for NULL.
fn text(type_name: &str, value: &pb::Value) -> Option<String> {
    match value.kind.as_ref() {
        None | Some(Kind::NullValue(_)) => None,
        Some(Kind::BoolValue(value)) => Some(value.to_string()),
        Some(Kind::IntValue(value)) => Some(value.to_string()),
        Some(Kind::DoubleValue(value)) => Some(float(type_name, *value)),
        Some(Kind::StringValue(text)) => Some(text.clone()),
        Some(Kind::BytesValue(bytes)) => Some(bytea(bytes)),
        Some(Kind::ListValue(list)) => Some(bounds(list) + &array(type_name, list)),
    }
}

fn bytea(bytes: &[u8]) -> String {
    "\\x".chars().chain(hex::digits(bytes)).collect()
}

/// The shortest decimal that reads back as the same number of the type, or of the elements of the array's type.
fn float(type_name: &str, value: f64) -> String {
    if value.is_infinite() {
        return if value > 0.0 { "Infinity".into() } else { "-Infinity".into() };
    }
    if type_name.trim_start_matches('_') == "float4" {
        #[allow(clippy::cast_possible_truncation, reason = "it was a float4 before it was sent")]
        let value = value as f32;
        return format!("{value:?}");
    }
    format!("{value:?}")
}

/// The subscripts of an array, where they do not start at 1.
fn bounds(list: &pb::ListValue) -> String {
    if list.lower_bounds.is_empty() {
        return String::new();
    }
    let mut text = String::new();
    let mut level = Some(list);
    for lower in list.lower_bounds.iter().copied().map(i64::from) {
        let values = level.map(|list| list.values.as_slice()).unwrap_or_default();
        let length = i64::try_from(values.len()).unwrap_or(i64::MAX);
        text = format!("{text}[{lower}:{}]", lower.saturating_add(length).saturating_sub(1));
        level = values.first().and_then(|value| match &value.kind {
            Some(Kind::ListValue(list)) => Some(list),
            _ => None,
        });
    }
    text + "="
}

fn array(type_name: &str, list: &pb::ListValue) -> String {
    let element = |value: &pb::Value| match &value.kind {
        Some(Kind::ListValue(list)) => array(type_name, list),
        _ => text(type_name, value).map_or_else(|| "NULL".to_owned(), quoted_element),
    };
    format!("{{{}}}", list.values.iter().map(element).collect::<Vec<_>>().join(","))
}

/// An element of an array, quoted where it could be taken for something else.
fn quoted_element(text: String) -> String {
    let ambiguous = |c: char| matches!(c, '{' | '}' | ',' | '"' | '\\') || c.is_ascii_whitespace() || c == '\u{b}';
    if text.is_empty() || text.eq_ignore_ascii_case("null") || text.contains(ambiguous) {
        format!("\"{}\"", text.replace('\\', "\\\\").replace('"', "\\\""))
    } else {
        text
    }
}

/// A line of RFC 4180.
fn write_record(out: &mut dyn Write, fields: impl Iterator<Item = Option<String>>) -> io::Result<()> {
    for (index, field) in fields.enumerate() {
        if index > 0 {
            out.write_all(b",")?;
        }
        match field {
            None => {}
            Some(text) if text.is_empty() || text.contains([',', '"', '\r', '\n']) => {
                write!(out, "\"{}\"", text.replace('"', "\"\""))?;
            }
            Some(text) => out.write_all(text.as_bytes())?,
        }
    }
    out.write_all(b"\r\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn value(kind: Kind) -> pb::Value {
        pb::Value { kind: Some(kind) }
    }

    fn string(text: &str) -> pb::Value {
        value(Kind::StringValue(text.into()))
    }

    fn list(values: Vec<pb::Value>, lower_bounds: Vec<i32>) -> pb::Value {
        value(Kind::ListValue(pb::ListValue { values, lower_bounds }))
    }

    fn null() -> pb::Value {
        value(Kind::NullValue(0))
    }

    fn columns(columns: &[(&str, &str)]) -> Vec<pb::Column> {
        let column = |(name, type_name): &(&str, &str)| pb::Column {
            name: (*name).into(),
            type_name: (*type_name).into(),
            ..Default::default()
        };
        columns.iter().map(column).collect()
    }

    fn written(format: Format, header: &[(&str, &str)], rows: &[Vec<pb::Value>]) -> String {
        let mut out = Vec::new();
        let mut writer = RowWriter::begin(format, &columns(header), &mut out).unwrap();
        for row in rows {
            writer.row(row, &mut out).unwrap();
        }
        writer.end(&mut out).unwrap();
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn columns_are_aligned_by_what_a_terminal_shows() {
        let rows = [
            vec![value(Kind::IntValue(7)), string("日本"), null()],
            vec![value(Kind::IntValue(-1234)), string("e\u{301}"), string("a\nb\u{1b}[31m")],
        ];
        let table = written(Format::Table(Ink::Plain), &[("n", "int4"), ("name", "text"), ("note", "text")], &rows);
        let expected = "    n  name  note\n-----  ----  --------------\n    7  日本  (null)\n\
            -1234  e\u{301}     a\\nb\\u{1b}[31m\n";
        assert_eq!(table, expected);
    }

    #[test]
    fn colours_change_no_width() {
        let header = [("n", "text"), ("m", "text")];
        let rows = [vec![null(), string("x")]];
        let (plain, coloured) =
            (written(Format::Table(Ink::Plain), &header, &rows), written(Format::Table(Ink::Coloured), &header, &rows));
        assert_ne!(plain, coloured);
        let codes = ["\u{1b}[1m", "\u{1b}[2m", "\u{1b}[0m"];
        let stripped = codes.iter().fold(coloured, |text, code| text.replace(code, ""));
        assert_eq!(stripped, plain);
    }

    #[test]
    fn a_long_table_is_printed_as_it_comes() {
        let mut table = Table::new([("n".to_owned(), Align::Left)], Ink::Plain);
        let mut out = Vec::new();
        for _ in 1..Table::ROWS_MEASURED {
            table.row(&mut out, vec![Cell::text("x")]).unwrap();
        }
        assert!(out.is_empty());
        table.row(&mut out, vec![Cell::text("x")]).unwrap();
        let printed = out.len();
        table.row(&mut out, vec![Cell::text("wider")]).unwrap();
        table.end(&mut out).unwrap();
        assert_eq!((printed, out.len()), (2 * (Table::ROWS_MEASURED + 2), printed + 6));
    }

    #[test]
    fn what_disturbs_a_terminal_is_written_out() {
        assert_eq!(escape("a\tb\r\n\0\u{7f}\u{9b}\u{202e}é\\"), "a\\tb\\r\\n\\u{0}\\u{7f}\\u{9b}\\u{202e}é\\");
    }

    #[test]
    fn a_caret_stands_below_the_place() {
        assert_eq!(pointed("SELECT\n  日本 x\nFROM t", 13), Some(["  日本 x".into(), "       ^".into()]));
        assert_eq!(pointed("SELECT", 7), Some(["SELECT".into(), "      ^".into()]));
        assert_eq!((pointed("SELECT", 0), pointed("SELECT", 8)), (None, None));
        let long = format!("{}x{}", "a".repeat(100), "b".repeat(100));
        let [line, caret] = pointed(&long, 101).unwrap();
        assert_eq!(line, format!("...{}x{}...", "a".repeat(60), "b".repeat(59)));
        assert_eq!(line.find('x'), caret.find('^'));
    }

    #[test]
    fn durations_have_two_units_at_most() {
        for (millis, expected) in [
            (0, "0.0s"),
            (9_999, "9.9s"),
            (59_999, "59s"),
            (61_000, "1m01s"),
            (3_660_000, "1h01m"),
            (90_000_000, "1d01h"),
        ] {
            assert_eq!(short(Duration::from_millis(millis)), expected);
        }
    }

    #[test]
    fn rows_are_json_with_a_key_for_each_column() {
        let header = [("a", "int8"), ("a", "float4"), ("a_2", "float8"), ("b", "bytea"), ("l", "_text"), ("t", "bool")];
        let row = vec![
            value(Kind::IntValue(i64::MAX)),
            value(Kind::DoubleValue(0.1_f32.into())),
            value(Kind::DoubleValue(f64::NAN)),
            value(Kind::BytesValue(vec![0, 255].into())),
            list(vec![string("x\"\u{1}"), null()], vec![]),
            value(Kind::BoolValue(true)),
        ];
        let numbers = r#""a": 9223372036854775807, "a_3": 0.1, "a_2": "NaN""#;
        let json = format!(r#"{{{numbers}, "b": "AP8=", "l": ["x\"\u0001",null], "t": true}}"#);
        assert_eq!(written(Format::JsonLines, &header, std::slice::from_ref(&row)), format!("{json}\n"));
        let array = written(Format::JsonArray, &header, &[row.clone(), row]);
        assert_eq!(array, format!("[\n{json},\n{json}\n]\n"));
        assert!(serde_json::from_str::<Json>(&array).unwrap().is_array());
        assert_eq!(written(Format::JsonArray, &header, &[]), "[]\n");
    }

    #[test]
    fn csv_quotes_what_must_be_and_tells_null_from_empty() {
        let header = [("a,b", "text"), ("c", "bytea"), ("d", "text")];
        let rows = [
            vec![string("say \"hi\"\r\n"), value(Kind::BytesValue(vec![1, 171].into())), null()],
            vec![string(""), string("é"), string("x")],
        ];
        let expected = "\"a,b\",c,d\r\n\"say \"\"hi\"\"\r\n\",\\x01ab,\r\n\"\",é,x\r\n";
        assert_eq!(written(Format::Csv, &header, &rows), expected);
    }

    #[test]
    fn arrays_are_printed_as_postgresql_prints_them() {
        let ints = |values: &[i64]| values.iter().map(|n| value(Kind::IntValue(*n))).collect::<Vec<_>>();
        let shown = |value: pb::Value| text("_text", &value).unwrap();
        assert_eq!(shown(list(vec![], vec![])), "{}");
        assert_eq!(
            shown(list(vec![string("a b"), string(""), string("NULL"), null(), string("q\"\\")], vec![])),
            r#"{"a b","","NULL",NULL,"q\"\\"}"#
        );
        let rows = vec![list(ints(&[1, 2, 3]), vec![]), list(ints(&[4, 5, 6]), vec![])];
        assert_eq!(shown(list(rows, vec![0, -1])), "[0:1][-1:1]={{1,2,3},{4,5,6}}");
    }
}
