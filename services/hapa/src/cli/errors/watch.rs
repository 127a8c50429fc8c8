//! `hapa errors watch`: a line for each error as it is stored. A lost stream goes on where it ended.

use std::io::Write as _;
use std::time::Duration;

use anstyle::{AnsiColor, Style};
use hapa_proto::errors::v1::{Occurrence, WatchOccurrencesRequest, WatchOccurrencesResponse};
use tonic::{Code, Status};

use super::client;
use super::sums::last_part;
use crate::cli::table::{plain, second};
use crate::cli::{Failure, connection, json};

/// Between two attempts to go on, and how many there are in a row.
const PAUSE: Duration = Duration::from_secs(1);
const ATTEMPTS: u32 = 30;

const CODE: Style = Style::new().fg_color(Some(anstyle::Color::Ansi(AnsiColor::Red)));
const DIM: Style = Style::new().dimmed();

#[derive(clap::Args, Clone, Debug)]
#[group(id = "errors_watch_args")]
pub(in crate::cli) struct Args {
    /// Only this code, such as E5006.
    #[arg(long, default_value = "", hide_default_value = true)]
    code: String,
    /// Each message that tells something as a line of JSON.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    connection: connection::Args,
}

pub(super) async fn watch(args: Args) -> Result<(), Failure> {
    let mut client = client(&args.connection).await?;
    let mut request = WatchOccurrencesRequest { error_code: args.code, ..Default::default() };
    let (mut lost, mut heard) = (0, false);
    loop {
        let end = match client.watch_occurrences(request.clone()).await {
            Err(status) => status,
            Ok(stream) => {
                let mut stream = stream.into_inner();
                loop {
                    match stream.message().await {
                        Ok(Some(message)) => {
                            (lost, heard) = (0, true);
                            request.cursor.clone_from(&message.cursor);
                            print(&message, args.json)?;
                        }
                        Ok(None) => break Status::unavailable("the stream ended"),
                        Err(status) => break status,
                    }
                }
            }
        };
        lost += 1;
        if !heard || lost > ATTEMPTS || !is_passing(&end) {
            return Err(end.into());
        }
        tokio::time::sleep(PAUSE).await;
    }
}

/// Whether another replica, or the same one in a moment, may go on.
pub(in crate::cli) fn is_passing(status: &Status) -> bool {
    // A connection that broke is Unknown to tonic.
    matches!(status.code(), Code::Unavailable | Code::Unknown | Code::Cancelled)
}

fn print(message: &WatchOccurrencesResponse, as_json: bool) -> Result<(), Failure> {
    if message.occurrences.is_empty() && message.skipped == 0 {
        return Ok(());
    }
    if as_json {
        writeln!(std::io::stdout(), "{}", json::json(message)?)?;
        return Ok(());
    }
    let mut out = anstream::stdout();
    for occurrence in &message.occurrences {
        writeln!(out, "{}", line(occurrence))?;
    }
    if message.skipped > 0 {
        writeln!(out, "{DIM}and {} more, too many to tell{DIM:#}", message.skipped)?;
    }
    Ok(())
}

fn line(occurrence: &Occurrence) -> String {
    let Occurrence { time, error_code, incident_id, method, message, actor, recovered, .. } =
        occurrence;
    let time = second(time.as_ref());
    let (code, id, method) = (plain(error_code), plain(incident_id), plain(&last_part(method)));
    let (message, actor) = (plain(message), plain(actor));
    let overcome = if *recovered { " (overcome)" } else { "" };
    format!("{time} {CODE}{code}{CODE:#} {id} {method} {DIM}{actor}{DIM:#} {message}{overcome}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_says_what_when_where_and_moves_no_cursor() {
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
        let line = anstream::adapter::strip_str(&line(&occurrence)).to_string();
        let expected = "2026-02-03 04:05:06 E5006 INC-20260203-0123ABCD GenerateCode key:key_1 away\u{fffd}[2J (overcome)";
        assert_eq!(line, expected);
    }
}
