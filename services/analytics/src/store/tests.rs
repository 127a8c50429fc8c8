//! What is stored against a naive recount, on a file.

use std::collections::BTreeMap;

use hapa_core::timestamps::{DAY, HOUR, MINUTE};
use hapa_store::database::Db;
use proptest::prelude::*;
use sqlx::Row as _;
use tempfile::TempDir;

use super::*;
use crate::event::{Cache, Event};
use crate::rollup::{Tally, Use};
use crate::sketch::Sketch;
use crate::times::Span;

/// Noon.
const NOW: i64 = 20_000 * DAY + 12 * HOUR;

pub(super) async fn open(folder: &TempDir, retention_days: u32) -> Store {
    let url = format!("sqlite://{}/test.db?mode=rwc", folder.path().display());
    Store::new(Db::open("analytics", &url, MIGRATIONS).await.unwrap(), retention_days)
}

pub(super) fn event(number: usize, time: i64) -> Event {
    Event {
        id: format!("{number:08}"),
        time,
        service: String::new(),
        method: "/a.B/C".to_owned(),
        error_code: String::new(),
        grpc_status: "OK".to_owned(),
        key_id: String::new(),
        user_id: String::new(),
        owner: String::new(),
        model: String::new(),
        task: String::new(),
        prompt_tokens: 0,
        completion_tokens: 0,
        duration_us: 1,
        time_to_first_token_us: None,
        inter_token_us: None,
        cache: Cache::Unasked,
    }
}

/// Events of few ids, so that some come twice, from a second to 60 days late.
fn random_event() -> impl Strategy<Value = Event> {
    let ago = prop_oneof![0..MINUTE, 0..3 * HOUR, 0..60 * DAY];
    let words = (0..3usize, 0..3usize, 0..3usize, any::<bool>());
    let numbers = (0..10_000_000i64, proptest::option::of(0..1_000_000i64), 0..1_000i64, 0..3u8);
    (0..150usize, ago, words, numbers).prop_map(
        |(number, ago, (method, model, owner, failed), (duration, first, tokens, cache))| Event {
            method: format!("/a.B/{method}"),
            model: ["", "m", "n"][model].to_owned(),
            owner: ["", "o", "p"][owner].to_owned(),
            key_id: format!("key_{owner}"),
            error_code: if failed { "E5001".to_owned() } else { String::new() },
            prompt_tokens: tokens,
            completion_tokens: tokens / 2,
            duration_us: duration,
            time_to_first_token_us: first,
            inter_token_us: first.map(|first| first / 10),
            cache: [Cache::Unasked, Cache::Missed, Cache::Answered][usize::from(cache)],
            ..event(number, NOW - ago)
        },
    )
}

fn batches() -> impl Strategy<Value = Vec<Vec<Event>>> {
    let batch = proptest::collection::vec(random_event(), 1..60);
    proptest::collection::vec(batch, 1..6).prop_map(|mut batches| {
        for batch in &mut batches {
            batch.sort_unstable_by(|one, other| one.id.cmp(&other.id));
            batch.dedup_by(|one, other| one.id == other.id);
        }
        batches
    })
}

/// As slowly and plainly as can be.
fn recount<'e>(events: impl Iterator<Item = &'e Event>) -> BTreeMap<(String, String), Tally> {
    let mut tallies: BTreeMap<_, Tally> = BTreeMap::new();
    for event in events {
        let tally = tallies.entry((event.method.clone(), event.model.clone())).or_default();
        let tokens = event.prompt_tokens + event.completion_tokens;
        tally.requests += 1;
        tally.errors += i64::from(!event.error_code.is_empty());
        tally.tokens += tokens;
        tally.token_requests += i64::from(tokens != 0);
        tally.cacheable += i64::from(event.cache != Cache::Unasked);
        tally.cached += i64::from(event.cache == Cache::Answered);
        tally.duration_us += event.duration_us;
        let mut add = |sketch: fn(&mut Tally) -> &mut Sketch, value: Option<i64>| {
            if let Some(value) = value {
                sketch(tally).add(value);
            }
        };
        add(|tally| &mut tally.sketches.durations, Some(event.duration_us));
        add(|tally| &mut tally.sketches.first_tokens, event.time_to_first_token_us);
        add(|tally| &mut tally.sketches.gaps, event.inter_token_us);
    }
    tallies
}

