//! Every role is restarted, replica by replica, behind a real gateway and under load. No unary call fails, and
//! every open stream ends complete or with an error.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use hapa_engine_sim::Script;
use hapa_proto::analytics::v1::GetUsageRequest;
use hapa_proto::analytics::v1::analytics_service_client::AnalyticsServiceClient;
use hapa_proto::auth::v1::GetKeyRequest;
use hapa_proto::auth::v1::key_service_client::KeyServiceClient;
use hapa_proto::codegen::v1::codegen_service_client::CodegenServiceClient;
use hapa_proto::codegen::v1::stream_generate_code_response::Event;
use hapa_proto::codegen::v1::{GenerateCodeRequest, ListModelsRequest};
use hapa_proto::errors::v1::GetDashboardRequest;
use hapa_proto::errors::v1::error_tracking_service_client::ErrorTrackingServiceClient;
use hapa_test_harness::{
    CodegenClient, Gateway, HaCluster, Identity, RoleProcess, TestChannel, TestMesh, incident,
    within,
};
use tokio::task::JoinSet;
use tokio::time::sleep;
use tonic::{Code, Status};

use super::{Load, POLL_INTERVAL, say};
use crate::api::generate::question;

const STREAMS: usize = 200;
/// Connections of clients to the gateway, for streams and for calls.
const CLIENTS: usize = 8;
/// Streams that the engine goes on with while a replica of codegen stops.
const RELEASED: usize = 50;

#[tokio::test(flavor = "multi_thread")]
async fn a_rolling_restart_of_every_role_loses_no_call_and_ends_every_stream_with_a_status() {
    // The gateway polls health every 2 s, for 1 s at most.
    let drain = [("DRAIN_DELAY_SECONDS", "3"), ("DRAIN_TIMEOUT_SECONDS", "6")];
    let mut mesh = Box::pin(HaCluster::start_with(&drain)).await;
    let mut wanted = TestMesh::dev_key();
    wanted.scopes.extend(["errors:read", "analytics:read"].map(str::to_owned));
    let made = mesh.create_key(wanted).await;
    let (key, key_id) = (made.key_text, made.key.unwrap().key_id);
    let streams = Streams::open(&mesh, &key).await;
    let load = load(&mesh.gateway, &key, &key_id);
    load.has_called(20 * CLIENTS).await;

    // The replicas of a role restart one after the other. Roles without streams restart in parallel.
    tokio::join!(
        roll(&mut mesh.auth, "KeyService/GetKey"),
        roll(&mut mesh.errors, "GetDashboard"),
        roll(&mut mesh.analytics, "GetUsage"),
    );
    assert_eq!(streams.over(), 0, "streams go on while others restart");
    for replica in &mut mesh.codegen {
        replica.ask_to_stop().await;
        (0..RELEASED).for_each(|_| mesh.engine.release());
        comes_back(replica, "GenerateCode").await;
    }
    load.has_called(20 * CLIENTS).await;

    let calls = load.end().await;
    let endings = streams.ended().await;
    say(&format!("every role restarted: {} calls, streams that ended: {endings:?}", calls.len()));
    let failed: Vec<_> = calls.into_iter().flatten().collect();
    assert!(failed.is_empty(), "{} calls were lost: {failed:?}", failed.len());
    assert_eq!(endings.values().sum::<usize>(), STREAMS);
    for ending in endings.keys() {
        assert!(ending == WHOLE || ending == "E5008", "{endings:?}");
    }
    assert!(endings.contains_key(WHOLE), "none of those that the engine went on with: {endings:?}");
}

const WHOLE: &str = "whole";

/// Restarts one replica after the other.
async fn roll(replicas: &mut [RoleProcess; 2], rpc: &str) {
    for replica in replicas {
        replica.ask_to_stop().await;
        comes_back(replica, rpc).await;
    }
}

/// Waits for the end of a process and for its successor, until calls come to that one again.
async fn comes_back(replica: &mut RoleProcess, rpc: &str) {
    replica.has_stopped().await;
    replica.start_again().await;
    within("calls to come to a new replica", async {
        while replica.metrics().await.sum("hapa_requests_total", &[rpc, "code=\"OK\""]) < 1.0 {
            sleep(POLL_INTERVAL).await;
        }
    })
    .await;
}

