//! Sums of events. A batch is summed up in memory first, so that each row of the store is touched
//! once; sums of parts add up to the sum of the whole, exactly.

use std::collections::BTreeMap;

use anyhow::Context as _;

use crate::event::{Cache, Event};
use crate::sketch::Sketch;
use crate::times::Span;

/// What a text of sketches begins with: later forms have another letter.
const FORM: &str = "h:";

/// How the calls of one span, method and model went.
#[derive(Clone, Debug, Default)]
#[cfg_attr(test, derive(PartialEq))]
pub(crate) struct Tally {
    pub(crate) requests: i64,
    pub(crate) errors: i64,
    pub(crate) tokens: i64,
    pub(crate) token_requests: i64,
    pub(crate) cacheable: i64,
    pub(crate) cached: i64,
    pub(crate) duration_us: i64,
    pub(crate) sketches: Sketches,
}

/// How long the calls took, waited for a first token, and for each other.
#[derive(Clone, Debug, Default)]
#[cfg_attr(test, derive(PartialEq))]
pub(crate) struct Sketches {
    pub(crate) durations: Sketch,
    pub(crate) first_tokens: Sketch,
    pub(crate) gaps: Sketch,
}

/// What was used in a day.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Use {
    pub(crate) requests: i64,
    pub(crate) errors: i64,
    pub(crate) prompt_tokens: i64,
    pub(crate) completion_tokens: i64,
}

/// A rollup's length in seconds, its start, method and model. Sorted: the order of locks.
pub(crate) type TallyKey<'e> = (i64, i64, &'e str, &'e str);
/// A day, owner, key, user and model.
pub(crate) type UseKey<'e> = (i64, &'e str, &'e str, &'e str, &'e str);

/// The sums of a batch.
#[derive(Debug, Default)]
pub(crate) struct Sums<'e> {
    pub(crate) tallies: BTreeMap<TallyKey<'e>, Tally>,
    pub(crate) uses: BTreeMap<UseKey<'e>, Use>,
}

impl<'e> Sums<'e> {
    /// Of late events in the spans of their own time, as far as these are kept.
    pub(crate) fn of(events: impl Iterator<Item = &'e Event>, now: i64) -> Self {
        let mut sums = Sums::default();
        for event in events {
            for span in Span::ALL.into_iter().filter(|span| span.has(event.time, now)) {
                let (seconds, start) = (span.seconds(), span.floor(event.time));
                let key = (seconds, start, event.method.as_str(), event.model.as_str());
                sums.tallies.entry(key).or_default().count(event);
            }
            let day = Span::Day.floor(event.time);
            let key: UseKey<'e> = (day, &event.owner, &event.key_id, &event.user_id, &event.model);
            sums.uses.entry(key).or_default().count(event);
        }
        sums
    }
}

impl Tally {
    fn count(&mut self, event: &Event) {
        self.requests += 1;
        self.errors += i64::from(event.failed());
        self.tokens += event.tokens();
        self.token_requests += i64::from(event.tokens() > 0);
        self.cacheable += i64::from(event.cache != Cache::Unasked);
        self.cached += i64::from(event.cache == Cache::Answered);
        self.duration_us += event.duration_us;
        self.sketches.durations.add(event.duration_us);
        if let Some(time) = event.time_to_first_token_us {
            self.sketches.first_tokens.add(time);
        }
        if let Some(time) = event.inter_token_us {
            self.sketches.gaps.add(time);
        }
    }

    pub(crate) fn add(&mut self, other: &Tally) {
        self.requests += other.requests;
        self.errors += other.errors;
        self.tokens += other.tokens;
        self.token_requests += other.token_requests;
        self.cacheable += other.cacheable;
        self.cached += other.cached;
        self.duration_us += other.duration_us;
        self.sketches.durations.merge(&other.sketches.durations);
        self.sketches.first_tokens.merge(&other.sketches.first_tokens);
        self.sketches.gaps.merge(&other.sketches.gaps);
    }
}

impl Sketches {
    /// One text of the three.
    pub(crate) fn text(&self) -> anyhow::Result<String> {
        let mut text = String::with_capacity(1_024);
        text.push_str(FORM);
        self.durations.write(&mut text)?;
        text.push('.');
        self.first_tokens.write(&mut text)?;
        text.push('.');
        self.gaps.write(&mut text)?;
        Ok(text)
    }

    /// Adds what a text says; "" says nothing.
    pub(crate) fn read(&mut self, text: &str) -> anyhow::Result<()> {
        if text.is_empty() {
            return Ok(());
        }
        let words = "another version wrote these rollups; delete the rows of performance_rollups whose sketches do not begin with h:";
        let text = text.strip_prefix(FORM).context(words)?;
        let mut parts = text.splitn(3, '.');
        for sketch in [&mut self.durations, &mut self.first_tokens, &mut self.gaps] {
            sketch.read(parts.next().unwrap_or_default())?;
        }
        Ok(())
    }
}

impl Use {
    fn count(&mut self, event: &Event) {
        self.requests += 1;
        self.errors += i64::from(event.failed());
        self.prompt_tokens += event.prompt_tokens;
        self.completion_tokens += event.completion_tokens;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_text_of_another_version_says_what_to_do() {
        let mut sketches = Sketches::default();
        sketches.durations.add(7);
        let text = sketches.text().unwrap();
        let mut back = Sketches::default();
        back.read(&text).unwrap();
        back.read("").unwrap();
        assert_eq!(back, sketches);
        let error = back.read("ABBC4WBpYC..").unwrap_err().to_string();
        assert!(error.contains("delete the rows"), "{error}");
    }
}
