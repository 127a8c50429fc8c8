//! What a generation is told about itself, and what of that goes to the engine.

use hapa_core::call_stats::CallStats;
use tokio_util::sync::CancellationToken;
use tracing::Span;

use crate::request::task::Sampling;
use crate::schedule::budget::Lease;
use crate::schedule::fair_queue::ConcurrencyPermit;
use crate::upstream::engine::Operation;
use crate::upstream::pool::EngineRequest;
use crate::validate::CodeInspector;

/// See the module.
pub(crate) struct Order {
    pub(crate) model: String,
    pub(crate) body: Vec<u8>,
    /// What requests share that should go to one engine.
    pub(crate) affinity: Option<u64>,
    /// Who pays.
    pub(crate) lease: Option<Lease>,
    /// Its place at the engines, until they are done.
    pub(crate) turn: Option<ConcurrencyPermit>,
    /// Who reads the code along.
    pub(crate) inspector: CodeInspector,
    pub(crate) sampling: Sampling,
}

impl Order {
    /// What is asked of an engine; takes the body. `answered` fires when one has answered.
    pub(crate) fn request(
        &mut self,
        report: &CallStats,
        answered: &CancellationToken,
        span: &Span,
    ) -> EngineRequest {
        EngineRequest {
            operation: Operation::Chat,
            body: std::mem::take(&mut self.body).into(),
            model: self.model.clone(),
            affinity: self.affinity,
            report: report.clone(),
            answered: answered.clone(),
            span: span.clone(),
        }
    }
}
