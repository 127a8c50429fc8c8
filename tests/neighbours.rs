//! Valid credentials next to guesses: what turned out wrong is counted and refused, nothing else.

use hapa_proto::auth::v1::{CreateKeyRequest, RevokeKeyRequest};
use hapa_proto::codegen::v1::GetCodeHealthRequest;
use hapa_proto::codegen::v1::codegen_service_client::CodegenServiceClient;
use hapa_tests::{PASSWORD, Who, World, incident, within};
use secrecy::ExposeSecret as _;
use tonic::{Request, Status};

/// Failed attempts per address and minute in these tests.
const LIMIT: usize = 5;

async fn world() -> World {
    World::with(&[&format!("--auth-failure-limit={LIMIT}"), "--trusted-proxies=127.0.0.0/8"]).await
}

async fn call(world: &World, key: &str) -> Result<(), Status> {
    let mut client = world.client_with(key);
    within("an answer", client.get_code_health(GetCodeHealthRequest {})).await.map(drop)
}

/// A call with a well-formed key that was never made, from an address.
async fn guess(world: &World, from: &str) -> String {
    let (_, key) = hapa_core::key_format::mint();
    let mut client = CodegenServiceClient::new(world.wire(Who::Key(key.expose_secret())));
    let mut request = Request::new(GetCodeHealthRequest {});
    request.metadata_mut().insert("x-forwarded-for", from.parse().unwrap());
    let status = within("a refusal", client.get_code_health(request)).await.unwrap_err();
    incident(&status).0
}

#[tokio::test]
async fn a_key_that_is_not_known_yet_is_let_in_while_its_address_guesses() {
    let world = world().await;
    let fresh = world.create_key(World::dev_key()).await.key_text;
    for number in 0..LIMIT + 5 {
        let expected = if number < LIMIT { "E4003" } else { "E4004" };
        assert_eq!(guess(&world, "127.0.0.1").await, expected, "guess {number}");
    }
    call(&world, &fresh).await.expect("a valid key is let in whatever its address did");
    assert_eq!(guess(&world, "127.0.0.1").await, "E4004");
    world.end().await;
}

#[tokio::test]
async fn many_valid_keys_are_let_in_at_once_from_an_address_over_its_limit() {
    let world = world().await;
    let mut keys = Vec::new();
    for _ in 0..20 {
        keys.push(world.create_key(World::dev_key()).await.key_text);
    }
    for _ in 0..LIMIT {
        guess(&world, "127.0.0.1").await;
    }
    let guesses = async {
        for _ in 0..40 {
            assert_eq!(guess(&world, "127.0.0.1").await, "E4004");
        }
    };
    let calls = futures_util::future::join_all(keys.iter().map(|key| call(&world, key)));
    let (calls, ()) = futures_util::future::join(calls, guesses).await;
    assert!(calls.iter().all(Result::is_ok), "{calls:?}");
    world.end().await;
}

#[tokio::test]
async fn a_wrong_or_ended_key_that_one_client_repeats_does_not_fill_the_limit() {
    let world = world().await;
    let (_, unknown) = hapa_core::key_format::mint();
    let revoked = world.create_key(World::dev_key()).await;
    let key_id = revoked.key.unwrap().key_id;
    world.keys().revoke_key(RevokeKeyRequest { key_id }).await.unwrap();
    for (key, code) in [(unknown.expose_secret(), "E4003"), (revoked.key_text.as_str(), "E4007")] {
        for repetition in 0..LIMIT * 4 {
            let status = call(&world, key).await.unwrap_err();
            assert_eq!(incident(&status).0, code, "repetition {repetition}");
        }
    }
    world.end().await;
}

#[tokio::test]
async fn an_ipv6_client_is_counted_by_its_64() {
    let world = world().await;
    for host in 1..=LIMIT {
        assert_eq!(guess(&world, &format!("2001:db8:0:1::{host:x}")).await, "E4003");
    }
    assert_eq!(guess(&world, "2001:db8:0:1:ffff::1").await, "E4004", "another host of the /64");
    assert_eq!(guess(&world, "2001:db8:0:2::1").await, "E4003", "another /64");
    assert_eq!(guess(&world, "203.0.113.7").await, "E4003", "an IPv4 address");
    world.end().await;
}

#[tokio::test]
async fn a_right_password_logs_in_from_an_address_over_its_limit_and_a_wrong_one_does_not() {
    let world = world().await;
    world.person("kim@example.com", &[]).await;
    for _ in 0..LIMIT {
        guess(&world, "127.0.0.1").await;
    }
    let wrong = world.log_in("kim@example.com", "not the password").await.unwrap_err();
    assert_eq!(incident(&wrong).0, "E4004");
    assert!(wrong.metadata().contains_key("retry-after"));
    world.log_in("kim@example.com", PASSWORD).await.expect("the right password");
    world.end().await;
}

#[tokio::test]
async fn an_accounts_password_is_tried_ten_times_a_minute_from_one_address() {
    let world = World::with(&["--auth-failure-limit=1000"]).await;
    world.person("kim@example.com", &[]).await;
    world.person("lee@example.com", &[]).await;
    let tries = (0..30).map(|number| {
        let (world, spelling) = (&world, ["kim@example.com", "Kim@Example.com"][number % 2]);
        async move { world.log_in(spelling, &format!("wrong {number}")).await.unwrap_err() }
    });
    let refused = futures_util::future::join_all(tries).await;
    let codes: Vec<_> = refused.iter().map(|status| incident(status).0).collect();
    let of = |code: &str| codes.iter().filter(|one| *one == code).count();
    assert_eq!((of("E4003"), of("E4004")), (10, 20), "{codes:?}");
    // The account waits, from this address; the others do not.
    let right = world.log_in("kim@example.com", PASSWORD).await.unwrap_err();
    assert_eq!(incident(&right).0, "E4004");
    world.log_in("lee@example.com", PASSWORD).await.expect("another account");
    world.end().await;
}

#[tokio::test]
async fn an_empty_credential_is_not_set() {
    let world = world().await;
    let key = world.create_key(CreateKeyRequest { ..World::dev_key() }).await.key_text;
    let call = async |headers: &[(&'static str, &str)]| {
        let mut client = CodegenServiceClient::new(world.wire(Who::Stranger));
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
    world.end().await;
}
