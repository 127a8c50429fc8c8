//! The files of an outbox: order, consumption, damage.

use std::fs;

use proptest::prelude::*;
use sqlx::sqlite::SqliteConnectOptions;
use sqlx::{ConnectOptions as _, Connection as _, Executor as _};
use tempfile::TempDir;

use super::event_log::SEGMENT_BYTES;
use super::record::HEADER_LEN;
use super::*;

const MAX: usize = 1_000;

fn open(folder: &Path) -> OutboxStore {
    OutboxStore::open_logs(folder).unwrap().0
}

fn append(store: &mut OutboxStore, priority: Priority, time: u64, bodies: &[&[u8]]) {
    let mut records = Vec::new();
    for body in bodies {
        append_record(&mut records, time, |log| log.extend_from_slice(body));
    }
    store.append(priority, &records, bodies.len() as u64).unwrap();
}

fn append_texts(store: &mut OutboxStore, priority: Priority, texts: &[&str]) {
    let bodies: Vec<_> = texts.iter().map(|text| text.as_bytes()).collect();
    append(store, priority, 1, &bodies);
}

fn texts(batch: &EventBatch) -> Vec<&str> {
    batch.bodies.iter().map(|body| std::str::from_utf8(body).unwrap()).collect()
}

fn usage(store: &mut OutboxStore) -> EventBatch {
    store.next(EventKind::Usage, MAX).unwrap()
}

/// Writes the file of an earlier version. Rows are ranks and bodies.
pub(in crate::outbox) async fn write_sqlite_file(
    path: &Path,
    time: u64,
    rows: impl IntoIterator<Item = (i64, Vec<u8>)>,
) {
    let options = SqliteConnectOptions::new().filename(path).create_if_missing(true);
    let mut file = options.connect().await.unwrap();
    let table = "CREATE TABLE spool (id INTEGER PRIMARY KEY, rank INTEGER NOT NULL,
        at INTEGER NOT NULL, body BLOB NOT NULL)";
    file.execute(table).await.unwrap();
    for (rank, body) in rows {
        let insert = sqlx::query("INSERT INTO spool (rank, at, body) VALUES (?, ?, ?)");
        insert.bind(rank).bind(time.cast_signed()).bind(body).execute(&mut file).await.unwrap();
    }
    file.close().await.unwrap();
}

/// The log files of usage, oldest first.
fn segments(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    let is_log = |path: &PathBuf| {
        path.extension().is_some_and(|extension| extension == "log")
            && path.file_name().unwrap().to_str().unwrap().starts_with("usage-")
    };
    let mut segments: Vec<_> = entries.filter(is_log).collect();
    segments.sort();
    segments
}

#[test]
fn events_are_read_by_priority_and_then_by_age() {
    let folder = TempDir::new().unwrap();
    let mut store = open(folder.path());
    append_texts(&mut store, Priority::Usage, &["a", "b"]);
    append_texts(&mut store, Priority::Occurrence, &["o"]);
    append_texts(&mut store, Priority::FailedUsage, &["f"]);
    append_texts(&mut store, Priority::Usage, &["c"]);
    assert_eq!(store.depth(), [3, 1, 1]);
    assert_eq!(texts(&usage(&mut store)), ["f", "a", "b", "c"]);
    let two = store.next(EventKind::Usage, 2).unwrap();
    assert_eq!(texts(&two), ["f", "a"]);
    store.advance(&two.end);
    assert_eq!(texts(&usage(&mut store)), ["b", "c"]);
    assert_eq!(texts(&store.next(EventKind::Occurrence, MAX).unwrap()), ["o"]);
    assert_eq!(store.depth(), [2, 0, 1]);
}

#[test]
fn consumed_events_do_not_come_back_unless_the_cursor_is_lost_or_damaged() {
    let folder = TempDir::new().unwrap();
    let mut store = open(folder.path());
    append_texts(&mut store, Priority::Usage, &["a", "b", "c"]);
    let two = store.next(EventKind::Usage, 2).unwrap();
    store.advance(&two.end);
    drop(store);
    let mut store = open(folder.path());
    assert_eq!(texts(&usage(&mut store)), ["c"]);
    append_texts(&mut store, Priority::Usage, &["d"]);
    assert_eq!(texts(&usage(&mut store)), ["c", "d"]);
    drop(store);
    let cursor = folder.path().join("usage.cursor");
    let before = fs::read(&cursor).unwrap();
    for damaged in [Vec::new(), before[..19].to_vec(), vec![7; 20]] {
        fs::write(&cursor, damaged).unwrap();
        let mut store = OutboxStore::scan(folder.path()).unwrap().0;
        assert_eq!(texts(&usage(&mut store)), ["a", "b", "c", "d"]);
    }
    fs::remove_file(&cursor).unwrap();
    assert_eq!(texts(&usage(&mut open(folder.path()))), ["a", "b", "c", "d"]);
}

