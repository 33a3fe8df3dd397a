//! Arrays as PostgreSQL writes and reads them in text: `[0:1]={"a",NULL}`.
//!
//! Knows nothing of the elements but their text. Invariant: what is printed reads back as the same array.

use std::fmt::Write;

use super::text_form::Malformed;
use crate::broker::value::{List, Value};

/// The most dimensions of an array.
pub(super) const DIMENSIONS_MAX: usize = 6;

/// What an array holds.
pub(super) enum Item<'a> {
    /// A list, which is about to be read.
    List,
    Null,
    Text(&'a str),
}

/// Reads a literal; `element` makes a value of each item. What it makes of a list is not looked at, but it may refuse it.
///
/// # Errors
/// Those of `element`, and [`Malformed`].
pub(super) fn parse<E: From<Malformed>>(
    text: &str,
    delimiter: char,
    mut element: impl FnMut(Item<'_>) -> Result<Value, E>,
) -> Result<List, E> {
    let (lower_bounds, text) = match text.strip_prefix('[') {
        Some(bounds) => {
            let (bounds, text) = bounds.split_once("]=").ok_or(Malformed)?;
            let bounds = bounds.split("][").map(|bound| bound.split_once(':')?.0.parse().ok());
            (bounds.collect::<Option<Vec<i32>>>().ok_or(Malformed)?, text)
        }
        None => (Vec::new(), text),
    };
    let mut reader = Reader { rest: text, delimiter };
    let values = reader.list(1, &mut element)?;
    let is_sound = reader.rest.is_empty() && lower_bounds.len() <= DIMENSIONS_MAX;
    if is_sound { Ok(List { values, lower_bounds }) } else { Err(Malformed.into()) }
}

struct Reader<'a> {
    rest: &'a str,
    delimiter: char,
}

impl Reader<'_> {
    fn list<E: From<Malformed>>(
        &mut self,
        depth: usize,
        element: &mut impl FnMut(Item<'_>) -> Result<Value, E>,
    ) -> Result<Vec<Value>, E> {
        if !self.take('{') || depth > DIMENSIONS_MAX {
            return Err(Malformed.into());
        }
        let mut values = Vec::new();
        if self.take('}') {
            return Ok(values);
        }
        loop {
            values.push(if self.rest.starts_with('{') {
                element(Item::List)?;
                let values = self.list(depth + 1, element)?;
                Value::List(List { values, lower_bounds: Vec::new() })
            } else if self.take('"') {
                element(Item::Text(&self.quoted()?))?
            } else {
                match self.bare()? {
                    null if null.eq_ignore_ascii_case("NULL") => element(Item::Null)?,
                    text => element(Item::Text(text))?,
                }
            });
            if self.take('}') {
                return Ok(values);
            }
            if !self.take(self.delimiter) {
                return Err(Malformed.into());
            }
        }
    }

    fn take(&mut self, expected: char) -> bool {
        match self.rest.strip_prefix(expected) {
            Some(rest) => {
                self.rest = rest;
                true
            }
            None => false,
        }
    }

    /// What follows up to the closing quote, without its backslashes.
    fn quoted(&mut self) -> Result<String, Malformed> {
        let mut text = String::new();
        loop {
            let special = self.rest.find(['"', '\\']).ok_or(Malformed)?;
            let (plain, rest) = self.rest.split_at(special);
            text.push_str(plain);
            let mut chars = rest.chars();
            if chars.next() == Some('"') {
                self.rest = chars.as_str();
                return Ok(text);
            }
            text.push(chars.next().ok_or(Malformed)?);
            self.rest = chars.as_str();
        }
    }

    fn bare(&mut self) -> Result<&str, Malformed> {
        let end = self.rest.find([self.delimiter, '}', '{', '"', '\\']).ok_or(Malformed)?;
        let (text, rest) = self.rest.split_at(end);
        self.rest = rest;
        if text.is_empty() { Err(Malformed) } else { Ok(text) }
    }
}

/// Writes a list as a literal; `element` prints what is neither a list nor NULL.
///
/// # Errors
/// Those of `element`, and what keeps the lists from being an array.
pub(super) fn print(
    list: &List,
    delimiter: char,
    element: impl Fn(&Value) -> Result<String, String>,
) -> Result<String, String> {
    let lengths = lengths(list)?;
    if !list.lower_bounds.is_empty() && list.lower_bounds.len() != lengths.len() {
        return Err(format!("has {} lower_bounds for {} dimensions", list.lower_bounds.len(), lengths.len()));
    }
    // PostgreSQL has one empty array, without dimensions.
    if lengths.contains(&0) {
        return Ok("{}".into());
    }
    let mut text = String::new();
    if list.lower_bounds.iter().any(|bound| *bound != 1) {
        for (bound, length) in list.lower_bounds.iter().zip(&lengths) {
            let last = i64::from(*bound) + i64::try_from(*length).unwrap_or(i64::MAX) - 1;
            if last >= i32::MAX.into() {
                return Err("has a lower bound that puts its last subscript out of range".into());
            }
            write!(text, "[{bound}:{last}]").expect("a String takes everything");
        }
        text.push('=');
    }
    print_list(list, delimiter, &element, &mut text)?;
    Ok(text)
}

