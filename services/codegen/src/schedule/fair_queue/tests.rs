//! Tests of grants, waits and refusals, and that no permit is lost.

use futures_util::FutureExt as _;
use proptest::prelude::*;
use tokio::task::JoinSet;

use super::*;

const WAITING_TIMEOUT: Duration = Duration::from_secs(1);

fn new_queue(limit: u32, per_tenant: u32, waiting: u32) -> FairQueue {
    FairQueue::new(QueueConfig {
        max_generations: limit,
        max_generations_per_tenant: per_tenant,
        max_waiting: waiting,
        waiting_timeout_seconds: WAITING_TIMEOUT,
        prioritize_completions: false,
        isolate_prefix_cache: true,
    })
}

type Acquiring<'a> = std::pin::Pin<Box<dyn Future<Output = Result<ConcurrencyPermit, Error>> + 'a>>;

/// Requests a permit; the waiter is in the queue when this returns.
fn enqueue<'a>(queue: &'a FairQueue, tenant: &'a str) -> Acquiring<'a> {
    enqueue_kind(queue, tenant, WorkKind::Generation)
}

fn enqueue_kind<'a>(queue: &'a FairQueue, tenant: &'a str, kind: WorkKind) -> Acquiring<'a> {
    let mut acquiring: Acquiring<'a> = Box::pin(queue.acquire(tenant, kind));
    match acquiring.as_mut().now_or_never() {
        Some(result) => Box::pin(std::future::ready(result)),
        None => acquiring,
    }
}

fn granted(acquiring: &mut Acquiring<'_>) -> Option<ConcurrencyPermit> {
    acquiring.as_mut().now_or_never().map(|result| result.unwrap())
}

fn is_empty(queue: &FairQueue) -> bool {
    let state = queue.lock();
    (state.active, state.waiting, state.tenants.len()) == (0, 0, 0)
}

#[tokio::test(start_paused = true)]
async fn a_free_permit_is_granted_at_once_and_otherwise_the_call_waits() {
    let queue = new_queue(1, 0, 8);
    let first = queue.acquire("a", WorkKind::Generation).await.unwrap();
    let mut second = enqueue(&queue, "a");
    assert!(granted(&mut second).is_none());
    drop(first);
    drop(granted(&mut second).expect("the permit that became free"));
    assert!(is_empty(&queue));
}

#[tokio::test(start_paused = true)]
async fn a_waiter_is_refused_after_the_timeout_and_leaves_the_queue() {
    let queue = new_queue(1, 0, 8);
    let held = queue.acquire("a", WorkKind::Generation).await.unwrap();
    let started = Instant::now();
    assert!(matches!(queue.acquire("b", WorkKind::Generation).await, Err(Error::QueueFull)));
    assert_eq!(started.elapsed().as_secs(), WAITING_TIMEOUT.as_secs());
    drop(held);
    assert!(is_empty(&queue));
}

#[tokio::test(start_paused = true)]
async fn the_tenant_with_the_fewest_permits_is_next() {
    let queue = new_queue(3, 0, 8);
    let mut held = Vec::new();
    for _ in 0..3 {
        held.push(queue.acquire("greedy", WorkKind::Generation).await.unwrap());
    }
    let mut more: Vec<_> = (0..3).map(|_| enqueue(&queue, "greedy")).collect();
    let mut other = enqueue(&queue, "other");
    held.pop();
    let permit = granted(&mut other).expect("a tenant without permits is first");
    held.pop();
    assert!(granted(&mut more[0]).is_some());
    drop(permit);
}

#[tokio::test(start_paused = true)]
async fn a_full_queue_refuses_at_once_and_evicts_from_the_longest_tenant_queue() {
    let queue = new_queue(1, 0, 4);
    let _held = queue.acquire("greedy", WorkKind::Generation).await.unwrap();
    let mut waiting: Vec<_> = (0..4).map(|_| enqueue(&queue, "greedy")).collect();
    let refused = queue.acquire("greedy", WorkKind::Generation).now_or_never();
    assert!(matches!(refused, Some(Err(Error::QueueFull))));
    let mut other = enqueue(&queue, "other");
    assert!(granted(&mut other).is_none());
    let newest = waiting.pop().unwrap().now_or_never();
    assert!(
        matches!(newest, Some(Err(Error::QueueFull))),
        "the newest waiter of greedy was evicted"
    );
    assert_eq!(queue.lock().waiting, 4);
}