#[test]
fn a_delivery_does_not_consume_events_behind_those_that_were_dropped_in_the_meantime() {
    let folder = TempDir::new().unwrap();
    let mut store = open(folder.path());
    append_texts(&mut store, Priority::Usage, &["a", "b", "c", "d"]);
    let two = store.next(EventKind::Usage, 2).unwrap();
    assert_eq!(store.evict(Priority::Usage, 1).unwrap(), 1);
    store.advance(&two.end);
    assert_eq!(texts(&usage(&mut store)), ["c", "d"]);
    let one = store.next(EventKind::Usage, 1).unwrap();
    assert_eq!(store.evict(Priority::Usage, 2).unwrap(), 2);
    store.advance(&one.end);
    assert_eq!(store.depth(), [0, 0, 0]);
}

#[test]
fn a_full_segment_is_followed_by_another_and_deleted_when_it_is_consumed() {
    let folder = TempDir::new().unwrap();
    let mut store = open(folder.path());
    let body = vec![b'x'; usize::try_from(SEGMENT_BYTES).unwrap() / 4];
    for _ in 0..9 {
        append(&mut store, Priority::Usage, 1, &[&body]);
    }
    assert_eq!(segments(folder.path()).len(), 3);
    let mut delivered = 0;
    while store.depth()[0] > 1 {
        let batch = usage(&mut store);
        delivered += batch.bodies.len();
        store.advance(&batch.end);
    }
    assert_eq!((delivered, segments(folder.path()).len()), (8, 1));
    drop(store);
    let mut store = open(folder.path());
    assert_eq!(store.evict(Priority::Usage, 5).unwrap(), 1);
    assert!(segments(folder.path()).is_empty());
    drop(store);
    // Numbers are not used again, because the cursor refers to them.
    let mut store = open(folder.path());
    append_texts(&mut store, Priority::Usage, &["a"]);
    drop(store);
    assert_eq!(texts(&usage(&mut open(folder.path()))), ["a"]);
    let name = segments(folder.path())[0].file_name().unwrap().to_owned();
    assert_eq!(name, "usage-0000000000000004.log");
}

#[test]
fn an_event_of_any_size_is_delivered_and_a_delivery_is_bounded_in_bytes() {
    let folder = TempDir::new().unwrap();
    let mut store = open(folder.path());
    let large = vec![b'x'; 3 * MAX_BATCH_BYTES];
    append(&mut store, Priority::Usage, 1, &[&large, b"a", &large[..MAX_BATCH_BYTES], b"b"]);
    for expected in [&[large.len()][..], &[1], &[MAX_BATCH_BYTES], &[1]] {
        let batch = usage(&mut store);
        let lens: Vec<_> = batch.bodies.iter().map(Vec::len).collect();
        assert_eq!(lens, expected);
        store.advance(&batch.end);
    }
}

#[test]
fn eviction_and_expiry_drop_the_oldest_events() {
    let folder = TempDir::new().unwrap();
    let mut store = open(folder.path());
    for time in 10..20_u8 {
        append(&mut store, Priority::Usage, time.into(), &[&[time]]);
    }
    assert_eq!(store.oldest(), Some(10));
    assert_eq!(store.evict(Priority::Usage, 3).unwrap(), 3);
    assert_eq!(store.oldest(), Some(13));
    assert_eq!(store.expire(Priority::Usage, 15).unwrap(), 2);
    assert_eq!(store.expire(Priority::Usage, 15).unwrap(), 0);
    assert_eq!(usage(&mut store).bodies, [[15], [16], [17], [18], [19]]);
    drop(store);
    let mut store = open(folder.path());
    assert_eq!((store.depth(), store.oldest()), ([5, 0, 0], Some(15)));
    assert_eq!(store.evict(Priority::Usage, u64::MAX).unwrap(), 5);
    assert_eq!((store.depth(), store.oldest()), ([0, 0, 0], None));
}

#[test]
fn a_failed_write_adds_nothing_and_the_next_one_succeeds() {
    let folder = TempDir::new().unwrap();
    let (path, aside) = (folder.path().join("outbox-a"), folder.path().join("aside"));
    fs::create_dir(&path).unwrap();
    let mut store = open(&path);
    fs::rename(&path, &aside).unwrap();
    assert!(store.append(Priority::Usage, b"anything", 1).is_err() && store.probe().is_err());
    assert_eq!(store.depth(), [0, 0, 0]);
    fs::rename(&aside, &path).unwrap();
    store.probe().unwrap();
    append_texts(&mut store, Priority::Usage, &["a"]);
    drop(store);
    assert_eq!(texts(&usage(&mut open(&path))), ["a"]);
}

#[test]
fn the_rest_of_a_failed_write_is_overwritten() {
    let folder = TempDir::new().unwrap();
    let mut store = open(folder.path());
    append_texts(&mut store, Priority::Usage, &["a"]);
    let file = &segments(folder.path())[0];
    let mut bytes = fs::read(file).unwrap();
    bytes.extend_from_slice(&[1; 100]);
    fs::write(file, bytes).unwrap();
    append_texts(&mut store, Priority::Usage, &["b"]);
    assert_eq!(texts(&usage(&mut store)), ["a", "b"]);
    drop(store);
    let (mut store, damages) = OutboxStore::open_logs(folder.path()).unwrap();
    assert_eq!((texts(&usage(&mut store)), damages.len()), (vec!["a", "b"], 1));
}

