//! OIDC login: sessions for an ID token of an identity provider.

use std::collections::HashSet;

use hapa_proto::auth::v1::create_session_request::Proof;
use hapa_test_harness::{FakeIdp, Store, TestMesh, incident};
use serde_json::{Value, json};

use super::{prove, works};

#[tokio::test]
async fn a_user_with_an_id_token_is_admitted_and_recognised_later() {
    for store in Store::both().await {
        let provider = FakeIdp::start().await;
        let issuer = format!("--oidc-issuer={}", provider.issuer);
        let flags = [&issuer, "--oidc-audience=hapa", "--oidc-scopes=codegen:generate"];
        let mesh = TestMesh::start_on(&store, &flags).await;
        let log_in =
            async |claims: Value| prove(&mesh, Proof::IdToken(provider.vouch(&claims))).await;
        let new = json!({ "sub": "1", "email": "Ann@Example.com", "email_verified": true });
        let new = log_in(new).await.unwrap();
        works(&mesh, &new.access_token).await.unwrap();
        let ann = new.session.unwrap();
        assert_eq!(ann.method, "identity_provider");
        // The subject identifies the user, even with another email address.
        let again = log_in(json!({ "sub": "1", "email": "ann@new.example" })).await.unwrap();
        assert_eq!(again.session.unwrap().user_id, ann.user_id);

        let kim = mesh.log_in_new_user("kim@example.com", &[]).await;
        let claims = |subject: &str, verified: bool| json!({ "sub": subject, "email": "kim@example.com", "email_verified": verified });
        let unverified = json!({ "sub": "2", "email": "kim@example.com" });
        assert_eq!(incident(&log_in(unverified).await.unwrap_err()).0, "E4003");
        assert_eq!(incident(&log_in(claims("2", false)).await.unwrap_err()).0, "E4003");
        let tied = log_in(claims("2", true)).await.unwrap().session.unwrap();
        assert_eq!(tied.user_id, kim.user.user_id);
        // The address is tied to that subject from now on.
        assert_eq!(incident(&log_in(claims("3", true)).await.unwrap_err()).0, "E4003");
        let foreign = json!({ "sub": "1", "email": "ann@example.com", "aud": "else" });
        assert_eq!(incident(&log_in(foreign).await.unwrap_err()).0, "E4003");
        mesh.finish().await;
    }
}

#[tokio::test]
async fn an_unverified_address_creates_no_account_and_locks_its_owner_out_of_none() {
    for store in Store::both().await {
        let provider = FakeIdp::start().await;
        let issuer = format!("--oidc-issuer={}", provider.issuer);
        let mesh = TestMesh::start_on(&store, &[&issuer, "--oidc-audience=hapa"]).await;
        let log_in = async |claims: Value| {
            let session = prove(&mesh, Proof::IdToken(provider.vouch(&claims))).await;
            session.map(|reply| reply.session.unwrap().user_id)
        };
        let kim = mesh.log_in_new_user("kim@example.com", &[]).await.user.user_id;
        for verified in [Value::Null, json!(false), json!("false"), json!("yes"), json!(1)] {
            for email in ["ann@example.com", "kim@example.com"] {
                let claims = json!({ "sub": "evil", "email": email, "email_verified": verified });
                let status = log_in(claims).await.unwrap_err();
                assert_eq!(incident(&status).0, "E4003", "{verified}");
            }
        }
        let status = log_in(json!({ "sub": "evil", "email": "ann@example.com" })).await;
        assert_eq!(incident(&status.unwrap_err()).0, "E4003", "nothing is said of the address");

        let verified = |subject: &str, email: &str, is: Value| json!({ "sub": subject, "email": email, "email_verified": is });
        let ann = log_in(verified("ann", "ann@example.com", json!(true))).await.unwrap();
        // Some providers write it as text.
        assert_eq!(log_in(verified("kim", "kim@example.com", json!("true"))).await.unwrap(), kim);
        // A known subject needs no address. Only the subject identifies the user.
        assert_eq!(log_in(json!({ "sub": "ann", "email": "x@example.com" })).await.unwrap(), ann);
        for (subject, email) in [("evil", "ann@example.com"), ("evil", "kim@example.com")] {
            let status = log_in(verified(subject, email, json!(true))).await.unwrap_err();
            assert_eq!(incident(&status).0, "E4003", "it is tied to another subject");
        }
        mesh.finish().await;
    }
}

#[tokio::test]
async fn only_verified_addresses_pass_the_list_of_domains() {
    let provider = FakeIdp::start().await;
    let flags = [
        &format!("--oidc-issuer={}", provider.issuer),
        "--oidc-audience=hapa",
        "--oidc-email-domains=example.com",
    ];
    let mesh = TestMesh::start_with(&flags).await;
    let log_in = async |claims: Value| prove(&mesh, Proof::IdToken(provider.vouch(&claims))).await;
    let claims =
        |email: &str, is: Value| json!({ "sub": "1", "email": email, "email_verified": is });
    log_in(claims("ann@example.com", json!(true))).await.unwrap();
    for refused in [
        claims("ann@example.com", Value::Null),
        claims("ann@example.com", json!(false)),
        claims("ann@example.org", json!(true)),
        json!({ "sub": "1", "email": "ann@example.com" }),
    ] {
        assert_eq!(incident(&log_in(refused.clone()).await.unwrap_err()).0, "E4003", "{refused}");
    }
    mesh.finish().await;
}

#[tokio::test]
async fn of_many_first_logins_of_one_person_all_are_of_one_user() {
    for store in Store::both().await {
        let provider = FakeIdp::start().await;
        let issuer = format!("--oidc-issuer={}", provider.issuer);
        let mesh = TestMesh::start_on(&store, &[&issuer, "--oidc-audience=hapa"]).await;
        let claims = json!({ "sub": "1", "email": "ann@example.com", "email_verified": true });
        let logins = (0..8).map(|_| prove(&mesh, Proof::IdToken(provider.vouch(&claims))));
        let users = futures_util::future::join_all(logins).await.into_iter();
        let users: HashSet<_> =
            users.map(|reply| reply.unwrap().session.unwrap().user_id).collect();
        assert_eq!(users.len(), 1);
        mesh.finish().await;
    }
}
