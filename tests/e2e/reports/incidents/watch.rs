//! The live stream of occurrences: it sends all stored ones from any cursor on, within bounds.

use std::time::Duration;

use hapa_proto::errors::v1::{Occurrence, WatchOccurrencesRequest, WatchOccurrencesResponse};
use hapa_test_harness::{Store, TestMesh, incident, within};
use tonic::{Status, Streaming};

use super::{Errors, ago, errors, failure, report, unseen};

type Live = Streaming<WatchOccurrencesResponse>;

async fn watch(client: &mut Errors, cursor: &str, error_code: &str) -> Result<Live, Status> {
    let (cursor, error_code) = (cursor.to_owned(), error_code.to_owned());
    let request = WatchOccurrencesRequest { cursor, error_code };
    Ok(within("a stream", client.watch_occurrences(request)).await?.into_inner())
}

async fn next(live: &mut Live) -> WatchOccurrencesResponse {
    within("a message", live.message()).await.unwrap().expect("it goes on")
}

/// Reads until this number was sent or skipped. Returns the ids, the number of skipped ones, and the last
/// cursor.
async fn read(live: &mut Live, count: usize) -> (Vec<String>, usize, String) {
    let (mut told, mut skipped, mut cursor) = (Vec::new(), 0, String::new());
    while told.len() + skipped < count {
        let message = next(live).await;
        told.extend(message.occurrences.into_iter().map(|one| one.event_id));
        skipped += usize::try_from(message.skipped).unwrap();
        cursor = message.cursor;
    }
    (told, skipped, cursor)
}

#[tokio::test]
async fn stored_occurrences_are_sent_and_a_lost_stream_continues_from_its_cursor() {
    for store in Store::both().await {
        let mesh = TestMesh::start_unrecorded_on(&store, &[]).await;
        let mut client = errors(&mesh);
        report(&mut client, vec![failure()]).await.unwrap();
        let mut live = watch(&mut client, "", "").await.unwrap();
        let hello = next(&mut live).await;
        assert!(hello.occurrences.is_empty() && !hello.cursor.is_empty());
        let mut timeouts = watch(&mut client, "", "E5001").await.unwrap();
        next(&mut timeouts).await;

        let one = failure();
        let other = Occurrence { error_code: "E5001".to_owned(), ..failure() };
        report(&mut client, vec![one.clone()]).await.unwrap();
        let mut message = next(&mut live).await;
        while message.occurrences.is_empty() {
            message = next(&mut live).await;
        }
        assert_eq!(message.occurrences, std::slice::from_ref(&one), "all that there is to know");
        drop(live);
        let missed: Vec<_> = (0..120).map(|_| failure()).collect();
        report(&mut client, missed.clone()).await.unwrap();
        report(&mut client, vec![other.clone()]).await.unwrap();
        let mut live = watch(&mut client, &message.cursor, "").await.unwrap();
        let (told, skipped, _) = read(&mut live, 121).await;
        let mut expected: Vec<_> = missed.into_iter().map(|one| one.event_id).collect();
        expected.push(other.event_id.clone());
        assert_eq!((told, skipped), (expected, 0));
        assert_eq!(read(&mut timeouts, 1).await.0, [other.event_id]);

        for wrong in ["99999", "-1", "x"] {
            let status = watch(&mut client, wrong, "").await.unwrap_err();
            assert_eq!(incident(&status).0, "E4001");
        }
    }
}

#[tokio::test]
async fn a_quiet_stream_gives_signs_of_life_and_ends_when_its_replica_goes() {
    let mut mesh = TestMesh::start_unrecorded().await;
    let mut client = errors(&mesh);
    let mut live = watch(&mut client, "", "").await.unwrap();
    let cursor = next(&mut live).await.cursor;
    for _ in 0..2 {
        let sign = next(&mut live).await;
        assert_eq!((sign.occurrences.len(), &sign.cursor), (0, &cursor));
    }
    mesh.begin_shutdown();
    let end = loop {
        match within("the end", live.message()).await {
            Ok(message) => drop(message.expect("no end without a word")),
            Err(status) => break status,
        }
    };
    assert_eq!(incident(&end).0, "E5008");
    drop((live, client));
    mesh.wait_until_stopped().await;
}

#[tokio::test]
async fn a_burst_of_occurrences_is_sent_up_to_a_bound_and_the_rest_is_counted() {
    for store in Store::both().await {
        let mesh = TestMesh::start_unrecorded_on(&store, &[]).await;
        let mut client = errors(&mesh);
        let mut live = watch(&mut client, "", "").await.unwrap();
        let cursor = next(&mut live).await.cursor;
        drop(live);
        let time = ago(Duration::ZERO);
        for _ in 0..13 {
            let batch = (0..1_000).map(|_| Occurrence { time, ..unseen() }).collect();
            report(&mut client, batch).await.unwrap();
        }
        let mut live = watch(&mut client, &cursor, "").await.unwrap();
        let begin = tokio::time::Instant::now();
        let (told, skipped, _) = read(&mut live, 13_000).await;
        // A thousand for each second that a busy machine takes.
        assert_eq!(told.len() + skipped, 13_000);
        assert!((1_000..13_000).contains(&told.len()), "{} told", told.len());
        report(&mut client, (0..500).map(|_| unseen()).collect()).await.unwrap();
        let (told, skipped, _) = read(&mut live, 500).await;
        assert_eq!((told.len(), skipped), (500, 0));
        assert!(begin.elapsed() >= Duration::from_millis(500), "at most 1,000 a second");
    }
}
