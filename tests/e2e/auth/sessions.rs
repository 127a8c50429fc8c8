//! Sessions: login with a password, refresh tokens, and immediate logout.

mod oidc;

use std::collections::HashSet;

use base64::Engine as _;
use base64::prelude::BASE64_URL_SAFE_NO_PAD as BASE64;
use hapa_engine_sim::Script;
use hapa_proto::auth::v1::create_session_request::Proof;
use hapa_proto::auth::v1::session_service_client::SessionServiceClient;
use hapa_proto::auth::v1::{
    CreateSessionRequest, CreateSessionResponse, ListSessionsRequest, RefreshSessionRequest,
    RefreshSessionResponse, RevokeSessionRequest,
};
use hapa_proto::codegen::v1::GetCodeHealthRequest;
use hapa_proto::codegen::v1::codegen_service_client::CodegenServiceClient;
use hapa_proto::codegen::v1::stream_generate_code_response::Event;
use hapa_test_harness::{Identity, PASSWORD, Store, TestChannel, TestMesh, incident, within};
use ring::hmac;
use serde_json::{Value, json};
use tonic::{Code, Status};

use crate::api::generate::question;

fn sessions(mesh: &TestMesh, identity: Identity<'_>) -> SessionServiceClient<TestChannel> {
    SessionServiceClient::new(mesh.channel_as(identity))
}

async fn prove(mesh: &TestMesh, proof: Proof) -> Result<CreateSessionResponse, Status> {
    let request = CreateSessionRequest { proof: Some(proof), http_body: None };
    let mut anyone = sessions(mesh, Identity::Anonymous);
    Ok(within("a session", anyone.create_session(request)).await?.into_inner())
}

async fn refresh(mesh: &TestMesh, token: &str) -> Result<RefreshSessionResponse, Status> {
    let request = RefreshSessionRequest { refresh_token: token.to_owned() };
    let mut anyone = sessions(mesh, Identity::Anonymous);
    Ok(within("new tokens", anyone.refresh_session(request)).await?.into_inner())
}

async fn knows(mesh: &TestMesh, identity: Identity<'_>) -> Result<(), Status> {
    let mut client = CodegenServiceClient::new(mesh.channel_as(identity));
    within("a call", client.get_code_health(GetCodeHealthRequest {})).await.map(drop)
}

async fn works(mesh: &TestMesh, token: &str) -> Result<(), Status> {
    knows(mesh, Identity::Session(token)).await
}

async fn ends(mesh: &TestMesh, token: &str) {
    within("the session to end", async { while works(mesh, token).await.is_ok() {} }).await;
    let status = works(mesh, token).await.unwrap_err();
    assert_eq!((incident(&status).0.as_str(), status.code()), ("E4007", Code::Unauthenticated));
}

#[tokio::test]
async fn a_wrong_password_and_an_unknown_address_get_the_same_error() {
    let mesh = TestMesh::start().await;
    mesh.log_in_new_user("kim@example.com", &[]).await;
    let wrong = mesh.log_in("kim@example.com", "a wrong password").await.unwrap_err();
    let unknown = mesh.log_in("nobody@example.com", PASSWORD).await.unwrap_err();
    assert_eq!((incident(&wrong).0.as_str(), wrong.code()), ("E4003", Code::Unauthenticated));
    assert_eq!((incident(&unknown).0, unknown.message()), (incident(&wrong).0, wrong.message()));
    let status = prove(&mesh, Proof::IdToken("a.b.c".to_owned())).await.unwrap_err();
    assert_eq!(incident(&status).0, "E4012", "no provider is set up");
    let mut anyone = sessions(&mesh, Identity::Anonymous);
    let status = anyone.create_session(CreateSessionRequest::default()).await.unwrap_err();
    assert_eq!(incident(&status).0, "E4002");
    mesh.finish().await;
}

#[tokio::test]
async fn refresh_tokens_work_once_and_a_second_use_ends_the_session() {
    for store in Store::both().await {
        let mesh = TestMesh::start_on(&store, &[]).await;
        let kim = mesh.log_in_new_user("kim@example.com", &[]).await;
        works(&mesh, &kim.access_token).await.unwrap();
        let second = refresh(&mesh, &kim.refresh_token).await.unwrap();
        works(&mesh, &second.access_token).await.unwrap();
        let third = refresh(&mesh, &second.refresh_token).await.unwrap();
        assert_eq!(third.session.unwrap().session_id, kim.session_id);

        let status = refresh(&mesh, &kim.refresh_token).await.unwrap_err();
        assert_eq!(incident(&status).0, "E4007");
        ends(&mesh, &kim.access_token).await;
        ends(&mesh, &third.access_token).await;
        assert_eq!(incident(&refresh(&mesh, &third.refresh_token).await.unwrap_err()).0, "E4007");
        assert_eq!(incident(&refresh(&mesh, "hapr_made-up").await.unwrap_err()).0, "E4003");
        mesh.finish().await;
    }
}

