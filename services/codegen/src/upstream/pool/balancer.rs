//! The load balancer: pure functions over a snapshot, with the random numbers passed in.
//!
//! Power of two choices: the less loaded of two random candidates is nearly as good as the least loaded
//! of all. Callers with the same stale loads do not all choose one engine. Two preferences come first,
//! each only while the engine stays below the load cap. The first is an engine whose prefix cache holds
//! related prompts (affinity); the second is an engine that has the adapter in memory.

/// An engine that can be chosen, with what is known of its load.
#[derive(Clone, Copy, Debug, Default)]
pub struct Candidate {
    /// Stable across processes and restarts.
    pub id: u64,
    /// Requests in the engine's queue at the last probe.
    pub waiting: u32,
    /// Requests that the engine ran at the last probe.
    pub running: u32,
    /// Our own requests at present.
    pub in_flight: u32,
    /// Our own requests at the last probe.
    pub in_flight_at_probe: u32,
    /// KV cache usage at the last probe, 0 to 1.
    pub cache_usage: f32,
    /// The wanted adapter is in the engine's memory.
    pub is_resident: bool,
}

/// A full KV cache counts as this many requests, because the engine then preempts work.
const FULL_CACHE_PENALTY: f32 = 8.0;
/// A preferred engine may have the least load times this ratio, plus the slack.
const MAX_LOAD_RATIO: f32 = 1.5;
const LOAD_SLACK: f32 = 8.0;
/// Length of the prompt prefix that decides affinity. Shorter prompts have no affinity.
const AFFINITY_PREFIX_BYTES: usize = 4 * 1024;

impl Candidate {
    /// Estimated load in requests. Changes since the last probe are estimated from our own requests.
    #[expect(clippy::cast_precision_loss, reason = "far below 2^24 requests")]
    fn load(&self) -> f32 {
        let at_probe = self.waiting.saturating_add(self.running);
        let now = at_probe
            .saturating_add(self.in_flight)
            .saturating_sub(self.in_flight_at_probe)
            .max(self.in_flight);
        // Waiting requests count twice, because the engine is saturated.
        let full = (self.cache_usage - 0.8).clamp(0.0, 0.2) * 5.0 * FULL_CACHE_PENALTY;
        now as f32 + self.waiting as f32 + full
    }
}

/// A value shared by related requests: their session, or else the start of a long prompt.
pub fn affinity(owner: &str, session: &str, prompt: &[u8]) -> Option<u64> {
    if session.is_empty() {
        return prompt.get(..AFFINITY_PREFIX_BYTES).map(|begin| stable_hash(1, begin));
    }
    // Sessions of two owners may have the same name.
    Some(stable_hash(stable_hash(2, owner.as_bytes()), session.as_bytes()))
}

/// Index of the chosen engine; `None` without candidates.
pub fn choose(
    candidates: &[Candidate],
    affinity: Option<u64>,
    random: &mut impl FnMut() -> u64,
) -> Option<usize> {
    let loads = candidates.iter().map(Candidate::load);
    let cap = loads.fold(f32::INFINITY, f32::min) * MAX_LOAD_RATIO + LOAD_SLACK;
    if let Some(key) = affinity {
        // Rendezvous hashing: when an engine is added or removed, only its own keys move.
        let ranked = candidates.iter().enumerate();
        let preferred = ranked.max_by_key(|(_, candidate)| splitmix64(key ^ candidate.id))?;
        if preferred.1.load() <= cap {
            return Some(preferred.0);
        }
    }
    let is_near = |candidate: &Candidate| candidate.is_resident && candidate.load() <= cap;
    pick_of_two(candidates, is_near, random).or_else(|| pick_of_two(candidates, |_| true, random))
}

fn pick_of_two(
    candidates: &[Candidate],
    wanted: impl Fn(&Candidate) -> bool,
    random: &mut impl FnMut() -> u64,
) -> Option<usize> {
    let count = candidates.iter().filter(|one| wanted(one)).count();
    let below = |bound: usize, number: u64| usize::try_from(number % bound as u64).unwrap_or(0);
    let nth = |n| candidates.iter().enumerate().filter(|(_, one)| wanted(one)).nth(n);
    let first = nth(below(count.max(1), random()))?;
    if count == 1 {
        return Some(first.0);
    }
    let mut n = below(count - 1, random());
    // The second differs from the first.
    n += usize::from(nth(n)?.0 >= first.0);
    let second = nth(n)?;
    Some(if second.1.load() < first.1.load() { second.0 } else { first.0 })
}

/// A hash that is stable across processes and versions.
pub(super) fn stable_hash(seed: u64, text: &[u8]) -> u64 {
    let add = |state: u64, word: [u8; 8]| {
        (state ^ u64::from_le_bytes(word)).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(29)
    };
    let (words, rest) = text.as_chunks();
    let state = words.iter().fold(seed ^ text.len() as u64, |state, word| add(state, *word));
    let mut last = [0; 8];
    last[..rest.len()].copy_from_slice(rest);
    splitmix64(add(state, last))
}

