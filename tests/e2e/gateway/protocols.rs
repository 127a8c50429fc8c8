//! The API through a real Envoy: JSON in the documented shape, SSE, gRPC and gRPC-Web, and only public RPCs.

use hapa_engine_sim::{Fault, Script};
use hapa_proto::codegen::v1::codegen_service_client::CodegenServiceClient;
use hapa_test_harness::{Gateway, Identity, PASSWORD, TestMesh, within};
use serde_json::{Value, json};
use tokio::process::Command;

use crate::api::generate::question;

async fn body(reply: reqwest::Response) -> Value {
    let text = within("the body", reply.text()).await.unwrap();
    serde_json::from_str(&text).unwrap_or_else(|_| panic!("not JSON: {text}"))
}

/// Status, published code and incident id of a refusal.
async fn refusal(reply: reqwest::Response) -> (u16, String, String) {
    let status = reply.status().as_u16();
    let (code, id) = hapa_test_harness::refusal(&body(reply).await);
    (status, code, id)
}

const GENERATE: &str = "/api/v1/generate-code";
const COMPLETE: &str = "/api/v1/complete";
const STREAM: &str = "/api/v1/enhanced-stream-generate";

#[tokio::test]
async fn users_log_in_and_manage_what_is_theirs_over_json() {
    let mesh = TestMesh::start().await;
    let gateway = mesh.gateway(&[]).await;
    let send = async |method: &str, path: &str, who: (&str, &str), asked: Value| {
        let request = gateway.request(method, path).header(who.0, who.1);
        let request = request.header("content-type", "application/json");
        let request = if asked.is_null() { request } else { request.body(asked.to_string()) };
        request.send().await
    };
    let admin = ("x-api-key", mesh.key.as_str());
    let made = json!({ "email": "kim@example.com", "password": PASSWORD, "token_budget": { "per_day": 5000 } });
    let made = body(send("POST", "/api/v1/users", admin, made).await).await;
    assert_eq!(made["user"]["token_budget"]["per_day"], "5000");

    let proof = json!({ "password": { "email": "kim@example.com", "password": PASSWORD } });
    let session = body(gateway.post("/api/v1/sessions", None, &proof).await).await;
    let bearer = format!("Bearer {}", session["access_token"].as_str().unwrap());
    let kim = ("authorization", bearer.as_str());
    let me = body(send("GET", "/api/v1/users/me", kim, Value::Null).await).await;
    assert_eq!(me["user"]["user_id"], made["user"]["user_id"]);
    let profile = json!({ "python_skill_level": "expert" });
    let kept = body(send("PUT", "/api/v1/users/me/profile", kim, profile).await).await;
    assert_eq!(kept["profile"]["python_skill_level"], "expert");

    let key = json!({ "name": "editor", "scopes": ["codegen:generate"] });
    let key = body(send("POST", "/api/v1/keys", kim, key).await).await;
    let path = format!("/api/v1/keys/{}", key["key"]["key_id"].as_str().unwrap());
    let change = json!({ "update_mask": "name", "name": "my editor" });
    let changed = body(send("PATCH", &path, kim, change).await).await;
    assert_eq!(changed["key"]["name"], "my editor");
    let rotated = body(send("POST", &format!("{path}:rotate"), kim, json!({})).await).await;
    assert_eq!(rotated["key"]["texts"].as_array().unwrap().len(), 2);
    let asked = json!({ "user_question": "q" });
    let answer = gateway.post(GENERATE, rotated["key_text"].as_str(), &asked).await;
    assert_eq!(answer.status(), 200);

    let id = session["session"]["session_id"].as_str().unwrap();
    let revoke = send("POST", &format!("/api/v1/sessions/{id}:revoke"), kim, json!({})).await;
    assert_eq!(body(revoke).await["revoked_sessions"], 1);
    let (status, code, _) = refusal(send("GET", "/api/v1/audit", kim, Value::Null).await).await;
    assert!((status, code.as_str()) == (401, "E4007") || (status, code.as_str()) == (403, "E4005"));
    let log = body(send("GET", "/api/v1/audit?action=key", admin, Value::Null).await).await;
    let actions: Vec<_> =
        log["entries"].as_array().unwrap().iter().map(|entry| &entry["action"]).collect();
    assert_eq!(actions, ["key.rotate", "key.update", "key.create", "key.create"]);
    let verdict = body(send("POST", "/api/v1/audit:verify", admin, json!({})).await).await;
    assert_eq!(verdict["intact"], true);
    mesh.finish().await;
}

