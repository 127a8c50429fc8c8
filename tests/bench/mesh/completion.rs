//! The added latency of a completion in comparison with the engine's own answer. It makes one call at a time,
//! on both paths in turn, to the end of one suggestion.

use std::time::{Duration, Instant};

use anyhow::ensure;
use hapa_proto::codegen::v1::CompleteCodeRequest;
use hapa_proto::codegen::v1::codegen_service_client::CodegenServiceClient;
use tonic::Request;
use tonic::metadata::{Ascii, MetadataValue};
use tonic::transport::{Channel, Endpoint};

use crate::engine::Play;
use crate::http::{Ask, Connection};
use crate::report::{Table, ms, verdict};
use crate::samples::Samples;
use crate::stage::{Stage, loopback};

/// Of one line.
const TOKENS: usize = 8;
const PREFIX: &str = "def greet(name):\n    return ";
const TARGET: f64 = 1.0;

pub(crate) async fn measure(stage: &mut Stage, rounds: usize) -> anyhow::Result<Table> {
    let play = Play { tokens: TOKENS, gap: Duration::ZERO, silence: None };
    stage.engine.play(play).await?;
    let body = serde_json::json!({
        "model": "autocomplete", "prompt": PREFIX, "n": 1, "max_tokens": 128, "logprobs": 1,
        "stream": true, "stream_options": {"include_usage": true}, "stop": ["\n"],
    });
    let ask = Ask::post("/v1/completions", &stage.key, &body.to_string());
    let mut direct = Connection::open(loopback(stage.engine.port)).await?;
    let channel = Endpoint::from_shared(format!("http://{}", stage.hapa.address()))?;
    let mut mesh = CodegenServiceClient::new(channel.connect().await?);
    let key: MetadataValue<Ascii> = stage.key.parse()?;
    let (mut engine, mut whole) = (Samples::default(), Samples::default());
    for round in 0..rounds + rounds / 10 {
        let times = (itself(&mut direct, &ask).await?, suggested(&mut mesh, &key).await?);
        // The first tenth warms up.
        if round >= rounds / 10 {
            engine.push(times.0);
            whole.push(times.1);
        }
    }
    let title =
        format!("Completions of {TOKENS} tokens, one call at a time, {rounds} rounds, in ms");
    let mut table = Table::new(title, &["", "median", "p99", "added median", "target"]);
    let added = whole.beyond(&engine).median();
    let row = |name: &str, samples: &Samples, added: String, target: String| {
        [name.to_owned(), ms(samples.median()), ms(samples.p99()), added, target]
    };
    table.row(row("the engine directly, SSE", &engine, String::new(), String::new()));
    let target = verdict(added, "<", TARGET, " ms added");
    table.row(row("the mesh, gRPC", &whole, ms(added), target));
    Ok(table)
}

async fn itself(engine: &mut Connection, ask: &Ask) -> anyhow::Result<Duration> {
    let (from, mut tokens) = (Instant::now(), 0);
    ensure!(engine.ask(ask).await? == 200, "the engine refused");
    while let Some(more) = engine.tokens().await? {
        tokens += more;
    }
    // Each stands in its log-probabilities too.
    ensure!(tokens as usize >= TOKENS, "{tokens} tokens came");
    Ok(from.elapsed())
}

async fn suggested(
    mesh: &mut CodegenServiceClient<Channel>,
    key: &MetadataValue<Ascii>,
) -> anyhow::Result<Duration> {
    let mut request = Request::new(CompleteCodeRequest {
        prefix: PREFIX.to_owned(),
        max_suggestions: Some(1),
        no_cache: true,
        ..CompleteCodeRequest::default()
    });
    request.metadata_mut().insert("x-api-key", key.clone());
    let from = Instant::now();
    let reply = mesh.complete_code(request).await?.into_inner();
    let took = from.elapsed();
    ensure!(reply.suggestions.len() == 1, "{reply:?}");
    Ok(took)
}
