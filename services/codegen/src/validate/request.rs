//! ValidateCode: the request checked, the work in its turn on a thread that may be busy, the reply.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use hapa_core::call::is_request_id;
use hapa_core::violations::Violations;
use hapa_proto::codegen::v1::{ValidateCodeRequest, ValidateCodeResponse, ValidationIssue};
use tokio::sync::Semaphore;
use tokio::task::spawn_blocking;
use tokio::time::timeout;

use crate::error::Error;
use crate::validate::{Finding, Language, NOT_CHECKED, Report, Severity, examine};
use crate::watch::millis;

const LONGEST_CODE: usize = 50_000;
const LONGEST_NAME: usize = 1_024;
const LONGEST_SESSION: usize = 128;
const MOST_ISSUES: usize = 100;
/// What parsing and looking may take.
const TIME: Duration = Duration::from_millis(200);
/// One keeps a core busy.
const AT_ONCE: usize = 2;
/// Longest wait for a turn.
const PATIENCE: Duration = Duration::from_secs(2);

/// Those who look at code, two at once.
#[derive(Clone, Debug)]
pub(crate) struct Validators {
    turns: Arc<Semaphore>,
}

impl Default for Validators {
    fn default() -> Self {
        Validators { turns: Arc::new(Semaphore::new(AT_ONCE)) }
    }
}

impl Validators {
    /// The turn ends with the work, also where the caller has stopped waiting.
    pub(crate) async fn validate(
        &self,
        request: ValidateCodeRequest,
        language: Language,
    ) -> Result<ValidateCodeResponse, Error> {
        let turn = timeout(PATIENCE, Arc::clone(&self.turns).acquire_owned());
        let turn = turn.await.map_err(|_| Error::ChecksBusy)?.map_err(anyhow::Error::from)?;
        let work = spawn_blocking(move || {
            let reply = look(&request, language, TIME);
            drop(turn);
            reply
        });
        Ok(work.await.map_err(anyhow::Error::from)?)
    }
}

/// Checks every field, and names all that are wrong.
pub(crate) fn check(request: &ValidateCodeRequest) -> Result<Language, Violations> {
    let mut found = Violations::default();
    if request.code.trim().is_empty() {
        found.missing("code");
    }
    let bounded = [
        ("code", &request.code, LONGEST_CODE),
        ("file_name", &request.file_name, LONGEST_NAME),
        ("session_id", &request.session_id, LONGEST_SESSION),
    ];
    for (field, text, most) in bounded {
        let length = text.chars().count();
        if length > most {
            found.wrong(field, format!("may have {most} characters and has {length}"));
        }
    }
    if request.file_name.contains(char::is_control) {
        found.wrong("file_name", "must not hold control characters");
    }
    if !request.request_id.is_empty() && !is_request_id(&request.request_id) {
        found.wrong("request_id", "must be 1 to 128 letters, digits and - _ .");
    }
    let word = if request.language.is_empty() { "python" } else { &request.language };
    let language = match Language::named(word) {
        Some(Language::TypeScript) if has_jsx(&request.file_name) => Language::Tsx,
        Some(language) => language,
        None => {
            found.wrong(
                "language",
                "must be one of python, javascript, typescript, java, cpp, csharp",
            );
            Language::Python
        }
    };
    found.check()?;
    Ok(language)
}

fn has_jsx(name: &str) -> bool {
    Path::new(name).extension().is_some_and(|ending| ending.eq_ignore_ascii_case("tsx"))
}

/// What is said of code that was checked.
pub(crate) fn look(
    request: &ValidateCodeRequest,
    language: Language,
    within: Duration,
) -> ValidateCodeResponse {
    let begun = Instant::now();
    let code = &request.code;
    let report = examine(code, language, within, request.check_style())
        .unwrap_or_else(|| Report { findings: vec![unchecked()], ..Report::default() });
    let count =
        |severity| size(report.findings.iter().filter(|one| one.severity == severity).count());
    let has = |issue| report.findings.iter().any(|one| one.issue == issue);
    let is_counted = !has(NOT_CHECKED) && !has(super::SYNTAX_ERROR);
    let worst = report.findings.iter().map(|finding| finding.severity).max();
    let status = match worst {
        Some(Severity::Error | Severity::Critical) => "invalid",
        Some(Severity::Warning) => "warning",
        Some(Severity::Info) | None => "valid",
    };
    let lines: Vec<_> = code.lines().collect();
    ValidateCodeResponse {
        validation_id: format!("val_{}", &uuid::Uuid::new_v4().simple().to_string()[..8]),
        status: status.to_owned(),
        is_valid: status != "invalid" && !has(NOT_CHECKED),
        issues: report
            .findings
            .iter()
            .take(MOST_ISSUES)
            .map(|finding| issue(finding, &lines))
            .collect(),
        issues_truncated: report.findings.len() > MOST_ISSUES,
        info_count: count(Severity::Info),
        warning_count: count(Severity::Warning),
        error_count: count(Severity::Error),
        critical_count: count(Severity::Critical),
        lines_of_code: size(report.lines_of_code),
        functions_count: is_counted.then_some(report.functions),
        classes_count: is_counted.then_some(report.classes),
        cyclomatic_complexity: is_counted.then_some(report.complexity),
        validation_time_ms: millis(begun.elapsed()),
        language: language.word().to_owned(),
    }
}

fn unchecked() -> Finding {
    Finding {
        line: 0,
        column: 0,
        severity: Severity::Warning,
        issue: NOT_CHECKED,
        message: "the code could not be parsed in the time that it may take".to_owned(),
        suggestion: "Send less of it at once.",
    }
}

fn issue(finding: &Finding, lines: &[&str]) -> ValidationIssue {
    let before = lines.get(finding.line).and_then(|line| line.get(..finding.column));
    ValidationIssue {
        line_number: size(finding.line + 1),
        column_number: size(before.map_or(finding.column, |text| text.chars().count()) + 1),
        severity: finding.severity.word().to_owned(),
        issue_type: finding.issue.to_owned(),
        message: finding.message.clone(),
        suggestion: finding.suggestion.to_owned(),
    }
}

fn size(number: usize) -> u32 {
    u32::try_from(number).unwrap_or(u32::MAX)
}