/// A part of every text field of a refused login.
const MARKER: &str = "marker-of-a-secret";

/// Bodies of logins that are refused, with status and code.
fn refused_logins() -> Vec<(u16, &'static str, String)> {
    let flat = |email: &str, password: Value| json!({ "email": email, "password": password });
    let nested = json!({ "email": MARKER, "password": MARKER });
    vec![
        (401, "E4003", flat("kim@example.com", json!(MARKER)).to_string()),
        (401, "E4003", flat(&format!("{MARKER}@example.com"), json!(MARKER)).to_string()),
        (400, "E4001", flat(MARKER, json!(MARKER)).to_string()),
        (400, "E4001", flat("kim@example.com", json!([MARKER])).to_string()),
        (400, "E4001", flat("kim@example.com", nested).to_string()),
        (400, "E4001", json!({ "email": { MARKER: 1 }, "password": MARKER }).to_string()),
        (400, "E4001", json!({ "password": MARKER, "id_token": MARKER }).to_string()),
        (400, "E4001", format!(r#"{{"email":"kim@example.com","password":"{MARKER}""#)),
        (400, "E4001", format!(r#"{{"password":{MARKER}}}"#)),
        (400, "E4001", format!("email=kim@example.com&password={MARKER}")),
        (400, "E4001", format!(r#"["{MARKER}"]"#)),
        (400, "E4002", json!({ "email": "kim@example.com" }).to_string()),
        (400, "E4002", "{}".to_owned()),
        (400, "E4002", String::new()),
        (501, "E4012", json!({ "id_token": MARKER }).to_string()),
    ]
}

#[tokio::test]
async fn a_login_is_flat_or_nested_and_no_refusal_of_one_repeats_what_was_sent() {
    let mesh = TestMesh::start_with(&["--auth-failure-limit=0"]).await;
    let gateway = mesh.gateway(&[]).await;
    let kim = mesh.log_in_new_user("kim@example.com", &[]).await.user.user_id;
    let send = async |body: &str| {
        let request = gateway.request("POST", "/api/v1/sessions");
        request.header("content-type", "application/json").body(body).send().await
    };
    for good in [
        json!({ "email": "kim@example.com", "password": PASSWORD }),
        json!({ "email": "Kim@Example.com ", "password": PASSWORD, "remember_me": true }),
        json!({ "password": { "email": "kim@example.com", "password": PASSWORD } }),
    ] {
        let reply = send(&good.to_string()).await;
        assert_eq!(reply.status(), 200, "{good}");
        let session = body(reply).await;
        assert_eq!(session["session"]["user_id"], kim, "{good}");
        assert!(session["access_token"].is_string() && session["expires_in"].is_u64());
    }
    for (status, code, sent) in refused_logins() {
        let reply = send(&sent).await;
        assert_eq!(reply.status().as_u16(), status, "{sent}");
        let text = within("the refusal", reply.text()).await.unwrap();
        let refusal: Value = serde_json::from_str(&text).unwrap();
        assert_eq!(hapa_test_harness::refusal(&refusal).0, code, "{sent}");
        assert!(!text.contains(MARKER), "{text}");
    }
    // URLs are logged, so a credential in a URL is refused.
    let path = format!("/api/v1/sessions?id_token={MARKER}");
    for session in [json!({ "email": "kim@example.com", "password": PASSWORD }), Value::Null] {
        let request = gateway.request("POST", &path).header("content-type", "application/json");
        let session = if session.is_null() { String::new() } else { session.to_string() };
        let reply = request.body(session).send().await;
        assert_eq!(reply.status(), 400);
    }
    mesh.finish().await;
}

#[tokio::test]
async fn the_documented_json_goes_in_and_comes_out() {
    let mesh = TestMesh::start().await;
    let gateway = mesh.gateway(&[]).await;
    let asked = json!({
        "user_question": "중복 제거", "code_context": "", "language": "python", "stream": false,
        "userProfile": {"pythonSkillLevel": "expert", "preferredLanguageFeatures": ["type_hints"]},
        "a_field_of_tomorrow": 1,
    });
    let reply = gateway.post(GENERATE, Some(&mesh.key), &asked).await;
    assert_eq!(reply.status(), 200);
    assert!(reply.headers().contains_key("x-request-id"));
    let answer = body(reply).await;
    assert_eq!(answer["status"], "success");
    assert!(answer["generated_code"].as_str().unwrap().contains("def greet"));
    assert!(answer["explanation"].as_str().unwrap().contains("이 함수는"));
    assert!(answer["response_time_ms"].is_u64() && answer["usage"]["total_tokens"].is_u64());
    assert_eq!(answer["cached"], false);
    assert_eq!(answer["warnings"], json!([]));
    let prompt = mesh.engine.requests()[0].body["messages"][0]["content"].to_string();
    assert!(prompt.contains("expert") && prompt.contains("type hints"), "{prompt}");

    let models = body(gateway.get("/api/v1/code/models", &mesh.key).await).await;
    assert_eq!(models["models"][4]["name"], "sim-coder");
    let health = body(gateway.get("/api/v1/code/health", &mesh.key).await).await;
    assert_eq!(health["status"], "healthy");
    mesh.finish().await;
}

#[tokio::test]
async fn completion_speaks_the_documented_json() {
    let mesh = TestMesh::start().await;
    let gateway = mesh.gateway(&[]).await;
    mesh.engine.script(Script::choices([
        Script::tokens(["a, b"]).logprob(-0.125),
        Script::tokens(["이름)"]).logprob(-1.0),
    ]));
    let asked = json!({
        "prefix": "print(", "suffix": ")\n", "language": "python", "file_path": "a.py",
        "max_suggestions": 2, "completion_type": "inline", "cursor_position": 6,
    });
    let reply = gateway.post(COMPLETE, Some(&mesh.key), &asked).await;
    assert_eq!(reply.status(), 200);
    let answer = body(reply).await;
    let first = &answer["suggestions"][0];
    assert_eq!((&first["text"], &first["completion_type"]), (&json!("a, b"), &json!("inline")));
    assert!(
        first["confidence"].as_f64().is_some_and(|sure| (0.8..0.9).contains(&sure)),
        "{answer}"
    );
    assert_eq!(answer["suggestions"][1]["text"], "이름");
    assert!(answer["response_time_ms"].is_u64() && answer["usage"]["total_tokens"].is_u64());
    assert_eq!((&answer["model"], &answer["cached"]), (&json!("autocomplete"), &json!(false)));

    let key = Some(mesh.key.as_str());
    for (asked, status, code) in [
        (json!({"suffix": "x"}), 400, "E4002"),
        (json!({"prefix": "x".repeat(8_001)}), 400, "E4001"),
        (json!({"prefix": "x", "max_suggestions": 0}), 400, "E4001"),
        (json!({"prefix": "x", "completion_type": "all"}), 400, "E4001"),
    ] {
        let (got, said, _) = refusal(gateway.post(COMPLETE, key, &asked).await).await;
        assert_eq!((got, said.as_str()), (status, code), "{asked}");
    }

    let mut client = CodegenServiceClient::new(gateway.channel_as(Identity::Key(&mesh.key)));
    let request = hapa_proto::codegen::v1::CompleteCodeRequest {
        prefix: "x = ".to_owned(),
        ..Default::default()
    };
    let mut frames = client.stream_complete_code(request).await.unwrap().into_inner();
    let mut frames_seen = 0;
    while within("a frame", frames.message()).await.unwrap().is_some() {
        frames_seen += 1;
    }
    assert!(frames_seen >= 3, "started, deltas, finished: {frames_seen}");
    mesh.finish().await;
}

#[tokio::test]
async fn a_stream_is_server_sent_events_that_come_as_the_engine_speaks() {
    let mesh = TestMesh::start().await;
    let gateway = mesh.gateway(&[]).await;
    mesh.engine.once(Script::tokens(["하나 ", "둘"]).hold(1));
    let mut reply = gateway.post(STREAM, Some(&mesh.key), &json!({"user_question": "q"})).await;
    assert_eq!(reply.headers()["content-type"], "text/event-stream");
    let mut text = String::new();
    while !text.contains("하나") {
        let piece = within("the first token", reply.chunk()).await.unwrap().unwrap();
        text += std::str::from_utf8(&piece).unwrap();
    }
    assert!(!text.contains('둘'), "the engine has not said it yet");
    mesh.engine.release();
    text += &within("the rest", reply.text()).await.unwrap();
    let events: Vec<Value> = text
        .split("\n\n")
        .filter(|event| !event.is_empty())
        .map(|event| serde_json::from_str(event.strip_prefix("data: ").unwrap()).unwrap())
        .collect();
    assert!(events[0]["started"].is_object());
    let said: String = events.iter().filter_map(|event| event["delta"]["text"].as_str()).collect();
    assert_eq!(said, "하나 둘");
    assert_eq!(events.last().unwrap()["finished"]["finish_reason"], "stop");
    mesh.finish().await;
}

#[tokio::test]
async fn a_broken_stream_says_failed_as_its_last_event() {
    let mesh = TestMesh::start().await;
    let gateway = mesh.gateway(&[]).await;
    mesh.engine.once(Script::tokens(["one ", "two"]).fault(Fault::CutAfter(1)));
    let reply = gateway.post(STREAM, Some(&mesh.key), &json!({"user_question": "q"})).await;
    let text = within("the stream", reply.text()).await.unwrap();
    let last = text.trim_end().rsplit("data: ").next().unwrap();
    let last: Value = serde_json::from_str(last).unwrap();
    assert_eq!(last["failed"]["error_code"], "E5007", "{text}");
    assert_eq!(last["failed"]["partial"], true);
    mesh.finish().await;
}

#[tokio::test]
async fn refusals_are_json_with_status_code_and_incident() {
    let mesh = TestMesh::start().await;
    let gateway = mesh.gateway(&[]).await;
    let key = Some(mesh.key.as_str());
    let cases = [
        (None, json!({"user_question": "q"}), 401, "E4003"),
        (Some("hapa_wrong"), json!({"user_question": "q"}), 401, "E4003"),
        (key, json!({}), 400, "E4002"),
        (key, json!({"user_question": "x".repeat(10_001)}), 400, "E4001"),
        (key, json!({"user_question": "q", "temperature": 3}), 400, "E4001"),
        (
            key,
            json!({"user_question": "q", "user_profile": {"python_skill_level": "guru"}}),
            400,
            "E4001",
        ),
        (key, json!({"user_question": "q", "model": "none"}), 404, "E4010"),
        (key, json!({"user_question": "x".repeat(5 * 1024 * 1024)}), 413, "E4006"),
    ];
    for path in [GENERATE, STREAM] {
        for (key, asked, status, code) in &cases {
            let (got, said, _) = refusal(gateway.post(path, *key, asked).await).await;
            assert_eq!((got, said.as_str()), (*status, *code), "{path}");
        }
        let malformed =
            gateway.request("POST", path).header("content-type", "application/json").body("{");
        assert_eq!(refusal(malformed.send().await).await.1, "E4001");
        let wrong_method = gateway.request("PUT", path).send().await;
        assert_eq!(refusal(wrong_method).await.1, "E4012");
    }
    mesh.engine.stop().await;
    let asked = json!({"user_question": "q"});
    let (status, code, _) = refusal(gateway.post(GENERATE, key, &asked).await).await;
    assert_eq!((status, code.as_str()), (503, "E5006"));
    mesh.finish().await;
}

#[tokio::test]
async fn keys_are_managed_in_json() {
    let mesh = TestMesh::start().await;
    let gateway = mesh.gateway(&[]).await;
    let key = Some(mesh.key.as_str());
    let asked = json!({"name": "ci", "owner": "me", "scopes": ["codegen:generate"], "ttl_days": 3});
    let made = body(gateway.post("/api/v1/keys", key, &asked).await).await;
    let key_id = made["key"]["key_id"].as_str().unwrap();
    assert!(made["key_text"].as_str().unwrap().starts_with("hapa_"));
    let shown = body(gateway.get(&format!("/api/v1/keys/{key_id}"), &mesh.key).await).await;
    assert_eq!(shown["key"]["name"], "ci");
    let listed = body(gateway.get("/api/v1/keys?page_size=1", &mesh.key).await).await;
    assert_eq!(listed["keys"][0]["key_id"], key_id);
    let revoked =
        body(gateway.post(&format!("/api/v1/keys/{key_id}:revoke"), key, &json!({})).await).await;
    assert!(revoked["key"]["revoke_time"].is_string());
    mesh.finish().await;
}

#[tokio::test]
async fn what_is_for_the_mesh_is_not_reachable_and_identity_headers_are_inert() {
    let mesh = TestMesh::start().await;
    let gateway = mesh.gateway(&[]).await;
    for path in [
        "/hapa.auth.v1.AuthService/Authenticate",
        "/hapa.analytics.v1.AnalyticsService/RecordEvents",
        "/nothing",
    ] {
        let request = gateway.request("POST", path).header("content-type", "application/json");
        let reply = request.header("x-mesh-token", mesh.mesh_token()).send().await;
        assert_eq!(refusal(reply).await.1, "E4012", "{path}");
    }
    let forged = gateway.request("GET", "/api/v1/keys").header("x-mesh-token", mesh.mesh_token());
    let reply = forged.send().await;
    assert_eq!(refusal(reply).await.1, "E4003");
    mesh.finish().await;
}

#[tokio::test]
async fn grpc_goes_through_and_a_client_that_leaves_is_noticed_behind_envoy() {
    let mesh = TestMesh::start().await;
    let gateway = mesh.gateway(&[]).await;
    let mut client = CodegenServiceClient::new(gateway.channel_as(Identity::Key(&mesh.key)));
    mesh.engine.once(Script::tokens(["a", "b"]).hold(1));
    let mut frames = client.stream_generate_code(question("q")).await.unwrap().into_inner();
    within("a frame", frames.message()).await.unwrap();
    drop(frames);
    mesh.engine.wait_for_aborted(1).await;
    mesh.finish().await;
}

#[tokio::test]
async fn grpcurl_works_without_proto_files_at_the_mesh_and_at_the_gateway() {
    let mesh = TestMesh::start().await;
    let gateway = mesh.gateway(&[]).await;
    let through = gateway.url.trim_start_matches("http://").to_owned();
    for address in [mesh.address.to_string(), through] {
        let mut command = Command::new("../../.tools/bin/grpcurl");
        command.args(["-plaintext", "-H", &format!("x-api-key: {}", mesh.key)]);
        command.args(["-d", "{\"user_question\":\"q\"}", &address]);
        command.arg("hapa.codegen.v1.CodegenService/StreamGenerateCode").kill_on_drop(true);
        let done = within("grpcurl", command.output()).await.unwrap();
        let said = String::from_utf8(done.stdout).unwrap();
        assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
        assert!(said.contains("\"finishReason\": \"stop\""), "{said}");
    }
    mesh.finish().await;
}

#[tokio::test]
async fn the_configuration_takes_exact_origins_only_and_envoy_accepts_it() {
    let folder = tempfile::tempdir().unwrap();
    for wrong in
        ["*", "https://*.example.com", "example.com", "https://example.com/", "https://a\"b"]
    {
        let refused = Gateway::write(folder.path(), &[("CORS_ORIGINS", wrong)]).await.unwrap_err();
        assert!(refused.contains("CORS_ORIGINS"), "{wrong}: {refused}");
    }
    let origins = "https://editor.example.com,http://localhost:3000";
    let config = Gateway::write(folder.path(), &[("CORS_ORIGINS", origins)]).await.unwrap();
    let mut validate = Command::new("../../.tools/bin/envoy");
    validate.args(["--mode", "validate", "-c"]).arg(config);
    let done = within("envoy --mode validate", validate.output()).await.unwrap();
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
}
