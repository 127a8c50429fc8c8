//! SQLite and PostgreSQL: stores that open together, late and twice. Cancelled callers leave nothing behind,
//! and the password is in no message.

use std::future::poll_fn;
use std::pin::pin;
use std::process::Stdio;
use std::task::Poll;

use futures_util::future::BoxFuture;
use hapa_proto::auth::v1::ListKeysRequest;
use hapa_store::database::{Db, Engine, MigrationStep};
use hapa_test_harness::{Postgres, Store, TestMesh, hapa, within};
use serde_json::Value;
use sqlx::{AnyConnection, Connection as _, Executor as _, Row as _};
use tokio::io::{AsyncBufReadExt as _, BufReader};
use tokio::task::{JoinSet, yield_now};

const STEPS: &[MigrationStep] = &[
    (1, "pairs", "CREATE TABLE pairs (number BIGINT NOT NULL, half BIGINT NOT NULL)"),
    (2, "unique", "CREATE UNIQUE INDEX pairs_once ON pairs (number, half)"),
];

/// Writes both halves, or fails between them.
fn write(number: i64, fail: bool) -> impl for<'t> FnOnce(&'t mut AnyConnection) -> Written<'t> {
    move |connection| {
        Box::pin(async move {
            for half in 0..2 {
                let insert = sqlx::query("INSERT INTO pairs (number, half) VALUES ($1, $2)");
                insert.bind(number).bind(half).execute(&mut *connection).await?;
                if fail {
                    return Err(sqlx::Error::RowNotFound);
                }
            }
            Ok(())
        })
    }
}

type Written<'t> = BoxFuture<'t, Result<(), sqlx::Error>>;

async fn number(connection: &mut AnyConnection, sql: &'static str) -> i64 {
    within(sql, connection.fetch_one(sql)).await.unwrap().try_get(0).unwrap()
}

/// Polls a future this often, and drops it.
async fn abandon(future: impl Future, polls: usize) {
    let (mut future, mut polled) = (pin!(future), 0);
    poll_fn(|context| {
        polled += 1;
        let over = polled > polls || future.as_mut().poll(context).is_ready() || polled == polls;
        if over { Poll::Ready(()) } else { Poll::Pending }
    })
    .await;
}

/// Takes every connection of the pool, once all that runs has ended.
async fn take_all(db: &Db) -> Vec<sqlx::pool::PoolConnection<sqlx::Any>> {
    let mut taken = Vec::new();
    within("every connection", async {
        while taken.len() < db.writer.options().get_max_connections() as usize {
            taken.extend(db.writer.acquire().await);
        }
    })
    .await;
    taken
}

#[tokio::test]
async fn servers_that_start_together_on_an_empty_database_migrate_it_once() {
    let database = Postgres::database().await;
    let store = std::sync::Arc::new(Store::Postgres(database));
    let mut meshes = JoinSet::new();
    for _ in 0..3 {
        let store = store.clone();
        // Each makes a key before it counts as started.
        meshes.spawn(async move { TestMesh::start_on(&store, &[]).await });
    }
    let meshes = within("three servers", meshes.join_all()).await;
    let Store::Postgres(database) = &*store else { unreachable!() };
    let mut connection = database.connect().await;
    let steps = std::fs::read_dir("../../services/auth/migrations").unwrap().count();
    let counted = number(&mut connection, "SELECT COUNT(*) FROM migrations_auth").await;
    assert_eq!(usize::try_from(counted).unwrap(), steps);
    assert_eq!(number(&mut connection, "SELECT COUNT(*) FROM keys").await, 3);
    for mesh in &meshes {
        let mut keys = mesh.keys();
        let listed = within("the keys", keys.list_keys(ListKeysRequest::default())).await;
        assert_eq!(listed.unwrap().into_inner().keys.len(), 3);
    }
}

#[tokio::test]
async fn a_transaction_is_whole_or_not_at_all() {
    for store in Store::both().await {
        let db = Db::open("test", &store.url(), STEPS).await.unwrap();
        assert_eq!(db.engine() == Engine::Sqlite, matches!(store, Store::Sqlite(_)));
        db.ping().await.unwrap();
        db.transaction(write(1, false)).await.unwrap();
        assert!(matches!(db.transaction(write(2, true)).await, Err(sqlx::Error::RowNotFound)));
        let again = db.transaction(write(1, false)).await.unwrap_err();
        assert!(again.as_database_error().unwrap().is_unique_violation());
        let mut connection = db.reader.acquire().await.unwrap();
        assert_eq!(number(&mut connection, "SELECT COUNT(*) FROM pairs").await, 2);
        drop(connection);
        // Two services on one database count their own steps.
        Db::open("other", &store.url(), &[]).await.unwrap();
        Db::open("test", &store.url(), STEPS).await.unwrap();
    }
}

