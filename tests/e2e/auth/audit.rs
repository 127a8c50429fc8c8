//! The audit log: every change with its actor and its source. Every edit of the log is detected.

use hapa_proto::auth::v1::audit_service_client::AuditServiceClient;
use hapa_proto::auth::v1::key_service_client::KeyServiceClient;
use hapa_proto::auth::v1::{
    AuditEntry, CreateKeyRequest, ListAuditEntriesRequest, RevokeKeyRequest, RotateKeyRequest,
    VerifyAuditLogRequest, VerifyAuditLogResponse,
};
use hapa_test_harness::{Identity, Store, TestMesh};

async fn entries(mesh: &TestMesh, request: ListAuditEntriesRequest) -> Vec<AuditEntry> {
    let mut audit = AuditServiceClient::new(mesh.channel_as(Identity::Mesh));
    audit.list_audit_entries(request).await.unwrap().into_inner().entries
}

async fn verify(mesh: &TestMesh) -> VerifyAuditLogResponse {
    let mut audit = AuditServiceClient::new(mesh.channel_as(Identity::Mesh));
    audit.verify_audit_log(VerifyAuditLogRequest {}).await.unwrap().into_inner()
}

#[tokio::test]
async fn every_change_is_logged_with_actor_and_source_and_without_secrets() {
    for store in Store::both().await {
        let mesh = TestMesh::start_on(&store, &[]).await;
        let kim = mesh.log_in_new_user("kim@example.com", &[]).await;
        let mut keys = KeyServiceClient::new(mesh.channel_as(Identity::Session(&kim.access_token)));
        let request = CreateKeyRequest {
            name: "ci".to_owned(),
            scopes: vec!["codegen:generate".to_owned()],
            ..CreateKeyRequest::default()
        };
        let made = keys.create_key(request).await.unwrap().into_inner();
        let key_id = made.key.unwrap().key_id;
        let rotate = RotateKeyRequest { key_id: key_id.clone(), overlap_seconds: None };
        let rotated = keys.rotate_key(rotate).await.unwrap().into_inner();
        keys.revoke_key(RevokeKeyRequest { key_id: key_id.clone() }).await.unwrap();
        // Two requests, one change.
        keys.revoke_key(RevokeKeyRequest { key_id: key_id.clone() }).await.unwrap();

        let subject = format!("key:{key_id}");
        let of_key = ListAuditEntriesRequest { subject, ..ListAuditEntriesRequest::default() };
        let listed = entries(&mesh, of_key).await;
        let actions: Vec<_> = listed.iter().map(|entry| entry.action.as_str()).collect();
        assert_eq!(actions, ["key.revoke", "key.rotate", "key.create"]);
        for entry in &listed {
            assert_eq!(entry.actor, format!("session:{}", kim.session_id));
            assert_eq!(
                (entry.owner.as_str(), entry.address.as_str()),
                (kim.user.user_id.as_str(), "127.0.0.1")
            );
            assert!(!entry.request_id.is_empty() && entry.time.is_some());
        }
        let action = "session".to_owned();
        let of_sessions = ListAuditEntriesRequest { action, ..ListAuditEntriesRequest::default() };
        let listed = entries(&mesh, of_sessions).await;
        assert_eq!(listed.len(), 1);
        assert_eq!(
            (listed[0].actor.as_str(), listed[0].action.as_str()),
            ("anonymous", "session.create")
        );

        for secret in [
            &made.key_text[17..],
            &rotated.key_text[17..],
            &kim.refresh_token[5..],
            hapa_test_harness::PASSWORD,
        ] {
            assert!(!store.holds(secret).await, "a secret stands in the store");
        }
        assert!(!store.holds(&kim.access_token).await, "an access token stands in the store");
        mesh.finish().await;
    }
}

#[tokio::test]
async fn the_log_is_listed_by_pages_newest_first() {
    let mesh = TestMesh::start().await;
    for _ in 0..4 {
        mesh.create_key(TestMesh::dev_key()).await;
    }
    let mut audit = AuditServiceClient::new(mesh.channel_as(Identity::Mesh));
    let (mut seen, mut page_token) = (Vec::new(), String::new());
    loop {
        let request = ListAuditEntriesRequest {
            page_size: 2,
            page_token,
            ..ListAuditEntriesRequest::default()
        };
        let page = audit.list_audit_entries(request).await.unwrap().into_inner();
        seen.extend(page.entries.into_iter().map(|entry| entry.sequence));
        page_token = page.next_page_token;
        if page_token.is_empty() {
            break;
        }
    }
    assert_eq!(seen, [5, 4, 3, 2, 1]);
    mesh.finish().await;
}

#[tokio::test]
async fn one_edited_one_missing_and_one_added_line_are_found() {
    let edits = [
        ("UPDATE audit SET detail = '{}' WHERE sequence = 3", 3),
        ("UPDATE audit SET actor = 'key:key_other' WHERE sequence = 2", 2),
        ("UPDATE audit SET effect = 0 WHERE sequence = 4", 4),
        ("UPDATE audit SET time = time + 1 WHERE sequence = 1", 1),
        ("DELETE FROM audit WHERE sequence = 2", 2),
        ("DELETE FROM audit WHERE sequence = 5", 5),
        ("UPDATE audit_head SET hash = 'x'", 5),
    ];
    for (edit, broken) in edits {
        let store = Store::sqlite();
        let mesh = TestMesh::start_on(&store, &[]).await;
        for _ in 0..3 {
            mesh.create_key(TestMesh::dev_key()).await;
        }
        let key_id = mesh.create_key(TestMesh::dev_key()).await.key.unwrap().key_id;
        let untouched = verify(&mesh).await;
        assert!(untouched.intact && untouched.entries == 5 && untouched.head_hash.len() == 64);
        if edit.contains("effect") {
            let subject = format!("key:{key_id}");
            mesh.keys().revoke_key(RevokeKeyRequest { key_id }).await.unwrap();
            let of_key = ListAuditEntriesRequest { subject, ..ListAuditEntriesRequest::default() };
            assert_eq!(entries(&mesh, of_key).await.len(), 2);
            store.execute(&edit.replace("= 4", "= 6")).await;
            assert_eq!(verify(&mesh).await.broken_sequence, 6);
            continue;
        }
        store.execute(edit).await;
        let verdict = verify(&mesh).await;
        assert!(!verdict.intact && !verdict.problem.is_empty());
        assert_eq!(verdict.broken_sequence, broken, "{edit}: {}", verdict.problem);
        mesh.finish().await;
    }
}
