//! Usage reports: each event counts once, at its own time, for its owner.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use hapa_proto::analytics::v1::analytics_service_client::AnalyticsServiceClient;
use hapa_proto::analytics::v1::get_performance_response::Group;
use hapa_proto::analytics::v1::get_usage_response::Row;
use hapa_proto::analytics::v1::{
    GetPerformanceRequest, GetPerformanceResponse, GetUsageRequest, GetUsageResponse,
    RecordEventsRequest, UsageEvent, WatchPerformanceRequest,
};
use hapa_proto::auth::v1::{CreateKeyRequest, RevokeKeyRequest};
use hapa_test_harness::{Identity, Store, TestChannel, TestMesh, incident, within};
use prost_types::Timestamp;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep};
use tonic::{Code, Status};
use tonic_types::StatusExt as _;
use uuid::Uuid;

const MINUTE: i64 = 60;
pub(super) const HOUR: i64 = 60 * MINUTE;
const DAY: i64 = 24 * HOUR;

pub(super) type Analytics = AnalyticsServiceClient<TestChannel>;

pub(super) fn analytics(mesh: &TestMesh, identity: Identity<'_>) -> Analytics {
    AnalyticsServiceClient::new(mesh.channel_as(identity))
}

fn now() -> i64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs().try_into().unwrap()
}

fn at(seconds: i64) -> Timestamp {
    Timestamp { seconds, nanos: 0 }
}

/// A call that took a second and 3 tokens, so many seconds ago.
pub(super) fn event(ago: i64) -> UsageEvent {
    UsageEvent {
        event_id: Uuid::now_v7().to_string(),
        time: Some(at(now() - ago)),
        method: "/hapa.codegen.v1.CodegenService/GenerateCode".to_owned(),
        grpc_status: "OK".to_owned(),
        owner: "ann".to_owned(),
        key_id: "key_ann".to_owned(),
        model: "m".to_owned(),
        prompt_tokens: 2,
        completion_tokens: 1,
        duration_us: 1_000_000,
        service: "codegen".to_owned(),
        ..UsageEvent::default()
    }
}

pub(super) async fn record(mesh: &TestMesh, events: Vec<UsageEvent>) -> Result<u32, Status> {
    let mut client = analytics(mesh, Identity::Mesh);
    let reply = within("a batch", client.record_events(RecordEventsRequest { events })).await?;
    Ok(reply.into_inner().accepted)
}

/// Of the window that began so many seconds ago.
pub(super) async fn performance(mesh: &TestMesh, ago: i64) -> GetPerformanceResponse {
    ask(mesh, GetPerformanceRequest { start_time: Some(at(now() - ago)), ..Default::default() })
        .await
}

async fn ask(mesh: &TestMesh, request: GetPerformanceRequest) -> GetPerformanceResponse {
    let mut client = analytics(mesh, Identity::Mesh);
    within("a report", client.get_performance(request)).await.unwrap().into_inner()
}

/// Requests and tokens.
fn texts(row: &Row) -> [String; 2] {
    [row.requests, row.total_tokens].map(|number| number.to_string())
}

pub(super) async fn usage(client: &mut Analytics, request: GetUsageRequest) -> GetUsageResponse {
    within("usage", client.get_usage(request)).await.unwrap().into_inner()
}

#[tokio::test]
async fn an_event_counts_once_however_often_it_comes() {
    for store in Store::both().await {
        let mesh = TestMesh::start_unrecorded_on(&store, &[]).await;
        let (one, other) = (event(0), event(5));
        let batch = vec![one.clone(), other.clone(), one.clone()];
        assert_eq!(record(&mesh, batch.clone()).await.unwrap(), 2);
        assert_eq!(record(&mesh, batch).await.unwrap(), 0);
        let loud = UsageEvent { event_id: one.event_id.to_uppercase(), ..event(0) };
        assert_eq!(record(&mesh, vec![loud, event(9)]).await.unwrap(), 1);
        let report = performance(&mesh, HOUR).await;
        assert_eq!((report.requests, report.note.as_str()), (3, ""));
        assert!((report.ai_model_usage.unwrap().total_tokens - 9.0).abs() < 1e-9);
    }
}

