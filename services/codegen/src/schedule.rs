//! When a request may use an engine: it acquires a concurrency permit in the fair queue and reserves its tokens.

pub(crate) mod budget;
pub(crate) mod fair_queue;

use hapa_core::call::Call;
use tokio::time::Instant;

use crate::error::Error;
use crate::schedule::budget::{Budgets, Estimate, Lease};
use crate::schedule::fair_queue::{ConcurrencyPermit, FairQueue, WorkKind};

/// What a generation holds while it uses an engine. Dropping it releases the permit and settles the lease.
#[derive(Default)]
pub(crate) struct Permits {
    permit: Option<ConcurrencyPermit>,
    /// `None` for a call without a caller.
    pub(crate) lease: Option<Lease>,
}

impl Permits {
    pub(crate) fn is_granted(&self) -> bool {
        self.permit.is_some()
    }
}

/// Grants permits.
#[derive(Clone)]
pub(crate) struct Scheduler {
    pub(crate) queue: FairQueue,
    pub(crate) budgets: Budgets,
}

impl Scheduler {
    /// Waits for a permit, records the time in the queue, and reserves the tokens of the call.
    pub(crate) async fn acquire(
        &self,
        call: &Call,
        work: WorkKind,
        estimate: Estimate,
    ) -> Result<Permits, Error> {
        let tenant = call.principal.as_ref().map_or("", |caller| &caller.owner);
        let started = Instant::now();
        let permit = self.queue.acquire(tenant, work).await;
        call.stats().set_queue_time(started.elapsed());
        let permit = Some(permit?);
        let lease = self.budgets.reserve(call, estimate).await?;
        Ok(Permits { permit, lease })
    }
}
