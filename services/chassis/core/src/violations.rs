//! Validation of requests: one error names every invalid field.

use std::borrow::Cow;
use std::fmt;

use tonic::Status;

use crate::rpc_error::{ErrorCode, RpcError};

/// The invalid fields of a request, and their problems.
#[derive(Clone, Debug, Default)]
pub struct Violations(Vec<Violation>);

#[derive(Clone, Debug)]
struct Violation {
    field: Cow<'static, str>,
    problem: String,
    is_missing: bool,
}

impl Extend<(&'static str, String)> for Violations {
    fn extend<I: IntoIterator<Item = (&'static str, String)>>(&mut self, problems: I) {
        for (field, problem) in problems {
            self.add_invalid(field, problem);
        }
    }
}

impl Violations {
    /// Violations of one invalid field.
    pub fn single(field: &'static str, problem: impl Into<String>) -> Self {
        let mut violations = Violations::default();
        violations.add_invalid(field, problem);
        violations
    }

    /// Adds an invalid field.
    pub fn add_invalid(&mut self, field: impl Into<Cow<'static, str>>, problem: impl Into<String>) {
        let (field, problem) = (field.into(), problem.into());
        self.0.push(Violation { field, problem, is_missing: false });
    }

    /// Adds the field if `word` is not one of `words`.
    pub fn check_one_of(&mut self, field: &'static str, word: &str, words: &[&str]) {
        if !words.contains(&word) {
            self.add_invalid(field, format!("is unknown; known are {}", words.join(", ")));
        }
    }

    /// Adds a required field that the request lacks.
    pub fn add_missing(&mut self, field: impl Into<Cow<'static, str>>) {
        let (field, problem) = (field.into(), "is required".to_owned());
        self.0.push(Violation { field, problem, is_missing: true });
    }

    /// An error if any field is invalid.
    pub fn check(self) -> Result<(), Violations> {
        if self.0.is_empty() { Ok(()) } else { Err(self) }
    }

    /// The names of the fields, in the order of the checks.
    pub fn fields(&self) -> Vec<Cow<'static, str>> {
        self.0.iter().map(|violation| violation.field.clone()).collect()
    }

    /// The number of violations.
    pub fn count(&self) -> usize {
        self.0.len()
    }
}

impl fmt::Display for Violations {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, violation) in self.0.iter().enumerate() {
            let separator = if index == 0 { "" } else { "; " };
            write!(f, "{separator}{} {}", violation.field, violation.problem)?;
        }
        Ok(())
    }
}

impl std::error::Error for Violations {}

impl From<Violations> for RpcError {
    fn from(violations: Violations) -> RpcError {
        let is_missing = violations.0.iter().all(|violation| violation.is_missing);
        let code = if is_missing { ErrorCode::MissingField } else { ErrorCode::InvalidInput };
        let fault = RpcError::new(code, violations.to_string());
        violations
            .0
            .into_iter()
            .fold(fault, |fault, violation| fault.field(violation.field, violation.problem))
    }
}

impl From<Violations> for Status {
    fn from(violations: Violations) -> Status {
        RpcError::from(violations).into()
    }
}
