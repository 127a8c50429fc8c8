//! The workloads: what the simulator does, and what the clients do.

use std::time::Duration;

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

use crate::spec::{Leave, LoadShape, SimSettings};

/// A workload, in the order in which a round runs them. W3 is the first, because its memory must be measured in
/// new processes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Deserialize, Serialize)]
pub(crate) enum Workload {
    /// 200 streams of 64 tokens, the first after 50 ms and then one every 20 ms.
    #[value(name = "W3")]
    W3,
    /// Answers of 16 tokens as fast as possible, one at a time.
    #[value(name = "W1a")]
    W1a,
    /// Answers of 16 tokens as fast as possible, 32 at a time.
    #[value(name = "W1b")]
    W1b,
    /// Streams of 256 tokens as fast as possible, 16 at a time.
    #[value(name = "W2")]
    W2,
    /// Unary calls of 64 tokens, 32 at a time.
    #[value(name = "W4")]
    W4,
    /// The same question again and again, one at a time: a cached answer of 16 tokens.
    #[value(name = "cached")]
    Cached,
    /// Clients that disconnect after 5 tokens, of which one comes every 20 ms.
    #[value(name = "W5")]
    W5,
    /// Clients that disconnect after 100 ms in which the upstream sent headers only.
    #[value(name = "W5h")]
    W5h,
    /// 100, 1,000, 5,000 and 10,000 open streams.
    #[value(name = "scale")]
    Scale,
}

const ONE_AT_A_TIME: LoadShape = LoadShape {
    tokens: 16,
    concurrency: 1,
    count: u64::MAX,
    max_time: Duration::from_secs(2),
    warm_up: 100,
    spread: Duration::ZERO,
    is_unary: false,
    is_repeated: false,
    leave: None,
    hold: None,
};

/// The streams after which a system is ready, and by which it loads its code.
pub(crate) const FIRST_STREAMS: LoadShape =
    LoadShape { concurrency: 4, count: 20, warm_up: 0, max_time: Duration::MAX, ..ONE_AT_A_TIME };

impl Workload {
    /// Whether it runs on every system in every round.
    pub(crate) fn is_in_rounds(self) -> bool {
        self != Workload::Scale
    }

    pub(crate) fn settings(self) -> SimSettings {
        let interval = Duration::from_millis(20);
        match self {
            Workload::W3 => {
                SimSettings { first_token: Duration::from_millis(50), interval, is_silent: false }
            }
            Workload::W5 => SimSettings { first_token: interval, interval, is_silent: false },
            Workload::W5h => SimSettings { is_silent: true, ..SimSettings::default() },
            _ => SimSettings::default(),
        }
    }

    pub(crate) fn shape(self) -> LoadShape {
        let leave = |leave| LoadShape {
            tokens: 2_000,
            concurrency: 6,
            count: 120,
            warm_up: 6,
            max_time: Duration::MAX,
            leave: Some(leave),
            ..ONE_AT_A_TIME
        };
        let many = LoadShape { concurrency: 32, warm_up: 320, ..ONE_AT_A_TIME };
        match self {
            Workload::W1a => ONE_AT_A_TIME,
            Workload::W1b => many,
            Workload::W2 => {
                let max_time = Duration::from_secs(3);
                LoadShape { tokens: 256, concurrency: 16, warm_up: 48, max_time, ..ONE_AT_A_TIME }
            }
            Workload::W4 => LoadShape { tokens: 64, is_unary: true, ..many },
            Workload::Cached => LoadShape { is_repeated: true, ..ONE_AT_A_TIME },
            Workload::W5 => leave(Leave::Tokens(5)),
            Workload::W5h => leave(Leave::Time(Duration::from_millis(100))),
            Workload::W3 | Workload::Scale => LoadShape {
                tokens: 64,
                concurrency: 200,
                count: 400,
                warm_up: 200,
                max_time: Duration::MAX,
                spread: Duration::from_millis(1_300),
                ..ONE_AT_A_TIME
            },
        }
    }

    /// The name in arguments and results.
    pub(crate) fn name(self) -> String {
        self.to_possible_value().map(|value| value.get_name().to_owned()).unwrap_or_default()
    }
}
