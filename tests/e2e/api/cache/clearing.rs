//! The cache commands of an operator: statistics, and clearing.

use std::process::Stdio;

use hapa_engine_sim::Script;
use hapa_proto::codegen::v1::cache_service_client::CacheServiceClient;
use hapa_proto::codegen::v1::{CacheStats, ClearCacheRequest, GetCacheStatsRequest};
use hapa_test_harness::{Identity, TestChannel, TestMesh, hapa, incident, within};
use serde_json::{Value, json};

use super::{ON, ask};
use crate::api::generate::question;

pub(super) type Cache = CacheServiceClient<TestChannel>;

pub(super) fn cache(mesh: &TestMesh) -> Cache {
    CacheServiceClient::new(mesh.channel_as(Identity::Mesh))
}

pub(super) fn clear(cache_type: &str) -> ClearCacheRequest {
    ClearCacheRequest { cache_type: cache_type.to_owned(), confirm: true }
}

/// Of answers and of profiles.
pub(super) async fn stats(cache: &mut Cache) -> [CacheStats; 2] {
    let reply = within("stats", cache.get_cache_stats(GetCacheStatsRequest {})).await.unwrap();
    reply.into_inner().caches.try_into().unwrap()
}

#[tokio::test]
async fn stats_say_how_full_a_cache_is_and_what_it_was_good_for() {
    let mesh = TestMesh::start_with(&[ON, "--max-cache-size=2"]).await;
    let (mut client, mut cache) = (mesh.client(), cache(&mesh));
    mesh.engine.script(Script::text("x = 1"));
    for text in ["a", "a", "a", "b"] {
        ask(&mut client, text).await.unwrap();
    }
    let [answers, profiles] = stats(&mut cache).await;
    assert_eq!(
        (answers.cache_type.as_str(), answers.backend.as_str()),
        ("code_generation", "memory")
    );
    assert_eq!((answers.entries, answers.hits, answers.misses), (Some(2), 2.0, 2.0));
    assert_eq!((answers.hit_rate, answers.evictions), (0.5, 0.0));
    assert_eq!((answers.ttl_seconds, answers.capacity), (1_800, 2));
    assert!((20.0..200.0).contains(&answers.bytes.unwrap()), "{answers:?}");
    assert_eq!((profiles.cache_type.as_str(), profiles.entries), ("user_profiles", Some(1)));
    assert_eq!((profiles.hits, profiles.misses), (3.0, 1.0));
    ask(&mut client, "c").await.unwrap();
    let [answers, _] = stats(&mut cache).await;
    assert_eq!((answers.entries, answers.evictions), (Some(2), 1.0));
    let off = TestMesh::start().await;
    let [answers, _] = stats(&mut self::cache(&off)).await;
    assert_eq!((answers.backend.as_str(), answers.entries), ("off", Some(0)));
}

#[tokio::test]
async fn a_cleared_cache_knows_nothing_and_the_other_one_all() {
    let mesh = TestMesh::start_with(&[ON]).await;
    let (mut client, mut cache) = (mesh.client(), cache(&mesh));
    ask(&mut client, "q").await.unwrap();
    let cleared = cache.clear_cache(clear("user_profiles")).await.unwrap().into_inner().cleared;
    assert_eq!((cleared.len(), cleared[0].entries, cleared[0].scope.as_str()), (1, 1, "replica"));
    assert!(ask(&mut client, "q").await.unwrap().cached, "that was the other one");
    assert!(stats(&mut cache).await[1].misses > 1.0, "auth was asked again");
    let cleared = cache.clear_cache(clear("all")).await.unwrap().into_inner().cleared;
    let names: Vec<_> = cleared.iter().map(|one| (one.cache_type.as_str(), one.entries)).collect();
    assert_eq!(names, [("code_generation", 1), ("user_profiles", 1)]);
    assert_eq!(stats(&mut cache).await[0].entries, Some(0));
    assert!(!ask(&mut client, "q").await.unwrap().cached);
}

#[tokio::test]
async fn an_answer_on_its_way_outlives_a_clearing_and_is_not_kept() {
    let mesh = TestMesh::start_with(&[ON]).await;
    let mut client = mesh.client();
    mesh.engine.once(Script::tokens(["a", "b"]).hold(1));
    let asking = tokio::spawn(async move { ask(&mut client, "q").await.unwrap() });
    mesh.engine.wait_for_started(1).await;
    cache(&mesh).clear_cache(clear("code_generation")).await.unwrap();
    mesh.engine.release();
    assert_eq!(within("the answer", asking).await.unwrap().generated_code, "ab");
    assert!(!ask(&mut mesh.client(), "q").await.unwrap().cached);
}

