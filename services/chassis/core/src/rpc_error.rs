//! The published error codes, and the error type of every RPC. Each status that leaves a service carries an
//! `ErrorInfo` with its code and its incident id.

use std::collections::HashMap;
use std::error::Error;
use std::fmt;
use std::time::Duration;

use time::OffsetDateTime;
use tonic::{Code, Status};
use tonic_types::{ErrorDetails, QuotaViolation, StatusExt};

use crate::error_chain;

pub use crate::error_chain::describe;

/// `ErrorInfo.domain` of every error.
pub const ERROR_DOMAIN: &str = "hapa";

/// Message of an internal error.
pub const INTERNAL_MESSAGE: &str = "an internal error; report the incident id";

/// Message of a database error.
pub const STORE_UNAVAILABLE_MESSAGE: &str = "the database is not available; try again";

/// The header that contains the incident id of the gateway's own errors.
const INCIDENT_ID_HEADER: &str = "x-hapa-incident-id";

/// Prefixes of tonic's INTERNAL messages for a request that is not a message of its method. In this order: not protobuf,
/// a wrong compression flag, no message at all, shorter than its length, not compressed as its header states. An
/// end-to-end test sends each.
const UNREADABLE_REQUEST_PREFIXES: [&str; 5] = [
    "failed to decode Protobuf message",
    "protocol error",
    "Missing request message",
    "Unexpected EOF decoding stream",
    "Error decompressing",
];

/// Whether the same call may succeed later.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Retry {
    /// No: the call must change first.
    No,
    /// Yes, with backoff.
    Yes,
    /// Yes, after the delay in `RetryInfo`.
    AfterDelay,
}

/// The published description of an error code.
#[derive(Debug)]
pub struct ErrorCodeEntry {
    /// Such as "E4001".
    pub name: &'static str,
    /// `ErrorInfo.reason`: `UPPER_SNAKE_CASE`, as AIP-193 asks.
    pub reason: &'static str,
    /// The gRPC status; `None` if the code never fails a call.
    pub grpc: Option<Code>,
    /// Whether a retry can help.
    pub retry: Retry,
    /// The meaning.
    pub meaning: &'static str,
    /// What the caller should do.
    pub advice: &'static str,
}

macro_rules! error_codes {
    ($($variant:ident $name:literal $reason:literal $grpc:expr, $retry:ident, $meaning:literal, $advice:literal;)*) => {
        /// A published error code.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum ErrorCode { $(#[doc = concat!($name, ": ", $meaning)] $variant,)* }

        impl ErrorCode {
            /// Every code, in order.
            pub const ALL: &[ErrorCode] = &[$(ErrorCode::$variant),*];

            /// The published description of the code.
            pub fn entry(self) -> &'static ErrorCodeEntry {
                match self { $(ErrorCode::$variant => const { &ErrorCodeEntry {
                    name: $name, reason: $reason, grpc: $grpc, retry: Retry::$retry,
                    meaning: $meaning, advice: $advice,
                }}),* }
            }
        }
    };
}

