//! Two tenants: objects of one do not exist for the other, whatever it requests.

use std::collections::BTreeSet;

use hapa_proto::FILE_DESCRIPTOR_SET;
use hapa_proto::auth::v1::key_service_client::KeyServiceClient;
use hapa_proto::auth::v1::session_service_client::SessionServiceClient;
use hapa_proto::auth::v1::user_service_client::UserServiceClient;
use hapa_proto::auth::v1::{
    CreateKeyRequest, GetKeyRequest, GetProfileRequest, GetUserRequest, ListKeysRequest,
    ListSessionsRequest, RevokeKeyRequest, RevokeSessionRequest, RotateKeyRequest,
    UpdateKeyRequest, UpdateProfileRequest, UpdateUserRequest,
};
use hapa_proto::codegen::v1::codegen_service_client::CodegenServiceClient;
use hapa_proto::errors::v1::error_tracking_service_client::ErrorTrackingServiceClient;
use hapa_proto::errors::v1::{
    GetDashboardRequest, GetIncidentRequest, ListIncidentsRequest, ListPatternsRequest,
    WatchOccurrencesRequest,
};
use hapa_test_harness::{Identity, LoggedInUser, Store, TestChannel, TestMesh, incident, within};
use prost::Message as _;
use prost_types::{FieldMask, FileDescriptorSet};
use tonic::{Code, Response, Status};

use crate::api::generate::question;
use crate::auth::users::own_key;

/// RPCs with an id in the request that belongs to no owner: a name that the caller chooses.
const OWN_NAMES: &[&str] =
    &["CompleteCode", "GenerateCode", "StreamCompleteCode", "StreamGenerateCode", "ValidateCode"];
/// RPCs with ids for which a scope or the mesh token is needed, which sees everything.
const NOT_FOR_TENANTS: &[&str] = &["ReserveTokens", "SettleTokens", "DeleteUser", "UpdateIncident"];

/// RPCs where an id only filters the caller's own objects: another's id matches none. `usage.rs` tests this.
const FILTERS: &[&str] = &["GetUsage"];

