//! Which engine is asked: pure functions over a snapshot, with the random numbers given.
//!
//! Two are drawn and the one with less to do is taken: nearly as good as the least loaded of all, and
//! callers who look at the same old numbers don't all run to one. Two things go before that, each only
//! while the engine it leads to is not over the cap: what was asked before along with this is in its
//! cache, or the adapter is in its memory.

/// An engine that may be asked, as far as is known.
#[derive(Clone, Copy, Debug, Default)]
pub struct Candidate {
    /// The same for the same engine in every process and after every start.
    pub id: u64,
    /// Requests that waited when the engine was looked at.
    pub waiting: u32,
    /// Requests that ran then.
    pub running: u32,
    /// Our own requests, now.
    pub own: u32,
    /// Our own requests when the engine was looked at.
    pub own_then: u32,
    /// How full its cache was, 0 to 1.
    pub cache: f32,
    /// Whether it has the wanted adapter in memory.
    pub resident: bool,
}

/// A full cache is as bad as so many requests: beyond it the engine throws work away.
const FULL_CACHE: f32 = 8.0;
/// A favourite may have so many times what the least loaded has to do, and so many requests more.
const IMBALANCE: f32 = 1.5;
const SLACK: f32 = 8.0;
/// Of a prompt: as much as decides, and at least what is worth going to a certain engine for.
const PREFIX: usize = 4 * 1024;

impl Candidate {
    /// About how many requests it has to do. What came since it was looked at is guessed by ours.
    #[expect(clippy::cast_precision_loss, reason = "far below 2^24 requests")]
    fn load(&self) -> f32 {
        let then = self.waiting.saturating_add(self.running);
        let now = then.saturating_add(self.own).saturating_sub(self.own_then).max(self.own);
        // Those that wait count twice: it is full.
        let full = (self.cache - 0.8).clamp(0.0, 0.2) * 5.0 * FULL_CACHE;
        now as f32 + self.waiting as f32 + full
    }
}

/// What requests that belong together share: their session, else the begin of a long prompt.
pub fn affinity(owner: &str, session: &str, prompt: &[u8]) -> Option<u64> {
    if session.is_empty() {
        return prompt.get(..PREFIX).map(|begin| hash(1, begin));
    }
    // Sessions of two owners may have one name.
    Some(hash(hash(2, owner.as_bytes()), session.as_bytes()))
}

/// The engine to ask, by its place; none of none.
pub fn choose(
    candidates: &[Candidate],
    affinity: Option<u64>,
    random: &mut impl FnMut() -> u64,
) -> Option<usize> {
    let loads = candidates.iter().map(Candidate::load);
    let cap = loads.fold(f32::INFINITY, f32::min) * IMBALANCE + SLACK;
    if let Some(key) = affinity {
        // Rendezvous: when an engine comes or goes, only what it has or gets moves.
        let ranked = candidates.iter().enumerate();
        let favourite = ranked.max_by_key(|(_, candidate)| mix(key ^ candidate.id))?;
        if favourite.1.load() <= cap {
            return Some(favourite.0);
        }
    }
    let near = |candidate: &Candidate| candidate.resident && candidate.load() <= cap;
    draw_two(candidates, near, random).or_else(|| draw_two(candidates, |_| true, random))
}

fn draw_two(
    candidates: &[Candidate],
    wanted: impl Fn(&Candidate) -> bool,
    random: &mut impl FnMut() -> u64,
) -> Option<usize> {
    let many = candidates.iter().filter(|one| wanted(one)).count();
    let below = |bound: usize, number: u64| usize::try_from(number % bound as u64).unwrap_or(0);
    let nth = |n| candidates.iter().enumerate().filter(|(_, one)| wanted(one)).nth(n);
    let first = nth(below(many.max(1), random()))?;
    if many == 1 {
        return Some(first.0);
    }
    let mut n = below(many - 1, random());
    // The second is another than the first.
    n += usize::from(nth(n)?.0 >= first.0);
    let second = nth(n)?;
    Some(if second.1.load() < first.1.load() { second.0 } else { first.0 })
}

/// A number for a text, the same everywhere.
pub(super) fn hash(seed: u64, text: &[u8]) -> u64 {
    let add = |state: u64, word: [u8; 8]| {
        (state ^ u64::from_le_bytes(word)).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(29)
    };
    let (words, rest) = text.as_chunks();
    let state = words.iter().fold(seed ^ text.len() as u64, |state, word| add(state, *word));
    let mut last = [0; 8];
    last[..rest.len()].copy_from_slice(rest);
    mix(add(state, last))
}

