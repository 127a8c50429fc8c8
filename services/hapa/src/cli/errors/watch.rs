//! `hapa errors watch`: one line per error as it is stored. A lost stream resumes at its cursor.

use std::io::Write as _;

use anstyle::{AnsiColor, Style};
use hapa_proto::errors::v1::{Occurrence, WatchOccurrencesRequest, WatchOccurrencesResponse};
use tonic::Status;

use super::connect;
use super::reports::method_name;
use crate::cli::connection::ConnectionArgs;
use crate::cli::reconnect::Reconnect;
use crate::cli::table::{sanitize, to_second};
use crate::cli::{CliError, json};

const CODE: Style = Style::new().fg_color(Some(anstyle::Color::Ansi(AnsiColor::Red)));
const DIM: Style = Style::new().dimmed();

#[derive(clap::Args, Clone, Debug)]
#[command(after_help = "Example:\n  hapa errors watch --code E5006")]
pub(in crate::cli) struct WatchErrorsArgs {
    /// Only errors with this code, such as E5006.
    #[arg(long, default_value = "", hide_default_value = true)]
    code: String,
    /// Print one JSON object per message with errors.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    connection: ConnectionArgs,
}

pub(super) async fn watch(args: WatchErrorsArgs) -> Result<(), CliError> {
    let mut client = connect(&args.connection).await?;
    let mut request = WatchOccurrencesRequest { error_code: args.code, ..Default::default() };
    let mut reconnect = Reconnect::default();
    loop {
        let error = match client.watch_occurrences(request.clone()).await {
            Err(status) => status,
            Ok(stream) => {
                let mut stream = stream.into_inner();
                loop {
                    match stream.message().await {
                        Ok(Some(message)) => {
                            reconnect.record_message();
                            request.cursor.clone_from(&message.cursor);
                            print(&message, args.json)?;
                        }
                        Ok(None) => break Status::unavailable("the stream ended"),
                        Err(status) => break status,
                    }
                }
            }
        };
        reconnect.wait_after(error).await?;
    }
}

fn print(message: &WatchOccurrencesResponse, as_json: bool) -> Result<(), CliError> {
    if message.occurrences.is_empty() && message.skipped == 0 {
        return Ok(());
    }
    if as_json {
        return json::print(message);
    }
    let mut out = anstream::stdout();
    for occurrence in &message.occurrences {
        writeln!(out, "{}", format_line(occurrence))?;
    }
    if message.skipped > 0 {
        writeln!(
            out,
            "{DIM}{} more errors skipped: the stream delivers at most 1,000 per second{DIM:#}",
            message.skipped
        )?;
    }
    Ok(())
}

fn format_line(occurrence: &Occurrence) -> String {
    let Occurrence { time, error_code, incident_id, method, message, actor, recovered, .. } =
        occurrence;
    let time = to_second(time.as_ref());
    let (code, id) = (sanitize(error_code), sanitize(incident_id));
    let method = sanitize(&method_name(method));
    let (message, actor) = (sanitize(message), sanitize(actor));
    let suffix = if *recovered { " (recovered)" } else { "" };
    format!("{time} {CODE}{code}{CODE:#} {id} {method} {DIM}{actor}{DIM:#} {message}{suffix}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_holds_time_code_and_method_and_no_control_characters() {
        let occurrence = Occurrence {
            time: Some(prost_types::Timestamp::date_time(2026, 2, 3, 4, 5, 6).unwrap()),
            error_code: "E5006".to_owned(),
            incident_id: "INC-20260203-0123ABCD".to_owned(),
            method: "/hapa.codegen.v1.CodegenService/GenerateCode".to_owned(),
            message: "away\u{1b}[2J".to_owned(),
            actor: "key:key_1".to_owned(),
            recovered: true,
            ..Occurrence::default()
        };
        let line = anstream::adapter::strip_str(&format_line(&occurrence)).to_string();
        let expected = "2026-02-03 04:05:06 E5006 INC-20260203-0123ABCD GenerateCode key:key_1 away\u{fffd}[2J (recovered)";
        assert_eq!(line, expected);
    }
}
