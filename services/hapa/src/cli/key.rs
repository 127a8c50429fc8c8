//! `hapa key`: tables for people, `--json` for programs.

use std::fs::OpenOptions;
use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use comfy_table::{Table, presets};
use hapa_chassis::rpc::SCOPES;
use hapa_proto::auth::v1::create_key_request::Expiry;
use hapa_proto::auth::v1::key_service_client::KeyServiceClient;
use hapa_proto::auth::v1::{CreateKeyRequest, Key, ListKeysRequest, RateLimit, RevokeKeyRequest};
use hapa_proto::codegen::v1::GetCodeHealthRequest;
use hapa_proto::codegen::v1::codegen_service_client::CodegenServiceClient;

use crate::cli::{Failure, connection, json};

#[derive(Clone, Debug, clap::Subcommand)]
pub(super) enum Command {
    /// Make a key and show its text, once.
    Create(Create),
    /// List keys, newest first.
    List(List),
    /// End a key for good.
    Revoke(Revoke),
    /// Say whether the key in a file works.
    Check(Check),
}

#[derive(clap::Args, Clone, Debug)]
#[expect(clippy::struct_excessive_bools, reason = "they are flags")]
pub(super) struct Create {
    /// What the key is for.
    #[arg(long)]
    name: String,
    /// Whose key it is.
    #[arg(long)]
    owner: String,
    /// What it may do, such as codegen:generate; can be repeated.
    #[arg(long = "scope", required_unless_present = "all_scopes")]
    scopes: Vec<String>,
    /// It may do everything.
    #[arg(long, conflicts_with = "scopes")]
    all_scopes: bool,
    /// Days until it ends; default: API_KEY_EXPIRY_DAYS of the auth service.
    #[arg(long, conflicts_with = "never_expires")]
    ttl_days: Option<u32>,
    /// It ends only when it is revoked.
    #[arg(long)]
    never_expires: bool,
    /// A limit, such as GenerateCode=50/60 (calls / seconds) or *=0 (none); can be repeated.
    #[arg(long = "limit", value_parser = limit)]
    limits: Vec<RateLimit>,
    /// No limits at all.
    #[arg(long, conflicts_with = "limits")]
    unlimited: bool,
    /// A model that it may use; can be repeated; default: all.
    #[arg(long = "model")]
    models: Vec<String>,
    /// Write the text to this file, readable by its owner alone, in place of showing it.
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
    /// The reply as JSON.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    connection: connection::Args,
}

#[derive(clap::Args, Clone, Debug)]
pub(super) struct List {
    /// Only keys of this owner.
    #[arg(long, default_value = "")]
    owner: String,
    /// Each key as a line of JSON.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    connection: connection::Args,
}

#[derive(clap::Args, Clone, Debug)]
pub(super) struct Revoke {
    /// The key's id, as `hapa key list` shows it.
    key_id: String,
    #[command(flatten)]
    connection: connection::Args,
}

#[derive(clap::Args, Clone, Debug)]
pub(super) struct Check {
    /// The file that holds the key's text.
    #[arg(long, value_name = "FILE", default_value = "data/dev-key")]
    file: PathBuf,
    #[command(flatten)]
    connection: connection::Args,
}

pub(super) async fn execute(command: Command) -> Result<(), Failure> {
    match command {
        Command::Create(args) => create(args).await,
        Command::List(args) => list(args).await,
        Command::Revoke(args) => revoke(args).await,
        Command::Check(args) => check(args).await,
    }
}

