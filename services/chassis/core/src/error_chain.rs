//! Causes of failures by incident id, kept from where they occur until the end of the call takes them. The map is
//! bounded and evicts the oldest causes.
//!
//! Causes are logged and stored, so they contain no foreign text: a database, a peer or a parser may quote
//! the value that it rejects. Of such an error only the class and the published code are kept.

use std::collections::{HashMap, VecDeque};
use std::error::Error;
use std::io;
use std::sync::{LazyLock, Mutex, MutexGuard, PoisonError};

use sqlx::error::ErrorKind;
use tonic::Status;

use crate::redaction::scrub;
use crate::rpc_error::{code_name, read};

/// Maximum number of incidents in the map.
const MAX_INCIDENTS: usize = 10_000;
/// Maximum number of causes of one incident.
const MAX_CAUSES: usize = 20;
/// Maximum length of a cause, in characters.
const MAX_CAUSE_LEN: usize = 500;

static CAUSES: LazyLock<Mutex<Causes>> = LazyLock::new(Mutex::default);

#[derive(Debug, Default)]
struct Causes {
    by_incident: HashMap<String, Vec<String>>,
    /// Incident ids in order of arrival; may contain ids whose causes have been taken.
    order: VecDeque<String>,
}

/// Adds causes to an incident, outermost first, and redacts them.
pub fn remember<T: AsRef<str>>(incident_id: &str, causes: impl Iterator<Item = T>) {
    let causes: Vec<_> =
        causes.take(MAX_CAUSES).map(|cause| scrub(cause.as_ref(), MAX_CAUSE_LEN)).collect();
    lock().add(incident_id, causes);
}

/// Removes and returns the causes of an incident.
pub fn take(incident_id: &str) -> Vec<String> {
    lock().by_incident.remove(incident_id).unwrap_or_default()
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
    match read(status).filter(|(code, incident)| is_plain(code) && is_plain(incident)) {
        Some((code, incident)) => format!("a service returned {grpc} ({code}, {incident})"),
        None => format!("a service returned {grpc}"),
    }
}

fn is_plain(text: &str) -> bool {
    text.len() <= 40 && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
}

fn lock() -> MutexGuard<'static, Causes> {
    CAUSES.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Causes {
    fn add(&mut self, incident_id: &str, causes: Vec<String>) {
        if let Some(known) = self.by_incident.get_mut(incident_id) {
            known.extend(causes);
            known.truncate(MAX_CAUSES);
            return;
        }
        while self.order.len() >= MAX_INCIDENTS {
            if let Some(oldest) = self.order.pop_front() {
                self.by_incident.remove(&oldest);
            }
        }
        self.order.push_back(incident_id.to_owned());
        self.by_incident.insert(incident_id.to_owned(), causes);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::rpc_error::ErrorCode;
    use crate::rpc_error::Fault;

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
        let fault = Fault::new(ErrorCode::DatabaseError, "kim@x can't be read");
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
    fn causes_are_taken_once_and_the_oldest_are_evicted() {
        let mut causes = Causes::default();
        for number in 0..=MAX_INCIDENTS {
            causes.add(&format!("INC-{number}"), vec![number.to_string()]);
        }
        assert_eq!((causes.by_incident.len(), causes.order.len()), (MAX_INCIDENTS, MAX_INCIDENTS));
        assert!(
            !causes.by_incident.contains_key("INC-0") && causes.by_incident.contains_key("INC-1")
        );
        remember("INC-X", ["one", "Bearer abc"].into_iter());
        remember("INC-X", ["two"].into_iter());
        assert_eq!(take("INC-X"), ["one", "Bearer [removed]", "two"]);
        assert!(take("INC-X").is_empty());
    }
}
