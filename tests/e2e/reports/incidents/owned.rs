//! Visibility of failures: with errors:read a caller's own, with its own counts and without causes; with
//! errors:admin those of the whole mesh.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use hapa_proto::codegen::v1::codegen_service_client::CodegenServiceClient;
use hapa_proto::errors::v1::list_patterns_response::Pattern;
use hapa_proto::errors::v1::{
    GetDashboardRequest, GetDashboardResponse, Incident, ListIncidentsRequest, ListPatternsRequest,
    Occurrence, UpdateIncidentRequest, WatchOccurrencesRequest, WatchOccurrencesResponse,
};
use hapa_test_harness::{Identity, Store, TestMesh, incident, within};
use tokio::time::sleep;

use super::{
    ErrorTrackingServiceClient, Errors, ago, errors, errors_of, failure, get, list, report, unseen,
};
use crate::api::generate::question;

const HOUR: Duration = Duration::from_hours(1);

/// Texts of other owners, which no reply may contain.
const FOREIGN: [&str; 6] =
    ["bob", "key_of_bob", "secret-of-bob", "bobs words", "request-of-bob", "note for operators"];

fn of_ann() -> Occurrence {
    Occurrence { actor: "key:key_of_ann".to_owned(), ..failure() }
}

/// The same cause with another text.
fn of_bob() -> Occurrence {
    Occurrence {
        owner: "bob".to_owned(),
        actor: "key:key_of_bob".to_owned(),
        message: "bobs words".to_owned(),
        request_id: "request-of-bob".to_owned(),
        version: "9.9.9".to_owned(),
        ..failure()
    }
}

async fn dashboard(client: &mut Errors) -> GetDashboardResponse {
    let shown = within("the dashboard", client.get_dashboard(GetDashboardRequest {})).await;
    shown.unwrap().into_inner()
}

async fn patterns(client: &mut Errors, period: &str) -> Vec<Pattern> {
    let request = ListPatternsRequest { period: period.to_owned() };
    within("patterns", client.list_patterns(request)).await.unwrap().into_inner().patterns
}

/// All events from the beginning on, until no more arrive.
async fn watched(client: &mut Errors) -> Vec<WatchOccurrencesResponse> {
    let request = WatchOccurrencesRequest { cursor: "0".to_owned(), ..Default::default() };
    let mut live =
        within("a stream", client.watch_occurrences(request)).await.unwrap().into_inner();
    let mut told = Vec::new();
    loop {
        let message = within("a message", live.message()).await.unwrap().unwrap();
        if message.occurrences.is_empty() && message.skipped == 0 {
            return told;
        }
        told.push(message);
    }
}

#[tokio::test]
async fn a_reader_of_errors_sees_its_own_and_nothing_of_another_owner() {
    for store in Store::both().await {
        let mesh = TestMesh::start_unrecorded_on(&store, &[]).await;
        let mut service = errors(&mesh);
        let (bobs, anns) = (of_bob(), of_ann());
        let only_bobs = Occurrence {
            error_code: "E5001".to_owned(),
            causes: vec!["secret-of-bob".to_owned()],
            time: ago(2 * HOUR),
            ..of_bob()
        };
        let nobodys = Occurrence { owner: String::new(), ..failure() };
        // Bob had the cause first: its incident has the id that he received.
        report(&mut service, vec![bobs.clone(), of_bob(), only_bobs.clone(), nobodys.clone()])
            .await
            .unwrap();
        let quiet = Occurrence { recovered: true, ..unseen() };
        let unsampled: Vec<_> = (0..60).map(|_| unseen()).collect();
        report(&mut service, vec![anns.clone(), quiet]).await.unwrap();
        report(&mut service, unsampled).await.unwrap();
        let change = UpdateIncidentRequest {
            incident_id: bobs.incident_id.clone(),
            status: "acknowledged".to_owned(),
            note: "note for operators".to_owned(),
            ..UpdateIncidentRequest::default()
        };
        service.update_incident(change.clone()).await.unwrap();

        let mut ann = errors_of(&mesh, "ann", &["errors:read"]).await;
        let listed = list(&mut ann, ListIncidentsRequest::default()).await;
        let [own] = &listed[..] else { panic!("{listed:?}") };
        assert_is_her_own(own, &anns);
        // By the id that she received, and by the incident's own id; not by the id that he received.
        let found = get(&mut ann, &anns.incident_id).await.unwrap();
        assert_eq!(found.incident.as_ref(), Some(own));
        let as_seen = Occurrence { causes: Vec::new(), ..anns.clone() };
        assert_eq!((found.occurrences.len(), &found.occurrences[0]), (20, &as_seen));
        assert!(get(&mut ann, &own.incident_id).await.is_ok());
        let second = of_bob();
        report(&mut service, vec![second.clone()]).await.unwrap();
        assert_not_found(&mut ann, [&second, &only_bobs, &nobodys]).await;
        let ranked = assert_sums_are_her_own(&mut ann).await;
        let live = assert_watches_her_own(&mut ann).await;
        let all =
            format!("{listed:?} {found:?} {:?} {ranked:?} {live:?}", dashboard(&mut ann).await);
        let more = ["connection refused", &*second.incident_id, "9.9.9"];
        for word in FOREIGN.into_iter().chain(more) {
            assert!(!all.contains(word), "{word} is seen: {all}");
        }
        let status = ann.update_incident(change).await.unwrap_err();
        assert_eq!(incident(&status).0, "E4005");
        assert_admin_sees_all(&mesh, &only_bobs).await;
    }
}

