//! Reported occurrences: what is accepted, grouped, deduplicated and refused.

use std::time::{Duration, Instant};

use hapa_proto::errors::v1::{ListIncidentsRequest, Occurrence};
use hapa_test_harness::{Store, TestMesh, incident};
use serde_json::json;
use tonic::Code;
use tonic_types::StatusExt as _;

use super::{
    ago, errors, errors_of, event_id, failure, get, incident_id, list, only, report, unseen,
};

#[tokio::test]
async fn failures_of_one_cause_are_one_incident_and_found_by_whatever_was_shown() {
    for store in Store::both().await {
        let mesh = TestMesh::start_unrecorded_on(&store, &[]).await;
        let mut client = errors(&mesh);
        let first = failure();
        let second = Occurrence {
            causes: vec!["connection refused by 10.0.0.99:8003".to_owned()],
            owner: "bob".to_owned(),
            version: "1.10.0".to_owned(),
            trace_id: "f".repeat(32),
            ..failure()
        };
        let quiet = Occurrence { recovered: true, ..unseen() };
        let other = Occurrence { error_code: "E5001".to_owned(), ..failure() };
        assert_eq!(report(&mut client, vec![first.clone(), second.clone()]).await.unwrap(), 2);
        assert_eq!(report(&mut client, vec![quiet, other.clone()]).await.unwrap(), 2);

        let found = get(&mut client, &second.incident_id).await.unwrap();
        let made = found.incident.unwrap();
        assert_eq!(made.incident_id, first.incident_id);
        assert_eq!((made.count, made.affected_users, made.recovered_count), (3, 2, 1));
        assert_eq!((made.status.as_str(), made.error_code.as_str()), ("open", "E5006"));
        assert_eq!((made.method, made.last_seen_version), (first.method.clone(), "1.10.0".into()));
        assert_eq!((made.first_seen, made.reopened), (first.time, false));
        assert_eq!(made.fingerprint.len(), 16);
        // The requested occurrence comes first, with all its fields.
        assert_eq!(found.occurrences.len(), 3);
        assert_eq!(found.occurrences[0], second);
        let found = get(&mut client, &first.incident_id).await.unwrap();
        assert_eq!(found.occurrences[0], first);
        let found = get(&mut client, &other.incident_id).await.unwrap();
        assert_eq!(found.incident.unwrap().error_code, "E5001");

        for (id, code) in [("INC-20260101-00000000", "E4010"), ("", "E4002")] {
            assert_eq!(incident(&get(&mut client, id).await.unwrap_err()).0, code);
        }
    }
}

#[tokio::test]
async fn a_failure_that_no_client_received_gets_an_incident_with_an_id_of_its_own() {
    for store in Store::both().await {
        let mesh = TestMesh::start_unrecorded_on(&store, &[]).await;
        let mut client = errors(&mesh);
        report(&mut client, vec![unseen()]).await.unwrap();
        let made = only(&mut client).await.incident_id;
        assert!(made.starts_with("INC-") && made.len() == "INC-20260101-0123ABCD".len());
        let shown = failure();
        report(&mut client, vec![shown.clone()]).await.unwrap();
        assert_eq!(only(&mut client).await.incident_id, made, "an incident keeps its id");
        let found = get(&mut client, &shown.incident_id).await.unwrap();
        assert_eq!(found.incident.unwrap().incident_id, made);
        assert_eq!(found.occurrences[0], shown);
        // Two services report one incident id with two causes: both are stored.
        let told = Occurrence { event_id: event_id(), method: "auth".to_owned(), ..shown.clone() };
        assert_eq!(report(&mut client, vec![told]).await.unwrap(), 1);
        let found = get(&mut client, &shown.incident_id).await.unwrap();
        assert_eq!(found.incident.unwrap().method, "auth");
    }
}

#[tokio::test]
async fn what_is_reported_twice_counts_once() {
    for store in Store::both().await {
        let mesh = TestMesh::start_unrecorded_on(&store, &[]).await;
        let mut client = errors(&mesh);
        let (first, second) = (failure(), failure());
        let twice = vec![first.clone(), first.clone()];
        assert_eq!(report(&mut client, twice).await.unwrap(), 1);
        let again = vec![first.clone(), second, first.clone()];
        assert_eq!(report(&mut client, again).await.unwrap(), 1);
        assert_eq!(report(&mut client, vec![first]).await.unwrap(), 0);
        assert_eq!(only(&mut client).await.count, 2);
    }
}

#[tokio::test]
async fn a_storm_is_counted_exactly_and_stored_as_a_sample() {
    for (engine, store) in Store::both().await.into_iter().enumerate() {
        let mesh = TestMesh::start_unrecorded_on(&store, &["--default-rate-limit=0"]).await;
        let (mut quiet, mut loud) = (errors(&mesh), errors(&mesh));
        let time = ago(Duration::ZERO);
        let mut batches: Vec<Vec<_>> = Vec::new();
        let mut ids = Vec::new();
        for number in 0..20 {
            let of_batch = |index: usize| Occurrence {
                time,
                message: format!("the model can't be reached after {index} ms"),
                owner: format!("owner-{}", index % 100),
                ..if number < 10 { unseen() } else { failure() }
            };
            let batch: Vec<_> = (0..1_000).map(of_batch).collect();
            ids.push(batch[999].incident_id.clone());
            batches.push(batch);
        }
        let last = batches[19][999].clone();
        let begin = Instant::now();
        let (half, rest) = batches.split_at(10);
        let send = async |client: &mut super::Errors, batches: &[Vec<Occurrence>]| {
            for batch in batches {
                assert_eq!(report(client, batch.clone()).await.unwrap(), 1_000);
            }
        };
        tokio::join!(send(&mut quiet, half), send(&mut loud, rest));
        let rate = 20_000.0 / begin.elapsed().as_secs_f64();
        println!("engine {engine}: {rate:.0} occurrences a second");

        let made = only(&mut quiet).await;
        assert_eq!((made.count, made.affected_users), (20_000, 100));
        let found = get(&mut quiet, &last.incident_id).await.unwrap();
        assert_eq!(found.occurrences[0], last, "what was shown is kept whole");
        assert_eq!(found.occurrences.len(), 20);
    }
}

