//! What one generation uses, recorded once when it ends, in whatever way: in the token lease, the statistics of the call,
//! the metrics and the span.

use hapa_core::call_stats::CallStats;
use hapa_core::rpc_error::{ErrorCode, RpcError};
use hapa_proto::codegen::v1::Usage;
use hapa_telemetry::trace::SpanHandle;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::fold::Fold;
use crate::schedule::Permits;
use crate::schedule::budget::estimate_prompt_tokens;
use crate::upstream::engine::Operation;
use crate::upstream::span;

/// See the module.
pub(super) struct Accounting {
    operation: Operation,
    pub(super) stats: CallStats,
    /// Released when the engine is done.
    pub(super) permits: Permits,
    /// The span of the whole generation, in the trace of the call that started it.
    pub(super) span: SpanHandle,
    /// When an engine was asked.
    asked: Instant,
    /// Cancelled when an engine has answered. Before that, no engine has read the prompt.
    pub(super) answered: CancellationToken,
    estimated_prompt_tokens: u32,
    is_recorded: bool,
}

impl Accounting {
    pub(super) fn new(operation: Operation, stats: CallStats, body: &[u8]) -> Accounting {
        Accounting {
            operation,
            stats,
            permits: Permits::default(),
            span: SpanHandle::default(),
            asked: Instant::now(),
            answered: CancellationToken::new(),
            estimated_prompt_tokens: estimate_prompt_tokens(body),
            is_recorded: false,
        }
    }

    /// The request to an engine starts.
    pub(super) fn start(&mut self, permits: Permits, span: SpanHandle) {
        (self.permits, self.span, self.asked) = (permits, span, Instant::now());
    }

    /// Updates the lease with the tokens used so far.
    pub(super) fn update_lease(&mut self, fold: &Fold) {
        let (prompt, completion) = self.used(fold);
        let tokens = match fold.usage() {
            Some(usage) => i64::from(usage.total_tokens),
            None => i64::from(prompt) + i64::from(completion),
        };
        if let Some(lease) = &mut self.permits.lease
            && self.answered.is_cancelled()
        {
            lease.record_usage(tokens);
        }
    }

    /// Prompt and completion tokens: as the engine reports them, or else estimated.
    fn used(&self, fold: &Fold) -> (u32, u32) {
        match fold.usage() {
            Some(usage) => (usage.prompt_tokens, usage.completion_tokens),
            None if self.answered.is_cancelled() => {
                (self.estimated_prompt_tokens, fold.token_events())
            }
            None => (0, 0),
        }
    }

    /// Records the usage of a generation that has ended. Returns the completion tokens. Only the first call has an effect.
    pub(super) fn record(&mut self, fold: &Fold, end: EndOfGeneration<'_>) -> Option<u32> {
        if std::mem::replace(&mut self.is_recorded, true) {
            return None;
        }
        self.update_lease(fold);
        let usage = fold.usage();
        record_tokens(usage.as_ref(), self.operation);
        let (prompt, completion) = self.used(fold);
        self.stats.set_tokens(prompt, completion);
        self.stats.set_reasoning_tokens(fold.reasoning_tokens());
        if self.permits.is_granted() {
            self.stats.set_engine_time(self.asked.elapsed());
        }
        let span = std::mem::take(&mut self.span);
        span::set_usage(&span, prompt, completion);
        match end {
            EndOfGeneration::Finished => span::set_finish_reasons(&span, &fold.finish_reasons()),
            EndOfGeneration::Failed(error) => span::record_error(&span, error),
            EndOfGeneration::Refused(kind) => span.fail(kind, "no answer has begun"),
            EndOfGeneration::Abandoned => {
                span.set("error.type", ErrorCode::StreamGivenUp.to_string());
            }
        }
        // The permits are dropped before the connection is closed, which takes no engine time.
        self.permits = Permits::default();
        Some(completion)
    }
}

/// How a generation has ended.
pub(super) enum EndOfGeneration<'e> {
    Finished,
    Failed(&'e RpcError),
    /// Before the answer has started; with the kind of the error.
    Refused(String),
    /// Every subscriber has left.
    Abandoned,
}

/// Adds the usage that an engine reports to the metrics.
fn record_tokens(usage: Option<&Usage>, operation: Operation) {
    let Some(usage) = usage else { return };
    let kinds = [
        ("input", usage.prompt_tokens),
        ("output", usage.completion_tokens),
        ("reasoning", usage.reasoning_tokens),
    ];
    for (kind, tokens) in kinds {
        if kind == "reasoning" && tokens == 0 {
            continue;
        }
        metrics::counter!("hapa_ai_tokens_used_total", "type" => kind).increment(tokens.into());
        if kind != "reasoning" {
            let labels =
                [("gen_ai_token_type", kind), ("gen_ai_operation_name", operation.otel_name())];
            metrics::histogram!("gen_ai_client_token_usage", &labels).record(tokens);
        }
    }
}
