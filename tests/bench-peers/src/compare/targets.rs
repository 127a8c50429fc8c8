//! The targets of HAPA, and whether a run meets them. A target without a measurement is left out.

use crate::compare::results::{Results, Run};
use crate::compare::system::System;
use crate::compare::table::{figure, pair};
use crate::compare::workload::Workload;
use crate::spec::Quantiles;

/// Growth from the smallest scale that still counts as flat.
const MAX_GROWTH: f64 = 1.15;

/// A target with its measurement.
#[derive(Debug)]
pub(crate) struct Target {
    pub(crate) name: String,
    pub(crate) bound: String,
    pub(crate) measured: String,
    pub(crate) is_met: bool,
}

const P50: fn(&Quantiles) -> f64 = |times| times.p50;
const P99: fn(&Quantiles) -> f64 = |times| times.p99;

fn at_most(name: &str, measured: Option<f64>, bound: Option<f64>, unit: &str) -> Option<Target> {
    let (measured, bound) = (measured?, bound?);
    Some(Target {
        name: name.to_owned(),
        bound: format!("<= {} {unit}", figure(Some(bound))),
        measured: figure(Some(measured)),
        is_met: measured <= bound,
    })
}

/// Both quantiles must be within their bounds.
fn quantiles(
    name: &str,
    [p50, p99]: [Option<f64>; 2],
    [bound_p50, bound_p99]: [Option<f64>; 2],
    unit: &str,
) -> Option<Target> {
    Some(Target {
        name: format!("{name}, p50 / p99"),
        bound: format!("<= {} {unit}", pair(Some(bound_p50?), Some(bound_p99?))),
        measured: pair(p50, p99),
        is_met: p50? <= bound_p50? && p99? <= bound_p99?,
    })
}

/// The targets in the order of the workloads.
pub(crate) fn evaluate(results: &Results) -> Vec<Target> {
    let found = [first_token(results), processor(results), memory(results), aborts(results)];
    let mut found: Vec<_> = found.into_iter().flatten().flatten().collect();
    found.extend(scale(results));
    found
}

fn first_token(results: &Results) -> Vec<Option<Target>> {
    let added = |system| [results.added(system, P50), results.added(system, P99)];
    let bounds = added(System::Floor).map(|floor| floor.map(|added| added * 1.2));
    vec![
        quantiles("W1a added first token, 1.2 x the floor", added(System::Hapa), bounds, "us"),
        at_most("first text of a cached answer", results.cached(System::Hapa), Some(150.0), "us"),
    ]
}

fn processor(results: &Results) -> Vec<Option<Target>> {
    let request = |workload| results.cpu_per_request(workload, System::Hapa);
    let token = |workload, system| results.cpu_per_token(workload, system);
    let (hapa, gateway) = (System::Hapa, System::Gateway);
    let floor = token(Workload::W3, System::Floor);
    let calls = results.calls_per_second(hapa).map(|rate| Target {
        name: "W4 unary calls".to_owned(),
        bound: ">= 8,000 req/s".to_owned(),
        measured: figure(Some(rate)),
        is_met: rate >= 8_000.0,
    });
    let twice = floor.map(|floor| floor * 2.0);
    vec![
        at_most("W1a CPU a request", request(Workload::W1a), Some(330.0), "us"),
        at_most("W1b CPU a request", request(Workload::W1b), Some(240.0), "us"),
        at_most("W2 CPU a token", token(Workload::W2, hapa), Some(3.5), "us"),
        at_most("W2 CPU a token, gateway", token(Workload::W2, gateway), Some(6.0), "us"),
        at_most("W3 CPU a token, the floor", token(Workload::W3, hapa), floor, "us"),
        at_most(
            "W3 CPU a token, gateway, 2 x the floor",
            token(Workload::W3, gateway),
            twice,
            "us",
        ),
        calls,
        at_most("W4 CPU a request", request(Workload::W4), Some(150.0), "us"),
    ]
}

fn memory(results: &Results) -> Vec<Option<Target>> {
    let stream = results.memory_per_stream(System::Hapa);
    vec![
        at_most("W3 memory a stream over idle", stream, Some(48.0), "KB"),
        at_most("idle memory", results.idle(System::Hapa), Some(40.0), "MB"),
    ]
}

fn aborts(results: &Results) -> Vec<Option<Target>> {
    let abort = |workload, system, name: &str, bounds: [f64; 2]| {
        let time = |at| results.abort(workload, system, at);
        quantiles(name, [time(P50), time(P99)], bounds.map(Some), "ms")
    };
    let (hapa, gateway) = ([0.6, 2.0], [1.0, 3.0]);
    vec![
        abort(Workload::W5, System::Hapa, "W5 abort", hapa),
        abort(Workload::W5h, System::Hapa, "W5h abort, silent engine", hapa),
        abort(Workload::W5, System::Gateway, "W5 abort, gateway", gateway),
        abort(Workload::W5h, System::Gateway, "W5h abort, silent engine, gateway", gateway),
    ]
}

fn scale(results: &Results) -> Vec<Target> {
    let mut runs: Vec<_> = results.of(Workload::Scale, System::Hapa).collect();
    runs.sort_by_key(|run| run.streams);
    let flat = |name: &str, value: fn(&Run) -> Option<f64>| {
        let values: Vec<_> = runs.iter().filter_map(|run| value(run)).collect();
        let first = *values.first()?;
        let counts: Vec<_> = runs.iter().map(|run| run.streams.to_string()).collect();
        let figures: Vec<_> = values.iter().map(|value| figure(Some(*value))).collect();
        Some(Target {
            name: format!("{name}, {} open streams", counts.join(" / ")),
            bound: "grows <= 15 %".to_owned(),
            measured: figures.join(" / "),
            is_met: values.iter().all(|value| *value <= first * MAX_GROWTH),
        })
    };
    let memory = |run: &Run| run.bytes_per_stream().map(|bytes| bytes / 1e3);
    let found = [flat("CPU a token in us", Run::cpu_per_token), flat("KB a stream", memory)];
    found.into_iter().flatten().collect()
}
