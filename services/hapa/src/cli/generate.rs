//! `hapa generate`: prints an answer as it streams. Code goes to standard output and everything else to standard
//! error: `hapa generate … > file.py` writes only code, and a terminal shows both.

use std::io::{IsTerminal as _, Write as _};
use std::path::PathBuf;

use anstyle::{AnsiColor, Style};
use hapa_proto::codegen::v1::codegen_service_client::CodegenServiceClient;
use hapa_proto::codegen::v1::stream_generate_code_response::{Event, Finished, Kind};
use hapa_proto::codegen::v1::{GenerateCodeRequest, StreamGenerateCodeResponse, UserProfile};

use crate::cli::connection::ConnectionArgs;
use crate::cli::input::{MAX_CODE_BYTES, is_stdin, read_path, read_stdin};
use crate::cli::table::sanitize;
use crate::cli::{CliError, json};

#[derive(clap::Args, Clone, Debug)]
#[command(after_help = "Examples:\n  \
    hapa generate \"remove duplicates from a list\" > dedupe.py\n  \
    hapa generate \"why does this fail?\" --file main.py --task explain")]
pub(super) struct GenerateArgs {
    /// The question, in any natural language; "-" reads it from standard input.
    question: String,
    /// File with the code that the question refers to, at most 50,000 characters; "-" reads standard input.
    #[arg(short, long, value_name = "FILE")]
    file: Option<PathBuf>,
    /// Programming language of the answer.
    #[arg(short, long, default_value = "python")]
    language: String,
    /// Task: generate, complete, explain, comment, fix, optimize, test or review; default: derived from the
    /// question.
    #[arg(short, long, default_value = "", hide_default_value = true)]
    task: String,
    /// Model, as `hapa models` lists it; default: the model for the task.
    #[arg(short, long, default_value = "", hide_default_value = true)]
    model: String,
    /// Skill level of the reader: beginner, intermediate, advanced or expert.
    #[arg(long, default_value = "", hide_default_value = true)]
    level: String,
    /// Sampling temperature, 0 to 2.
    #[arg(long)]
    temperature: Option<f64>,
    /// Maximum number of tokens to generate, 1 to 4096.
    #[arg(long)]
    max_tokens: Option<i32>,
    /// Show the reasoning of models that reason before they answer, on standard error.
    #[arg(long)]
    reasoning: bool,
    /// Print one JSON object per stream message.
    #[arg(long, conflicts_with = "raw")]
    json: bool,
    /// Print the whole answer, code and explanation, to standard output, without colour.
    #[arg(long)]
    raw: bool,
    #[command(flatten)]
    connection: ConnectionArgs,
}

pub(super) async fn generate(args: GenerateArgs) -> Result<(), CliError> {
    let request = request(&args)?;
    let mut client = CodegenServiceClient::new(args.connection.connect_as_user().await?);
    let mut stream = client.stream_generate_code(request).await?.into_inner();
    let mut printer = StreamPrinter::new(&args);
    while let Some(message) = stream.message().await? {
        printer.print(message)?;
    }
    printer.finish()
}

fn request(args: &GenerateArgs) -> Result<GenerateCodeRequest, CliError> {
    let has_question_on_stdin = args.question == "-";
    if has_question_on_stdin && args.file.as_deref().is_some_and(is_stdin) {
        let message =
            "standard input cannot be both the question and the file; pass one as an argument";
        return Err(anyhow::anyhow!(message).into());
    }
    let user_question =
        if has_question_on_stdin { read_stdin(MAX_CODE_BYTES)? } else { args.question.clone() };
    let code_context = match &args.file {
        None => String::new(),
        Some(path) => read_path(path, MAX_CODE_BYTES)?,
    };
    let file_path = args.file.as_ref().filter(|path| !is_stdin(path));
    Ok(GenerateCodeRequest {
        user_question,
        code_context,
        file_path: file_path.map(|path| path.display().to_string()).unwrap_or_default(),
        language: args.language.clone(),
        task: args.task.clone(),
        model: args.model.clone(),
        temperature: args.temperature,
        max_tokens: args.max_tokens,
        include_reasoning: args.reasoning,
        user_profile: Some(UserProfile {
            python_skill_level: args.level.clone(),
            ..Default::default()
        }),
        ..GenerateCodeRequest::default()
    })
}

