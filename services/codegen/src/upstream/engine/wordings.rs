//! The wordings by which engines report that a prompt is too long, that they do not serve a model, or
//! that they do not offer an operation. Engines share no codes for these, so their texts are compared.
//!
//! A wording is a list of fragments. A lower-case message has the wording if it contains all of them in
//! this order.

/// The engines with a wording, and its fragments.
type Wording = (&'static str, &'static [&'static str]);

/// Prompt and answer exceed the context of the model.
const CONTEXT_TOO_LONG: &[Wording] = &[
    ("vLLM, OpenAI, Azure", &["maximum context length is"]),
    ("vLLM", &["input length", "exceeds", "maximum context length"]),
    ("vLLM", &["longer than the maximum model length"]),
    ("SGLang", &["longer than the model's context length"]),
    ("SGLang", &["token count exceeds the model's maximum context length"]),
    ("TGI", &["inputs", "tokens +", "max_new_tokens", "must be <="]),
    ("TGI", &["inputs", "must have less than", "tokens"]),
    ("llama.cpp", &["exceeds the available context size"]),
    ("LM Studio", &["trying to keep the first", "tokens when context"]),
    ("LM Studio", &["context length of only"]),
    ("Ollama", &["input length exceeds", "context length"]),
    ("Mistral", &["too large for model with", "maximum context length"]),
    ("OpenAI, Groq", &["reduce the length of the messages"]),
    ("Gemini", &["input token count", "exceeds the maximum number of tokens"]),
    ("Anthropic", &["prompt is too long"]),
];

/// Error codes and types of the same meaning: OpenAI and Azure, OpenAI, llama.cpp.
const CONTEXT_TOO_LONG_CODES: &[&str] =
    &["context_length_exceeded", "string_above_max_length", "exceed_context_size_error"];

/// The engine does not serve the model.
const MODEL_MISSING: &[Wording] = &[
    ("vLLM, OpenAI", &["model", "does not exist"]),
    ("Ollama, LM Studio, llama.cpp", &["model ", "not found"]),
    ("LM Studio", &["model", "not loaded"]),
    ("LiteLLM", &["invalid model"]),
    ("various", &["no such model"]),
    ("various", &["unknown model"]),
    ("SGLang", &["adapter", "not loaded"]),
    ("Together", &["unable to access model"]),
];

/// LiteLLM's wording, with status 400.
pub(super) const INVALID_MODEL_NAME: &str = "invalid model name";

/// Error codes of the same meaning: OpenAI, Azure, Mistral.
const MODEL_MISSING_CODES: &[&str] = &["model_not_found", "deploymentnotfound", "invalid_model"];

/// The engine does not offer the operation, for this model or at all.
const OPERATION_MISSING: &[Wording] = &[
    ("OpenAI", &["not supported in the v1/", "completions endpoint"]),
    ("vLLM", &["does not support", "completions api"]),
    ("Ollama", &["does not support chat"]),
    ("Ollama", &["does not support generate"]),
    ("Azure", &["operation does not work with the specified model"]),
    ("OpenAI", &["invalid url"]),
    ("vLLM", &["default chat template is no longer allowed"]),
    ("vLLM", &["must provide a chat template"]),
    ("transformers", &["cannot use chat template functions"]),
    ("various", &["does not have a chat template"]),
];

/// The account of this server has no credit or quota left.
const UNPAID: &[Wording] = &[
    ("Anthropic", &["credit balance is too low"]),
    ("OpenRouter, DeepSeek", &["insufficient credits"]),
    ("DeepSeek", &["insufficient balance"]),
    ("OpenAI", &["billing hard limit"]),
    ("OpenAI", &["billing", "not active"]),
    ("Google", &["billing to be enabled"]),
    ("Google", &["billing", "disabled"]),
    ("various", &["enable billing"]),
    ("various", &["check your", "billing details"]),
];

/// Error codes and types of the same meaning.
const UNPAID_CODES: &[&str] =
    &["insufficient_quota", "billing_error", "billing_hard_limit_reached", "billing_not_active"];

/// The engine rejects the credential of this server.
const CREDENTIAL_REJECTED: &[Wording] = &[
    ("Google", &["api key not valid"]),
    ("Google", &["api key expired"]),
    ("various", &["invalid api key"]),
    ("OpenAI", &["incorrect api key"]),
];

/// Error codes of the same meaning.
const CREDENTIAL_CODES: &[&str] = &["invalid_api_key", "api_key_invalid"];

/// A content filter of the engine has rejected the prompt or the answer.
const CONTENT_FILTERED: &[Wording] = &[
    ("Azure", &["content management policy"]),
    ("Anthropic", &["blocked by content filtering policy"]),
    ("OpenRouter", &["input was flagged"]),
    ("OpenRouter", &["flagged for moderation"]),
    ("OpenAI", &["rejected as a result of our safety system"]),
    ("Alibaba", &["data may contain inappropriate content"]),
    ("various", &["content policy violation"]),
];

/// Error codes of the same meaning, without case and punctuation: OpenAI, Azure, Alibaba.
const CONTENT_FILTERED_CODES: &[&str] = &[
    "contentfilter",
    "contentpolicyviolation",
    "responsibleaipolicyviolation",
    "datainspectionfailed",
    "moderationblocked",
];

/// The chat template of the model has no place for a system message.
const SYSTEM_ROLE_REFUSED: &[Wording] = &[
    ("Gemma", &["system role not supported"]),
    ("various", &["system role is not supported"]),
    ("various", &["does not support", "system role"]),
    ("various", &["does not support system messages"]),
    ("Gemini", &["developer instruction is not enabled"]),
    ("Llama, Mistral", &["conversation roles must alternate"]),
];

/// A meaning that engines express by wordings, or by lower-case codes and types.
#[derive(Clone, Copy, Debug)]
pub(super) enum Meaning {
    ContextTooLong,
    ModelMissing,
    OperationMissing,
    Unpaid,
    CredentialRejected,
    ContentFiltered,
    SystemRoleRefused,
}

impl Meaning {
    /// The part of a lower-case message that has the meaning.
    pub(super) fn find(self, message: &str) -> Option<&str> {
        self.wordings().iter().find_map(|(_, fragments)| span(message, fragments))
    }

    /// Whether a lower-case code or type means it.
    pub(super) fn is_code(self, code: &str) -> bool {
        match self {
            Meaning::ContextTooLong => CONTEXT_TOO_LONG_CODES.contains(&code),
            Meaning::ModelMissing => MODEL_MISSING_CODES.contains(&code),
            Meaning::Unpaid => UNPAID_CODES.contains(&code),
            Meaning::CredentialRejected => CREDENTIAL_CODES.contains(&code),
            Meaning::ContentFiltered => {
                let code: String = code.chars().filter(char::is_ascii_alphanumeric).collect();
                CONTENT_FILTERED_CODES.contains(&code.as_str())
            }
            Meaning::OperationMissing | Meaning::SystemRoleRefused => false,
        }
    }

    fn wordings(self) -> &'static [Wording] {
        match self {
            Meaning::ContextTooLong => CONTEXT_TOO_LONG,
            Meaning::ModelMissing => MODEL_MISSING,
            Meaning::OperationMissing => OPERATION_MISSING,
            Meaning::Unpaid => UNPAID,
            Meaning::CredentialRejected => CREDENTIAL_REJECTED,
            Meaning::ContentFiltered => CONTENT_FILTERED,
            Meaning::SystemRoleRefused => SYSTEM_ROLE_REFUSED,
        }
    }
}

/// From the first fragment to the last one.
fn span<'m>(message: &'m str, fragments: &[&str]) -> Option<&'m str> {
    let start = message.find(fragments.first()?)?;
    let mut end = start;
    for fragment in fragments {
        end += message[end..].find(fragment)? + fragment.len();
    }
    Some(&message[start..end])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn has(meaning: Meaning, message: &str) -> bool {
        meaning.find(message).is_some()
    }

    #[test]
    fn every_wording_of_a_too_long_prompt_is_recognized() {
        for message in [
            "This model's maximum context length is 4096 tokens. However, you requested 9000 tokens (8000 in the messages, 1000 in the completion).",
            "This model's maximum context length is 4096 tokens. However, your prompt contains at least 5000 input tokens.",
            "Input length (5000) exceeds model's maximum context length (4096).",
            "The decoder prompt (length 5000) is longer than the maximum model length of 4096.",
            "The input (5000 tokens) is longer than the model's context length (4096 tokens).",
            "Requested token count exceeds the model's maximum context length of 4096 tokens.",
            "Input validation error: `inputs` tokens + `max_new_tokens` must be <= 4096. Given: 5000 `inputs` tokens and 20 `max_new_tokens`",
            "Input validation error: `inputs` must have less than 4095 tokens. Given: 5000",
            "the request exceeds the available context size, try increasing it",
            "request (5000 tokens) exceeds the available context size (4096 tokens), try increasing it",
            "Trying to keep the first 5000 tokens when context the overflows. However, the model is loaded with context length of only 4096 tokens, which is not enough.",
            "input length exceeds maximum context length",
            "the input length exceeds the context length",
            "Prompt contains 50000 tokens, too large for model with 32768 maximum context length",
            "Please reduce the length of the messages or completion.",
            "The input token count (1048577) exceeds the maximum number of tokens allowed (1048575).",
            "prompt is too long: 210000 tokens > 200000 maximum",
        ] {
            assert!(has(Meaning::ContextTooLong, &message.to_lowercase()), "{message}");
        }
        for code in CONTEXT_TOO_LONG_CODES {
            assert!(Meaning::ContextTooLong.is_code(code));
        }
    }

    #[test]
    fn a_message_that_only_contains_the_word_context_is_not_about_length() {
        for message in [
            "code_context is not allowed",
            "unknown field context",
            "Unsupported field cache_salt in this context",
            "the context length must be positive",
            "context is required",
            "inputs must be a string",
            "",
        ] {
            assert!(!has(Meaning::ContextTooLong, &message.to_lowercase()), "{message}");
        }
    }

    #[test]
    fn a_missing_model_is_distinguished_from_a_missing_path() {
        for message in [
            "The model `x` does not exist.",
            "The model 'gpt-9' does not exist or you do not have access to it.",
            "model 'x' not found, try pulling it first",
            "model \"x\" not found, try pulling it first",
            "model not found",
            "Invalid model name passed in model=x",
            "LoRA adapter 'x' is not loaded",
        ] {
            assert!(has(Meaning::ModelMissing, &message.to_lowercase()), "{message}");
        }
        for message in [
            "Not Found",
            "File Not Found",
            "Invalid URL (POST /v1/completions)",
            "404 page not found",
            "Resource not found",
            "",
        ] {
            assert!(!has(Meaning::ModelMissing, &message.to_lowercase()), "{message}");
        }
    }

    #[test]
    fn a_model_that_can_not_do_the_operation_is_recognized() {
        for message in [
            "This is a chat model and not supported in the v1/completions endpoint. Did you mean to use v1/chat/completions?",
            "The model does not support Completions API",
            "The model does not support Chat Completions API",
            "\"nomic-embed-text\" does not support chat",
            "The chatCompletion operation does not work with the specified model, x.",
            "Invalid URL (POST /v1/completions)",
        ] {
            assert!(has(Meaning::OperationMissing, &message.to_lowercase()), "{message}");
        }
        assert!(!has(Meaning::OperationMissing, "the model `x` does not exist."));
    }
}
