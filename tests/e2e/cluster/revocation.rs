//! A revoked credential stops working on every replica within a second, even in the middle of a stream.

use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use hapa_engine_sim::Script;
use hapa_proto::auth::v1::create_key_request::Expiry;
use hapa_proto::auth::v1::create_session_request::{Password, Proof};
use hapa_proto::auth::v1::{
    CreateKeyRequest, CreateSessionRequest, CreateUserRequest, DeleteUserRequest, RevokeKeyRequest,
    RevokeSessionRequest, UpdateKeyRequest,
};
use hapa_test_harness::{CodegenClient, TestCluster, TestMesh, within};
use prost_types::FieldMask;
use tokio::task::JoinSet;
use tokio::time::sleep;

use super::{Open, POLL_INTERVAL, Times, failure, health, refused};
use crate::api::generate::question;

const SECOND: Duration = Duration::from_secs(1);
/// Rounds at once.
const STREAM_COUNT: usize = 4;

/// A cluster with streams that stay open after their first token.
async fn holding() -> Arc<TestCluster> {
    let cluster = TestCluster::start().await;
    cluster.engine.script(Script::tokens(["a", "b"]).hold(1));
    Arc::new(cluster)
}

/// Checks that all but one in a hundred of these rounds took less than a second. A machine that is busy with
/// other work is late by itself. Such a trial is printed, and repeated twice at most.
async fn within_a_second<F: Future<Output = Duration> + Send + 'static>(
    (what, of): (&str, &str),
    count: usize,
    round: impl Fn(usize) -> F,
) {
    let mut p99 = Duration::MAX;
    for trial in 0..3 {
        p99 = rounds(count, |number| round(trial * count + number)).await.p99(what, of);
        if p99 < SECOND {
            return;
        }
    }
    panic!("{what}: {p99:?}");
}

/// So many rounds, a few at a time.
async fn rounds<F: Future<Output = Duration> + Send + 'static>(
    count: usize,
    round: impl Fn(usize) -> F,
) -> Times {
    let (mut running, mut times) = (JoinSet::new(), Times::default());
    for number in 0..count {
        if running.len() == STREAM_COUNT {
            times.0.push(running.join_next().await.unwrap().unwrap());
        }
        running.spawn(round(number));
    }
    times.0.extend(running.join_all().await);
    times
}

/// Makes both replicas know a credential, and opens a stream with it.
async fn in_use(clients: &[CodegenClient; 2], number: usize) -> Open {
    for client in clients {
        health(&mut client.clone()).await.unwrap();
    }
    Open::begin(clients[number % 2].clone()).await
}

