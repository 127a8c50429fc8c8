//! What a response stream contains that cannot be used: a fixed list of kinds.

/// A part of an event that was skipped or repaired.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Oddity {
    /// A line is no JSON.
    NotJson,
    /// JSON was repaired: invalid UTF-8, lone surrogates, `NaN` and the like.
    RepairedJson,
    /// An event is JSON, and no object.
    Event,
    /// More entries than are allowed, or an index beyond them.
    OverLimit,
    // These fields have an unexpected type.
    Choices,
    Delta,
    Content,
    Reasoning,
    Refusal,
    ToolCalls,
    Index,
    FinishReason,
    Logprobs,
    Usage,
    Model,
    Error,
}

impl Oddity {
    #[cfg(test)]
    pub(super) const ALL: &[Oddity] = &[
        Oddity::NotJson,
        Oddity::RepairedJson,
        Oddity::Event,
        Oddity::OverLimit,
        Oddity::Choices,
        Oddity::Delta,
        Oddity::Content,
        Oddity::Reasoning,
        Oddity::Refusal,
        Oddity::ToolCalls,
        Oddity::Index,
        Oddity::FinishReason,
        Oddity::Logprobs,
        Oddity::Usage,
        Oddity::Model,
        Oddity::Error,
    ];

    /// Value of the metric's label.
    pub(super) fn as_str(self) -> &'static str {
        match self {
            Oddity::NotJson => "not_json",
            Oddity::RepairedJson => "repaired_json",
            Oddity::Event => "event",
            Oddity::OverLimit => "over_limit",
            Oddity::Choices => "choices",
            Oddity::Delta => "delta",
            Oddity::Content => "content",
            Oddity::Reasoning => "reasoning",
            Oddity::Refusal => "refusal",
            Oddity::ToolCalls => "tool_calls",
            Oddity::Index => "index",
            Oddity::FinishReason => "finish_reason",
            Oddity::Logprobs => "logprobs",
            Oddity::Usage => "usage",
            Oddity::Model => "model",
            Oddity::Error => "error",
        }
    }

    pub(super) fn count(self) {
        metrics::counter!("hapa_engine_oddities_total", "kind" => self.as_str()).increment(1);
    }
}
