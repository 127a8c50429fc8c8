//! Requests with an idempotency key have one effect and one reply, for one caller. The store contains no
//! secret of a key.

mod codegen;
mod gateway_and_cli;
mod replicas;

use std::time::Duration;

use hapa_core::idempotency::{HEADER, REPLAYED_HEADER};
use hapa_proto::auth::v1::audit_service_client::AuditServiceClient;
use hapa_proto::auth::v1::create_key_request::Expiry;
use hapa_proto::auth::v1::user_service_client::UserServiceClient;
use hapa_proto::auth::v1::{
    CreateKeyRequest, CreateKeyResponse, CreateUserRequest, DeleteUserRequest,
    ListAuditEntriesRequest, ListKeysRequest, RotateKeyRequest,
};
use hapa_proto::codegen::v1::{CompleteCodeRequest, GenerateCodeRequest};
use hapa_test_harness::{Identity, Store, TestChannel, TestMesh, incident, within};
use tokio::task::JoinSet;
use tokio::time::sleep;
use tonic::{Code, Request, Response, Status};

use crate::api::generate::question;

/// A request with an idempotency key.
fn keyed<T>(message: T, key: &str) -> Request<T> {
    let mut request = Request::new(message);
    request.metadata_mut().insert(HEADER, key.parse().unwrap());
    request
}

fn is_replayed<T>(reply: &Response<T>) -> bool {
    reply.metadata().get(REPLAYED_HEADER).is_some_and(|value| value == "true")
}

fn users(mesh: &TestMesh) -> UserServiceClient<TestChannel> {
    UserServiceClient::new(mesh.channel_as(Identity::Mesh))
}

fn user(email: &str) -> CreateUserRequest {
    CreateUserRequest { email: email.to_owned(), ..CreateUserRequest::default() }
}

async fn create(mesh: &TestMesh, key: &str) -> Result<Response<CreateKeyResponse>, Status> {
    within("a key", mesh.keys().create_key(keyed(TestMesh::dev_key(), key))).await
}

/// Keys of the mesh, without its own.
async fn count_keys(mesh: &TestMesh) -> usize {
    let listed = mesh.keys().list_keys(ListKeysRequest::default()).await.unwrap();
    listed.into_inner().keys.len() - 1
}

async fn count_entries(mesh: &TestMesh, action: &str) -> usize {
    let mut audit = AuditServiceClient::new(mesh.channel_as(Identity::Mesh));
    let action = action.to_owned();
    let request = ListAuditEntriesRequest { action, ..ListAuditEntriesRequest::default() };
    audit.list_audit_entries(request).await.unwrap().into_inner().entries.len()
}

#[tokio::test]
async fn the_same_request_again_changes_nothing_and_gives_the_first_reply() {
    for store in Store::both().await {
        let mesh = TestMesh::start_on(&store, &[]).await;
        let first = create(&mesh, "k").await.unwrap();
        let again = create(&mesh, "k").await.unwrap();
        assert!(!is_replayed(&first) && is_replayed(&again));
        let first = first.into_inner();
        assert_eq!(first, again.into_inner());
        assert_eq!((count_keys(&mesh).await, count_entries(&mesh, "key.create").await), (1, 2));

        let key_id = first.key.unwrap().key_id;
        let rotation = RotateKeyRequest { key_id, overlap_seconds: Some(60) };
        let rotate = async || mesh.keys().rotate_key(keyed(rotation.clone(), "k")).await.unwrap();
        let (rotated, again) = (rotate().await, rotate().await);
        assert!(!is_replayed(&rotated) && is_replayed(&again));
        assert_eq!(rotated.get_ref(), again.get_ref());
        assert_ne!(rotated.get_ref().key_text, first.key_text);
        assert_eq!(rotated.get_ref().key.as_ref().unwrap().texts.len(), 2);
        assert_eq!(count_entries(&mesh, "key.rotate").await, 1);

        let asked = CreateUserRequest {
            password: "correct horse battery".to_owned(),
            ..user("mina@example.com")
        };
        let create = async || users(&mesh).create_user(keyed(asked.clone(), "k")).await.unwrap();
        let (made, again) = (create().await, create().await);
        assert!(!is_replayed(&made) && is_replayed(&again));
        assert_eq!(made.into_inner(), again.into_inner());
        assert_eq!(count_entries(&mesh, "user.create").await, 1);
        mesh.finish().await;
    }
}

