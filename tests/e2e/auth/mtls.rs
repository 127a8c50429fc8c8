//! Services that authenticate by certificates: refusals, the roles that may call an RPC, and the replacement
//! of certificates under load.

mod gateway;

use std::cell::Cell;

use hapa_proto::auth::v1::key_service_client::KeyServiceClient;
use hapa_proto::codegen::v1::GenerateCodeRequest;
use hapa_proto::codegen::v1::codegen_service_client::CodegenServiceClient;
use hapa_proto::system::v1::GetHealthRequest;
use hapa_proto::system::v1::system_service_client::SystemServiceClient;
use hapa_test_harness::{Certificates, Gateway, MtlsCluster, TestMesh, dial, hapa, within};
use hapa_transport::tls::TlsFiles;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tonic::{Code, Request, Status};

use crate::auth::access_table::{call, outcome, rpcs};

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

fn question() -> GenerateCodeRequest {
    GenerateCodeRequest {
        user_question: "add two numbers".to_owned(),
        ..GenerateCodeRequest::default()
    }
}

fn with_key<T>(message: T, key: &str) -> Request<T> {
    let mut request = Request::new(message);
    request.metadata_mut().insert("x-api-key", key.parse().unwrap());
    request
}

/// A key that may make code and read everything, made by an operator's certificate and nothing else.
async fn make_key(mesh: &MtlsCluster) -> String {
    let mut wanted = TestMesh::dev_key();
    wanted.scopes.extend(["errors:read", "analytics:read"].map(str::to_owned));
    let mut keys = KeyServiceClient::new(mesh.dial("operator", "auth"));
    let made = within("a key", keys.create_key(wanted)).await;
    made.expect("an operator may").into_inner().key_text
}

/// A gateway with TLS on both sides.
async fn with_tls(mesh: &MtlsCluster) -> Gateway {
    let own = mesh.certificates.files("gateway");
    let public = [
        ("GATEWAY_TLS_CERT_FILE", own.certificate.to_str().unwrap()),
        ("GATEWAY_TLS_KEY_FILE", own.key.to_str().unwrap()),
    ];
    mesh.gateway(&public).await
}

async fn is_refused(channel: hapa_transport::balancer::BalancedChannel) -> Status {
    let mut health = SystemServiceClient::new(channel);
    let asked = health.get_health(GetHealthRequest {});
    let status = within("a refusal", asked).await.expect_err("it must not be let in");
    assert!(hapa_core::rpc_error::published_code(&status).is_none(), "no handler ran: {status:?}");
    status
}

#[tokio::test]
async fn plain_text_and_certificates_of_another_authority_are_refused() {
    let (mesh, other) = (MtlsCluster::start(&[]).await, Certificates::make().await);
    let address = mesh.mesh("auth");
    for said in [PREFACE, b"GET / HTTP/1.1\r\n\r\n", b"P"] {
        let mut stream = TcpStream::connect(address).await.unwrap();
        stream.write_all(said).await.unwrap();
        // The server closes or resets the connection, and sends no byte.
        let mut heard = Vec::new();
        let _ = within("the end", stream.read_to_end(&mut heard)).await;
        assert!(heard.is_empty(), "{heard:?}");
    }
    // Its own authority trusts the mesh. The mesh does not trust its certificate.
    let authority = mesh.certificates.authority();
    let other_authority = TlsFiles { authority, ..other.files("codegen") };
    is_refused(dial(other_authority, address)).await;
    // The reverse: a server with another authority's certificate is not trusted as a mesh.
    let status = is_refused(dial(other.files("codegen"), address)).await;
    assert_eq!(status.code(), Code::Unavailable);
    assert!(status.message().contains("certificate"), "{}", status.message());
    let refused = mesh.metrics().await.sum("hapa_handshakes_refused_total", &[]);
    assert!(refused >= 4.0, "{refused}");
    let mut health = SystemServiceClient::new(mesh.dial("gateway", "auth"));
    health.get_health(GetHealthRequest {}).await.expect("the right certificate is heard");
    mesh.finish().await;
}

