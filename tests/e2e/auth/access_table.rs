//! Every RPC and every identity in one table: which calls are allowed, which need a credential, and which need
//! a scope. An RPC that is not in the table fails the test.

use std::collections::BTreeMap;
use std::error::Error;

use bytes::Bytes;
use hapa_proto::FILE_DESCRIPTOR_SET;
use hapa_proto::auth::v1::CreateKeyRequest;
use hapa_test_harness::{Identity, TestMesh, incident, within};
use prost::Message as _;
use prost_types::FileDescriptorSet;
use tonic::body::Body;
use tonic::client::GrpcService;
use tonic::codegen::Body as HttpBody;
use tonic::{Request, Status};

/// The first columns are: no credential, a key for completion, a key for code, and a key for the cache. Then
/// follow a key of errors and analytics, a session without auth:admin, a key with auth:admin, and the mesh
/// token. `+` is allowed, `3` is E4003 (no accepted credential), `5` is E4005 (a scope is missing).
const TABLE: &[(&str, &str)] = &[
    ("hapa.analytics.v1.AnalyticsService/GetPerformance", "3555 +55+"),
    ("hapa.analytics.v1.AnalyticsService/GetUsage", "3555 +55+"),
    ("hapa.analytics.v1.AnalyticsService/RecordEvents", "3333 333+"),
    ("hapa.analytics.v1.AnalyticsService/WatchPerformance", "3555 +55+"),
    ("hapa.auth.v1.AuditService/ListAuditEntries", "3555 55++"),
    ("hapa.auth.v1.AuditService/VerifyAuditLog", "3555 55++"),
    ("hapa.auth.v1.AuthService/Authenticate", "3333 333+"),
    ("hapa.auth.v1.AuthService/ReserveTokens", "3333 333+"),
    ("hapa.auth.v1.AuthService/SettleTokens", "3333 333+"),
    ("hapa.auth.v1.AuthService/WatchRevocations", "3333 333+"),
    ("hapa.auth.v1.KeyService/CreateKey", "3555 5+++"),
    ("hapa.auth.v1.KeyService/GetKey", "3+++ ++++"),
    ("hapa.auth.v1.KeyService/ListKeys", "3+++ ++++"),
    ("hapa.auth.v1.KeyService/RevokeKey", "3555 5+++"),
    ("hapa.auth.v1.KeyService/RotateKey", "3555 5+++"),
    ("hapa.auth.v1.KeyService/UpdateKey", "3555 5+++"),
    ("hapa.auth.v1.SessionService/CreateSession", "++++ ++++"),
    ("hapa.auth.v1.SessionService/ListSessions", "3555 5+++"),
    ("hapa.auth.v1.SessionService/RefreshSession", "++++ ++++"),
    ("hapa.auth.v1.SessionService/RevokeSession", "3555 5+++"),
    ("hapa.auth.v1.UserService/CreateUser", "3555 55++"),
    ("hapa.auth.v1.UserService/DeleteUser", "3555 55++"),
    ("hapa.auth.v1.UserService/GetProfile", "3+++ ++++"),
    ("hapa.auth.v1.UserService/GetUser", "3+++ ++++"),
    ("hapa.auth.v1.UserService/ListUsers", "3555 55++"),
    ("hapa.auth.v1.UserService/UpdateProfile", "3+++ ++++"),
    ("hapa.auth.v1.UserService/UpdateUser", "3555 5+++"),
    ("hapa.codegen.v1.CacheService/ClearCache", "355+ 555+"),
    ("hapa.codegen.v1.CacheService/GetCacheStats", "355+ 555+"),
    ("hapa.codegen.v1.CodegenService/CompleteCode", "3+55 555+"),
    ("hapa.codegen.v1.CodegenService/GenerateCode", "35+5 5+5+"),
    ("hapa.codegen.v1.CodegenService/GetCodeHealth", "3+++ ++++"),
    ("hapa.codegen.v1.CodegenService/ListModels", "3+++ ++++"),
    ("hapa.codegen.v1.CodegenService/StreamCompleteCode", "3+55 555+"),
    ("hapa.codegen.v1.CodegenService/StreamGenerateCode", "35+5 5+5+"),
    ("hapa.codegen.v1.CodegenService/ValidateCode", "35+5 5+5+"),
    ("hapa.errors.v1.ErrorTrackingService/GetDashboard", "3555 +55+"),
    ("hapa.errors.v1.ErrorTrackingService/GetIncident", "3555 +55+"),
    ("hapa.errors.v1.ErrorTrackingService/ListErrorCodes", "3+++ ++++"),
    ("hapa.errors.v1.ErrorTrackingService/ListIncidents", "3555 +55+"),
    ("hapa.errors.v1.ErrorTrackingService/ListPatterns", "3555 +55+"),
    ("hapa.errors.v1.ErrorTrackingService/ReportOccurrences", "3555 +55+"),
    ("hapa.errors.v1.ErrorTrackingService/UpdateIncident", "3555 555+"),
    ("hapa.errors.v1.ErrorTrackingService/WatchOccurrences", "3555 +55+"),
    ("hapa.errors.v1.GatewayReportService/ReportRefusals", "3333 333+"),
    ("hapa.system.v1.SystemService/GetConfigStatus", "3555 55++"),
    ("hapa.system.v1.SystemService/GetHealth", "++++ ++++"),
];

