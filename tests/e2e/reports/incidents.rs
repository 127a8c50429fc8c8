//! Incidents: failures become incidents, are found by the id that a client received, and can reopen.

mod owned;
mod report;
mod states;
mod totals;
mod watch;

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use hapa_proto::auth::v1::CreateKeyRequest;
use hapa_proto::errors::v1::error_tracking_service_client::ErrorTrackingServiceClient;
use hapa_proto::errors::v1::{
    GetIncidentRequest, GetIncidentResponse, Incident, ListIncidentsRequest, Occurrence,
    ReportOccurrencesRequest,
};
use hapa_test_harness::{Identity, TestChannel, TestMesh, within};
use prost_types::Timestamp;
use tonic::Status;

type Errors = ErrorTrackingServiceClient<TestChannel>;

fn errors(mesh: &TestMesh) -> Errors {
    ErrorTrackingServiceClient::new(mesh.channel_as(Identity::Mesh))
}

/// A key with these scopes, and its holder's client.
async fn errors_of(mesh: &TestMesh, owner: &str, scopes: &[&str]) -> Errors {
    let request = CreateKeyRequest {
        owner: owner.to_owned(),
        scopes: scopes.iter().map(|&scope| scope.to_owned()).collect(),
        ..TestMesh::dev_key()
    };
    let key = mesh.create_key(request).await.key_text;
    ErrorTrackingServiceClient::new(mesh.channel_as(Identity::Key(&key)))
}

/// So long ago.
fn ago(before: Duration) -> Option<Timestamp> {
    let time = Timestamp::from(SystemTime::now().checked_sub(before)?);
    // As fine as it is kept.
    Some(Timestamp { nanos: time.nanos / 1_000 * 1_000, ..time })
}

/// A UUID of version 7 that no other has.
fn event_id() -> String {
    let tail: u128 = u128::from_be_bytes(random());
    let time = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_millis();
    let id = (time << 80) | (tail & ((1 << 80) - 1));
    let id = id & !(0xf << 76) & !(0x3 << 62) | (0x7 << 76) | (0x2 << 62);
    let hex = format!("{id:032x}");
    format!("{}-{}-{}-{}-{}", &hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..])
}

/// An incident id as a client receives it, a new one each time.
fn incident_id() -> String {
    let random: [u8; 16] = random();
    let tail = u32::from_be_bytes([random[0], random[1], random[2], random[3]]);
    format!("INC-20260101-{tail:08X}")
}

fn random() -> [u8; 16] {
    let random = ring::rand::SystemRandom::new();
    ring::rand::generate(&random).unwrap().expose()
}

/// A failure of this moment with an incident id.
fn failure() -> Occurrence {
    Occurrence {
        event_id: event_id(),
        incident_id: incident_id(),
        time: ago(Duration::ZERO),
        error_code: "E5006".to_owned(),
        method: "/hapa.codegen.v1.CodegenService/GenerateCode".to_owned(),
        message: "the model can't be reached".to_owned(),
        causes: vec!["connection refused by 10.0.0.7:8002".to_owned()],
        service: "codegen".to_owned(),
        version: "1.2.0".to_owned(),
        request_id: "request-1".to_owned(),
        trace_id: "0123456789abcdef0123456789abcdef".to_owned(),
        actor: "key:key_1".to_owned(),
        owner: "ann".to_owned(),
        duration: Some(prost_types::Duration { seconds: 1, nanos: 500_000_000 }),
        recovered: false,
    }
}

/// An incident id that no client received.
fn unseen() -> Occurrence {
    Occurrence { incident_id: String::new(), ..failure() }
}

async fn report(client: &mut Errors, occurrences: Vec<Occurrence>) -> Result<u32, Status> {
    let sent = client.report_occurrences(ReportOccurrencesRequest { occurrences });
    Ok(within("a report", sent).await?.into_inner().accepted)
}

async fn get(client: &mut Errors, id: &str) -> Result<GetIncidentResponse, Status> {
    let incident_id = id.to_owned();
    let shown = client.get_incident(GetIncidentRequest { incident_id });
    Ok(within("an incident", shown).await?.into_inner())
}

async fn list(client: &mut Errors, request: ListIncidentsRequest) -> Vec<Incident> {
    let listed = within("incidents", client.list_incidents(request)).await;
    listed.unwrap().into_inner().incidents
}

async fn only(client: &mut Errors) -> Incident {
    let mut all = list(client, ListIncidentsRequest::default()).await;
    assert_eq!(all.len(), 1, "{all:?}");
    all.remove(0)
}
