//! Checks of a request: every field that is wrong is named, all at once.

use std::borrow::Cow;
use std::fmt;

use tonic::Status;

use crate::rpc_error::{ErrorCode, Fault};

/// The fields that are wrong, and how.
#[derive(Clone, Debug, Default)]
pub struct Violations(Vec<Violation>);

#[derive(Clone, Debug)]
struct Violation {
    field: Cow<'static, str>,
    problem: String,
    missing: bool,
}

impl Extend<(&'static str, String)> for Violations {
    fn extend<I: IntoIterator<Item = (&'static str, String)>>(&mut self, problems: I) {
        for (field, problem) in problems {
            self.wrong(field, problem);
        }
    }
}

impl Violations {
    /// One field that holds what it must not.
    pub fn one(field: &'static str, problem: impl Into<String>) -> Self {
        let mut violations = Violations::default();
        violations.wrong(field, problem);
        violations
    }

    /// A field holds what it must not.
    pub fn wrong(&mut self, field: impl Into<Cow<'static, str>>, problem: impl Into<String>) {
        let (field, problem) = (field.into(), problem.into());
        self.0.push(Violation { field, problem, missing: false });
    }

    /// Records `word` as wrong unless it is one of `words`.
    pub fn check_word(&mut self, field: &'static str, word: &str, words: &[&str]) {
        if !words.contains(&word) {
            self.wrong(field, format!("is unknown; known are {}", words.join(", ")));
        }
    }

    /// A field that must be there is not.
    pub fn missing(&mut self, field: impl Into<Cow<'static, str>>) {
        let (field, problem) = (field.into(), "is required".to_owned());
        self.0.push(Violation { field, problem, missing: true });
    }

    /// An error if any field is wrong.
    pub fn check(self) -> Result<(), Violations> {
        if self.0.is_empty() { Ok(()) } else { Err(self) }
    }

    /// The names of the fields, in the order of the checks.
    pub fn fields(&self) -> Vec<Cow<'static, str>> {
        self.0.iter().map(|violation| violation.field.clone()).collect()
    }

    /// How many are wrong.
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

impl From<Violations> for Fault {
    fn from(violations: Violations) -> Fault {
        let missing = violations.0.iter().all(|violation| violation.missing);
        let code = if missing { ErrorCode::MissingField } else { ErrorCode::InvalidInput };
        let fault = Fault::new(code, violations.to_string());
        let named = |fault: Fault, wrong: Violation| fault.field(wrong.field, wrong.problem);
        violations.0.into_iter().fold(fault, named)
    }
}

impl From<Violations> for Status {
    fn from(violations: Violations) -> Status {
        Fault::from(violations).into()
    }
}