/// No connection is in a transaction.
async fn assert_idle(db: &Db, store: &Store) {
    for mut connection in take_all(db).await {
        if db.engine() == Engine::Postgres {
            // Outside of a transaction both are the same.
            let idle = "SELECT (now() = statement_timestamp())::int::bigint";
            assert_eq!(number(&mut connection, idle).await, 1);
        }
    }
    if let Store::Postgres(database) = store {
        let open = "SELECT COUNT(*) FROM pg_stat_activity WHERE datname = current_database()
                    AND application_name = 'hapa-test' AND state LIKE 'idle in transaction%'";
        assert_eq!(number(&mut database.connect().await, open).await, 0);
    }
}

#[tokio::test]
async fn callers_that_vanish_leave_whole_pairs_and_idle_connections() {
    for store in Store::both().await {
        let db = Db::open("test", &store.url(), STEPS).await.unwrap();
        for caller in 0..200 {
            let number = i64::try_from(caller).unwrap();
            abandon(db.transaction(write(number, caller % 5 == 0)), caller % 3).await;
        }
        assert_idle(&db, &store).await;
        let mut connection = db.writer.acquire().await.unwrap();
        let broken = "SELECT COUNT(*) FROM (SELECT number FROM pairs GROUP BY number
                      HAVING COUNT(*) <> 2) AS broken";
        assert_eq!(number(&mut connection, broken).await, 0);
        assert!(number(&mut connection, "SELECT COUNT(*) FROM pairs").await > 0);
        drop(connection);
        // A caller begins a transaction directly, and is cancelled while BEGIN is in progress.
        for _ in 0..20 {
            let mut connection = within("a connection", db.writer.acquire()).await.unwrap();
            abandon(connection.begin(), 1).await;
        }
        assert_idle(&db, &store).await;
        for later in 1000..1050 {
            within("a transaction", db.transaction(write(later, false))).await.unwrap();
        }
    }
}

/// SQLite ends a transaction by itself where the file may not grow, so that a ROLLBACK fails.
#[tokio::test]
async fn a_transaction_that_the_store_ended_by_itself_spoils_no_later_one() {
    // One row: SQLite undoes a statement of several rows alone, and the transaction with this one.
    const FILL: &str = "INSERT INTO pairs (number, half) VALUES (0, zeroblob(1000000))";
    let store = Store::sqlite();
    let db = Db::open("test", &store.url(), STEPS).await.unwrap();
    db.transaction(write(1, false)).await.unwrap();
    db.writer.execute("PRAGMA max_page_count = 1").await.unwrap();
    let fill = db.transaction(|connection| {
        Box::pin(async move { connection.execute(FILL).await.map(drop) })
    });
    let refused = within("a full file", fill).await.unwrap_err();
    assert_eq!(refused.as_database_error().unwrap().code().unwrap(), "13");
    for later in 2..5 {
        within("a transaction", db.transaction(write(later, false))).await.unwrap();
    }
    db.check_write().await.unwrap();
    // The same with a caller that does not end its transaction.
    db.writer.execute("PRAGMA max_page_count = 1").await.unwrap();
    let mut transaction = db.writer.begin_with("BEGIN IMMEDIATE").await.unwrap();
    within("a full file", transaction.execute(FILL)).await.unwrap_err();
    drop(transaction);
    within("a transaction", db.transaction(write(5, false))).await.unwrap();
    let mut connection = db.reader.acquire().await.unwrap();
    assert_eq!(number(&mut connection, "SELECT COUNT(*) FROM pairs").await, 10);
}

#[tokio::test]
async fn a_failed_commit_spoils_no_later_transaction() {
    const DEFERRED: &[MigrationStep] = &[(
        1,
        "deferred",
        "CREATE TABLE parents (id BIGINT PRIMARY KEY);
         CREATE TABLE children (parent BIGINT NOT NULL REFERENCES parents (id)
             DEFERRABLE INITIALLY DEFERRED)",
    )];
    let insert = |db: &Db, text: &'static str| {
        let db = db.clone();
        async move {
            let insert = db.transaction(move |connection| {
                Box::pin(async move { connection.execute(text).await.map(drop) })
            });
            within(text, insert).await
        }
    };
    for store in Store::both().await {
        let db = Db::open("test", &store.url(), DEFERRED).await.unwrap();
        for _ in 0..3 {
            let failed = insert(&db, "INSERT INTO children (parent) VALUES (1)").await;
            assert!(failed.unwrap_err().as_database_error().is_some());
        }
        insert(&db, "INSERT INTO parents (id) VALUES (1)").await.unwrap();
        insert(&db, "INSERT INTO children (parent) VALUES (1)").await.unwrap();
        assert_idle(&db, &store).await;
    }
}

