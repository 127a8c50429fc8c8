//! Failures like those of a team: 6 codes, 5 methods, 50 owners, and 400 causes of which a dozen are most of
//! the failures.

use hapa_proto::errors::v1::Occurrence;
use uuid::Uuid;

use crate::events::{METHODS, Random, id, owner, pick};
use crate::timestamp;

const CODES: [&str; 6] = ["E5006", "E5001", "E5007", "E4011", "E4001", "E5003"];
const PARTS: [&str; 10] = [
    "replica",
    "tokenizer",
    "scheduler",
    "adapter",
    "socket",
    "cache",
    "grammar",
    "sampler",
    "prefix",
    "worker",
];
const TROUBLES: [&str; 8] = [
    "was refused",
    "broke off",
    "took too long",
    "is full",
    "is not there",
    "answered nonsense",
    "was reset",
    "is restarting",
];

/// The occurrence of a number: equal numbers give equal occurrences, except for the id.
pub(crate) fn occurrence(number: u64, micros: u64) -> Occurrence {
    let mut random = Random(number ^ 0x0CC0);
    // Few causes are usual.
    let usual = random.below(10) > 0;
    let (parts, troubles) = if usual { (3, 2) } else { (10, 8) };
    let part = pick(&PARTS, random.below(parts));
    let kind = random.below(troubles);
    let (trouble, code) = (pick(&TROUBLES, kind), pick(&CODES, kind));
    let method = pick(&METHODS, random.below(if usual { 2 } else { 5 }));
    let owner = owner(random.below(50));
    let shown = format!("INC-20260101-{:08X}", Random(number).below(1 << 32));
    Occurrence {
        event_id: id(micros),
        incident_id: if random.below(5) > 0 { shown } else { String::new() },
        time: Some(timestamp(micros)),
        error_code: code.to_owned(),
        method: method.to_owned(),
        message: format!("{part} {} {trouble}", random.below(32)),
        // The fields that form the fingerprint.
        causes: vec![format!(
            "{part} {trouble}: connection {} to 10.0.0.{}",
            random.below(900),
            random.below(250)
        )],
        service: "codegen".to_owned(),
        version: "1.2.0".to_owned(),
        request_id: Uuid::now_v7().to_string(),
        actor: format!("key:key_{number:012}"),
        owner,
        duration: Some(prost_types::Duration { seconds: 1, nanos: 0 }),
        ..Occurrence::default()
    }
}
