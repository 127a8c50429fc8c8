//! `hapa generate`: the answer as it comes. Code goes to standard output and everything else to
//! standard error, so that `hapa generate … > file.py` holds code alone; a terminal shows both.

use std::io::{IsTerminal as _, Read as _, Write as _};
use std::path::PathBuf;

use anstyle::{AnsiColor, Style};
use anyhow::Context as _;
use hapa_proto::codegen::v1::codegen_service_client::CodegenServiceClient;
use hapa_proto::codegen::v1::stream_generate_code_response::{Event, Finished, Kind};
use hapa_proto::codegen::v1::{GenerateCodeRequest, StreamGenerateCodeResponse, UserProfile};

use crate::cli::table::plain;
use crate::cli::{Failure, connection, json};

/// Largest file or standard input that is read: what a request may hold, in its longest form.
const MOST_BYTES: u64 = 4 * 50_000;

#[derive(clap::Args, Clone, Debug)]
#[group(id = "generate_args")]
pub(super) struct Args {
    /// What to do, in any language; "-" reads it from standard input.
    question: String,
    /// A file whose code the question is about; "-" reads it from standard input.
    #[arg(short, long, value_name = "FILE")]
    file: Option<PathBuf>,
    /// Programming language of the answer.
    #[arg(short, long, default_value = "python")]
    language: String,
    /// generate, complete, explain, comment, fix, optimize, test or review; default: as the question
    /// sounds.
    #[arg(short, long, default_value = "")]
    task: String,
    /// A model that `ListModels` names.
    #[arg(short, long, default_value = "")]
    model: String,
    /// Your level: beginner, intermediate, advanced or expert.
    #[arg(long, default_value = "")]
    level: String,
    /// Sampling temperature, 0 to 2.
    #[arg(long)]
    temperature: Option<f64>,
    /// Most tokens to generate, 1 to 4096.
    #[arg(long)]
    max_tokens: Option<i32>,
    /// One JSON object for each frame of the stream.
    #[arg(long, conflicts_with = "raw")]
    json: bool,
    /// The whole answer, code and explanation, to standard output, without marks or colour.
    #[arg(long)]
    raw: bool,
    #[command(flatten)]
    connection: connection::Args,
}

pub(super) async fn generate(args: Args) -> Result<(), Failure> {
    let request = request(&args)?;
    let mut client = CodegenServiceClient::new(args.connection.as_user().await?);
    let mut frames = client.stream_generate_code(request).await?.into_inner();
    let mut printer = Printer::new(&args);
    while let Some(frame) = frames.message().await? {
        printer.print(frame)?;
    }
    printer.end()
}

fn request(args: &Args) -> Result<GenerateCodeRequest, Failure> {
    let from_stdin = |path: &PathBuf| path.as_os_str() == "-";
    if args.question == "-" && args.file.as_ref().is_some_and(from_stdin) {
        return Err(
            anyhow::anyhow!("standard input can be the question or the file, not both").into()
        );
    }
    let user_question = if args.question == "-" { read_stdin()? } else { args.question.clone() };
    let code_context = match &args.file {
        None => String::new(),
        Some(path) if from_stdin(path) => read_stdin()?,
        Some(path) => {
            let file = std::fs::File::open(path);
            let file = file.with_context(|| format!("opening {}", path.display()))?;
            read(file).with_context(|| format!("reading {}", path.display()))?
        }
    };
    let file_path = args.file.as_ref().filter(|path| !from_stdin(path));
    Ok(GenerateCodeRequest {
        user_question,
        code_context,
        file_path: file_path.map(|path| path.display().to_string()).unwrap_or_default(),
        language: args.language.clone(),
        task: args.task.clone(),
        model: args.model.clone(),
        temperature: args.temperature,
        max_tokens: args.max_tokens,
        user_profile: Some(UserProfile {
            python_skill_level: args.level.clone(),
            ..Default::default()
        }),
        ..GenerateCodeRequest::default()
    })
}

fn read_stdin() -> anyhow::Result<String> {
    read(std::io::stdin()).context("reading standard input")
}