#[test]
fn removed_files_lose_their_events_and_block_nothing() {
    let folder = TempDir::new().unwrap();
    let mut store = open(folder.path());
    append_texts(&mut store, Priority::Usage, &["a"]);
    drop(store);
    let mut store = open(folder.path());
    append_texts(&mut store, Priority::Usage, &["b"]);
    fs::remove_file(&segments(folder.path())[0]).unwrap();
    assert_eq!(store.depth(), [2, 0, 0]);
    let batch = usage(&mut store);
    assert_eq!(texts(&batch), ["b"]);
    store.advance(&batch.end);
    assert_eq!(store.depth(), [0, 0, 0]);
}

/// A folder with one segment for each list of bodies.
fn written(lists: &[Vec<Vec<u8>>]) -> TempDir {
    let folder = TempDir::new().unwrap();
    for bodies in lists {
        let bodies: Vec<_> = bodies.iter().map(Vec::as_slice).collect();
        append(&mut open(folder.path()), Priority::Usage, 7, &bodies);
    }
    folder
}

fn bodies() -> impl Strategy<Value = Vec<Vec<u8>>> {
    prop::collection::vec(prop::collection::vec(any::<u8>(), 0..40), 1..6)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn any_prefix_of_a_file_has_a_prefix_of_its_events(list in bodies()) {
        let folder = written(std::slice::from_ref(&list));
        let file = segments(folder.path())[0].clone();
        let bytes = fs::read(&file).unwrap();
        for len in 0..=bytes.len() {
            fs::write(&file, &bytes[..len]).unwrap();
            let (mut store, damages) = OutboxStore::scan(folder.path()).unwrap();
            let found = usage(&mut store).bodies;
            prop_assert!(list.starts_with(&found));
            let used: usize = found.iter().map(|body| HEADER_LEN + body.len()).sum();
            prop_assert_eq!(damages.is_empty(), used == len);
            let next = list.get(found.len());
            prop_assert!(next.is_none_or(|body| used + HEADER_LEN + body.len() > len));
            prop_assert_eq!(store.depth()[0], found.len() as u64);
        }
    }

    #[test]
    fn a_damaged_byte_costs_the_events_of_its_file_at_most(
        lists in prop::collection::vec(bodies(), 3),
        at in any::<prop::sample::Index>(),
        change in 1..=u8::MAX,
    ) {
        let folder = written(&lists);
        let file = segments(folder.path())[1].clone();
        let mut bytes = fs::read(&file).unwrap();
        let damaged = at.index(bytes.len());
        bytes[damaged] ^= change;
        fs::write(&file, bytes).unwrap();
        let (mut store, damages) = OutboxStore::open_logs(folder.path()).unwrap();
        prop_assert!(!damages.is_empty());
        let found = usage(&mut store).bodies;
        let (first, last) = (&lists[0], &lists[2]);
        prop_assert!(found.starts_with(first) && found.ends_with(last));
        let mut all = lists[1].iter();
        let between = &found[first.len()..found.len() - last.len()];
        prop_assert!(between.len() < lists[1].len());
        prop_assert!(between.iter().all(|body| all.any(|one| one == body)));
        prop_assert_eq!(store.depth()[0], found.len() as u64);
        prop_assert_eq!(store.evict(Priority::Usage, u64::MAX).unwrap(), found.len() as u64);
    }

    #[test]
    fn files_of_any_bytes_are_read_without_an_error(
        bytes in prop::collection::vec(any::<u8>(), 0..200),
        cursor in prop::collection::vec(any::<u8>(), 0..30),
    ) {
        let folder = written(&[vec![b"a".to_vec()]]);
        fs::write(&segments(folder.path())[0], bytes).unwrap();
        fs::write(folder.path().join("usage.cursor"), cursor).unwrap();
        let mut store = open(folder.path());
        append_texts(&mut store, Priority::Usage, &["b"]);
        let found = usage(&mut store).bodies;
        prop_assert_eq!(found.last().unwrap(), b"b");
    }
}

#[test]
fn a_damaged_body_costs_one_event() {
    let folder = written(&[vec![b"aa".to_vec(), b"bb".to_vec(), b"cc".to_vec()]]);
    let file = segments(folder.path())[0].clone();
    let mut bytes = fs::read(&file).unwrap();
    bytes[2 * HEADER_LEN + 2] ^= 1;
    fs::write(&file, bytes).unwrap();
    let (mut store, damages) = OutboxStore::open_logs(folder.path()).unwrap();
    assert_eq!(texts(&usage(&mut store)), ["aa", "cc"]);
    assert!(damages[0].problem.contains("18 bytes"), "{damages:?}");
}