#[tokio::test(start_paused = true)]
async fn a_tenant_at_its_limit_waits_while_others_pass() {
    let queue = new_queue(8, 1, 8);
    let own = queue.acquire("a", WorkKind::Generation).await.unwrap();
    let mut second = enqueue(&queue, "a");
    let other = queue.acquire("b", WorkKind::Generation).await.unwrap();
    assert!(granted(&mut second).is_none());
    drop(other);
    assert!(granted(&mut second).is_none(), "the tenant is at its limit");
    drop(own);
    assert!(granted(&mut second).is_some());
}

#[tokio::test(start_paused = true)]
async fn completions_take_precedence_if_configured() {
    for first in [true, false] {
        let mut config = new_queue(1, 0, 8).0.config.clone();
        config.prioritize_completions = first;
        let queue = FairQueue::new(config);
        let held = queue.acquire("a", WorkKind::Generation).await.unwrap();
        let mut question = enqueue(&queue, "b");
        let mut completion = enqueue_kind(&queue, "a", WorkKind::Completion);
        drop(held);
        assert_eq!(granted(&mut completion).is_some(), first);
        assert!(granted(&mut question).is_some());
    }
}

#[tokio::test]
async fn concurrent_calls_never_exceed_the_limits_and_leave_nothing_behind() {
    let queue = new_queue(5, 3, 1_000);
    let mut calls = JoinSet::new();
    for sequence in 0..500_u32 {
        let queue = queue.clone();
        calls.spawn(async move {
            let tenant = ["a", "b", "c"][sequence as usize % 3];
            let acquiring = queue.acquire(tenant, WorkKind::Generation);
            // Some calls are cancelled at once.
            if sequence % 7 == 0 {
                return acquiring.now_or_never().is_some_and(|result| result.is_ok());
            }
            let permit = acquiring.await.unwrap();
            assert!(queue.lock().active <= 5);
            assert!(queue.lock().tenants[tenant].active <= 3);
            tokio::task::yield_now().await;
            drop(permit);
            true
        });
    }
    while let Some(call) = calls.join_next().await {
        call.unwrap();
    }
    assert!(is_empty(&queue));
}

proptest! {
    #[test]
    fn no_order_of_acquiring_cancelling_and_releasing_loses_a_permit(
        steps in prop::collection::vec((0_usize..3, 0_usize..4), 0..120),
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
        let queue = new_queue(3, 2, 6);
        runtime.block_on(async {
            let (mut held, mut waiting): (Vec<ConcurrencyPermit>, Vec<Acquiring<'_>>) = (Vec::new(), Vec::new());
            for (tenant, step) in steps {
                match step {
                    0 | 1 => waiting.push(enqueue(&queue, ["a", "b", "c"][tenant])),
                    2 if !held.is_empty() => drop(held.swap_remove(tenant % held.len())),
                    _ if !waiting.is_empty() => drop(waiting.swap_remove(tenant % waiting.len())),
                    _ => {}
                }
                let mut still = Vec::new();
                for mut acquiring in std::mem::take(&mut waiting) {
                    match acquiring.as_mut().now_or_never() {
                        Some(Ok(permit)) => held.push(permit),
                        Some(Err(_)) => {}
                        None => still.push(acquiring),
                    }
                }
                waiting = still;
                let state = queue.lock();
                assert!(state.active == held.len() && state.active <= 3, "{} {}", state.active, held.len());
                assert!(state.waiting == waiting.len() && state.waiting <= 6);
                assert!(state.tenants.values().all(|tenant| tenant.active <= 2));
            }
        });
        prop_assert!(is_empty(&queue));
    }
}