/// The columns: the certificates of auth, codegen, errors, analytics, the gateway, an operator.
/// An RPC that is not in the table allows the operator only: `33333+`, with E4003 for the other roles.
const TABLE: &[(&str, &str)] = &[
    ("hapa.analytics.v1.AnalyticsService/GetPerformance", "33+33+"),
    ("hapa.analytics.v1.AnalyticsService/RecordEvents", "++++55"),
    ("hapa.auth.v1.AuthService/Authenticate", "++++55"),
    ("hapa.auth.v1.AuthService/ReserveTokens", "5+5555"),
    ("hapa.auth.v1.AuthService/SettleTokens", "5+5555"),
    ("hapa.auth.v1.AuthService/WatchRevocations", "++++55"),
    ("hapa.auth.v1.SessionService/CreateSession", "++++++"),
    ("hapa.auth.v1.SessionService/RefreshSession", "++++++"),
    ("hapa.errors.v1.ErrorTrackingService/GetDashboard", "++++3+"),
    ("hapa.errors.v1.ErrorTrackingService/ReportOccurrences", "++++3+"),
    ("hapa.errors.v1.GatewayReportService/ReportRefusals", "5555+5"),
    ("hapa.system.v1.SystemService/GetHealth", "++++++"),
];

#[tokio::test]
async fn every_certificate_may_call_what_its_role_needs_and_nothing_else() {
    // All calls come from one address, so the limit of failed attempts is off.
    let mesh = MtlsCluster::start(&["--auth-failure-limit=0"]).await;
    let mut table: std::collections::BTreeMap<_, _> = TABLE.iter().copied().collect();
    for rpc in rpcs() {
        let expected = table.remove(rpc.as_str()).unwrap_or("33333+");
        let to = match rpc.split('.').nth(1).unwrap() {
            "system" => "auth",
            role => role,
        };
        let mut seen = String::new();
        for by in ["auth", "codegen", "errors", "analytics", "gateway", "operator"] {
            seen.push(outcome(call(mesh.dial(by, to), &rpc).await));
        }
        assert_eq!(seen, expected, "{rpc}");
    }
    assert!(table.is_empty(), "no RPC: {table:?}");
    mesh.finish().await;
}

#[tokio::test]
async fn a_uri_alone_proves_a_role_where_it_begins_as_it_must() {
    let mesh = MtlsCluster::start_with(Certificates::make_spiffe().await, &[]).await;
    let key = make_key(&mesh).await;
    let may = async |by: &str, rpc: &str| outcome(call(mesh.dial(by, "auth"), rpc).await);
    let reserve = "hapa.auth.v1.AuthService/ReserveTokens";
    for (by, expected) in [("codegen", '+'), ("errors", '5'), ("gateway", '5'), ("operator", '5')] {
        assert_eq!(may(by, reserve).await, expected, "{by}");
    }
    let shown = mesh.certificates.files("operator");
    let mut command = hapa();
    command
        .args(["key", "list", "--json"])
        .env("HAPA_ADDRESS", format!("https://{}", mesh.mesh("auth")));
    command.env("HAPA_CERT_FILE", shown.certificate).env("HAPA_KEY_FILE", shown.key);
    let listed =
        within("a list", command.env("HAPA_CA_FILE", shown.authority).output()).await.unwrap();
    assert!(listed.status.success(), "{}", String::from_utf8_lossy(&listed.stderr));
    let gateway = mesh.gateway(&[]).await;
    let body = json!({"user_question": "add two numbers"});
    let reply = gateway.post("/api/v1/generate-code", Some(&key), &body).await;
    assert_eq!(reply.status(), 200, "codegen and auth");
    for path in ["/api/v1/keys", "/api/v1/errors/dashboard", "/api/v1/analytics/performance"] {
        assert_eq!(gateway.get(path, &key).await.status(), 200, "{path}");
    }
    // Analytics receives codegen's event of the call.
    within("the call to be counted", async {
        while mesh.metrics().await.sum("hapa_outbox_relayed_total", &["usage"]) < 1.0 {
            tokio::time::sleep(std::time::Duration::from_millis(10)).await;
        }
    })
    .await;
    mesh.finish().await;

    let flags = ["--tls-spiffe-prefix=spiffe://elsewhere/", "--auth-failure-limit=0"];
    let mesh = MtlsCluster::start_with(Certificates::make_spiffe().await, &flags).await;
    let may = async |by: &str, rpc: &str| outcome(call(mesh.dial(by, "auth"), rpc).await);
    assert_eq!(may("codegen", reserve).await, '5');
    assert_eq!(may("operator", "hapa.auth.v1.KeyService/ListKeys").await, '3');
    mesh.finish().await;
}