fn read(source: impl std::io::Read) -> anyhow::Result<String> {
    let mut text = String::new();
    source.take(MOST_BYTES + 1).read_to_string(&mut text)?;
    anyhow::ensure!(text.len() as u64 <= MOST_BYTES, "it is longer than a request may be");
    Ok(text)
}

enum Form {
    Json,
    Raw,
    Apart,
}

struct Printer {
    form: Form,
    /// The last text did not end its line.
    in_line: bool,
    /// The last code did not: a file ends with a line feed.
    code_in_line: bool,
    finished: bool,
}

const DIM: Style = Style::new().dimmed();
const WARN: Style = Style::new().bold().fg_color(Some(anstyle::Color::Ansi(AnsiColor::Yellow)));
const CODE: Style = Style::new().fg_color(Some(anstyle::Color::Ansi(AnsiColor::Cyan)));

impl Printer {
    fn new(args: &Args) -> Self {
        let form = match (args.json, args.raw) {
            (true, _) => Form::Json,
            (_, true) => Form::Raw,
            _ => Form::Apart,
        };
        Printer { form, in_line: false, code_in_line: false, finished: false }
    }

    fn print(&mut self, frame: StreamGenerateCodeResponse) -> Result<(), Failure> {
        self.finished |= matches!(frame.event, Some(Event::Finished(_)));
        if matches!(self.form, Form::Json) {
            writeln!(std::io::stdout(), "{}", json::json(&frame)?)?;
            return Ok(());
        }
        match frame.event {
            Some(Event::Delta(delta)) => self.text(delta.kind(), &delta.text)?,
            Some(Event::Finished(finished)) => {
                self.warn(&finished.warnings)?;
                self.summary(&finished)?;
            }
            _ => {}
        }
        Ok(())
    }

    fn text(&mut self, kind: Kind, text: &str) -> Result<(), Failure> {
        self.in_line = !text.ends_with('\n');
        match (&self.form, kind) {
            (Form::Raw, _) => {
                let mut out = std::io::stdout();
                out.write_all(text.as_bytes())?;
                out.flush()?;
            }
            (_, Kind::Code) => {
                self.code_in_line = self.in_line;
                let mut out = anstream::stdout();
                write!(out, "{CODE}{text}{CODE:#}")?;
                out.flush()?;
            }
            _ => write!(anstream::stderr(), "{text}")?,
        }
        Ok(())
    }

    fn warn(&mut self, warnings: &[String]) -> Result<(), Failure> {
        for warning in warnings {
            let line_end = if std::mem::take(&mut self.in_line) { "\n" } else { "" };
            writeln!(anstream::stderr(), "{line_end}{WARN}warning:{WARN:#} {}", plain(warning))?;
        }
        Ok(())
    }

    /// The times are for people: nobody needs them in a pipe.
    fn summary(&mut self, finished: &Finished) -> Result<(), Failure> {
        if !std::io::stderr().is_terminal() {
            return Ok(());
        }
        let usage = finished.usage.unwrap_or_default();
        let line_end = if std::mem::take(&mut self.in_line) { "\n" } else { "" };
        let cut = if finished.finish_reason == "length" {
            ", cut at the most tokens allowed"
        } else {
            ""
        };
        let (tokens, total) = (usage.completion_tokens, finished.response_time_ms);
        let first = finished.time_to_first_token_ms;
        writeln!(
            anstream::stderr(),
            "{line_end}{DIM}{tokens} tokens in {total} ms, the first after {first} ms{cut}{DIM:#}"
        )?;
        Ok(())
    }

    fn end(&self) -> Result<(), Failure> {
        // Where both are one terminal the summary has ended the line.
        let ended = std::io::stdout().is_terminal() && std::io::stderr().is_terminal();
        if self.code_in_line && !ended && matches!(self.form, Form::Apart) {
            writeln!(std::io::stdout())?;
        }
        if !self.finished {
            return Err(anyhow::anyhow!("the stream ended before the answer did").into());
        }
        Ok(())
    }
}