error_codes! {
    InvalidInput "E4001" "INVALID_INPUT" Some(Code::InvalidArgument), No, "invalid input", "Correct the fields that the error names.";
    MissingField "E4002" "MISSING_FIELD" Some(Code::InvalidArgument), No, "required field missing", "Send the fields that the error names.";
    BadKey "E4003" "BAD_API_KEY" Some(Code::Unauthenticated), No, "bad or missing API key or token", "Send a key as `x-api-key` or a token as `authorization: Bearer`; check it for typos.";
    RateLimited "E4004" "RATE_LIMITED" Some(Code::ResourceExhausted), AfterDelay, "rate limit reached", "Retry after the delay in RetryInfo, or request a higher limit.";
    NoPermission "E4005" "NO_PERMISSION" Some(Code::PermissionDenied), No, "no permission (scope)", "Use a key or a session with the scope that the error names.";
    TooLarge "E4006" "TOO_LARGE" Some(Code::ResourceExhausted), No, "message or header too large", "Send a smaller message.";
    KeyEnded "E4007" "KEY_ENDED" Some(Code::Unauthenticated), No, "key or session expired or revoked", "Request a new key, or log in again.";
    BudgetUsedUp "E4008" "BUDGET_USED_UP" Some(Code::ResourceExhausted), AfterDelay, "token budget used up", "Retry after the budget's reset time, or request a larger budget.";
    Conflict "E4009" "CONFLICT" Some(Code::Aborted), No, "conflict (idempotency, version)", "Read the current state and send a new request.";
    NotFound "E4010" "NOT_FOUND" Some(Code::NotFound), No, "not found", "Check the id or the name.";
    StreamGivenUp "E4011" "STREAM_GIVEN_UP" Some(Code::Cancelled), No, "call cancelled by its client", "Read the stream to its end.";
    Unsupported "E4012" "UNSUPPORTED" Some(Code::Unimplemented), No, "unsupported method or content type", "Check the method name, and that client and mesh have the same version.";
    Superseded "E4013" "SUPERSEDED" Some(Code::Cancelled), No, "superseded by a newer request of the session", "Use the answer to the newer request.";
    SlowReader "E4014" "SLOW_READER" Some(Code::ResourceExhausted), No, "stream read too slowly", "Read the stream continuously.";
    ModelTimeout "E5001" "MODEL_TIMEOUT" Some(Code::DeadlineExceeded), Yes, "AI model timeout", "Try again, request a shorter answer, or allow more time.";
    CacheError "E5002" "CACHE_ERROR" None, No, "cache error (bypassed; reported as a warning, never fails a request)", "No action for callers; operators check the cache.";
    DatabaseError "E5003" "DATABASE_ERROR" Some(Code::Unavailable), Yes, "database error", "Try again; operators check the database.";
    Internal "E5004" "INTERNAL" Some(Code::Internal), No, "internal error", "Report the incident id.";
    Overloaded "E5005" "OVERLOADED" Some(Code::Unavailable), AfterDelay, "overloaded", "Retry after the delay in RetryInfo.";
    ModelUnreachable "E5006" "MODEL_UNREACHABLE" Some(Code::Unavailable), Yes, "AI model unreachable", "Try again; operators check the engines.";
    CutShort "E5007" "CUT_SHORT" Some(Code::Unavailable), No, "generation cut short", "Keep or discard the partial text, then try again.";
    ShuttingDown "E5008" "SHUTTING_DOWN" Some(Code::Unavailable), Yes, "shutting down", "Try again at once: another replica takes the call.";
    CircuitOpen "E5009" "CIRCUIT_OPEN" Some(Code::Unavailable), AfterDelay, "circuit open", "Retry after the delay in RetryInfo.";
    SpoolFull "E5010" "SPOOL_FULL" None, No, "event outbox full (health only)", "Operators check the services that receive the events.";
    DependencyUnavailable "E5011" "DEPENDENCY_UNAVAILABLE" Some(Code::Unavailable), Yes, "a dependency is unavailable (its name is in the error's metadata)", "Retry; operators check the dependency.";
    DeadlineExceeded "E5012" "DEADLINE_EXCEEDED" Some(Code::DeadlineExceeded), Yes, "deadline exceeded (not the AI model's)", "Retry, or allow more time.";
}

impl fmt::Display for ErrorCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.entry().name)
    }
}

/// The error of a call, before its conversion to a gRPC status: a code, a message for the caller, and the details.
#[derive(Debug)]
pub struct RpcError {
    code: ErrorCode,
    message: String,
    incident_id: String,
    fields: Vec<(String, String)>,
    retry_after: Option<Duration>,
    quota_subject: Option<String>,
    dependency: Option<&'static str>,
    causes: Vec<String>,
}

impl RpcError {
    /// An error with a message that a caller may read, and with a new incident id.
    pub fn new(code: ErrorCode, message: impl Into<String>) -> Self {
        RpcError {
            code,
            message: message.into(),
            incident_id: incident_id(),
            fields: Vec::new(),
            retry_after: None,
            quota_subject: None,
            dependency: None,
            causes: Vec::new(),
        }
    }

    /// An internal error. It is logged here with its cause, which must contain no foreign text. The caller receives a
    /// fixed sentence.
    pub fn internal(cause: impl fmt::Display) -> Self {
        let mut fault = RpcError::new(ErrorCode::Internal, INTERNAL_MESSAGE);
        let cause = cause.to_string();
        fault.log(&cause);
        fault.add_causes(&[cause]);
        fault
    }

