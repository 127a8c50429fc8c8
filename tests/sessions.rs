//! Sessions: in with a password, on with refresh tokens, out at once.

mod identity;

use std::collections::HashSet;

use base64::Engine as _;
use base64::prelude::BASE64_URL_SAFE_NO_PAD as BASE64;
use hapa_proto::auth::v1::create_session_request::Proof;
use hapa_proto::auth::v1::session_service_client::SessionServiceClient;
use hapa_proto::auth::v1::{
    CreateSessionRequest, CreateSessionResponse, ListSessionsRequest, RefreshSessionRequest,
    RefreshSessionResponse, RevokeSessionRequest,
};
use hapa_proto::codegen::v1::GetCodeHealthRequest;
use hapa_proto::codegen::v1::codegen_service_client::CodegenServiceClient;
use hapa_proto::codegen::v1::stream_generate_code_response::Event;
use hapa_tests::engine::Script;
use hapa_tests::{PASSWORD, Store, Who, Wire, World, incident, within};
use ring::hmac;
use serde_json::{Value, json};
use tonic::{Code, Status};

use crate::generate::question;

fn sessions(world: &World, who: Who<'_>) -> SessionServiceClient<Wire> {
    SessionServiceClient::new(world.wire(who))
}

async fn prove(world: &World, proof: Proof) -> Result<CreateSessionResponse, Status> {
    let request = CreateSessionRequest { proof: Some(proof), http_body: None };
    let mut anyone = sessions(world, Who::Stranger);
    Ok(within("a session", anyone.create_session(request)).await?.into_inner())
}

async fn refresh(world: &World, token: &str) -> Result<RefreshSessionResponse, Status> {
    let request = RefreshSessionRequest { refresh_token: token.to_owned() };
    let mut anyone = sessions(world, Who::Stranger);
    Ok(within("new tokens", anyone.refresh_session(request)).await?.into_inner())
}

async fn knows(world: &World, who: Who<'_>) -> Result<(), Status> {
    let mut client = CodegenServiceClient::new(world.wire(who));
    within("a call", client.get_code_health(GetCodeHealthRequest {})).await.map(drop)
}

async fn works(world: &World, token: &str) -> Result<(), Status> {
    knows(world, Who::Session(token)).await
}

async fn ends(world: &World, token: &str) {
    within("the session to end", async { while works(world, token).await.is_ok() {} }).await;
    let status = works(world, token).await.unwrap_err();
    assert_eq!((incident(&status).0.as_str(), status.code()), ("E4007", Code::Unauthenticated));
}

#[tokio::test]
async fn a_wrong_password_and_an_unknown_address_are_told_the_same() {
    let world = World::start().await;
    world.person("kim@example.com", &[]).await;
    let wrong = world.log_in("kim@example.com", "a wrong password").await.unwrap_err();
    let unknown = world.log_in("nobody@example.com", PASSWORD).await.unwrap_err();
    assert_eq!((incident(&wrong).0.as_str(), wrong.code()), ("E4003", Code::Unauthenticated));
    assert_eq!((incident(&unknown).0, unknown.message()), (incident(&wrong).0, wrong.message()));
    let status = prove(&world, Proof::IdToken("a.b.c".to_owned())).await.unwrap_err();
    assert_eq!(incident(&status).0, "E4012", "no provider is set up");
    let mut anyone = sessions(&world, Who::Stranger);
    let status = anyone.create_session(CreateSessionRequest::default()).await.unwrap_err();
    assert_eq!(incident(&status).0, "E4002");
    world.end().await;
}

#[tokio::test]
async fn refresh_tokens_work_once_and_a_second_use_ends_the_session() {
    for store in Store::both().await {
        let world = World::on(&store, &[]).await;
        let kim = world.person("kim@example.com", &[]).await;
        works(&world, &kim.access_token).await.unwrap();
        let second = refresh(&world, &kim.refresh_token).await.unwrap();
        works(&world, &second.access_token).await.unwrap();
        let third = refresh(&world, &second.refresh_token).await.unwrap();
        assert_eq!(third.session.unwrap().session_id, kim.session_id);

        let status = refresh(&world, &kim.refresh_token).await.unwrap_err();
        assert_eq!(incident(&status).0, "E4007");
        ends(&world, &kim.access_token).await;
        ends(&world, &third.access_token).await;
        assert_eq!(incident(&refresh(&world, &third.refresh_token).await.unwrap_err()).0, "E4007");
        assert_eq!(incident(&refresh(&world, "hapr_made-up").await.unwrap_err()).0, "E4003");
        world.end().await;
    }
}