async fn create(args: Create) -> Result<(), Failure> {
    let all = || SCOPES.iter().map(|scope| (*scope).to_owned()).collect();
    let unlimited = RateLimit { method: "*".to_owned(), limit: 0, window_seconds: 0 };
    let request = CreateKeyRequest {
        name: args.name,
        owner: args.owner,
        scopes: if args.all_scopes { all() } else { args.scopes },
        expiry: match (args.never_expires, args.ttl_days) {
            (true, _) => Some(Expiry::NeverExpires(true)),
            (false, days) => days.map(Expiry::TtlDays),
        },
        rate_limits: if args.unlimited { vec![unlimited] } else { args.limits },
        allowed_models: args.models,
    };
    let mut client = KeyServiceClient::new(args.connection.as_operator().await?);
    let mut reply = client.create_key(request).await?.into_inner();
    let mut out = std::io::stdout();
    if let Some(file) = &args.out {
        write_private(file, &reply.key_text)?;
        reply.key_text.clear();
    }
    if args.json {
        writeln!(out, "{}", json::json(&reply)?)?;
        return Ok(());
    }
    if let Some(key) = &reply.key {
        writeln!(anstream::stderr(), "{}", table(std::slice::from_ref(key)))?;
    }
    if let Some(file) = &args.out {
        writeln!(anstream::stderr(), "The key's text is in {}.", file.display())?;
    } else {
        writeln!(anstream::stderr(), "The key's text, shown this once:")?;
        writeln!(out, "{}", reply.key_text)?;
    }
    Ok(())
}

async fn list(args: List) -> Result<(), Failure> {
    let mut client = KeyServiceClient::new(args.connection.as_operator().await?);
    let mut request =
        ListKeysRequest { page_size: 1_000, owner: args.owner, ..ListKeysRequest::default() };
    let mut keys = Vec::new();
    loop {
        let page = client.list_keys(request.clone()).await?.into_inner();
        if args.json {
            for key in &page.keys {
                writeln!(std::io::stdout(), "{}", json::json(key)?)?;
            }
        } else {
            keys.extend(page.keys);
        }
        if page.next_page_token.is_empty() {
            break;
        }
        request.page_token = page.next_page_token;
    }
    if !args.json {
        writeln!(std::io::stdout(), "{}", table(&keys))?;
    }
    Ok(())
}

async fn revoke(args: Revoke) -> Result<(), Failure> {
    let mut client = KeyServiceClient::new(args.connection.as_operator().await?);
    let reply = client.revoke_key(RevokeKeyRequest { key_id: args.key_id }).await?.into_inner();
    writeln!(std::io::stdout(), "{}", table(&Vec::from_iter(reply.key)))?;
    Ok(())
}

async fn check(args: Check) -> Result<(), Failure> {
    let mut client = CodegenServiceClient::new(args.connection.as_holder(&args.file).await?);
    client.get_code_health(GetCodeHealthRequest {}).await?;
    writeln!(std::io::stdout(), "the key in {} works", args.file.display())?;
    Ok(())
}

fn table(keys: &[Key]) -> Table {
    let mut table = Table::new();
    table.load_preset(presets::NOTHING);
    table.set_header(["KEY ID", "NAME", "OWNER", "SCOPES", "CREATED", "EXPIRES", "REVOKED"]);
    let time = |time: &Option<prost_types::Timestamp>| match time {
        Some(time) => time.to_string().replace('T', " ").chars().take(16).collect(),
        None => "never".to_owned(),
    };
    table.add_rows(keys.iter().map(|key| {
        [
            key.key_id.clone(),
            key.name.clone(),
            key.owner.clone(),
            key.scopes.join(" "),
            time(&key.create_time),
            time(&key.expire_time),
            time(&key.revoke_time),
        ]
    }));
    table
}

fn limit(text: &str) -> Result<RateLimit, String> {
    let parse = || {
        let (method, rate) = text.split_once('=')?;
        let (limit, window) = rate.split_once('/').unwrap_or((rate, "0"));
        let (limit, window_seconds) = (limit.parse().ok()?, window.parse().ok()?);
        Some(RateLimit { method: method.to_owned(), limit, window_seconds })
    };
    parse().ok_or_else(|| "is not like GenerateCode=50/60".to_owned())
}

/// Written aside and moved into place: the file is never readable by others, and never half.
fn write_private(file: &Path, text: &str) -> anyhow::Result<()> {
    let words = || format!("writing {}", file.display());
    if let Some(folder) = file.parent().filter(|folder| !folder.as_os_str().is_empty()) {
        std::fs::create_dir_all(folder).with_context(words)?;
    }
    let aside = file.with_extension(format!("new-{}", std::process::id()));
    let new = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&aside);
    let mut new = new.with_context(words)?;
    writeln!(new, "{text}").with_context(words)?;
    new.sync_all().with_context(words)?;
    std::fs::rename(&aside, file).with_context(words)
}
