//! How values are spread: counts in buckets whose bounds grow by one factor, so that every quantile
//! is true to 1 % of its value, and sketches of parts add up to the sketch of the whole, exactly.
//!
//! The buckets are those of DDSketch. They stand here because their text is stored for years: it
//! must be ours, and short. Each bucket that counts anything is two numbers, how far it is from the
//! one before and its count, in digits of 5 bits with the lowest first and a sixth bit where another
//! follows. What is usual takes two or three characters.

use anyhow::{Context as _, bail};

/// The bounds' ratio: of a bucket with the bounds a and b the middle 2ab/(a+b) is off by at most
/// (RATIO - 1) / (RATIO + 1) = 0.95 % of any of its values.
const RATIO: f64 = 1.019_182_231_196_365_4;
/// 30 days, in microseconds: longer counts as that.
pub(crate) const LONGEST: i64 = 30 * 86_400_000_000;
/// More buckets than any value needs: a text that names a later one is no sketch.
const MOST: usize = 2_048;
const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";

/// By bucket: how many values. The first is for 0, the next for (1/RATIO, 1], and so on.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Sketch(Vec<u64>);

impl Sketch {
    pub(crate) fn add(&mut self, value: i64) {
        self.add_to(bucket(value), 1);
    }

    fn add_to(&mut self, bucket: usize, count: u64) {
        if self.0.len() <= bucket {
            self.0.resize(bucket + 1, 0);
        }
        if let Some(have) = self.0.get_mut(bucket) {
            *have = have.saturating_add(count);
        }
    }

    pub(crate) fn merge(&mut self, other: &Sketch) {
        if self.0.len() < other.0.len() {
            self.0.resize(other.0.len(), 0);
        }
        for (have, more) in self.0.iter_mut().zip(&other.0) {
            *have = have.saturating_add(*more);
        }
    }

    /// How many values.
    pub(crate) fn count(&self) -> u64 {
        self.0.iter().sum()
    }

    /// The value that so many of all (0 to 1) do not exceed; 0 where there are none.
    pub(crate) fn quantile(&self, part: f64) -> f64 {
        let rank = (part * float(self.count())).ceil().max(1.0);
        let mut seen = 0;
        let reached = self.0.iter().position(|count| {
            seen += count;
            *count > 0 && float(seen) >= rank
        });
        match reached {
            None | Some(0) => 0.0,
            Some(bucket) => 2.0 * RATIO.powf(float(bucket as u64 - 1)) / (RATIO + 1.0),
        }
    }

    /// Writes its text.
    pub(crate) fn write(&self, text: &mut String) {
        let mut last = 0;
        for (bucket, count) in self.0.iter().enumerate().filter(|(_, count)| **count > 0) {
            write(text, (bucket - last) as u64);
            write(text, *count);
            last = bucket;
        }
    }

    /// Adds what a text says.
    pub(crate) fn read(&mut self, text: &str) -> anyhow::Result<()> {
        let (mut rest, mut bucket) = (text.as_bytes(), 0);
        while !rest.is_empty() {
            let (step, count) = (read(&mut rest)?, read(&mut rest)?);
            bucket += usize::try_from(step)?.min(MOST);
            if bucket >= MOST {
                bail!("a sketch names a bucket that no value needs");
            }
            self.add_to(bucket, count);
        }
        Ok(())
    }
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "the logarithm of what is at least 1 and at most LONGEST"
)]
fn bucket(value: i64) -> usize {
    match u64::try_from(value.min(LONGEST)) {
        Err(_) | Ok(0) => 0,
        Ok(value) => (float(value).ln() / RATIO.ln()).ceil() as usize + 1,
    }
}

fn write(text: &mut String, mut number: u64) {
    loop {
        let more = if number >= 32 { 32 } else { 0 };
        let digit = u8::try_from(number % 32 + more).unwrap_or_default();
        text.push(char::from(DIGITS[usize::from(digit) % 64]));
        number /= 32;
        if number == 0 {
            return;
        }
    }
}

fn read(text: &mut &[u8]) -> anyhow::Result<u64> {
    let mut number = 0;
    for shift in (0..64).step_by(5) {
        let (first, rest) = text.split_first().context("a sketch ends within a number")?;
        *text = rest;
        let digit = u64::from(value_of(*first).context("a sketch has a wrong digit")?);
        number |= (digit % 32) << shift;
        if digit < 32 {
            return Ok(number);
        }
    }
    bail!("a sketch has too long a number")
}

fn value_of(digit: u8) -> Option<u8> {
    match digit {
        b'A'..=b'Z' => Some(digit - b'A'),
        b'a'..=b'z' => Some(digit - b'a' + 26),
        b'0'..=b'9' => Some(digit - b'0' + 52),
        b'-' => Some(62),
        b'_' => Some(63),
        _ => None,
    }
}

/// Exact below 2^53.
#[expect(clippy::cast_precision_loss, reason = "counts and microseconds stay below 2^53")]
pub(crate) fn float(number: u64) -> f64 {
    number as f64
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
        sketch.write(&mut text);
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
        assert_eq!(stored, "ABBC4WBpYC");
        assert_eq!(back(&stored).count(), 6);
        for wrong in ["A", "A!", "zA", "____________B", "_______"] {
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
        fn a_made_up_text_never_panics(text in "[A-Za-z0-9_-]{0,60}") {
            let _ = Sketch::default().read(&text);
        }
    }
}