#[tokio::test]
async fn of_many_concurrent_refreshes_one_gets_new_tokens() {
    for store in Store::both().await {
        let mesh = TestMesh::start_on(&store, &[]).await;
        let kim = mesh.log_in_new_user("kim@example.com", &[]).await;
        let mut calls = tokio::task::JoinSet::new();
        for _ in 0..8 {
            let mut anyone = sessions(&mesh, Identity::Anonymous);
            let request = RefreshSessionRequest { refresh_token: kim.refresh_token.clone() };
            calls.spawn(async move { anyone.refresh_session(request).await.is_ok() });
        }
        let passed = within("the calls", calls.join_all()).await;
        assert_eq!(passed.into_iter().filter(|passed| *passed).count(), 1);
        mesh.finish().await;
    }
}

#[tokio::test]
async fn one_session_or_all_of_a_user_can_be_ended() {
    for store in Store::both().await {
        let mesh = TestMesh::start_on(&store, &[]).await;
        let kim = mesh.log_in_new_user("kim@example.com", &[]).await;
        let others = [
            mesh.log_in("kim@example.com", PASSWORD).await.unwrap(),
            mesh.log_in("kim@example.com", PASSWORD).await.unwrap(),
        ];
        let mut own = sessions(&mesh, Identity::Session(&kim.access_token));
        let listed = own.list_sessions(ListSessionsRequest::default()).await.unwrap().into_inner();
        let ids: HashSet<_> = listed.sessions.iter().map(|one| one.session_id.clone()).collect();
        assert_eq!(ids.len(), 3);
        assert!(listed.sessions.iter().all(|one| one.address == "127.0.0.1"), "{listed:?}");

        let session_id = others[0].session.clone().unwrap().session_id;
        let one = RevokeSessionRequest { session_id, ..RevokeSessionRequest::default() };
        let done = own.revoke_session(one.clone()).await.unwrap().into_inner();
        assert_eq!(done.revoked_sessions, 1);
        ends(&mesh, &others[0].access_token).await;
        assert_eq!(own.revoke_session(one).await.unwrap().into_inner().revoked_sessions, 0);
        works(&mesh, &others[1].access_token).await.unwrap();

        let all_of_user = "me".to_owned();
        let all = RevokeSessionRequest { all_of_user, ..RevokeSessionRequest::default() };
        assert_eq!(own.revoke_session(all).await.unwrap().into_inner().revoked_sessions, 2);
        ends(&mesh, &others[1].access_token).await;
        ends(&mesh, &kim.access_token).await;
        mesh.finish().await;
    }
}

#[tokio::test]
async fn a_stream_ends_with_its_session_and_says_so_in_its_last_message() {
    let mesh = TestMesh::start().await;
    let kim = mesh.log_in_new_user("kim@example.com", &[]).await;
    mesh.engine.once(Script::tokens(["a", "b"]).hold(1));
    let mut client =
        CodegenServiceClient::new(mesh.channel_as(Identity::Session(&kim.access_token)));
    let mut frames = client.stream_generate_code(question("q")).await.unwrap().into_inner();
    within("the start", frames.message()).await.unwrap().unwrap();
    within("a token", frames.message()).await.unwrap().unwrap();
    let one =
        RevokeSessionRequest { session_id: kim.session_id, ..RevokeSessionRequest::default() };
    sessions(&mesh, Identity::Mesh).revoke_session(one).await.unwrap();
    let last = within("the last frame", frames.message()).await.unwrap().unwrap();
    let Some(Event::Failed(failed)) = last.event else { panic!("{last:?}") };
    assert_eq!((failed.error_code.as_str(), failed.partial), ("E4007", true));
    let status = within("the end", frames.message()).await.unwrap_err();
    assert_eq!(incident(&status), (failed.error_code, failed.incident_id));
    within("the engine to stop", mesh.engine.wait_for_aborted(1)).await;
    mesh.finish().await;
}

