//! Incidents: their states, pages and filters.

use std::time::Duration;

use hapa_proto::errors::v1::{Incident, ListIncidentsRequest, Occurrence, UpdateIncidentRequest};
use hapa_test_harness::{Store, TestMesh, incident, within};
use tonic::{Code, Status};

use super::{Errors, ago, errors, errors_of, failure, list, only, report};

async fn update(client: &mut Errors, change: UpdateIncidentRequest) -> Result<Incident, Status> {
    let changed = within("a change", client.update_incident(change)).await?;
    Ok(changed.into_inner().incident.unwrap())
}

fn to(id: &str, status: &str, version: &str) -> UpdateIncidentRequest {
    UpdateIncidentRequest {
        incident_id: id.to_owned(),
        status: status.to_owned(),
        version: version.to_owned(),
        ..UpdateIncidentRequest::default()
    }
}

#[tokio::test]
async fn an_incident_is_acknowledged_resolved_and_reopened_by_what_comes_later() {
    for store in Store::both().await {
        let mesh = TestMesh::start_unrecorded_on(&store, &[]).await;
        let mut client = errors(&mesh);
        let (first, second) = (failure(), failure());
        report(&mut client, vec![first.clone(), second.clone()]).await.unwrap();
        let mut admin = errors_of(&mesh, "ops", &["errors:admin"]).await;
        let note = UpdateIncidentRequest {
            note: "looking".to_owned(),
            expected_status: "open".to_owned(),
            ..to(&second.incident_id, "acknowledged", "")
        };
        let changed = update(&mut admin, note.clone()).await.unwrap();
        assert_eq!((changed.incident_id.as_str(), changed.count), (first.incident_id.as_str(), 2));
        assert_eq!((changed.status.as_str(), changed.note.as_str()), ("acknowledged", "looking"));
        assert!(changed.status_actor.starts_with("key:key_") && changed.status_time.is_some());
        // A caller that still has the open state is too late.
        let status = update(&mut admin, note).await.unwrap_err();
        assert_eq!((incident(&status).0.as_str(), status.code()), ("E4009", Code::Aborted));
        report(&mut client, vec![failure()]).await.unwrap();
        assert_eq!(only(&mut client).await.status, "acknowledged");

        update(&mut admin, to(&first.incident_id, "resolved", "")).await.unwrap();
        // It happened before, and arrives late.
        let late = Occurrence { time: ago(Duration::from_mins(1)), ..failure() };
        report(&mut client, vec![late]).await.unwrap();
        assert_eq!(only(&mut client).await.status, "resolved");
        report(&mut client, vec![failure()]).await.unwrap();
        let back = only(&mut client).await;
        assert_eq!((back.status.as_str(), back.reopened, back.count), ("open", true, 5));
        let resolved = update(&mut admin, to(&first.incident_id, "resolved", "")).await.unwrap();
        assert!(!resolved.reopened);
    }
}

#[tokio::test]
async fn replicas_older_than_the_repair_do_not_reopen_it() {
    for store in Store::both().await {
        let mesh = TestMesh::start_unrecorded_on(&store, &[]).await;
        let mut client = errors(&mesh);
        let of = |version: &str| Occurrence { version: version.to_owned(), ..failure() };
        let first = of("1.9.0");
        report(&mut client, vec![first.clone()]).await.unwrap();
        let resolved = update(&mut client, to(&first.incident_id, "resolved", "1.10.0")).await;
        let resolved = resolved.unwrap();
        assert_eq!(resolved.resolved_in_version, "1.10.0");
        assert_eq!(resolved.status_actor, "mesh");
        report(&mut client, vec![of("1.9.0"), of("1.9.12"), of("")]).await.unwrap();
        let same = only(&mut client).await;
        assert_eq!((same.status.as_str(), same.count), ("resolved", 4));
        assert_eq!(same.last_seen_version, "1.9.12");
        report(&mut client, vec![of("1.10.0")]).await.unwrap();
        let back = only(&mut client).await;
        assert_eq!((back.status.as_str(), back.reopened), ("open", true));
        assert_eq!(back.last_seen_version, "1.10.0");
    }
}

#[tokio::test]
async fn a_change_that_makes_no_sense_is_refused() {
    let mesh = TestMesh::start_unrecorded().await;
    let mut client = errors(&mesh);
    let known = failure();
    report(&mut client, vec![known.clone()]).await.unwrap();
    let id = known.incident_id.as_str();
    for (change, code) in [
        (to("", "", ""), "E4002"),
        (to(id, "closed", ""), "E4001"),
        (to(id, "open", "1.2.3"), "E4001"),
        (to(id, "resolved", &"1".repeat(51)), "E4001"),
        (to("INC-20260101-00000000", "open", ""), "E4010"),
        (UpdateIncidentRequest { expected_status: "x".into(), ..to(id, "open", "") }, "E4001"),
        (UpdateIncidentRequest { note: "n".repeat(1_001), ..to(id, "open", "") }, "E4001"),
    ] {
        assert_eq!(incident(&update(&mut client, change).await.unwrap_err()).0, code);
    }
    assert_eq!(only(&mut client).await.status, "open");
}

/// The methods of all incidents, three a page.
async fn by_pages(client: &mut Errors) -> String {
    let (mut seen, mut page_token) = (String::new(), String::new());
    loop {
        let request =
            ListIncidentsRequest { page_size: 3, page_token, ..ListIncidentsRequest::default() };
        let page = client.list_incidents(request).await.unwrap().into_inner();
        assert!(page.incidents.len() <= 3);
        seen.extend(page.incidents.into_iter().map(|incident| incident.method));
        page_token = page.next_page_token;
        if page_token.is_empty() {
            return seen;
        }
    }
}

#[tokio::test]
async fn incidents_are_listed_by_pages_and_filters_the_last_seen_first() {
    for store in Store::both().await {
        let mesh = TestMesh::start_unrecorded_on(&store, &[]).await;
        let mut client = errors(&mesh);
        let letter = |number: u8| char::from(b'a' + number).to_string();
        let of = |number: u8| Occurrence {
            method: letter(number),
            time: ago(Duration::from_mins(u64::from(number))),
            error_code: if number.is_multiple_of(2) { "E5006" } else { "E5001" }.to_owned(),
            ..failure()
        };
        let all: Vec<_> = (0..7).map(of).collect();
        report(&mut client, all.clone()).await.unwrap();
        assert_eq!(by_pages(&mut client).await, "abcdefg");
        update(&mut client, to(&all[3].incident_id, "resolved", "")).await.unwrap();
        let mut filtered = async |request| {
            let found = list(&mut client, request).await;
            found.into_iter().map(|incident| incident.method).collect::<String>()
        };
        let all = ListIncidentsRequest::default;
        assert_eq!(
            filtered(ListIncidentsRequest { status: "resolved".into(), ..all() }).await,
            "d"
        );
        let code = ListIncidentsRequest { error_code: "E5001".into(), ..all() };
        assert_eq!(filtered(code).await, "bdf");
        let recent = ListIncidentsRequest { seen_after: ago(Duration::from_secs(150)), ..all() };
        assert_eq!(filtered(recent).await, "abc");
        for wrong in [
            ListIncidentsRequest { page_size: 1_001, ..all() },
            ListIncidentsRequest { page_token: "?".into(), ..all() },
            ListIncidentsRequest { status: "new".into(), ..all() },
            ListIncidentsRequest { error_code: "\0".into(), ..all() },
        ] {
            let status = client.list_incidents(wrong).await.unwrap_err();
            assert_eq!(incident(&status).0, "E4001");
        }
    }
}
