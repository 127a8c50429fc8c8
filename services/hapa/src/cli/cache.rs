//! `hapa cache …`: what is remembered so that it need not be generated or asked again.

use std::io::{IsTerminal as _, Write as _};

use anyhow::anyhow;
use hapa_proto::codegen::v1::cache_service_client::CacheServiceClient;
use hapa_proto::codegen::v1::clear_cache_response::Cleared;
use hapa_proto::codegen::v1::{CacheStats, ClearCacheRequest, GetCacheStatsRequest};

use super::number::{count, percent};
use super::table::table;
use super::{Failure, connection, json};

#[derive(Clone, Debug, clap::Subcommand)]
pub(super) enum Command {
    /// Show how full the caches are, and how often they helped the replica that answers.
    Stats(Stats),
    /// Empty a cache: what was in it is generated or asked anew.
    ///
    /// Asks first on a terminal; from a pipe or a script it needs --yes.
    Clear(Clear),
}

#[derive(clap::Args, Clone, Debug)]
#[group(id = "cache_stats_args")]
pub(super) struct Stats {
    /// Each cache as a line of JSON.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    connection: connection::Args,
}

#[derive(clap::Args, Clone, Debug)]
#[group(id = "cache_clear_args")]
pub(super) struct Clear {
    /// Which: answers, what is known of callers and their profiles, or both.
    #[arg(long = "type", value_parser = ["code_generation", "user_profiles", "all"])]
    cache_type: String,
    /// Without asking.
    #[arg(long)]
    yes: bool,
    /// Each cache that was emptied, as a line of JSON.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    connection: connection::Args,
}

pub(super) async fn execute(command: Command) -> Result<(), Failure> {
    match command {
        Command::Stats(args) => stats(args).await,
        Command::Clear(args) => clear(args).await,
    }
}

async fn stats(args: Stats) -> Result<(), Failure> {
    let mut client = CacheServiceClient::new(args.connection.as_operator().await?);
    let caches = client.get_cache_stats(GetCacheStatsRequest {}).await?.into_inner().caches;
    let mut out = std::io::stdout();
    if args.json {
        for cache in &caches {
            writeln!(out, "{}", json::json(cache)?)?;
        }
        return Ok(());
    }
    let header = [
        "CACHE", "WHERE", "ENTRIES", "OF", "BYTES", "HITS", "MISSES", "HIT RATE", "EVICTED", "TTL",
    ];
    writeln!(out, "{}", table(header, caches.into_iter().map(row)))?;
    Ok(())
}

fn row(cache: CacheStats) -> [String; 10] {
    let known = |number: Option<f64>| number.map_or_else(|| "?".to_owned(), count);
    [
        cache.cache_type,
        cache.backend,
        known(cache.entries.map(f64::from)),
        count(cache.capacity.into()),
        known(cache.bytes),
        count(cache.hits),
        count(cache.misses),
        percent(cache.hit_rate),
        count(cache.evictions),
        format!("{} s", cache.ttl_seconds),
    ]
}

async fn clear(args: Clear) -> Result<(), Failure> {
    if !args.yes && !std::io::stdin().is_terminal() {
        let words = "standard input is no terminal, so nobody can be asked: pass --yes";
        return Err(anyhow!(words).into());
    }
    if !args.yes && !agreed(&args.cache_type)? {
        return Err(anyhow!("nothing was cleared").into());
    }
    let mut client = CacheServiceClient::new(args.connection.as_operator().await?);
    let request = ClearCacheRequest { cache_type: args.cache_type, confirm: true };
    let cleared = client.clear_cache(request).await?.into_inner().cleared;
    let mut out = std::io::stdout();
    if args.json {
        for cache in &cleared {
            writeln!(out, "{}", json::json(cache)?)?;
        }
        return Ok(());
    }
    let row = |Cleared { cache_type, entries, scope }| {
        [cache_type, entries.to_string(), format!("this {scope}")]
    };
    writeln!(out, "{}", table(["CLEARED", "ENTRIES", "ON"], cleared.into_iter().map(row)))?;
    Ok(())
}

fn agreed(cache_type: &str) -> Result<bool, Failure> {
    let mut notes = anstream::stderr();
    let what = if cache_type == "all" { "every cache" } else { cache_type };
    write!(notes, "Clear {what}? What was in it has to be made anew. [y/N] ")?;
    notes.flush()?;
    let mut answer = String::new();
    std::io::stdin().read_line(&mut answer)?;
    Ok(matches!(answer.trim().to_lowercase().as_str(), "y" | "yes"))
}