#[tokio::test]
async fn a_changed_or_foreign_token_is_unknown_and_another_secret_ends_all() {
    let mesh = TestMesh::start().await;
    let kim = mesh.log_in_new_user("kim@example.com", &[]).await;
    let (body, signature) = kim.access_token.rsplit_once('.').unwrap();
    let mut letters: Vec<char> = signature.chars().collect();
    letters[3] = if letters[3] == 'A' { 'B' } else { 'A' };
    let forged = format!("{body}.{}", letters.into_iter().collect::<String>());
    assert_eq!(incident(&works(&mesh, &forged).await.unwrap_err()).0, "E4003");
    mesh.finish().await;

    let store = &Store::both().await[1];
    let secret = |letter: &str| format!("--secret-key={}", letter.repeat(40));
    let mut mesh = TestMesh::start_on(store, &[&secret("a")]).await;
    let kim = mesh.log_in_new_user("kim@example.com", &[]).await;
    works(&mesh, &kim.access_token).await.unwrap();
    mesh.begin_shutdown();
    mesh.wait_until_stopped().await;
    let mesh = TestMesh::start_on(store, &[&secret("b")]).await;
    assert_eq!(incident(&works(&mesh, &kim.access_token).await.unwrap_err()).0, "E4003");
    mesh.finish().await;
}

#[tokio::test]
async fn an_address_that_guesses_has_to_wait_and_valid_credentials_from_there_do_not() {
    let mesh = TestMesh::start_with(&["--auth-failure-limit=5"]).await;
    let kim = mesh.log_in_new_user("kim@example.com", &[]).await;
    works(&mesh, &kim.access_token).await.unwrap();
    mesh.client().get_code_health(GetCodeHealthRequest {}).await.unwrap();
    for guess in 0..5 {
        let status = mesh.log_in("kim@example.com", &format!("guess {guess}")).await.unwrap_err();
        assert_eq!(incident(&status).0, "E4003");
    }
    let refused = [
        mesh.log_in("kim@example.com", "guess 6").await.unwrap_err(),
        works(&mesh, "a.b.c").await.unwrap_err(),
        mesh.client_with("hapa_wrong").generate_code(question("q")).await.unwrap_err(),
    ];
    for status in refused {
        assert_eq!(
            (incident(&status).0.as_str(), status.code()),
            ("E4004", Code::ResourceExhausted)
        );
        assert!(status.metadata().contains_key("retry-after"));
    }
    works(&mesh, &kim.access_token).await.unwrap();
    mesh.client().get_code_health(GetCodeHealthRequest {}).await.unwrap();
    let again = mesh.log_in("kim@example.com", PASSWORD).await.unwrap();
    works(&mesh, &again.access_token).await.unwrap();
    mesh.finish().await;
}

#[tokio::test]
async fn no_refresh_extends_a_session_beyond_its_longest_life() {
    const DAY: i64 = 86_400;
    let ended = |status: Status| assert_eq!(incident(&status).0, "E4007");
    for store in Store::both().await {
        let flags = ["--session-days=30", "--session-max-days=40"];
        let mesh = TestMesh::start_on(&store, &flags).await;
        let age = async |days: i64| {
            let micros = days * DAY * 1_000_000;
            store
                .execute(&format!("UPDATE sessions SET create_time = create_time - {micros}"))
                .await;
        };
        let kim = mesh.log_in_new_user("kim@example.com", &[]).await;
        age(20).await;
        let second = refresh(&mesh, &kim.refresh_token).await.unwrap();
        let session = second.session.unwrap();
        let life = session.expire_time.unwrap().seconds - session.create_time.unwrap().seconds;
        assert_eq!(life, 40 * DAY);
        // The session reached its maximum age, although its last refresh is recent.
        age(20).await;
        ended(works(&mesh, &second.access_token).await.unwrap_err());
        ended(refresh(&mesh, &second.refresh_token).await.unwrap_err());
        mesh.finish().await;

        let mesh = TestMesh::start_on(&store, &["--session-days=30", "--session-max-days=7"]).await;
        let reply = mesh.log_in("kim@example.com", PASSWORD).await.unwrap();
        let session = reply.session.unwrap();
        let life = session.expire_time.unwrap().seconds - session.create_time.unwrap().seconds;
        assert_eq!(life, 7 * DAY, "the longest life bounds the first one too");
        mesh.finish().await;
    }
}

#[tokio::test]
async fn a_session_that_outlived_a_shorter_setting_ends_when_a_server_starts() {
    for store in Store::both().await {
        let secret = "--secret-key=the-key-that-both-servers-of-a-test-have";
        let mut mesh = TestMesh::start_on(&store, &[secret, "--session-max-days=90"]).await;
        let kim = mesh.log_in_new_user("kim@example.com", &[]).await;
        mesh.begin_shutdown();
        mesh.wait_until_stopped().await;
        let micros = 8 * 86_400_000_000_i64;
        store.execute(&format!("UPDATE sessions SET create_time = create_time - {micros}")).await;

        let mesh = TestMesh::start_on(&store, &[secret, "--session-max-days=7"]).await;
        let user_id = kim.user.user_id.clone();
        within("the session to leave the list", async {
            loop {
                let request = ListSessionsRequest { user_id: user_id.clone() };
                let listed = sessions(&mesh, Identity::Mesh).list_sessions(request).await.unwrap();
                if listed.into_inner().sessions.is_empty() {
                    return;
                }
            }
        })
        .await;
        assert_eq!(incident(&works(&mesh, &kim.access_token).await.unwrap_err()).0, "E4007");
        mesh.finish().await;
    }
}

