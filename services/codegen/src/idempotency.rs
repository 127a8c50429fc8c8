//! Idempotency keys of GenerateCode and CompleteCode: the request runs once, and repetitions receive the
//! first reply.
//!
//! This layer wraps the RPCs and is independent of how a reply is made. Requests with the same key run
//! one after another: within a process by a lock, across replicas by a lease in Redis. Only replies are
//! stored: after a failure or a cancellation, the next request with the key runs.

mod claim;
mod keyed_lock;
mod memory;
mod redis_store;

use std::sync::Arc;
use std::time::Duration;

use hapa_core::call::Call;
use hapa_core::call_stats::CallStats;
use hapa_core::idempotency::IdempotentRequest;
use hapa_core::rpc_error::{ErrorCode, RpcError};
use hapa_core::service::{ServiceSpec, Shutdown};
use hapa_proto::codegen::v1::{CompleteCodeResponse, GenerateCodeResponse};
use prost::Message;
use secrecy::SecretString;
use tokio::time::{Instant, MissedTickBehavior, interval_at};
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status};

use self::claim::Claim;
use self::keyed_lock::KeyedLocks;
use self::memory::ReplyMemory;
use self::redis_store::{ClaimOutcome, LEASE_TTL, RedisStore};
use crate::error::Error;

/// Maximum number of stored replies: in Redis for all replicas together, and in each process.
const MAX_RECORDS: usize = 20_000;
/// Maximum total size of the stored replies.
const MAX_BYTES: usize = 64 * 1024 * 1024;
/// Maximum number of stored replies of one caller, so that no caller displaces the others.
const MAX_RECORDS_PER_CALLER: usize = 4_000;

const UNCOORDINATED_WARNING: &str =
    "the idempotency key was checked by this replica only, because Redis did not answer";

/// A reply that can be repeated.
pub(crate) trait RepeatableReply: Message + Default {
    fn add_warning(&mut self, warning: String);
    /// Records the model and the task in the usage event of the call.
    fn record_model(&self, report: &CallStats);
}

impl RepeatableReply for GenerateCodeResponse {
    fn add_warning(&mut self, warning: String) {
        self.warnings.push(warning);
    }

    fn record_model(&self, report: &CallStats) {
        report.set_model(&self.model);
        report.set_task(&self.task);
    }
}

impl RepeatableReply for CompleteCodeResponse {
    fn add_warning(&mut self, warning: String) {
        self.warnings.push(warning);
    }

    fn record_model(&self, report: &CallStats) {
        report.set_model(&self.model);
        report.set_task(crate::complete::TASK);
    }
}

/// Stores replies by idempotency key.
pub(crate) struct Idempotency {
    locks: KeyedLocks,
    memory: ReplyMemory,
    /// `None` without REDIS_URL: each process stores its own replies.
    redis_store: Option<RedisStore>,
    streams_end: CancellationToken,
}

impl Idempotency {
    /// `redis_timeout` is the maximum wait for Redis.
    pub(crate) fn new(
        redis_url: Option<&SecretString>,
        redis_timeout: Duration,
        shutdown: &Shutdown,
        spec: &mut ServiceSpec,
    ) -> anyhow::Result<Self> {
        let redis_store = match redis_url {
            None => None,
            Some(url) => {
                let (redis_store, writer) = RedisStore::new(url, redis_timeout)?;
                spec.spawn_until(|end| writer.run(end));
                Some(redis_store)
            }
        };
        Ok(Idempotency {
            locks: KeyedLocks::default(),
            memory: ReplyMemory::default(),
            redis_store,
            streams_end: shutdown.end_streams.clone(),
        })
    }

    /// Runs a request, or returns the stored reply to the first request with the same key and body.
    pub(crate) async fn run_once<M, R, F>(
        &self,
        request: Request<M>,
        run: impl FnOnce(Request<M>) -> F + Send,
    ) -> Result<Response<R>, Status>
    where
        M: Message,
        R: RepeatableReply,
        F: Future<Output = Result<R, Status>> + Send + Unpin,
    {
        // No additional secret: reading a record in Redis is useless without guessing the key.
        let Some(repeatable) = IdempotentRequest::from_request(&request, b"")? else {
            return run(request).await.map(Response::new);
        };
        let call = Call::from_extensions(request.extensions())?;
        let arrived = Instant::now();
        let _lock = self.unless_ended(&call, self.locks.lock(repeatable.record_id())).await?;
        if let Some(record) = self.memory.get(repeatable.record_id()) {
            return replay(&repeatable, &record, &call, arrived);
        }
        let (claim, is_uncoordinated) = match &self.redis_store {
            None => (None, false),
            Some(redis_store) => {
                match self.unless_ended(&call, Box::pin(redis_store.claim(&repeatable))).await? {
                    ClaimOutcome::Answered(record) => {
                        let reply = replay(&repeatable, &record, &call, arrived)?;
                        self.memory.insert(&repeatable, record);
                        return Ok(reply);
                    }
                    ClaimOutcome::Claimed(claim) => (Some(claim), false),
                    ClaimOutcome::Unavailable(claim) => {
                        call.stats().record_recovered_error(&RpcError::new(
                            ErrorCode::CacheError,
                            UNCOORDINATED_WARNING,
                        ));
                        (Some(claim), true)
                    }
                }
            }
        };
        let mut reply = run_renewing(claim.as_ref(), run(request)).await?;
        if is_uncoordinated {
            reply.add_warning(format!("{}: {UNCOORDINATED_WARNING}", ErrorCode::CacheError));
        }
        // No await from here on, so that the reply is stored even if the client has disconnected.
        let record: Arc<[u8]> = repeatable.seal(&reply)?.into();
        self.memory.insert(&repeatable, Arc::clone(&record));
        if let Some(claim) = claim {
            claim.store_reply(repeatable.caller(), record);
        }
        Ok(Response::new(reply))
    }

    /// Waits, unless the server shuts down or the credential is revoked. The deadline of the call ends the
    /// wait from outside.
    async fn unless_ended<T>(
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

fn replay<R: RepeatableReply>(
    repeatable: &IdempotentRequest,
    record: &[u8],
    call: &Call,
    arrived: Instant,
) -> Result<Response<R>, Status> {
    let reply = repeatable.replay::<R>(record).map_err(RpcError::from)?;
    reply.get_ref().record_model(call.stats());
    // The wait for the first request counts as queueing.
    call.stats().set_queue_time(arrived.elapsed());
    Ok(reply)
}

/// Runs the request and renews its lease meanwhile.
async fn run_renewing<T>(claim: Option<&Claim>, mut run: impl Future<Output = T> + Unpin) -> T {
    let Some(claim) = claim else { return run.await };
    let mut renewals = interval_at(Instant::now() + LEASE_TTL / 3, LEASE_TTL / 3);
    renewals.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            biased;
            done = &mut run => return done,
            _ = renewals.tick() => claim.renew(),
        }
    }
}