/// The finish of SplitMix64: every bit of the input moves half of the output's.
fn mix(mut z: u64) -> u64 {
    z = z.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn numbers() -> impl FnMut() -> u64 {
        let mut state = 0;
        move || {
            state = mix(state);
            state
        }
    }

    fn fleet(loads: &[u32]) -> Vec<Candidate> {
        let one = |(id, own): (usize, &u32)| Candidate {
            id: hash(0, &[u8::try_from(id).unwrap()]),
            own: *own,
            ..Candidate::default()
        };
        loads.iter().enumerate().map(one).collect()
    }

    #[test]
    fn of_two_that_are_drawn_the_less_loaded_is_asked() {
        let (fleet, mut random) = (fleet(&[5, 0, 9]), numbers());
        let mut asked = [0; 3];
        for _ in 0..3_000 {
            asked[choose(&fleet, None, &mut random).unwrap()] += 1;
        }
        // The best wins both of its three pairs, the worst none.
        assert!(asked[1] > 1_800 && asked[0] > 800 && asked[2] == 0, "{asked:?}");
    }

    #[test]
    fn what_waits_and_a_full_cache_weigh_more_than_what_runs() {
        let running = Candidate { running: 4, ..Candidate::default() };
        let waiting = Candidate { running: 2, waiting: 2, ..Candidate::default() };
        let full = Candidate { cache: 1.0, ..Candidate::default() };
        assert!(waiting.load() > running.load() && full.load() > running.load());
        // What we sent since then is counted, what ended since then is not.
        let since = Candidate { running: 4, own: 6, own_then: 3, ..Candidate::default() };
        assert!((since.load() - 7.0).abs() < 0.01, "{}", since.load());
        let ended = Candidate { running: 4, own: 1, own_then: 4, ..Candidate::default() };
        assert!((ended.load() - 1.0).abs() < 0.01, "{}", ended.load());
    }

    #[test]
    fn a_session_stays_where_it_is_until_that_is_too_much() {
        let mut random = numbers();
        let key = affinity("kim", "editor", b"");
        assert_ne!(key, affinity("lee", "editor", b""));
        let mut fleet = fleet(&[0, 0, 0]);
        let favourite = choose(&fleet, key, &mut random).unwrap();
        for own in 0..=8 {
            fleet[favourite].own = own;
            assert_eq!(choose(&fleet, key, &mut random), Some(favourite));
        }
        fleet[favourite].own = 9;
        assert_ne!(choose(&fleet, key, &mut random), Some(favourite));
        // Where all have as much to do it is no reason.
        for one in &mut fleet {
            one.own = 9;
        }
        assert_eq!(choose(&fleet, key, &mut random), Some(favourite));
    }

    #[test]
    fn an_adapter_is_asked_for_where_it_is_in_memory_until_that_is_too_much() {
        let (mut fleet, mut random) = (fleet(&[2, 0, 0]), numbers());
        fleet[0].resident = true;
        assert!((0..50).all(|_| choose(&fleet, None, &mut random) == Some(0)));
        fleet[0].own = 20;
        assert!((0..50).all(|_| choose(&fleet, None, &mut random) != Some(0)));
    }

    #[test]
    fn a_short_prompt_has_no_favourite_and_a_long_one_has_by_its_begin() {
        assert_eq!(affinity("kim", "", &[b'x'; PREFIX - 1]), None);
        let long = [[b'x'; PREFIX], [b'y'; PREFIX]].concat();
        assert_eq!(affinity("kim", "", &long), affinity("lee", "", &[b'x'; PREFIX]));
        assert_eq!(choose(&[], Some(1), &mut numbers()), None);
    }

    proptest! {
        #[test]
        fn the_worst_of_three_or_more_is_never_asked_and_the_cap_always_holds(
            loads in prop::collection::vec(0u32..200, 3..64),
            key in any::<Option<u64>>(),
            seed in any::<u64>(),
        ) {
            let (fleet, mut seed) = (fleet(&loads), seed);
            let mut random = || { seed = mix(seed); seed };
            let chosen = choose(&fleet, key, &mut random).unwrap();
            let (least, most) = (loads.iter().min().unwrap(), loads.iter().max().unwrap());
            let is_lone_worst = loads.iter().filter(|load| *load == most).count() == 1
                && loads[chosen] == *most;
            let within_cap = f64::from(loads[chosen]) <= f64::from(*least) * 1.5 + 8.0;
            prop_assert!(!is_lone_worst || (key.is_some() && within_cap), "{chosen} of {loads:?}");
        }

        #[test]
        fn when_an_engine_goes_only_its_own_sessions_move(
            count in 2usize..40, gone in any::<prop::sample::Index>(), key in any::<u64>(),
        ) {
            let mut fleet = fleet(&vec![0; count]);
            let mut random = numbers();
            let before = fleet[choose(&fleet, Some(key), &mut random).unwrap()].id;
            let gone = fleet.remove(gone.index(count)).id;
            let after = fleet[choose(&fleet, Some(key), &mut random).unwrap()].id;
            prop_assert!(before == gone || before == after);
        }
    }
}
