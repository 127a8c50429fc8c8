//! A latency histogram with two significant digits: quantiles are exact to 1 % of their value, and
//! merged histograms equal the histogram of all values.
//!
//! Encoded histograms are stored for years, in the published V2 format of HdrHistogram and in
//! base64. The database schema calls them sketches.

use anyhow::{Context as _, ensure};
use base64::Engine as _;
use base64::prelude::BASE64_STANDARD_NO_PAD;
use hdrhistogram::Histogram;
use hdrhistogram::serialization::{Serializer as _, V2Serializer};

/// 30 days. Longer durations count as this one.
pub(crate) const MAX_DURATION_US: i64 = 30 * 86_400_000_000;
/// With two digits a bucket's width is at most 1/128 of its values.
const SIGNIFICANT_DIGITS: u8 = 2;
/// The encoded header: cookie, payload length, normalising offset 0, significant digits, lowest
/// discernible value, highest trackable value, conversion ratio 1.0.
const HEADER_LEN: usize = 40;
/// The cookie of the V2 format.
const V2_COOKIE: u32 = 0x1C84_9313;
/// The first values have a count each. Above, every power of two has half as many counts.
const SUB_BUCKET_COUNT: u64 = 256;
/// The number of counts up to the largest 64-bit value.
const MAX_BUCKET_COUNT: u64 = 58 * SUB_BUCKET_COUNT / 2;

/// A histogram of durations in microseconds. `None`: it has no values.
#[derive(Clone, Debug, Default)]
pub(crate) struct LatencyHistogram(Option<Histogram<u64>>);

impl LatencyHistogram {
    #[expect(clippy::expect_used, reason = "an auto-resizing histogram accepts any value")]
    pub(crate) fn record(&mut self, value: i64) {
        let value = u64::try_from(value.min(MAX_DURATION_US)).unwrap_or_default();
        self.0.get_or_insert_with(empty_histogram).record(value).expect("resizes");
    }

    #[expect(clippy::expect_used, reason = "an auto-resizing histogram accepts any value")]
    pub(crate) fn merge(&mut self, other: &LatencyHistogram) {
        if let Some(more) = &other.0 {
            self.0.get_or_insert_with(empty_histogram).add(more).expect("resizes");
        }
    }

    /// The number of values.
    pub(crate) fn count(&self) -> u64 {
        self.0.as_ref().map_or(0, Histogram::len)
    }

    /// The value that this fraction (0 to 1) of all values does not exceed. 0 without values.
    pub(crate) fn quantile(&self, fraction: f64) -> f64 {
        let Some(values) = &self.0 else { return 0.0 };
        to_f64(values.median_equivalent(values.value_at_quantile(fraction)))
    }

    /// Appends the encoded histogram. Without values it appends nothing.
    pub(crate) fn encode_into(&self, text: &mut String) -> anyhow::Result<()> {
        let Some(values) = &self.0 else { return Ok(()) };
        let mut bytes = Vec::new();
        V2Serializer::new().serialize(values, &mut bytes)?;
        BASE64_STANDARD_NO_PAD.encode_string(bytes, text);
        Ok(())
    }

    /// Adds the values of an encoded histogram. A report spends half its time here, so the counts
    /// are added directly and not through a second histogram, which would be mostly zeros.
    pub(crate) fn add_encoded(&mut self, text: &str) -> anyhow::Result<()> {
        if text.is_empty() {
            return Ok(());
        }
        let bytes =
            BASE64_STANDARD_NO_PAD.decode(text).context("a stored histogram is not base64")?;
        let mut counts = count_payload(&bytes)?;
        let values = self.0.get_or_insert_with(empty_histogram);
        let mut index = 0;
        while !counts.is_empty() {
            // A count, or as a negative number a run of zero counts.
            let number = read_zigzag(&mut counts).context("a stored histogram is truncated")?;
            ensure!(index < MAX_BUCKET_COUNT, "a stored histogram has other buckets");
            match u64::try_from(number) {
                Ok(count) => {
                    if count > 0 {
                        values.record_n(lowest_value(index), count)?;
                    }
                    index += 1;
                }
                Err(_) => index = index.saturating_add(number.unsigned_abs()),
            }
        }
        Ok(())
    }
}

#[expect(clippy::expect_used, reason = "0 to 5 significant digits are valid")]
fn empty_histogram() -> Histogram<u64> {
    Histogram::new(SIGNIFICANT_DIGITS).expect("two digits")
}

/// Checks the header and returns the encoded counts behind it.
fn count_payload(bytes: &[u8]) -> anyhow::Result<&[u8]> {
    let word = |at: usize| bytes.get(at..at + 4)?.try_into().ok().map(u32::from_be_bytes);
    ensure!(word(0) == Some(V2_COOKIE), "a stored histogram has another format");
    let payload_len = word(4).and_then(|len| usize::try_from(len).ok());
    let is_complete =
        payload_len.is_some_and(|len| len.checked_add(HEADER_LEN) == Some(bytes.len()));
    ensure!(is_complete, "a stored histogram is truncated");
    let digits = word(12);
    ensure!(digits == Some(SIGNIFICANT_DIGITS.into()), "a stored histogram has other digits");
    let buckets = [word(8), word(16), word(20)];
    ensure!(buckets == [Some(0), Some(0), Some(1)], "a stored histogram has other buckets");
    Ok(bytes.get(HEADER_LEN..).unwrap_or_default())
}