/// RPCs that ingest events.
const INTAKES: [&str; 3] = [
    "hapa.analytics.v1.AnalyticsService/RecordEvents",
    "hapa.errors.v1.ErrorTrackingService/ReportOccurrences",
    "hapa.errors.v1.GatewayReportService/ReportRefusals",
];

#[tokio::test]
async fn every_rpc_admits_exactly_the_identities_of_the_table() {
    let mesh = TestMesh::start().await;
    let key = async |scopes: &[&str]| {
        let scopes = scopes.iter().map(|&scope| scope.to_owned()).collect();
        mesh.create_key(CreateKeyRequest { scopes, ..TestMesh::dev_key() }).await.key_text
    };
    let keys = [
        key(&["codegen:complete"]).await,
        key(&["codegen:generate"]).await,
        key(&["cache:admin"]).await,
        key(&["errors:read", "errors:write", "analytics:read", "analytics:write"]).await,
        key(&["auth:admin"]).await,
    ];
    let person = mesh.log_in_new_user("kim@example.com", &["codegen:generate"]).await;
    let roles = [
        Identity::Anonymous,
        Identity::Key(&keys[0]),
        Identity::Key(&keys[1]),
        Identity::Key(&keys[2]),
        Identity::Key(&keys[3]),
        Identity::Session(&person.access_token),
        Identity::Key(&keys[4]),
        Identity::Mesh,
    ];
    let mut table: BTreeMap<_, _> = TABLE.iter().copied().collect();
    for rpc in rpcs() {
        let expected = table.remove(rpc.as_str());
        let expected =
            expected.unwrap_or_else(|| panic!("{rpc} is not in the table")).replace(' ', "");
        let mut seen = String::new();
        for role in roles {
            // The delivery of events creates no events, so its failure has no occurrence to look up.
            let delivers = matches!(role, Identity::Mesh) && INTAKES.contains(&rpc.as_str());
            let wire = if delivers { role.on(mesh.connect().await) } else { mesh.channel_as(role) };
            seen.push(outcome(call(wire, &rpc).await));
        }
        assert_eq!(seen, expected, "{rpc}");
    }
    assert!(table.is_empty(), "no RPC: {table:?}");
    assert_eq!(mesh.engine.counts().started, 0, "an empty request reached the engine");
    mesh.finish().await;
}

pub(crate) fn rpcs() -> Vec<String> {
    let set = FileDescriptorSet::decode(FILE_DESCRIPTOR_SET).unwrap();
    let mut rpcs = Vec::new();
    for file in set.file.iter().filter(|file| file.package().starts_with("hapa.")) {
        for service in &file.service {
            for method in &service.method {
                rpcs.push(format!("{}.{}/{}", file.package(), service.name(), method.name()));
            }
        }
    }
    rpcs
}

/// Calls with an empty message: an allowed caller receives a validation error or an answer.
pub(crate) async fn call<S>(wire: S, rpc: &str) -> Result<(), Status>
where
    S: GrpcService<Body>,
    S::ResponseBody:
        HttpBody<Data = Bytes, Error: Into<Box<dyn Error + Send + Sync>>> + Send + 'static,
{
    let mut grpc = tonic::client::Grpc::new(wire);
    grpc.ready().await.map_err(|error| Status::unknown(error.into().to_string()))?;
    let codec = tonic_prost::ProstCodec::<(), ()>::default();
    let path = format!("/{rpc}").parse().unwrap();
    let reply = within(rpc, grpc.server_streaming(Request::new(()), path, codec)).await?;
    within(rpc, reply.into_inner().message()).await.map(drop)
}

pub(crate) fn outcome(reply: Result<(), Status>) -> char {
    match reply.map_err(|status| incident(&status).0) {
        Err(code) if code == "E4003" => '3',
        Err(code) if code == "E4005" => '5',
        _ => '+',
    }
}
