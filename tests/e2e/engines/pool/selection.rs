//! The choice of an engine: any with the model, preferably the one of the session or of the adapter.

use hapa_engine_sim::{Engine, Script};
use hapa_proto::codegen::v1::GenerateCodeRequest;
use hapa_test_harness::{TestMesh, within};

use super::{ask, cluster, in_session, is_whole, model, model_becomes};
use crate::api::generate::{question, stream};

fn counts(mesh: &TestMesh) -> Vec<u64> {
    mesh.engines().map(|engine| engine.counts().started).collect()
}

#[tokio::test]
async fn calls_spread_and_a_session_stays_with_its_engine_until_that_has_too_much() {
    let mesh = cluster(3).await;
    ask(&mesh, 60, 1).await.iter().for_each(is_whole);
    let spread = counts(&mesh);
    assert!(spread.iter().all(|count| *count > 0), "{spread:?}");

    for _ in 0..12 {
        is_whole(&stream(&mut mesh.client(), in_session("editor")).await);
    }
    let grown: Vec<_> = counts(&mesh).iter().zip(&spread).map(|(now, then)| now - then).collect();
    let home = grown.iter().position(|count| *count == 12);
    let home = home.unwrap_or_else(|| panic!("a session went to {grown:?}"));

    // Streams that stay open: beyond the cap the session goes elsewhere.
    mesh.engines().for_each(|engine| engine.script(Script::tokens(["a", "b"]).hold(1)));
    let mut open = Vec::new();
    for _ in 0..14 {
        let call = async { mesh.client().stream_generate_code(in_session("editor")).await };
        let mut frames = within("a stream", call).await.unwrap().into_inner();
        within("its start", frames.message()).await.unwrap();
        within("its first token", frames.message()).await.unwrap();
        open.push(frames);
    }
    let held: Vec<_> = mesh.engines().map(Engine::in_flight).collect();
    assert!(held[home] >= 8 && held[home] < 14, "{held:?} and its home is {home}");
}

#[tokio::test]
async fn only_engines_that_have_a_model_are_asked_for_it() {
    let mesh = cluster(3).await;
    mesh.engine.remove_adapter("comment");
    mesh.others[0].add_adapter("fresh");
    let fresh = model_becomes(&mesh, "fresh", |_| true).await;
    assert_eq!((fresh.replicas, fresh.parent.as_str()), (1, "sim-coder"));
    model_becomes(&mesh, "comment", |model| model.replicas == 2).await;
    for (name, count) in [("comment", 20), ("fresh", 10)] {
        for _ in 0..count {
            let request = GenerateCodeRequest { model: name.to_owned(), ..question("q") };
            is_whole(&stream(&mut mesh.client(), request).await);
        }
    }
    let asked = |engine: &Engine, name: &str| {
        engine.requests().iter().filter(|request| request.body["model"] == name).count()
    };
    assert_eq!(asked(&mesh.engine, "comment"), 0);
    assert_eq!(asked(&mesh.others[0], "fresh"), 10);
}

#[tokio::test]
async fn an_adapter_is_asked_for_where_it_is_in_memory() {
    let mesh = cluster(3).await;
    let request = || GenerateCodeRequest { model: "prompt".to_owned(), ..question("q") };
    let before = model_becomes(&mesh, "prompt", |model| model.replicas_healthy == 3).await;
    assert_eq!((before.replicas_resident, before.status.as_str()), (0, "healthy"));
    assert_eq!(model(&mesh, "sim-coder").await.unwrap().replicas_resident, 3);
    mesh.others[1].script(Script::tokens(["a", "b"]).hold(1));
    let mut holding = None;
    while mesh.others[1].in_flight() == 0 {
        let mut frames = mesh.client().stream_generate_code(request()).await.unwrap().into_inner();
        within("a frame", frames.message()).await.unwrap();
        holding = Some(frames);
    }
    super::answers(&mesh.others[1]);
    model_becomes(&mesh, "prompt", |model| model.replicas_resident == 1).await;
    let before = counts(&mesh);
    for _ in 0..6 {
        is_whole(&stream(&mut mesh.client(), request()).await);
    }
    let after: Vec<_> = counts(&mesh).iter().zip(before).map(|(now, then)| now - then).collect();
    assert_eq!(after, [0, 0, 6]);
    drop(holding);
}

#[tokio::test]
async fn a_name_stands_for_its_addresses_and_stays_in_the_host_header() {
    let engine = Engine::start();
    let name = format!("localhost:{}", engine.address().port());
    let flag = format!("--ai-model-endpoint=dns+http://{name}/v1");
    let mesh = TestMesh::start_with(&[&flag]).await;
    assert!(stream(&mut mesh.client(), question("q")).await.finished.is_some());
    assert_eq!(engine.requests()[0].header("host"), Some(name.as_str()));
    assert_eq!(mesh.engine.counts().started, 0);
}
