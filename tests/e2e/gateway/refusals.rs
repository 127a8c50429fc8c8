//! Refusals by the gateway itself have a published code, an incident id that the errors service can find, and
//! retry advice, in every protocol. They contain nothing of the request.

use hapa_proto::auth::v1::auth_service_client::AuthServiceClient;
use hapa_proto::auth::v1::{
    AuthenticateRequest, CreateKeyRequest, GetKeyRequest, UpdateKeyRequest,
};
use hapa_proto::codegen::v1::codegen_service_client::CodegenServiceClient;
use hapa_proto::codegen::v1::{GenerateCodeRequest, ListModelsRequest};
use hapa_proto::errors::v1::error_tracking_service_client::ErrorTrackingServiceClient;
use hapa_proto::errors::v1::gateway_report_service_client::GatewayReportServiceClient;
use hapa_proto::errors::v1::report_refusals_request::Refusal;
use hapa_proto::errors::v1::{
    GetDashboardRequest, GetIncidentRequest, Incident, Occurrence, ReportRefusalsRequest,
};
use hapa_test_harness::{Gateway, Identity, TOKEN, TestMesh, hapa, incident, refusal, within};
use secrecy::ExposeSecret as _;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tonic::{Code, Request, Status};
use tonic_types::StatusExt as _;

const SECRET: &str = "hunter2-and-more";

async fn found(mesh: &TestMesh, id: &str) -> (Incident, Occurrence) {
    let mut errors = ErrorTrackingServiceClient::new(Identity::Mesh.on(mesh.connect().await));
    within(id, async {
        loop {
            let request = GetIncidentRequest { incident_id: id.to_owned() };
            if let Ok(reply) = errors.get_incident(request).await {
                let reply = reply.into_inner();
                let shown = reply.occurrences.into_iter().find(|one| one.incident_id == id);
                return (reply.incident.unwrap(), shown.expect("the one that was asked for"));
            }
            tokio::time::sleep(std::time::Duration::from_millis(10)).await;
        }
    })
    .await
}

async fn json_of(reply: reqwest::Response) -> Value {
    let text = within("the body", reply.text()).await.unwrap();
    serde_json::from_str(&text).unwrap_or_else(|_| panic!("not JSON: {text}"))
}

/// Requests an unknown path `count` times on one connection; returns the incident ids.
async fn refused_ids(gateway: &Gateway, count: usize) -> Vec<String> {
    let address = gateway.url.trim_start_matches("http://");
    let mut socket = tokio::net::TcpStream::connect(address).await.unwrap();
    let ask = |more: &str| format!("GET /nothing HTTP/1.1\r\nhost: a\r\n{more}\r\n");
    let asked = ask("").repeat(count - 1) + &ask("connection: close\r\n");
    socket.write_all(asked.as_bytes()).await.unwrap();
    let mut answers = String::new();
    within("the answers", socket.read_to_string(&mut answers)).await.unwrap();
    let ids = answers.split("\"incident_id\":\"").skip(1).filter_map(|rest| rest.split_once('"'));
    ids.map(|(id, _)| id.to_owned()).collect()
}

/// The access log's line of an incident.
async fn logged(gateway: &Gateway, id: &str) -> Value {
    within("the line of the access log", async {
        loop {
            let line = gateway.access_log().into_iter().find(|line| line["incident_id"] == id);
            if let Some(line) = line {
                return line;
            }
            tokio::time::sleep(std::time::Duration::from_millis(10)).await;
        }
    })
    .await
}