#[tokio::test]
async fn a_certified_mesh_answers_through_a_gateway_with_tls_on_both_sides() {
    let mesh = MtlsCluster::start(&[]).await;
    let key = make_key(&mesh).await;
    let address = |role: &str| format!("https://{}", mesh.mesh(role));
    let gateway = with_tls(&mesh).await;
    assert!(gateway.url.starts_with("https://"));
    let ca = mesh.certificates.authority();
    let command = async |arguments: &[&str], more: &[(&str, &str)]| {
        let mut command = hapa();
        command.args(arguments).env("HAPA_CA_FILE", &ca).envs(more.iter().copied());
        let done = within("a command", command.output()).await.unwrap();
        let said = String::from_utf8_lossy(&done.stderr).into_owned();
        (done.status.success(), String::from_utf8_lossy(&done.stdout).into_owned() + &said)
    };
    let door = [("HAPA_ADDRESS", gateway.url.as_str()), ("HAPA_API_KEY", &key)];
    let (done, said) = command(&["generate", "--json", "add two numbers"], &door).await;
    assert!(done && said.contains("finished"), "{said}");
    // The gateway's certificate is on every call that it forwards, and identifies none of its callers.
    let (done, said) = command(&["key", "list"], &[door[0]]).await;
    assert!(!done && !said.contains("\"keys\""), "{said}");
    let (done, said) =
        command(&["key", "list", "--json"], &[door[0], ("HAPA_API_KEY", &key)]).await;
    assert!(done && said.contains("tester"), "{said}");

    // At the mesh port an operator's certificate needs no credential. A client without a certificate is
    // refused.
    let direct = address("auth");
    let files = mesh.certificates.files("operator");
    let shown = [
        ("HAPA_ADDRESS", direct.as_str()),
        ("HAPA_CERT_FILE", files.certificate.to_str().unwrap()),
        ("HAPA_KEY_FILE", files.key.to_str().unwrap()),
    ];
    let (done, said) = command(&["key", "list", "--json"], &shown).await;
    assert!(done && said.contains("tester"), "{said}");
    let (done, _) = command(&["probe"], &shown[..1]).await;
    assert!(!done, "no certificate");
    mesh.finish().await;
}

#[tokio::test]
async fn certificates_are_replaced_under_load_and_no_call_fails() {
    let mesh = MtlsCluster::start(&["--max-connection-age-seconds=1"]).await;
    let key = make_key(&mesh).await;
    let serial = |pem: std::path::PathBuf| std::fs::read_to_string(pem).unwrap();
    let file = mesh.certificates.files("codegen").certificate;
    let first = serial(file.clone());
    let (mut calls, mut failed, mut renewed) = (0, Vec::new(), 0);
    let mut client = CodegenServiceClient::new(mesh.dial("gateway", "codegen"));
    while calls < 1_000 || renewed < 2 {
        if calls % 400 == 200 {
            mesh.certificates.renew().await;
            renewed += 1;
        }
        let replies = (0..10).map(|_| {
            let mut client = client.clone();
            let request = with_key(question(), &key);
            async move { client.generate_code(request).await }
        });
        for reply in within("answers", futures_util::future::join_all(replies)).await {
            calls += 1;
            failed.extend(reply.err());
        }
        // A new client, with the present certificates.
        if calls % 100 == 0 {
            client = CodegenServiceClient::new(mesh.dial("gateway", "codegen"));
        }
    }
    assert!(failed.is_empty(), "{} of {calls} failed: {:?}", failed.len(), failed[0]);
    assert_ne!(first, serial(file), "they were replaced");
    mesh.finish().await;
}

