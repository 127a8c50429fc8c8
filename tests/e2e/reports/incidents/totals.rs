//! Totals: the dashboard, patterns with their trends, the rest after a purge, and the codes.

use std::time::Duration;

use hapa_proto::errors::v1::list_patterns_response::Pattern;
use hapa_proto::errors::v1::{
    GetDashboardRequest, GetDashboardResponse, ListErrorCodesRequest, ListIncidentsRequest,
    ListPatternsRequest, Occurrence,
};
use hapa_test_harness::{Identity, Store, TestMesh, incident, within};
use tokio::time::sleep;

use super::{ErrorTrackingServiceClient, Errors, ago, errors, failure, get, list, only, report};

const HOUR: Duration = Duration::from_hours(1);

async fn dashboard(client: &mut Errors) -> GetDashboardResponse {
    let shown = within("the dashboard", client.get_dashboard(GetDashboardRequest {})).await;
    shown.unwrap().into_inner()
}

async fn patterns(client: &mut Errors, period: &str) -> Vec<Pattern> {
    let request = ListPatternsRequest { period: period.to_owned() };
    let listed = within("patterns", client.list_patterns(request)).await;
    listed.unwrap().into_inner().patterns
}

/// `count` occurrences of one method, with the age `before`.
fn many(method: &str, count: usize, before: Duration) -> Vec<Occurrence> {
    let one = || Occurrence { method: method.to_owned(), time: ago(before), ..failure() };
    (0..count).map(|_| one()).collect()
}

#[tokio::test]
async fn the_dashboard_sums_up_what_is_kept() {
    for store in Store::both().await {
        let mesh = TestMesh::start_unrecorded_on(&store, &[]).await;
        let mut client = errors(&mesh);
        let empty = dashboard(&mut client).await;
        assert_eq!((empty.total_errors, empty.errors_last_24h), (0, 0));
        assert!(empty.error_rate.abs() < 1e-9);
        let timeout = |one| Occurrence { error_code: "E5001".to_owned(), ..one };
        report(&mut client, many("now", 3, Duration::ZERO)).await.unwrap();
        report(&mut client, many("old", 2, 30 * HOUR)).await.unwrap();
        let timeouts = many("now", 5, HOUR).into_iter().map(timeout).collect();
        report(&mut client, timeouts).await.unwrap();
        let shown = dashboard(&mut client).await;
        assert_eq!((shown.total_errors, shown.errors_last_24h), (10, 8));
        let codes: Vec<_> = shown
            .top_error_codes
            .iter()
            .map(|code| (code.code.as_str(), code.count, code.description.as_str()))
            .collect();
        assert_eq!(codes, [("E5001", 5, "AI model timeout"), ("E5006", 3, "AI model unreachable")]);
        let recent: Vec<_> =
            shown.recent_incidents.iter().map(|one| one.error_code.as_str()).collect();
        assert_eq!(recent, ["E5006", "E5001", "E5006"]);
        let first = &shown.recent_incidents[0];
        assert!(first.timestamp.is_some() && first.status == "open");
        assert!((0.0..=1.0).contains(&shown.error_rate));
    }
}

#[tokio::test]
async fn patterns_tell_what_rises_and_what_falls() {
    for store in Store::both().await {
        let mesh = TestMesh::start_unrecorded_on(&store, &[]).await;
        let mut client = errors(&mesh);
        let (now, then) = (2 * HOUR, 30 * HOUR);
        for (method, count, before) in
            [("rises", 9, 4), ("falls", 3, 9), ("stays", 5, 5), ("new", 2, 0), ("gone", 0, 7)]
        {
            report(&mut client, [many(method, count, now), many(method, before, then)].concat())
                .await
                .unwrap();
        }
        let mut bobs = many("rises", 1, now);
        "bob".clone_into(&mut bobs[0].owner);
        report(&mut client, bobs).await.unwrap();
        // A late report does not change the later owners, and an earlier owner is counted once.
        let mut late = many("rises", 2, then);
        "bob".clone_into(&mut late[0].owner);
        "eve".clone_into(&mut late[1].owner);
        report(&mut client, late).await.unwrap();
        let found = patterns(&mut client, "").await;
        let short: Vec<_> = found
            .iter()
            .map(|one| (one.method.as_str(), one.count, one.trend.as_str(), one.affected_users))
            .collect();
        let expected = [
            ("rises", 10, "rising", 2),
            ("stays", 5, "steady", 1),
            ("falls", 3, "falling", 1),
            ("new", 2, "new", 1),
        ];
        assert_eq!(short, expected);
        let first = &found[0];
        let made = get(&mut client, &first.incident_id).await.unwrap().incident.unwrap();
        assert_eq!((&made.fingerprint, &made.message), (&first.fingerprint, &first.message));
        assert_eq!((made.first_seen, made.last_seen), (first.first_seen, first.last_seen));

        report(&mut client, many("minutes", 1, HOUR / 2)).await.unwrap();
        report(&mut client, many("minutes", 1, HOUR + HOUR / 2)).await.unwrap();
        let hour = patterns(&mut client, "1h").await;
        let short: Vec<_> = hour.iter().map(|one| (one.method.as_str(), one.count)).collect();
        assert_eq!(short, [("minutes", 1)]);
        assert_eq!(hour[0].trend, "steady");
        let week = patterns(&mut client, "7d").await;
        assert_eq!((week[0].method.as_str(), week[0].count, week.len()), ("rises", 16, 6));
        assert_eq!(week[0].affected_users, 3);
        assert_eq!(patterns(&mut client, "30d").await.len(), 6);
        let request = ListPatternsRequest { period: "1y".to_owned() };
        let status = client.list_patterns(request).await.unwrap_err();
        assert_eq!(incident(&status).0, "E4001");
    }
}

