//! `hapa-engine-sim`: the demo engine, for trying HAPA without a model and without a GPU.

use std::io::Write as _;
use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use anyhow::Context as _;
use clap::Parser;
use hapa_engine_sim::{Engine, Setup, demo};
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};

/// A deterministic demo engine with the HTTP interface of vLLM.
///
/// It lists models, and streams canned answers that depend on the question. It ends on SIGTERM and Ctrl-C.
#[derive(Debug, Parser)]
#[command(name = "hapa-engine-sim", version)]
struct Args {
    /// Address to listen on.
    #[arg(long, default_value = "127.0.0.1:8002")]
    listen: SocketAddr,
    /// Port on 127.0.0.1; short for --listen 127.0.0.1:PORT.
    #[arg(long, conflicts_with = "listen")]
    port: Option<u16>,
    /// Tokens per second of a stream; 0 sends an answer without delays.
    #[arg(long, default_value_t = 50, value_parser = clap::value_parser!(u32).range(..=1_000_000))]
    tokens_per_second: u32,
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    let address = args.port.map_or(args.listen, |port| (Ipv4Addr::LOCALHOST, port).into());
    let mut terminate = signal(SignalKind::terminate())?;
    let listener = TcpListener::bind(address).await;
    let listener = listener.with_context(|| format!("cannot listen on {address}"))?;
    let token_gap = Duration::from_secs(1).checked_div(args.tokens_per_second).unwrap_or_default();
    let engine = Engine::start_on(listener, Setup::default());
    engine.respond_with(move |body| demo::answer(body, token_gap));
    writeln!(std::io::stdout(), "listening on {}", engine.url())?;
    tokio::select! {
        _ = terminate.recv() => {}
        interrupted = tokio::signal::ctrl_c() => interrupted?,
    }
    drop(engine);
    Ok(())
}