    /// Logs the cause under the incident id and adds it to the call's occurrence. The caller does not receive it. Of
    /// errors of libraries and peers only the class and the code are kept, because their text may quote what a caller
    /// sent.
    #[must_use]
    pub fn with_cause(mut self, cause: &(dyn Error + 'static)) -> Self {
        let causes = error_chain::describe(cause);
        self.log(&causes.join(": "));
        self.add_causes(&causes);
        self
    }

    /// Adds an invalid field and its problem (`BadRequest`).
    #[must_use]
    pub fn field(mut self, name: impl Into<String>, problem: impl Into<String>) -> Self {
        self.fields.push((name.into(), problem.into()));
        self
    }

    /// Sets the delay before a retry (`RetryInfo`).
    #[must_use]
    pub fn retry_after(mut self, delay: Duration) -> Self {
        self.retry_after = Some(delay);
        self
    }

    /// Names the dependency that is unavailable (`dependency` in the metadata of `ErrorInfo`).
    #[must_use]
    pub fn dependency(mut self, name: &'static str) -> Self {
        self.dependency = Some(name);
        self
    }

    /// Sets the subject whose quota is used up (`QuotaFailure`).
    #[must_use]
    pub fn quota(mut self, subject: impl Into<String>) -> Self {
        self.quota_subject = Some(subject.into());
        self
    }

    /// The error code.
    pub fn code(&self) -> ErrorCode {
        self.code
    }

    /// The message for the caller.
    pub fn message(&self) -> &str {
        &self.message
    }

    /// The incident id: `INC-YYYYMMDD-XXXXXXXX`.
    pub fn incident_id(&self) -> &str {
        &self.incident_id
    }

    /// The causes, outermost first, without secrets and foreign text.
    pub fn causes(&self) -> &[String] {
        &self.causes
    }

    fn add_causes(&mut self, causes: &[String]) {
        let room = error_chain::MAX_CAUSES - self.causes.len();
        self.causes.extend(causes.iter().take(room).map(|cause| error_chain::redact_cause(cause)));
    }

    fn log(&self, cause: &dyn fmt::Display) {
        let (error_code, incident_id) = (self.code.entry().name, &self.incident_id);
        tracing::warn!(error_code, incident_id, %cause, "{}", self.message);
    }
}

impl From<&sqlx::Error> for RpcError {
    fn from(cause: &sqlx::Error) -> RpcError {
        RpcError::new(ErrorCode::DatabaseError, STORE_UNAVAILABLE_MESSAGE).with_cause(cause)
    }
}

impl From<&anyhow::Error> for RpcError {
    fn from(cause: &anyhow::Error) -> RpcError {
        RpcError::new(ErrorCode::Internal, INTERNAL_MESSAGE).with_cause(cause.as_ref())
    }
}

impl From<RpcError> for Status {
    fn from(fault: RpcError) -> Status {
        let entry = fault.code.entry();
        let metadata = [("error_code", entry.name), ("incident_id", &fault.incident_id)]
            .into_iter()
            .chain(fault.dependency.map(|name| ("dependency", name)))
            .map(|(name, value)| (name.to_owned(), value.to_owned()));
        let metadata: HashMap<_, _> = metadata.collect();
        let mut details = ErrorDetails::with_error_info(entry.reason, ERROR_DOMAIN, metadata);
        for (name, problem) in fault.fields {
            details.add_bad_request_violation(name, problem);
        }
        if let Some(delay) = fault.retry_after {
            details.set_retry_info(Some(delay));
        }
        if let Some(subject) = fault.quota_subject {
            details.set_quota_failure(vec![QuotaViolation::new(subject, fault.message.clone())]);
        }
        let grpc = entry.grpc.unwrap_or(Code::Internal);
        let mut status = Status::with_error_details(grpc, fault.message, details);
        error_chain::attach(&fault.causes, status.metadata_mut());
        if let Some(delay) = fault.retry_after {
            let seconds = delay.as_secs() + u64::from(delay.subsec_nanos() > 0);
            status.metadata_mut().insert("retry-after", seconds.into());
        }
        status
    }
}

/// The HTTP status that the gateway gives to a gRPC status, as google.rpc.Code documents it:
/// <https://github.com/googleapis/googleapis/blob/master/google/rpc/code.proto>
pub fn http_status(code: Code) -> u16 {
    match code {
        Code::Ok => 200,
        Code::InvalidArgument | Code::FailedPrecondition | Code::OutOfRange => 400,
        Code::Unauthenticated => 401,
        Code::PermissionDenied => 403,
        Code::NotFound => 404,
        Code::Aborted | Code::AlreadyExists => 409,
        Code::ResourceExhausted => 429,
        Code::Cancelled => 499,
        Code::Unknown | Code::Internal | Code::DataLoss => 500,
        Code::Unimplemented => 501,
        Code::Unavailable => 503,
        Code::DeadlineExceeded => 504,
    }
}

/// The name of a gRPC status as the specification writes it:
/// <https://grpc.io/docs/guides/status-codes/>
pub fn code_name(code: Code) -> &'static str {
    match code {
        Code::Ok => "OK",
        Code::Cancelled => "CANCELLED",
        Code::Unknown => "UNKNOWN",
        Code::InvalidArgument => "INVALID_ARGUMENT",
        Code::DeadlineExceeded => "DEADLINE_EXCEEDED",
        Code::NotFound => "NOT_FOUND",
        Code::AlreadyExists => "ALREADY_EXISTS",
        Code::PermissionDenied => "PERMISSION_DENIED",
        Code::ResourceExhausted => "RESOURCE_EXHAUSTED",
        Code::FailedPrecondition => "FAILED_PRECONDITION",
        Code::Aborted => "ABORTED",
        Code::OutOfRange => "OUT_OF_RANGE",
        Code::Unimplemented => "UNIMPLEMENTED",
        Code::Internal => "INTERNAL",
        Code::Unavailable => "UNAVAILABLE",
        Code::DataLoss => "DATA_LOSS",
        Code::Unauthenticated => "UNAUTHENTICATED",
    }
}