#[tokio::test]
async fn what_is_old_is_removed_and_the_sums_agree() {
    for store in Store::both().await {
        let flags = ["--error-retention-days=1"];
        let old = many("old", 1_000, 30 * HOUR);
        let ancient = failure();
        let ancient = Occurrence { time: ago(100 * HOUR), method: "ancient".into(), ..ancient };
        {
            let mut mesh = TestMesh::start_unrecorded_on(&store, &flags).await;
            let mut client = errors(&mesh);
            // The first cleanup runs before any occurrence arrives.
            while dashboard(&mut client).await.last_cleanup.is_none() {
                sleep(Duration::from_millis(20)).await;
            }
            report(&mut client, old.clone()).await.unwrap();
            report(&mut client, many("old", 700, 30 * HOUR)).await.unwrap();
            report(&mut client, vec![ancient.clone()]).await.unwrap();
            report(&mut client, many("now", 3, Duration::ZERO)).await.unwrap();
            assert_eq!(dashboard(&mut client).await.total_errors, 1_704);
            mesh.begin_shutdown();
            mesh.wait_until_stopped().await;
        }
        let mesh = TestMesh::start_unrecorded_on(&store, &flags).await;
        let mut client = errors(&mesh);
        within("the purge", async {
            while dashboard(&mut client).await.total_errors != 3 {
                sleep(Duration::from_millis(20)).await;
            }
        })
        .await;
        assert!(dashboard(&mut client).await.last_cleanup.is_some());
        // The incident stays for as long as its counts do, without its occurrences.
        let status = get(&mut client, &old[5].incident_id).await.unwrap_err();
        assert_eq!(incident(&status).0, "E4010");
        let kept = get(&mut client, &old[0].incident_id).await.unwrap();
        assert_eq!((kept.incident.unwrap().count, kept.occurrences.len()), (1_700, 0));
        within("the end of the purge", async {
            while get(&mut client, &ancient.incident_id).await.is_ok() {
                sleep(Duration::from_millis(20)).await;
            }
        })
        .await;
        assert_eq!(list(&mut client, ListIncidentsRequest::default()).await.len(), 2);
    }
}

#[tokio::test]
async fn without_tracking_occurrences_are_stored_and_counted_only() {
    for store in Store::both().await {
        let shown = failure();
        {
            let mut mesh =
                TestMesh::start_unrecorded_on(&store, &["--incident-tracking-enabled=false"]).await;
            let mut client = errors(&mesh);
            report(&mut client, vec![shown.clone()]).await.unwrap();
            assert_eq!(list(&mut client, ListIncidentsRequest::default()).await, []);
            let status = get(&mut client, &shown.incident_id).await.unwrap_err();
            assert_eq!(incident(&status).0, "E4010");
            assert_eq!(dashboard(&mut client).await.errors_last_24h, 1);
            let found = patterns(&mut client, "1h").await;
            assert_eq!((found[0].count, found[0].incident_id.as_str()), (1, ""));
            mesh.begin_shutdown();
            mesh.wait_until_stopped().await;
        }
        let mesh = TestMesh::start_unrecorded_on(&store, &[]).await;
        let mut client = errors(&mesh);
        report(&mut client, vec![failure()]).await.unwrap();
        assert_eq!(only(&mut client).await.count, 2);
        let found = get(&mut client, &shown.incident_id).await.unwrap();
        assert_eq!(found.occurrences[0], shown);
    }
}

#[tokio::test]
async fn every_published_code_is_listed_for_anyone_with_a_credential() {
    let mesh = TestMesh::start_unrecorded().await;
    let mut client = ErrorTrackingServiceClient::new(mesh.channel_as(Identity::Key(&mesh.key)));
    let codes = client.list_error_codes(ListErrorCodesRequest {}).await.unwrap().into_inner().codes;
    assert_eq!(codes.len(), 26);
    let limited = codes.iter().find(|code| code.code == "E4004").unwrap();
    assert_eq!(
        (limited.reason.as_str(), limited.grpc_status.as_str(), limited.retry.as_str()),
        ("RATE_LIMITED", "RESOURCE_EXHAUSTED", "after_delay")
    );
    let bypassed = codes.iter().find(|code| code.code == "E5002").unwrap();
    assert_eq!((bypassed.grpc_status.as_str(), bypassed.retry.as_str()), ("", "no"));
    assert!(codes.iter().all(|code| !code.description.is_empty() && !code.advice.is_empty()));
}

#[tokio::test]
async fn owners_before_the_first_row_of_a_cause_come_from_the_hourly_rows() {
    for store in Store::both().await {
        let mesh = TestMesh::start_unrecorded_on(&store, &[]).await;
        report(&mut errors(&mesh), many("old", 1, 2 * HOUR)).await.unwrap();
        drop(mesh);
        // As the version before wrote it.
        store.execute("UPDATE error_owners SET last_time = 1").await;
        let hours = "INSERT INTO error_owners (fingerprint, start, owner, last_time)
                     SELECT o.fingerprint, p.last_seen - p.last_seen % 3600000000, o.owner, p.last_seen
                     FROM error_owners o JOIN error_patterns p ON p.fingerprint = o.fingerprint";
        store.execute(hours).await;
        store.execute("DROP INDEX error_owners_of_hours").await;
        store.execute("CREATE INDEX error_owners_oldest ON error_owners (last_time)").await;
        store.execute("DELETE FROM migrations_errors WHERE version = 3").await;
        let mesh = TestMesh::start_unrecorded_on(&store, &[]).await;
        let found = patterns(&mut errors(&mesh), "").await;
        assert_eq!((found.len(), found[0].affected_users), (1, 1));
    }
}