/// Reads a ZigZag LEB128 number: 7 bits per byte from the lowest, all 8 of the ninth byte.
fn read_zigzag(bytes: &mut &[u8]) -> Option<i64> {
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

/// The lowest value of the bucket with this index.
fn lowest_value(index: u64) -> u64 {
    const HALF: u64 = SUB_BUCKET_COUNT / 2;
    if index < SUB_BUCKET_COUNT { index } else { (index % HALF + HALF) << (index / HALF - 1) }
}

/// The conversion is exact below 2^53.
#[expect(clippy::cast_precision_loss, reason = "counts and microseconds stay below 2^53")]
pub(crate) fn to_f64(number: u64) -> f64 {
    number as f64
}

#[cfg(test)]
impl PartialEq for LatencyHistogram {
    /// Compares the recorded values. The allocated size may differ.
    fn eq(&self, other: &LatencyHistogram) -> bool {
        let counts = |histogram: &LatencyHistogram| {
            let values = histogram.0.iter().flat_map(Histogram::iter_recorded);
            values.map(|step| (step.value_iterated_to(), step.count_at_value())).collect::<Vec<_>>()
        };
        counts(self) == counts(other)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn histogram(values: &[i64]) -> LatencyHistogram {
        let mut histogram = LatencyHistogram::default();
        for value in values {
            histogram.record(*value);
        }
        histogram
    }

    fn encoded(histogram: &LatencyHistogram) -> String {
        let mut text = String::new();
        histogram.encode_into(&mut text).unwrap();
        text
    }

    fn decoded(text: &str) -> LatencyHistogram {
        let mut histogram = LatencyHistogram::default();
        histogram.add_encoded(text).unwrap();
        histogram
    }

    #[test]
    fn the_stored_encoding_stays_readable() {
        let stored = encoded(&histogram(&[0, 1, 1, 1_000_000, MAX_DURATION_US, i64::MAX]));
        assert_eq!(stored, "HISTEwAAAAgAAAAAAAAAAgAAAAAAAAABAAAD//////8/8AAAAAAAAAIE4xsCwSoE");
        assert_eq!(decoded(&stored).count(), 6);
        assert_eq!(encoded(&LatencyHistogram::default()), "");
        let (cut, longer) = (&stored[..stored.len() - 4], format!("{stored}AAAA"));
        let digits = stored.replacen("AAAAAg", "AAAABQ", 1);
        for wrong in ["A", "A!", "zA", &stored[..20], cut, &longer, &digits] {
            assert!(LatencyHistogram::default().add_encoded(wrong).is_err(), "{wrong}");
        }
    }

    fn times() -> impl Strategy<Value = Vec<i64>> {
        let time = prop_oneof![0..100i64, 100..5_000_000i64, 0..MAX_DURATION_US];
        proptest::collection::vec(time, 1..300)
    }

    proptest! {
        #[test]
        fn quantiles_are_exact_to_one_percent(mut values in times(), fraction in 0.01..=1.0f64) {
            let found = histogram(&values).quantile(fraction);
            values.sort_unstable();
            let reached = |rank: usize| to_f64(rank as u64) >= fraction * to_f64(values.len() as u64);
            let rank = (1..=values.len()).find(|rank| reached(*rank)).unwrap();
            let exact = to_f64(values[rank - 1].try_into().unwrap());
            prop_assert!((found - exact).abs() <= 0.01 * exact, "{found} for {exact}");
        }

        #[test]
        fn merged_parts_equal_the_whole(one in times(), other in times()) {
            let (first, second) = (histogram(&one), histogram(&other));
            let whole = histogram(&[one, other].concat());
            let mut merged = first.clone();
            merged.merge(&second);
            prop_assert_eq!(&merged, &whole);
            let mut read = decoded(&encoded(&first));
            read.add_encoded(&encoded(&second)).unwrap();
            prop_assert_eq!(&read, &whole);
        }

        #[test]
        fn the_library_reads_the_encoding(times in times()) {
            use hdrhistogram::serialization::Deserializer;
            let text = encoded(&histogram(&times));
            let bytes = BASE64_STANDARD_NO_PAD.decode(&text).unwrap();
            let read = Deserializer::new().deserialize(&mut bytes.as_slice()).unwrap();
            prop_assert_eq!(decoded(&text), LatencyHistogram(Some(read)));
        }

        #[test]
        fn a_corrupt_text_never_panics(times in times(), at in 0..400usize, byte: u8) {
            let mut bytes = BASE64_STANDARD_NO_PAD.decode(encoded(&histogram(&times))).unwrap();
            let at = at % bytes.len();
            bytes[at] = byte;
            let _ = LatencyHistogram::default().add_encoded(&BASE64_STANDARD_NO_PAD.encode(&bytes));
        }
    }
}
