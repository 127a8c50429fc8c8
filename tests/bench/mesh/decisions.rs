//! The decisions that every call waits for, in this process: the principal, the credential that auth has
//! checked before, and the rate limit. Nothing waits in these loops, so wall-clock time is processor time,
//! except for time that other processes take. The median excludes that time.

use std::hint::black_box;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use hapa_proto::auth::v1::CreateKeyRequest;
use hapa_proto::auth::v1::auth_service_client::AuthServiceClient;
use hapa_proto::auth::v1::key_service_client::KeyServiceClient;
use hapa_server::auth::principal_cache::{Credential, PrincipalCache};
use hapa_server::rate_limit::{LimitConfig, Limiter, Rate};
use hapa_transport::peer::{self, MESH_TOKEN};
use secrecy::{ExposeSecret as _, SecretString};
use tonic::Request;

use crate::report::{Table, verdict};
use crate::samples::Samples;
use crate::stage::Stage;

const CALLER_TARGET: f64 = 2.0;
const LIMIT_TARGET: f64 = 1.0;
/// Decisions of one measured batch. A batch's milliseconds are a decision's microseconds.
const BATCH: usize = 1_000;
/// More than a processor's first cache holds.
const KEYS: usize = 1_000;
/// A limit that counts calls and is never reached.
pub(crate) const RATE: Rate = Rate::new(1_000_000_000, Duration::from_mins(1));
pub(crate) const METHOD: &str = "/hapa.codegen.v1.CodegenService/StreamGenerateCode";

pub(crate) async fn measure(stage: &Stage, batches: usize) -> anyhow::Result<Table> {
    let title =
        format!("Decisions of admission in process, {batches} batches of {BATCH}, in us each");
    let mut table = Table::new(title, &["", "median", "p99", "target"]);
    let mut row = |name: String, samples: &Samples, target: Option<f64>| {
        let (median, p99) = (samples.median(), samples.p99());
        let target = target.map(|target| verdict(median, "<", target, " us"));
        let cells = [median, p99].map(|value| format!("{value:.3}"));
        let [median, p99] = cells;
        table.row([name, median, p99, target.unwrap_or_default()]);
    };
    let keys = make_keys(stage).await?;
    let digests = timed(batches, async |at| read(&keys[at]).is_some()).await?;
    row("a key's checksum and SHA-256".to_owned(), &digests, None);
    let callers = remembering(stage, &keys).await?;
    let limiter = limiter(None)?;
    for many in [1, KEYS] {
        let whose = if many == 1 { "one key".to_owned() } else { format!("{many} keys by turns") };
        let known = timed(batches, async |at| {
            let Some(presented) = read(&keys[at % many]) else { return false };
            callers.cached(&presented).await.is_some()
        });
        row(
            format!("who calls, with its checksum and SHA-256, {whose}"),
            &known.await?,
            Some(CALLER_TARGET),
        );
        let counted = timed(batches, async |at| {
            let decision = limiter.decide(black_box(&keys[at % many]), METHOD, RATE).await;
            decision.is_some_and(|decision| decision.retry_after.is_none())
        });
        row(format!("the limit, {whose}"), &counted.await?, Some(LIMIT_TARGET));
    }
    Ok(table)
}

/// A limiter, with a Redis that replicas share or without.
pub(crate) fn limiter(redis: Option<&SecretString>) -> anyhow::Result<Limiter> {
    let limits = LimitConfig {
        rate_limit_enabled: true,
        default_rate_limit: 0,
        rate_limit_window_minutes: 1,
        auth_failure_limit: 0,
        redis_timeout_seconds: std::time::Duration::from_millis(500),
        rate_limit_replicas: None,
    };
    Limiter::new(&limits, redis)
}

fn read(key: &str) -> Option<Credential> {
    black_box(Credential::parse(black_box(key), false))
}

/// Batches of a decision that must be positive. The argument is its number in the batch.
async fn timed(
    batches: usize,
    mut decide: impl AsyncFnMut(usize) -> bool,
) -> anyhow::Result<Samples> {
    let mut samples = Samples::default();
    for batch in 0..batches + batches / 10 {
        let (from, mut all) = (Instant::now(), true);
        for at in 0..BATCH {
            all &= decide(at).await;
        }
        let took = from.elapsed();
        ensure!(all, "a decision was not the expected one");
        // The first tenth warms up.
        if batch >= batches / 10 {
            samples.push(took);
        }
    }
    Ok(samples)
}

async fn make_keys(stage: &Stage) -> anyhow::Result<Vec<String>> {
    let mut service = KeyServiceClient::new(peer::plain_channel(&address(stage))?);
    let mut keys = Vec::with_capacity(KEYS);
    for number in 0..KEYS {
        let mut request = Request::new(CreateKeyRequest {
            name: "bench".to_owned(),
            owner: format!("tenant {number}"),
            scopes: vec!["codegen:generate".to_owned()],
            ..CreateKeyRequest::default()
        });
        request.metadata_mut().insert(MESH_TOKEN, stage.mesh_token.expose_secret().parse()?);
        keys.push(service.create_key(request).await?.into_inner().key_text);
    }
    Ok(keys)
}

/// The principal cache trusts an entry for 5 s here, because no revocation feed is connected. All measurements
/// take less time.
async fn remembering(stage: &Stage, keys: &[String]) -> anyhow::Result<PrincipalCache> {
    let callers = PrincipalCache::new(AuthServiceClient::new(peer::token_channel(
        &address(stage),
        &stage.mesh_token,
    )?));
    for key in keys {
        let presented = read(key).context("no key")?;
        let found = callers.find(&presented).await;
        found.map_err(|fault| anyhow::anyhow!("auth did not know a key: {fault:?}"))?;
    }
    Ok(callers)
}

fn address(stage: &Stage) -> String {
    format!("http://{}", stage.hapa.address())
}
