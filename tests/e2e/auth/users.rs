//! Users: created, found, changed, and removed with all their data; and their profiles for answers.

use hapa_proto::auth::v1::key_service_client::KeyServiceClient;
use hapa_proto::auth::v1::user_service_client::UserServiceClient;
use hapa_proto::auth::v1::{
    CreateKeyRequest, CreateKeyResponse, CreateUserRequest, DeleteUserRequest, GetProfileRequest,
    GetUserRequest, ListUsersRequest, UpdateProfileRequest, UpdateUserRequest,
};
use hapa_proto::codegen::v1::{GetCodeHealthRequest, UserProfile};
use hapa_test_harness::{
    Identity, LoggedInUser, PASSWORD, Store, TestChannel, TestMesh, incident, within,
};
use prost_types::FieldMask;
use tonic::{Code, Status};

use crate::api::generate::question;

fn users(mesh: &TestMesh, identity: Identity<'_>) -> UserServiceClient<TestChannel> {
    UserServiceClient::new(mesh.channel_as(identity))
}

fn mask(paths: &[&str]) -> FieldMask {
    FieldMask { paths: paths.iter().map(|&path| path.to_owned()).collect() }
}

fn level(level: &str) -> UserProfile {
    UserProfile { python_skill_level: level.to_owned(), ..UserProfile::default() }
}

/// A key that a user creates for itself.
pub(crate) async fn own_key(mesh: &TestMesh, person: &LoggedInUser) -> CreateKeyResponse {
    let request = CreateKeyRequest {
        name: "own".to_owned(),
        scopes: vec!["codegen:generate".to_owned()],
        ..CreateKeyRequest::default()
    };
    let wire = mesh.channel_as(Identity::Session(&person.access_token));
    let made = KeyServiceClient::new(wire).create_key(request).await.unwrap().into_inner();
    assert_eq!(made.key.as_ref().unwrap().owner, person.user.user_id);
    made
}

fn code(status: &Status) -> String {
    incident(status).0
}

#[tokio::test]
async fn a_user_is_made_found_changed_and_removed_with_its_keys_and_sessions() {
    for store in Store::both().await {
        let mesh = TestMesh::start_on(&store, &[]).await;
        let kim = mesh.log_in_new_user("Kim@Example.com", &[]).await;
        let text = own_key(&mesh, &kim).await.key_text;
        let user_id = kim.user.user_id.clone();
        assert_eq!(kim.user.email, "kim@example.com");
        assert!(kim.user.has_password && user_id.starts_with("usr_"));

        let mut own = users(&mesh, Identity::Session(&kim.access_token));
        let me = own.get_user(GetUserRequest { user_id: "me".to_owned() }).await.unwrap();
        assert_eq!(me.into_inner().user.unwrap().user_id, user_id);
        let rename = UpdateUserRequest {
            user_id: "me".to_owned(),
            update_mask: Some(mask(&["name"])),
            name: "Kim Minji".to_owned(),
            ..UpdateUserRequest::default()
        };
        assert_eq!(
            own.update_user(rename).await.unwrap().into_inner().user.unwrap().name,
            "Kim Minji"
        );
        let escalate = UpdateUserRequest {
            user_id: "me".to_owned(),
            update_mask: Some(mask(&["scopes"])),
            scopes: vec!["auth:admin".to_owned()],
            ..UpdateUserRequest::default()
        };
        assert_eq!(code(&own.update_user(escalate).await.unwrap_err()), "E4005");

        let mut admin = users(&mesh, Identity::Mesh);
        let gone = admin.delete_user(DeleteUserRequest { user_id: user_id.clone() }).await.unwrap();
        let gone = gone.into_inner();
        assert_eq!((gone.revoked_keys, gone.revoked_sessions), (1, 1));
        within("its key to end", async {
            let mut client = mesh.client_with(&text);
            while client.get_code_health(GetCodeHealthRequest {}).await.is_ok() {}
            let status = client.get_code_health(GetCodeHealthRequest {}).await.unwrap_err();
            assert_eq!(code(&status), "E4007");
        })
        .await;
        within("its session to end", async {
            let me = || GetUserRequest { user_id: "me".to_owned() };
            while code(&own.get_user(me()).await.unwrap_err()) != "E4007" {}
        })
        .await;
        let status = admin.get_user(GetUserRequest { user_id }).await.unwrap_err();
        assert_eq!(code(&status), "E4010");
        assert_eq!(code(&mesh.log_in("kim@example.com", PASSWORD).await.unwrap_err()), "E4003");
        mesh.finish().await;
    }
}

#[tokio::test]
async fn an_address_is_one_users_and_finds_it() {
    for store in Store::both().await {
        let mesh = TestMesh::start_on(&store, &[]).await;
        mesh.log_in_new_user("Kim@Example.com", &[]).await;
        let mut admin = users(&mesh, Identity::Mesh);
        let email = "kim@example.com".to_owned();
        let again = CreateUserRequest { email: email.clone(), ..CreateUserRequest::default() };
        let taken = admin.create_user(again).await.unwrap_err();
        assert_eq!((code(&taken).as_str(), taken.code()), ("E4009", Code::Aborted));
        let found = ListUsersRequest { email, ..ListUsersRequest::default() };
        assert_eq!(admin.list_users(found).await.unwrap().into_inner().users.len(), 1);
        mesh.finish().await;
    }
}

