//! Tests of reports and settlements.

use proptest::prelude::*;

use super::*;

const ESTIMATE: Estimate = Estimate { prompt: 100, max_prompt: 150, max_response: 1_000 };

fn lease(estimate: Estimate) -> (Lease, mpsc::Receiver<LedgerEntry>) {
    let (entries, receiver) = mpsc::channel(QUEUE_CAPACITY);
    let mut lease = Lease::new(Settlement::default(), estimate, entries);
    lease.reports = Some(UsageReports::new(estimate, lease.reserved));
    (lease, receiver)
}

/// Tokens of the queued reports and settlements.
fn drain(entries: &mut mpsc::Receiver<LedgerEntry>) -> (Vec<i64>, Vec<i64>) {
    let mut all = Vec::new();
    while let Ok(entry) = entries.try_recv() {
        all.push(entry);
    }
    let (ended, running) = partition(&mut all);
    let tokens = |list: Vec<Settlement>| list.iter().map(|entry| entry.tokens).collect();
    (tokens(running), tokens(ended))
}

#[test]
fn reports_are_few_and_run_ahead_and_the_drop_settles_the_usage() {
    let (mut lease, mut entries) = lease(ESTIMATE);
    assert_eq!(lease.reports.as_ref().unwrap().reported, 150 + REPORT_LEAD_TOKENS);
    for answered in 0..=200 {
        lease.record_usage(100 + answered);
    }
    let (reports, settled) = drain(&mut entries);
    assert_eq!((reports, settled), (vec![342, 406, 470], Vec::new()));
    drop(lease);
    assert_eq!(drain(&mut entries), (Vec::new(), vec![300]));
}

#[test]
fn tokens_above_the_reservation_are_neither_reported_nor_settled() {
    let (mut lease, mut entries) = lease(Estimate { max_response: 10, ..ESTIMATE });
    assert_eq!(lease.reports.as_ref().unwrap().reported, 160, "no more than is reserved");
    lease.record_usage(4_000_000_000);
    assert_eq!((lease.reserved, lease.excess), (160, 4_000_000_000 - 160));
    lease.record_usage(i64::MAX);
    drop(lease);
    assert_eq!(drain(&mut entries), (Vec::new(), vec![160]));

    let (mut lease, mut entries) = self::lease(ESTIMATE);
    lease.record_usage(i64::MIN);
    drop(lease);
    assert_eq!(drain(&mut entries), (Vec::new(), vec![0]));
}

#[test]
fn reports_leave_room_in_the_queue_for_settlements() {
    let (mut lease, mut entries) = lease(ESTIMATE);
    while lease.entries.capacity() >= QUEUE_CAPACITY / 2 {
        lease.entries.try_send(LedgerEntry::Report(Settlement::default())).unwrap();
    }
    lease.record_usage(500);
    let left = lease.entries.capacity();
    assert_eq!(left, QUEUE_CAPACITY / 2 - 1, "it was reported nevertheless");
    assert!(drain(&mut entries).1.is_empty());
    // The next report follows as soon as there is room.
    lease.record_usage(501);
    assert_eq!(drain(&mut entries).0, [679]);
}

#[test]
fn the_reservation_of_a_prompt_is_not_below_real_token_counts() {
    assert_eq!(max_prompt_tokens(b"plain words of a prompt "), 8);
    assert_eq!(max_prompt_tokens("0123456789".repeat(100).as_bytes()), 1_000);
    assert_eq!(max_prompt_tokens("{}();".repeat(10).as_bytes()), 50);
    assert_eq!(max_prompt_tokens("\u{1f980}".as_bytes()), 4);
    let code = b"def add(left, right):\n    return left + right\n";
    assert!((15..=30).contains(&max_prompt_tokens(code)), "{}", max_prompt_tokens(code));
}

proptest! {
    #[test]
    fn reports_to_auth_always_cover_the_tokens_used(
        prompt in 0..5_000_i64,
        uncertainty in 0..5_000_i64,
        max_response in 0..5_000_i64,
        steps in prop::collection::vec(0..REPORT_LEAD_TOKENS / 2, 0..200),
    ) {
        let estimate = Estimate {
            prompt,
 max_prompt: prompt + uncertainty,
 max_response,
        };
        let (mut lease, mut entries) = lease(estimate);
        let (mut used, mut reported) = (prompt, lease.reports.as_ref().unwrap().reported);
        for step in steps {
            // Auth has every report before the next tokens come.
            reported = reported.max(drain(&mut entries).0.into_iter().max().unwrap_or_default());
            used = (used + step).min(lease.reserved);
            prop_assert!(used <= reported, "{used} were used and {reported} are reported");
            prop_assert!(reported <= lease.reserved);
            lease.record_usage(used);
        }
        lease.record_usage(used);
        drop(lease);
        prop_assert_eq!(drain(&mut entries).1, vec![used]);
    }
}