#[tokio::test]
async fn a_batch_with_a_wrong_event_is_not_taken_at_all() {
    for store in Store::both().await {
        let mesh = TestMesh::start_unrecorded_on(&store, &[]).await;
        let wrong = UsageEvent { time: None, ..event(0) };
        let batch = vec![event(0), event(0), event(0), wrong];
        let status = record(&mesh, batch).await.unwrap_err();
        assert_eq!(status.code(), Code::InvalidArgument);
        assert_eq!(incident(&status).0, "E4001");
        let fields = status.get_details_bad_request().unwrap().field_violations;
        let fields: Vec<_> = fields.iter().map(|wrong| wrong.field.as_str()).collect();
        assert_eq!(fields, ["events[3].time"]);
        assert_eq!(incident(&record(&mesh, Vec::new()).await.unwrap_err()).0, "E4001");
        let report = performance(&mesh, HOUR).await;
        assert_eq!((report.requests, report.note.is_empty()), (0, false));
        assert_eq!(report.response_time.unwrap().count, 0);
        assert_eq!((report.models, report.methods), (Vec::new(), Vec::new()));
    }
}

#[tokio::test]
async fn late_events_count_at_their_own_time_in_every_window() {
    for store in Store::both().await {
        let mesh = TestMesh::start_unrecorded_on(&store, &[]).await;
        let ages = [0, 90 * MINUTE, 26 * HOUR, 6 * DAY, 20 * DAY, 40 * DAY];
        let events = ages.iter().map(|age| event(*age)).collect();
        assert_eq!(record(&mesh, events).await.unwrap(), 5, "one is older than what is kept");
        let windows = [(HOUR, MINUTE, 1), (2 * HOUR, MINUTE, 2), (2 * DAY, HOUR, 3)];
        let longer = [(7 * DAY, HOUR, 4), (30 * DAY, DAY, 5)];
        for (length, span, expected) in windows.into_iter().chain(longer) {
            let (before, report) = (now(), performance(&mesh, length).await);
            assert_eq!(report.requests, expected, "{length}");
            let (start, end) = (report.start_time.unwrap(), report.end_time.unwrap());
            assert_eq!((start.seconds % span, start.nanos), (0, 0));
            assert!((0..=span).contains(&(before - length - start.seconds)));
            assert!((before..=now()).contains(&end.seconds), "until now, not until later");
            let nanos = f64::from(end.nanos) / 1e9;
            let seconds = i32::try_from(end.seconds - start.seconds).unwrap();
            let minutes = (f64::from(seconds) + nanos) / 60.0;
            let rate = f64::from(expected) / minutes;
            assert!((report.requests_per_minute - rate).abs() < rate * 1e-6);
        }
        // A short window of long ago: its minutes are gone, its hour is not.
        let middle = now() - 6 * DAY;
        let (start_time, end_time) = (Some(at(middle - MINUTE)), Some(at(middle + MINUTE)));
        let request = GetPerformanceRequest { start_time, end_time, ..Default::default() };
        let report = ask(&mesh, request).await;
        assert_eq!(report.requests, 1);
        assert_eq!(report.end_time.unwrap().seconds % HOUR, 0);
    }
}

