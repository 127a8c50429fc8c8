//! Compares the store with naive aggregation, on a SQLite file.

use std::collections::BTreeMap;

use hapa_core::timestamps::{DAY, HOUR, MINUTE};
use hapa_store::database::Db;
use proptest::prelude::*;
use sqlx::Row as _;
use tempfile::TempDir;

use super::*;
use crate::event::{CacheOutcome, CallEvent};
use crate::latency_histogram::LatencyHistogram;
use crate::rollup::{RollupTotals, UsageTotals};
use crate::rollup_period::RollupPeriod;

/// Noon.
const NOW: i64 = 20_000 * DAY + 12 * HOUR;

pub(super) async fn open(folder: &TempDir, retention_days: u32) -> Store {
    let url = format!("sqlite://{}/test.db?mode=rwc", folder.path().display());
    Store::new(Db::open("analytics", &url, MIGRATIONS).await.unwrap(), retention_days)
}

pub(super) fn event(number: usize, time: i64) -> CallEvent {
    CallEvent {
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
        reasoning_tokens: 0,
        duration_us: 1,
        time_to_first_token_us: None,
        time_to_first_answer_token_us: None,
        inter_token_us: None,
        cache: CacheOutcome::NotConsulted,
    }
}

/// Events with few ids, so that some repeat, up to 60 days late.
fn random_event() -> impl Strategy<Value = CallEvent> {
    let ago = prop_oneof![0..MINUTE, 0..3 * HOUR, 0..60 * DAY];
    let words = (0..3usize, 0..3usize, 0..3usize, any::<bool>());
    let numbers = (0..10_000_000i64, proptest::option::of(0..1_000_000i64), 0..1_000i64, 0..3u8);
    (0..150usize, ago, words, numbers).prop_map(
        |(number, ago, (method, model, owner, failed), (duration, first, tokens, cache))| {
            CallEvent {
                method: format!("/a.B/{method}"),
                model: ["", "m", "n"][model].to_owned(),
                owner: ["", "o", "p"][owner].to_owned(),
                key_id: format!("key_{owner}"),
                error_code: if failed { "E5001".to_owned() } else { String::new() },
                prompt_tokens: tokens,
                completion_tokens: tokens / 2,
                // Every third call reasons.
                reasoning_tokens: if number % 3 == 0 { tokens / 4 } else { 0 },
                duration_us: duration,
                time_to_first_token_us: first,
                time_to_first_answer_token_us: first
                    .filter(|_| number % 3 == 0)
                    .map(|first| first + duration),
                inter_token_us: first.map(|first| first / 10),
                cache: [CacheOutcome::NotConsulted, CacheOutcome::Miss, CacheOutcome::Hit]
                    [usize::from(cache)],
                ..event(number, NOW - ago)
            }
        },
    )
}

fn batches() -> impl Strategy<Value = Vec<Vec<CallEvent>>> {
    let batch = proptest::collection::vec(random_event(), 1..60);
    proptest::collection::vec(batch, 1..6).prop_map(|mut batches| {
        for batch in &mut batches {
            batch.sort_unstable_by(|one, other| one.id.cmp(&other.id));
            batch.dedup_by(|one, other| one.id == other.id);
        }
        batches
    })
}

/// Aggregates events in the simplest way.
fn expected_rollups<'e>(
    events: impl Iterator<Item = &'e CallEvent>,
) -> BTreeMap<(String, String), RollupTotals> {
    let mut rollups: BTreeMap<_, RollupTotals> = BTreeMap::new();
    for event in events {
        let totals = rollups.entry((event.method.clone(), event.model.clone())).or_default();
        let tokens = event.prompt_tokens + event.completion_tokens;
        totals.requests += 1;
        totals.errors += i64::from(!event.error_code.is_empty());
        totals.tokens += tokens;
        totals.reasoning_tokens += event.reasoning_tokens;
        totals.token_requests += i64::from(tokens != 0);
        totals.cacheable += i64::from(event.cache != CacheOutcome::NotConsulted);
        totals.cached += i64::from(event.cache == CacheOutcome::Hit);
        totals.duration_us += event.duration_us;
        let mut record = |histogram: fn(&mut RollupTotals) -> &mut LatencyHistogram,
                          value: Option<i64>| {
            if let Some(value) = value {
                histogram(totals).record(value);
            }
        };
        record(|totals| &mut totals.latencies.duration, Some(event.duration_us));
        record(|totals| &mut totals.latencies.time_to_first_token, event.time_to_first_token_us);
        record(|totals| &mut totals.latencies.inter_token, event.inter_token_us);
        let answer = event.time_to_first_answer_token_us.or(event.time_to_first_token_us);
        record(|totals| totals.latencies.separate_answer.get_or_insert_default(), answer);
    }
    rollups
}

