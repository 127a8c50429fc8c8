//! `hapa usage`: calls and tokens by group, as a table, as JSON, or as CSV for a spreadsheet.

use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use hapa_proto::analytics::v1::analytics_service_client::AnalyticsServiceClient;
use hapa_proto::analytics::v1::get_usage_response::Row;
use hapa_proto::analytics::v1::{GetUsageRequest, GetUsageResponse};
use prost_types::Timestamp;

use crate::cli::connection::{Connection, ConnectionArgs};
use crate::cli::format::count;
use crate::cli::paging::MAX_PAGE_SIZE;
use crate::cli::table::table_with_columns;
use crate::cli::{CliError, json, time_args};

/// The last column is omitted from tables without reasoning.
const TOTAL_COLUMNS: [&str; 6] = [
    "requests",
    "errors",
    "prompt_tokens",
    "completion_tokens",
    "total_tokens",
    "reasoning_tokens",
];

#[derive(clap::Args, Clone, Debug)]
#[command(after_help = "Example:\n  hapa usage --group-by owner,model --since 7d --csv usage.csv")]
pub(super) struct UsageArgs {
    /// Grouping: key, user, owner, model and day, comma-separated.
    #[arg(
        long,
        value_name = "COLUMNS",
        value_delimiter = ',',
        default_value = "owner",
        value_parser = ["key", "user", "owner", "model", "day"],
        hide_possible_values = true
    )]
    group_by: Vec<String>,
    /// First day of the period (UTC): 2026-01-31T00:00:00Z, or a duration before the current time: 24h, 30d.
    #[arg(long, value_name = "TIME", default_value = "30d", value_parser = time_args::parse_time)]
    since: Timestamp,
    /// End of the period, exclusive: 2026-01-31T00:00:00Z, or a duration before the current time: 24h, 7d;
    /// default: the current time.
    #[arg(long, value_name = "TIME", value_parser = time_args::parse_time)]
    until: Option<Timestamp>,
    /// Only usage of this owner: a user id or any other name.
    #[arg(long, default_value = "", hide_default_value = true)]
    owner: String,
    /// Only usage with this key id.
    #[arg(long, value_name = "KEY_ID", default_value = "", hide_default_value = true)]
    key: String,
    /// Only usage of this model.
    #[arg(long, default_value = "", hide_default_value = true)]
    model: String,
    /// Write all rows to this file as CSV (RFC 4180); "-" is standard output.
    #[arg(long, value_name = "FILE")]
    csv: Option<PathBuf>,
    /// Print one JSON object per row.
    #[arg(long, conflicts_with = "csv")]
    json: bool,
    #[command(flatten)]
    connection: ConnectionArgs,
}

pub(super) async fn usage(args: UsageArgs) -> Result<(), CliError> {
    let client = AnalyticsServiceClient::new(args.connection.connect_as_operator().await?);
    let request = GetUsageRequest {
        start_time: Some(args.since),
        end_time: args.until,
        group_by: args.group_by.join(","),
        owner: args.owner,
        key_id: args.key,
        model: args.model,
        page_size: MAX_PAGE_SIZE,
        ..GetUsageRequest::default()
    };
    let groups = args.group_by;
    match args.csv {
        Some(file) if file.as_os_str() == "-" => {
            write_csv(client, request, &groups, &mut std::io::stdout().lock()).await
        }
        Some(file) => write_csv_file(client, request, &groups, &file).await,
        None if args.json => {
            for_each_reply(client, request, |reply| json::print_lines(&reply.rows)).await
        }
        None => print_table(client, request, &groups).await,
    }
}

/// Reads all pages; unlike a list, each reply also holds the total.
async fn for_each_reply(
    mut client: AnalyticsServiceClient<Connection>,
    mut request: GetUsageRequest,
    mut on_reply: impl FnMut(GetUsageResponse) -> Result<(), CliError>,
) -> Result<(), CliError> {
    loop {
        let reply = client.get_usage(request.clone()).await?.into_inner();
        request.page_token.clone_from(&reply.next_page_token);
        on_reply(reply)?;
        if request.page_token.is_empty() {
            return Ok(());
        }
    }
}