#[tokio::test]
async fn another_body_under_a_used_key_is_a_conflict_and_has_no_effect() {
    for store in Store::both().await {
        let mesh = TestMesh::start_on(&store, &[]).await;
        let key_id = create(&mesh, "k").await.unwrap().into_inner().key.unwrap().key_id;
        let other = CreateKeyRequest { name: "other".to_owned(), ..TestMesh::dev_key() };
        let refused = mesh.keys().create_key(keyed(other, "k")).await.unwrap_err();
        assert_eq!((incident(&refused).0.as_str(), refused.code()), ("E4009", Code::Aborted));
        // Also one that would be refused for itself.
        let wrong = mesh.keys().create_key(keyed(CreateKeyRequest::default(), "k")).await;
        assert_eq!(incident(&wrong.unwrap_err()).0, "E4009");

        let rotation =
            |seconds| RotateKeyRequest { key_id: key_id.clone(), overlap_seconds: Some(seconds) };
        mesh.keys().rotate_key(keyed(rotation(60), "k")).await.unwrap();
        let refused = mesh.keys().rotate_key(keyed(rotation(61), "k")).await.unwrap_err();
        assert_eq!(incident(&refused).0, "E4009");

        users(&mesh).create_user(keyed(user("a@example.com"), "k")).await.unwrap();
        let refused = users(&mesh).create_user(keyed(user("b@example.com"), "k")).await;
        assert_eq!(incident(&refused.unwrap_err()).0, "E4009");
        assert_eq!(count_keys(&mesh).await, 1);
        assert_eq!(count_entries(&mesh, "key.rotate").await, 1);
        assert_eq!(count_entries(&mesh, "user.create").await, 1);
        mesh.finish().await;
    }
}

#[tokio::test]
async fn of_equal_requests_at_the_same_time_one_makes_the_key() {
    for store in Store::both().await {
        let mesh = TestMesh::start_on(&store, &[]).await;
        let mut asked = JoinSet::new();
        for _ in 0..8 {
            let mut keys = mesh.keys();
            asked.spawn(async move { keys.create_key(keyed(TestMesh::dev_key(), "k")).await });
        }
        let replies = within("all of them", asked.join_all()).await;
        let replies: Vec<_> = replies.into_iter().map(Result::unwrap).collect();
        assert_eq!(replies.iter().filter(|reply| !is_replayed(reply)).count(), 1);
        assert!(replies.iter().all(|reply| reply.get_ref() == replies[0].get_ref()));
        assert_eq!((count_keys(&mesh).await, count_entries(&mesh, "key.create").await), (1, 2));
        mesh.finish().await;
    }
}

#[tokio::test]
async fn a_client_that_leaves_at_any_moment_and_comes_back_has_made_one_key() {
    for store in Store::both().await {
        let mesh = TestMesh::start_on(&store, &[]).await;
        for attempt in 0..12_u64 {
            let key = format!("attempt-{attempt}");
            tokio::select! {
                biased;
                _ = create(&mesh, &key) => {}
                () = sleep(Duration::from_micros(attempt * attempt * 100)) => {}
            }
            create(&mesh, &key).await.unwrap();
            assert_eq!(count_keys(&mesh).await, usize::try_from(attempt).unwrap() + 1);
        }
        mesh.finish().await;
    }
}