async fn check(batches: Vec<Vec<CallEvent>>) {
    let folder = tempfile::tempdir().unwrap();
    let store = open(&folder, 365).await;
    let mut first: BTreeMap<String, CallEvent> = BTreeMap::new();
    for batch in batches {
        let before = first.len();
        for event in &batch {
            first.entry(event.id.clone()).or_insert_with(|| event.clone());
        }
        let accepted = store.record(batch, NOW).await.unwrap() as usize;
        assert_eq!(accepted, first.len() - before);
    }
    let windows = [
        (RollupPeriod::Second, NOW - MINUTE),
        (RollupPeriod::Minute, NOW - 2 * HOUR),
        (RollupPeriod::Minute, NOW - 2 * HOUR + 7 * MINUTE),
        (RollupPeriod::Minute, NOW - 7 * MINUTE),
        (RollupPeriod::Hour, NOW - 7 * DAY),
        (RollupPeriod::Hour, NOW - 7 * HOUR),
        (RollupPeriod::Day, NOW - 100 * DAY),
    ];
    for (period, start) in windows {
        let (start, end) = (period.floor(start), period.ceil(NOW + 1));
        let all = RollupFilter { period, start, end, model: String::new(), method: String::new() };
        let within = |event: &&CallEvent| event.time >= start;
        let expected = expected_rollups(first.values().filter(within));
        assert_eq!(store.rollup_totals(&all).await.unwrap(), expected, "{period:?}");
        let some = RollupFilter { model: "m".to_owned(), method: "1".to_owned(), ..all };
        let of = |event: &&CallEvent| event.model == "m" && event.method == "/a.B/1";
        let expected = expected_rollups(first.values().filter(within).filter(of));
        assert_eq!(store.rollup_totals(&some).await.unwrap(), expected, "{period:?}");
    }
    check_usage(&store, first.values()).await;
}

async fn check_usage(store: &Store, events: impl Iterator<Item = &CallEvent>) {
    let mut expected: BTreeMap<_, [i64; 5]> = BTreeMap::new();
    for event in events {
        let key = (RollupPeriod::Day.floor(event.time), event.owner.clone(), event.model.clone());
        let sums = expected.entry(key).or_default();
        let failed = i64::from(!event.error_code.is_empty());
        let tokens = [event.prompt_tokens, event.completion_tokens, event.reasoning_tokens];
        let more = [1, failed, tokens[0], tokens[1], tokens[2]];
        for (sum, more) in sums.iter_mut().zip(more) {
            *sum += more;
        }
    }
    let all = UsageFilter {
        start: 0,
        end: NOW + DAY,
        owner: String::new(),
        key_id: String::new(),
        model: String::new(),
    };
    let dimensions = [UsageDimension::Day, UsageDimension::Owner, UsageDimension::Model];
    let (found, grand_total) = store.usage(&all, &dimensions, 10_000, 0).await.unwrap();
    let (beyond, same) = store.usage(&all, &dimensions, 10, 10_000).await.unwrap();
    assert_eq!((beyond.len(), same), (0, grand_total));
    let counters = |totals: UsageTotals| {
        let UsageTotals { requests, errors, prompt_tokens, completion_tokens, reasoning_tokens } =
            totals;
        [requests, errors, prompt_tokens, completion_tokens, reasoning_tokens]
    };
    let sums = |group: &UsageGroup| counters(group.totals);
    let summed = |at: usize| expected.values().map(|sums| sums[at]).sum::<i64>();
    assert_eq!(counters(grand_total), [0, 1, 2, 3, 4].map(summed));
    let order = |group: &UsageGroup| (group.day, -sums(group)[2] - sums(group)[3]);
    assert!(found.is_sorted_by_key(order));
    let key = |group: &UsageGroup| (group.day.unwrap(), group.owner.clone(), group.model.clone());
    let found: BTreeMap<_, _> = found.iter().map(|group| (key(group), sums(group))).collect();
    assert_eq!(found, expected);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    #[test]
    fn aggregates_equal_a_naive_recount(batches in batches()) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(check(batches));
    }
}