/// The outcome of an RPC.
type Outcome = (&'static str, Option<Status>);

fn said<T>(rpc: &'static str, reply: Result<Response<T>, Status>) -> Outcome {
    (rpc, reply.err())
}

/// Calls every RPC that accepts an id with the ids of `theirs`.
async fn ask_for(
    wire: &TestChannel,
    theirs: &LoggedInUser,
    key_id: &str,
    shown: &str,
) -> Vec<Outcome> {
    let mut keys = KeyServiceClient::new(wire.clone());
    let mut users = UserServiceClient::new(wire.clone());
    let mut sessions = SessionServiceClient::new(wire.clone());
    let mut errors = ErrorTrackingServiceClient::new(wire.clone());
    let failure = GetIncidentRequest { incident_id: shown.to_owned() };
    let (user_id, key_id) = (theirs.user.user_id.clone(), key_id.to_owned());
    let name = || Some(FieldMask { paths: vec!["name".to_owned()] });
    let update_key = UpdateKeyRequest {
        key_id: key_id.clone(),
        update_mask: name(),
        name: "mine".to_owned(),
        ..UpdateKeyRequest::default()
    };
    let update_user = UpdateUserRequest {
        user_id: user_id.clone(),
        update_mask: name(),
        name: "me".to_owned(),
        ..UpdateUserRequest::default()
    };
    let profile = UpdateProfileRequest { user_id: user_id.clone(), profile: None };
    let rotate = RotateKeyRequest { key_id: key_id.clone(), overlap_seconds: None };
    let one = RevokeSessionRequest {
        session_id: theirs.session_id.clone(),
        ..RevokeSessionRequest::default()
    };
    let all =
        RevokeSessionRequest { all_of_user: user_id.clone(), ..RevokeSessionRequest::default() };
    vec![
        said("GetIncident", errors.get_incident(failure).await),
        said("GetKey", keys.get_key(GetKeyRequest { key_id: key_id.clone() }).await),
        said("RotateKey", keys.rotate_key(rotate).await),
        said("UpdateKey", keys.update_key(update_key).await),
        said("RevokeKey", keys.revoke_key(RevokeKeyRequest { key_id }).await),
        said("GetUser", users.get_user(GetUserRequest { user_id: user_id.clone() }).await),
        said("UpdateUser", users.update_user(update_user).await),
        said("GetProfile", users.get_profile(GetProfileRequest { user_id: user_id.clone() }).await),
        said("UpdateProfile", users.update_profile(profile).await),
        said("ListSessions", sessions.list_sessions(ListSessionsRequest { user_id }).await),
        said("RevokeSession", sessions.revoke_session(one).await),
        said("RevokeSession", sessions.revoke_session(all).await),
    ]
}

#[tokio::test]
async fn every_rpc_that_takes_an_id_answers_not_found_for_the_others() {
    for store in Store::both().await {
        let mesh = TestMesh::start_on(&store, &[]).await;
        let (ann, bob) = (
            mesh.log_in_new_user("ann@a.example", &[]).await,
            mesh.log_in_new_user("bob@b.example", &[]).await,
        );
        let anns_key = own_key(&mesh, &ann).await.key.unwrap().key_id;
        let bobs_text = own_key(&mesh, &bob).await.key_text;
        let shown = fail(&mesh, &ann).await;
        let by_session = mesh.channel_as(Identity::Session(&bob.access_token));
        for (rpc, status) in ask_for(&by_session, &ann, &anns_key, &shown).await {
            let status = status.unwrap_or_else(|| panic!("{rpc} showed what is another's"));
            assert_eq!((incident(&status).0.as_str(), status.code()), ("E4010", Code::NotFound));
        }
        let by_key = mesh.channel_as(Identity::Key(&bobs_text));
        for (rpc, status) in ask_for(&by_key, &ann, &anns_key, &shown).await {
            let code = incident(&status.unwrap_or_else(|| panic!("{rpc} showed it"))).0;
            assert!(["E4005", "E4010"].contains(&code.as_str()), "{rpc}: {code}");
        }
        let owner = ann.user.user_id.clone();
        let of_ann = ListKeysRequest { owner, ..ListKeysRequest::default() };
        let mut keys = KeyServiceClient::new(by_session);
        assert_eq!(keys.list_keys(of_ann).await.unwrap().into_inner().keys, []);
        let all = keys.list_keys(ListKeysRequest::default()).await.unwrap().into_inner().keys;
        assert_eq!(all.len(), 1, "and only its own without a filter");
        // Bob changed none of Ann's objects. The last RPC is skipped: Ann's session has ended by then.
        let by_ann = mesh.channel_as(Identity::Session(&ann.access_token));
        let anns = ask_for(&by_ann, &ann, &anns_key, &shown).await;
        for (rpc, status) in &anns[..anns.len() - 1] {
            assert!(status.is_none(), "{rpc}: {status:?}");
        }
        mesh.finish().await;
    }
}

/// Makes a call of this user fail, and waits until its incident is stored. Returns the incident id.
async fn fail(mesh: &TestMesh, person: &LoggedInUser) -> String {
    let wire = mesh.channel_as(Identity::Session(&person.access_token));
    let mut codegen = CodegenServiceClient::new(wire);
    let shown = incident(&codegen.generate_code(question("")).await.unwrap_err()).1;
    // Finds all incident ids so far.
    mesh.find_incidents().await;
    shown
}

#[tokio::test]
async fn lists_sums_and_streams_of_failures_have_nothing_of_the_others() {
    for store in Store::both().await {
        let mesh = TestMesh::start_on(&store, &[]).await;
        let (ann, bob) = (
            mesh.log_in_new_user("ann@a.example", &[]).await,
            mesh.log_in_new_user("bob@b.example", &[]).await,
        );
        fail(&mesh, &ann).await;
        let seen = async |person: &LoggedInUser| {
            let wire = mesh.channel_as(Identity::Session(&person.access_token));
            let mut errors = ErrorTrackingServiceClient::new(wire);
            let listed = errors.list_incidents(ListIncidentsRequest::default()).await.unwrap();
            let patterns = errors.list_patterns(ListPatternsRequest::default()).await.unwrap();
            let sums = errors.get_dashboard(GetDashboardRequest {}).await.unwrap().into_inner();
            let from_begin =
                WatchOccurrencesRequest { cursor: "0".to_owned(), ..Default::default() };
            let mut live = errors.watch_occurrences(from_begin).await.unwrap().into_inner();
            let first = within("a message", live.message()).await.unwrap().unwrap();
            let of_list = listed.into_inner().incidents.iter().map(|one| one.count).sum::<u32>();
            let of_patterns =
                patterns.into_inner().patterns.iter().map(|one| one.count).sum::<u32>();
            let told = u32::try_from(first.occurrences.len()).unwrap() + first.skipped;
            let recent = sums.recent_incidents.iter().map(|one| one.count).sum::<u32>();
            assert_eq!(sums.top_error_codes.iter().map(|one| one.count).sum::<u32>(), recent);
            [of_list, of_patterns, sums.total_errors, sums.errors_last_24h, recent, told]
        };
        assert_eq!(seen(&ann).await, [1; 6]);
        assert_eq!(seen(&bob).await, [0; 6]);
        mesh.finish().await;
    }
}

#[tokio::test]
async fn every_rpc_with_an_id_in_its_request_is_covered_by_that_test() {
    let set = FileDescriptorSet::decode(FILE_DESCRIPTOR_SET).unwrap();
    let mesh = TestMesh::start().await;
    let ann = mesh.log_in_new_user("ann@a.example", &[]).await;
    let asked =
        ask_for(&mesh.channel_as(Identity::Anonymous), &ann, "key_none", "INC-20260101-00000000")
            .await;
    let asked: BTreeSet<_> = asked.into_iter().map(|(rpc, _)| rpc).collect();
    let files = || set.file.iter().filter(|file| file.package().starts_with("hapa."));
    let has_id = |message: &str| {
        let mut messages = files().flat_map(|file| &file.message_type);
        let found = messages.find(|found| message.ends_with(&format!(".{}", found.name())));
        let mut fields = found.unwrap().field.iter();
        fields.any(|field| field.name().ends_with("_id") || field.name() == "all_of_user")
    };
    let exempt = [OWN_NAMES, NOT_FOR_TENANTS, FILTERS].concat();
    for method in files().flat_map(|file| &file.service).flat_map(|service| &service.method) {
        if has_id(method.input_type()) && !exempt.contains(&method.name()) {
            assert!(asked.contains(method.name()), "{} is not asked there", method.name());
        }
    }
    mesh.finish().await;
}

#[tokio::test]
async fn a_session_gives_its_keys_no_more_than_it_has() {
    let mesh = TestMesh::start().await;
    let person = mesh.log_in_new_user("kim@example.com", &["codegen:generate"]).await;
    let mut keys = KeyServiceClient::new(mesh.channel_as(Identity::Session(&person.access_token)));
    let request = |scopes: &[&str], owner: &str| CreateKeyRequest {
        name: "k".to_owned(),
        owner: owner.to_owned(),
        scopes: scopes.iter().map(|&scope| scope.to_owned()).collect(),
        ..CreateKeyRequest::default()
    };
    let unlimited = CreateKeyRequest {
        rate_limits: TestMesh::dev_key().rate_limits,
        ..request(&["codegen:generate"], "")
    };
    let wrong =
        [request(&["auth:admin"], ""), request(&["codegen:generate"], "someone else"), unlimited];
    for request in wrong {
        let status = keys.create_key(request).await.unwrap_err();
        assert_eq!(
            (incident(&status).0.as_str(), status.code()),
            ("E4005", Code::PermissionDenied)
        );
    }
    let made = keys.create_key(request(&["codegen:generate"], "")).await.unwrap().into_inner();
    let update = UpdateKeyRequest {
        key_id: made.key.unwrap().key_id,
        update_mask: Some(FieldMask { paths: vec!["scopes".to_owned()] }),
        scopes: vec!["auth:admin".to_owned()],
        ..UpdateKeyRequest::default()
    };
    assert_eq!(incident(&keys.update_key(update).await.unwrap_err()).0, "E4005");
    mesh.finish().await;
}
