//! ValidateCode: validates the request, analyses the code on a blocking thread and builds the
//! response.

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
use crate::stream::millis;
use crate::validate::{AnalysisReport, Finding, Language, NOT_CHECKED, Severity, analyse};

const MAX_CODE_LEN: usize = 50_000;
const MAX_FILE_NAME_LEN: usize = 1_024;
const MAX_SESSION_ID_LEN: usize = 128;
const MAX_ISSUE_COUNT: usize = 100;
/// Longest analysis of one request.
const ANALYSIS_TIMEOUT: Duration = Duration::from_millis(200);
/// Concurrent analyses. Each keeps a core busy.
const MAX_CONCURRENT_ANALYSES: usize = 2;
/// Longest wait for a permit.
const PERMIT_TIMEOUT: Duration = Duration::from_secs(2);

/// Runs the analyses of all requests, at most two at once.
#[derive(Clone, Debug)]
pub(crate) struct ValidationPool {
    permits: Arc<Semaphore>,
}

impl Default for ValidationPool {
    fn default() -> Self {
        ValidationPool { permits: Arc::new(Semaphore::new(MAX_CONCURRENT_ANALYSES)) }
    }
}

impl ValidationPool {
    /// Analyses code. The permit is released when the analysis ends, even if the caller has
    /// disconnected.
    pub(crate) async fn validate(
        &self,
        request: ValidateCodeRequest,
        language: Language,
    ) -> Result<ValidateCodeResponse, Error> {
        let permit = timeout(PERMIT_TIMEOUT, Arc::clone(&self.permits).acquire_owned());
        let permit =
            permit.await.map_err(|_| Error::ValidatorsBusy)?.map_err(anyhow::Error::from)?;
        let work = spawn_blocking(move || {
            let response = respond(&request, language, ANALYSIS_TIMEOUT);
            drop(permit);
            response
        });
        Ok(work.await.map_err(anyhow::Error::from)?)
    }
}

/// Validates the request and names all invalid fields.
pub(crate) fn validate_request(request: &ValidateCodeRequest) -> Result<Language, Violations> {
    let mut violations = Violations::default();
    if request.code.trim().is_empty() {
        violations.add_missing("code");
    }
    let bounded = [
        ("code", &request.code, MAX_CODE_LEN),
        ("file_name", &request.file_name, MAX_FILE_NAME_LEN),
        ("session_id", &request.session_id, MAX_SESSION_ID_LEN),
    ];
    for (field, text, max) in bounded {
        let length = text.chars().count();
        if length > max {
            violations
                .add_invalid(field, format!("must be at most {max} characters, not {length}"));
        }
    }
    if request.file_name.contains(char::is_control) {
        violations.add_invalid("file_name", "must not contain control characters");
    }
    if !request.request_id.is_empty() && !is_request_id(&request.request_id) {
        violations.add_invalid("request_id", "must be 1 to 128 letters, digits and - _ .");
    }
    let name = if request.language.is_empty() { "python" } else { &request.language };
    let language = match Language::from_name(name) {
        Some(Language::TypeScript) if is_tsx(&request.file_name) => Language::Tsx,
        Some(language) => language,
        None => {
            violations.add_invalid(
                "language",
                "must be one of python, javascript, typescript, java, cpp, csharp",
            );
            Language::Python
        }
    };
    violations.check()?;
    Ok(language)
}

fn is_tsx(name: &str) -> bool {
    Path::new(name).extension().is_some_and(|ending| ending.eq_ignore_ascii_case("tsx"))
}

/// Analyses code and builds the response.
pub(crate) fn respond(
    request: &ValidateCodeRequest,
    language: Language,
    timeout: Duration,
) -> ValidateCodeResponse {
    let start = Instant::now();
    let code = &request.code;
    let report = analyse(code, language, timeout, request.check_style()).unwrap_or_else(|| {
        AnalysisReport { findings: vec![not_checked_finding()], ..AnalysisReport::default() }
    });
    let count = |severity| {
        let findings = report.findings.iter();
        saturating_u32(findings.filter(|finding| finding.severity == severity).count())
    };
    let has = |issue| report.findings.iter().any(|finding| finding.issue == issue);
    let has_metrics = !has(NOT_CHECKED) && !has(super::SYNTAX_ERROR);
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
            .take(MAX_ISSUE_COUNT)
            .map(|finding| to_issue(finding, &lines))
            .collect(),
        issues_truncated: report.findings.len() > MAX_ISSUE_COUNT,
        info_count: count(Severity::Info),
        warning_count: count(Severity::Warning),
        error_count: count(Severity::Error),
        critical_count: count(Severity::Critical),
        lines_of_code: saturating_u32(report.lines_of_code),
        functions_count: has_metrics.then_some(report.functions),
        classes_count: has_metrics.then_some(report.classes),
        cyclomatic_complexity: has_metrics.then_some(report.complexity),
        validation_time_ms: millis(start.elapsed()),
        language: language.name().to_owned(),
    }
}

fn not_checked_finding() -> Finding {
    Finding {
        line: 0,
        column: 0,
        severity: Severity::Warning,
        issue: NOT_CHECKED,
        message: "the analysis of the code exceeded its time limit".to_owned(),
        suggestion: "Send less code per request.",
    }
}

fn to_issue(finding: &Finding, lines: &[&str]) -> ValidationIssue {
    let before = lines.get(finding.line).and_then(|line| line.get(..finding.column));
    ValidationIssue {
        line_number: saturating_u32(finding.line + 1),
        column_number: saturating_u32(
            before.map_or(finding.column, |text| text.chars().count()) + 1,
        ),
        severity: finding.severity.as_str().to_owned(),
        issue_type: finding.issue.to_owned(),
        message: finding.message.clone(),
        suggestion: finding.suggestion.to_owned(),
    }
}

fn saturating_u32(number: usize) -> u32 {
    u32::try_from(number).unwrap_or(u32::MAX)
}