#[tokio::test]
async fn the_authority_itself_is_replaced_under_load_and_no_call_fails() {
    let mesh = MtlsCluster::start(&["--max-connection-age-seconds=1"]).await;
    let key = make_key(&mesh).await;
    let (own, next) = (&mesh.certificates, Certificates::make().await);
    let (rounds, done) = (Cell::new(0), Cell::new(false));
    let load = async {
        while !done.get() {
            // A new client, with the present certificates.
            let mut client = CodegenServiceClient::new(mesh.dial("gateway", "codegen"));
            for _ in 0..5 {
                let reply = client.generate_code(with_key(question(), &key));
                within("an answer", reply).await.expect("no call fails");
            }
            rounds.set(rounds.get() + 1);
        }
    };
    let replacing = async {
        own.trust(&[own, &next]);
        next.trust(&[own, &next]);
        everywhere(&mesh, "the new authority to be believed", &next.files("operator"), true).await;
        let kept = tempfile::tempdir().unwrap();
        own.trade(&next, kept.path());
        let [certificate, key] =
            ["tls.crt", "tls.key"].map(|f| kept.path().join("operator").join(f));
        let old = TlsFiles { certificate, key, authority: next.authority() };
        everywhere(&mesh, "the new certificates to be shown", &old, true).await;
        let round = rounds.get();
        within("the last with an old one to go", async {
            while rounds.get() < round + 2 {
                tokio::task::yield_now().await;
            }
        })
        .await;
        own.trust(&[&next]);
        everywhere(&mesh, "the old authority to be forgotten", &old, false).await;
        done.set(true);
    };
    tokio::join!(load, replacing);
    println!("the authority was replaced during {} calls", rounds.get() * 5);
    mesh.finish().await;
}

/// Waits until every role, or no role, accepts a client with these certificates.
async fn everywhere(mesh: &MtlsCluster, what: &str, shown: &TlsFiles, is_let_in: bool) {
    for role in ["auth", "codegen", "errors", "analytics"] {
        let address = mesh.mesh(role);
        let is_in = async || {
            let channel = dial(shown.clone(), address);
            Box::pin(channel.connect()).await.is_ok()
        };
        within(what, async { while is_in().await != is_let_in {} }).await;
    }
}

#[tokio::test]
async fn a_broken_file_changes_nothing_and_is_complained_of_until_it_is_whole() {
    let mesh = MtlsCluster::start(&[]).await;
    make_key(&mesh).await;
    let file = mesh.certificates.files("auth").certificate;
    let good = std::fs::read(&file).unwrap();
    std::fs::write(&file, "no certificate").unwrap();
    let says = async |word: &str, is_there: bool| {
        within("the checks to see it", async {
            while mesh.page("auth", "/readyz").await.contains(word) != is_there {
                tokio::task::yield_now().await;
            }
        })
        .await;
    };
    says("what was read before stays in force", true).await;
    assert!(mesh.page("auth", "/readyz").await.starts_with("ready"), "it works as before");
    mesh.dial("operator", "auth").connect().await.expect("what was read before is in force");
    std::fs::write(&file, good).unwrap();
    says("certificates", false).await;
    let left = mesh.metrics().await.sum("hapa_certificate_expiry_seconds", &[]);
    assert!(left > 86_400.0, "{left}");
    mesh.finish().await;
}

#[tokio::test]
async fn what_is_in_force_is_shown_and_half_a_setting_is_refused_by_its_name() {
    let certificates = Certificates::make().await;
    let settings = certificates.settings("all");
    let config = async |settings: &[(&str, String)]| {
        let mut command = hapa();
        command.args(["config", "--json"]).env("MESH_TOKEN", "x".repeat(40));
        command.envs(settings.iter().map(|(name, value)| (*name, value)));
        within("hapa config", command.output()).await.unwrap()
    };
    let shown: Value = serde_json::from_slice(&config(&settings).await.stdout).unwrap();
    assert_eq!(shown["MESH_TOKEN"], "(not in force: TLS_CERT_FILE is)");
    let shown: Value = serde_json::from_slice(&config(&[]).await.stdout).unwrap();
    assert_eq!(shown["MESH_TOKEN"], "(redacted)");
    let plain = [&settings[..], &[("AUTH_ADDRESS", "http://auth:1".to_owned())]].concat();
    for (wrong, name) in [
        (&settings[..2], "TLS_CA_FILE"),
        (&settings[1..], "TLS_CERT_FILE"),
        (&plain, "AUTH_ADDRESS"),
    ] {
        let done = config(wrong).await;
        assert_eq!(done.status.code(), Some(78), "{name}");
        assert!(String::from_utf8_lossy(&done.stderr).contains(name));
    }
}