fn assert_is_her_own(own: &Incident, anns: &Occurrence) {
    assert_eq!((own.count, own.recovered_count, own.affected_users), (62, 1, 1));
    assert_eq!((own.status.as_str(), own.last_seen_version.as_str()), ("acknowledged", "1.2.0"));
    assert_eq!((own.first_seen, own.message.as_str()), (anns.time, anns.message.as_str()));
    assert_eq!((own.note.as_str(), own.status_actor.as_str()), ("", ""));
}

async fn assert_not_found(client: &mut Errors, others: [&Occurrence; 3]) {
    for id in others.map(|other| &other.incident_id) {
        let status = get(client, id).await.unwrap_err();
        assert_eq!(incident(&status).0, "E4010");
        assert!(!status.message().contains(id.as_str()), "{status:?}");
    }
}

async fn assert_watches_her_own(ann: &mut Errors) -> Vec<WatchOccurrencesResponse> {
    let by_code = ListIncidentsRequest { error_code: "E5001".into(), ..Default::default() };
    assert_eq!(list(ann, by_code).await, []);
    let live = watched(ann).await;
    let told: Vec<_> = live.iter().flat_map(|message| &message.occurrences).collect();
    assert_eq!(told.len(), 62);
    assert!(told.iter().all(|one| one.owner == "ann" && one.causes.is_empty()));
    live
}

async fn assert_sums_are_her_own(ann: &mut Errors) -> Vec<Pattern> {
    let told = dashboard(ann).await;
    assert_eq!((told.total_errors, told.errors_last_24h), (62, 62));
    assert_eq!((told.top_error_codes.len(), told.top_error_codes[0].count), (1, 62));
    assert_eq!((told.recent_incidents.len(), told.recent_incidents[0].count), (1, 62));
    assert_eq!(told.error_rate.to_bits(), 0, "her calls are not known here");
    let ranked = patterns(ann, "1h").await;
    assert_eq!((ranked.len(), ranked[0].count, ranked[0].affected_users), (1, 62, 1));
    ranked
}

async fn assert_admin_sees_all(mesh: &TestMesh, only_bobs: &Occurrence) {
    for scopes in [&["errors:admin"][..], &["errors:read", "errors:admin"]] {
        let mut admin = errors_of(mesh, "ops", scopes).await;
        let all = list(&mut admin, ListIncidentsRequest::default()).await;
        assert_eq!(all.len(), 2);
        assert_eq!(
            (all[0].count, all[0].affected_users, all[0].note.as_str()),
            (66, 2, "note for operators")
        );
        let found = get(&mut admin, &only_bobs.incident_id).await.unwrap();
        assert_eq!(found.occurrences[0].causes, only_bobs.causes);
        assert_eq!(dashboard(&mut admin).await.total_errors, 67);
        assert_eq!(patterns(&mut admin, "24h").await.len(), 2);
        let told = watched(&mut admin).await;
        let told: BTreeSet<_> =
            told.iter().flat_map(|message| &message.occurrences).map(|one| &*one.owner).collect();
        assert!(told.contains("bob") && told.contains("ann"), "{told:?}");
    }
    let mut nobody = errors_of(mesh, "eve", &["errors:read"]).await;
    assert_eq!(list(&mut nobody, ListIncidentsRequest::default()).await, []);
    assert_eq!(dashboard(&mut nobody).await.total_errors, 0);
    assert_eq!(watched(&mut nobody).await, []);
    let mut none = errors_of(mesh, "eve", &["errors:write"]).await;
    let status = none.list_incidents(ListIncidentsRequest::default()).await.unwrap_err();
    assert_eq!(incident(&status).0, "E4005");
    assert!(status.message().contains("errors:read or errors:admin"), "{status:?}");
}

