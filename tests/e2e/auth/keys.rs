//! Keys over the API: created once, shown without their secret, listed by pages, and revoked finally.

use std::path::PathBuf;

use hapa_proto::auth::v1::create_key_request::Expiry;
use hapa_proto::auth::v1::{
    CreateKeyRequest, GetKeyRequest, ListKeysRequest, RevokeKeyRequest, TokenBudget,
    UpdateKeyRequest,
};
use hapa_test_harness::{Store, TestMesh, files_with, incident};
use prost_types::FieldMask;
use tonic::Code;
use tonic_types::StatusExt as _;

const DAY: i64 = 86_400;

#[tokio::test]
async fn a_keys_text_is_shown_once_and_stands_in_no_file_and_no_row() {
    for store in Store::both().await {
        let mesh = TestMesh::start_on(&store, &[]).await;
        let made = mesh.create_key(TestMesh::dev_key()).await;
        let key_id = made.key.unwrap().key_id;
        let shown = mesh.keys().get_key(GetKeyRequest { key_id: key_id.clone() }).await.unwrap();
        let shown = format!("{:?}", shown.into_inner());
        let secret = &made.key_text[key_id.len() + 1..];
        assert!(shown.contains(&key_id) && !shown.contains(secret));
        assert!(store.holds(&key_id).await && !store.holds(secret).await);
        assert_eq!(files_with(mesh.folder(), secret), Vec::<PathBuf>::new());
        mesh.finish().await;
    }
}

#[tokio::test]
async fn a_key_expires_at_its_requested_time_or_after_the_default_days() {
    let mesh = TestMesh::start_with(&["--api-key-expiry-days=7"]).await;
    let cases = [
        (None, Some(7)),
        (Some(Expiry::TtlDays(30)), Some(30)),
        (Some(Expiry::NeverExpires(true)), None),
    ];
    for (expiry, days) in cases {
        let key =
            mesh.create_key(CreateKeyRequest { expiry, ..TestMesh::dev_key() }).await.key.unwrap();
        let (made, ends) =
            (key.create_time.unwrap().seconds, key.expire_time.map(|time| time.seconds));
        assert_eq!(ends, days.map(|days: i64| made + days * DAY));
    }
    mesh.finish().await;
}

#[tokio::test]
async fn keys_are_listed_newest_first_by_pages_and_by_owner() {
    for store in Store::both().await {
        let mesh = TestMesh::start_on(&store, &[]).await;
        let mut made = Vec::new();
        for number in 0..5 {
            let owner = if number % 2 == 0 { "even" } else { "odd" }.to_owned();
            let request = CreateKeyRequest { owner, ..TestMesh::dev_key() };
            made.push(mesh.create_key(request).await.key.unwrap().key_id);
        }
        made.reverse();
        let mut listed = Vec::new();
        let mut request = ListKeysRequest { page_size: 2, ..ListKeysRequest::default() };
        loop {
            let page = mesh.keys().list_keys(request.clone()).await.unwrap().into_inner();
            assert!(page.keys.len() <= 2);
            listed.extend(page.keys.into_iter().map(|key| key.key_id));
            if page.next_page_token.is_empty() {
                break;
            }
            request.page_token = page.next_page_token;
        }
        assert_eq!(listed[..5], made);
        assert_eq!(listed.len(), 6, "and the mesh's own");
        let odd = ListKeysRequest { owner: "odd".to_owned(), ..ListKeysRequest::default() };
        assert_eq!(mesh.keys().list_keys(odd).await.unwrap().into_inner().keys.len(), 2);
        for wrong in [
            ListKeysRequest { page_size: -1, ..ListKeysRequest::default() },
            ListKeysRequest { page_token: "made up".to_owned(), ..ListKeysRequest::default() },
        ] {
            let status = mesh.keys().list_keys(wrong).await.unwrap_err();
            assert_eq!(incident(&status).0, "E4001");
        }
        mesh.finish().await;
    }
}

#[tokio::test]
async fn revoking_twice_keeps_the_first_time_and_an_unknown_id_is_not_found() {
    for store in Store::both().await {
        let mesh = TestMesh::start_on(&store, &[]).await;
        let key_id = mesh.create_key(TestMesh::dev_key()).await.key.unwrap().key_id;
        let revoke = async || {
            let request = RevokeKeyRequest { key_id: key_id.clone() };
            mesh.keys().revoke_key(request).await.unwrap().into_inner().key.unwrap().revoke_time
        };
        let first = revoke().await;
        assert!(first.is_some());
        assert_eq!(revoke().await, first);
        let unknown = RevokeKeyRequest { key_id: "key_nobody".to_owned() };
        let status = mesh.keys().revoke_key(unknown).await.unwrap_err();
        assert_eq!((incident(&status).0.as_str(), status.code()), ("E4010", Code::NotFound));
        let status = mesh.keys().get_key(GetKeyRequest::default()).await.unwrap_err();
        assert_eq!(incident(&status).0, "E4002");
        mesh.finish().await;
    }
}

