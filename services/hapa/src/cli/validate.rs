//! `hapa validate`: what is wrong or dangerous in files, as a table or as JSON; the exit code says
//! whether all of them are valid.

use std::io::{Read as _, Write as _};
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use hapa_proto::codegen::v1::codegen_service_client::CodegenServiceClient;
use hapa_proto::codegen::v1::{ValidateCodeRequest, ValidateCodeResponse, ValidationIssue};

use crate::cli::table::{plain, table};
use crate::cli::{Failure, connection, json};

/// Largest file that is read: what a request may hold, in its longest form.
const MOST_BYTES: u64 = 4 * 50_000;

#[derive(clap::Args, Clone, Debug)]
#[group(id = "validate_args")]
pub(super) struct Args {
    /// The files; "-" is standard input.
    #[arg(required = true, value_name = "FILE")]
    files: Vec<PathBuf>,
    /// python, javascript, typescript, java, cpp or csharp; default: by each file's ending.
    #[arg(short, long)]
    language: Option<String>,
    /// Tell of matters of style, too.
    #[arg(long)]
    style: bool,
    /// The answer for each file as a line of JSON.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    connection: connection::Args,
}

pub(super) async fn validate(args: Args) -> Result<(), Failure> {
    let mut client = CodegenServiceClient::new(args.connection.as_user().await?);
    let mut invalid = 0;
    let mut issues = Vec::new();
    for path in &args.files {
        let request = request(path, &args)?;
        let reply = client.validate_code(request).await?.into_inner();
        invalid += usize::from(!reply.is_valid);
        if args.json {
            writeln!(std::io::stdout(), "{}", json::json(&reply)?)?;
        } else {
            summary(path, &reply)?;
            issues.extend(reply.issues.into_iter().map(|issue| row(path, issue)));
        }
    }
    if !issues.is_empty() {
        let header = ["FILE", "LINE", "COLUMN", "SEVERITY", "ISSUE", "MESSAGE"];
        writeln!(std::io::stdout(), "{}", table(header, issues))?;
    }
    if invalid > 0 {
        let all = args.files.len();
        return Err(anyhow::anyhow!("{invalid} of {all} files are not valid").into());
    }
    Ok(())
}

fn request(path: &Path, args: &Args) -> Result<ValidateCodeRequest, Failure> {
    let language = match &args.language {
        Some(language) => language.clone(),
        None => by_ending(path)?.to_owned(),
    };
    let code = read(path).with_context(|| format!("reading {}", path.display()))?;
    Ok(ValidateCodeRequest {
        code,
        language,
        file_name: path.display().to_string(),
        check_style: args.style.then_some(true),
        ..ValidateCodeRequest::default()
    })
}

fn by_ending(path: &Path) -> anyhow::Result<&'static str> {
    let ending = path.extension().and_then(|ending| ending.to_str()).unwrap_or_default();
    Ok(match ending.to_ascii_lowercase().as_str() {
        "py" | "pyi" => "python",
        "js" | "mjs" | "cjs" | "jsx" => "javascript",
        "ts" | "mts" | "cts" | "tsx" => "typescript",
        "java" => "java",
        "cpp" | "cc" | "cxx" | "hpp" | "hh" | "hxx" | "h" => "cpp",
        "cs" => "csharp",
        _ => anyhow::bail!("{}: its ending names no language; --language does", path.display()),
    })
}

fn read(path: &Path) -> anyhow::Result<String> {
    let source: Box<dyn std::io::Read> = if path.as_os_str() == "-" {
        Box::new(std::io::stdin())
    } else {
        Box::new(std::fs::File::open(path)?)
    };
    let mut code = String::new();
    source.take(MOST_BYTES + 1).read_to_string(&mut code)?;
    anyhow::ensure!(code.len() as u64 <= MOST_BYTES, "it is longer than a request may be");
    Ok(code)
}

fn summary(path: &Path, reply: &ValidateCodeResponse) -> Result<(), Failure> {
    let cut = if reply.issues_truncated { ", of which the first are shown" } else { "" };
    let bad = reply.critical_count + reply.error_count;
    let (warnings, lines) = (reply.warning_count, reply.lines_of_code);
    writeln!(
        anstream::stderr(),
        "{}: {}; {}, lines: {lines}, errors: {bad}, warnings: {warnings}{cut}",
        plain(&path.display().to_string()),
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
