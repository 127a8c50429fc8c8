//! A private PostgreSQL: one server for all tests of a process, a database for each, and servers of
//! their own for tests that stop or freeze one. None outlives the process, however it ends.

use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::fs::MetadataExt as _;
use std::os::unix::process::CommandExt as _;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};

use sqlx::any::{AnyConnectOptions, install_default_drivers};
use sqlx::{AnyConnection, AssertSqlSafe, ConnectOptions as _, Executor as _, Row as _};
use tempfile::TempDir;
use tokio::sync::OnceCell;
use tokio::task::spawn_blocking;

use crate::tools::within;

/// What starts, stops and cleans up. Its standard input is ours, so that it sees our end.
const SUPERVISOR_SCRIPT: &str = include_str!("postgres.sh");

static SHARED: OnceCell<Postgres> = OnceCell::const_new();
static DATABASES: AtomicU32 = AtomicU32::new(0);

/// A server. It listens on a socket in a folder of its own, so that no port can be taken.
#[derive(Debug)]
pub struct Postgres {
    supervisor: Arc<Mutex<Supervisor>>,
    folder: String,
}

#[derive(Debug)]
struct Supervisor {
    orders: ChildStdin,
    answers: BufReader<ChildStdout>,
    _shell: Child,
}

/// An empty database of the shared server.
#[derive(Debug)]
pub struct Database {
    url: String,
}

impl Postgres {
    /// A fresh database on the server that all tests of this process share.
    pub async fn database() -> Database {
        SHARED.get_or_init(Postgres::own).await.another().await
    }

    /// A fresh database on this server.
    pub async fn another(&self) -> Database {
        let name = format!("test_{}", DATABASES.fetch_add(1, Ordering::Relaxed));
        let make = AssertSqlSafe(format!("CREATE DATABASE {name}"));
        let mut connection = connect(&self.url()).await;
        within("a database", connection.execute(make)).await.expect("a database can be made");
        Database { url: self.url_of(&name) }
    }

    /// A running server of one's own; it ends with this.
    pub async fn own() -> Postgres {
        Postgres::supervised("hasty").await
    }

    /// The same, with the settings that PostgreSQL comes with: it writes to the disk before it says
    /// that it has.
    pub async fn durable() -> Postgres {
        Postgres::supervised("durable").await
    }

    async fn supervised(how: &'static str) -> Postgres {
        let supervisor = spawn_blocking(move || Supervisor::start(how));
        let made = within("PostgreSQL's folder", supervisor).await;
        let (supervisor, folder) = made.expect("it did not panic");
        let server = Postgres { supervisor: Arc::new(Mutex::new(supervisor)), folder };
        server.start().await;
        server
    }

    /// Its empty database.
    pub fn url(&self) -> String {
        self.url_of("postgres")
    }

    fn url_of(&self, database: &str) -> String {
        format!("postgres://postgres@localhost:5432/{database}?host={}", self.folder)
    }

    /// Does something that concerns the whole server.
    pub async fn execute(&self, sql: &str) {
        let mut connection = connect(&self.url()).await;
        let done = within(sql, connection.execute(AssertSqlSafe(sql.to_owned()))).await;
        done.unwrap_or_else(|error| panic!("{sql}: {error}"));
    }

    /// Starts it again.
    pub async fn start(&self) {
        self.order("start").await;
    }

    /// Stops it at once, as a crash would.
    pub async fn stop(&self) {
        self.order("stop").await;
    }

    /// Lets it hang: connections stay open and nothing answers.
    pub async fn freeze(&self) {
        self.order("freeze").await;
    }

    /// Lets it go on.
    pub async fn thaw(&self) {
        self.order("thaw").await;
    }

    async fn order(&self, order: &'static str) {
        let supervisor = Arc::clone(&self.supervisor);
        let done = spawn_blocking(move || supervisor.lock().expect("no panic").order(order));
        within(order, done).await.expect("PostgreSQL obeys");
    }
}

