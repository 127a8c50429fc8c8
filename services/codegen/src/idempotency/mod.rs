//! GenerateCode and CompleteCode under an idempotency key: the engine is asked once, and a repetition
//! gets the first reply.
//!
//! This layer stands around the RPCs and knows nothing of how a reply is made. Requests with one key
//! run one after the other, in this process by a lock and across replicas by a lease in Redis. Only
//! replies are remembered: after a failure or a cancellation the next request with the key runs.

mod claim;
mod lock;
mod memory;
mod shared;

use std::sync::Arc;
use std::time::Duration;

use hapa_core::call::Call;
use hapa_core::call_stats::Report;
use hapa_core::idempotency::IdempotentRequest;
use hapa_core::rpc_error::{ErrorCode, Fault};
use hapa_core::service::{ServiceSpec, Shutdown};
use hapa_proto::codegen::v1::{CompleteCodeResponse, GenerateCodeResponse};
use prost::Message;
use secrecy::SecretString;
use tokio::time::{Instant, MissedTickBehavior, interval_at};
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status};

use self::claim::Claim;
use self::lock::Locks;
use self::memory::Memory;
use self::shared::{LEASE, Lookup, Shared};
use crate::error::Error;

/// Most replies that are remembered: in Redis by all replicas together, and in each process.
const MAX_RECORDS: usize = 20_000;
/// Most bytes of them.
const MAX_BYTES: usize = 64 * 1024 * 1024;
/// Most replies of one caller, so that no caller takes the room of the others.
const MAX_RECORDS_PER_CALLER: usize = 4_000;

const ALONE: &str = "this replica alone checked the idempotency key, because Redis did not answer";

/// A reply that can be repeated.
pub(crate) trait Reply: Message + Default {
    /// Adds a warning for the caller.
    fn warn(&mut self, warning: String);
    /// Notes what the reply is for the usage event of its call.
    fn note(&self, report: &Report);
}

impl Reply for GenerateCodeResponse {
    fn warn(&mut self, warning: String) {
        self.warnings.push(warning);
    }

    fn note(&self, report: &Report) {
        report.model(&self.model);
        report.task(&self.task);
    }
}

impl Reply for CompleteCodeResponse {
    fn warn(&mut self, warning: String) {
        self.warnings.push(warning);
    }

    fn note(&self, report: &Report) {
        report.model(&self.model);
        report.task(crate::completion::TASK);
    }
}

/// Remembers replies under idempotency keys.
pub(crate) struct Idempotency {
    locks: Locks,
    memory: Memory,
    /// `None` without REDIS_URL: each process remembers its own replies.
    shared: Option<Shared>,
    streams_end: CancellationToken,
}

impl Idempotency {
    /// `redis_timeout` bounds the wait for Redis.
    pub(crate) fn new(
        redis_url: Option<&SecretString>,
        redis_timeout: Duration,
        shutdown: &Shutdown,
        spec: &mut ServiceSpec,
    ) -> anyhow::Result<Self> {
        let shared = match redis_url {
            None => None,
            Some(url) => {
                let (shared, writer) = Shared::new(url, redis_timeout)?;
                spec.spawn_until(|end| writer.run(end));
                Some(shared)
            }
        };
        Ok(Idempotency {
            locks: Locks::default(),
            memory: Memory::default(),
            shared,
            streams_end: shutdown.end_streams.clone(),
        })
    }

    /// Runs a request, or repeats the reply to the first one with its key and body.
    pub(crate) async fn once<M, R, F>(
        &self,
        request: Request<M>,
        run: impl FnOnce(Request<M>) -> F + Send,
    ) -> Result<Response<R>, Status>
    where
        M: Message,
        R: Reply,
        F: Future<Output = Result<R, Status>> + Send + Unpin,
    {
        // Without a secret of its own: who can read a record in Redis must still guess the key.
        let Some(repeatable) = IdempotentRequest::of(&request, b"")? else {
            return run(request).await.map(Response::new);
        };
        let call = Call::of(request.extensions())?;
        let arrived = Instant::now();
        let _lock = self.while_wanted(&call, self.locks.lock(repeatable.record_id())).await?;
        if let Some(record) = self.memory.get(repeatable.record_id()) {
            return replay(&repeatable, &record, &call, arrived);
        }
        let (claim, is_alone) = match &self.shared {
            None => (None, false),
            Some(shared) => {
                match self.while_wanted(&call, Box::pin(shared.claim(&repeatable))).await? {
                    Lookup::Known(record) => {
                        let reply = replay(&repeatable, &record, &call, arrived)?;
                        self.memory.insert(&repeatable, record);
                        return Ok(reply);
                    }
                    Lookup::Claimed(claim) => (Some(claim), false),
                    Lookup::Away(claim) => {
                        call.report().overcame(&Fault::new(ErrorCode::CacheError, ALONE));
                        (Some(claim), true)
                    }
                }
            }
        };
        let mut reply = renewing(claim.as_ref(), run(request)).await?;
        if is_alone {
            reply.warn(format!("{}: {ALONE}", ErrorCode::CacheError));
        }
        // No await from here on: a reply that was made is remembered, even if its caller has left.
        let record: Arc<[u8]> = repeatable.seal(&reply)?.into();
        self.memory.insert(&repeatable, Arc::clone(&record));
        if let Some(claim) = claim {
            claim.keep(repeatable.caller(), record);
        }
        Ok(Response::new(reply))
    }

    /// Waits for the first request with the same key, as long as this caller may wait. The deadline
    /// of the call ends the wait from outside.
    async fn while_wanted<T>(
        &self,
        call: &Call,
        wait: impl Future<Output = T> + Send,
    ) -> Result<T, Error> {
        let revoked = async {
            match &call.ended {
                Some(ended) => ended.cancelled().await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            biased;
            () = self.streams_end.cancelled() => Err(Error::ShuttingDown),
            () = revoked => Err(Error::KeyEnded),
            done = wait => Ok(done),
        }
    }
}

fn replay<R: Reply>(
    repeatable: &IdempotentRequest,
    record: &[u8],
    call: &Call,
    arrived: Instant,
) -> Result<Response<R>, Status> {
    let reply = repeatable.replay::<R>(record).map_err(Fault::from)?;
    reply.get_ref().note(call.report());
    // The wait for the first request is no time of the mesh.
    call.report().queued(arrived.elapsed());
    Ok(reply)
}

/// Renews the lease while the request runs.
async fn renewing<T>(claim: Option<&Claim>, mut run: impl Future<Output = T> + Unpin) -> T {
    let Some(claim) = claim else { return run.await };
    let mut renewals = interval_at(Instant::now() + LEASE / 3, LEASE / 3);
    renewals.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            biased;
            done = &mut run => return done,
            _ = renewals.tick() => claim.renew(),
        }
    }
}
