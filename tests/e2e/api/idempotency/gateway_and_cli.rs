//! Idempotency keys through JSON and browser pages at the gateway, and on the command line.

use hapa_core::idempotency::{HEADER, REPLAYED_HEADER};
use hapa_test_harness::{TestMesh, hapa, within};
use serde_json::{Value, json};

async fn body(reply: reqwest::Response) -> Value {
    serde_json::from_str(&within("a body", reply.text()).await.unwrap()).unwrap()
}

#[tokio::test]
async fn the_gateway_passes_the_header_on_and_lets_pages_send_it() {
    let mesh = TestMesh::start().await;
    let gateway = mesh.gateway(&["https://editor.example"]).await;
    let ask = async |path: &str, asked: Value| {
        let request = gateway.request("POST", path).header("content-type", "application/json");
        let request = request.header("x-api-key", &mesh.key).header(HEADER, "k");
        request.header("origin", "https://editor.example").body(asked.to_string()).send().await
    };
    let question = json!({"user_question": "q"});
    let first = ask("/api/v1/generate-code", question.clone()).await;
    assert_eq!((first.status().as_u16(), first.headers().get(REPLAYED_HEADER)), (200, None));
    let again = ask("/api/v1/generate-code", question).await;
    assert_eq!(again.headers().get(REPLAYED_HEADER).unwrap(), "true");
    let exposed = again.headers().get("access-control-expose-headers").unwrap().to_str().unwrap();
    assert!(exposed.split(", ").any(|name| name == REPLAYED_HEADER), "{exposed}");
    assert_eq!(body(first).await, body(again).await);
    assert_eq!(mesh.engine.counts().started, 1);
    let other = ask("/api/v1/generate-code", json!({"user_question": "r"})).await;
    assert_eq!(other.status().as_u16(), 409);

    let key = json!({"name": "ci", "owner": "tester", "scopes": ["codegen:generate"]});
    let first = body(ask("/api/v1/keys", key.clone()).await).await;
    assert!(first["key_text"].as_str().unwrap().starts_with("hapa_"));
    assert_eq!(first, body(ask("/api/v1/keys", key).await).await);

    let preflight = gateway.request("OPTIONS", "/api/v1/generate-code");
    let preflight = preflight.header("origin", "https://editor.example");
    let preflight = preflight.header("access-control-request-method", "POST");
    let reply = preflight.header("access-control-request-headers", HEADER).send().await;
    let allowed = reply.headers().get("access-control-allow-headers").unwrap().to_str().unwrap();
    assert!(allowed.split(", ").any(|name| name == HEADER), "{allowed}");
    mesh.finish().await;
}

#[tokio::test]
async fn a_command_that_is_repeated_with_its_key_prints_the_first_result() {
    let mesh = TestMesh::start().await;
    let run = async |line: &str| {
        let mut command = hapa();
        command.args(line.split(' ')).env("HAPA_ADDRESS", format!("http://{}", mesh.address));
        command.env("MESH_TOKEN", mesh.mesh_token());
        let done = within(line, command.output()).await.unwrap();
        (done.status.success(), String::from_utf8(done.stdout).unwrap())
    };
    for line in [
        "key create --name ci --owner tester --scope codegen:generate --json --idempotency-key k",
        "user create --email a@example.com --no-password --json --idempotency-key k",
    ] {
        let (first, again) = (run(line).await, run(line).await);
        assert!(first.0 && first.1.len() > 20, "{first:?}");
        assert_eq!(first, again, "{line}");
    }
    let made = run("key create --name x --owner tester --scope codegen:generate --json").await;
    let made: Value = serde_json::from_str(&made.1).unwrap();
    let key_id = made["key"]["key_id"].as_str().unwrap();
    let line = format!("key rotate {key_id} --json --idempotency-key k");
    assert_eq!(run(&line).await, run(&line).await);
    let other =
        "key create --name other --owner tester --scope codegen:generate --idempotency-key k";
    assert!(!run(other).await.0, "another command");
    mesh.finish().await;
}
