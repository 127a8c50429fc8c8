//! Calls like those of a team: 5 methods, 3 models, 50 owners with 4 keys each, times with a long tail, and a
//! few failures.

use hapa_proto::analytics::v1::UsageEvent;
use uuid::{NoContext, Uuid};

use crate::{MICROS, timestamp};

pub(crate) const METHODS: [&str; 5] = [
    "/hapa.codegen.v1.CodegenService/StreamGenerateCode",
    "/hapa.codegen.v1.CodegenService/GenerateCode",
    "/hapa.codegen.v1.CodegenService/ListModels",
    "/hapa.auth.v1.KeyService/GetKey",
    "/hapa.auth.v1.KeyService/ListKeys",
];
const MODELS: [&str; 3] = ["qwen2.5-coder-7b", "qwen2.5-coder-32b", "deepseek-coder-v2"];

/// The event of a number: equal numbers give equal events, except for the id.
pub(crate) fn event(number: u64, micros: u64) -> UsageEvent {
    let mut random = Random(number);
    let mut below = |bound| random.below(bound);
    let method = pick(&[0, 0, 0, 0, 1, 1, 2, 3, 3, 4], below(10));
    let (is_code, whose) = (method < 2, below(50));
    let failed = below(50) == 0;
    // From 2^a to 2^b microseconds, as many in every octave.
    let duration = if is_code { 200_000 << below(6) } else { 1_000 << below(4) };
    let duration = duration + below(duration);
    let tokens = if is_code { below(900) + 1 } else { 0 };
    UsageEvent {
        event_id: id(micros),
        time: Some(timestamp(micros)),
        method: METHODS[method].to_owned(),
        error_code: if failed { "E5001".to_owned() } else { String::new() },
        grpc_status: if failed { "DEADLINE_EXCEEDED" } else { "OK" }.to_owned(),
        key_id: format!("key_{whose:04}{:08}", below(4)),
        user_id: owner(whose),
        owner: owner(whose),
        model: if is_code { pick(&MODELS, below(3)) } else { "" }.to_owned(),
        task: if is_code { "generate" } else { "" }.to_owned(),
        prompt_tokens: u32::try_from(tokens * 2).unwrap_or_default(),
        completion_tokens: u32::try_from(tokens).unwrap_or_default(),
        duration_us: i64::try_from(duration).unwrap_or_default(),
        time_to_first_token_us: is_code.then(|| i64::try_from(duration / 8).unwrap_or_default()),
        inter_token_us: is_code.then(|| i64::try_from(duration / (tokens + 1)).unwrap_or_default()),
        cacheable: is_code,
        cached: is_code && below(5) == 0,
        service: if method < 3 { "codegen" } else { "auth" }.to_owned(),
        ..UsageEvent::default()
    }
}

/// SplitMix64.
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        (mixed ^ (mixed >> 31)) % bound
    }
}

/// An event's name, of this time.
pub(crate) fn id(micros: u64) -> String {
    let nanos = u32::try_from(micros % MICROS * 1_000).unwrap_or_default();
    let time = uuid::Timestamp::from_unix(NoContext, micros / MICROS, nanos);
    Uuid::new_v7(time).to_string()
}

pub(crate) fn owner(number: u64) -> String {
    format!("usr_{number:016}")
}

pub(crate) fn pick<T: Copy>(of: &[T], at: u64) -> T {
    of[usize::try_from(at).unwrap_or_default() % of.len()]
}
