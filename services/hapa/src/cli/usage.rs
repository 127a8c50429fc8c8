//! `hapa usage`: who used how much, as a table, as JSON, or as CSV for a spreadsheet.

use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use hapa_proto::analytics::v1::analytics_service_client::AnalyticsServiceClient;
use hapa_proto::analytics::v1::get_usage_response::Row;
use hapa_proto::analytics::v1::{GetUsageRequest, GetUsageResponse};
use prost_types::Timestamp;

use crate::cli::connection::{self, Connection};
use crate::cli::number::count;
use crate::cli::table::table_of;
use crate::cli::{Failure, json, moment};

const LARGEST_PAGE: i32 = 1_000;
const SUMS: [&str; 5] =
    ["requests", "errors", "prompt_tokens", "completion_tokens", "total_tokens"];

#[derive(clap::Args, Clone, Debug)]
#[group(id = "usage_args")]
pub(super) struct Args {
    /// By what to group: key, user, owner, model and day, comma-separated.
    #[arg(
        long,
        value_name = "WHAT",
        value_delimiter = ',',
        default_value = "owner",
        value_parser = ["key", "user", "owner", "model", "day"],
        hide_possible_values = true
    )]
    group_by: Vec<String>,
    /// From this day on (UTC): 2026-01-31T00:00:00Z, or so long ago: 24h, 30d.
    #[arg(long, value_name = "TIME", default_value = "30d", value_parser = moment::moment)]
    since: Timestamp,
    /// Until before this time: 2026-01-31T00:00:00Z, or so long ago: 24h, 7d; default: now.
    #[arg(long, value_name = "TIME", value_parser = moment::moment)]
    until: Option<Timestamp>,
    /// Only what this owner used: a user's id, or any other name.
    #[arg(long, default_value = "", hide_default_value = true)]
    owner: String,
    /// Only what was used with this key: its id.
    #[arg(long, value_name = "KEY_ID", default_value = "", hide_default_value = true)]
    key: String,
    /// Only what this model answered.
    #[arg(long, default_value = "", hide_default_value = true)]
    model: String,
    /// Write all rows to this file as CSV; "-" is standard output.
    #[arg(long, value_name = "FILE")]
    csv: Option<PathBuf>,
    /// Each row as a line of JSON.
    #[arg(long, conflicts_with = "csv")]
    json: bool,
    #[command(flatten)]
    connection: connection::Args,
}

pub(super) async fn usage(args: Args) -> Result<(), Failure> {
    let client = AnalyticsServiceClient::new(args.connection.as_operator().await?);
    let request = GetUsageRequest {
        start_time: Some(args.since),
        end_time: args.until,
        group_by: args.group_by.join(","),
        owner: args.owner,
        key_id: args.key,
        model: args.model,
        page_size: LARGEST_PAGE,
        ..GetUsageRequest::default()
    };
    let groups = args.group_by;
    match args.csv {
        Some(file) if file.as_os_str() == "-" => {
            csv(client, request, &groups, &mut std::io::stdout().lock()).await
        }
        Some(file) => csv_file(client, request, &groups, &file).await,
        None if args.json => {
            let print = |page: GetUsageResponse| {
                for row in &page.rows {
                    writeln!(std::io::stdout(), "{}", json::json(row)?)?;
                }
                Ok(())
            };
            pages(client, request, print).await
        }
        None => print(client, request, &groups).await,
    }
}

async fn pages(
    mut client: AnalyticsServiceClient<Connection>,
    mut request: GetUsageRequest,
    mut page: impl FnMut(GetUsageResponse) -> Result<(), Failure>,
) -> Result<(), Failure> {
    loop {
        let reply = client.get_usage(request.clone()).await?.into_inner();
        request.page_token.clone_from(&reply.next_page_token);
        page(reply)?;
        if request.page_token.is_empty() {
            return Ok(());
        }
    }
}

