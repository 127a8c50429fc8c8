//! Why an answer ended.

/// Why a response ended: a fixed list. Any other value of an engine becomes `other`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum FinishReason {
    Stop,
    Length,
    ContentFilter,
    ToolCalls,
    Repetition,
    Abort,
    Error,
    Other,
}

impl FinishReason {
    /// Value in the API.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            FinishReason::Stop => "stop",
            FinishReason::Length => "length",
            FinishReason::ContentFilter => "content_filter",
            FinishReason::ToolCalls => "tool_calls",
            FinishReason::Repetition => "repetition",
            FinishReason::Abort => "abort",
            FinishReason::Error => "error",
            FinishReason::Other => "other",
        }
    }

    /// Whether the engine aborted the response.
    pub(crate) fn is_failure(self) -> bool {
        matches!(self, FinishReason::Abort | FinishReason::Error)
    }
}

impl From<&str> for FinishReason {
    fn from(text: &str) -> FinishReason {
        match text.to_ascii_lowercase().as_str() {
            // TGI, Anthropic and Gemini have names of their own.
            "stop" | "eos" | "eos_token" | "stop_sequence" | "end_turn" => FinishReason::Stop,
            "length" | "max_tokens" | "max_length" | "model_length" => FinishReason::Length,
            "content_filter" | "safety" => FinishReason::ContentFilter,
            "tool_calls" | "tool_call" | "tool_use" | "function_call" => FinishReason::ToolCalls,
            "repetition" => FinishReason::Repetition,
            "abort" | "aborted" | "cancelled" => FinishReason::Abort,
            "error" => FinishReason::Error,
            _ => FinishReason::Other,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unknown_finish_reason_becomes_other() {
        assert_eq!(FinishReason::from("untrusted text").as_str(), "other");
        let known = ["stop", "length", "content_filter", "tool_calls", "repetition", "abort"];
        for reason in known.into_iter().chain(["error", "other"]) {
            assert_eq!(FinishReason::from(reason).as_str(), reason);
        }
    }
}