/// A row of counts: method, occurrences, recovered occurrences, first and last time.
type Row = (String, u32, u32, Option<prost_types::Timestamp>, Option<prost_types::Timestamp>);

fn rows(incidents: &[Incident]) -> BTreeSet<(String, u32, u32, String)> {
    let row = |one: &Incident| {
        let seen = format!("{:?} {:?}", one.first_seen, one.last_seen);
        (one.method.clone(), one.count, one.recovered_count, seen)
    };
    incidents.iter().map(row).collect()
}

fn random_occurrences() -> Vec<Occurrence> {
    let mut state = 7_u64;
    let mut random = |below: u64| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (state >> 33) % below
    };
    let mut all = Vec::new();
    for _ in 0..400 {
        let minutes = random(4_000);
        all.push(Occurrence {
            owner: ["ann", "bob", "eve", ""][usize::try_from(random(4)).unwrap()].to_owned(),
            method: format!("/a.B/{}", char::from(b'a' + u8::try_from(random(6)).unwrap())),
            recovered: random(3) == 0,
            time: ago(Duration::from_mins(minutes)),
            ..if random(2) == 0 { failure() } else { unseen() }
        });
    }
    all
}

#[tokio::test]
async fn what_an_owner_sees_is_what_a_store_of_its_own_would_say() {
    for store in Store::both().await {
        let mesh = TestMesh::start_unrecorded_on(&store, &[]).await;
        let mut service = errors(&mesh);
        let all = random_occurrences();
        for batch in all.chunks(37) {
            report(&mut service, batch.to_vec()).await.unwrap();
        }
        for owner in ["ann", "bob", "eve"] {
            let mut client = errors_of(&mesh, owner, &["errors:read"]).await;
            let own: Vec<_> = all.iter().filter(|one| one.owner == owner).collect();
            let mut model: BTreeMap<&str, Row> = BTreeMap::new();
            for one in &own {
                let row = model.entry(&one.method).or_insert((
                    one.method.clone(),
                    0,
                    0,
                    one.time,
                    one.time,
                ));
                row.1 += 1;
                row.2 += u32::from(one.recovered);
                row.3 = [row.3, one.time].into_iter().min_by_key(|time| seconds(*time)).flatten();
                row.4 = [row.4, one.time].into_iter().max_by_key(|time| seconds(*time)).flatten();
            }
            let expected: BTreeSet<_> = model
                .values()
                .map(|row| (row.0.clone(), row.1, row.2, format!("{:?} {:?}", row.3, row.4)))
                .collect();
            let listed = list(&mut client, ListIncidentsRequest::default()).await;
            assert_eq!(rows(&listed), expected);
            let times: Vec<_> = listed.iter().map(|one| seconds(one.last_seen)).collect();
            assert!(times.is_sorted_by(|a, b| a >= b), "last seen first");
            let week: u32 = patterns(&mut client, "7d").await.iter().map(|one| one.count).sum();
            assert_eq!(usize::try_from(week).unwrap(), own.len());
            let told = dashboard(&mut client).await;
            assert_eq!(usize::try_from(told.total_errors).unwrap(), own.len());
            let shown = own.iter().filter(|one| !one.incident_id.is_empty()).take(5);
            for one in shown {
                let found = get(&mut client, &one.incident_id).await.unwrap();
                assert_eq!(found.occurrences[0].event_id, one.event_id);
            }
            assert_eq!(by_pages(&mut client).await, listed);
        }
    }
}

fn seconds(time: Option<prost_types::Timestamp>) -> (i64, i32) {
    time.map(|time| (time.seconds, time.nanos)).unwrap_or_default()
}

