//! A private Redis: Debian's, on its own port, without persistence. Dropping it stops it.

use std::net::TcpListener;
use std::path::Path;
use std::process::Stdio;

use tempfile::TempDir;
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::TcpStream;
use tokio::process::{Child, Command};
use tokio::time::sleep;

use crate::tools::{POLL_INTERVAL, freeze, thaw, within};

const PROGRAM: &str = "/usr/bin/redis-server";

/// A private Redis server.
#[derive(Debug)]
pub struct RedisServer {
    port: u16,
    /// Distinguishes this server from another that took the port first.
    password: String,
    process: Child,
    folder: TempDir,
}

impl RedisServer {
    /// Whether Redis is installed.
    pub fn is_installed() -> bool {
        Path::new(PROGRAM).exists()
    }

    /// Starts a server, and waits until it answers.
    pub async fn start() -> RedisServer {
        let folder = tempfile::tempdir().expect("a folder for the test");
        let password =
            folder.path().file_name().expect("a name").to_string_lossy().replace('.', "x");
        within("a Redis", async {
            loop {
                let free = TcpListener::bind("127.0.0.1:0").expect("a free port");
                let port = free.local_addr().expect("a bound port").port();
                drop(free);
                let mut process = spawn(port, &password, &folder);
                if answers(port, &password, &mut process).await {
                    return RedisServer { port, password, process, folder };
                }
            }
        })
        .await
    }

    /// The value for REDIS_URL.
    pub fn url(&self) -> String {
        format!("redis://:{}@127.0.0.1:{}", self.password, self.port)
    }

    /// Freezes it; its connections stay open.
    pub async fn freeze(&self) {
        freeze(&self.process).await;
    }

    /// Continues after [`RedisServer::freeze`].
    pub async fn thaw(&self) {
        thaw(&self.process).await;
    }

    /// Kills it.
    pub async fn kill(&mut self) {
        self.process.kill().await.expect("it ran");
    }

    /// Starts it again on the same port, without data.
    pub async fn start_again(&mut self) {
        within("Redis to start again", async {
            loop {
                self.process = spawn(self.port, &self.password, &self.folder);
                if answers(self.port, &self.password, &mut self.process).await {
                    return;
                }
                sleep(POLL_INTERVAL).await;
            }
        })
        .await;
    }

    /// The reply to a command: its values as texts, with those of lists one after the other.
    pub async fn ask(&self, words: &[&str]) -> Vec<String> {
        let reply = within("Redis", ask(self.port, &self.password, words)).await;
        reply.unwrap_or_else(|error| panic!("{words:?}: {error}"))
    }
}

fn spawn(port: u16, password: &str, folder: &TempDir) -> Child {
    Command::new(PROGRAM)
        .args(["--bind", "127.0.0.1", "--port", &port.to_string(), "--requirepass", password])
        .args(["--save", "", "--appendonly", "no", "--daemonize", "no", "--dir"])
        .arg(folder.path())
        .stdout(Stdio::null())
        .kill_on_drop(true)
        .spawn()
        .expect("redis-server runs: `infra/tools/install test` installs it")
}

/// Whether it started to answer; it ends if the port is in use.
async fn answers(port: u16, password: &str, process: &mut Child) -> bool {
    while process.try_wait().expect("a child").is_none() {
        if ask(port, password, &["PING"]).await.is_ok_and(|reply| reply == ["PONG"]) {
            return true;
        }
        sleep(POLL_INTERVAL).await;
    }
    false
}

async fn ask(port: u16, password: &str, asked: &[&str]) -> std::io::Result<Vec<String>> {
    let mut stream = BufReader::new(TcpStream::connect(("127.0.0.1", port)).await?);
    for command in [&["AUTH", password][..], asked] {
        let words = command.iter().map(|word| format!("${}\r\n{word}\r\n", word.len()));
        let text = format!("*{}\r\n{}", command.len(), words.collect::<String>());
        stream.write_all(text.as_bytes()).await?;
        let values = read(&mut stream).await?;
        if command == asked {
            return Ok(values);
        }
    }
    Ok(Vec::new())
}

async fn read(stream: &mut BufReader<TcpStream>) -> std::io::Result<Vec<String>> {
    let (mut values, mut left) = (Vec::new(), 1);
    while left > 0 {
        left -= 1;
        let mut line = String::new();
        stream.read_line(&mut line).await?;
        let (kind, rest) = line.trim_end().split_at_checked(1).unwrap_or_default();
        match kind {
            "+" | ":" => values.push(rest.to_owned()),
            "*" => left += rest.parse::<usize>().unwrap_or_default(),
            "$" => {
                let length = rest.parse().unwrap_or_default();
                let mut value = vec![0; length];
                stream.read_exact(&mut value).await?;
                if rest != "-1" {
                    stream.read_line(&mut String::new()).await?;
                }
                values.push(String::from_utf8_lossy(&value).into_owned());
            }
            _ => return Err(std::io::Error::other(line)),
        }
    }
    Ok(values)
}