/// Streams that the engine holds in the middle.
struct Streams {
    over: Arc<AtomicUsize>,
    readers: JoinSet<String>,
}

impl Streams {
    async fn open(mesh: &HaCluster, key: &str) -> Streams {
        let mut streams = Streams { over: Arc::default(), readers: JoinSet::new() };
        (0..STREAMS).for_each(|_| mesh.engine.once(Script::tokens(["a", "b"]).hold(1)));
        let clients: Vec<_> = (0..CLIENTS)
            .map(|_| CodegenServiceClient::new(mesh.gateway.channel_as(Identity::Key(key))))
            .collect();
        for (number, client) in clients.iter().cycle().take(STREAMS).enumerate() {
            let (mut client, over) = (client.clone(), Arc::clone(&streams.over));
            streams.readers.spawn(async move {
                let question = question(&format!("question {number}"));
                let ending = ending(&mut client, question).await;
                over.fetch_add(1, Ordering::Relaxed);
                ending
            });
        }
        mesh.engine.wait_until(|counts| counts.held >= STREAMS as u64).await;
        streams
    }

    fn over(&self) -> usize {
        self.over.load(Ordering::Relaxed)
    }

    /// How many ended in which way.
    async fn ended(self) -> BTreeMap<String, usize> {
        let mut endings = BTreeMap::new();
        for ending in within("the streams", self.readers.join_all()).await {
            *endings.entry(ending).or_default() += 1;
        }
        endings
    }
}

/// Reads a stream to its end: whole, or the published code of its last frame and its status.
async fn ending(client: &mut CodegenClient, question: GenerateCodeRequest) -> String {
    let mut frames = match client.stream_generate_code(question).await {
        Ok(reply) => reply.into_inner(),
        Err(status) => return format!("not begun: {status:?}"),
    };
    let mut last = None;
    loop {
        match (frames.message().await, &last) {
            (Ok(Some(frame)), _) => last = frame.event,
            (Ok(None), Some(Event::Finished(_))) => return WHOLE.to_owned(),
            (Err(status), Some(Event::Failed(failed)))
                if status.code() == Code::Unavailable
                    && incident(&status).1 == failed.incident_id =>
            {
                return incident(&status).0;
            }
            (end, last) => return format!("{last:?}, then {end:?}"),
        }
    }
}

/// Callers that repeatedly call every role. Failed calls are printed.
fn load(gateway: &Gateway, key: &str, key_id: &str) -> Load<Option<String>> {
    let mut load = Load::none();
    for _ in 0..CLIENTS {
        let (wire, key_id) = (gateway.channel_as(Identity::Key(key)), key_id.to_owned());
        load.add(4 * POLL_INTERVAL, move || {
            let (wire, key_id) = (wire.clone(), key_id.clone());
            async move { Box::pin(call_each(&wire, &key_id)).await }
        });
    }
    load
}

/// One call of each role, at once; of code generation two.
async fn call_each(wire: &TestChannel, key_id: &str) -> [Option<String>; 5] {
    let mut codegen = [(); 2].map(|()| CodegenServiceClient::new(wire.clone()));
    let [one, other] = &mut codegen;
    let mut keys = KeyServiceClient::new(wire.clone());
    let mut errors = ErrorTrackingServiceClient::new(wire.clone());
    let mut analytics = AnalyticsServiceClient::new(wire.clone());
    let key = GetKeyRequest { key_id: key_id.to_owned() };
    let calls = Box::pin(async {
        tokio::join!(
            one.generate_code(question("q")),
            other.list_models(ListModelsRequest {}),
            keys.get_key(key),
            errors.get_dashboard(GetDashboardRequest {}),
            analytics.get_usage(GetUsageRequest::default()),
        )
    });
    let (made, models, key, errors, usage) = within("answers", calls).await;
    let lost =
        |rpc: &str, status: Option<Status>| status.map(|status| format!("{rpc}: {status:?}"));
    [
        lost("GenerateCode", made.err()),
        lost("ListModels", models.err()),
        lost("GetKey", key.err()),
        lost("GetDashboard", errors.err()),
        lost("GetUsage", usage.err()),
    ]
}