impl Supervisor {
    fn start(how: &str) -> (Supervisor, String) {
        let mut command = Command::new("sh");
        // PostgreSQL refuses to be root, which a container's only user may be.
        let me = std::fs::metadata("/proc/self").expect("Linux").uid();
        if me == 0 {
            command = Command::new("setpriv");
            command.args(["--reuid=postgres", "--regid=postgres", "--clear-groups", "sh"]);
        }
        command.args(["-c", SUPERVISOR_SCRIPT, "keeper", how]).current_dir("/").env("LC_ALL", "C");
        // Out of the terminal's group: Ctrl-C is for the tests, and their end is what it sees.
        command.process_group(0).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut shell = command.spawn().expect("a shell");
        let orders = shell.stdin.take().expect("a pipe");
        let answers = BufReader::new(shell.stdout.take().expect("a pipe"));
        let mut supervisor = Supervisor { orders, answers, _shell: shell };
        let folder = supervisor.answer();
        (supervisor, folder)
    }

    fn order(&mut self, order: &str) {
        writeln!(self.orders, "{order}").expect("the keeper lives");
        assert_eq!(self.answer(), order);
    }

    fn answer(&mut self) -> String {
        let mut line = String::new();
        self.answers.read_line(&mut line).expect("text");
        assert!(!line.is_empty(), "no PostgreSQL: `make tools` installs it");
        line.trim_end().to_owned()
    }
}

impl Database {
    /// Where it is.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// A connection of its own, past the mesh.
    pub async fn connect(&self) -> AnyConnection {
        connect(&self.url).await
    }
}

/// What a test of the store runs on.
#[derive(Debug)]
pub enum Store {
    /// A file in a folder of its own.
    Sqlite(TempDir),
    /// A database of the shared server.
    Postgres(Database),
}

impl Store {
    /// One empty store on each engine.
    pub async fn both() -> [Store; 2] {
        [Store::sqlite(), Store::Postgres(Postgres::database().await)]
    }

    /// An empty file.
    pub fn sqlite() -> Store {
        Store::Sqlite(tempfile::tempdir().expect("a folder for the test"))
    }

    /// Changes something past the mesh.
    pub async fn execute(&self, sql: &str) {
        let mut connection = connect(&self.url()).await;
        let done = within(sql, connection.execute(AssertSqlSafe(sql.to_owned()))).await;
        done.unwrap_or_else(|error| panic!("{sql}: {error}"));
    }

    /// Where it is.
    pub fn url(&self) -> String {
        match self {
            Store::Sqlite(folder) => {
                format!("sqlite://{}/store.db?mode=rwc", folder.path().display())
            }
            Store::Postgres(database) => database.url.clone(),
        }
    }

    /// Whether this text stands anywhere in it: in a file, in a row of any table.
    pub async fn holds(&self, text: &str) -> bool {
        match self {
            Store::Sqlite(folder) => {
                let files = std::fs::read_dir(folder.path()).expect("a folder");
                let bytes = files
                    .map(|file| std::fs::read(file.expect("a file").path()).expect("bytes"))
                    .collect::<Vec<_>>();
                let holds = |bytes: &Vec<u8>| {
                    bytes.windows(text.len()).any(|window| window == text.as_bytes())
                };
                bytes.iter().any(holds)
            }
            Store::Postgres(database) => {
                let rows = within("every row", every_row(database)).await.expect("rows");
                rows.iter().any(|row| row.contains(text))
            }
        }
    }
}

async fn every_row(database: &Database) -> Result<Vec<String>, sqlx::Error> {
    const TABLES: &str = "SELECT table_name::text FROM information_schema.tables
                          WHERE table_schema = 'public'";
    let mut connection = database.connect().await;
    let mut rows = Vec::new();
    for table in connection.fetch_all(TABLES).await? {
        let table: String = table.try_get(0)?;
        let select = AssertSqlSafe(format!("SELECT t::text FROM \"{table}\" AS t"));
        for row in connection.fetch_all(select).await? {
            rows.push(row.try_get(0)?);
        }
    }
    Ok(rows)
}

async fn connect(url: &str) -> AnyConnection {
    install_default_drivers();
    let options: AnyConnectOptions = url.parse().expect("a URL");
    within("a connection", options.connect()).await.expect("the store opens")
}
