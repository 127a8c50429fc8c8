//! Turns: who gets one, who waits, who is refused, and that none is lost.

use futures_util::FutureExt as _;
use proptest::prelude::*;
use tokio::task::JoinSet;

use super::*;

const WAIT: Duration = Duration::from_secs(1);

fn turns(most: u32, per_tenant: u32, waiting: u32) -> Turns {
    Turns::new(TurnConfig {
        max_generations: most,
        max_generations_per_tenant: per_tenant,
        max_waiting: waiting,
        waiting_timeout_seconds: WAIT,
        completion_first: false,
        isolate_prefix_cache: true,
    })
}

type Taking<'a> = std::pin::Pin<Box<dyn Future<Output = Result<Turn, Error>> + 'a>>;

/// Asks, and stands in the queue when this returns.
fn ask<'a>(turns: &'a Turns, tenant: &'a str) -> Taking<'a> {
    ask_for(turns, tenant, Kind::Question)
}

fn ask_for<'a>(turns: &'a Turns, tenant: &'a str, kind: Kind) -> Taking<'a> {
    let mut taking: Taking<'a> = Box::pin(turns.take(tenant, kind));
    match taking.as_mut().now_or_never() {
        Some(taken) => Box::pin(std::future::ready(taken)),
        None => taking,
    }
}

fn has(taking: &mut Taking<'_>) -> Option<Turn> {
    taking.as_mut().now_or_never().map(|taken| taken.unwrap())
}

fn is_empty(turns: &Turns) -> bool {
    let state = turns.lock();
    (state.active, state.waiting, state.tenants.len()) == (0, 0, 0)
}

#[tokio::test(start_paused = true)]
async fn a_free_place_is_taken_at_once_and_a_full_house_is_waited_for() {
    let turns = turns(1, 0, 8);
    let first = turns.take("a", Kind::Question).await.unwrap();
    let mut second = ask(&turns, "a");
    assert!(has(&mut second).is_none());
    drop(first);
    drop(has(&mut second).expect("the place that became free"));
    assert!(is_empty(&turns));
}

#[tokio::test(start_paused = true)]
async fn who_waits_too_long_is_refused_and_keeps_no_place() {
    let turns = turns(1, 0, 8);
    let held = turns.take("a", Kind::Question).await.unwrap();
    let begun = Instant::now();
    assert!(matches!(turns.take("b", Kind::Question).await, Err(Error::Busy)));
    assert_eq!(begun.elapsed().as_secs(), WAIT.as_secs());
    drop(held);
    assert!(is_empty(&turns));
}

#[tokio::test(start_paused = true)]
async fn who_has_least_is_next() {
    let turns = turns(3, 0, 8);
    let mut held = Vec::new();
    for _ in 0..3 {
        held.push(turns.take("greedy", Kind::Question).await.unwrap());
    }
    let mut more: Vec<_> = (0..3).map(|_| ask(&turns, "greedy")).collect();
    let mut other = ask(&turns, "other");
    held.pop();
    let turn = has(&mut other).expect("who has nothing goes first");
    held.pop();
    assert!(has(&mut more[0]).is_some());
    drop(turn);
}

#[tokio::test(start_paused = true)]
async fn a_full_queue_refuses_at_once_and_its_longest_gives_way() {
    let turns = turns(1, 0, 4);
    let _held = turns.take("greedy", Kind::Question).await.unwrap();
    let mut waiting: Vec<_> = (0..4).map(|_| ask(&turns, "greedy")).collect();
    let refused = turns.take("greedy", Kind::Question).now_or_never();
    assert!(matches!(refused, Some(Err(Error::Busy))));
    let mut other = ask(&turns, "other");
    assert!(has(&mut other).is_none());
    let newest = waiting.pop().unwrap().now_or_never();
    assert!(matches!(newest, Some(Err(Error::Busy))), "the newest of greedy gave way");
    assert_eq!(turns.lock().waiting, 4);
}

#[tokio::test(start_paused = true)]
async fn a_tenant_at_its_own_bound_waits_while_others_pass() {
    let turns = turns(8, 1, 8);
    let own = turns.take("a", Kind::Question).await.unwrap();
    let mut second = ask(&turns, "a");
    let other = turns.take("b", Kind::Question).await.unwrap();
    assert!(has(&mut second).is_none());
    drop(other);
    assert!(has(&mut second).is_none(), "a place that it may not have");
    drop(own);
    assert!(has(&mut second).is_some());
}

#[tokio::test(start_paused = true)]
async fn completions_go_first_where_that_is_configured() {
    for first in [true, false] {
        let mut config = turns(1, 0, 8).0.config.clone();
        config.completion_first = first;
        let turns = Turns::new(config);
        let held = turns.take("a", Kind::Question).await.unwrap();
        let mut question = ask(&turns, "b");
        let mut completion = ask_for(&turns, "a", Kind::Completion);
        drop(held);
        assert_eq!(has(&mut completion).is_some(), first);
        assert!(has(&mut question).is_some());
    }
}

#[tokio::test]
async fn many_at_once_are_never_more_than_may_be_and_nothing_is_left_behind() {
    let turns = turns(5, 3, 1_000);
    let mut calls = JoinSet::new();
    for number in 0..500_u32 {
        let turns = turns.clone();
        calls.spawn(async move {
            let tenant = ["a", "b", "c"][number as usize % 3];
            let taking = turns.take(tenant, Kind::Question);
            // Some leave at once.
            if number % 7 == 0 {
                return taking.now_or_never().is_some_and(|taken| taken.is_ok());
            }
            let turn = taking.await.unwrap();
            assert!(turns.lock().active <= 5);
            assert!(turns.lock().tenants[tenant].active <= 3);
            tokio::task::yield_now().await;
            drop(turn);
            true
        });
    }
    while let Some(call) = calls.join_next().await {
        call.unwrap();
    }
    assert!(is_empty(&turns));
}

proptest! {
    #[test]
    fn no_order_of_taking_leaving_and_ending_loses_a_place(
        steps in prop::collection::vec((0_usize..3, 0_usize..4), 0..120),
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
        let turns = turns(3, 2, 6);
        runtime.block_on(async {
            let (mut held, mut waiting): (Vec<Turn>, Vec<Taking<'_>>) = (Vec::new(), Vec::new());
            for (tenant, step) in steps {
                match step {
                    0 | 1 => waiting.push(ask(&turns, ["a", "b", "c"][tenant])),
                    2 if !held.is_empty() => drop(held.swap_remove(tenant % held.len())),
                    _ if !waiting.is_empty() => drop(waiting.swap_remove(tenant % waiting.len())),
                    _ => {}
                }
                let mut still = Vec::new();
                for mut taking in std::mem::take(&mut waiting) {
                    match taking.as_mut().now_or_never() {
                        Some(Ok(turn)) => held.push(turn),
                        Some(Err(_)) => {}
                        None => still.push(taking),
                    }
                }
                waiting = still;
                let state = turns.lock();
                assert!(state.active == held.len() && state.active <= 3, "{} {}", state.active, held.len());
                assert!(state.waiting == waiting.len() && state.waiting <= 6);
                assert!(state.tenants.values().all(|tenant| tenant.active <= 2));
            }
        });
        prop_assert!(is_empty(&turns));
    }
}
