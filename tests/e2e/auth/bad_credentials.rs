//! Wrong credentials beside valid ones of one network: only wrong credentials are counted and refused.

use hapa_proto::auth::v1::{CreateKeyRequest, RevokeKeyRequest};
use hapa_proto::codegen::v1::GetCodeHealthRequest;
use hapa_proto::codegen::v1::codegen_service_client::CodegenServiceClient;
use hapa_test_harness::{Identity, PASSWORD, TestMesh, incident, within};
use secrecy::ExposeSecret as _;
use tonic::{Request, Status};

/// Failed attempts per address and minute in these tests.
const LIMIT: usize = 5;

async fn mesh() -> TestMesh {
    TestMesh::start_with(&[
        &format!("--auth-failure-limit={LIMIT}"),
        "--trusted-proxies=127.0.0.0/8",
    ])
    .await
}

async fn call(mesh: &TestMesh, key: &str) -> Result<(), Status> {
    let mut client = mesh.client_with(key);
    within("an answer", client.get_code_health(GetCodeHealthRequest {})).await.map(drop)
}

/// A call with a well-formed key that was never made, from an address.
async fn guess(mesh: &TestMesh, from: &str) -> String {
    let (_, key) = hapa_core::key_format::mint();
    let mut client = CodegenServiceClient::new(mesh.channel_as(Identity::Key(key.expose_secret())));
    let mut request = Request::new(GetCodeHealthRequest {});
    request.metadata_mut().insert("x-forwarded-for", from.parse().unwrap());
    let status = within("a refusal", client.get_code_health(request)).await.unwrap_err();
    incident(&status).0
}

#[tokio::test]
async fn a_key_that_is_not_known_yet_is_let_in_while_its_address_guesses() {
    let mesh = mesh().await;
    let fresh = mesh.create_key(TestMesh::dev_key()).await.key_text;
    for number in 0..LIMIT + 5 {
        let expected = if number < LIMIT { "E4003" } else { "E4004" };
        assert_eq!(guess(&mesh, "127.0.0.1").await, expected, "guess {number}");
    }
    call(&mesh, &fresh).await.expect("a valid key is let in whatever its address did");
    assert_eq!(guess(&mesh, "127.0.0.1").await, "E4004");
    mesh.finish().await;
}

#[tokio::test]
async fn many_valid_keys_are_let_in_at_once_from_an_address_over_its_limit() {
    let mesh = mesh().await;
    let mut keys = Vec::new();
    for _ in 0..20 {
        keys.push(mesh.create_key(TestMesh::dev_key()).await.key_text);
    }
    for _ in 0..LIMIT {
        guess(&mesh, "127.0.0.1").await;
    }
    let guesses = async {
        for _ in 0..40 {
            assert_eq!(guess(&mesh, "127.0.0.1").await, "E4004");
        }
    };
    let calls = futures_util::future::join_all(keys.iter().map(|key| call(&mesh, key)));
    let (calls, ()) = futures_util::future::join(calls, guesses).await;
    assert!(calls.iter().all(Result::is_ok), "{calls:?}");
    mesh.finish().await;
}

#[tokio::test]
async fn a_wrong_or_ended_key_that_one_client_repeats_does_not_fill_the_limit() {
    let mesh = mesh().await;
    let (_, unknown) = hapa_core::key_format::mint();
    let revoked = mesh.create_key(TestMesh::dev_key()).await;
    let key_id = revoked.key.unwrap().key_id;
    mesh.keys().revoke_key(RevokeKeyRequest { key_id }).await.unwrap();
    for (key, code) in [(unknown.expose_secret(), "E4003"), (revoked.key_text.as_str(), "E4007")] {
        for repetition in 0..LIMIT * 4 {
            let status = call(&mesh, key).await.unwrap_err();
            assert_eq!(incident(&status).0, code, "repetition {repetition}");
        }
    }
    mesh.finish().await;
}