enum OutputFormat {
    /// Each message of the stream as JSON.
    Json,
    /// Everything to standard output.
    Raw,
    /// Code to standard output, the rest to standard error.
    Split,
}

struct StreamPrinter {
    format: OutputFormat,
    /// Whether the last text did not end with a line feed.
    is_mid_line: bool,
    /// The same for the last code: a file must end with a line feed.
    is_code_mid_line: bool,
    is_finished: bool,
}

const DIM: Style = Style::new().dimmed();
const WARN: Style = Style::new().bold().fg_color(Some(anstyle::Color::Ansi(AnsiColor::Yellow)));
const CODE: Style = Style::new().fg_color(Some(anstyle::Color::Ansi(AnsiColor::Cyan)));

impl StreamPrinter {
    fn new(args: &GenerateArgs) -> Self {
        let format = match (args.json, args.raw) {
            (true, _) => OutputFormat::Json,
            (_, true) => OutputFormat::Raw,
            _ => OutputFormat::Split,
        };
        StreamPrinter { format, is_mid_line: false, is_code_mid_line: false, is_finished: false }
    }

    fn print(&mut self, message: StreamGenerateCodeResponse) -> Result<(), CliError> {
        self.is_finished |= matches!(message.event, Some(Event::Finished(_)));
        if matches!(self.format, OutputFormat::Json) {
            return json::print(&message);
        }
        match message.event {
            Some(Event::Delta(delta)) => self.print_delta(delta.kind(), &delta.text)?,
            Some(Event::Finished(finished)) => {
                self.print_warnings(&finished.warnings)?;
                self.print_summary(&finished)?;
            }
            _ => {}
        }
        Ok(())
    }

    fn print_delta(&mut self, kind: Kind, text: &str) -> Result<(), CliError> {
        self.is_mid_line = !text.ends_with('\n');
        match (&self.format, kind) {
            (_, Kind::Reasoning) => write!(anstream::stderr(), "{DIM}{text}{DIM:#}")?,
            (OutputFormat::Raw, _) => {
                let mut out = std::io::stdout();
                out.write_all(text.as_bytes())?;
                out.flush()?;
            }
            (_, Kind::Code) => {
                self.is_code_mid_line = self.is_mid_line;
                let mut out = anstream::stdout();
                write!(out, "{CODE}{text}{CODE:#}")?;
                out.flush()?;
            }
            _ => write!(anstream::stderr(), "{text}")?,
        }
        Ok(())
    }

    fn print_warnings(&mut self, warnings: &[String]) -> Result<(), CliError> {
        for warning in warnings {
            let line_end = if std::mem::take(&mut self.is_mid_line) { "\n" } else { "" };
            writeln!(anstream::stderr(), "{line_end}{WARN}warning:{WARN:#} {}", sanitize(warning))?;
        }
        Ok(())
    }

    /// Prints token counts and times, on a terminal only.
    fn print_summary(&mut self, finished: &Finished) -> Result<(), CliError> {
        if !std::io::stderr().is_terminal() {
            return Ok(());
        }
        let usage = finished.usage.unwrap_or_default();
        let line_end = if std::mem::take(&mut self.is_mid_line) { "\n" } else { "" };
        let cut =
            if finished.finish_reason == "length" { ", truncated at the token limit" } else { "" };
        let (tokens, total) = (usage.completion_tokens, finished.response_time_ms);
        let (first, answer) =
            (finished.time_to_first_token_ms, finished.time_to_first_answer_token_ms);
        let reasoning = match usage.reasoning_tokens {
            0 => String::new(),
            count => format!(", {count} of reasoning until {answer} ms"),
        };
        writeln!(
            anstream::stderr(),
            "{line_end}{DIM}{tokens} tokens in {total} ms, the first after {first} ms{reasoning}{cut}{DIM:#}"
        )?;
        Ok(())
    }

    /// Ends the last line of code, and fails if the stream ended without its terminal event.
    fn finish(&self) -> Result<(), CliError> {
        // If both outputs are terminals, the summary has already ended the line.
        let has_summary = std::io::stdout().is_terminal() && std::io::stderr().is_terminal();
        if self.is_code_mid_line && !has_summary && matches!(self.format, OutputFormat::Split) {
            writeln!(std::io::stdout())?;
        }
        if !self.is_finished {
            return Err(anyhow::anyhow!("the stream ended before the answer was complete").into());
        }
        Ok(())
    }
}
