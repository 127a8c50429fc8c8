//! Admission: deny by default, scopes, expiry, limits, and the behaviour without auth.

use std::time::{Duration, SystemTime};

use hapa_proto::auth::v1::auth_service_client::AuthServiceClient;
use hapa_proto::auth::v1::create_key_request::Expiry;
use hapa_proto::auth::v1::key_service_client::KeyServiceClient;
use hapa_proto::auth::v1::{AuthenticateRequest, ListKeysRequest, RateLimit, RevokeKeyRequest};
use hapa_proto::codegen::v1::GetCodeHealthRequest;
use hapa_test_harness::{TestMesh, incident, within};
use secrecy::ExposeSecret as _;
use tonic::{Code, Request};
use tonic_types::StatusExt as _;

use crate::api::generate::question;

#[tokio::test]
async fn no_key_a_wrong_key_and_one_mistyped_character_are_e4003() {
    let mesh = TestMesh::start().await;
    let mistyped = {
        let mut letters: Vec<_> = mesh.key.chars().collect();
        letters[20] = if letters[20] == 'x' { 'y' } else { 'x' };
        letters.into_iter().collect::<String>()
    };
    let (_, of_nobody) = hapa_core::key_format::mint();
    let of_nobody = of_nobody.expose_secret();
    let clients = [mesh.anonymous(), mesh.client_with(&mistyped), mesh.client_with("sk-else")];
    for mut client in clients {
        let status = client.generate_code(question("q")).await.unwrap_err();
        assert_eq!((incident(&status).0.as_str(), status.code()), ("E4003", Code::Unauthenticated));
    }
    let status = mesh.client_with(of_nobody).generate_code(question("q")).await.unwrap_err();
    assert_eq!(incident(&status).0, "E4003");
    assert_eq!(mesh.engine.counts().started, 0);
    mesh.finish().await;
}

#[tokio::test]
async fn a_key_is_taken_as_bearer_too() {
    let mesh = TestMesh::start().await;
    let mut request = Request::new(question("q"));
    request.metadata_mut().insert("authorization", format!("bearer {}", mesh.key).parse().unwrap());
    assert!(mesh.anonymous().generate_code(request).await.is_ok());
    mesh.finish().await;
}

#[tokio::test]
async fn a_missing_scope_is_e4005_and_names_the_scope() {
    let mesh = TestMesh::start().await;
    let mut request = TestMesh::dev_key();
    request.scopes = vec!["analytics:read".to_owned()];
    let key = mesh.create_key(request).await.key_text;
    let status = mesh.client_with(&key).generate_code(question("q")).await.unwrap_err();
    assert_eq!((incident(&status).0.as_str(), status.code()), ("E4005", Code::PermissionDenied));
    assert!(status.message().contains("codegen:generate"), "{}", status.message());
    let status = mesh.keys_with(&key).create_key(TestMesh::dev_key()).await.unwrap_err();
    assert_eq!(incident(&status).0, "E4005");
    assert!(mesh.client_with(&key).get_code_health(GetCodeHealthRequest {}).await.is_ok());
    mesh.finish().await;
}

#[tokio::test]
async fn an_expired_and_a_revoked_key_are_e4007() {
    let mesh = TestMesh::start().await;
    let mut request = TestMesh::dev_key();
    let soon = SystemTime::now() + Duration::from_millis(400);
    request.expiry = Some(Expiry::ExpireTime(soon.into()));
    let expiring = mesh.create_key(request).await.key_text;
    let mut client = mesh.client_with(&expiring);
    within("the key to expire, also where it is known", async {
        while client.get_code_health(GetCodeHealthRequest {}).await.is_ok() {}
    })
    .await;
    assert!(SystemTime::now() >= soon);
    let status = client.generate_code(question("q")).await.unwrap_err();
    assert_eq!((incident(&status).0.as_str(), status.code()), ("E4007", Code::Unauthenticated));

    let made = mesh.create_key(TestMesh::dev_key()).await;
    let key_id = made.key.unwrap().key_id;
    mesh.keys().revoke_key(RevokeKeyRequest { key_id }).await.unwrap();
    let status = mesh.client_with(&made.key_text).generate_code(question("q")).await.unwrap_err();
    assert_eq!((incident(&status).0.as_str(), status.code()), ("E4007", Code::Unauthenticated));
    mesh.finish().await;
}

#[tokio::test]
async fn call_51_in_a_minute_is_e4004_with_headers_and_the_time_to_wait() {
    let mesh = TestMesh::start().await;
    let mut request = TestMesh::dev_key();
    request.rate_limits.clear();
    let mut client = mesh.client_with(&mesh.create_key(request).await.key_text);
    for call in 1..=50u32 {
        let reply = client.generate_code(question("q")).await.unwrap();
        assert_eq!(reply.metadata().get("ratelimit-limit").unwrap(), "50");
        let remaining = reply.metadata().get("ratelimit-remaining").unwrap().to_str().unwrap();
        assert_eq!(remaining, (50 - call).to_string());
    }
    let status = client.generate_code(question("q")).await.unwrap_err();
    assert_eq!((incident(&status).0.as_str(), status.code()), ("E4004", Code::ResourceExhausted));
    let wait = status.get_details_retry_info().unwrap().retry_delay.unwrap();
    assert!(!wait.is_zero() && wait <= Duration::from_secs(61), "{wait:?}");
    assert!(status.get_details_quota_failure().is_some());
    for header in ["retry-after", "ratelimit-limit", "ratelimit-remaining", "ratelimit-reset"] {
        assert!(status.metadata().contains_key(header), "{header} is missing");
    }
    // Another method counts apart.
    assert!(client.stream_generate_code(question("q")).await.is_ok());
    mesh.finish().await;
}