/// The published code and the incident id of a status; `None` if the status does not come from the mesh. An
/// overloaded gateway sends its incident id only in a header.
pub fn published_code(status: &Status) -> Option<(String, String)> {
    let mut info = status.get_details_error_info().filter(|info| info.domain == ERROR_DOMAIN)?;
    let incident_id = info.metadata.remove("incident_id").or_else(|| {
        let header = status.metadata().get(INCIDENT_ID_HEADER)?;
        Some(header.to_str().ok()?.to_owned())
    });
    Some((info.metadata.remove("error_code")?, incident_id?))
}

/// Converts the status of a library to one with a published code, message and details. The library's message is
/// dropped, because it may quote what the caller sent.
pub fn to_published_status(status: Status, is_request_aborted: bool) -> Status {
    if published_code(&status).is_some() {
        return status;
    }
    if is_request_aborted && status.code() != Code::DeadlineExceeded {
        let message = "the client aborted its request";
        return RpcError::new(ErrorCode::StreamGivenUp, message).into();
    }
    let (code, message) = match status.code() {
        Code::Internal if is_unreadable_request(&status) => (
            ErrorCode::InvalidInput,
            "the message can't be decoded: send one complete protobuf message of this method",
        ),
        Code::InvalidArgument | Code::FailedPrecondition => {
            (ErrorCode::InvalidInput, "the request is not valid for this method")
        }
        Code::Unauthenticated => (ErrorCode::BadKey, "a valid credential is required"),
        Code::PermissionDenied => {
            (ErrorCode::NoPermission, "this credential has no permission for this method")
        }
        // tonic's status for a message over the size limit.
        Code::OutOfRange | Code::ResourceExhausted => {
            (ErrorCode::TooLarge, "the message is larger than this method accepts")
        }
        Code::Aborted | Code::AlreadyExists => (ErrorCode::Conflict, "the state has changed"),
        Code::NotFound => (ErrorCode::NotFound, "the requested item does not exist"),
        Code::Cancelled => (ErrorCode::StreamGivenUp, "the call was cancelled"),
        Code::Unimplemented => {
            (ErrorCode::Unsupported, "this method, content type or compression is not supported")
        }
        Code::DeadlineExceeded => (ErrorCode::DeadlineExceeded, "there was no answer in time"),
        Code::Unavailable => (ErrorCode::Overloaded, "the service is not available; try again"),
        Code::Ok | Code::Unknown | Code::Internal | Code::DataLoss => {
            return RpcError::new(ErrorCode::Internal, INTERNAL_MESSAGE).with_cause(&status).into();
        }
    };
    RpcError::new(code, message).into()
}

