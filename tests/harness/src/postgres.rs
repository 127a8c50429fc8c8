//! A private PostgreSQL: one server for all tests of a process with a database for each. Tests that stop or
//! freeze a server have their own. No server outlives the process, however it ends.

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

/// The script that starts, stops and removes a server. It detects the end of this process by its standard
/// input.
const SUPERVISOR_SCRIPT: &str = include_str!("postgres.sh");

static SHARED: OnceCell<Postgres> = OnceCell::const_new();
static DATABASES: AtomicU32 = AtomicU32::new(0);

/// A server. It listens on a socket in its own folder, so that no port can be in use.
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

    /// Starts a separate server. Dropping it stops it.
    pub async fn own() -> Postgres {
        Postgres::supervised("hasty").await
    }

    /// Starts a separate server with PostgreSQL's default settings: it writes to the disk before it
    /// acknowledges.
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

    /// The URL of its empty database.
    pub fn url(&self) -> String {
        self.url_of("postgres")
    }

    fn url_of(&self, database: &str) -> String {
        format!("postgres://postgres@localhost:5432/{database}?host={}", self.folder)
    }

    /// Executes a statement for the whole server.
    pub async fn execute(&self, sql: &str) {
        let mut connection = connect(&self.url()).await;
        let done = within(sql, connection.execute(AssertSqlSafe(sql.to_owned()))).await;
        done.unwrap_or_else(|error| panic!("{sql}: {error}"));
    }

    /// Starts the server again.
    pub async fn start(&self) {
        self.order("start").await;
    }

    /// Stops the server at once, as a crash does.
    pub async fn stop(&self) {
        self.order("stop").await;
    }

    /// Freezes the server: connections stay open without replies.
    pub async fn freeze(&self) {
        self.order("freeze").await;
    }

    /// Continues after [`Postgres::freeze`].
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
        // PostgreSQL refuses to run as root, which may be the only user of a container.
        let me = std::fs::metadata("/proc/self").expect("Linux").uid();
        if me == 0 {
            command = Command::new("setpriv");
            command.args(["--reuid=postgres", "--regid=postgres", "--clear-groups", "sh"]);
        }
        command.args(["-c", SUPERVISOR_SCRIPT, "keeper", how]).current_dir("/").env("LC_ALL", "C");
        // A process group of its own: Ctrl-C reaches the tests only, and the script detects their end.
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
    /// Its URL.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// A direct connection, without the mesh.
    pub async fn connect(&self) -> AnyConnection {
        connect(&self.url).await
    }
}

/// The store of a test.
#[derive(Debug)]
pub enum Store {
    /// A SQLite file in its own folder.
    Sqlite(TempDir),
    /// A database of the shared server.
    Postgres(Database),
}

impl Store {
    /// An empty store on SQLite and one on PostgreSQL.
    pub async fn both() -> [Store; 2] {
        [Store::sqlite(), Store::Postgres(Postgres::database().await)]
    }

    /// An empty SQLite file.
    pub fn sqlite() -> Store {
        Store::Sqlite(tempfile::tempdir().expect("a folder for the test"))
    }

    /// Executes a statement directly, without the mesh.
    pub async fn execute(&self, sql: &str) {
        let mut connection = connect(&self.url()).await;
        let done = within(sql, connection.execute(AssertSqlSafe(sql.to_owned()))).await;
        done.unwrap_or_else(|error| panic!("{sql}: {error}"));
    }

    /// The value for DATABASE_URL.
    pub fn url(&self) -> String {
        match self {
            Store::Sqlite(folder) => {
                format!("sqlite://{}/store.db?mode=rwc", folder.path().display())
            }
            Store::Postgres(database) => database.url.clone(),
        }
    }

    /// Whether this text occurs in it: in a file, or in a row of any table.
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
