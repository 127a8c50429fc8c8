//! `hapa cache`: statistics of the caches, and clearing them.

use std::io::Write as _;

use anyhow::anyhow;
use hapa_proto::codegen::v1::cache_service_client::CacheServiceClient;
use hapa_proto::codegen::v1::clear_cache_response::Cleared;
use hapa_proto::codegen::v1::{CacheStats, ClearCacheRequest, GetCacheStatsRequest};

use crate::cli::connection::ConnectionArgs;
use crate::cli::format::{count, percent};
use crate::cli::table::table;
use crate::cli::{CliError, confirm, json};

#[derive(Clone, Debug, clap::Subcommand)]
pub(super) enum CacheCommand {
    /// Show the size and the hit rate of each cache, of the replica that answers.
    Stats(CacheStatsArgs),
    /// Clear a cache; its content is generated or queried again on demand.
    ///
    /// Asks for confirmation on a terminal; scripts must pass --yes.
    Clear(ClearCacheArgs),
}

#[derive(clap::Args, Clone, Debug)]
pub(super) struct CacheStatsArgs {
    /// Print one JSON object per cache.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    connection: ConnectionArgs,
}

#[derive(clap::Args, Clone, Debug)]
#[command(after_help = "Example:\n  hapa cache clear --type code_generation --yes")]
pub(super) struct ClearCacheArgs {
    /// Cache to clear: generated answers, or callers with their profiles, or both.
    #[arg(long = "type", value_parser = ["code_generation", "user_profiles", "all"])]
    cache_type: String,
    /// Clear without confirmation.
    #[arg(long)]
    yes: bool,
    /// Print one JSON object per cleared cache.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    connection: ConnectionArgs,
}

pub(super) async fn execute(command: CacheCommand) -> Result<(), CliError> {
    match command {
        CacheCommand::Stats(args) => stats(args).await,
        CacheCommand::Clear(args) => clear(args).await,
    }
}

async fn stats(args: CacheStatsArgs) -> Result<(), CliError> {
    let mut client = CacheServiceClient::new(args.connection.connect_as_operator().await?);
    let caches = client.get_cache_stats(GetCacheStatsRequest {}).await?.into_inner().caches;
    if args.json {
        return json::print_lines(&caches);
    }
    let header = [
        "CACHE", "BACKEND", "ENTRIES", "CAPACITY", "BYTES", "HITS", "MISSES", "HIT RATE",
        "EVICTED", "TTL",
    ];
    writeln!(std::io::stdout(), "{}", table(header, caches.into_iter().map(row)))?;
    Ok(())
}

fn row(cache: CacheStats) -> [String; 10] {
    let or_unknown = |number: Option<f64>| number.map_or_else(|| "?".to_owned(), count);
    [
        cache.cache_type,
        cache.backend,
        or_unknown(cache.entries.map(f64::from)),
        count(cache.capacity.into()),
        or_unknown(cache.bytes),
        count(cache.hits),
        count(cache.misses),
        percent(cache.hit_rate),
        count(cache.evictions),
        format!("{} s", cache.ttl_seconds),
    ]
}

async fn clear(args: ClearCacheArgs) -> Result<(), CliError> {
    confirm::require_terminal_or_yes(args.yes)?;
    let what = if args.cache_type == "all" { "every cache" } else { &args.cache_type };
    let question = format!("Clear {what}? Its content must be generated or queried again.");
    if !args.yes && !confirm::ask(&question)? {
        return Err(anyhow!("cancelled; nothing was cleared").into());
    }
    let mut client = CacheServiceClient::new(args.connection.connect_as_operator().await?);
    let request = ClearCacheRequest { cache_type: args.cache_type, confirm: true };
    let cleared = client.clear_cache(request).await?.into_inner().cleared;
    if args.json {
        return json::print_lines(&cleared);
    }
    let row = |Cleared { cache_type, entries, scope }| {
        [cache_type, entries.to_string(), format!("this {scope}")]
    };
    let header = ["CLEARED", "ENTRIES", "SCOPE"];
    writeln!(std::io::stdout(), "{}", table(header, cleared.into_iter().map(row)))?;
    Ok(())
}
