//! Parses JSON that other parsers refuse: invalid UTF-8, lone surrogates, control characters in
//! strings, `NaN` and `Infinity`, numbers out of range, and deep nesting.

use std::fmt;

use serde::de::{DeserializeSeed, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer};
use serde_json::{Map, Value};

use crate::upstream::engine::decode::oddity::Oddity;

/// Values that are nested deeper count as null. Below serde_json's limit, which fails the whole value.
const MAX_DEPTH: usize = 64;

/// Parses the object or list at the start, and returns its length.
pub(super) fn parse(data: &[u8]) -> Option<(Value, usize)> {
    if !matches!(data.first(), Some(b'{' | b'[')) {
        return None;
    }
    if let Some(parsed) = parse_strict(data) {
        return Some(parsed);
    }
    let mut repair = Repair { source: data, position: 0, output: Vec::new() };
    repair.value()?;
    let repaired = String::from_utf8_lossy(&repair.output);
    let (value, _) = parse_strict(repaired.as_bytes())?;
    Oddity::RepairedJson.count();
    Some((value, repair.position))
}

fn parse_strict(data: &[u8]) -> Option<(Value, usize)> {
    let mut values = serde_json::Deserializer::from_slice(data).into_iter::<ShallowValue>();
    let ShallowValue(value) = values.next()?.ok()?;
    Some((value, values.byte_offset()))
}

/// A value of limited depth.
struct ShallowValue(Value);

impl<'de> Deserialize<'de> for ShallowValue {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<ShallowValue, D::Error> {
        ValueSeed { depth: 0 }.deserialize(deserializer).map(ShallowValue)
    }
}

struct ValueSeed {
    depth: usize,
}

impl<'de> DeserializeSeed<'de> for ValueSeed {
    type Value = Value;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        if self.depth == MAX_DEPTH {
            return IgnoredAny::deserialize(deserializer).map(|_| Value::Null);
        }
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for ValueSeed {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("JSON")
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_f64<E>(self, value: f64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_str<E>(self, text: &str) -> Result<Value, E> {
        Ok(text.into())
    }

    fn visit_string<E>(self, text: String) -> Result<Value, E> {
        Ok(text.into())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Value, A::Error> {
        let mut values = Vec::new();
        while let Some(value) = list.next_element_seed(ValueSeed { depth: self.depth + 1 })? {
            values.push(value);
        }
        Ok(values.into())
    }

    fn visit_map<A: MapAccess<'de>>(self, mut fields: A) -> Result<Value, A::Error> {
        let mut values = Map::new();
        while let Some(name) = fields.next_key::<String>()? {
            values.insert(name, fields.next_value_seed(ValueSeed { depth: self.depth + 1 })?);
        }
        Ok(values.into())
    }
}

/// Copies JSON and replaces what is not allowed in it.
struct Repair<'a> {
    source: &'a [u8],
    position: usize,
    output: Vec<u8>,
}

impl Repair<'_> {
    /// Copies one object or list. `None` if it does not end.
    fn value(&mut self) -> Option<()> {
        let mut depth = 0_usize;
        loop {
            match *self.source.get(self.position)? {
                b'"' => self.string()?,
                byte @ (b'{' | b'[') => {
                    depth += 1;
                    self.copy(byte);
                }
                byte @ (b'}' | b']') => {
                    // A trailing comma.
                    self.output.pop_if(|last| *last == b',');
                    depth = depth.checked_sub(1)?;
                    self.copy(byte);
                    if depth == 0 {
                        return Some(());
                    }
                }
                byte @ (b',' | b':') => self.copy(byte),
                byte if byte.is_ascii_whitespace() => self.position += 1,
                _ => self.word(),
            }
        }
    }

    fn copy(&mut self, byte: u8) {
        self.output.push(byte);
        self.position += 1;
    }

    /// Copies a number or a literal. Anything else becomes null.
    fn word(&mut self) {
        let rest = &self.source[self.position..];
        let is_end = |byte: &u8| b",:{}[]\"".contains(byte) || byte.is_ascii_whitespace();
        let len = rest.iter().position(is_end).unwrap_or(rest.len());
        let word = &rest[..len];
        self.position += len;
        if serde_json::from_slice::<Value>(word).is_ok() {
            return self.output.extend_from_slice(word);
        }
        let text = std::str::from_utf8(word).unwrap_or_default();
        // The names of infinite numbers begin with letters.
        let is_number = text.contains(|letter: char| letter.is_ascii_digit());
        let number: Option<f64> = text.parse().ok().filter(|_| is_number);
        let number = number.map(|number| Value::from(number.clamp(f64::MIN, f64::MAX)));
        self.output.extend_from_slice(number.unwrap_or_default().to_string().as_bytes());
    }

    /// Copies a string. `None` if it does not end.
    fn string(&mut self) -> Option<()> {
        self.copy(b'"');
        loop {
            match *self.source.get(self.position)? {
                b'"' => {
                    self.copy(b'"');
                    return Some(());
                }
                b'\\' => self.escape(),
                byte @ 0..0x20 => {
                    self.output.extend_from_slice(format!("\\u{byte:04x}").as_bytes());
                    self.position += 1;
                }
                byte => self.copy(byte),
            }
        }
    }

    /// Copies an escape sequence.
    fn escape(&mut self) {
        match self.source.get(self.position + 1) {
            Some(b'u') => self.unicode_escape(),
            Some(byte @ (b'"' | b'\\' | b'/' | b'b' | b'f' | b'n' | b'r' | b't')) => {
                self.output.extend_from_slice(&[b'\\', *byte]);
                self.position += 2;
            }
            // An unknown escape is the character itself.
            _ => self.position += 1,
        }
    }

    /// Copies a character or a pair of surrogates. A lone surrogate is replaced.
    fn unicode_escape(&mut self) {
        let start = self.position;
        let first = self.hex_at(start);
        let second = || self.hex_at(start + 6);
        let (text, len): (&[u8], usize) = match first {
            Some(0xd800..0xdc00) if matches!(second(), Some(0xdc00..0xe000)) => {
                (&self.source[start..start + 12], 12)
            }
            Some(0xd800..0xe000) => (b"\\ufffd", 6),
            Some(_) => (&self.source[start..start + 6], 6),
            None => (b"\\\\u", 2),
        };
        self.output.extend_from_slice(text);
        self.position += len;
    }

    /// The number of an escape such as `\ud83d`.
    fn hex_at(&self, start: usize) -> Option<u16> {
        let escape = self.source.get(start..start + 6)?.strip_prefix(b"\\u")?;
        let is_hex = escape.iter().all(u8::is_ascii_hexdigit);
        let text = std::str::from_utf8(escape).ok().filter(|_| is_hex)?;
        u16::from_str_radix(text, 16).ok()
    }
}