#[tokio::test]
async fn users_are_listed_newest_first_by_pages() {
    for store in Store::both().await {
        let mesh = TestMesh::start_on(&store, &[]).await;
        let mut admin = users(&mesh, Identity::Mesh);
        for number in 0..5 {
            let email = format!("u{number}@example.com");
            let request = CreateUserRequest { email, ..CreateUserRequest::default() };
            admin.create_user(request).await.unwrap();
        }
        let (mut listed, mut page_token) = (Vec::new(), String::new());
        loop {
            let request =
                ListUsersRequest { page_size: 2, page_token, ..ListUsersRequest::default() };
            let page = admin.list_users(request).await.unwrap().into_inner();
            listed.extend(page.users.into_iter().map(|user| user.email));
            page_token = page.next_page_token;
            if page_token.is_empty() {
                break;
            }
        }
        let expected: Vec<_> =
            (0..5).rev().map(|number| format!("u{number}@example.com")).collect();
        assert_eq!(listed, expected);
        mesh.finish().await;
    }
}

#[tokio::test]
async fn a_profile_answers_where_a_request_carries_none_and_holds_at_once() {
    for store in Store::both().await {
        let mesh = TestMesh::start_on(&store, &[]).await;
        let kim = mesh.log_in_new_user("kim@example.com", &[]).await;
        let text = own_key(&mesh, &kim).await.key_text;
        let mut client = mesh.client_with(&text);
        let mut own = users(&mesh, Identity::Key(&text));
        let told = || mesh.engine.requests().last().unwrap().body["messages"][0].to_string();

        client.generate_code(question("q")).await.unwrap();
        assert!(told().contains("knows the language well"), "{}", told());
        let user_id = || "me".to_owned();
        let update = UpdateProfileRequest { user_id: user_id(), profile: Some(level("expert")) };
        own.update_profile(update).await.unwrap();
        within("the profile to hold", async {
            loop {
                client.generate_code(question("q")).await.unwrap();
                if told().contains("is an expert") {
                    return;
                }
            }
        })
        .await;
        let mut request = question("q");
        request.user_profile = Some(level("beginner"));
        client.generate_code(request).await.unwrap();
        assert!(told().contains("is a beginner"), "{}", told());

        let kept = own.get_profile(GetProfileRequest { user_id: user_id() }).await.unwrap();
        assert_eq!(kept.into_inner().profile, Some(level("expert")));
        let wrong = UpdateProfileRequest { user_id: user_id(), profile: Some(level("guru")) };
        let status = own.update_profile(wrong).await.unwrap_err();
        assert_eq!(code(&status), "E4001");
        assert!(status.message().contains("known are advanced"), "{}", status.message());
        mesh.finish().await;
    }
}

#[tokio::test]
async fn a_new_password_needs_the_old_one_and_ends_every_session() {
    let mesh = TestMesh::start().await;
    let kim = mesh.log_in_new_user("kim@example.com", &[]).await;
    let mut own = users(&mesh, Identity::Session(&kim.access_token));
    let change = |current: &str| UpdateUserRequest {
        user_id: "me".to_owned(),
        update_mask: Some(mask(&["password"])),
        password: "another horse battery staple".to_owned(),
        current_password: current.to_owned(),
        ..UpdateUserRequest::default()
    };
    assert_eq!(code(&own.update_user(change("a guess")).await.unwrap_err()), "E4003");
    own.update_user(change(PASSWORD)).await.unwrap();
    within("its session to end", async {
        let request = || GetUserRequest { user_id: "me".to_owned() };
        while own.get_user(request()).await.is_ok() {}
        assert_eq!(code(&own.get_user(request()).await.unwrap_err()), "E4007");
    })
    .await;
    assert_eq!(code(&mesh.log_in("kim@example.com", PASSWORD).await.unwrap_err()), "E4003");
    mesh.log_in("kim@example.com", "another horse battery staple").await.unwrap();
    mesh.finish().await;
}

#[tokio::test]
async fn a_key_may_at_most_what_its_user_may() {
    let mesh = TestMesh::start().await;
    let kim = mesh.log_in_new_user("kim@example.com", &["codegen:generate", "errors:read"]).await;
    let text = own_key(&mesh, &kim).await.key_text;
    mesh.client_with(&text).generate_code(question("q")).await.unwrap();
    let narrow = UpdateUserRequest {
        user_id: kim.user.user_id,
        update_mask: Some(mask(&["scopes"])),
        scopes: vec!["errors:read".to_owned()],
        ..UpdateUserRequest::default()
    };
    users(&mesh, Identity::Mesh).update_user(narrow).await.unwrap();
    within("the key to lose its scope", async {
        while mesh.client_with(&text).generate_code(question("q")).await.is_ok() {}
        let status = mesh.client_with(&text).generate_code(question("q")).await.unwrap_err();
        assert_eq!(code(&status), "E4005");
    })
    .await;
    mesh.finish().await;
}

#[tokio::test]
async fn a_request_for_a_user_names_all_that_is_wrong_with_it() {
    use tonic_types::StatusExt as _;
    let mesh = TestMesh::start().await;
    let request = CreateUserRequest {
        email: "nobody".to_owned(),
        password: "short".to_owned(),
        scopes: vec!["codegen:everything".to_owned()],
        profile: Some(level("guru")),
        ..CreateUserRequest::default()
    };
    let status = users(&mesh, Identity::Mesh).create_user(request).await.unwrap_err();
    let details = status.get_details_bad_request().unwrap();
    let fields: Vec<_> = details.field_violations.iter().map(|one| one.field.as_str()).collect();
    assert_eq!(fields, ["email", "password", "scopes", "user_profile.python_skill_level"]);
    assert!(!status.message().contains("short"), "the password is repeated");
    mesh.finish().await;
}
