//! How values are spread: a histogram of two significant digits, so that every quantile is true to
//! 1 % of its value, and sketches of parts add up to the sketch of the whole, exactly.
//!
//! Their text is stored for years: it is the published V2 form of HdrHistogram, in base64.

use anyhow::{Context as _, ensure};
use base64::Engine as _;
use base64::prelude::BASE64_STANDARD_NO_PAD;
use hdrhistogram::Histogram;
use hdrhistogram::serialization::{Serializer as _, V2Serializer};

/// 30 days, in microseconds: longer counts as that.
pub(crate) const LONGEST: i64 = 30 * 86_400_000_000;
/// Buckets are 1/128 of their values wide at most.
const DIGITS: u8 = 2;
/// The text's header: its form, the bytes that follow, 0, the digits, the smallest difference, the
/// highest value, 1.0.
const HEADER: usize = 40;
/// Version 2.
const FORM: u32 = 0x1C84_9313;
/// Counts of the first values, each of its own; from there on, half as many for every power of two.
const FIRST: u64 = 256;
/// More have no meaning: the last is of values of 64 bits.
const MOST_COUNTS: u64 = 58 * FIRST / 2;

/// None: there are no values.
#[derive(Clone, Debug, Default)]
pub(crate) struct Sketch(Option<Histogram<u64>>);

impl Sketch {
    #[expect(clippy::expect_used, reason = "what grows has room for any number")]
    pub(crate) fn add(&mut self, value: i64) {
        let value = u64::try_from(value.min(LONGEST)).unwrap_or_default();
        self.0.get_or_insert_with(empty).record(value).expect("room");
    }

    #[expect(clippy::expect_used, reason = "what grows has room for any number")]
    pub(crate) fn merge(&mut self, other: &Sketch) {
        if let Some(more) = &other.0 {
            self.0.get_or_insert_with(empty).add(more).expect("room");
        }
    }

    /// How many values.
    pub(crate) fn count(&self) -> u64 {
        self.0.as_ref().map_or(0, Histogram::len)
    }

    /// The value that so many of all (0 to 1) do not exceed; 0 where there are none.
    pub(crate) fn quantile(&self, part: f64) -> f64 {
        let Some(values) = &self.0 else { return 0.0 };
        float(values.median_equivalent(values.value_at_quantile(part)))
    }

    /// Writes its text; none where there are no values.
    pub(crate) fn write(&self, text: &mut String) -> anyhow::Result<()> {
        let Some(values) = &self.0 else { return Ok(()) };
        let mut bytes = Vec::new();
        V2Serializer::new().serialize(values, &mut bytes)?;
        BASE64_STANDARD_NO_PAD.encode_string(bytes, text);
        Ok(())
    }

    /// Adds what a text says, which is half of what a report does: so not by way of another sketch,
    /// most of which would be zeros.
    pub(crate) fn read(&mut self, text: &str) -> anyhow::Result<()> {
        if text.is_empty() {
            return Ok(());
        }
        let bytes = BASE64_STANDARD_NO_PAD.decode(text).context("a sketch is not in base64")?;
        let mut counts = counts(&bytes)?;
        let values = self.0.get_or_insert_with(empty);
        let mut place = 0;
        while !counts.is_empty() {
            // A count, or below 0 how many counts are 0.
            let number = number(&mut counts).context("a sketch is cut off")?;
            ensure!(place < MOST_COUNTS, "a sketch has other buckets");
            match u64::try_from(number) {
                Ok(count) => {
                    if count > 0 {
                        values.record_n(value(place), count)?;
                    }
                    place += 1;
                }
                Err(_) => place = place.saturating_add(number.unsigned_abs()),
            }
        }
        Ok(())
    }
}

#[expect(clippy::expect_used, reason = "from 0 to 5 digits there is a histogram")]
fn empty() -> Histogram<u64> {
    Histogram::new(DIGITS).expect("two digits")
}

/// The part behind the header.
fn counts(bytes: &[u8]) -> anyhow::Result<&[u8]> {
    let number = |at: usize| bytes.get(at..at + 4)?.try_into().ok().map(u32::from_be_bytes);
    ensure!(number(0) == Some(FORM), "a sketch has another form");
    let follows = number(4).and_then(|follows| usize::try_from(follows).ok());
    let whole = follows.is_some_and(|follows| follows.checked_add(HEADER) == Some(bytes.len()));
    ensure!(whole, "a sketch is cut off");
    ensure!(number(12) == Some(DIGITS.into()), "a sketch has other digits");
    let buckets = [number(8), number(16), number(20)];
    ensure!(buckets == [Some(0), Some(0), Some(1)], "a sketch has other buckets");
    Ok(bytes.get(HEADER..).unwrap_or_default())
}