fn print_list(
    list: &List,
    delimiter: char,
    element: &impl Fn(&Value) -> Result<String, String>,
    text: &mut String,
) -> Result<(), String> {
    text.push('{');
    for (index, value) in list.values.iter().enumerate() {
        if index > 0 {
            text.push(delimiter);
        }
        match value {
            Value::Null => text.push_str("NULL"),
            Value::List(list) => print_list(list, delimiter, element, text)?,
            value => {
                let printed = element(value).map_err(|problem| format!("element {index} {problem}"))?;
                text.push('"');
                for c in printed.chars() {
                    if matches!(c, '"' | '\\') {
                        text.push('\\');
                    }
                    text.push(c);
                }
                text.push('"');
            }
        }
    }
    text.push('}');
    Ok(())
}

/// How long the lists are, the outermost first; all of one depth are of one length.
fn lengths(list: &List) -> Result<Vec<usize>, String> {
    let lists = list.values.iter().filter_map(|value| match value {
        Value::List(list) => Some(list),
        _ => None,
    });
    let mut inner: Option<Vec<usize>> = None;
    let mut count = 0;
    for list in lists {
        if !list.lower_bounds.is_empty() {
            return Err("has lower_bounds in an inner list: they belong to the outermost".into());
        }
        let lengths = lengths(list)?;
        if inner.as_ref().is_some_and(|inner| *inner != lengths) {
            return Err("is no array: its inner lists differ in length".into());
        }
        inner = Some(lengths);
        count += 1;
    }
    if count > 0 && count < list.values.len() {
        return Err("is no array: it holds lists and other values side by side".into());
    }
    let mut lengths = vec![list.values.len()];
    lengths.extend(inner.into_iter().flatten());
    Ok(lengths)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn text(value: &Value) -> Result<String, String> {
        match value {
            Value::Text(text) => Ok(text.clone()),
            other => Err(format!("is a {}", other.kind())),
        }
    }

    fn read(literal: &str, delimiter: char) -> Result<List, Malformed> {
        parse(literal, delimiter, |item| {
            Ok(match item {
                Item::List | Item::Null => Value::Null,
                Item::Text(text) => Value::Text(text.to_owned()),
            })
        })
    }

    fn list(values: Vec<Value>) -> Value {
        Value::List(List { values, lower_bounds: Vec::new() })
    }

    #[test]
    fn a_literal_is_read_as_postgresql_writes_it() {
        let word = |text: &str| Value::Text(text.into());
        for (literal, delimiter, lower_bounds, values) in [
            ("{}", ',', vec![], vec![]),
            ("{NULL,\"NULL\",null}", ',', vec![], vec![Value::Null, word("NULL"), Value::Null]),
            (r#"[0:1]={"a\"\\b, {c}",d e}"#, ',', vec![0], vec![word(r#"a"\b, {c}"#), word("d e")]),
            ("{(1,1),(0,0);(2,2),(1,1)}", ';', vec![], vec![word("(1,1),(0,0)"), word("(2,2),(1,1)")]),
            ("[-1:-1][2:3]={{a,\"\"}}", ',', vec![-1, 2], vec![list(vec![word("a"), word("")])]),
        ] {
            assert_eq!(read(literal, delimiter).ok(), Some(List { values, lower_bounds }), "{literal}");
        }
        for literal in ["", "{", "{a", "{a,}", "{a}b", "{\"a}", "[0:1]{a}", "[x:1]={a}", "{{{{{{{a}}}}}}}"] {
            assert!(read(literal, ',').is_err(), "{literal}");
        }
    }

    #[test]
    fn lists_that_are_no_array_are_refused() {
        let one = || list(vec![Value::Null]);
        for (values, lower_bounds) in [
            (vec![one(), list(vec![])], vec![]),
            (vec![one(), Value::Null], vec![]),
            (vec![one()], vec![1]),
            (vec![Value::Null], vec![1, 1]),
            (vec![Value::Null], vec![i32::MAX]),
            (vec![Value::List(List { values: vec![Value::Null], lower_bounds: vec![1] })], vec![]),
        ] {
            assert!(print(&List { values, lower_bounds }, ',', text).is_err());
        }
    }

    fn arrays() -> impl Strategy<Value = List> {
        let leaf = || prop_oneof![Just(Value::Null), "\\PC{0,6}|[\"\\\\{},; ]{0,6}".prop_map(Value::Text)];
        let lengths = prop::collection::vec(1_usize..4, 1..4);
        lengths.prop_flat_map(move |lengths| {
            let count = lengths.iter().product::<usize>();
            let leaves = prop::collection::vec(leaf(), count);
            let bounds = prop::collection::vec(-5..5, lengths.len());
            (leaves, bounds, Just(lengths)).prop_map(|(leaves, lower_bounds, lengths)| {
                let mut values = leaves;
                for length in lengths.iter().skip(1).rev() {
                    values = values.chunks(*length).map(|row| list(row.to_vec())).collect();
                }
                let plain = lower_bounds.iter().all(|bound| *bound == 1);
                List { values, lower_bounds: if plain { Vec::new() } else { lower_bounds } }
            })
        })
    }

    proptest! {
        #[test]
        fn what_is_printed_reads_back(list in arrays(), delimiter in prop_oneof![Just(','), Just(';')]) {
            let printed = print(&list, delimiter, text).unwrap();
            prop_assert_eq!(read(&printed, delimiter).ok(), Some(list));
        }

        #[test]
        fn any_text_is_read_without_panic(literal in "\\PC*|[\\[\\]{}\",:=\\\\a0-9]{0,40}") {
            let _ = read(&literal, ',');
        }
    }
}