#[tokio::test]
async fn a_report_has_rates_percentiles_and_groups() {
    for store in Store::both().await {
        let mesh = TestMesh::start_unrecorded_on(&store, &[]).await;
        let events = (1..=200i64).map(|number| UsageEvent {
            error_code: if number % 4 == 0 { "E5001".to_owned() } else { String::new() },
            model: ["m", "n", ""][usize::try_from(number % 3).unwrap()].to_owned(),
            method: format!("/a.B/{}", if number <= 150 { "Often" } else { "Seldom" }),
            duration_us: number * 10_000,
            time_to_first_token_us: (number % 2 == 0).then_some(number * 1_000),
            inter_token_us: (number % 2 == 0).then_some(5_000),
            cacheable: number % 2 == 0,
            cached: number % 8 == 0,
            ..event(0)
        });
        assert_eq!(record(&mesh, events.collect()).await.unwrap(), 200);
        let report = performance(&mesh, HOUR).await;
        let near = |value: f64, expected: f64| (value - expected).abs() <= 0.01 * expected;
        assert_eq!(report.requests, 200);
        assert!(near(report.avg_response_time, 1.005) && near(report.error_rate, 0.25));
        assert!(near(report.cache_hit_rate, 0.25));
        assert!(near(report.ai_model_usage.unwrap().avg_tokens_per_request, 3.0));
        let times = report.response_time.unwrap();
        assert!(near(times.p50, 1.0) && near(times.p95, 1.9) && near(times.p99, 1.98));
        let first = report.time_to_first_token.unwrap();
        assert_eq!(first.count, 100);
        assert!(near(first.p50, 0.1) && near(report.inter_token_time.unwrap().p99, 0.005));
        let named = |groups: &[Group]| {
            groups.iter().map(|group| (group.name.clone(), group.requests)).collect::<Vec<_>>()
        };
        let group = |name: &str, requests| (name.to_owned(), requests);
        assert_eq!(named(&report.methods), [group("/a.B/Often", 150), group("/a.B/Seldom", 50)]);
        assert_eq!(named(&report.models), [group("n", 67), group("m", 66)]);
        for method in ["/a.B/Seldom", "Seldom"] {
            let method = method.to_owned();
            let report = ask(&mesh, GetPerformanceRequest { method, ..Default::default() }).await;
            assert_eq!(report.requests, 50);
        }
        let (method, model) = ("eldom".to_owned(), "n".to_owned());
        let part = GetPerformanceRequest { method, ..Default::default() };
        assert_eq!(ask(&mesh, part).await.requests, 0);
        let one = GetPerformanceRequest { model, ..Default::default() };
        assert_eq!(ask(&mesh, one).await.requests, 67);
        let backwards = GetPerformanceRequest {
            start_time: Some(at(now())),
            end_time: Some(at(now() - 1)),
            ..Default::default()
        };
        let status = analytics(&mesh, Identity::Mesh).get_performance(backwards).await.unwrap_err();
        assert_eq!(incident(&status).0, "E4001");
    }
}

#[tokio::test]
async fn usage_is_grouped_sorted_and_returned_by_pages_with_one_total() {
    for store in Store::both().await {
        let mesh = TestMesh::start_unrecorded_on(&store, &[]).await;
        let events = (0..60u32).map(|number| UsageEvent {
            owner: format!("owner{}", number % 5),
            key_id: format!("key{}", number % 10),
            prompt_tokens: number,
            ..event(i64::from(number % 3) * DAY)
        });
        record(&mesh, events.collect()).await.unwrap();
        let mut client = analytics(&mesh, Identity::Mesh);
        let by = |group_by: &str| GetUsageRequest {
            group_by: group_by.to_owned(),
            page_size: 3,
            ..GetUsageRequest::default()
        };
        for (group_by, groups) in [("", 5), ("key", 10), ("day,key", 30), ("model", 1)] {
            let (mut request, mut rows) = (by(group_by), Vec::new());
            loop {
                let reply = usage(&mut client, request.clone()).await;
                let total = reply.total.unwrap();
                assert_eq!(texts(&total), ["60", "1830"]);
                assert!(reply.rows.len() <= 3);
                rows.extend(reply.rows);
                if reply.next_page_token.is_empty() {
                    break;
                }
                request.page_token = reply.next_page_token;
            }
            assert_eq!(rows.len(), groups, "{group_by}");
            let sum: f64 = rows.iter().map(|row| row.total_tokens).sum();
            assert_eq!(sum.to_string(), "1830");
            let ordered = |one: &_, other: &_| {
                let key = |row: &Row| (row.day.clone(), -row.total_tokens);
                key(one) <= key(other)
            };
            assert!(rows.is_sorted_by(ordered), "{group_by}");
            assert_eq!(rows[0].owner.is_empty(), !group_by.is_empty());
        }
        let one = GetUsageRequest { key_id: "key3".to_owned(), ..by("key,owner") };
        let reply = usage(&mut client, one).await;
        assert_eq!((reply.rows.len(), reply.rows[0].owner.as_str()), (1, "owner3"));
        let page = GetUsageRequest { page_token: "made up".to_owned(), ..by("key") };
        for wrong in [by("keys"), page, GetUsageRequest { page_size: -1, ..by("") }] {
            let status = client.get_usage(wrong).await.unwrap_err();
            assert_eq!(incident(&status).0, "E4001");
        }
    }
}