async fn print_table(
    client: AnalyticsServiceClient<Connection>,
    request: GetUsageRequest,
    groups: &[String],
) -> Result<(), CliError> {
    let (mut rows, mut total) = (Vec::new(), None);
    for_each_reply(client, request, |reply| {
        rows.extend(reply.rows);
        total = reply.total;
        Ok(())
    })
    .await?;
    let has_reasoning = total.as_ref().is_some_and(|total| total.reasoning_tokens > 0.0);
    let width = groups.len() + TOTAL_COLUMNS.len() - usize::from(!has_reasoning);
    let header = groups.iter().map(String::as_str).chain(TOTAL_COLUMNS).take(width);
    let header = header.map(|name| name.to_uppercase().replace('_', " "));
    let mut lines: Vec<Vec<String>> =
        rows.iter().map(|row| cells(row, groups, count).take(width).collect()).collect();
    if let Some(total) = total.filter(|_| rows.len() > 1) {
        let mut line: Vec<_> = cells(&total, groups, count).take(width).collect();
        line.iter_mut().take(groups.len()).for_each(String::clear);
        "all".clone_into(&mut line[0]);
        lines.push(line);
    }
    writeln!(std::io::stdout(), "{}", table_with_columns(header, lines))?;
    Ok(())
}

/// Writes a temporary file and renames it, so that the file is never incomplete.
async fn write_csv_file(
    client: AnalyticsServiceClient<Connection>,
    request: GetUsageRequest,
    groups: &[String],
    file: &Path,
) -> Result<(), CliError> {
    let context = || format!("cannot write {}", file.display());
    let mut temporary = file.as_os_str().to_owned();
    temporary.push(format!(".new-{}", std::process::id()));
    let new = std::fs::File::create(&temporary).with_context(context)?;
    let mut new = std::io::BufWriter::new(new);
    let written = write_csv(client, request, groups, &mut new).await;
    let written = written.and_then(|()| Ok(new.flush().with_context(context)?));
    if let Err(error) = written {
        let _ = std::fs::remove_file(&temporary); // the first error is the one to report
        return Err(error);
    }
    Ok(std::fs::rename(&temporary, file).with_context(context)?)
}

async fn write_csv(
    client: AnalyticsServiceClient<Connection>,
    request: GetUsageRequest,
    groups: &[String],
    out: &mut impl Write,
) -> Result<(), CliError> {
    let header: Vec<_> =
        groups.iter().map(String::as_str).chain(TOTAL_COLUMNS).map(str::to_owned).collect();
    write!(out, "{}", csv_record(header))?;
    for_each_reply(client, request, |reply| {
        for row in &reply.rows {
            write!(out, "{}", csv_record(cells(row, groups, |number| format!("{number:.0}"))))?;
        }
        Ok(())
    })
    .await?;
    Ok(out.flush()?)
}

/// The group columns and the totals of a row.
fn cells(
    row: &Row,
    groups: &[String],
    format_number: fn(f64) -> String,
) -> impl Iterator<Item = String> {
    let group = |name: &String| match name.as_str() {
        "key" => row.key_id.clone(),
        "user" => row.user_id.clone(),
        "owner" => row.owner.clone(),
        "model" => row.model.clone(),
        _ => row.day.clone(),
    };
    let Row { prompt_tokens, completion_tokens, total_tokens, reasoning_tokens, .. } = *row;
    let tokens = [prompt_tokens, completion_tokens, total_tokens, reasoning_tokens];
    let totals = [row.requests, row.errors].into_iter().chain(tokens);
    let groups: Vec<_> = groups.iter().map(group).collect();
    groups.into_iter().chain(totals.map(format_number))
}

/// A line of RFC 4180. Names are user input: an apostrophe keeps a spreadsheet from evaluating one as a formula.
fn csv_record(cells: impl IntoIterator<Item = String>) -> String {
    let quoted = cells.into_iter().map(|cell| {
        let is_formula = cell.starts_with(['=', '+', '-', '@', '\t', '\r']);
        let cell = if is_formula { format!("'{cell}") } else { cell };
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
    fn a_csv_record_quotes_any_name_and_disarms_formulas() {
        let line = csv_record(["a,b", "say \"hi\"", "=1+1", "two\nlines", "12"].map(str::to_owned));
        assert_eq!(line, "\"a,b\",\"say \"\"hi\"\"\",'=1+1,\"two\nlines\",12\r\n");
    }

    #[test]
    fn cells_follow_the_order_of_the_groups() {
        let row = Row {
            owner: "me".to_owned(),
            day: "2026-01-31".to_owned(),
            requests: 1_234.0,
            ..Row::default()
        };
        let groups = ["day".to_owned(), "owner".to_owned()];
        let line: Vec<_> = cells(&row, &groups, count).collect();
        assert_eq!(line, ["2026-01-31", "me", "1,234", "0", "0", "0", "0", "0"]);
    }
}