#[tokio::test]
async fn the_store_holds_neither_the_text_of_a_key_nor_the_idempotency_key() {
    for store in Store::both().await {
        let mesh = TestMesh::start_on(&store, &[]).await;
        let password = "correct horse battery";
        let made = create(&mesh, "a-key-to-be-found").await.unwrap().into_inner();
        let key_id = made.key.unwrap().key_id;
        let rotation = RotateKeyRequest { key_id: key_id.clone(), overlap_seconds: None };
        let rotated = mesh.keys().rotate_key(keyed(rotation, "a-key-to-be-found")).await.unwrap();
        let asked = CreateUserRequest { password: password.to_owned(), ..user("mina@example.com") };
        users(&mesh).create_user(keyed(asked, "a-key-to-be-found")).await.unwrap();
        let secrets = [made.key_text, rotated.into_inner().key_text];
        let secrets = secrets.iter().map(|text| &text[key_id.len() + 1..]);
        assert!(store.holds(&key_id).await && store.holds("mina@example.com").await);
        for hidden in secrets.chain([password, "a-key-to-be-found"]) {
            let in_hex = hex::encode(hidden);
            assert!(!store.holds(hidden).await && !store.holds(&in_hex).await, "{hidden}");
        }
        mesh.finish().await;
    }
}

#[tokio::test]
async fn a_key_belongs_to_one_caller_and_one_method() {
    let mesh = TestMesh::start().await;
    let first = create(&mesh, "k").await.unwrap().into_inner();
    let mut own = mesh.keys_with(&mesh.key);
    let other = own.create_key(keyed(TestMesh::dev_key(), "k")).await.unwrap();
    assert!(!is_replayed(&other));
    assert_ne!(other.into_inner().key_text, first.key_text);
    let made = users(&mesh).create_user(keyed(user("a@example.com"), "k")).await.unwrap();
    assert!(!is_replayed(&made), "another method");
    // A user is the same caller after a new login.
    let kim = mesh.log_in_new_user("kim@example.com", &[]).await;
    let later = mesh.log_in("kim@example.com", hapa_test_harness::PASSWORD).await.unwrap();
    let mut texts = Vec::new();
    for token in [kim.access_token, later.access_token] {
        let wire = mesh.channel_as(Identity::Session(&token));
        let mut keys = hapa_proto::auth::v1::key_service_client::KeyServiceClient::new(wire);
        let request = CreateKeyRequest {
            name: "own".to_owned(),
            scopes: vec!["codegen:generate".to_owned()],
            ..CreateKeyRequest::default()
        };
        texts.push(keys.create_key(keyed(request, "k")).await.unwrap().into_inner().key_text);
    }
    assert_eq!(texts[0], texts[1]);
    mesh.finish().await;
}

#[tokio::test]
async fn a_failure_is_not_remembered() {
    for store in Store::both().await {
        let mesh = TestMesh::start_on(&store, &[]).await;
        let taken = users(&mesh).create_user(user("a@example.com")).await.unwrap();
        let refused = users(&mesh).create_user(keyed(user("a@example.com"), "k")).await;
        assert_eq!(incident(&refused.unwrap_err()).0, "E4009");
        let user_id = taken.into_inner().user.unwrap().user_id;
        users(&mesh).delete_user(DeleteUserRequest { user_id }).await.unwrap();
        let made = users(&mesh).create_user(keyed(user("a@example.com"), "k")).await.unwrap();
        assert!(!is_replayed(&made));
        mesh.finish().await;
    }
}

#[tokio::test]
async fn a_reply_is_forgotten_after_a_day() {
    for store in Store::both().await {
        let mesh = TestMesh::start_on(&store, &[]).await;
        let first = create(&mesh, "k").await.unwrap().into_inner();
        let hours = async |hours: i64| {
            let micros = hours * 3_600_000_000;
            let text =
                format!("UPDATE idempotency_records SET expire_time = expire_time - {micros}");
            store.execute(&text).await;
        };
        hours(23).await;
        assert_eq!(create(&mesh, "k").await.unwrap().into_inner(), first);
        hours(1).await;
        let second = create(&mesh, "k").await.unwrap();
        assert!(!is_replayed(&second));
        // The new reply replaces the first one for the next 24 hours.
        assert_eq!(create(&mesh, "k").await.unwrap().into_inner(), second.into_inner());
        assert_eq!(count_keys(&mesh).await, 2);
        mesh.finish().await;
    }
}

