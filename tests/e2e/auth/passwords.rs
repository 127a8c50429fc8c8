//! Concurrent password hashing takes bounded memory, and leaves no password in it.

use std::time::Duration;

use hapa_proto::auth::v1::create_session_request::{Password, Proof};
use hapa_proto::auth::v1::{CreateSessionRequest, CreateUserRequest};
use hapa_test_harness::{RoleProcess, TOKEN, incident, within};
use tokio::task::JoinSet;

/// Two hashes of 19 MiB each, and room for what tasks and connections take.
const MAX_GROWTH_BYTES: u64 = 80 * 1_024 * 1_024;

fn login(number: usize) -> CreateSessionRequest {
    let email = format!("user{number}@example.com");
    let proof = Some(Proof::Password(Password { email, password: "a wrong password".to_owned() }));
    CreateSessionRequest { proof, http_body: None }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_wrong_logins_at_once_take_the_memory_of_two_hashes() {
    let settings = [("MESH_TOKEN", TOKEN.to_owned()), ("AUTH_FAILURE_LIMIT", "0".to_owned())];
    let auth = RoleProcess::start("auth", &settings, &[]).await;
    let user = CreateUserRequest {
        email: "user1@example.com".to_owned(),
        password: "correct horse battery staple".to_owned(),
        ..CreateUserRequest::default()
    };
    // Before any password is hashed.
    let mut sessions = auth.sessions();
    let unset = sessions.create_session(CreateSessionRequest::default()).await.unwrap_err();
    assert_eq!(incident(&unset).0, "E4002");
    let before = auth.resident_memory();
    auth.users().create_user(user).await.unwrap();
    for _ in 0..4 {
        let mut logins = JoinSet::new();
        for number in 0..60 {
            let mut sessions = auth.sessions();
            logins.spawn(async move { sessions.create_session(login(number % 3)).await });
        }
        let mut checked = 0;
        for reply in within("the logins", logins.join_all()).await {
            let status = reply.unwrap_err();
            let (code, _) = incident(&status);
            checked += usize::from(code == "E4003");
            // On a busy machine, a login may time out while it waits for the hash queue or the store.
            assert!(matches!(code.as_str(), "E4003" | "E5005" | "E5003"), "{status:?}");
        }
        assert!(checked > 0, "no login was checked");
    }
    let after = auth.resident_memory();
    assert!(after < before + MAX_GROWTH_BYTES, "it grew from {before} to {after} bytes");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn logins_beyond_the_queue_are_refused_with_a_retry_delay() {
    let settings = [("MESH_TOKEN", TOKEN.to_owned()), ("AUTH_FAILURE_LIMIT", "0".to_owned())];
    let auth = RoleProcess::start("auth", &settings, &[]).await;
    let mut logins = JoinSet::new();
    for number in 0..150 {
        let mut sessions = auth.sessions();
        logins.spawn(async move { sessions.create_session(login(number)).await });
    }
    let (mut checked, mut refused) = (0, 0);
    for reply in within("the logins", logins.join_all()).await {
        let status = reply.unwrap_err();
        match incident(&status).0.as_str() {
            "E4003" => checked += 1,
            "E5005" => {
                let wait = status.metadata().get("retry-after").unwrap().to_str().unwrap();
                assert!(wait.parse::<u64>().unwrap() >= 1);
                refused += 1;
            }
            // The store has few connections for a machine that is busy.
            "E5003" => {}
            _ => panic!("{status:?}"),
        }
    }
    // How many wait at once depends on the machine; `password.rs` tests the bound itself.
    assert!(checked > 0, "{checked} checked and {refused} refused");
    // The queue is empty again.
    within("a login that is checked", async {
        let mut sessions = auth.sessions();
        while incident(&sessions.create_session(login(1)).await.unwrap_err()).0 != "E4003" {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    })
    .await;
}