#[tokio::test]
async fn of_many_who_refresh_at_once_one_gets_new_tokens() {
    for store in Store::both().await {
        let world = World::on(&store, &[]).await;
        let kim = world.person("kim@example.com", &[]).await;
        let mut calls = tokio::task::JoinSet::new();
        for _ in 0..8 {
            let mut anyone = sessions(&world, Who::Stranger);
            let request = RefreshSessionRequest { refresh_token: kim.refresh_token.clone() };
            calls.spawn(async move { anyone.refresh_session(request).await.is_ok() });
        }
        let passed = within("the calls", calls.join_all()).await;
        assert_eq!(passed.into_iter().filter(|passed| *passed).count(), 1);
        world.end().await;
    }
}

#[tokio::test]
async fn one_session_or_all_of_a_user_can_be_ended() {
    for store in Store::both().await {
        let world = World::on(&store, &[]).await;
        let kim = world.person("kim@example.com", &[]).await;
        let others = [
            world.log_in("kim@example.com", PASSWORD).await.unwrap(),
            world.log_in("kim@example.com", PASSWORD).await.unwrap(),
        ];
        let mut own = sessions(&world, Who::Session(&kim.access_token));
        let listed = own.list_sessions(ListSessionsRequest::default()).await.unwrap().into_inner();
        let ids: HashSet<_> = listed.sessions.iter().map(|one| one.session_id.clone()).collect();
        assert_eq!(ids.len(), 3);
        assert!(listed.sessions.iter().all(|one| one.address == "127.0.0.1"), "{listed:?}");

        let session_id = others[0].session.clone().unwrap().session_id;
        let one = RevokeSessionRequest { session_id, ..RevokeSessionRequest::default() };
        let done = own.revoke_session(one.clone()).await.unwrap().into_inner();
        assert_eq!(done.revoked_sessions, 1);
        ends(&world, &others[0].access_token).await;
        assert_eq!(own.revoke_session(one).await.unwrap().into_inner().revoked_sessions, 0);
        works(&world, &others[1].access_token).await.unwrap();

        let all_of_user = "me".to_owned();
        let all = RevokeSessionRequest { all_of_user, ..RevokeSessionRequest::default() };
        assert_eq!(own.revoke_session(all).await.unwrap().into_inner().revoked_sessions, 2);
        ends(&world, &others[1].access_token).await;
        ends(&world, &kim.access_token).await;
        world.end().await;
    }
}

#[tokio::test]
async fn a_stream_ends_with_its_session_and_says_so_in_its_last_message() {
    let world = World::start().await;
    let kim = world.person("kim@example.com", &[]).await;
    world.engine.once(Script::tokens(["a", "b"]).hold(1));
    let mut client = CodegenServiceClient::new(world.wire(Who::Session(&kim.access_token)));
    let mut frames = client.stream_generate_code(question("q")).await.unwrap().into_inner();
    within("the start", frames.message()).await.unwrap().unwrap();
    within("a token", frames.message()).await.unwrap().unwrap();
    let one =
        RevokeSessionRequest { session_id: kim.session_id, ..RevokeSessionRequest::default() };
    sessions(&world, Who::Mesh).revoke_session(one).await.unwrap();
    let last = within("the last frame", frames.message()).await.unwrap().unwrap();
    let Some(Event::Failed(failed)) = last.event else { panic!("{last:?}") };
    assert_eq!((failed.error_code.as_str(), failed.partial), ("E4007", true));
    let status = within("the end", frames.message()).await.unwrap_err();
    assert_eq!(incident(&status), (failed.error_code, failed.incident_id));
    within("the engine to stop", world.engine.wait_for_aborted(1)).await;
    world.end().await;
}