#[tokio::test]
async fn a_request_for_a_key_names_all_that_is_wrong_with_it() {
    let mesh = TestMesh::start().await;
    let request = CreateKeyRequest {
        name: "a\nb".to_owned(),
        scopes: vec!["codegen:everything".to_owned()],
        expiry: Some(Expiry::TtlDays(0)),
        ..CreateKeyRequest::default()
    };
    let status = mesh.keys().create_key(request).await.unwrap_err();
    assert_eq!(incident(&status).0, "E4001");
    let details = status.get_details_bad_request().unwrap();
    let fields: Vec<_> =
        details.field_violations.iter().map(|wrong| wrong.field.as_str()).collect();
    assert_eq!(fields, ["name", "owner", "scopes", "ttl_days"]);
    mesh.finish().await;
}

#[tokio::test]
async fn keys_outlive_the_process_and_need_the_same_pepper() {
    for store in Store::both().await {
        let folder = tempfile::tempdir().unwrap();
        let keep = format!("--data-dir={}", folder.path().display());
        let mut mesh = TestMesh::start_on(&store, &[&keep]).await;
        let key = mesh.key.clone();
        mesh.begin_shutdown();
        mesh.wait_until_stopped().await;
        let mut mesh = TestMesh::start_on(&store, &[&keep]).await;
        assert!(
            mesh.client_with(&key).generate_code(crate::api::generate::question("q")).await.is_ok()
        );
        mesh.begin_shutdown();
        mesh.wait_until_stopped().await;
        let pepper = "--api-key-pepper=another-pepper-of-more-than-32-characters";
        let mesh = TestMesh::start_on(&store, &[&keep, pepper]).await;
        let status = mesh
            .client_with(&key)
            .generate_code(crate::api::generate::question("q"))
            .await
            .unwrap_err();
        assert_eq!(incident(&status).0, "E4003");
        mesh.finish().await;
    }
}

#[tokio::test]
async fn an_update_sets_what_its_mask_names_and_lists_can_be_filtered() {
    for store in Store::both().await {
        let mesh = TestMesh::start_on(&store, &[]).await;
        let made = mesh.create_key(TestMesh::dev_key()).await.key.unwrap();
        let key_id = made.key_id.clone();
        let paths = ["name", "allowed_models", "token_budget", "expire_time"].map(str::to_owned);
        let request = UpdateKeyRequest {
            key_id: key_id.clone(),
            update_mask: Some(FieldMask { paths: paths.to_vec() }),
            name: "renamed".to_owned(),
            scopes: vec!["cache:admin".to_owned()],
            allowed_models: vec!["m".to_owned()],
            token_budget: Some(TokenBudget { per_day: 5, per_month: 6 }),
            ..UpdateKeyRequest::default()
        };
        let key = mesh.keys().update_key(request.clone()).await.unwrap().into_inner().key.unwrap();
        assert_eq!((key.name.as_str(), key.scopes), ("renamed", made.scopes));
        assert_eq!((key.allowed_models, key.expire_time), (vec!["m".to_owned()], None));
        assert_eq!(key.token_budget.unwrap().per_month, 6);
        assert_eq!((key.rate_limits, key.texts.len()), (made.rate_limits, 1));
        for mask in [None, Some(FieldMask { paths: vec!["owner".to_owned()] })] {
            let wrong = UpdateKeyRequest { update_mask: mask, ..request.clone() };
            let status = mesh.keys().update_key(wrong).await.unwrap_err();
            assert!(["E4001", "E4002"].contains(&incident(&status).0.as_str()));
        }

        mesh.keys().revoke_key(RevokeKeyRequest { key_id: key_id.clone() }).await.unwrap();
        let status = mesh.keys().update_key(request).await.unwrap_err();
        assert_eq!(incident(&status).0, "E4007");
        let found = async |state: &str, scope: &str| {
            let (state, scope) = (state.to_owned(), scope.to_owned());
            let request = ListKeysRequest { state, scope, ..ListKeysRequest::default() };
            mesh.keys().list_keys(request).await.unwrap().into_inner().keys.len()
        };
        assert_eq!((found("active", "").await, found("revoked", "").await), (1, 1));
        assert_eq!((found("expired", "").await, found("", "auth:admin").await), (0, 2));
        assert_eq!(found("revoked", "cache:admin").await, 0);
        mesh.finish().await;
    }
}