/// The finalizer of SplitMix64: each input bit affects half of the output bits.
fn splitmix64(mut z: u64) -> u64 {
    z = z.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn random_numbers() -> impl FnMut() -> u64 {
        let mut state = 0;
        move || {
            state = splitmix64(state);
            state
        }
    }

    fn pool(loads: &[u32]) -> Vec<Candidate> {
        let one = |(id, in_flight): (usize, &u32)| Candidate {
            id: stable_hash(0, &[u8::try_from(id).unwrap()]),
            in_flight: *in_flight,
            ..Candidate::default()
        };
        loads.iter().enumerate().map(one).collect()
    }

    #[test]
    fn the_less_loaded_of_two_random_engines_is_chosen() {
        let (pool, mut random) = (pool(&[5, 0, 9]), random_numbers());
        let mut chosen_counts = [0; 3];
        for _ in 0..3_000 {
            chosen_counts[choose(&pool, None, &mut random).unwrap()] += 1;
        }
        // The best wins both of its three pairs, the worst none.
        assert!(
            chosen_counts[1] > 1_800 && chosen_counts[0] > 800 && chosen_counts[2] == 0,
            "{chosen_counts:?}"
        );
    }

    #[test]
    fn waiting_requests_and_a_full_cache_weigh_more_than_running_requests() {
        let running = Candidate { running: 4, ..Candidate::default() };
        let waiting = Candidate { running: 2, waiting: 2, ..Candidate::default() };
        let full = Candidate { cache_usage: 1.0, ..Candidate::default() };
        assert!(waiting.load() > running.load() && full.load() > running.load());
        // Requests sent since the probe count; requests that ended since do not.
        let since =
            Candidate { running: 4, in_flight: 6, in_flight_at_probe: 3, ..Candidate::default() };
        assert!((since.load() - 7.0).abs() < 0.01, "{}", since.load());
        let ended =
            Candidate { running: 4, in_flight: 1, in_flight_at_probe: 4, ..Candidate::default() };
        assert!((ended.load() - 1.0).abs() < 0.01, "{}", ended.load());
    }

    #[test]
    fn a_session_stays_at_its_engine_until_the_load_cap() {
        let mut random = random_numbers();
        let key = affinity("kim", "editor", b"");
        assert_ne!(key, affinity("lee", "editor", b""));
        let mut pool = pool(&[0, 0, 0]);
        let preferred = choose(&pool, key, &mut random).unwrap();
        for in_flight in 0..=8 {
            pool[preferred].in_flight = in_flight;
            assert_eq!(choose(&pool, key, &mut random), Some(preferred));
        }
        pool[preferred].in_flight = 9;
        assert_ne!(choose(&pool, key, &mut random), Some(preferred));
        // Equal load everywhere does not move a session.
        for one in &mut pool {
            one.in_flight = 9;
        }
        assert_eq!(choose(&pool, key, &mut random), Some(preferred));
    }

    #[test]
    fn an_engine_with_the_adapter_in_memory_is_preferred_until_the_load_cap() {
        let (mut pool, mut random) = (pool(&[2, 0, 0]), random_numbers());
        pool[0].is_resident = true;
        assert!((0..50).all(|_| choose(&pool, None, &mut random) == Some(0)));
        pool[0].in_flight = 20;
        assert!((0..50).all(|_| choose(&pool, None, &mut random) != Some(0)));
    }

    #[test]
    fn a_short_prompt_has_no_affinity_and_a_long_one_has_by_its_prefix() {
        assert_eq!(affinity("kim", "", &[b'x'; AFFINITY_PREFIX_BYTES - 1]), None);
        let long = [[b'x'; AFFINITY_PREFIX_BYTES], [b'y'; AFFINITY_PREFIX_BYTES]].concat();
        assert_eq!(affinity("kim", "", &long), affinity("lee", "", &[b'x'; AFFINITY_PREFIX_BYTES]));
        assert_eq!(choose(&[], Some(1), &mut random_numbers()), None);
    }

    proptest! {
        #[test]
        fn the_most_loaded_of_three_or_more_is_never_chosen_and_the_cap_always_holds(
            loads in prop::collection::vec(0u32..200, 3..64),
            key in any::<Option<u64>>(),
            seed in any::<u64>(),
        ) {
            let (pool, mut seed) = (pool(&loads), seed);
            let mut random = || { seed = splitmix64(seed); seed };
            let chosen = choose(&pool, key, &mut random).unwrap();
            let (least, most) = (loads.iter().min().unwrap(), loads.iter().max().unwrap());
            let is_lone_worst = loads.iter().filter(|load| *load == most).count() == 1
                && loads[chosen] == *most;
            let within_cap = f64::from(loads[chosen]) <= f64::from(*least) * 1.5 + 8.0;
            prop_assert!(!is_lone_worst || (key.is_some() && within_cap), "{chosen} of {loads:?}");
        }

        #[test]
        fn removing_an_engine_moves_only_its_own_sessions(
            count in 2usize..40, removed in any::<prop::sample::Index>(), key in any::<u64>(),
        ) {
            let mut pool = pool(&vec![0; count]);
            let mut random = random_numbers();
            let before = pool[choose(&pool, Some(key), &mut random).unwrap()].id;
            let removed = pool.remove(removed.index(count)).id;
            let after = pool[choose(&pool, Some(key), &mut random).unwrap()].id;
            prop_assert!(before == removed || before == after);
        }
    }
}
