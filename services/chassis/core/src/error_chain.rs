//! The causes of failures. They travel with the error from its origin to the end of the call.
//!
//! A status carries them as metadata within the process. The middleware that records calls removes them from every
//! status ([`take`]) before it leaves the server.
//!
//! Causes are logged and stored, so they contain no foreign text: a database, a peer or a parser may quote the value that
//! it rejects. Of such an error only the class and the published code are kept.

use std::error::Error;
use std::io;

use sqlx::error::ErrorKind;
use tonic::Status;
use tonic::metadata::{MetadataMap, MetadataValue};

use crate::redaction::redact_secrets;
use crate::rpc_error::{code_name, published_code};

/// Maximum number of causes of one error.
pub(crate) const MAX_CAUSES: usize = 20;
/// Maximum length of a cause, in characters.
const MAX_CAUSE_LEN: usize = 500;
/// Metadata key of the causes of a status, with one value per cause, outermost first.
pub const CAUSES: &str = "hapa-causes-bin";

/// The cause without secrets, truncated to the maximum length.
pub(crate) fn redact_cause(cause: &str) -> String {
    redact_secrets(cause, MAX_CAUSE_LEN)
}

/// Adds causes to the metadata of a status.
pub(crate) fn attach(causes: &[String], metadata: &mut MetadataMap) {
    for cause in causes {
        metadata.append_bin(CAUSES, MetadataValue::from_bytes(cause.as_bytes()));
    }
}

/// Removes and returns the causes in the metadata of a status.
pub fn take(metadata: &mut MetadataMap) -> Vec<String> {
    let values = metadata.get_all_bin(CAUSES);
    let causes = values.iter().filter_map(|value| value.to_bytes().ok());
    let causes = causes.map(|cause| String::from_utf8_lossy(&cause).into_owned()).collect();
    metadata.remove_bin(CAUSES);
    causes
}

