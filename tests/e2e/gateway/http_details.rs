//! Details of HTTP at the gateway: HEAD, HTTP/1.0, content sniffing, request ids.

use hapa_proto::auth::v1::CreateKeyRequest;
use hapa_test_harness::{TestMesh, within};
use serde_json::json;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

/// What the gateway answers to this text, until it closes the connection.
async fn raw(url: &str, text: &str) -> String {
    let address = url.trim_start_matches("http://");
    let mut socket = TcpStream::connect(address).await.unwrap();
    socket.write_all(text.as_bytes()).await.unwrap();
    let mut answer = Vec::new();
    within("the answer", socket.read_to_end(&mut answer)).await.unwrap();
    String::from_utf8(answer).unwrap()
}

#[tokio::test]
async fn head_answers_where_get_does_without_a_body() {
    let mesh = TestMesh::start().await;
    let gateway = mesh.gateway(&[]).await;
    let paths =
        ["/health", "/api/v1/code/models", "/api/v1/keys?page_size=1", "/api/v1/errors/dashboard"];
    for path in paths {
        for key in [mesh.key.as_str(), ""] {
            let got = gateway.request("GET", path).header("x-api-key", key).send().await;
            let head = gateway.request("HEAD", path).header("x-api-key", key).send_raw().await;
            assert_eq!(head.status(), got.status(), "{path}");
            assert_eq!(head.headers()["content-type"], got.headers()["content-type"], "{path}");
            assert!(head.headers().contains_key("x-request-id"), "{path}");
            assert_eq!(within("the end", head.bytes()).await.unwrap().len(), 0, "{path}");
        }
    }
    for path in ["/nothing", "/api/v1/generate-code"] {
        let head = gateway.request("HEAD", path).send_raw().await;
        assert_eq!(head.status(), 404, "{path}");
    }
    // Two on one connection: not a byte of a body came between.
    let request = "HEAD /health HTTP/1.1\r\nhost: a\r\n\r\n";
    let last = "GET /nothing HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n";
    let answers = raw(&gateway.url, &format!("{request}{request}{last}")).await;
    let heads: Vec<_> = answers.split("\r\n\r\n").collect();
    assert_eq!(heads.len(), 4, "{answers}");
    for (head, status) in heads.iter().zip(["200", "200", "404"]) {
        assert!(head.starts_with(&format!("HTTP/1.1 {status} ")), "{answers}");
    }
    mesh.finish().await;
}

#[tokio::test]
async fn head_of_a_stream_ends() {
    let mesh = TestMesh::start().await;
    let gateway = mesh.gateway(&[]).await;
    let scopes = vec!["errors:read".to_owned(), "errors:admin".to_owned()];
    let made = mesh.create_key(CreateKeyRequest { scopes, ..TestMesh::dev_key() }).await;
    let head = gateway.request("HEAD", "/api/v1/errors/occurrences:watch");
    let head = head.header("x-api-key", &made.key_text).send_raw().await;
    assert_eq!(head.status(), 200);
    assert_eq!(head.headers()["content-type"], "text/event-stream");
    mesh.finish().await;
}

#[tokio::test]
async fn http_1_0_clients_are_answered() {
    let mesh = TestMesh::start().await;
    let gateway = mesh.gateway(&[]).await;
    let health = raw(&gateway.url, "GET /health HTTP/1.0\r\n\r\n").await;
    assert!(health.starts_with("HTTP/1.0 200 ") && health.contains("\"status\""), "{health}");
    let body = json!({ "user_question": "q" }).to_string();
    let ask = |path: &str| {
        format!(
            "POST {path} HTTP/1.0\r\nx-api-key: {}\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
            mesh.key,
            body.len()
        )
    };
    let answer = raw(&gateway.url, &ask("/api/v1/generate-code")).await;
    assert!(answer.starts_with("HTTP/1.0 200 ") && answer.contains("generated_code"), "{answer}");
    let events = raw(&gateway.url, &ask("/api/v1/enhanced-stream-generate")).await;
    assert!(events.starts_with("HTTP/1.0 200 ") && events.contains("\"finished\""), "{events}");
    mesh.finish().await;
}

#[tokio::test]
async fn no_reply_may_be_sniffed() {
    let mesh = TestMesh::start().await;
    let gateway = mesh.gateway(&[]).await;
    let asked = json!({ "user_question": "q" });
    let key = Some(mesh.key.as_str());
    for reply in [
        gateway.post("/api/v1/generate-code", key, &asked).await,
        gateway.post("/api/v1/enhanced-stream-generate", key, &asked).await,
        gateway.post("/api/v1/generate-code", None, &asked).await,
        gateway.get("/health", "").await,
        gateway.get("/nothing", "").await,
        gateway.get("/a%2fb", "").await,
    ] {
        assert_eq!(reply.headers()["x-content-type-options"], "nosniff", "{}", reply.url());
        assert_eq!(reply.headers()["cache-control"], "no-store", "{}", reply.url());
    }
    mesh.finish().await;
}

#[tokio::test]
async fn the_request_id_of_a_reply_is_the_one_that_is_logged() {
    let mesh = TestMesh::start().await;
    let gateway = mesh.gateway(&[]).await;
    let long = "a".repeat(3_000);
    for (presented, is_kept) in [
        (&["good-id_1.2"][..], true),
        (&["a b"], false),
        (&["a,b"], false),
        (&["one", "two"], false),
        (&["\u{1}x"][..0], false),
        (&["\"quoted\""], false),
        (&[long.as_str()], false),
        (&[&long[..128]], true),
        (&[&long[..129]], false),
        (&[""], false),
    ] {
        for path in ["/api/v1/code/models", "/api/v1/nothing"] {
            let mut request = gateway.request("GET", path).header("x-api-key", &mesh.key);
            for id in presented {
                request = request.header("x-request-id", id);
            }
            let reply = request.send().await;
            let told: Vec<_> = reply.headers().get_all("x-request-id").iter().collect();
            assert_eq!(told.len(), 1, "{presented:?} {told:?}");
            let told = told[0].to_str().unwrap().to_owned();
            assert!(hapa_core::call::is_request_id(&told), "{presented:?}: {told}");
            assert_eq!(presented.contains(&told.as_str()), is_kept, "{presented:?}: {told}");
            within("the line of the access log", async {
                while !gateway.access_log().iter().any(|line| line["request_id"] == told.as_str()) {
                    tokio::time::sleep(std::time::Duration::from_millis(10)).await;
                }
            })
            .await;
        }
    }
    // A body that names the id which the mesh logged: the header is the same.
    let asked = json!({ "user_question": "q" });
    let request = gateway.request("POST", "/api/v1/generate-code").header("x-api-key", &mesh.key);
    let request = request.header("content-type", "application/json").header("x-request-id", "a b");
    let reply = request.body(asked.to_string()).send().await;
    let told = reply.headers()["x-request-id"].to_str().unwrap().to_owned();
    let answer: serde_json::Value = serde_json::from_str(&reply.text().await.unwrap()).unwrap();
    assert_eq!(answer["request_id"], told.as_str());
    mesh.finish().await;
}