/// All incidents, two a page.
async fn by_pages(client: &mut Errors) -> Vec<Incident> {
    let (mut all, mut page_token) = (Vec::new(), String::new());
    loop {
        let request = ListIncidentsRequest { page_size: 2, page_token, ..Default::default() };
        let page = client.list_incidents(request).await.unwrap().into_inner();
        all.extend(page.incidents);
        page_token = page.next_page_token;
        if page_token.is_empty() {
            return all;
        }
    }
}

#[tokio::test]
async fn a_user_finds_what_it_was_shown_with_the_scopes_that_everyone_has() {
    let mesh = TestMesh::start().await;
    let (ann, bob) = (
        mesh.log_in_new_user("ann@a.example", &[]).await,
        mesh.log_in_new_user("bob@b.example", &[]).await,
    );
    let mut codegen =
        CodegenServiceClient::new(mesh.channel_as(Identity::Session(&ann.access_token)));
    let shown = incident(&codegen.generate_code(question("")).await.unwrap_err()).1;
    let errors =
        |token: &str| ErrorTrackingServiceClient::new(mesh.channel_as(Identity::Session(token)));
    let found = within("the incident", async {
        loop {
            if let Ok(found) = get(&mut errors(&ann.access_token), &shown).await {
                return found;
            }
            sleep(Duration::from_millis(20)).await;
        }
    })
    .await;
    assert_eq!(found.occurrences[0].incident_id, shown);
    assert_eq!(found.occurrences[0].owner, ann.user.user_id);
    let status = get(&mut errors(&bob.access_token), &shown).await.unwrap_err();
    assert_eq!(incident(&status).0, "E4010");
    assert_eq!(
        list(&mut errors(&bob.access_token), ListIncidentsRequest::default()).await.len(),
        0
    );
    mesh.finish().await;
}

#[tokio::test]
async fn what_the_version_before_stored_belongs_to_its_owner_after_the_step() {
    for store in Store::both().await {
        let (anns, bobs) = (of_ann(), of_bob());
        {
            let mut mesh = TestMesh::start_unrecorded_on(&store, &[]).await;
            let mut service = errors(&mesh);
            let quiet = Occurrence { recovered: true, time: ago(3 * HOUR), ..unseen() };
            report(&mut service, vec![anns.clone(), bobs.clone(), quiet]).await.unwrap();
            mesh.begin_shutdown();
            mesh.wait_until_stopped().await;
        }
        // As the version before had it.
        for statement in [
            "DROP INDEX error_occurrences_of_owner",
            "DROP INDEX error_owners_of_owner",
            "DROP TABLE error_owner_counts",
            "ALTER TABLE error_occurrences DROP COLUMN owner",
            "ALTER TABLE error_owners DROP COLUMN total",
            "ALTER TABLE error_owners DROP COLUMN recovered_count",
            "ALTER TABLE error_owners DROP COLUMN first_seen",
            "ALTER TABLE error_owners DROP COLUMN last_seen",
            "ALTER TABLE error_owners DROP COLUMN last_version",
            "ALTER TABLE error_owners DROP COLUMN message",
            "DELETE FROM migrations_errors WHERE version = 4",
        ] {
            store.execute(statement).await;
        }
        let mesh = TestMesh::start_unrecorded_on(&store, &[]).await;
        let mut ann = errors_of(&mesh, "ann", &["errors:read"]).await;
        within("the owners of occurrences", async {
            while dashboard(&mut ann).await.total_errors != 2 {
                sleep(Duration::from_millis(20)).await;
            }
        })
        .await;
        let found = get(&mut ann, &anns.incident_id).await.unwrap();
        let own = found.incident.unwrap();
        assert_eq!((own.count, own.recovered_count, own.last_seen), (2, 1, anns.time));
        assert_eq!(
            (own.message, own.last_seen_version),
            (anns.message.clone(), anns.version.clone())
        );
        assert_eq!(found.occurrences.len(), 2);
        assert_eq!(patterns(&mut ann, "24h").await[0].count, 2);
        assert_eq!(incident(&get(&mut ann, &bobs.incident_id).await.unwrap_err()).0, "E4010");
        // One more of hers makes no further user.
        report(&mut errors(&mesh), vec![of_ann()]).await.unwrap();
        let all = list(&mut errors(&mesh), ListIncidentsRequest::default()).await;
        assert_eq!((all[0].count, all[0].affected_users), (4, 2));
        assert_eq!(list(&mut ann, ListIncidentsRequest::default()).await[0].count, 3);
    }
}