/// The next number: 7 bits a byte from the lowest, the ninth byte whole; its last bit is its sign.
fn number(bytes: &mut &[u8]) -> Option<i64> {
    let mut read = 0;
    for shift in (0..64).step_by(7) {
        let (byte, rest) = bytes.split_first()?;
        *bytes = rest;
        let last = shift == 56 || byte & 0x80 == 0;
        let bits = if shift == 56 { *byte } else { byte & 0x7F };
        read |= u64::from(bits) << shift;
        if last {
            break;
        }
    }
    Some((read >> 1).cast_signed() ^ -(read & 1).cast_signed())
}

/// The lowest value that is counted at a place.
fn value(place: u64) -> u64 {
    const HALF: u64 = FIRST / 2;
    if place < FIRST { place } else { (place % HALF + HALF) << (place / HALF - 1) }
}

/// Exact below 2^53.
#[expect(clippy::cast_precision_loss, reason = "counts and microseconds stay below 2^53")]
pub(crate) fn float(number: u64) -> f64 {
    number as f64
}

#[cfg(test)]
impl PartialEq for Sketch {
    /// By what they count: how far they have grown says nothing.
    fn eq(&self, other: &Sketch) -> bool {
        let counts = |sketch: &Sketch| {
            let values = sketch.0.iter().flat_map(Histogram::iter_recorded);
            values.map(|step| (step.value_iterated_to(), step.count_at_value())).collect::<Vec<_>>()
        };
        counts(self) == counts(other)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn sketch(values: &[i64]) -> Sketch {
        let mut sketch = Sketch::default();
        for value in values {
            sketch.add(*value);
        }
        sketch
    }

    fn text(sketch: &Sketch) -> String {
        let mut text = String::new();
        sketch.write(&mut text).unwrap();
        text
    }

    fn back(text: &str) -> Sketch {
        let mut sketch = Sketch::default();
        sketch.read(text).unwrap();
        sketch
    }

    #[test]
    fn what_is_stored_is_read_for_years() {
        let stored = text(&sketch(&[0, 1, 1, 1_000_000, LONGEST, i64::MAX]));
        assert_eq!(stored, "HISTEwAAAAgAAAAAAAAAAgAAAAAAAAABAAAD//////8/8AAAAAAAAAIE4xsCwSoE");
        assert_eq!(back(&stored).count(), 6);
        assert_eq!(text(&Sketch::default()), "");
        let (cut, longer) = (&stored[..stored.len() - 4], format!("{stored}AAAA"));
        let digits = stored.replacen("AAAAAg", "AAAABQ", 1);
        for wrong in ["A", "A!", "zA", &stored[..20], cut, &longer, &digits] {
            assert!(Sketch::default().read(wrong).is_err(), "{wrong}");
        }
    }

    fn times() -> impl Strategy<Value = Vec<i64>> {
        let time = prop_oneof![0..100i64, 100..5_000_000i64, 0..LONGEST];
        proptest::collection::vec(time, 1..300)
    }

    proptest! {
        #[test]
        fn quantiles_are_true_to_one_percent(mut values in times(), part in 0.01..=1.0f64) {
            let found = sketch(&values).quantile(part);
            values.sort_unstable();
            let reached = |rank: usize| float(rank as u64) >= part * float(values.len() as u64);
            let rank = (1..=values.len()).find(|rank| reached(*rank)).unwrap();
            let exact = float(values[rank - 1].try_into().unwrap());
            prop_assert!((found - exact).abs() <= 0.01 * exact, "{found} for {exact}");
        }

        #[test]
        fn parts_add_up_to_the_whole(one in times(), other in times()) {
            let (first, second) = (sketch(&one), sketch(&other));
            let whole = sketch(&[one, other].concat());
            let mut merged = first.clone();
            merged.merge(&second);
            prop_assert_eq!(&merged, &whole);
            let mut read = back(&text(&first));
            read.read(&text(&second)).unwrap();
            prop_assert_eq!(&read, &whole);
        }

        #[test]
        fn a_text_is_what_the_library_reads(times in times()) {
            use hdrhistogram::serialization::Deserializer;
            let text = text(&sketch(&times));
            let bytes = BASE64_STANDARD_NO_PAD.decode(&text).unwrap();
            let read = Deserializer::new().deserialize(&mut bytes.as_slice()).unwrap();
            prop_assert_eq!(back(&text), Sketch(Some(read)));
        }

        #[test]
        fn a_broken_text_never_panics(times in times(), at in 0..400usize, byte: u8) {
            let mut bytes = BASE64_STANDARD_NO_PAD.decode(text(&sketch(&times))).unwrap();
            let at = at % bytes.len();
            bytes[at] = byte;
            let _ = Sketch::default().read(&BASE64_STANDARD_NO_PAD.encode(&bytes));
        }
    }
}
