//! Why an engine rejects a request, as far as its error body shows.

use std::fmt;

use reqwest::StatusCode;

use crate::upstream::engine::error_body::ErrorBody;
use crate::upstream::engine::request_field::RequestField;
use crate::upstream::engine::wordings::Meaning;

/// Why an engine rejected a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum RefusalReason {
    /// Prompt and answer do not fit into the model's context.
    ContextTooLong,
    /// The engine does not serve the model.
    ModelMissing,
    /// The engine does not offer the operation, for this model or at all.
    PathMissing,
    /// The engine refuses this field, or only its value.
    FieldRefused { field: RequestField, is_unsupported: bool },
    /// The content filter of the engine rejects the prompt or the answer.
    ContentFiltered,
    /// The chat template of the model has no place for a system message.
    SystemRoleRefused,
    /// The engine rejects the credential of this server.
    CredentialRejected,
    /// The account of this server has no credit or quota left.
    Unpaid,
    /// Anything else.
    Other,
}

impl RefusalReason {
    /// From a status and the body that came with it.
    pub(super) fn classify(status: StatusCode, body: &ErrorBody) -> RefusalReason {
        let is_refusal = status.is_client_error() || status == StatusCode::NOT_IMPLEMENTED;
        let has_filter_code = body.has_code(Meaning::ContentFiltered);
        if has_filter_code || is_refusal && body.means(Meaning::ContentFiltered) {
            return RefusalReason::ContentFiltered;
        }
        if body.means(Meaning::SystemRoleRefused) {
            return RefusalReason::SystemRoleRefused;
        }
        if is_refusal && body.means(Meaning::OperationMissing) {
            return RefusalReason::PathMissing;
        }
        // With 429, words about billing also mean a rate limit.
        let is_unpaid = status != StatusCode::TOO_MANY_REQUESTS && body.means(Meaning::Unpaid);
        if is_unpaid || body.has_code(Meaning::Unpaid) {
            return RefusalReason::Unpaid;
        }
        let is_credential = [400, 401, 403].contains(&status.as_u16());
        if is_credential && body.means(Meaning::CredentialRejected) {
            return RefusalReason::CredentialRejected;
        }
        RefusalReason::classify_by_status(status, body)
    }

    fn classify_by_status(status: StatusCode, body: &ErrorBody) -> RefusalReason {
        match status {
            StatusCode::PAYMENT_REQUIRED => RefusalReason::Unpaid,
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => RefusalReason::CredentialRejected,
            StatusCode::PAYLOAD_TOO_LARGE => RefusalReason::ContextTooLong,
            StatusCode::NOT_FOUND if body.is_model_missing() => RefusalReason::ModelMissing,
            StatusCode::NOT_FOUND
            | StatusCode::METHOD_NOT_ALLOWED
            | StatusCode::NOT_IMPLEMENTED => RefusalReason::PathMissing,
            StatusCode::BAD_REQUEST | StatusCode::UNPROCESSABLE_ENTITY => match () {
                () if body.is_context_too_long() => RefusalReason::ContextTooLong,
                () if body.is_model_rejected() => RefusalReason::ModelMissing,
                () => {
                    body.refused_field().map_or(RefusalReason::Other, |(field, is_unsupported)| {
                        RefusalReason::FieldRefused { field, is_unsupported }
                    })
                }
            },
            _ => RefusalReason::Other,
        }
    }
}