#[tokio::test]
async fn a_batch_with_anything_wrong_is_refused_whole_and_says_what() {
    let mesh = TestMesh::start_unrecorded().await;
    let mut client = errors(&mesh);
    let wrong = Occurrence { time: None, trace_id: "x".to_owned(), ..failure() };
    let batch = vec![failure(), failure(), failure(), wrong];
    let status = report(&mut client, batch).await.unwrap_err();
    assert_eq!((incident(&status).0.as_str(), status.code()), ("E4001", Code::InvalidArgument));
    let details = status.get_details_bad_request().unwrap();
    let fields: Vec<_> = details.field_violations.iter().map(|one| one.field.as_str()).collect();
    assert_eq!(fields, ["occurrences[3].trace_id", "occurrences[3].time"]);
    assert_eq!(list(&mut client, ListIncidentsRequest::default()).await, []);

    let ahead = Some(prost_types::Timestamp { seconds: 4_000_000_000, nanos: 0 });
    for (occurrences, code) in [
        (vec![], "E4002"),
        (vec![Occurrence { method: String::new(), ..failure() }], "E4002"),
        (vec![Occurrence { event_id: "1".to_owned(), ..failure() }], "E4001"),
        (vec![Occurrence { error_code: "E1".to_owned(), ..failure() }], "E4001"),
        (vec![Occurrence { time: ahead, ..failure() }], "E4001"),
        (vec![Occurrence { message: "m".repeat(2_001), ..failure() }], "E4001"),
        (vec![Occurrence { causes: vec![String::new(); 21], ..failure() }], "E4001"),
        (vec![failure(); 1_001], "E4001"),
        (vec![Occurrence::default(); 1_000], "E4002"),
    ] {
        let status = report(&mut client, occurrences).await.unwrap_err();
        assert_eq!(incident(&status).0, code, "{status:?}");
    }
}

#[tokio::test]
async fn a_report_with_a_key_belongs_to_the_owner_of_the_key() {
    for store in Store::both().await {
        let mesh = TestMesh::start_unrecorded_on(&store, &[]).await;
        let mut client = errors_of(&mesh, "tenant", &["errors:write", "errors:read"]).await;
        let mine = Occurrence { message: "a \0 byte".to_owned(), ..failure() };
        assert_eq!(report(&mut client, vec![mine.clone()]).await.unwrap(), 1);
        let found = get(&mut client, &mine.incident_id).await.unwrap();
        let kept = &found.occurrences[0];
        assert_eq!(kept.owner, "tenant");
        assert!(kept.actor.starts_with("key:key_") && kept.actor != mine.actor);
        assert_eq!(kept.message, "a  byte");
        let id = incident_id();
        assert_eq!(incident(&get(&mut client, &id).await.unwrap_err()).0, "E4010");
    }
}

#[tokio::test]
async fn an_incident_is_reported_and_found_over_json() {
    let mesh = TestMesh::start_unrecorded().await;
    let request = hapa_proto::auth::v1::CreateKeyRequest {
        scopes: vec!["errors:write".to_owned(), "errors:read".to_owned()],
        ..TestMesh::dev_key()
    };
    let key = mesh.create_key(request).await.key_text;
    let gateway = mesh.gateway(&[]).await;
    let (event_id, id) = (event_id(), incident_id());
    let occurrence = json!({
        "event_id": event_id, "incident_id": id, "time": "2026-01-01T00:00:00Z",
        "error_code": "E5006", "method": "/a.B/C", "message": "it can't be reached",
        "causes": ["refused"], "duration": "1.5s",
    });
    let report = json!({ "occurrences": [occurrence] });
    let path = "/api/v1/errors/occurrences";
    let reply = gateway.post(path, Some(&key), &report).await;
    let body = async |reply: reqwest::Response| {
        serde_json::from_str::<serde_json::Value>(&reply.text().await.unwrap()).unwrap()
    };
    assert_eq!(body(reply).await["accepted"], 1);
    let found = gateway.get(&format!("/api/v1/errors/incidents/{id}"), &key).await;
    let found = body(found).await;
    assert_eq!(found["incident"]["incident_id"], id);
    assert_eq!(found["occurrences"][0]["duration"], "1.500s");
    let shown = body(gateway.get("/api/v1/errors/dashboard", &key).await).await;
    assert_eq!((&shown["total_errors"], &shown["errors_last_24h"]), (&json!(1), &json!(0)));
    let codes = body(gateway.get("/api/v1/errors/codes", &key).await).await;
    assert_eq!(codes["codes"].as_array().unwrap().len(), 26);
    let mut live = gateway.get("/api/v1/errors/occurrences:watch?cursor=0", &key).await;
    let first = live.chunk().await.unwrap().unwrap();
    let first = String::from_utf8_lossy(&first).into_owned();
    assert!(first.starts_with("data: ") && first.contains(&event_id), "{first}");
}
