//! Parses an engine's /metrics page, with the metric names of vLLM 0.32. For engines with other names
//! or without the page, the load is unknown and only our own requests count.

use std::time::Duration;

use tokio::time::Instant;

/// The load of an engine.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct EngineLoad {
    pub(super) running: f64,
    pub(super) waiting: f64,
    /// The highest KV cache usage of its ranks, 0 to 1.
    pub(super) cache_usage: f64,
    /// Tokens generated since the engine started; `None` if it does not report them.
    pub(super) generated_tokens: Option<f64>,
    /// Adapters in its memory.
    pub(super) adapters: Vec<String>,
}

/// Maximum number of adapters read from one engine.
const MAX_ADAPTERS: usize = 1_000;

impl EngineLoad {
    /// Parses a page in Prometheus text format. Values of the ranks of one engine are summed.
    pub(super) fn parse(page: &str) -> EngineLoad {
        let mut load = EngineLoad::default();
        let mut latest = f64::NEG_INFINITY;
        for line in page.lines() {
            let Some((name, labels, value)) = sample(line) else { continue };
            match name {
                "num_requests_running" => load.running += value,
                "num_requests_waiting" => load.waiting += value,
                "kv_cache_usage_perc" => load.cache_usage = load.cache_usage.max(value),
                "generation_tokens_total" => {
                    load.generated_tokens = Some(load.generated_tokens.unwrap_or(0.0) + value);
                }
                // The value is the time at which the labels were current, so the latest one is.
                "lora_requests_info" if value >= latest => {
                    latest = value;
                    load.adapters = parse_adapters(labels);
                }
                _ => {}
            }
        }
        load
    }
}

/// Name, labels and value of a vLLM sample.
fn sample(line: &str) -> Option<(&str, &str, f64)> {
    let (series, value) = line.strip_prefix("vllm:")?.rsplit_once(' ')?;
    let (name, labels) = series.split_once('{').unwrap_or((series, ""));
    let value: f64 = value.parse().ok()?;
    (value.is_finite() && value >= 0.0).then_some((name, labels, value))
}

fn parse_adapters(labels: &str) -> Vec<String> {
    let label_value = |name: &str| {
        let at = labels.find(name)? + name.len();
        labels[at..].strip_prefix("=\"")?.split('"').next()
    };
    let names =
        ["running_lora_adapters", "waiting_lora_adapters"].into_iter().filter_map(label_value);
    let names = names.flat_map(|names| names.split(',')).filter(|name| !name.is_empty());
    names.take(MAX_ADAPTERS).map(str::to_owned).collect()
}

/// Detects an engine that runs requests but generates no tokens.
#[derive(Debug, Default)]
pub(super) struct StallDetector {
    generated_tokens: f64,
    /// Since when it has run requests without generating a token.
    no_tokens_since: Option<Instant>,
    is_stalled: bool,
}

impl StallDetector {
    /// Takes the latest probe; returns whether the engine is stalled. `awaiting_first_token` is the
    /// number of our own requests without a token so far.
    pub(super) fn observe(
        &mut self,
        load: &EngineLoad,
        awaiting_first_token: u32,
        timeout: Duration,
        now: Instant,
    ) -> bool {
        let generated_tokens = load.generated_tokens.unwrap_or(0.0);
        // Not `>`: a restarted engine counts from zero.
        let moved = (generated_tokens
            - std::mem::replace(&mut self.generated_tokens, generated_tokens))
        .abs()
            > 0.0;
        let idle = load.generated_tokens.is_none() || load.running < 1.0;
        // A stall persists after our own requests have given up.
        if moved || idle || (awaiting_first_token == 0 && !self.is_stalled) {
            (self.no_tokens_since, self.is_stalled) = (None, false);
            return false;
        }
        self.is_stalled |= now >= *self.no_tokens_since.get_or_insert(now) + timeout;
        self.is_stalled
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
    fn values_of_ranks_are_summed_and_the_latest_adapters_count() {
        let load = EngineLoad::parse(PAGE);
        let adapters = ["a", "b", "c"].map(str::to_owned).to_vec();
        let generated_tokens = Some(1_250.0);
        assert_eq!(
            load,
            EngineLoad { running: 5.0, waiting: 1.0, cache_usage: 0.5, generated_tokens, adapters }
        );
        assert_eq!(EngineLoad::parse("llamacpp:requests_processing 1\n"), EngineLoad::default());
    }

    #[test]
    fn an_engine_that_generates_nothing_while_our_requests_wait_is_stalled() {
        let (begin, timeout) = (Instant::now(), Duration::from_secs(10));
        let load = |generated_tokens: f64| EngineLoad {
            running: 1.0,
            generated_tokens: Some(generated_tokens),
            ..EngineLoad::default()
        };
        let mut detector = StallDetector::default();
        let mut observe = |generated_tokens, awaiting_first_token, seconds| {
            detector.observe(
                &load(generated_tokens),
                awaiting_first_token,
                timeout,
                begin + Duration::from_secs(seconds),
            )
        };
        assert!(!observe(5.0, 1, 0) && !observe(5.0, 1, 1) && !observe(5.0, 1, 10));
        assert!(observe(5.0, 1, 11));
        assert!(observe(5.0, 0, 12), "the stall persists without waiting requests");
        assert!(!observe(6.0, 1, 12), "it generated a token");
        assert!(!observe(6.0, 1, 13) && !observe(6.0, 0, 30), "no request waits");
        assert!(!observe(6.0, 1, 31) && observe(6.0, 1, 41));
        assert!(!StallDetector::default().observe(
            &EngineLoad::default(),
            1,
            Duration::ZERO,
            begin
        ));
    }

    proptest! {
        #[test]
        fn no_page_makes_the_parser_panic(page in "(vllm:[a-z_]{0,30}[{]?[^\n]{0,40}[ ]?[0-9.eE+-]{0,9}\n?){0,9}") {
            EngineLoad::parse(&page);
        }
    }
}