#[tokio::test]
async fn a_caller_without_admin_scope_sees_only_its_own_usage() {
    for store in Store::both().await {
        let mesh = TestMesh::start_unrecorded_on(&store, &[]).await;
        let of = |owner: &str| UsageEvent {
            owner: owner.to_owned(),
            key_id: format!("key_{owner}"),
            ..event(0)
        };
        record(&mesh, vec![of("ann"), of("bob"), of("bob"), of("")]).await.unwrap();
        let key = async |scopes: &[&str]| {
            let scopes = scopes.iter().map(|&scope| scope.to_owned()).collect();
            let request =
                CreateKeyRequest { owner: "ann".to_owned(), scopes, ..TestMesh::dev_key() };
            mesh.create_key(request).await.key_text
        };
        let (own, all) =
            (key(&["analytics:read"]).await, key(&["analytics:read", "auth:admin"]).await);
        let ask = |owner: &str, key_id: &str| GetUsageRequest {
            owner: owner.to_owned(),
            key_id: key_id.to_owned(),
            ..GetUsageRequest::default()
        };
        let seen = async |text: &str, request: GetUsageRequest| {
            let reply = usage(&mut analytics(&mesh, Identity::Key(text)), request).await;
            (reply.rows.len(), texts(&reply.total.unwrap())[0].clone())
        };
        assert_eq!(seen(&own, ask("", "")).await, (1, "1".to_owned()));
        assert_eq!(seen(&own, ask("ann", "key_ann")).await, (1, "1".to_owned()));
        for (owner, key_id) in [("bob", ""), ("", "key_bob"), ("ann", "key_bob"), ("nobody", "")] {
            assert_eq!(
                seen(&own, ask(owner, key_id)).await,
                (0, "0".to_owned()),
                "{owner} {key_id}"
            );
        }
        assert_eq!(seen(&all, ask("", "")).await, (3, "4".to_owned()));
        assert_eq!(seen(&all, ask("bob", "key_bob")).await, (1, "2".to_owned()));
    }
}

#[tokio::test]
async fn a_watcher_receives_a_report_every_second_until_the_end() {
    for store in Store::both().await {
        let mut mesh = TestMesh::start_unrecorded_on(&store, &[]).await;
        let scopes = vec!["analytics:read".to_owned()];
        let made = mesh.create_key(CreateKeyRequest { scopes, ..TestMesh::dev_key() }).await;
        let watch = async |identity: Identity<'_>| {
            let method = "GenerateCode".to_owned();
            let request = WatchPerformanceRequest { method, ..Default::default() };
            analytics(&mesh, identity).watch_performance(request).await.unwrap().into_inner()
        };
        let (mut reports, mut revoked) =
            (watch(Identity::Mesh).await, watch(Identity::Key(&made.key_text)).await);
        let first = within("a report", reports.message()).await.unwrap().unwrap();
        assert_eq!(first.performance.unwrap().requests, 0);
        assert!(within("a report", revoked.message()).await.unwrap().is_some());
        record(&mesh, vec![event(0), event(30), event(70)]).await.unwrap();
        let begin = Instant::now();
        for _ in 0..2 {
            let report = within("a report", reports.message()).await.unwrap().unwrap();
            let report = report.performance.unwrap();
            assert_eq!((report.requests, report.models.len()), (2, 1));
        }
        assert!(begin.elapsed() >= Duration::from_millis(900), "one a second");
        let key_id = made.key.unwrap().key_id;
        mesh.keys().revoke_key(RevokeKeyRequest { key_id }).await.unwrap();
        let end = async |reports: &mut tonic::Streaming<_>| loop {
            if let Err(status) = within("the end", reports.message()).await {
                return incident(&status).0;
            }
        };
        assert_eq!(end(&mut revoked).await, "E4007");
        mesh.begin_shutdown();
        assert_eq!(end(&mut reports).await, "E5008");
        mesh.wait_until_stopped().await;
    }
}