#[tokio::test]
async fn a_repetition_is_answered_although_its_expire_time_has_passed() {
    let store = Store::sqlite();
    let mesh = TestMesh::start_on(&store, &[]).await;
    let soon = hapa_core::timestamps::now() + 3 * hapa_core::timestamps::SECOND;
    let expiry = Some(Expiry::ExpireTime(hapa_core::timestamps::timestamp(soon)));
    let asked = CreateKeyRequest { expiry, ..TestMesh::dev_key() };
    let first = mesh.keys().create_key(keyed(asked.clone(), "k")).await.unwrap().into_inner();
    within("its end", async {
        // Without the key it is refused once its time has passed.
        while mesh.keys().create_key(asked.clone()).await.is_ok() {
            sleep(Duration::from_millis(100)).await;
        }
    })
    .await;
    let again = mesh.keys().create_key(keyed(asked, "k")).await.unwrap();
    assert_eq!(again.into_inner(), first);
    mesh.finish().await;
}

#[tokio::test]
async fn replies_are_known_while_the_pepper_is_replaced() {
    const OLD: &str = "the-pepper-before-of-more-than-32-characters";
    const NEW: &str = "the-pepper-after-of-more-than-32-characters";
    for store in Store::both().await {
        let old = format!("--api-key-pepper={OLD}");
        let mut mesh = TestMesh::start_on(&store, &[&old]).await;
        let first = create(&mesh, "k").await.unwrap().into_inner();
        mesh.begin_shutdown();
        mesh.wait_until_stopped().await;
        let (new, also) =
            (format!("--api-key-pepper={NEW}"), format!("--api-key-pepper-previous={OLD}"));
        let mesh = TestMesh::start_on(&store, &[&new, &also]).await;
        assert_eq!(create(&mesh, "k").await.unwrap().into_inner(), first);
        mesh.finish().await;
    }
}

#[tokio::test]
async fn a_key_that_is_not_1_to_128_visible_ascii_characters_is_refused_by_name() {
    let mesh = TestMesh::start().await;
    let key_id = create(&mesh, &"k".repeat(128)).await.unwrap().into_inner().key.unwrap().key_id;
    let too_long = "k".repeat(129);
    let completion = CompleteCodeRequest { prefix: "x".to_owned(), ..Default::default() };
    for bad in ["", "a b", too_long.as_str()] {
        let rotation = RotateKeyRequest { key_id: key_id.clone(), overlap_seconds: None };
        let refusals: [Status; 5] = [
            create(&mesh, bad).await.unwrap_err(),
            mesh.keys().rotate_key(keyed(rotation, bad)).await.unwrap_err(),
            users(&mesh).create_user(keyed(user("a@example.com"), bad)).await.unwrap_err(),
            mesh.client().generate_code(keyed(question("q"), bad)).await.unwrap_err(),
            mesh.client().complete_code(keyed(completion.clone(), bad)).await.unwrap_err(),
        ];
        for refused in refusals {
            assert_eq!(incident(&refused).0, "E4001");
            let details = tonic_types::StatusExt::get_details_bad_request(&refused).unwrap();
            assert_eq!(details.field_violations[0].field, HEADER);
        }
    }
    let twice = || {
        let mut request: Request<GenerateCodeRequest> = keyed(question("q"), "a");
        request.metadata_mut().append(HEADER, "b".parse().unwrap());
        request
    };
    let refused = mesh.client().generate_code(twice()).await.unwrap_err();
    assert_eq!(incident(&refused).0, "E4001");
    // RPCs without idempotency ignore the header.
    assert!(mesh.client().stream_generate_code(twice()).await.is_ok());
    assert_eq!(count_keys(&mesh).await, 1);
    mesh.finish().await;
}