#[tokio::test]
async fn a_native_grpc_refusal_has_code_and_incident_and_is_found() {
    let mesh = TestMesh::start().await;
    let gateway = mesh.gateway(&[]).await;
    let mut auth = AuthServiceClient::new(gateway.channel_as(Identity::Mesh));
    let status = auth.authenticate(AuthenticateRequest::default()).await.unwrap_err();
    let (code, id) = incident(&status);
    assert_eq!((code.as_str(), status.code()), ("E4012", Code::Unimplemented));
    let info = status.get_details_error_info().unwrap();
    assert_eq!((info.reason.as_str(), info.domain.as_str()), ("UNSUPPORTED", "hapa"));
    let (incident, occurrence) = found(&mesh, &id).await;
    assert_eq!((incident.error_code.as_str(), occurrence.service.as_str()), ("E4012", "gateway"));
    assert_eq!(occurrence.method, "/hapa.auth.v1.AuthService/Authenticate");
    assert_eq!(occurrence.actor, "anonymous");
    assert_eq!(logged(&gateway, &id).await["request_id"], occurrence.request_id.as_str());
    let mut command = hapa();
    let scopes = vec!["errors:read".to_owned(), "errors:admin".to_owned()];
    let reader = mesh.create_key(CreateKeyRequest { scopes, ..TestMesh::dev_key() }).await.key_text;
    command.args(["errors", "show", &id]).env("HAPA_API_KEY", &reader);
    command.env("HAPA_ADDRESS", format!("http://{}", mesh.address));
    let done = within("hapa errors show", command.output()).await.unwrap();
    let shown = String::from_utf8_lossy(&done.stdout);
    assert!(shown.contains(&id) && shown.contains("E4012"), "{shown}");
    mesh.finish().await;
}

#[tokio::test]
async fn a_refusal_in_json_or_grpc_web_is_found_by_its_incident_id() {
    let mesh = TestMesh::start().await;
    let gateway = mesh.gateway(&[]).await;
    let too_large = json!({ "user_question": "x".repeat(2 * 1024 * 1024) }).to_string();
    for (path, body, status, code) in [
        ("/api/v1/nothing", "{}", 404, "E4012"),
        ("/api/v1/generate-code", "{", 400, "E4001"),
        ("/api/v1/generate-code", too_large.as_str(), 413, "E4006"),
        ("/api/v1/code/models?nothing=1", "", 404, "E4012"),
    ] {
        let request = gateway.request("POST", path).header("content-type", "application/json");
        let reply = request.body(body).send().await;
        assert_eq!(reply.status(), status, "{path}");
        let request_id = reply.headers()["x-request-id"].to_str().unwrap().to_owned();
        let (said, id) = refusal(&json_of(reply).await);
        assert_eq!(said, code, "{path}");
        let (_, occurrence) = found(&mesh, &id).await;
        assert_eq!(occurrence.error_code, code);
        assert_eq!(occurrence.request_id, request_id, "{path}");
        assert_eq!(logged(&gateway, &id).await["request_id"], request_id.as_str());
    }
    let request = gateway.request("POST", "/hapa.auth.v1.AuthService/Authenticate");
    let web = request.header("content-type", "application/grpc-web+proto").send_raw().await;
    assert_eq!(web.status(), 200, "gRPC-Web tells failures in grpc-status");
    let status = Status::from_header_map(web.headers()).expect("a status");
    assert_eq!(incident(&status).0, "E4012");
    found(&mesh, &incident(&status).1).await;
    mesh.finish().await;
}

#[tokio::test]
async fn a_mesh_that_is_away_is_e5005_with_retry_advice_in_every_protocol() {
    let mut mesh = TestMesh::start().await;
    let gateway = mesh.gateway(&[]).await;
    mesh.begin_shutdown();
    mesh.wait_until_stopped().await;
    let mut client = CodegenServiceClient::new(gateway.channel_as(Identity::Key(&mesh.key)));
    let status = client.list_models(ListModelsRequest::default()).await.unwrap_err();
    let (code, id) = incident(&status);
    assert_eq!((code.as_str(), status.code()), ("E5005", Code::Unavailable));
    let delay = status.get_details_retry_info().and_then(|info| info.retry_delay);
    assert_eq!(delay, Some(std::time::Duration::from_secs(1)));
    assert_eq!(status.metadata().get("retry-after").unwrap(), "1");
    // No service could receive the report, so the id is in the access log.
    assert_eq!(logged(&gateway, &id).await["path"], "/hapa.codegen.v1.CodegenService/ListModels");
    for path in ["/api/v1/generate-code", "/api/v1/enhanced-stream-generate"] {
        let reply = gateway.post(path, Some(&mesh.key), &json!({ "user_question": "q" })).await;
        assert_eq!(
            (reply.status().as_u16(), &reply.headers()["retry-after"]),
            (503, &"1".parse().unwrap())
        );
        let told = json_of(reply).await;
        let (code, id) = refusal(&told);
        assert_eq!(code, "E5005");
        assert_eq!(told["details"][1]["retry_delay"], "1s", "{told}");
        logged(&gateway, &id).await;
    }
}