#[tokio::test]
async fn an_ipv6_client_is_counted_by_its_64() {
    let mesh = mesh().await;
    for host in 1..=LIMIT {
        assert_eq!(guess(&mesh, &format!("2001:db8:0:1::{host:x}")).await, "E4003");
    }
    assert_eq!(guess(&mesh, "2001:db8:0:1:ffff::1").await, "E4004", "another host of the /64");
    assert_eq!(guess(&mesh, "2001:db8:0:2::1").await, "E4003", "another /64");
    assert_eq!(guess(&mesh, "203.0.113.7").await, "E4003", "an IPv4 address");
    mesh.finish().await;
}

#[tokio::test]
async fn a_right_password_logs_in_from_an_address_over_its_limit_and_a_wrong_one_does_not() {
    let mesh = mesh().await;
    mesh.log_in_new_user("kim@example.com", &[]).await;
    for _ in 0..LIMIT {
        guess(&mesh, "127.0.0.1").await;
    }
    let wrong = mesh.log_in("kim@example.com", "not the password").await.unwrap_err();
    assert_eq!(incident(&wrong).0, "E4004");
    assert!(wrong.metadata().contains_key("retry-after"));
    mesh.log_in("kim@example.com", PASSWORD).await.expect("the right password");
    mesh.finish().await;
}

#[tokio::test]
async fn an_accounts_password_is_tried_ten_times_a_minute_from_one_address() {
    let mesh = TestMesh::start_with(&["--auth-failure-limit=1000"]).await;
    mesh.log_in_new_user("kim@example.com", &[]).await;
    mesh.log_in_new_user("lee@example.com", &[]).await;
    let tries = (0..30).map(|number| {
        let (mesh, spelling) = (&mesh, ["kim@example.com", "Kim@Example.com"][number % 2]);
        async move { mesh.log_in(spelling, &format!("wrong {number}")).await.unwrap_err() }
    });
    let refused = futures_util::future::join_all(tries).await;
    let codes: Vec<_> = refused.iter().map(|status| incident(status).0).collect();
    let of = |code: &str| codes.iter().filter(|one| *one == code).count();
    assert_eq!((of("E4003"), of("E4004")), (10, 20), "{codes:?}");
    // The limit applies to this account from this address, not to other accounts.
    let right = mesh.log_in("kim@example.com", PASSWORD).await.unwrap_err();
    assert_eq!(incident(&right).0, "E4004");
    mesh.log_in("lee@example.com", PASSWORD).await.expect("another account");
    mesh.finish().await;
}

#[tokio::test]
async fn an_empty_credential_is_not_set() {
    let mesh = mesh().await;
    let key = mesh.create_key(CreateKeyRequest { ..TestMesh::dev_key() }).await.key_text;
    let call = async |headers: &[(&'static str, &str)]| {
        let mut client = CodegenServiceClient::new(mesh.channel_as(Identity::Anonymous));
        let mut request = Request::new(GetCodeHealthRequest {});
        for (name, value) in headers {
            request.metadata_mut().append(*name, value.parse().unwrap());
        }
        within("an answer", client.get_code_health(request)).await
    };
    let bearer = format!("Bearer {key}");
    for headers in [
        [("x-api-key", ""), ("authorization", bearer.as_str())],
        [("x-api-key", "  "), ("authorization", bearer.as_str())],
        [("x-api-key", ""), ("x-api-key", key.as_str())],
        [("authorization", "Bearer "), ("x-api-key", key.as_str())],
        [("authorization", ""), ("authorization", bearer.as_str())],
    ] {
        call(&headers).await.unwrap_or_else(|status| panic!("{headers:?}: {status}"));
    }
    for _ in 0..LIMIT * 2 {
        let status = call(&[("x-api-key", ""), ("authorization", "Bearer ")]).await.unwrap_err();
        assert_eq!(incident(&status).0, "E4003", "none is no guess");
        assert!(status.message().contains("a credential is needed"), "{}", status.message());
    }
    mesh.finish().await;
}
