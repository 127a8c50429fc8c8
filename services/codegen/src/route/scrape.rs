//! What an engine's /metrics say, in the names of vLLM 0.32. Other engines have other names or no
//! such page: then nothing is known, and our own requests are all that counts.

use std::time::Duration;

use tokio::time::Instant;

/// How much an engine has to do.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Load {
    pub(super) running: f64,
    pub(super) waiting: f64,
    /// The fullest cache of its ranks, 0 to 1.
    pub(super) cache: f64,
    /// Tokens that it made since it started; none where it does not say.
    pub(super) made: Option<f64>,
    /// Adapters that are in its memory.
    pub(super) adapters: Vec<String>,
}

/// Adapters of one engine that are remembered.
const MOST_ADAPTERS: usize = 1_000;

impl Load {
    /// Of a page in Prometheus' text format. Ranks of one engine add up.
    pub(super) fn read(page: &str) -> Load {
        let mut load = Load::default();
        let mut latest = f64::NEG_INFINITY;
        for line in page.lines() {
            let Some((name, labels, value)) = sample(line) else { continue };
            match name {
                "num_requests_running" => load.running += value,
                "num_requests_waiting" => load.waiting += value,
                "kv_cache_usage_perc" => load.cache = load.cache.max(value),
                "generation_tokens_total" => load.made = Some(load.made.unwrap_or(0.0) + value),
                // Its value is the time at which these were its labels: the latest is now.
                "lora_requests_info" if value >= latest => {
                    latest = value;
                    load.adapters = adapters(labels);
                }
                _ => {}
            }
        }
        load
    }
}

/// Name, labels and value of one of vLLM's numbers.
fn sample(line: &str) -> Option<(&str, &str, f64)> {
    let (series, value) = line.strip_prefix("vllm:")?.rsplit_once(' ')?;
    let (name, labels) = series.split_once('{').unwrap_or((series, ""));
    let value: f64 = value.parse().ok()?;
    (value.is_finite() && value >= 0.0).then_some((name, labels, value))
}

fn adapters(labels: &str) -> Vec<String> {
    let of = |name: &str| {
        let at = labels.find(name)? + name.len();
        labels[at..].strip_prefix("=\"")?.split('"').next()
    };
    let names = ["running_lora_adapters", "waiting_lora_adapters"].into_iter().filter_map(of);
    let names = names.flat_map(|names| names.split(',')).filter(|name| !name.is_empty());
    names.take(MOST_ADAPTERS).map(str::to_owned).collect()
}

/// Whether an engine gets on: one that runs requests and makes no token is stuck.
#[derive(Debug, Default)]
pub(super) struct Progress {
    made: f64,
    /// Since when it runs requests and has made no token.
    flat: Option<Instant>,
    stuck: bool,
}

impl Progress {
    /// Takes the latest look. `unheard`: our own requests that have seen nothing yet.
    pub(super) fn is_stuck(
        &mut self,
        load: &Load,
        unheard: u32,
        bound: Duration,
        now: Instant,
    ) -> bool {
        let made = load.made.unwrap_or(0.0);
        // An engine that began anew counts from zero.
        let moved = (made - std::mem::replace(&mut self.made, made)).abs() > 0.0;
        let idle = load.made.is_none() || load.running < 1.0;
        // Once it is stuck it is so also when ours have given up.
        if moved || idle || (unheard == 0 && !self.stuck) {
            (self.flat, self.stuck) = (None, false);
            return false;
        }
        self.stuck |= now >= *self.flat.get_or_insert(now) + bound;
        self.stuck
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const PAGE: &str = r#"# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="m"} 3.0
vllm:num_requests_running{engine="1",model_name="m"} 2.0
vllm:num_requests_waiting{engine="0",model_name="m"} 1.0
vllm:num_requests_waiting_by_reason{engine="0",model_name="m",reason="capacity"} 1.0
vllm:kv_cache_usage_perc{engine="0",model_name="m"} 0.25
vllm:kv_cache_usage_perc{engine="1",model_name="m"} 0.5
vllm:generation_tokens_total{engine="0",model_name="m"} 1.25e+03
vllm:generation_tokens_created{engine="0",model_name="m"} 1.7e+09
vllm:lora_requests_info{max_lora="4",running_lora_adapters="old",waiting_lora_adapters=""} 1.7e+09
vllm:lora_requests_info{max_lora="4",running_lora_adapters="a,b",waiting_lora_adapters="c"} 1.8e+09
vllm:lora_requests_info{max_lora="4",running_lora_adapters="",waiting_lora_adapters=""} 1.6e+09
process_open_fds 12
"#;

    #[test]
    fn ranks_add_up_and_the_latest_adapters_count() {
        let load = Load::read(PAGE);
        let adapters = ["a", "b", "c"].map(str::to_owned).to_vec();
        let made = Some(1_250.0);
        assert_eq!(load, Load { running: 5.0, waiting: 1.0, cache: 0.5, made, adapters });
        assert_eq!(Load::read("llamacpp:requests_processing 1\n"), Load::default());
    }

    #[test]
    fn an_engine_that_runs_and_makes_nothing_while_we_wait_is_stuck() {
        let (begin, bound) = (Instant::now(), Duration::from_secs(10));
        let load = |made: f64| Load { running: 1.0, made: Some(made), ..Load::default() };
        let mut progress = Progress::default();
        let mut look = |made, unheard, seconds| {
            progress.is_stuck(&load(made), unheard, bound, begin + Duration::from_secs(seconds))
        };
        assert!(!look(5.0, 1, 0) && !look(5.0, 1, 1) && !look(5.0, 1, 10));
        assert!(look(5.0, 1, 11));
        assert!(look(5.0, 0, 12), "nobody waits for it any more");
        assert!(!look(6.0, 1, 12), "it made a token");
        assert!(!look(6.0, 1, 13) && !look(6.0, 0, 30), "nobody waits");
        assert!(!look(6.0, 1, 31) && look(6.0, 1, 41));
        assert!(!Progress::default().is_stuck(&Load::default(), 1, Duration::ZERO, begin));
    }

    proptest! {
        #[test]
        fn no_page_makes_it_panic(page in "(vllm:[a-z_]{0,30}[{]?[^\n]{0,40}[ ]?[0-9.eE+-]{0,9}\n?){0,9}") {
            Load::read(&page);
        }
    }
}