/// An overload manager that refuses every request.
const OVERLOADED: &str = r#"overload_manager:
  refresh_interval: 0.05s
  resource_monitors:
    - name: envoy.resource_monitors.fixed_heap
      typed_config: {"@type": type.googleapis.com/envoy.extensions.resource_monitors.fixed_heap.v3.FixedHeapConfig, max_heap_size_bytes: 1000}
  actions:
    - {name: envoy.overload_actions.stop_accepting_requests, triggers: [{name: envoy.resource_monitors.fixed_heap, threshold: {value: 0.01}}]}

"#;

#[tokio::test]
async fn an_overloaded_gateway_says_so_with_code_incident_and_retry_advice() {
    let mesh = TestMesh::start().await;
    let port = mesh.address.port().to_string();
    let settings = [("PORT", port.as_str())];
    let gateway = Gateway::edited(&settings, |config| {
        let (before, rest) = config.split_once("overload_manager:").unwrap();
        let (_, after) = rest.split_once("static_resources:").unwrap();
        format!("{before}{OVERLOADED}static_resources:{after}")
    });
    let gateway = gateway.await;
    let mut client = CodegenServiceClient::new(gateway.channel_as(Identity::Key(&mesh.key)));
    let status = within("the overload to be noticed", async {
        loop {
            match client.list_models(ListModelsRequest::default()).await {
                Ok(_) => tokio::time::sleep(std::time::Duration::from_millis(10)).await,
                Err(status) => return status,
            }
        }
    })
    .await;
    let (code, id) = incident(&status);
    assert_eq!((code.as_str(), status.code()), ("E5005", Code::Unavailable));
    let delay = status.get_details_retry_info().and_then(|info| info.retry_delay);
    assert_eq!(delay, Some(std::time::Duration::from_secs(1)));
    assert_eq!(logged(&gateway, &id).await["why"], "overload");
    let reply = gateway.get("/api/v1/code/models", &mesh.key).await;
    assert_eq!(
        (reply.status().as_u16(), &reply.headers()["retry-after"]),
        (503, &"1".parse().unwrap())
    );
    assert_eq!(reply.headers()["x-content-type-options"], "nosniff");
    let told = json_of(reply).await;
    let (code, id) = refusal(&told);
    assert_eq!((code.as_str(), &told["details"][1]["retry_delay"]), ("E5005", &json!("1s")));
    logged(&gateway, &id).await;
    let web = gateway.request("POST", "/hapa.codegen.v1.CodegenService/ListModels");
    let web = web.header("content-type", "application/grpc-web+proto").send().await;
    assert_eq!(web.status(), 503, "browsers read the status");
    assert_eq!(refusal(&json_of(web).await).0, "E5005");
    mesh.finish().await;
}

