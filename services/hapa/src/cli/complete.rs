//! `hapa complete`: suggestions for the code at a cursor, best first, as an editor receives them.

use std::io::Write as _;
use std::path::{Path, PathBuf};

use hapa_proto::codegen::v1::codegen_service_client::CodegenServiceClient;
use hapa_proto::codegen::v1::{CompleteCodeRequest, CompleteCodeResponse, Suggestion};

use crate::cli::connection::ConnectionArgs;
use crate::cli::input::{MAX_PREFIX_BYTES, is_stdin, read_path};
use crate::cli::table::table;
use crate::cli::{CliError, json};

#[derive(clap::Args, Clone, Debug)]
#[command(after_help = "Examples:\n  \
    hapa complete --prefix-file main.py --suffix ')' -n 3\n  \
    head -20 main.py | hapa complete --type block")]
pub(super) struct CompleteArgs {
    /// File with the code before the cursor, at most 8,000 characters; default and "-": standard input.
    #[arg(short, long, value_name = "FILE")]
    prefix_file: Option<PathBuf>,
    /// Code after the cursor.
    #[arg(short, long, default_value = "", hide_default_value = true)]
    suffix: String,
    /// Programming language of the code.
    #[arg(short, long, default_value = "python")]
    language: String,
    /// Extent of a suggestion: inline, block or function.
    #[arg(short = 't', long = "type", default_value = "inline")]
    completion_type: String,
    /// Maximum number of suggestions, 1 to 20.
    #[arg(short = 'n', long)]
    max_suggestions: Option<i32>,
    /// Model, as `hapa models` lists it; default: the model for completion.
    #[arg(short, long, default_value = "", hide_default_value = true)]
    model: String,
    /// Sampling temperature, 0 to 2.
    #[arg(long)]
    temperature: Option<f64>,
    /// Maximum number of tokens per suggestion, 1 to 4096.
    #[arg(long)]
    max_tokens: Option<i32>,
    /// Ignore cached suggestions and call the engine.
    #[arg(long)]
    no_cache: bool,
    /// Print the reply as one JSON object.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    connection: ConnectionArgs,
}

pub(super) async fn complete(args: CompleteArgs) -> Result<(), CliError> {
    let request = request(&args)?;
    let mut client = CodegenServiceClient::new(args.connection.connect_as_user().await?);
    let reply = client.complete_code(request).await?.into_inner();
    if args.json {
        return json::print(&reply);
    }
    print(&reply)
}

fn request(args: &CompleteArgs) -> Result<CompleteCodeRequest, CliError> {
    let path = args.prefix_file.as_deref().unwrap_or(Path::new("-"));
    let prefix = read_path(path, MAX_PREFIX_BYTES)?;
    let file_path = args.prefix_file.as_deref().filter(|path| !is_stdin(path));
    let file_path = file_path.map(|path| path.display().to_string());
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

fn print(reply: &CompleteCodeResponse) -> Result<(), CliError> {
    for warning in &reply.warnings {
        writeln!(anstream::stderr(), "note: {warning}")?;
    }
    if reply.suggestions.is_empty() {
        writeln!(anstream::stderr(), "the model returned no suggestion")?;
        return Ok(());
    }
    let row = |suggestion: &Suggestion| {
        [format_confidence(suggestion.confidence), on_one_line(&suggestion.text)]
    };
    writeln!(
        std::io::stdout(),
        "{}",
        table(["confidence", "suggestion"], reply.suggestions.iter().map(row))
    )?;
    Ok(())
}

fn format_confidence(confidence: f64) -> String {
    // The engine reports 0 if it has no value.
    if confidence > 0.0 { format!("{confidence:.2}") } else { "–".to_owned() }
}

/// Replaces line feeds and tabs by visible marks.
fn on_one_line(text: &str) -> String {
    text.replace('\n', "⏎").replace('\t', "⇥")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_suggestion_is_one_line_and_an_unknown_confidence_is_a_dash() {
        assert_eq!(on_one_line("a:\n\tb"), "a:⏎⇥b");
        assert_eq!([0.5, 0.0].map(format_confidence), ["0.50", "–"]);
    }
}