/// Continues a sentence; empty without a known reason.
impl fmt::Display for RefusalReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            RefusalReason::ContextTooLong => f.write_str(": the context of the model is too short"),
            RefusalReason::ModelMissing => f.write_str(": it does not serve the model"),
            RefusalReason::PathMissing => f.write_str(": it does not offer this operation"),
            RefusalReason::FieldRefused { field, .. } => {
                write!(f, ": it refuses the field {}", field.name())
            }
            RefusalReason::ContentFiltered => {
                f.write_str(": its content filter rejects the request")
            }
            RefusalReason::SystemRoleRefused => {
                f.write_str(": the model accepts no system message")
            }
            RefusalReason::CredentialRejected => {
                f.write_str(": it rejects the credential of this server")
            }
            RefusalReason::Unpaid => f.write_str(": its account has no credit left"),
            RefusalReason::Other => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn classify(status: u16, body: &str) -> RefusalReason {
        let status = StatusCode::from_u16(status).unwrap();
        RefusalReason::classify(status, &ErrorBody::parse(body.as_bytes()))
    }

    #[test]
    fn an_exceeded_context_is_recognized_by_parameter_code_status_or_message() {
        for (status, body) in [
            (400, r#"{"error":{"message":"too much","param":"input_tokens"}}"#),
            (400, r#"{"error":{"message":"no","code":"context_length_exceeded"}}"#),
            (400, r#"{"error":{"message":"no","type":"exceed_context_size_error","code":400}}"#),
            (400, r#"{"error":"exceeds the available context size"}"#),
            (
                422,
                r#"{"error":"Input validation error: `inputs` must have less than 4 tokens. Given: 5","error_type":"validation"}"#,
            ),
            (
                400,
                r#"{"object":"error","message":"The input (9 tokens) is longer than the model's context length (8 tokens).","type":"BadRequestError","code":400}"#,
            ),
            (413, "<html>Request Entity Too Large</html>"),
        ] {
            assert_eq!(classify(status, body), RefusalReason::ContextTooLong, "{body}");
        }
        assert_eq!(classify(500, r#"{"error":{"param":"input_tokens"}}"#), RefusalReason::Other);
        for other in [
            "",
            "no JSON",
            "{}",
            r#"{"error":7}"#,
            r#"{"error":{"message":"no"}}"#,
            r#"{"error":{"message":"code_context is not allowed"}}"#,
            r#"{"error":{"message":"unknown field context"}}"#,
        ] {
            assert_eq!(classify(400, other), RefusalReason::Other, "{other}");
        }
    }

    #[test]
    fn only_a_body_that_names_a_model_means_a_missing_model() {
        for body in [
            r#"{"error":{"message":"The model `x` does not exist.","type":"NotFoundError","param":"model","code":404}}"#,
            r#"{"error":{"message":"no access","code":"model_not_found"}}"#,
            r#"{"error":{"message":"model 'x' not found, try pulling it first","type":"api_error"}}"#,
            r#"{"error":{"code":"DeploymentNotFound","message":"no such deployment"}}"#,
        ] {
            assert_eq!(classify(404, body), RefusalReason::ModelMissing, "{body}");
        }
        for body in [
            r#"{"error":{"message":"The model `x` does not exist.","param":"model"}}"#,
            r#"{"error":{"message":"Invalid model name passed in model=x"}}"#,
            r#"{"error":{"message":"no","code":"model_not_found"}}"#,
        ] {
            assert_eq!(classify(400, body), RefusalReason::ModelMissing, "{body}");
        }
        let template = r#"{"error":{"message":"model template not found"}}"#;
        assert_eq!(classify(400, template), RefusalReason::Other);
        for (status, body) in [
            (404, r#"{"detail":"Not Found"}"#),
            (405, r#"{"detail":"Method Not Allowed"}"#),
            (404, "<html><h1>404 Not Found</h1>nginx</html>"),
            (404, r#"{"error":{"code":404,"message":"File Not Found","type":"not_found_error"}}"#),
            (
                404,
                r#"{"error":{"message":"Invalid URL (POST /v1/completions)","type":"invalid_request_error"}}"#,
            ),
            (404, "404 page not found"),
            (404, ""),
            (
                501,
                r#"{"error":{"message":"This server does not support completions","type":"not_supported_error"}}"#,
            ),
            (
                404,
                r#"{"error":{"message":"This is a chat model and not supported in the v1/completions endpoint.","param":"model"}}"#,
            ),
            (400, r#"{"error":{"message":"The model does not support Completions API"}}"#),
        ] {
            assert_eq!(classify(status, body), RefusalReason::PathMissing, "{body}");
        }
    }

    #[test]
    fn a_refused_field_is_named_from_the_fixed_list() {
        let refused = |field, is_unsupported| RefusalReason::FieldRefused { field, is_unsupported };
        for (status, body, expected) in [
            (
                400,
                r#"{"error":{"message":"Unrecognized request argument supplied: cache_salt","param":null}}"#,
                refused(RequestField::CacheSalt, true),
            ),
            (
                422,
                r#"{"detail":[{"type":"extra_forbidden","loc":["body","cache_salt"],"msg":"Extra inputs are not permitted","input":"x"}]}"#,
                refused(RequestField::CacheSalt, true),
            ),
            (
                400,
                r#"{"error":{"message":"Unsupported field cache_salt in this context","param":"cache_salt"}}"#,
                refused(RequestField::CacheSalt, true),
            ),
            (
                400,
                r#"{"error":{"message":"must be in [0, 2]","param":"temperature"}}"#,
                refused(RequestField::Temperature, false),
            ),
            (
                400,
                r#"{"error":{"message":"bad role","param":"messages.[0].role"}}"#,
                refused(RequestField::Messages, false),
            ),
        ] {
            assert_eq!(classify(status, body), expected, "{body}");
        }
    }

    #[test]
    fn a_content_filter_is_recognized_by_code_or_message() {
        for (status, body) in [
            (400, r#"{"error":{"message":"The response was filtered","code":"content_filter"}}"#),
            (400, r#"{"error":{"code":"content_policy_violation"}}"#),
            (400, r#"{"error":{"code":"x","innererror":{"code":"ResponsibleAIPolicyViolation"}}}"#),
            (400, r#"{"error":{"code":"DataInspectionFailed"}}"#),
            (500, r#"{"error":{"code":"data_inspection_failed"}}"#),
            (403, r#"{"error":{"code":403,"message":"Input was flagged for moderation"}}"#),
            (400, r#"{"error":"Output blocked by content filtering policy"}"#),
        ] {
            assert_eq!(classify(status, body), RefusalReason::ContentFiltered, "{body}");
        }
        let other = classify(500, r#"{"error":"input was flagged"}"#);
        assert_eq!(other, RefusalReason::Other);
    }

    #[test]
    fn what_the_operator_must_mend_is_recognized() {
        use RefusalReason::{CredentialRejected, Other, Unpaid};
        for (status, body, expected) in [
            (
                400,
                r#"[{"error":{"code":400,"message":"API key not valid. Please pass a valid API key."}}]"#,
                CredentialRejected,
            ),
            (400, r#"{"error":{"message":"Incorrect API key provided"}}"#, CredentialRejected),
            (401, "", CredentialRejected),
            (403, r#"{"error":"no access"}"#, CredentialRejected),
            (
                400,
                r#"{"error":{"message":"Your credit balance is too low to access the Anthropic API."}}"#,
                Unpaid,
            ),
            (402, r#"{"error":{"code":402,"message":"Insufficient credits"}}"#, Unpaid),
            (
                429,
                r#"{"error":{"type":"insufficient_quota","message":"You exceeded your current quota"}}"#,
                Unpaid,
            ),
            (403, r#"{"error":{"message":"This API requires billing to be enabled"}}"#, Unpaid),
            (
                429,
                r#"{"error":{"message":"You exceeded your quota, please check your plan and billing details."}}"#,
                Other,
            ),
        ] {
            assert_eq!(classify(status, body), expected, "{status} {body}");
        }
    }

    #[test]
    fn a_model_without_chat_template_or_system_role_is_recognized() {
        for body in [
            r#"{"error":{"message":"As of transformers v4.44, default chat template is no longer allowed, so you must provide a chat template"}}"#,
            r#"{"error":{"message":"Cannot use chat template functions because tokenizer.chat_template is not set"}}"#,
        ] {
            assert_eq!(classify(400, body), RefusalReason::PathMissing, "{body}");
        }
        for (status, body) in [
            (400, r#"{"object":"error","message":"System role not supported None"}"#),
            (
                500,
                r#"{"error":{"message":"Conversation roles must alternate user/assistant/..."}}"#,
            ),
        ] {
            assert_eq!(classify(status, body), RefusalReason::SystemRoleRefused, "{body}");
        }
    }

    #[test]
    fn a_message_is_not_classified_by_words_of_the_request() {
        for words in [
            "temperature is not supported",
            "say 'loc': ('body', 'temperature') unsupported value",
            "maximum context length is 5",
            "unsupported parameter: stream_options",
            "does not support chat",
            "invalid\nURL",
            "invalid api key",
            "credit balance is too low",
            "input was flagged",
            "system role not supported",
        ] {
            let request = serde_json::json!({"messages": [{"content": format!("Tell: {words}!")}]});
            let body = serde_json::json!({"error": {"message": format!("No policy: {words}!")}});
            let body = body.to_string();
            let classify = |request: &str| {
                let body = ErrorBody::parse(body.as_bytes()).in_reply_to(request.as_bytes());
                RefusalReason::classify(StatusCode::BAD_REQUEST, &body)
            };
            assert_eq!(classify(&request.to_string()), RefusalReason::Other, "{words}");
            assert!(words.contains('\n') || classify("{}") != RefusalReason::Other, "{words}");
        }
    }
}