#[tokio::test]
async fn the_access_log_has_incident_ids_of_the_gateways_own_refusals_alone() {
    let mesh = TestMesh::start().await;
    let gateway = mesh.gateway(&[]).await;
    let asked = json!({ "user_question": "q" });
    assert_eq!(gateway.post("/api/v1/generate-code", Some(&mesh.key), &asked).await.status(), 200);
    assert_eq!(gateway.post("/api/v1/generate-code", None, &asked).await.status(), 401);
    let (_, id) = refusal(&json_of(gateway.get("/api/v1/nothing", "").await).await);
    logged(&gateway, &id).await;
    for line in gateway.access_log() {
        let is_own = line["why"] != "via_upstream";
        assert_eq!(line["incident_id"].is_string(), is_own, "{line}");
    }
    mesh.finish().await;
}

#[tokio::test]
async fn a_flood_of_refusals_is_reported_within_its_bound() {
    const BURST: u64 = 200;
    const EACH_SECOND: u64 = 2;
    let mesh = TestMesh::start().await;
    let port = mesh.address.port().to_string();
    // Refusals beyond the bound are only in the access log, so their ids are not searched.
    let gateway = Gateway::with(&[("PORT", port.as_str())]).await;
    let begun = std::time::Instant::now();
    for _ in 0..4 {
        assert_eq!(refused_ids(&gateway, 100).await.len(), 100);
    }
    let bound = BURST + EACH_SECOND * (begun.elapsed().as_secs() + 2);
    let mut errors = ErrorTrackingServiceClient::new(Identity::Mesh.on(mesh.connect().await));
    let mut reported = 0;
    within("the reports", async {
        while reported < BURST {
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
            let sums = errors.get_dashboard(GetDashboardRequest {}).await.unwrap().into_inner();
            reported = sums.total_errors.into();
        }
    })
    .await;
    assert!(reported <= bound, "{reported} of 400 were reported, {bound} may be");
    mesh.finish().await;
}

#[tokio::test]
async fn no_two_refusals_have_one_incident_id() {
    let mesh = TestMesh::start().await;
    let gateway = mesh.gateway(&[]).await;
    let ids: std::collections::BTreeSet<_> = refused_ids(&gateway, 100).await.into_iter().collect();
    assert_eq!(ids.len(), 100);
    mesh.finish().await;
}

#[tokio::test]
async fn no_refusal_of_the_gateway_repeats_what_was_sent() {
    let mesh = TestMesh::start().await;
    let gateway = mesh.gateway(&[]).await;
    let bodies = [
        ("/api/v1/sessions", json!({ "email": "a@example.com", "id_token": { "x": SECRET } })),
        ("/api/v1/sessions", json!({ "password": { "email": 1, "password": [SECRET] } })),
        ("/api/v1/sessions", json!({ "password": SECRET })),
        ("/api/v1/generate-code", json!({ "user_question": "q", "temperature": SECRET })),
        ("/api/v1/generate-code", json!({ "user_question": [SECRET] })),
        ("/api/v1/generate-code", json!({ "user_profile": SECRET })),
        ("/api/v1/keys", json!({ "expire_time": SECRET })),
    ];
    let queries = [
        format!("/api/v1/audit?page_size={SECRET}"),
        format!("/api/v1/keys?{SECRET}=1"),
        format!("/api/v1/keys?page_size=1&page_token={SECRET}&owner.{SECRET}=2"),
    ];
    let mut refused = Vec::new();
    for (path, body) in bodies {
        let reply = gateway.post(path, Some(&mesh.key), &body).await;
        refused.push((format!("{path} {body}"), reply));
    }
    for query in queries {
        let reply = gateway.get(&query, &mesh.key).await;
        refused.push((query, reply));
    }
    let broken = format!("{{\"password\": \"{SECRET}");
    let request = gateway.request("POST", "/api/v1/sessions");
    let request = request.header("content-type", "application/json").body(broken);
    refused.push(("broken JSON".to_owned(), request.send().await));
    for (what, reply) in refused {
        assert!(reply.status().is_client_error(), "{what}: {}", reply.status());
        let headers = format!("{:?}", reply.headers());
        let told = json_of(reply).await;
        let (code, id) = refusal(&told);
        assert!(["E4001", "E4002"].contains(&code.as_str()), "{what}: {code}");
        assert!(!told.to_string().contains(SECRET) && !headers.contains(SECRET), "{what}: {told}");
        let kept = format!("{:?}", found(&mesh, &id).await);
        assert!(!kept.contains(SECRET), "{what}: {kept}");
    }
    for line in gateway.access_log() {
        assert!(!line.to_string().contains(SECRET), "{line}");
    }
    mesh.finish().await;
}