async fn check(batches: Vec<Vec<Event>>) {
    let folder = tempfile::tempdir().unwrap();
    let store = open(&folder, 365).await;
    let mut first: BTreeMap<String, Event> = BTreeMap::new();
    for batch in batches {
        let before = first.len();
        for event in &batch {
            first.entry(event.id.clone()).or_insert_with(|| event.clone());
        }
        let accepted = store.record(batch, NOW).await.unwrap() as usize;
        assert_eq!(accepted, first.len() - before);
    }
    let windows = [
        (Span::Second, NOW - MINUTE),
        (Span::Minute, NOW - 2 * HOUR),
        (Span::Minute, NOW - 2 * HOUR + 7 * MINUTE),
        (Span::Minute, NOW - 7 * MINUTE),
        (Span::Hour, NOW - 7 * DAY),
        (Span::Hour, NOW - 7 * HOUR),
        (Span::Day, NOW - 100 * DAY),
    ];
    for (span, start) in windows {
        let (start, end) = (span.floor(start), span.ceil(NOW + 1));
        let all = Which { span, start, end, model: String::new(), method: String::new() };
        let within = |event: &&Event| event.time >= start;
        let expected = recount(first.values().filter(within));
        assert_eq!(store.tallies(&all).await.unwrap(), expected, "{span:?}");
        let some = Which { model: "m".to_owned(), method: "1".to_owned(), ..all };
        let of = |event: &&Event| event.model == "m" && event.method == "/a.B/1";
        let expected = recount(first.values().filter(within).filter(of));
        assert_eq!(store.tallies(&some).await.unwrap(), expected, "{span:?}");
    }
    check_usage(&store, first.values()).await;
}

async fn check_usage(store: &Store, events: impl Iterator<Item = &Event>) {
    let mut expected: BTreeMap<_, [i64; 4]> = BTreeMap::new();
    for event in events {
        let key = (Span::Day.floor(event.time), event.owner.clone(), event.model.clone());
        let sums = expected.entry(key).or_default();
        let failed = i64::from(!event.error_code.is_empty());
        let more = [1, failed, event.prompt_tokens, event.completion_tokens];
        for (sum, more) in sums.iter_mut().zip(more) {
            *sum += more;
        }
    }
    let all = Usage {
        start: 0,
        end: NOW + DAY,
        owner: String::new(),
        key_id: String::new(),
        model: String::new(),
    };
    let by = [By::Day, By::Owner, By::Model];
    let (found, whole) = store.usage(&all, &by, 10_000, 0).await.unwrap();
    let (beyond, same) = store.usage(&all, &by, 10, 10_000).await.unwrap();
    assert_eq!((beyond.len(), same), (0, whole));
    let counters =
        |used: Use| [used.requests, used.errors, used.prompt_tokens, used.completion_tokens];
    let sums = |total: &Total| counters(total.used);
    let summed = |at: usize| expected.values().map(|sums| sums[at]).sum::<i64>();
    assert_eq!(counters(whole), [0, 1, 2, 3].map(summed));
    let order = |total: &Total| (total.day, -sums(total)[2] - sums(total)[3]);
    assert!(found.is_sorted_by_key(order));
    let key = |total: &Total| (total.day.unwrap(), total.owner.clone(), total.model.clone());
    let found: BTreeMap<_, _> = found.iter().map(|total| (key(total), sums(total))).collect();
    assert_eq!(found, expected);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    #[test]
    fn sums_are_what_a_naive_recount_finds(batches in batches()) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(check(batches));
    }
}