#[tokio::test]
async fn clearing_has_to_be_meant() {
    let mesh = TestMesh::start_with(&[ON]).await;
    let wrong = [
        (ClearCacheRequest { confirm: false, ..clear("all") }, "E4001"),
        (clear("everything"), "E4001"),
        (ClearCacheRequest { cache_type: String::new(), confirm: true }, "E4002"),
    ];
    for (request, code) in wrong {
        let status = cache(&mesh).clear_cache(request).await.unwrap_err();
        assert_eq!(incident(&status).0, code);
    }
    mesh.finish().await;
}

#[tokio::test]
async fn the_documented_paths_clear_and_tell_over_json() {
    let mesh = TestMesh::start_with(&[ON]).await;
    let gateway = mesh.gateway(&[]).await;
    let mut request = TestMesh::dev_key();
    request.scopes = vec!["cache:admin".to_owned()];
    let key = mesh.create_key(request).await.key_text;
    let send = async |method: &str, path: &str, body: Option<Value>| {
        let request = gateway.request(method, path).header("x-api-key", &key);
        let request = match body {
            Some(body) => request.header("content-type", "application/json").body(body.to_string()),
            None => request,
        };
        let reply = request.send().await;
        let status = reply.status().as_u16();
        let text = within("the body", reply.text()).await.unwrap();
        let body: Value = serde_json::from_str(&text).unwrap_or_else(|_| panic!("no JSON: {text}"));
        (status, body)
    };
    let path = "/api/v1/cache/clear";
    let mut client = mesh.client();
    within("an answer", client.generate_code(question("q"))).await.unwrap();
    let body = json!({ "cache_type": "code_generation", "confirm": true });
    let (status, reply) = send("DELETE", path, Some(body)).await;
    assert_eq!(status, 200, "{reply}");
    let expected = json!([{ "cache_type": "code_generation", "entries": 1, "scope": "replica" }]);
    assert_eq!(reply["cleared"], expected);
    // For clients that send no body with DELETE.
    let (status, reply) =
        send("DELETE", &format!("{path}?cache_type=all&confirm=true"), None).await;
    assert_eq!(status, 200, "{reply}");
    assert_eq!(reply["cleared"].as_array().unwrap().len(), 2);
    for (path, body) in [
        (path, Some(json!({ "cache_type": "all", "confirm": false }))),
        ("/api/v1/cache/clear?cache_type=all", None),
    ] {
        let (status, reply) = send("DELETE", path, body).await;
        assert_eq!(
            (status, &reply["details"][0]["metadata"]["error_code"]),
            (400, &json!("E4001"))
        );
    }
    let (status, reply) = send("GET", "/api/v1/cache/stats", None).await;
    assert_eq!(status, 200, "{reply}");
    let answers = &reply["caches"][0];
    assert_eq!((&answers["backend"], &answers["misses"]), (&json!("memory"), &json!(1)));
    assert_eq!((&answers["entries"], &answers["hit_rate"]), (&json!(0), &json!(0)));
    mesh.finish().await;
}

#[tokio::test]
async fn an_operator_sees_and_clears_the_caches_from_the_command_line() {
    let mesh = TestMesh::start_with(&[ON]).await;
    ask(&mut mesh.client(), "q").await.unwrap();
    let run = async |line: &str| {
        let mut command = hapa();
        command.args(line.split(' ')).stdin(Stdio::null());
        command.env("HAPA_ADDRESS", format!("http://{}", mesh.address));
        command.env("MESH_TOKEN", mesh.mesh_token());
        let done = within(line, command.output()).await.unwrap();
        let text = |bytes| String::from_utf8(bytes).unwrap();
        (done.status.success(), text(done.stdout), text(done.stderr))
    };
    let (ok, shown, _) = run("cache stats").await;
    assert!(ok && shown.contains("code_generation") && shown.contains("user_profiles"), "{shown}");
    let (ok, lines, _) = run("cache stats --json").await;
    let rows: Vec<Value> = lines.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert!(ok && rows.len() == 2 && rows[0]["entries"] == 1, "{lines}");
    let (ok, _, notes) = run("cache clear --type all").await;
    assert!(!ok && notes.contains("--yes"), "{notes}");
    let (ok, shown, notes) = run("cache clear --type code_generation --yes").await;
    assert!(ok && shown.contains("code_generation"), "{shown}{notes}");
    assert!(!ask(&mut mesh.client(), "q").await.unwrap().cached);
}