fn is_unreadable_request(status: &Status) -> bool {
    UNREADABLE_REQUEST_PREFIXES.iter().any(|prefix| status.message().starts_with(prefix))
}

/// A new incident id: `INC-YYYYMMDD-XXXXXXXX`.
pub fn incident_id() -> String {
    let day = OffsetDateTime::now_utc().date();
    let (year, month, day) = (day.year(), u8::from(day.month()), day.day());
    format!("INC-{year:04}{month:02}{day:02}-{:08X}", rand::random::<u32>())
}

/// The messages of an error and its sources, outermost first, separated by colons.
pub fn error_chain_text(error: &(dyn Error + 'static)) -> String {
    let links = std::iter::successors(Some(error), |error| (*error).source());
    links.map(ToString::to_string).collect::<Vec<_>>().join(": ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_are_26_codes_in_order_without_repeats() {
        let names: Vec<_> = ErrorCode::ALL.iter().map(|code| code.entry().name).collect();
        assert_eq!(names.len(), 26);
        assert!(names.is_sorted_by(|a, b| a < b), "{names:?}");
    }

    #[test]
    fn a_status_carries_code_incident_and_details() {
        let fault = RpcError::new(ErrorCode::RateLimited, "slow down")
            .retry_after(Duration::from_millis(1500))
            .quota("key_1");
        let id = fault.incident_id().to_owned();
        let status = Status::from(fault);
        assert_eq!(status.code(), Code::ResourceExhausted);
        assert_eq!(published_code(&status), Some(("E4004".to_owned(), id.clone())));
        assert_eq!(status.metadata().get("retry-after").unwrap(), "2");
        let details = status.get_error_details();
        assert_eq!(details.retry_info().unwrap().retry_delay, Some(Duration::from_millis(1500)));
        assert_eq!(details.quota_failure().unwrap().violations[0].subject, "key_1");
        assert_eq!(id.len(), "INC-20260101-0123ABCD".len());
    }

    #[test]
    fn a_status_of_a_library_gets_a_published_code() {
        let code = |status| published_code(&to_published_status(status, false)).unwrap().0;
        assert_eq!(code(Status::unimplemented("")), "E4012");
        assert_eq!(code(Status::out_of_range("decoded message length too large")), "E4006");
        assert_eq!(code(Status::internal("failed to decode Protobuf message: x")), "E4001");
        assert_eq!(code(Status::internal("else")), "E5004");
        let ours = Status::from(RpcError::new(ErrorCode::Conflict, "taken"));
        assert_eq!(code(ours), "E4009");
    }

    #[test]
    fn an_undecodable_request_is_no_internal_error() {
        for message in [
            "failed to decode Protobuf message: buffer underflow",
            "protocol error: received message with invalid compression flag: 7",
            "Missing request message.",
            "Unexpected EOF decoding stream.",
            "Error decompressing: invalid gzip header",
        ] {
            let status = to_published_status(Status::internal(message), false);
            assert_eq!(published_code(&status).unwrap().0, "E4001", "{message}");
        }
        let aborted =
            to_published_status(Status::internal("h2 protocol error: stream reset"), true);
        assert_eq!(published_code(&aborted).unwrap().0, "E4011");
        let bug = to_published_status(Status::unknown("else"), false);
        assert_eq!(published_code(&bug).unwrap().0, "E5004");
    }

    #[test]
    fn messages_of_libraries_are_not_published() {
        for code in 1..=16 {
            let status =
                to_published_status(Status::new(Code::from(code), "quotes hunter2"), code % 2 == 0);
            assert!(!status.message().contains("hunter2"), "{code}");
            assert!(!String::from_utf8_lossy(status.details()).contains("hunter2"), "{code}");
        }
    }
}
