//! Reasoning in reports: the first token and the first answer token are two measurements, and reasoning tokens are
//! counted.

use hapa_proto::analytics::v1::get_performance_response::Percentiles;
use hapa_proto::analytics::v1::{GetUsageRequest, UsageEvent};
use hapa_test_harness::{Identity, Store, TestMesh, incident};

use crate::reports::usage::{HOUR, analytics, event, performance, record, usage};

/// A call of a model whose first token came after 1 s.
fn call(model: &str) -> UsageEvent {
    UsageEvent {
        model: model.to_owned(),
        duration_us: 20_000_000,
        time_to_first_token_us: Some(1_000_000),
        ..event(0)
    }
}

/// A call that reasoned with 30 of its 40 tokens, and answered after 8 s or not at all.
fn reasoning_call(answer_us: Option<i64>) -> UsageEvent {
    UsageEvent {
        completion_tokens: 40,
        reasoning_tokens: 30,
        time_to_first_answer_token_us: answer_us,
        ..call("thinker")
    }
}

/// Whether the values are these to 1 %: their number, the median and the 99th percentile.
fn assert_near(found: Option<Percentiles>, (count, p50, p99): (u32, f64, f64)) {
    let found = found.unwrap();
    let near = |value: f64, expected: f64| (value - expected).abs() <= 0.01 * expected;
    let is_near = found.count == count && near(found.p50, p50) && near(found.p99, p99);
    assert!(is_near, "{found:?} for {count} {p50} {p99}");
}

#[tokio::test]
async fn reports_separate_the_first_token_from_the_first_answer_token_and_count_reasoning() {
    for store in Store::both().await {
        let mesh = TestMesh::start_unrecorded_on(&store, &[]).await;
        // The rollups exist without reasoning first, and one batch has both.
        record(&mesh, vec![call("plain"), call("thinker"), call("thinker")]).await.unwrap();
        let answered = || reasoning_call(Some(8_000_000));
        let batch = vec![call("plain"), answered(), answered(), reasoning_call(None)];
        record(&mesh, batch).await.unwrap();
        let report = performance(&mesh, HOUR).await;
        assert_near(report.time_to_first_token, (7, 1.0, 1.0));
        assert_near(report.time_to_first_answer_token, (6, 1.0, 8.0));
        assert_eq!(report.ai_model_usage.unwrap().reasoning_tokens.to_string(), "90");
        let [thinker, plain] = &report.models[..] else { panic!("{report:?}") };
        assert_eq!((thinker.name.as_str(), plain.name.as_str()), ("thinker", "plain"));
        assert_near(thinker.time_to_first_token, (5, 1.0, 1.0));
        assert_near(thinker.time_to_first_answer_token, (4, 1.0, 8.0));
        assert_eq!(plain.time_to_first_answer_token, plain.time_to_first_token);
        let by_model = GetUsageRequest { group_by: "model".to_owned(), ..Default::default() };
        let reply = usage(&mut analytics(&mesh, Identity::Mesh), by_model).await;
        let tokens = reply.rows.iter().chain(&reply.total);
        let tokens = tokens.map(|row| (row.completion_tokens, row.reasoning_tokens));
        let texts: Vec<_> = tokens.map(|(all, part)| format!("{part}/{all}")).collect();
        assert_eq!(texts, ["90/122", "0/2", "90/124"]);
    }
}

#[tokio::test]
async fn rollups_of_the_previous_version_count_the_first_token_as_the_answer() {
    for store in Store::both().await {
        let mesh = TestMesh::start_unrecorded_on(&store, &[]).await;
        record(&mesh, vec![call("thinker"), reasoning_call(Some(8_000_000))]).await.unwrap();
        // The previous version has neither column.
        store
            .execute("UPDATE performance_rollups SET answer_sketch = '', reasoning_tokens = 0")
            .await;
        let report = performance(&mesh, HOUR).await;
        assert_near(report.time_to_first_answer_token, (2, 1.0, 1.0));
        record(&mesh, vec![reasoning_call(Some(8_000_000))]).await.unwrap();
        let report = performance(&mesh, HOUR).await;
        assert_near(report.time_to_first_answer_token, (3, 1.0, 8.0));
        assert_near(report.time_to_first_token, (3, 1.0, 1.0));
        assert_eq!(report.ai_model_usage.unwrap().reasoning_tokens.to_string(), "30");
    }
}

#[tokio::test]
async fn events_that_contradict_themselves_are_refused() {
    let mesh = TestMesh::start_unrecorded().await;
    let early = reasoning_call(Some(999_999));
    let without_first = UsageEvent { time_to_first_token_us: None, ..reasoning_call(Some(1)) };
    let more = UsageEvent { reasoning_tokens: 41, ..reasoning_call(None) };
    for wrong in [early, without_first, more] {
        let status = record(&mesh, vec![wrong]).await.unwrap_err();
        assert_eq!(incident(&status).0, "E4001");
    }
}