#[tokio::test]
async fn exactly_as_many_as_allowed_of_many_calls_at_once_pass() {
    let mesh = TestMesh::start().await;
    let mut request = TestMesh::dev_key();
    let limit = RateLimit { method: "GetCodeHealth".to_owned(), limit: 20, window_seconds: 3_600 };
    request.rate_limits = vec![limit];
    let key = mesh.create_key(request).await.key_text;
    let mut calls = tokio::task::JoinSet::new();
    for _ in 0..100 {
        let mut client = mesh.client_with(&key);
        calls.spawn(async move { client.get_code_health(GetCodeHealthRequest {}).await.is_ok() });
    }
    let passed = within("the calls", calls.join_all()).await;
    assert_eq!(passed.into_iter().filter(|passed| *passed).count(), 20);
    mesh.finish().await;
}

#[tokio::test]
async fn limits_can_be_turned_off() {
    let mesh = TestMesh::start_with(&["--rate-limit-enabled=false"]).await;
    let mut request = TestMesh::dev_key();
    request.rate_limits = vec![RateLimit { method: "*".to_owned(), limit: 1, window_seconds: 60 }];
    let mut client = mesh.client_with(&mesh.create_key(request).await.key_text);
    for _ in 0..3 {
        assert!(client.get_code_health(GetCodeHealthRequest {}).await.is_ok());
    }
    mesh.finish().await;
}

#[tokio::test]
async fn what_is_for_services_takes_the_mesh_token_and_nothing_else() {
    let mesh = TestMesh::start().await;
    let mut auth = AuthServiceClient::new(mesh.connect().await);
    let ask = |header: &'static str, value: &str| {
        let mut request = Request::new(AuthenticateRequest {
            credential_digest: vec![0; 32],
            ..AuthenticateRequest::default()
        });
        request.metadata_mut().insert(header, value.parse().unwrap());
        request
    };
    for (header, value) in [("x-api-key", mesh.key.as_str()), ("x-mesh-token", "guess")] {
        let status = auth.authenticate(ask(header, value)).await.unwrap_err();
        assert_eq!((incident(&status).0.as_str(), status.code()), ("E4003", Code::Unauthenticated));
    }
    let status = auth.authenticate(ask("x-mesh-token", mesh.mesh_token())).await.unwrap_err();
    assert_eq!((incident(&status).0.as_str(), status.code()), ("E4010", Code::NotFound));
    mesh.finish().await;
}

#[tokio::test]
async fn two_mesh_tokens_are_accepted_while_one_is_being_replaced() {
    const NEXT: &str = "the-mesh-token-that-comes-next-is-long-too";
    for (also, text, is_accepted) in [(NEXT, NEXT, true), (NEXT, "", false), ("", "", false)] {
        let mesh = TestMesh::start_with(&[&format!("--mesh-token-previous={also}")]).await;
        for (token, is_accepted) in [(mesh.mesh_token(), true), (text, is_accepted)] {
            let mut request = Request::new(ListKeysRequest::default());
            request.metadata_mut().insert("x-mesh-token", token.parse().unwrap());
            let listed = KeyServiceClient::new(mesh.connect().await).list_keys(request).await;
            assert_eq!(listed.is_ok(), is_accepted, "{also:?} {token:?}: {listed:?}");
        }
        mesh.finish().await;
    }
}

#[tokio::test]
async fn a_key_that_cannot_be_checked_is_unavailable_and_never_passed_or_called_wrong() {
    // The address of an auth service on which no process listens.
    let nobody = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = format!("--auth-address=http://{}", nobody.local_addr().unwrap());
    drop(nobody);
    let mesh = TestMesh::start_with(&[&address]).await;
    let status = mesh.client().generate_code(question("q")).await.unwrap_err();
    assert_eq!((incident(&status).0.as_str(), status.code()), ("E5003", Code::Unavailable));
    assert_eq!(mesh.engine.counts().started, 0);
    mesh.finish().await;
}

#[tokio::test]
async fn too_many_calls_at_once_are_shed_with_the_time_to_come_back() {
    let mesh = TestMesh::start_with(&["--max-in-flight=1"]).await;
    mesh.engine.once(hapa_engine_sim::Script::tokens(["a", "b"]).hold(1));
    // The call that created the key holds its permit until its connection releases it.
    let mut frames = within("the only place", async {
        loop {
            if let Ok(reply) = mesh.client().stream_generate_code(question("q")).await {
                return reply.into_inner();
            }
        }
    })
    .await;
    within("the first frame", frames.message()).await.unwrap();
    let status = mesh.client().generate_code(question("q")).await.unwrap_err();
    assert_eq!((incident(&status).0.as_str(), status.code()), ("E5005", Code::Unavailable));
    assert!(status.get_details_retry_info().is_some());
    mesh.engine.release();
    within("the end", async { while frames.message().await.unwrap().is_some() {} }).await;
    drop(frames);
    within("the place to be free", async {
        while mesh.client().generate_code(question("q")).await.is_err() {}
    })
    .await;
    mesh.finish().await;
}