async fn print(
    client: AnalyticsServiceClient<Connection>,
    request: GetUsageRequest,
    groups: &[String],
) -> Result<(), Failure> {
    let (mut rows, mut total) = (Vec::new(), None);
    pages(client, request, |page| {
        rows.extend(page.rows);
        total = page.total;
        Ok(())
    })
    .await?;
    let header = groups.iter().map(String::as_str).chain(SUMS);
    let header = header.map(|name| name.to_uppercase().replace('_', " "));
    let mut lines: Vec<Vec<String>> =
        rows.iter().map(|row| cells(row, groups, count).collect()).collect();
    if let Some(total) = total.filter(|_| rows.len() > 1) {
        let mut line: Vec<_> = cells(&total, groups, count).collect();
        line.iter_mut().take(groups.len()).for_each(String::clear);
        "all".clone_into(&mut line[0]);
        lines.push(line);
    }
    writeln!(std::io::stdout(), "{}", table_of(header, lines))?;
    Ok(())
}

/// Written aside and moved into place: a file that is there is whole.
async fn csv_file(
    client: AnalyticsServiceClient<Connection>,
    request: GetUsageRequest,
    groups: &[String],
    file: &Path,
) -> Result<(), Failure> {
    let words = || format!("writing {}", file.display());
    let mut aside = file.as_os_str().to_owned();
    aside.push(format!(".new-{}", std::process::id()));
    let mut new = std::io::BufWriter::new(std::fs::File::create(&aside).with_context(words)?);
    let written = csv(client, request, groups, &mut new).await;
    let written = written.and_then(|()| Ok(new.flush().with_context(words)?));
    if let Err(failure) = written {
        let _ = std::fs::remove_file(&aside); // the failure is what counts
        return Err(failure);
    }
    Ok(std::fs::rename(&aside, file).with_context(words)?)
}

async fn csv(
    client: AnalyticsServiceClient<Connection>,
    request: GetUsageRequest,
    groups: &[String],
    out: &mut impl Write,
) -> Result<(), Failure> {
    let header: Vec<_> = groups.iter().map(String::as_str).chain(SUMS).map(str::to_owned).collect();
    write!(out, "{}", record(header))?;
    pages(client, request, |page| {
        for row in &page.rows {
            write!(out, "{}", record(cells(row, groups, |number| format!("{number:.0}"))))?;
        }
        Ok(())
    })
    .await?;
    Ok(out.flush()?)
}

fn cells(row: &Row, groups: &[String], number: fn(f64) -> String) -> impl Iterator<Item = String> {
    let group = |name: &String| match name.as_str() {
        "key" => row.key_id.clone(),
        "user" => row.user_id.clone(),
        "owner" => row.owner.clone(),
        "model" => row.model.clone(),
        _ => row.day.clone(),
    };
    let Row { requests, errors, prompt_tokens, completion_tokens, total_tokens, .. } = *row;
    let sums = [requests, errors, prompt_tokens, completion_tokens, total_tokens];
    let groups: Vec<_> = groups.iter().map(group).collect();
    groups.into_iter().chain(sums.into_iter().map(number))
}

/// A line of RFC 4180. Names come from people: one that a spreadsheet would calculate is a text.
fn record(cells: impl IntoIterator<Item = String>) -> String {
    let quoted = cells.into_iter().map(|cell| {
        let formula = cell.starts_with(['=', '+', '-', '@', '\t', '\r']);
        let cell = if formula { format!("'{cell}") } else { cell };
        if cell.contains(['"', ',', '\n', '\r']) {
            format!("\"{}\"", cell.replace('"', "\"\""))
        } else {
            cell
        }
    });
    quoted.collect::<Vec<_>>().join(",") + "\r\n"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_holds_any_name_and_starts_no_formula() {
        let line = record(["a,b", "say \"hi\"", "=1+1", "two\nlines", "12"].map(str::to_owned));
        assert_eq!(line, "\"a,b\",\"say \"\"hi\"\"\",'=1+1,\"two\nlines\",12\r\n");
    }

    #[test]
    fn cells_stand_under_their_groups() {
        let row = Row {
            owner: "me".to_owned(),
            day: "2026-01-31".to_owned(),
            requests: 1_234.0,
            ..Row::default()
        };
        let groups = ["day".to_owned(), "owner".to_owned()];
        let line: Vec<_> = cells(&row, &groups, count).collect();
        assert_eq!(line, ["2026-01-31", "me", "1,234", "0", "0", "0", "0"]);
    }
}