#[tokio::test]
async fn a_changed_or_foreign_token_is_unknown_and_another_secret_ends_all() {
    let world = World::start().await;
    let kim = world.person("kim@example.com", &[]).await;
    let (body, signature) = kim.access_token.rsplit_once('.').unwrap();
    let mut letters: Vec<char> = signature.chars().collect();
    letters[3] = if letters[3] == 'A' { 'B' } else { 'A' };
    let forged = format!("{body}.{}", letters.into_iter().collect::<String>());
    assert_eq!(incident(&works(&world, &forged).await.unwrap_err()).0, "E4003");
    world.end().await;

    let store = &Store::both().await[1];
    let secret = |letter: &str| format!("--secret-key={}", letter.repeat(40));
    let mut world = World::on(store, &[&secret("a")]).await;
    let kim = world.person("kim@example.com", &[]).await;
    works(&world, &kim.access_token).await.unwrap();
    world.begin_shutdown();
    world.ended().await;
    let world = World::on(store, &[&secret("b")]).await;
    assert_eq!(incident(&works(&world, &kim.access_token).await.unwrap_err()).0, "E4003");
    world.end().await;
}

#[tokio::test]
async fn an_address_that_guesses_has_to_wait_and_valid_credentials_from_there_do_not() {
    let world = World::with(&["--auth-failure-limit=5"]).await;
    let kim = world.person("kim@example.com", &[]).await;
    works(&world, &kim.access_token).await.unwrap();
    world.client().get_code_health(GetCodeHealthRequest {}).await.unwrap();
    for guess in 0..5 {
        let status = world.log_in("kim@example.com", &format!("guess {guess}")).await.unwrap_err();
        assert_eq!(incident(&status).0, "E4003");
    }
    let refused = [
        world.log_in("kim@example.com", "guess 6").await.unwrap_err(),
        works(&world, "a.b.c").await.unwrap_err(),
        world.client_with("hapa_wrong").generate_code(question("q")).await.unwrap_err(),
    ];
    for status in refused {
        assert_eq!(
            (incident(&status).0.as_str(), status.code()),
            ("E4004", Code::ResourceExhausted)
        );
        assert!(status.metadata().contains_key("retry-after"));
    }
    works(&world, &kim.access_token).await.unwrap();
    world.client().get_code_health(GetCodeHealthRequest {}).await.unwrap();
    let again = world.log_in("kim@example.com", PASSWORD).await.unwrap();
    works(&world, &again.access_token).await.unwrap();
    world.end().await;
}

#[tokio::test]
async fn no_refresh_extends_a_session_beyond_its_longest_life() {
    const DAY: i64 = 86_400;
    let ended = |status: Status| assert_eq!(incident(&status).0, "E4007");
    for store in Store::both().await {
        let flags = ["--session-days=30", "--session-max-days=40"];
        let world = World::on(&store, &flags).await;
        let age = async |days: i64| {
            let micros = days * DAY * 1_000_000;
            store
                .execute(&format!("UPDATE sessions SET create_time = create_time - {micros}"))
                .await;
        };
        let kim = world.person("kim@example.com", &[]).await;
        age(20).await;
        let second = refresh(&world, &kim.refresh_token).await.unwrap();
        let session = second.session.unwrap();
        let life = session.expire_time.unwrap().seconds - session.create_time.unwrap().seconds;
        assert_eq!(life, 40 * DAY);
        // It was refreshed a moment ago, and is over.
        age(20).await;
        ended(works(&world, &second.access_token).await.unwrap_err());
        ended(refresh(&world, &second.refresh_token).await.unwrap_err());
        world.end().await;

        let world = World::on(&store, &["--session-days=30", "--session-max-days=7"]).await;
        let reply = world.log_in("kim@example.com", PASSWORD).await.unwrap();
        let session = reply.session.unwrap();
        let life = session.expire_time.unwrap().seconds - session.create_time.unwrap().seconds;
        assert_eq!(life, 7 * DAY, "the longest life bounds the first one too");
        world.end().await;
    }
}

