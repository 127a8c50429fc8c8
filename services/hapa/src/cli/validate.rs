//! `hapa validate`: syntax errors and dangerous constructs in files, as a table or as JSON. The exit code is 0 if
//! all files are valid.

use std::io::Write as _;
use std::path::{Path, PathBuf};

use hapa_proto::codegen::v1::codegen_service_client::CodegenServiceClient;
use hapa_proto::codegen::v1::{ValidateCodeRequest, ValidateCodeResponse, ValidationIssue};

use crate::cli::connection::ConnectionArgs;
use crate::cli::input::{MAX_CODE_BYTES, read_path};
use crate::cli::table::{sanitize, table};
use crate::cli::{CliError, json};

#[derive(clap::Args, Clone, Debug)]
#[command(after_help = "Example:\n  hapa validate --style src/*.py")]
pub(super) struct ValidateArgs {
    /// Files to check, at most 50,000 characters each; "-" is standard input.
    #[arg(required = true, value_name = "FILE")]
    files: Vec<PathBuf>,
    /// Language: python, javascript, typescript, java, cpp or csharp; default: by each file's extension.
    #[arg(short, long)]
    language: Option<String>,
    /// Report style issues too.
    #[arg(long)]
    style: bool,
    /// Print one JSON object per file.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    connection: ConnectionArgs,
}

pub(super) async fn validate(args: ValidateArgs) -> Result<(), CliError> {
    let mut client = CodegenServiceClient::new(args.connection.connect_as_user().await?);
    let mut invalid_count = 0;
    let mut issues = Vec::new();
    for path in &args.files {
        let request = request(path, &args)?;
        let reply = client.validate_code(request).await?.into_inner();
        invalid_count += usize::from(!reply.is_valid);
        if args.json {
            json::print(&reply)?;
        } else {
            print_summary(path, &reply)?;
            issues.extend(reply.issues.into_iter().map(|issue| row(path, issue)));
        }
    }
    if !issues.is_empty() {
        let header = ["FILE", "LINE", "COLUMN", "SEVERITY", "ISSUE", "MESSAGE"];
        writeln!(std::io::stdout(), "{}", table(header, issues))?;
    }
    if invalid_count > 0 {
        let count = args.files.len();
        return Err(anyhow::anyhow!("{invalid_count} of {count} files are not valid").into());
    }
    Ok(())
}

fn request(path: &Path, args: &ValidateArgs) -> Result<ValidateCodeRequest, CliError> {
    let language = match &args.language {
        Some(language) => language.clone(),
        None => language_of(path)?.to_owned(),
    };
    Ok(ValidateCodeRequest {
        code: read_path(path, MAX_CODE_BYTES)?,
        language,
        file_name: path.display().to_string(),
        check_style: args.style.then_some(true),
        ..ValidateCodeRequest::default()
    })
}

/// The language that a file's extension stands for.
fn language_of(path: &Path) -> anyhow::Result<&'static str> {
    let extension = path.extension().and_then(|extension| extension.to_str()).unwrap_or_default();
    Ok(match extension.to_ascii_lowercase().as_str() {
        "py" | "pyi" => "python",
        "js" | "mjs" | "cjs" | "jsx" => "javascript",
        "ts" | "mts" | "cts" | "tsx" => "typescript",
        "java" => "java",
        "cpp" | "cc" | "cxx" | "hpp" | "hh" | "hxx" | "h" => "cpp",
        "cs" => "csharp",
        _ => anyhow::bail!("{}: unknown file extension; pass --language", path.display()),
    })
}

fn print_summary(path: &Path, reply: &ValidateCodeResponse) -> Result<(), CliError> {
    let truncated = if reply.issues_truncated { ", of which the first are shown" } else { "" };
    let errors = reply.critical_count + reply.error_count;
    let (warnings, lines) = (reply.warning_count, reply.lines_of_code);
    writeln!(
        anstream::stderr(),
        "{}: {}; {}, lines: {lines}, errors: {errors}, warnings: {warnings}{truncated}",
        sanitize(&path.display().to_string()),
        reply.status,
        reply.language
    )?;
    Ok(())
}

fn row(path: &Path, issue: ValidationIssue) -> [String; 6] {
    let ValidationIssue { line_number, column_number, severity, issue_type, message, suggestion } =
        issue;
    let message = if suggestion.is_empty() { message } else { format!("{message}. {suggestion}") };
    let (line, column) = (line_number.to_string(), column_number.to_string());
    [path.display().to_string(), line, column, severity, issue_type, message]
}
