//! Checks of a request: every field that is wrong is named, all at once.

use std::fmt;

use crate::status::{ErrorCode, Fault};

/// The fields that are wrong, and how.
#[derive(Debug, Default)]
pub struct Violations(Vec<Violation>);

#[derive(Debug)]
struct Violation {
    field: &'static str,
    problem: String,
    missing: bool,
}

impl Violations {
    /// One field that holds what it must not.
    pub fn one(field: &'static str, problem: impl Into<String>) -> Self {
        let mut violations = Violations::default();
        violations.wrong(field, problem);
        violations
    }

    /// A field holds what it must not.
    pub fn wrong(&mut self, field: &'static str, problem: impl Into<String>) {
        self.0.push(Violation { field, problem: problem.into(), missing: false });
    }

    /// A field that must be there is not.
    pub fn missing(&mut self, field: &'static str) {
        self.0.push(Violation { field, problem: "is required".to_owned(), missing: true });
    }

    /// An error if any field is wrong.
    pub fn check(self) -> Result<(), Violations> {
        if self.0.is_empty() { Ok(()) } else { Err(self) }
    }

    /// The names of the fields, in the order of the checks.
    pub fn fields(&self) -> Vec<&'static str> {
        self.0.iter().map(|violation| violation.field).collect()
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