/// Until both replicas refuse and the stream has ended.
async fn gone(clients: [CodegenClient; 2], stream: Open) {
    let [one, other] = clients.clone();
    tokio::join!(refused(one), refused(other), stream.ended());
    for mut client in clients {
        assert_eq!(failure(&health(&mut client).await.unwrap_err()).0, "E4007", "it stays refused");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_revoked_key_is_refused_everywhere_and_its_stream_ends_within_a_second() {
    let cluster = holding().await;
    within_a_second(("revocation", "keys with a stream each"), 200, |number| {
        let cluster = Arc::clone(&cluster);
        async move {
            let made = cluster.create_key(TestMesh::dev_key()).await;
            let clients = cluster.clients(&made.key_text);
            let stream = in_use(&clients, number).await;
            let request = RevokeKeyRequest { key_id: made.key.unwrap().key_id };
            let begin = Instant::now();
            within("a revocation", cluster.auth.keys().revoke_key(request)).await.unwrap();
            gone(clients, stream).await;
            begin.elapsed()
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_scope_that_is_taken_away_is_gone_everywhere_within_a_second() {
    let cluster = holding().await;
    within_a_second(("narrowing", "keys with a stream each"), 20, |number| {
        let cluster = Arc::clone(&cluster);
        async move {
            let made = cluster.create_key(TestMesh::dev_key()).await;
            let clients = cluster.clients(&made.key_text);
            let stream = in_use(&clients, number).await;
            let request = UpdateKeyRequest {
                key_id: made.key.unwrap().key_id,
                update_mask: Some(FieldMask { paths: vec!["scopes".to_owned()] }),
                scopes: vec!["auth:admin".to_owned()],
                ..UpdateKeyRequest::default()
            };
            let begin = Instant::now();
            within("an update", cluster.auth.keys().update_key(request)).await.unwrap();
            let [one, other] = clients;
            tokio::join!(lacks_the_scope(one), lacks_the_scope(other), stream.ended());
            begin.elapsed()
        }
    })
    .await;
}

/// Repeats an invalid request until it is refused for its missing scope (E4005).
async fn lacks_the_scope(mut client: CodegenClient) {
    within("a refusal", async {
        loop {
            let status = client.generate_code(question("")).await.unwrap_err();
            match failure(&status).0.as_str() {
                "E4002" => sleep(POLL_INTERVAL).await,
                code => return assert_eq!(code, "E4005", "{status:?}"),
            }
        }
    })
    .await;
    health(&mut client).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_that_expires_is_refused_everywhere_and_its_stream_ends_within_a_second() {
    let cluster = holding().await;
    for (what, updated) in [("expiry", false), ("expiry by an update", true)] {
        within_a_second((what, "keys with a stream each"), 20, |number| {
            let cluster = Arc::clone(&cluster);
            async move { expiry(&cluster, number, updated).await }
        })
        .await;
    }
}

/// The delay between a key's expiry time and its refusal on both replicas.
async fn expiry(cluster: &TestCluster, number: usize, updated: bool) -> Duration {
    let mut end = SystemTime::now() + 2 * SECOND;
    let expiry = (!updated).then(|| Expiry::ExpireTime(end.into()));
    let made = cluster.create_key(CreateKeyRequest { expiry, ..TestMesh::dev_key() }).await;
    let clients = cluster.clients(&made.key_text);
    let stream = in_use(&clients, number).await;
    if updated {
        end = SystemTime::now() + 2 * SECOND;
        let request = UpdateKeyRequest {
            key_id: made.key.unwrap().key_id,
            update_mask: Some(FieldMask { paths: vec!["expire_time".to_owned()] }),
            expire_time: Some(end.into()),
            ..UpdateKeyRequest::default()
        };
        within("an update", cluster.auth.keys().update_key(request)).await.unwrap();
    }
    assert!(SystemTime::now() < end, "the machine is too slow to see a key before its end");
    gone(clients, stream).await;
    SystemTime::now().duration_since(end).expect("it was not refused before its end")
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deleted_users_keys_and_sessions_are_gone_everywhere_within_a_second() {
    let cluster = holding().await;
    within_a_second(
        ("deletion", "users with a key, a session and two streams each"),
        20,
        |number| {
            let cluster = Arc::clone(&cluster);
            async move {
                let user = User::with_a_session(&cluster, number).await;
                let key = CreateKeyRequest { owner: user.id.clone(), ..TestMesh::dev_key() };
                let keys = cluster.clients(&cluster.create_key(key).await.key_text);
                let streams = (in_use(&keys, number).await, in_use(&user.clients, number).await);
                let begin = Instant::now();
                let request = DeleteUserRequest { user_id: user.id };
                within("an end", cluster.auth.users().delete_user(request)).await.unwrap();
                tokio::join!(gone(keys, streams.0), gone(user.clients, streams.1));
                begin.elapsed()
            }
        },
    )
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_revoked_session_is_refused_everywhere_and_its_stream_ends_within_a_second() {
    let cluster = holding().await;
    within_a_second(("end of sessions", "sessions with a stream each"), 20, |number| {
        let cluster = Arc::clone(&cluster);
        async move {
            let user = User::with_a_session(&cluster, number).await;
            let stream = in_use(&user.clients, number).await;
            let begin = Instant::now();
            let session_id = user.session_id;
            let request = RevokeSessionRequest { session_id, ..RevokeSessionRequest::default() };
            within("an end", cluster.auth.sessions().revoke_session(request)).await.unwrap();
            gone(user.clients, stream).await;
            begin.elapsed()
        }
    })
    .await;
}

/// A user with a session.
struct User {
    id: String,
    session_id: String,
    clients: [CodegenClient; 2],
}

impl User {
    async fn with_a_session(cluster: &TestCluster, number: usize) -> User {
        let (email, password) = (format!("user{number}@example.com"), "correct horse battery");
        let request = CreateUserRequest {
            email: email.clone(),
            name: "User".to_owned(),
            password: password.to_owned(),
            scopes: TestMesh::dev_key().scopes,
            ..CreateUserRequest::default()
        };
        within("a user", async {
            while let Err(status) = cluster.auth.users().create_user(request.clone()).await {
                assert_eq!(failure(&status).0, "E5005");
                sleep(10 * POLL_INTERVAL).await;
            }
        })
        .await;
        let proof = Some(Proof::Password(Password { email, password: password.to_owned() }));
        let request = CreateSessionRequest { proof, http_body: None };
        let made = within("a session", async {
            loop {
                match cluster.auth.sessions().create_session(request.clone()).await {
                    Ok(made) => return made.into_inner(),
                    // Few passwords are checked at once.
                    Err(status) => assert_eq!(failure(&status).0, "E5005"),
                }
                sleep(10 * POLL_INTERVAL).await;
            }
        })
        .await;
        let session = made.session.unwrap();
        let client =
            |replica: usize| cluster.replicas[replica].client_of_session(&made.access_token);
        let clients = [client(0), client(1)];
        User { id: session.user_id, session_id: session.session_id, clients }
    }
}

/// The authentication result with which the stream began has been replaced since.
#[tokio::test]
async fn a_stream_ends_with_its_key_also_when_the_key_was_asked_for_again_meanwhile() {
    let cluster = holding().await;
    let made = cluster.create_key(TestMesh::dev_key()).await;
    let (clients, key_id) = (cluster.clients(&made.key_text), made.key.unwrap().key_id);
    let stream = in_use(&clients, 0).await;
    // Repeated, because a cache may drop its entry with a delay.
    for number in 0..8 {
        let request = UpdateKeyRequest {
            key_id: key_id.clone(),
            update_mask: Some(FieldMask { paths: vec!["name".to_owned()] }),
            name: format!("name {number}"),
            ..UpdateKeyRequest::default()
        };
        cluster.auth.keys().update_key(request).await.unwrap();
        asked_again(&cluster, &clients).await;
    }
    let begin = Instant::now();
    cluster.auth.keys().revoke_key(RevokeKeyRequest { key_id }).await.unwrap();
    gone(clients, stream).await;
    assert!(begin.elapsed() < SECOND, "{:?}", begin.elapsed());
}

/// Calls until auth was asked by both replicas.
async fn asked_again(cluster: &TestCluster, clients: &[CodegenClient; 2]) {
    let asked = async || {
        let rpc = "rpc=\"/hapa.auth.v1.AuthService/Authenticate\"";
        cluster.auth.metrics().await.sum("hapa_requests_total", &[rpc])
    };
    let before = asked().await;
    within("auth to be asked", async {
        while asked().await < before + 2.0 {
            for client in clients {
                health(&mut client.clone()).await.unwrap();
            }
        }
    })
    .await;
}
