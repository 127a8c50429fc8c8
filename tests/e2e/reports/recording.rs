//! Recorded data of calls: each failure of a client, each used token, no secret and no prompt.

use hapa_engine_sim::{Fault, Script};
use hapa_proto::analytics::v1::GetUsageRequest;
use hapa_proto::analytics::v1::analytics_service_client::AnalyticsServiceClient;
use hapa_proto::auth::v1::{CreateKeyRequest, RateLimit};
use hapa_proto::codegen::v1::GenerateCodeRequest;
use hapa_proto::errors::v1::GetIncidentRequest;
use hapa_proto::errors::v1::error_tracking_service_client::ErrorTrackingServiceClient;
use hapa_test_harness::{Identity, PASSWORD, Store, TestMesh, files_with, incident, within};
use tonic::Status;

use crate::api::generate::{question, stream};

const CANARY: &str = "canary-of-a-prompt";

/// One failure of each kind that a client can bring about: their statuses.
async fn failures(mesh: &TestMesh) -> Vec<Status> {
    let key = async |change: fn(&mut CreateKeyRequest)| {
        let mut request = TestMesh::dev_key();
        change(&mut request);
        mesh.create_key(request).await.key_text
    };
    let narrow = key(|request| request.scopes = vec!["errors:read".to_owned()]).await;
    let slow = key(|request| {
        let method = "*".to_owned();
        request.rate_limits = vec![RateLimit { method, limit: 1, window_seconds: 3_600 }];
    })
    .await;
    let (mut client, asked) = (mesh.client(), || question(CANARY));
    let mut failed = vec![
        client.generate_code(question("")).await.unwrap_err(),
        mesh.anonymous().generate_code(asked()).await.unwrap_err(),
        mesh.client_with("hapa_wrong").generate_code(asked()).await.unwrap_err(),
        mesh.client_with(&narrow).generate_code(asked()).await.unwrap_err(),
        mesh.log_in("nobody@example.com", PASSWORD).await.unwrap_err(),
    ];
    mesh.client_with(&slow).generate_code(asked()).await.unwrap();
    failed.push(mesh.client_with(&slow).generate_code(asked()).await.unwrap_err());
    for fault in [Fault::status(404), Fault::status(500), Fault::too_many_requests(1)] {
        mesh.engine.once(fault);
        failed.push(client.generate_code(asked()).await.unwrap_err());
    }
    mesh.engine.once(Script::tokens([CANARY, "b"]).fault(Fault::CutAfter(1)));
    failed.push(client.generate_code(asked()).await.unwrap_err());
    failed
}

#[tokio::test]
async fn every_failure_that_was_shown_is_found_by_its_id() {
    for store in Store::both().await {
        let mesh = TestMesh::start_on(&store, &[]).await;
        let mut errors = ErrorTrackingServiceClient::new(mesh.channel_as(Identity::Mesh));
        for status in failures(&mesh).await {
            let (code, incident_id) = incident(&status);
            let found = within(&code, async {
                loop {
                    let request = GetIncidentRequest { incident_id: incident_id.clone() };
                    if let Ok(found) = errors.get_incident(request).await {
                        return found.into_inner();
                    }
                }
            })
            .await;
            let shown = &found.occurrences[0];
            assert_eq!((&shown.incident_id, &shown.error_code), (&incident_id, &code));
            assert!(!shown.request_id.is_empty() && !shown.actor.is_empty(), "{shown:?}");
        }
        mesh.finish().await;
    }
}

#[tokio::test]
async fn no_prompt_answer_or_credential_is_remembered() {
    for store in Store::both().await {
        let mesh = TestMesh::start_on(&store, &[]).await;
        let kim = mesh.log_in_new_user("kim@example.com", &[]).await;
        let asked = GenerateCodeRequest {
            code_context: CANARY.to_owned(),
            file_path: format!("{CANARY}.py"),
            session_id: CANARY.to_owned(),
            ..question(CANARY)
        };
        mesh.engine.once(Script::text(CANARY));
        mesh.client().generate_code(asked.clone()).await.unwrap();
        mesh.engine.once(Script::text(CANARY));
        assert!(stream(&mut mesh.client(), asked).await.finished.is_some());
        let last = incident(failures(&mesh).await.last().unwrap()).1;
        let mut errors = ErrorTrackingServiceClient::new(mesh.channel_as(Identity::Mesh));
        within("the last failure", async {
            let request = || GetIncidentRequest { incident_id: last.clone() };
            while errors.get_incident(request()).await.is_err() {}
        })
        .await;
        let metrics = mesh.metrics().await;
        let secrets = [CANARY, &mesh.key[17..], PASSWORD, &kim.access_token, &kim.refresh_token];
        for secret in secrets {
            assert!(!store.holds(secret).await, "{secret} stands in the store");
            assert!(files_with(mesh.folder(), secret).is_empty(), "{secret} stands in a file");
            assert!(!metrics.text().contains(secret), "{secret} stands in a metric");
        }
        mesh.finish().await;
    }
}

#[tokio::test]
async fn the_tokens_that_analytics_counts_are_those_that_the_engine_sent() {
    for store in Store::both().await {
        let mesh = TestMesh::start_on(&store, &[]).await;
        let mut client = mesh.client();
        mesh.engine.script(Script::tokens(["a", "b", "c"]));
        for _ in 0..5 {
            client.generate_code(question("q")).await.unwrap();
        }
        // A client that disconnects, and an engine that breaks a stream.
        mesh.engine.once(Script::tokens(["a", "b", "c", "d"]).hold(2));
        let mut frames = client.stream_generate_code(question("q")).await.unwrap().into_inner();
        let mut read = String::new();
        while read != "ab" {
            let frame = within("a frame", frames.message()).await.unwrap().unwrap();
            if let Some(hapa_proto::codegen::v1::stream_generate_code_response::Event::Delta(
                delta,
            )) = frame.event
            {
                read.push_str(&delta.text);
            }
        }
        drop(frames);
        mesh.engine.wait_for_aborted(1).await;
        mesh.engine.once(Script::tokens(["a", "b", "c"]).fault(Fault::CutAfter(1)));
        client.generate_code(question("q")).await.unwrap_err();
        let sent = mesh.engine.counts().tokens_sent;
        assert_eq!(sent, 5 * 3 + 2 + 1);
        let mut analytics = AnalyticsServiceClient::new(mesh.channel_as(Identity::Mesh));
        within("the sums", async {
            loop {
                let model = "prompt".to_owned();
                let request = GetUsageRequest { model, ..GetUsageRequest::default() };
                let total = analytics.get_usage(request).await.unwrap().into_inner().total;
                #[expect(
                    clippy::cast_possible_truncation,
                    clippy::cast_sign_loss,
                    reason = "small"
                )]
                let counted = total.unwrap_or_default().completion_tokens as u64;
                assert!(counted <= sent, "{counted} of {sent}");
                if counted == sent {
                    return;
                }
            }
        })
        .await;
        mesh.finish().await;
    }
}
