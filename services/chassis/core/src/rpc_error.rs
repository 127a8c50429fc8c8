//! The published error codes, and the one way to a failed call: every status that leaves a service
//! carries an `ErrorInfo` with its code and the id of its incident.

use std::error::Error;
use std::fmt::{self, Write as _};
use std::time::Duration;

use time::OffsetDateTime;
use tonic::{Code, Status};
use tonic_types::{ErrorDetails, QuotaViolation, StatusExt};

use crate::error_chain;

pub use crate::error_chain::describe;

/// `ErrorInfo.domain` of every failure.
pub const DOMAIN: &str = "hapa";

/// The words for the unexpected.
pub const INTERNAL: &str = "an internal error; report the incident id";

/// The words for a store that fails.
pub const STORE_AWAY: &str = "the store can't be asked at the moment; try again";

/// The header in which the gateway names the incident of a refusal of its own.
const INCIDENT_ID: &str = "x-hapa-incident-id";

/// How tonic begins what it says, as INTERNAL, of a request that is no message of its method: not
/// protobuf, a wrong compression flag, no message at all, less than its length says, not compressed as
/// its header says. `tests/e2e/api/malformed_requests.rs` sends each.
const UNREADABLE: [&str; 5] = [
    "failed to decode Protobuf message",
    "protocol error",
    "Missing request message",
    "Unexpected EOF decoding stream",
    "Error decompressing",
];

/// Whether the same call can work later.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Retry {
    /// The call has to change first.
    No,
    /// With backoff.
    Yes,
    /// When `RetryInfo` says.
    AfterDelay,
}

/// What is published about a code.
#[derive(Debug)]
pub struct Entry {
    /// Such as "E4001".
    pub name: &'static str,
    /// `ErrorInfo.reason`: `UPPER_SNAKE_CASE`, as AIP-193 asks.
    pub reason: &'static str,
    /// The gRPC status, none where the code never fails a call.
    pub grpc: Option<Code>,
    /// Whether a retry can help.
    pub retry: Retry,
    /// What it means.
    pub meaning: &'static str,
    /// What to do about it.
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