#[tokio::test]
async fn concurrent_batches_count_shared_events_once() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(&folder, 30).await;
    // Batch n has the events from 10 n to 10 n + 20. Two batches have each event, except the first
    // and last 10.
    let batch = |first: usize| (first..first + 20).map(|at| event(at, NOW)).collect();
    let all = (0..40).map(|number| store.record(batch(number * 10), NOW));
    let counts: Result<Vec<_>, _> = futures_util::future::join_all(all).await.into_iter().collect();
    let counts = counts.unwrap();
    assert_eq!(counts.iter().sum::<u32>(), 410);
    assert!(counts.iter().all(|count| *count <= 20));
    let filter = RollupFilter {
        period: RollupPeriod::Day,
        start: 0,
        end: NOW + DAY,
        model: String::new(),
        method: String::new(),
    };
    let rollups = store.rollup_totals(&filter).await.unwrap();
    assert_eq!(rollups.values().map(|totals| totals.requests).sum::<i64>(), 410);
}

#[tokio::test]
async fn a_batch_is_stored_after_its_caller_disconnects_and_a_full_queue_rejects_batches() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(&folder, 30).await;
    let lock = store.db.writer.begin_with("BEGIN IMMEDIATE").await.unwrap();
    let mut abandoned = Box::pin(store.record(vec![event(0, NOW)], NOW));
    assert!(futures_util::poll!(&mut abandoned).is_pending());
    drop(abandoned);
    let many = (1..=65).map(|at| store.record(vec![event(at, NOW)], NOW));
    let mut many: Vec<_> = many.map(Box::pin).collect();
    let mut rejected = 0;
    for one in &mut many {
        rejected += u32::from(futures_util::poll!(one).is_ready());
    }
    assert_eq!(rejected, 2, "one caller has disconnected, and 63 batches wait");
    lock.rollback().await.unwrap();
    let stored = futures_util::future::join_all(many.into_iter().take(63)).await;
    assert!(stored.into_iter().all(|stored| stored.is_ok_and(|count| count == 1)));
    assert_eq!(store.record(vec![event(0, NOW)], NOW).await.unwrap(), 0);
}

#[tokio::test]
async fn events_older_than_the_retention_are_not_counted() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(&folder, 30).await;
    let events = vec![event(1, NOW - 30 * DAY - 1), event(2, NOW - 30 * DAY)];
    assert_eq!(store.record(events.clone(), NOW).await.unwrap(), 1);
    assert_eq!(store.record(events, NOW).await.unwrap(), 0);
}

#[tokio::test]
async fn a_purge_deletes_by_age_and_keeps_the_days() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(&folder, 30).await;
    let long_ago = NOW - 20 * DAY;
    // More than a chunk.
    for batch in 0..5 {
        let events = (0..500).map(|at| event(batch * 500 + at, long_ago)).collect();
        assert_eq!(store.record(events, long_ago).await.unwrap(), 500);
    }
    store.record(vec![event(9_999, NOW)], NOW).await.unwrap();
    let count = async |period: RollupPeriod| {
        let text = "SELECT CAST(COALESCE(SUM(requests), 0) AS BIGINT) FROM performance_rollups
                    WHERE seconds = $1";
        let row = sqlx::query(text).bind(period.seconds()).fetch_one(&store.db.reader).await;
        row.unwrap().get::<i64, _>(0)
    };
    assert_eq!(
        (count(RollupPeriod::Second).await, count(RollupPeriod::Minute).await),
        (2_501, 2_501)
    );
    assert!(!store.purge_chunk(NOW).await.unwrap());
    assert_eq!((count(RollupPeriod::Second).await, count(RollupPeriod::Minute).await), (1, 1));
    assert_eq!((count(RollupPeriod::Hour).await, count(RollupPeriod::Day).await), (2_501, 2_501));
    let later = NOW + 11 * DAY;
    assert!(store.purge_chunk(later).await.unwrap());
    assert!(!store.purge_chunk(later).await.unwrap());
    assert!(!store.purge_chunk(NOW + 100 * DAY).await.unwrap());
    assert_eq!((count(RollupPeriod::Hour).await, count(RollupPeriod::Day).await), (0, 2_501));
    // The event and its second rollup are deleted, so a repeated event counts as new.
    assert_eq!(store.record(vec![event(9_999, NOW)], NOW).await.unwrap(), 1);
}

#[test]
fn chunk_sizes_are_powers_of_two_and_cover_all_rows() {
    let rows: Vec<_> = (0..500).collect();
    let sizes: Vec<_> = power_of_two_chunks(&rows, 128).map(<[_]>::len).collect();
    assert_eq!(sizes, [128, 128, 128, 64, 32, 16, 4]);
    assert_eq!(power_of_two_chunks(&rows, 128).flatten().count(), 500);
    assert_eq!(power_of_two_chunks::<i64>(&[], 128).count(), 0);
}
