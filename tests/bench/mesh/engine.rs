//! The engine simulator in a separate process, so that its work does not count as the load generator's. It is
//! this binary again, controlled by standard input.

use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context as _, bail};
use hapa_engine_sim::{Fault, Script};
use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader, Lines};
use tokio::process::{Child, ChildStdin, ChildStdout};
use tokio::time::timeout;

use crate::stage::tied;

/// The argument that makes this binary the engine.
pub(crate) const ROLE: &str = "--as-engine";
/// What every token begins with and nothing else holds.
pub(crate) const MARK: &[u8] = b"twelve";
pub(crate) const TOKEN_BYTES: usize = 12;
/// As many as the mesh lets a caller ask for.
pub(crate) const MAX_TOKENS: usize = 4096;
const WAIT_TIMEOUT: Duration = Duration::from_secs(15);

/// What to play.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Play {
    pub(crate) tokens: usize,
    pub(crate) gap: Duration,
    /// Tokens after which it stops sending, without ending the stream.
    pub(crate) silence: Option<usize>,
}

impl Play {
    /// Goes on for as long as a stream may.
    pub(crate) fn endless(gap: Duration) -> Self {
        Play { tokens: MAX_TOKENS, gap, silence: None }
    }

    fn words(self) -> String {
        let silence = self.silence.map_or_else(|| "-".to_owned(), |tokens| tokens.to_string());
        format!("play {} {} {silence}", self.tokens, self.gap.as_micros())
    }

    fn read(words: &[&str]) -> Option<Script> {
        let [tokens, gap, silence] = words else { return None };
        let text = |n: usize| if n % 10 == 9 { "twelve byte\n" } else { "twelve bytes" };
        let script = Script::tokens((0..tokens.parse().ok()?).map(text))
            .gap(Duration::from_micros(gap.parse().ok()?));
        Some(match *silence {
            "-" => script,
            after => script.fault(Fault::StallAfter(after.parse().ok()?)),
        })
    }
}

/// The other process.
pub(crate) struct Engine {
    /// Dropping it ends the process.
    _child: Child,
    orders: ChildStdin,
    replies: Lines<BufReader<ChildStdout>>,
    pub(crate) port: u16,
}

impl Engine {
    pub(crate) async fn start() -> anyhow::Result<Self> {
        let mut child = tied(&std::env::current_exe()?)
            .arg(ROLE)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let orders = child.stdin.take().context("the engine's input")?;
        let replies = child.stdout.take().context("the engine's output")?;
        let mut engine =
            Engine { _child: child, orders, replies: BufReader::new(replies).lines(), port: 0 };
        engine.port = engine.reply().await?.parse()?;
        Ok(engine)
    }

    /// Answers every request from now on this way.
    pub(crate) async fn play(&mut self, play: Play) -> anyhow::Result<()> {
        self.order(&play.words()).await.map(drop)
    }

    /// Waits until it has no active generation.
    pub(crate) async fn idle(&mut self) -> anyhow::Result<()> {
        self.order("idle").await.map(drop)
    }

    async fn order(&mut self, words: &str) -> anyhow::Result<String> {
        self.orders.write_all(format!("{words}\n").as_bytes()).await?;
        self.reply().await.with_context(|| format!("the engine was told: {words}"))
    }

    async fn reply(&mut self) -> anyhow::Result<String> {
        let line = timeout(WAIT_TIMEOUT, self.replies.next_line()).await??;
        line.context("the engine ended")
    }
}

/// Runs the engine process, which ends with its standard input.
pub(crate) async fn serve() -> anyhow::Result<()> {
    let engine = hapa_engine_sim::Engine::start();
    let mut out = tokio::io::stdout();
    out.write_all(format!("{}\n", engine.address().port()).as_bytes()).await?;
    out.flush().await?;
    let mut orders = BufReader::new(tokio::io::stdin()).lines();
    while let Some(order) = orders.next_line().await? {
        let reply = obey(&engine, &order).await?;
        out.write_all(format!("{reply}\n").as_bytes()).await?;
        out.flush().await?;
    }
    Ok(())
}

async fn obey(engine: &hapa_engine_sim::Engine, order: &str) -> anyhow::Result<String> {
    let words: Vec<_> = order.split(' ').collect();
    Ok(match words.as_slice() {
        ["play", words @ ..] => {
            engine.script(Play::read(words).context("a play that can't be read")?);
            String::new()
        }
        ["idle"] => {
            engine.wait_until(|counts| counts.in_flight() == 0).await;
            String::new()
        }
        _ => bail!("an order that can't be read: {order}"),
    })
}
