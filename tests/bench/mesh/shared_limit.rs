//! A rate limit decision that replicas share, beside the bare round trip to the same Redis. They alternate one
//! at a time, so that nothing is pipelined.

use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use fred::clients::Client;
use fred::interfaces::ClientLike as _;
use fred::types::config::{Config, ConnectionConfig, TcpConfig};
use hapa_server::rate_limit::Limiter;
use hapa_test_harness::RedisServer;
use secrecy::SecretString;
use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::TcpStream;
use tokio::time::{sleep, timeout};

use crate::decisions::{METHOD, RATE, limiter};
use crate::gauge::ratio;
use crate::report::{Table, times, verdict};
use crate::samples::Samples;

const SUBJECT: &str = "key:key_bench";
const WAIT_TIMEOUT: Duration = Duration::from_secs(5);

pub(crate) async fn measure(rounds: usize) -> anyhow::Result<Table> {
    let title = format!("A limiter decision through Redis, one at a time, {rounds} rounds, in us");
    if !RedisServer::is_installed() {
        return Ok(Table::new(title, &["left out: redis-server is not installed"]));
    }
    let server = RedisServer::start().await;
    let limiter = limiter(Some(&SecretString::from(server.url())))?;
    let (library, mut socket) = (library(&server).await?, Socket::open(&server).await?);
    // Waits for its connection, and makes the script known.
    timeout(WAIT_TIMEOUT, async {
        while limiter.degraded().is_some() {
            sleep(Duration::from_millis(10)).await;
        }
    })
    .await?;
    decide(&limiter).await?;
    let mut samples = [Samples::default(), Samples::default(), Samples::default()];
    for round in 0..rounds + rounds / 10 {
        for turn in 0..samples.len() {
            let (at, from) = ((round + turn) % samples.len(), Instant::now());
            match at {
                0 => socket.ping().await?,
                1 => library.ping::<()>(None).await?,
                _ => decide(&limiter).await?,
            }
            // The first tenth warms up.
            if round >= rounds / 10 {
                samples[at].push(from.elapsed());
            }
        }
    }
    let counts = counted(&server, &limiter, rounds).await?;
    library.quit().await?;
    Ok(table(title, &samples, counts))
}

fn table(title: String, samples: &[Samples; 3], [scripts, reads]: [f64; 2]) -> Table {
    let head = ["", "median", "p99", "to the library's", "EVALSHA each", "reads each", "target"];
    let mut table = Table::new(title, &head);
    let yardstick = samples[1].median();
    let names = ["PING over a bare socket", "PING over the library", "a decision"];
    for (name, samples) in names.into_iter().zip(samples) {
        let (median, p99) = (samples.median(), samples.p99());
        let is_decision = name == "a decision";
        let only = |text: String| if is_decision { text } else { String::new() };
        table.row([
            name.to_owned(),
            format!("{:.0}", median * 1e3),
            format!("{:.0}", p99 * 1e3),
            times(median / yardstick),
            only(format!("{scripts:.2}")),
            only(format!("{reads:.2}")),
            only(verdict(scripts, "<=", 1.0, " command")),
        ]);
    }
    table
}

async fn decide(limiter: &Limiter) -> anyhow::Result<()> {
    let decision = limiter.decide(SUBJECT, METHOD, RATE).await.context("no limit")?;
    ensure!(decision.retry_after.is_none(), "the limit was reached");
    Ok(())
}

/// For each decision, the scripts that Redis ran, and its reads from sockets: the number of requests
/// that it received. The reads include those of the two connections that reset and read the counters.
async fn counted(server: &RedisServer, limiter: &Limiter, n: usize) -> anyhow::Result<[f64; 2]> {
    server.ask(&["CONFIG", "RESETSTAT"]).await;
    for _ in 0..n {
        decide(limiter).await?;
    }
    ensure!(limiter.degraded().is_none(), "Redis did not decide");
    let info = server.ask(&["INFO", "all"]).await.concat();
    let count = |name: &str| {
        let (_, rest) = info.split_once(name).with_context(|| format!("no {name} in INFO"))?;
        let digits = rest.find(|c: char| !c.is_ascii_digit()).map_or(rest, |end| &rest[..end]);
        anyhow::Ok(ratio(digits.parse()?, n as u64))
    };
    Ok([count("cmdstat_evalsha:calls=")?, count("total_reads_processed:")?])
}

/// The library that the limiter uses, with a connection like its own.
async fn library(server: &RedisServer) -> anyhow::Result<Client> {
    let tcp = TcpConfig { nodelay: Some(true), ..TcpConfig::default() };
    let connection = ConnectionConfig { tcp, ..ConnectionConfig::default() };
    let client = Client::new(Config::from_url(&server.url())?, None, Some(connection), None);
    client.init().await?;
    Ok(client)
}

/// A bare socket: the minimum cost of a round trip.
struct Socket(BufReader<TcpStream>);

impl Socket {
    async fn open(server: &RedisServer) -> anyhow::Result<Self> {
        let url = server.url();
        let parts = url.strip_prefix("redis://:").and_then(|rest| rest.split_once('@'));
        let (password, address) = parts.context("an unexpected URL")?;
        let stream = TcpStream::connect(address).await?;
        stream.set_nodelay(true)?;
        let mut socket = Socket(BufReader::new(stream));
        let length = password.len();
        socket.ask(&format!("*2\r\n$4\r\nAUTH\r\n${length}\r\n{password}\r\n"), "+OK").await?;
        Ok(socket)
    }

    async fn ping(&mut self) -> anyhow::Result<()> {
        self.ask("*1\r\n$4\r\nPING\r\n", "+PONG").await
    }

    async fn ask(&mut self, words: &str, expected: &str) -> anyhow::Result<()> {
        self.0.write_all(words.as_bytes()).await?;
        let mut line = String::new();
        self.0.read_line(&mut line).await?;
        ensure!(line.trim_end() == expected, "Redis said {line}");
        Ok(())
    }
}
