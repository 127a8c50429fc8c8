//! The audit log is complete whatever callers do, and every edit of it is detected.

use std::time::Duration;

use futures_util::future::join_all;
use hapa_proto::auth::v1::{
    CreateKeyRequest, UpdateKeyRequest, VerifyAuditLogRequest, VerifyAuditLogResponse,
};
use hapa_test_harness::{TestCluster, TestMesh, within};
use prost_types::FieldMask;
use sqlx::{AnyConnection, Executor as _, Row as _};
use tokio::time::timeout;

use super::say;

async fn verify(cluster: &TestCluster) -> VerifyAuditLogResponse {
    let request = VerifyAuditLogRequest {};
    let found = within("a check", async { cluster.auth.audit().verify_audit_log(request).await });
    found.await.unwrap().into_inner()
}

#[tokio::test(flavor = "multi_thread")]
async fn callers_that_vanish_leave_auth_and_its_log_whole() {
    let cluster = TestCluster::start().await;
    let key_id = cluster.create_key(TestMesh::dev_key()).await.key.unwrap().key_id;
    let mut lost = 0;
    for number in 0..100u64 {
        // From at once to about as long as a call takes.
        let patience = Duration::from_micros(number * 7_919 % 5_000);
        let mut keys = cluster.auth.keys();
        let left = if number % 2 == 0 {
            timeout(patience, keys.create_key(TestMesh::dev_key())).await.is_err()
        } else {
            let request = UpdateKeyRequest {
                key_id: key_id.clone(),
                update_mask: Some(FieldMask { paths: vec!["name".to_owned()] }),
                name: format!("name {number}"),
                ..UpdateKeyRequest::default()
            };
            timeout(patience, keys.update_key(request)).await.is_err()
        };
        lost += usize::from(left);
    }
    let calls = (0..50).map(|number| {
        let name = format!("later {number}");
        cluster.create_key(CreateKeyRequest { name, ..TestMesh::dev_key() })
    });
    assert_eq!(join_all(calls).await.len(), 50);
    let found = verify(&cluster).await;
    say(&format!(
        "{lost} of 100 callers vanished, 50 later ones were served, {} entries",
        found.entries
    ));
    assert!(found.intact && lost > 10 && found.entries >= 51, "{found:?}");
}

async fn number(connection: &mut AnyConnection, sql: &'static str) -> i64 {
    within(sql, connection.fetch_one(sql)).await.unwrap().try_get(0).unwrap()
}

#[tokio::test]
async fn an_edited_line_and_a_deleted_end_of_the_log_are_found() {
    let cluster = TestCluster::start().await;
    for _ in 0..5 {
        cluster.create_key(TestMesh::dev_key()).await;
    }
    assert!(verify(&cluster).await.intact);
    let mut database = cluster.database.connect().await;
    let last = number(&mut database, "SELECT MAX(sequence) FROM audit").await;
    let middle = last - 2;
    for (edit, undo, broken) in [
        (
            "UPDATE audit SET detail = 'X' || detail WHERE sequence = (SELECT MAX(sequence) - 2 FROM audit)",
            "UPDATE audit SET detail = SUBSTR(detail, 2) WHERE detail LIKE 'X%'",
            middle,
        ),
        ("DELETE FROM audit WHERE sequence = (SELECT MAX(sequence) FROM audit)", "", last),
    ] {
        database.execute(edit).await.unwrap();
        let found = verify(&cluster).await;
        say(&format!("{edit}: {} at {}", found.problem, found.broken_sequence));
        assert_eq!((found.intact, found.broken_sequence), (false, broken), "{found:?}");
        if !undo.is_empty() {
            database.execute(undo).await.unwrap();
            assert!(verify(&cluster).await.intact);
        }
    }
}