#[tokio::test]
async fn a_token_of_a_replica_with_a_fast_clock_is_accepted() {
    const SECRET: &str = "the-key-that-the-replicas-of-a-test-share";
    let mesh = TestMesh::start_with(&[&format!("--secret-key={SECRET}")]).await;
    let kim = mesh.log_in_new_user("kim@example.com", &[]).await;
    // As another replica would issue it at this moment by its own clock.
    let issued = |ahead: i64| {
        let part = |text: &str| {
            let bytes = BASE64.decode(text).unwrap();
            serde_json::from_slice::<Value>(&bytes).unwrap()
        };
        let [head, claims, _] = kim.access_token.split('.').collect::<Vec<_>>()[..] else {
            panic!("it is no token")
        };
        let mut claims = part(claims);
        let now = claims["iat"].as_i64().unwrap() + ahead;
        (claims["iat"], claims["nbf"], claims["exp"]) = (json!(now), json!(now), json!(now + 900));
        claims["jti"] = json!(format!("ahead by {ahead}"));
        let text = format!("{head}.{}", BASE64.encode(claims.to_string()));
        let secret = hmac::Key::new(hmac::HMAC_SHA256, SECRET.as_bytes());
        let key = hmac::sign(&secret, b"hapa session token v1");
        let key = hmac::Key::new(hmac::HMAC_SHA256, key.as_ref());
        format!("{text}.{}", BASE64.encode(hmac::sign(&key, text.as_bytes())))
    };
    for ahead in [0, 2, 30, 55] {
        works(&mesh, &issued(ahead)).await.unwrap();
    }
    // Beyond the tolerated clock skew, whatever time the test takes.
    let status = works(&mesh, &issued(3_600)).await.unwrap_err();
    assert_eq!(incident(&status).0, "E4003");
    mesh.finish().await;
}

#[tokio::test]
async fn secrets_are_rotated_without_an_effect_on_open_sessions() {
    const OLD: [&str; 2] = [
        "--api-key-pepper=the-old-pepper-of-more-than-32-characters",
        "--secret-key=the-old-key-of-more-than-thirty-two-characters",
    ];
    const NEW: [&str; 2] = [
        "--api-key-pepper=the-new-pepper-of-more-than-32-characters",
        "--secret-key=the-new-key-of-more-than-thirty-two-characters",
    ];
    const BOTH: [&str; 4] = [
        "--api-key-pepper-previous=the-old-pepper-of-more-than-32-characters",
        "--secret-key-previous=the-old-key-of-more-than-thirty-two-characters",
        NEW[0],
        NEW[1],
    ];
    for store in Store::both().await {
        let mut mesh = TestMesh::start_on(&store, &OLD).await;
        let (busy, idle) = (mesh.key.clone(), mesh.create_key(TestMesh::dev_key()).await.key_text);
        let kim = mesh.log_in_new_user("kim@example.com", &[]).await;
        mesh.begin_shutdown();
        mesh.wait_until_stopped().await;

        let mut mesh = TestMesh::start_on(&store, &BOTH).await;
        knows(&mesh, Identity::Key(&busy)).await.unwrap();
        works(&mesh, &kim.access_token).await.unwrap();
        let next = refresh(&mesh, &kim.refresh_token).await.unwrap();
        works(&mesh, &next.access_token).await.unwrap();
        let made = mesh.create_key(TestMesh::dev_key()).await.key_text;
        mesh.begin_shutdown();
        mesh.wait_until_stopped().await;

        let mesh = TestMesh::start_on(&store, &NEW).await;
        for key in [&busy, &made] {
            knows(&mesh, Identity::Key(key)).await.unwrap();
        }
        let status = knows(&mesh, Identity::Key(&idle)).await.unwrap_err();
        assert_eq!(incident(&status).0, "E4003", "nobody used it while both peppers counted");
        let status = works(&mesh, &kim.access_token).await.unwrap_err();
        assert_eq!(incident(&status).0, "E4003", "its key is gone");
        works(&mesh, &next.access_token).await.unwrap();
        let last = refresh(&mesh, &next.refresh_token).await.unwrap();
        let status = refresh(&mesh, &kim.refresh_token).await.unwrap_err();
        assert_eq!(incident(&status).0, "E4007", "a second use, of what the old pepper kept");
        ends(&mesh, &last.access_token).await;
        mesh.finish().await;
    }
}