            /// What is published about it.
            pub fn entry(self) -> &'static Entry {
                match self { $(ErrorCode::$variant => const { &Entry {
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
    BadKey "E4003" "BAD_API_KEY" Some(Code::Unauthenticated), No, "bad or missing API key or token", "Present a key as `x-api-key` or a token as `authorization: Bearer`; check it for typos.";
    RateLimited "E4004" "RATE_LIMITED" Some(Code::ResourceExhausted), AfterDelay, "rate limit reached", "Wait as long as RetryInfo says, or ask for a higher limit.";
    NoPermission "E4005" "NO_PERMISSION" Some(Code::PermissionDenied), No, "no permission (scope)", "Use a key or a session with the scope that the error names.";
    TooLarge "E4006" "TOO_LARGE" Some(Code::ResourceExhausted), No, "message or header too large", "Send less.";
    KeyEnded "E4007" "KEY_ENDED" Some(Code::Unauthenticated), No, "key or session expired or revoked", "Ask for a new key, or log in again.";
    BudgetUsedUp "E4008" "BUDGET_USED_UP" Some(Code::ResourceExhausted), AfterDelay, "token budget used up", "Wait for the reset time, or ask for a larger budget.";
    Conflict "E4009" "CONFLICT" Some(Code::Aborted), No, "conflict (idempotency, version)", "Read the current state and decide again.";
    NotFound "E4010" "NOT_FOUND" Some(Code::NotFound), No, "not found", "Check the id or the name.";
    StreamGivenUp "E4011" "STREAM_GIVEN_UP" Some(Code::Cancelled), No, "stream given up (client left or reads too slowly)", "Read the stream as it comes, to its end.";
    Unsupported "E4012" "UNSUPPORTED" Some(Code::Unimplemented), No, "unsupported method or content type", "Check the method's name, and that the client and the mesh are of one version.";
    ModelTimeout "E5001" "MODEL_TIMEOUT" Some(Code::DeadlineExceeded), Yes, "AI model timeout", "Try again, ask for less, or allow more time.";
    CacheError "E5002" "CACHE_ERROR" None, No, "cache error (bypassed; shown as a warning, never fails a request)", "Nothing to do for a caller; operators look at the cache.";
    DatabaseError "E5003" "DATABASE_ERROR" Some(Code::Unavailable), Yes, "database error", "Try again; operators look at the store.";
    Internal "E5004" "INTERNAL" Some(Code::Internal), No, "internal error", "Report the incident id.";
    Overloaded "E5005" "OVERLOADED" Some(Code::Unavailable), AfterDelay, "overloaded", "Wait as long as RetryInfo says.";
    ModelUnreachable "E5006" "MODEL_UNREACHABLE" Some(Code::Unavailable), Yes, "AI model unreachable", "Try again; operators look at the engine.";
    CutShort "E5007" "CUT_SHORT" Some(Code::Unavailable), No, "generation cut short", "Keep or drop the partial text, then ask again.";
    ShuttingDown "E5008" "SHUTTING_DOWN" Some(Code::Unavailable), Yes, "shutting down", "Try again at once: another replica answers.";
    CircuitOpen "E5009" "CIRCUIT_OPEN" Some(Code::Unavailable), AfterDelay, "circuit open", "Wait as long as RetryInfo says.";
    SpoolFull "E5010" "SPOOL_FULL" None, No, "event spool full (health only)", "Operators look at the services that take the events.";
}

impl fmt::Display for ErrorCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.entry().name)
    }
}

/// A call that failed, before it is a status: a code, words for the caller, and the details.
#[derive(Debug)]
pub struct Fault {
    code: ErrorCode,
    message: String,
    incident_id: String,
    fields: Vec<(String, String)>,
    retry_after: Option<Duration>,
    quota_subject: Option<String>,
}

impl Fault {
    /// A failure with words that a caller may read. It has its incident id from here on.
    pub fn new(code: ErrorCode, message: impl Into<String>) -> Self {
        Fault {
            code,
            message: message.into(),
            incident_id: incident_id(),
            fields: Vec::new(),
            retry_after: None,
            quota_subject: None,
        }
    }

    /// The unexpected: logged here with its cause, which has no foreign text, and shown as a fixed
    /// sentence.
    pub fn internal(cause: impl fmt::Display) -> Self {
        let fault = Fault::new(ErrorCode::Internal, INTERNAL);
        let cause = cause.to_string();
        fault.log(&cause);
        error_chain::remember(&fault.incident_id, std::iter::once(cause));
        fault
    }

