//! `hapa complete`: suggestions for the code at a cursor, best first, as an editor would get them.

use std::io::{Read as _, Write as _};
use std::path::PathBuf;

use anyhow::Context as _;
use hapa_proto::codegen::v1::codegen_service_client::CodegenServiceClient;
use hapa_proto::codegen::v1::{CompleteCodeRequest, CompleteCodeResponse, Suggestion};

use crate::cli::table::table;
use crate::cli::{Failure, connection, json};

/// Largest file or standard input that is read: what a prefix may hold, in its longest form.
const MOST_BYTES: u64 = 4 * 8_000;

#[derive(clap::Args, Clone, Debug)]
#[group(id = "complete_args")]
pub(super) struct Args {
    /// The file whose text stands before the cursor; default: standard input.
    #[arg(short, long, value_name = "FILE")]
    prefix_file: Option<PathBuf>,
    /// The text after the cursor.
    #[arg(short, long, default_value = "")]
    suffix: String,
    /// Programming language of the code.
    #[arg(short, long, default_value = "python")]
    language: String,
    /// How far to go: inline, block or function.
    #[arg(short = 't', long = "type", default_value = "inline")]
    completion_type: String,
    /// How many suggestions to make, 1 to 20.
    #[arg(short = 'n', long)]
    max_suggestions: Option<i32>,
    /// A model that `ListModels` names.
    #[arg(short, long, default_value = "")]
    model: String,
    /// Sampling temperature, 0 to 2.
    #[arg(long)]
    temperature: Option<f64>,
    /// Most tokens of one suggestion, 1 to 4096.
    #[arg(long)]
    max_tokens: Option<i32>,
    /// Ask the engine, whatever was suggested a moment ago.
    #[arg(long)]
    no_cache: bool,
    /// The whole reply as one JSON object.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    connection: connection::Args,
}

pub(super) async fn complete(args: Args) -> Result<(), Failure> {
    let request = request(&args)?;
    let mut client = CodegenServiceClient::new(args.connection.as_user().await?);
    let reply = client.complete_code(request).await?.into_inner();
    if args.json {
        writeln!(std::io::stdout(), "{}", json::json(&reply)?)?;
        return Ok(());
    }
    print(&reply)
}

fn request(args: &Args) -> Result<CompleteCodeRequest, Failure> {
    let prefix = match &args.prefix_file {
        None => read(std::io::stdin()).context("reading standard input")?,
        Some(path) => {
            let file = std::fs::File::open(path);
            let file = file.with_context(|| format!("opening {}", path.display()))?;
            read(file).with_context(|| format!("reading {}", path.display()))?
        }
    };
    let file_path = args.prefix_file.as_ref().map(|path| path.display().to_string());
    Ok(CompleteCodeRequest {
        prefix,
        suffix: args.suffix.clone(),
        language: args.language.clone(),
        file_path: file_path.unwrap_or_default(),
        max_suggestions: args.max_suggestions,
        completion_type: args.completion_type.clone(),
        model: args.model.clone(),
        temperature: args.temperature,
        max_tokens: args.max_tokens,
        no_cache: args.no_cache,
        ..CompleteCodeRequest::default()
    })
}

fn read(source: impl std::io::Read) -> anyhow::Result<String> {
    let mut text = String::new();
    source.take(MOST_BYTES + 1).read_to_string(&mut text)?;
    anyhow::ensure!(text.len() as u64 <= MOST_BYTES, "it is longer than a prefix may be");
    Ok(text)
}

fn print(reply: &CompleteCodeResponse) -> Result<(), Failure> {
    for warning in &reply.warnings {
        writeln!(anstream::stderr(), "note: {warning}")?;
    }
    if reply.suggestions.is_empty() {
        writeln!(anstream::stderr(), "the model suggests nothing here")?;
        return Ok(());
    }
    let row = |one: &Suggestion| [confidence(one.confidence), shown(&one.text)];
    writeln!(
        std::io::stdout(),
        "{}",
        table(["confidence", "suggestion"], reply.suggestions.iter().map(row))
    )?;
    Ok(())
}

fn confidence(confidence: f64) -> String {
    // 0 says that the engine did not tell.
    if confidence > 0.0 { format!("{confidence:.2}") } else { "–".to_owned() }
}

/// In one row, with marks for what would not be seen in one.
fn shown(text: &str) -> String {
    text.replace('\n', "⏎").replace('\t', "⇥")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_suggestion_is_one_row_and_an_unknown_confidence_no_number() {
        assert_eq!(shown("a:\n\tb"), "a:⏎⇥b");
        assert_eq!((confidence(0.5).as_str(), confidence(0.0).as_str()), ("0.50", "–"));
    }
}