/// The messages of an error and its sources that may be stored, outermost first.
pub fn describe(error: &(dyn Error + 'static)) -> Vec<String> {
    let links = std::iter::successors(Some(error), |error| (*error).source());
    let mut messages = Vec::new();
    for link in links.take(MAX_CAUSES) {
        if let Some(class) = foreign_class(link) {
            // The sources of a foreign error are foreign too.
            messages.push(class);
            break;
        }
        let message = link.to_string();
        // A transparent error repeats the message of its source.
        if messages.last() != Some(&message) {
            messages.push(message);
        }
    }
    messages
}

/// The class of an error of a library or a peer; `None` for the mesh's own errors.
fn foreign_class(error: &(dyn Error + 'static)) -> Option<String> {
    if let Some(error) = error.downcast_ref::<sqlx::Error>() {
        return Some(database_error_class(error));
    }
    if let Some(status) = error.downcast_ref::<Status>() {
        return Some(peer_error_class(status));
    }
    if let Some(error) = error.downcast_ref::<io::Error>() {
        return Some(error.kind().to_string());
    }
    let json = error.downcast_ref::<serde_json::Error>()?;
    Some(format!("invalid JSON at line {}, column {}", json.line(), json.column()))
}

fn database_error_class(error: &sqlx::Error) -> String {
    let class = match error {
        sqlx::Error::Database(refusal) => {
            let kind = match refusal.kind() {
                ErrorKind::UniqueViolation => "unique violation",
                ErrorKind::ForeignKeyViolation => "foreign key violation",
                ErrorKind::NotNullViolation => "not null violation",
                ErrorKind::CheckViolation => "check violation",
                _ => "database error",
            };
            let code = refusal.code().unwrap_or_default();
            let is_code = !code.is_empty()
                && code.len() <= 8
                && code.bytes().all(|byte| byte.is_ascii_alphanumeric());
            return if is_code { format!("{kind}, code {code}") } else { kind.to_owned() };
        }
        sqlx::Error::Io(error) => {
            return format!("the database connection failed: {}", error.kind());
        }
        sqlx::Error::Tls(_) => "the TLS handshake with the database failed",
        sqlx::Error::Protocol(_) => "the database violated its protocol",
        sqlx::Error::PoolTimedOut => "no database connection became available in time",
        sqlx::Error::PoolClosed => "the database connections are closed",
        sqlx::Error::WorkerCrashed => "the task of a database connection ended",
        sqlx::Error::RowNotFound => "a database row is missing",
        sqlx::Error::ColumnDecode { .. }
        | sqlx::Error::ColumnIndexOutOfBounds { .. }
        | sqlx::Error::ColumnNotFound(_)
        | sqlx::Error::Decode(_)
        | sqlx::Error::TypeNotFound { .. } => "a database row can't be decoded",
        sqlx::Error::Migrate(_) => "the database can't be migrated",
        _ => "the database failed",
    };
    class.to_owned()
}

/// The status of another service. The log of that service has the message under the same incident id.
fn peer_error_class(status: &Status) -> String {
    let grpc = code_name(status.code());
    match published_code(status).filter(|(code, incident)| is_plain(code) && is_plain(incident)) {
        Some((code, incident)) => format!("a service returned {grpc} ({code}, {incident})"),
        None => format!("a service returned {grpc}"),
    }
}

fn is_plain(text: &str) -> bool {
    text.len() <= 40 && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::rpc_error::ErrorCode;
    use crate::rpc_error::RpcError;

    #[derive(Debug, thiserror::Error)]
    #[error("an own sentence")]
    struct Own(#[source] sqlx::Error);

    /// An error as PostgreSQL and SQLite return it for a rejected statement.
    #[derive(Debug, thiserror::Error)]
    #[error("{0}")]
    struct Refusal(String, &'static str);

    impl sqlx::error::DatabaseError for Refusal {
        fn message(&self) -> &str {
            &self.0
        }

        fn kind(&self) -> ErrorKind {
            if self.1 == "23505" { ErrorKind::UniqueViolation } else { ErrorKind::Other }
        }

        fn code(&self) -> Option<std::borrow::Cow<'_, str>> {
            Some(self.1.into())
        }

        fn as_error(&self) -> &(dyn Error + Send + Sync + 'static) {
            self
        }

        fn as_error_mut(&mut self) -> &mut (dyn Error + Send + Sync + 'static) {
            self
        }

        fn into_error(self: Box<Self>) -> Box<dyn Error + Send + Sync + 'static> {
            self
        }
    }

    #[test]
    fn of_foreign_errors_only_the_class_and_the_code_are_kept() {
        let refused = |code| {
            sqlx::Error::Database(Box::new(Refusal("Key (email)=(kim@x) exists".into(), code)))
        };
        let unique = describe(&Own(refused("23505")));
        assert_eq!(unique, ["an own sentence", "unique violation, code 23505"]);
        assert_eq!(describe(&refused("22P02")), ["database error, code 22P02"]);
        assert_eq!(describe(&refused("not a code!")), ["database error"]);
        let io = io::Error::new(io::ErrorKind::ConnectionRefused, "db.internal:5432");
        let failed = "the database connection failed: connection refused";
        assert_eq!(describe(&sqlx::Error::Io(io)), [failed]);
        let peer = Status::unavailable("can't connect to 10.0.0.7:50051");
        assert_eq!(describe(&peer), ["a service returned UNAVAILABLE"]);
        let fault = RpcError::new(ErrorCode::DatabaseError, "kim@x can't be read");
        let expected = format!("a service returned UNAVAILABLE (E5003, {})", fault.incident_id());
        assert_eq!(describe(&Status::from(fault)), [expected]);
        let json = serde_json::from_str::<u32>("\"what was asked\"").unwrap_err();
        let expected = ["a row", "invalid JSON at line 1, column 16"];
        let wrapped = anyhow::Error::from(json).context("a row");
        assert_eq!(describe(wrapped.as_ref()), expected);
    }

    proptest! {
        #[test]
        fn no_value_of_a_foreign_error_is_kept(value in "[A-Z]{12}") {
            let refusal = Refusal(format!("invalid input: \"{value}\""), "22P02");
            let errors: [Box<dyn Error>; 4] = [
                Box::new(sqlx::Error::Database(Box::new(refusal))),
                Box::new(sqlx::Error::Protocol(value.clone())),
                Box::new(Status::internal(value.clone())),
                Box::new(io::Error::other(value.clone())),
            ];
            for error in errors {
                let kept = describe(&*error).join(" ");
                prop_assert!(!kept.contains(&value), "{}", kept);
            }
        }
    }

    #[test]
    fn causes_travel_with_a_status_redacted_and_bounded_and_are_taken_once() {
        let fault = RpcError::internal("Bearer abc").with_cause(&Own(sqlx::Error::PoolTimedOut));
        let (mut status, other) = (Status::from(fault), Status::from(RpcError::internal("other")));
        let expected = [
            "Bearer [removed]",
            "an own sentence",
            "no database connection became available in time",
        ];
        assert_eq!(
            take(status.clone().metadata_mut()),
            expected,
            "a copy of the status has them too"
        );
        assert_eq!(take(status.metadata_mut()), expected);
        assert!(take(status.metadata_mut()).is_empty());
        assert!(!status.metadata().contains_key(CAUSES));
        assert_eq!(take(other.clone().metadata_mut()), ["other"]);
        let many =
            (0..20).fold(RpcError::internal("x".repeat(600)), |fault, _| fault.with_cause(&other));
        let causes = take(Status::from(many).metadata_mut());
        assert_eq!(causes.len(), MAX_CAUSES);
        assert!(causes[0].chars().count() <= MAX_CAUSE_LEN, "{}", causes[0]);
    }
}