    /// Logs what lies behind the failure, under its incident id, and keeps it from the caller; the
    /// call's occurrence will have it. Of errors that are not ours the class and the code are kept:
    /// their text may quote what a caller sent.
    #[must_use]
    pub fn because(self, cause: &(dyn Error + 'static)) -> Self {
        let causes = error_chain::describe(cause);
        self.log(&causes.join(": "));
        error_chain::remember(&self.incident_id, causes.into_iter());
        self
    }

    /// Names a field and what is wrong with it (`BadRequest`).
    #[must_use]
    pub fn field(mut self, name: impl Into<String>, problem: impl Into<String>) -> Self {
        self.fields.push((name.into(), problem.into()));
        self
    }

    /// Says when to come back (`RetryInfo`).
    #[must_use]
    pub fn retry_after(mut self, delay: Duration) -> Self {
        self.retry_after = Some(delay);
        self
    }

    /// Says whose quota it was (`QuotaFailure`).
    #[must_use]
    pub fn quota(mut self, subject: impl Into<String>) -> Self {
        self.quota_subject = Some(subject.into());
        self
    }

    /// Its code.
    pub fn code(&self) -> ErrorCode {
        self.code
    }

    /// Its words.
    pub fn message(&self) -> &str {
        &self.message
    }

    /// `INC-YYYYMMDD-XXXXXXXX`.
    pub fn incident_id(&self) -> &str {
        &self.incident_id
    }

    fn log(&self, cause: &dyn fmt::Display) {
        let (error_code, incident_id) = (self.code.entry().name, &self.incident_id);
        tracing::warn!(error_code, incident_id, %cause, "{}", self.message);
    }
}

impl From<&sqlx::Error> for Fault {
    fn from(cause: &sqlx::Error) -> Fault {
        Fault::new(ErrorCode::DatabaseError, STORE_AWAY).because(cause)
    }
}

impl From<&anyhow::Error> for Fault {
    fn from(cause: &anyhow::Error) -> Fault {
        Fault::new(ErrorCode::Internal, INTERNAL).because(cause.as_ref())
    }
}

impl From<Fault> for Status {
    fn from(fault: Fault) -> Status {
        let entry = fault.code.entry();
        let mut details = ErrorDetails::with_error_info(
            entry.reason,
            DOMAIN,
            [("error_code", entry.name), ("incident_id", &fault.incident_id)]
                .map(|(name, value)| (name.to_owned(), value.to_owned())),
        );
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
        if let Some(delay) = fault.retry_after {
            let seconds = delay.as_secs() + u64::from(delay.subsec_nanos() > 0);
            status.metadata_mut().insert("retry-after", seconds.into());
        }
        status
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

/// The published code and incident id that a status carries, none where it is not one of ours. An
/// overloaded gateway has its incident id in a header alone.
pub fn read(status: &Status) -> Option<(String, String)> {
    let mut info = status.get_details_error_info().filter(|info| info.domain == DOMAIN)?;
    let incident_id = info.metadata.remove("incident_id").or_else(|| {
        let header = status.metadata().get(INCIDENT_ID)?;
        Some(header.to_str().ok()?.to_owned())
    });
    Some((info.metadata.remove("error_code")?, incident_id?))
}

/// Gives a status that a library made the code, the words and the details that we publish. A library's
/// own words are never passed on: they may quote what the caller sent.
pub fn publish(status: Status, request_broke_off: bool) -> Status {
    if read(&status).is_some() {
        return status;
    }
    if request_broke_off && status.code() != Code::DeadlineExceeded {
        let words = "the client broke off its request";
        return Fault::new(ErrorCode::StreamGivenUp, words).into();
    }
    let (code, words) = match status.code() {
        Code::Internal if UNREADABLE.iter().any(|begin| status.message().starts_with(begin)) => (
            ErrorCode::InvalidInput,
            "the message can't be read: send one whole protobuf message of this method",
        ),
        Code::InvalidArgument | Code::FailedPrecondition => {
            (ErrorCode::InvalidInput, "the request is not valid for this method")
        }
        Code::Unauthenticated => (ErrorCode::BadKey, "a valid credential is needed"),
        Code::PermissionDenied => (ErrorCode::NoPermission, "this credential may not do that"),
        // tonic's word for a message over the limit
        Code::OutOfRange | Code::ResourceExhausted => {
            (ErrorCode::TooLarge, "the message is larger than this method takes")
        }
        Code::Aborted | Code::AlreadyExists => (ErrorCode::Conflict, "the state has changed"),
        Code::NotFound => (ErrorCode::NotFound, "there is no such thing"),
        Code::Cancelled => (ErrorCode::StreamGivenUp, "the call was cancelled"),
        Code::Unimplemented => {
            (ErrorCode::Unsupported, "this method, content type or compression is not supported")
        }
        Code::DeadlineExceeded => (ErrorCode::ModelTimeout, "there was no answer in time"),
        Code::Unavailable => (ErrorCode::Overloaded, "the service is not available; try again"),
        Code::Ok | Code::Unknown | Code::Internal | Code::DataLoss => {
            return Fault::new(ErrorCode::Internal, INTERNAL).because(&status).into();
        }
    };
    Fault::new(code, words).into()
}

/// A new name for a failure: `INC-YYYYMMDD-XXXXXXXX`.
pub fn incident_id() -> String {
    let day = OffsetDateTime::now_utc().date();
    let (year, month, day) = (day.year(), u8::from(day.month()), day.day());
    format!("INC-{year:04}{month:02}{day:02}-{:08X}", rand::random::<u32>())
}

/// An error and what caused it, outermost first.
pub fn chain(error: &(dyn Error + 'static)) -> String {
    let mut text = error.to_string();
    for cause in links(error).skip(1) {
        let _ = write!(text, ": {cause}");
    }
    text
}

fn links<'e>(error: &'e (dyn Error + 'static)) -> impl Iterator<Item = &'e (dyn Error + 'static)> {
    std::iter::successors(Some(error), |error| (*error).source())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_are_22_codes_in_order_without_repeats() {
        let names: Vec<_> = ErrorCode::ALL.iter().map(|code| code.entry().name).collect();
        assert_eq!(names.len(), 22);
        assert!(names.is_sorted_by(|a, b| a < b), "{names:?}");
    }

    #[test]
    fn a_status_carries_code_incident_and_details() {
        let fault = Fault::new(ErrorCode::RateLimited, "slow down")
            .retry_after(Duration::from_millis(1500))
            .quota("key_1");
        let id = fault.incident_id().to_owned();
        let status = Status::from(fault);
        assert_eq!(status.code(), Code::ResourceExhausted);
        assert_eq!(read(&status), Some(("E4004".to_owned(), id.clone())));
        assert_eq!(status.metadata().get("retry-after").unwrap(), "2");
        let details = status.get_error_details();
        assert_eq!(details.retry_info().unwrap().retry_delay, Some(Duration::from_millis(1500)));
        assert_eq!(details.quota_failure().unwrap().violations[0].subject, "key_1");
        assert_eq!(id.len(), "INC-20260101-0123ABCD".len());
    }

    #[test]
    fn what_a_library_says_becomes_what_is_published() {
        let code = |status| read(&publish(status, false)).unwrap().0;
        assert_eq!(code(Status::unimplemented("")), "E4012");
        assert_eq!(code(Status::out_of_range("decoded message length too large")), "E4006");
        assert_eq!(code(Status::internal("failed to decode Protobuf message: x")), "E4001");
        assert_eq!(code(Status::internal("else")), "E5004");
        let ours = Status::from(Fault::new(ErrorCode::Conflict, "taken"));
        assert_eq!(code(ours), "E4009");
    }

    #[test]
    fn a_request_that_cannot_be_read_is_no_bug_of_ours() {
        for words in [
            "failed to decode Protobuf message: buffer underflow",
            "protocol error: received message with invalid compression flag: 7",
            "Missing request message.",
            "Unexpected EOF decoding stream.",
            "Error decompressing: invalid gzip header",
        ] {
            let status = publish(Status::internal(words), false);
            assert_eq!(read(&status).unwrap().0, "E4001", "{words}");
        }
        let broken = publish(Status::internal("h2 protocol error: stream reset"), true);
        assert_eq!(read(&broken).unwrap().0, "E4011");
        let bug = publish(Status::unknown("else"), false);
        assert_eq!(read(&bug).unwrap().0, "E5004");
    }

    #[test]
    fn a_librarys_words_are_not_passed_on() {
        for code in 1..=16 {
            let status = publish(Status::new(Code::from(code), "quotes hunter2"), code % 2 == 0);
            assert!(!status.message().contains("hunter2"), "{code}");
            assert!(!String::from_utf8_lossy(status.details()).contains("hunter2"), "{code}");
        }
    }
}