#[tokio::test]
async fn no_refusal_of_a_service_repeats_what_was_sent() {
    let mesh = TestMesh::start().await;
    let secret = || SECRET.to_owned();
    let mut client = mesh.client();
    let mut statuses = vec![
        client
            .generate_code(GenerateCodeRequest {
                user_question: "q".to_owned(),
                task: secret(),
                language: secret(),
                user_profile: Some(hapa_proto::codegen::v1::UserProfile {
                    python_skill_level: secret(),
                    ..Default::default()
                }),
                ..Default::default()
            })
            .await
            .unwrap_err(),
    ];
    let mut keys = mesh.keys();
    let scopes = vec![secret()];
    let wrong = CreateKeyRequest { scopes, ..TestMesh::dev_key() };
    statuses.push(keys.create_key(wrong).await.unwrap_err());
    statuses.push(keys.get_key(GetKeyRequest { key_id: secret() }).await.unwrap_err());
    let mask = Some(prost_types::FieldMask { paths: vec![secret()] });
    let key_id = "key_of_nobody".to_owned();
    let update = UpdateKeyRequest { key_id, update_mask: mask, ..Default::default() };
    statuses.push(keys.update_key(update).await.unwrap_err());
    let mut errors = ErrorTrackingServiceClient::new(mesh.channel_as(Identity::Key(&mesh.key)));
    let incident_id = secret();
    statuses.push(errors.get_incident(GetIncidentRequest { incident_id }).await.unwrap_err());
    statuses.push(
        mesh.client_with(SECRET).list_models(ListModelsRequest::default()).await.unwrap_err(),
    );
    for status in statuses {
        let (_, id) = incident(&status);
        let details = String::from_utf8_lossy(status.details()).into_owned();
        assert!(!status.message().contains(SECRET) && !details.contains(SECRET), "{status:?}");
        let kept = format!("{:?}", found(&mesh, &id).await);
        assert!(!kept.contains(SECRET), "{kept}");
    }
    mesh.finish().await;
}

#[tokio::test]
async fn refusals_are_reported_by_the_gateway_alone() {
    let mesh = TestMesh::start().await;
    let report = async |token: &str| {
        let mut reports = GatewayReportServiceClient::new(mesh.connect().await);
        let refusal = Refusal {
            incident_id: "INC-20260101-0123ABCD".to_owned(),
            error_code: "E4012".to_owned(),
            ..Refusal::default()
        };
        let mut request = Request::new(ReportRefusalsRequest { refusals: vec![refusal] });
        request.metadata_mut().insert("x-mesh-token", token.parse().unwrap());
        within("an answer", reports.report_refusals(request)).await
    };
    let own = hapa_transport::peer::gateway_token(&TOKEN.into());
    assert_eq!(report(own.expose_secret()).await.unwrap().into_inner().accepted, 1);
    let other =
        hapa_transport::peer::gateway_token(&"another mesh token, as long as one is".into());
    for token in [other.expose_secret(), "", "guess"] {
        assert_eq!(incident(&report(token).await.unwrap_err()).0, "E4003");
    }
    // The gateway's token authorizes no other RPC.
    let mut auth = AuthServiceClient::new(mesh.connect().await);
    let mut request = Request::new(AuthenticateRequest::default());
    request.metadata_mut().insert("x-mesh-token", own.expose_secret().parse().unwrap());
    assert_eq!(incident(&auth.authenticate(request).await.unwrap_err()).0, "E4003");
    mesh.finish().await;
}