#[tokio::test]
async fn connections_to_postgresql_have_limits_of_their_own() {
    let database = Postgres::database().await;
    let db = Db::open("test", database.url(), STEPS).await.unwrap();
    for (setting, value) in [
        ("SHOW statement_timeout", "5s"),
        ("SHOW lock_timeout", "2s"),
        ("SHOW idle_in_transaction_session_timeout", "10s"),
        ("SHOW application_name", "hapa-test"),
    ] {
        let row = db.reader.fetch_one(setting).await.unwrap();
        assert_eq!(row.get::<String, _>(0), value, "{setting}");
    }
}

#[tokio::test]
async fn a_file_of_before_services_counted_their_own_steps_is_taken_over() {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::Sqlite(folder);
    let db = Db::open("test", &store.url(), STEPS).await.unwrap();
    db.transaction(write(1, false)).await.unwrap();
    db.writer.execute("ALTER TABLE migrations_test RENAME TO _sqlx_migrations").await.unwrap();
    // Another service must not adopt the table.
    let theirs: &[MigrationStep] = &[(1, "theirs", "CREATE TABLE theirs (number BIGINT)")];
    Db::open("other", &store.url(), theirs).await.unwrap();
    let db = Db::open("test", &store.url(), STEPS).await.unwrap();
    let mut connection = db.reader.acquire().await.unwrap();
    assert_eq!(number(&mut connection, "SELECT COUNT(*) FROM pairs").await, 2);
}

#[tokio::test]
async fn a_store_that_comes_up_late_is_waited_for() {
    let server = Postgres::own().await;
    server.stop().await;
    let folder = tempfile::tempdir().unwrap();
    let mut command = hapa();
    command.args(["all", "--port=0", "--metrics-port=0", "--structured-logging=true"]);
    command.env("DATA_DIR", folder.path()).env("DATABASE_URL", server.url());
    let mut mesh = command.stderr(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(mesh.stderr.take().unwrap()).lines();
    let mut said = async || {
        let line = within("a line", lines.next_line()).await.unwrap().expect("it goes on");
        serde_json::from_str::<Value>(&line).unwrap()["fields"]["message"].clone()
    };
    assert_eq!(said().await, "waiting for the store");
    server.start().await;
    assert_eq!(said().await, "serving");
}

#[tokio::test]
async fn a_store_that_hangs_or_is_gone_does_not_hold_health_up_and_is_found_again() {
    let server = Postgres::own().await;
    let db = Db::open("test", &server.url(), STEPS).await.unwrap();
    let found = async || {
        while db.ping().await.is_err() {
            yield_now().await;
        }
    };
    within("the store", found()).await;
    server.freeze().await;
    assert!(within("a hanging ping", db.ping()).await.is_err());
    server.thaw().await;
    within("the thawed store", found()).await;
    server.stop().await;
    assert!(within("a lost ping", db.ping()).await.is_err());
    server.start().await;
    within("the started store", found()).await;
    within("a transaction", db.transaction(write(1, false))).await.unwrap();
}

#[tokio::test]
async fn a_store_that_refuses_us_ends_the_start_without_telling_the_password() {
    let database = Postgres::database().await;
    let other_user = database.url().replace("postgres@", "stranger:hunter22@");
    for url in [other_user.as_str(), "postgres://us#er:hunter22@localhost:1/db"] {
        let folder = tempfile::tempdir().unwrap();
        let mut command = hapa();
        command.args(["all", "--port=0", "--metrics-port=0"]);
        command.env("DATA_DIR", folder.path()).env("DATABASE_URL", url);
        command.env("LOG_LEVEL", "trace");
        let done = within("the refusal", command.output()).await.unwrap();
        let said = String::from_utf8_lossy(&[done.stdout, done.stderr].concat()).into_owned();
        assert!(!done.status.success() && !said.contains("hunter22"), "{said}");
        assert!(said.contains("opening the store") || said.contains("DATABASE_URL"), "{said}");
    }
}