#[tokio::test]
async fn a_session_that_outlived_a_shorter_setting_ends_when_a_server_starts() {
    for store in Store::both().await {
        let secret = "--secret-key=the-key-that-both-servers-of-a-test-have";
        let mut world = World::on(&store, &[secret, "--session-max-days=90"]).await;
        let kim = world.person("kim@example.com", &[]).await;
        world.begin_shutdown();
        world.ended().await;
        let micros = 8 * 86_400_000_000_i64;
        store.execute(&format!("UPDATE sessions SET create_time = create_time - {micros}")).await;

        let world = World::on(&store, &[secret, "--session-max-days=7"]).await;
        let user_id = kim.user.user_id.clone();
        within("the session to leave the list", async {
            loop {
                let request = ListSessionsRequest { user_id: user_id.clone() };
                let listed = sessions(&world, Who::Mesh).list_sessions(request).await.unwrap();
                if listed.into_inner().sessions.is_empty() {
                    return;
                }
            }
        })
        .await;
        assert_eq!(incident(&works(&world, &kim.access_token).await.unwrap_err()).0, "E4007");
        world.end().await;
    }
}

#[tokio::test]
async fn a_token_of_a_replica_whose_clock_is_ahead_is_accepted() {
    const SECRET: &str = "the-key-that-the-replicas-of-a-test-share";
    let world = World::with(&[&format!("--secret-key={SECRET}")]).await;
    let kim = world.person("kim@example.com", &[]).await;
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
        works(&world, &issued(ahead)).await.unwrap();
    }
    // Far beyond what clocks differ by, whatever time the test takes.
    let status = works(&world, &issued(3_600)).await.unwrap_err();
    assert_eq!(incident(&status).0, "E4003");
    world.end().await;
}

#[tokio::test]
async fn secrets_are_replaced_and_who_is_in_use_notices_nothing() {
    const OLD: [&str; 2] = [
        "--api-key-pepper=the-old-pepper-of-more-than-32-characters",
        "--secret-key=the-old-key-of-more-than-thirty-two-characters",
    ];
    const NEW: [&str; 2] = [
        "--api-key-pepper=the-new-pepper-of-more-than-32-characters",
        "--secret-key=the-new-key-of-more-than-thirty-two-characters",
    ];
    const BOTH: [&str; 4] = [
        "--api-key-pepper-also=the-old-pepper-of-more-than-32-characters",
        "--secret-key-also=the-old-key-of-more-than-thirty-two-characters",
        NEW[0],
        NEW[1],
    ];
    for store in Store::both().await {
        let mut world = World::on(&store, &OLD).await;
        let (busy, idle) = (world.key.clone(), world.create_key(World::dev_key()).await.key_text);
        let kim = world.person("kim@example.com", &[]).await;
        world.begin_shutdown();
        world.ended().await;

        let mut world = World::on(&store, &BOTH).await;
        knows(&world, Who::Key(&busy)).await.unwrap();
        works(&world, &kim.access_token).await.unwrap();
        let next = refresh(&world, &kim.refresh_token).await.unwrap();
        works(&world, &next.access_token).await.unwrap();
        let made = world.create_key(World::dev_key()).await.key_text;
        world.begin_shutdown();
        world.ended().await;

        let world = World::on(&store, &NEW).await;
        for key in [&busy, &made] {
            knows(&world, Who::Key(key)).await.unwrap();
        }
        let status = knows(&world, Who::Key(&idle)).await.unwrap_err();
        assert_eq!(incident(&status).0, "E4003", "nobody used it while both peppers counted");
        let status = works(&world, &kim.access_token).await.unwrap_err();
        assert_eq!(incident(&status).0, "E4003", "its key is gone");
        works(&world, &next.access_token).await.unwrap();
        let last = refresh(&world, &next.refresh_token).await.unwrap();
        let status = refresh(&world, &kim.refresh_token).await.unwrap_err();
        assert_eq!(incident(&status).0, "E4007", "a second use, of what the old pepper kept");
        ends(&world, &last.access_token).await;
        world.end().await;
    }
}