#[tokio::test]
async fn concurrent_writers_of_equal_events_lose_and_duplicate_nothing() {
    for store in Store::both().await {
        let (mesh, beside) = (
            TestMesh::start_unrecorded_on(&store, &[]).await,
            match &store {
                Store::Sqlite(_) => None,
                Store::Postgres(_) => Some(TestMesh::start_unrecorded_on(&store, &[]).await),
            },
        );
        let events: Vec<_> = (0..600i64)
            .map(|number| UsageEvent {
                model: format!("m{}", number % 7),
                method: format!("/a.B/{}", number % 3),
                owner: format!("owner{}", number % 11),
                duration_us: number * 1_000,
                ..event(number % 90)
            })
            .collect();
        let mut writers = JoinSet::new();
        for writer in 0..8usize {
            let replica = beside.as_ref().filter(|_| writer % 2 == 0).unwrap_or(&mesh);
            let mut client = analytics(replica, Identity::Mesh);
            // Each sends three quarters, from another place on and in another order.
            let mut events: Vec<_> =
                events.iter().cycle().skip(writer * 75).take(450).cloned().collect();
            if writer % 2 == 0 {
                events.reverse();
            }
            writers.spawn(async move {
                let mut accepted = 0;
                for batch in events.chunks(90) {
                    let request = RecordEventsRequest { events: batch.to_vec() };
                    accepted += client.record_events(request).await.unwrap().into_inner().accepted;
                }
                accepted
            });
        }
        let accepted: u32 = within("writers", writers.join_all()).await.into_iter().sum();
        assert_eq!(accepted, 600);
        for length in [HOUR, DAY, 30 * DAY] {
            let report = performance(&mesh, length).await;
            assert_eq!(report.requests, 600);
            assert_eq!(report.response_time.unwrap().count, 600, "the sketches too");
            assert!((report.avg_response_time - 0.2995).abs() < 1e-9);
        }
        let reply = usage(&mut analytics(&mesh, Identity::Mesh), GetUsageRequest::default()).await;
        let total = reply.total.unwrap();
        assert_eq!(texts(&total), ["600", "1800"]);
        assert_eq!(reply.rows.len(), 11);
    }
}

#[tokio::test]
async fn a_purge_takes_events_and_leaves_what_was_summed_up() {
    for store in Store::both().await {
        let folder = tempfile::tempdir().unwrap();
        let keep = format!("--data-dir={}", folder.path().display());
        let mut mesh = TestMesh::start_unrecorded_on(&store, &[&keep]).await;
        let (old, new) = (event(20 * DAY), event(0));
        record(&mesh, vec![old.clone(), new.clone()]).await.unwrap();
        assert!(store.holds(&old.event_id).await);
        mesh.begin_shutdown();
        mesh.wait_until_stopped().await;
        let mesh =
            TestMesh::start_unrecorded_on(&store, &[&keep, "--event-retention-days=10"]).await;
        if matches!(store, Store::Postgres(_)) {
            within("the purge", async {
                while store.holds(&old.event_id).await {
                    sleep(Duration::from_millis(20)).await;
                }
            })
            .await;
            assert!(store.holds(&new.event_id).await);
        }
        assert_eq!(performance(&mesh, 30 * DAY).await.requests, 2);
        let reply = usage(&mut analytics(&mesh, Identity::Mesh), GetUsageRequest::default()).await;
        assert_eq!(texts(&reply.total.unwrap()), ["2", "6"]);
        assert_eq!(record(&mesh, vec![old, new]).await.unwrap(), 0);
    }
}

#[tokio::test]
async fn reports_go_through_the_gateway_and_events_do_not() {
    let mesh = TestMesh::start_unrecorded().await;
    let gateway = mesh.gateway(&[]).await;
    let scopes = vec!["analytics:read".to_owned()];
    let request = CreateKeyRequest { owner: "ann".to_owned(), scopes, ..TestMesh::dev_key() };
    let key = mesh.create_key(request).await.key_text;
    record(&mesh, vec![event(0)]).await.unwrap();
    for (path, expected) in [
        ("performance?method=GenerateCode", "\"requests\":1,"),
        ("usage?group_by=day,key", "\"key_id\":\"key_ann\""),
    ] {
        let reply = gateway.get(&format!("/api/v1/analytics/{path}"), &key).await;
        let text = within(path, reply.text()).await.unwrap();
        assert!(text.contains(expected), "{text}");
    }
    let mut watched = gateway.get("/api/v1/analytics/performance:watch", &key).await;
    let first = within("a report", watched.chunk()).await.unwrap().unwrap();
    assert!(first.starts_with(b"data: {\"performance\":{"), "{first:?}");
    let door = tonic::transport::Endpoint::from_shared(gateway.url.clone()).unwrap();
    let mut outside = AnalyticsServiceClient::new(Identity::Mesh.on(door.connect_lazy()));
    let events = vec![event(0)];
    let refused = within("a refusal", outside.record_events(RecordEventsRequest { events })).await;
    assert_eq!(refused.unwrap_err().code(), Code::Unimplemented);
    assert_eq!(performance(&mesh, HOUR).await.requests, 1);
}