#[tokio::test]
async fn batches_that_come_at_once_count_what_they_share_once() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(&folder, 30).await;
    // Batch n has the events from 10 n to 10 n + 20: each but the first 10 and the last is in two.
    let batch = |first: usize| (first..first + 20).map(|at| event(at, NOW)).collect();
    let all = (0..40).map(|number| store.record(batch(number * 10), NOW));
    let counts: Result<Vec<_>, _> = futures_util::future::join_all(all).await.into_iter().collect();
    let counts = counts.unwrap();
    assert_eq!(counts.iter().sum::<u32>(), 410);
    assert!(counts.iter().all(|count| *count <= 20));
    let which = Which {
        span: Span::Day,
        start: 0,
        end: NOW + DAY,
        model: String::new(),
        method: String::new(),
    };
    let tallies = store.tallies(&which).await.unwrap();
    assert_eq!(tallies.values().map(|tally| tally.requests).sum::<i64>(), 410);
}

#[tokio::test]
async fn a_batch_is_taken_in_although_its_caller_is_gone_and_more_than_can_wait_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(&folder, 30).await;
    let lock = store.db.writer.begin_with("BEGIN IMMEDIATE").await.unwrap();
    let mut gone = Box::pin(store.record(vec![event(0, NOW)], NOW));
    assert!(futures_util::poll!(&mut gone).is_pending());
    drop(gone);
    let many = (1..=65).map(|at| store.record(vec![event(at, NOW)], NOW));
    let mut many: Vec<_> = many.map(Box::pin).collect();
    let mut refused = 0;
    for one in &mut many {
        refused += u32::from(futures_util::poll!(one).is_ready());
    }
    assert_eq!(refused, 2, "one is gone, and 63 wait");
    lock.rollback().await.unwrap();
    let taken = futures_util::future::join_all(many.into_iter().take(63)).await;
    assert!(taken.into_iter().all(|taken| taken.is_ok_and(|count| count == 1)));
    assert_eq!(store.record(vec![event(0, NOW)], NOW).await.unwrap(), 0);
}

#[tokio::test]
async fn what_is_older_than_events_are_kept_is_not_counted() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(&folder, 30).await;
    let events = vec![event(1, NOW - 30 * DAY - 1), event(2, NOW - 30 * DAY)];
    assert_eq!(store.record(events.clone(), NOW).await.unwrap(), 1);
    assert_eq!(store.record(events, NOW).await.unwrap(), 0);
}

#[tokio::test]
async fn a_purge_forgets_by_age_and_keeps_the_days() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(&folder, 30).await;
    let long_ago = NOW - 20 * DAY;
    // More than a portion.
    for batch in 0..5 {
        let events = (0..500).map(|at| event(batch * 500 + at, long_ago)).collect();
        assert_eq!(store.record(events, long_ago).await.unwrap(), 500);
    }
    store.record(vec![event(9_999, NOW)], NOW).await.unwrap();
    let count = async |span: Span| {
        let text = "SELECT CAST(COALESCE(SUM(requests), 0) AS BIGINT) FROM performance_rollups
                    WHERE seconds = $1";
        let row = sqlx::query(text).bind(span.seconds()).fetch_one(&store.db.reader).await;
        row.unwrap().get::<i64, _>(0)
    };
    assert_eq!((count(Span::Second).await, count(Span::Minute).await), (2_501, 2_501));
    assert!(!store.purge_portion(NOW).await.unwrap());
    assert_eq!((count(Span::Second).await, count(Span::Minute).await), (1, 1));
    assert_eq!((count(Span::Hour).await, count(Span::Day).await), (2_501, 2_501));
    let later = NOW + 11 * DAY;
    assert!(store.purge_portion(later).await.unwrap());
    assert!(!store.purge_portion(later).await.unwrap());
    assert!(!store.purge_portion(NOW + 100 * DAY).await.unwrap());
    assert_eq!((count(Span::Hour).await, count(Span::Day).await), (0, 2_501));
    // Gone, as a repetition shows; the second one too, by then.
    assert_eq!(store.record(vec![event(9_999, NOW)], NOW).await.unwrap(), 1);
}

#[test]
fn portions_are_powers_of_two_and_leave_nothing_out() {
    let rows: Vec<_> = (0..500).collect();
    let sizes: Vec<_> = portions(&rows, 128).map(<[_]>::len).collect();
    assert_eq!(sizes, [128, 128, 128, 64, 32, 16, 4]);
    assert_eq!(portions(&rows, 128).flatten().count(), 500);
    assert_eq!(portions::<i64>(&[], 128).count(), 0);
}
