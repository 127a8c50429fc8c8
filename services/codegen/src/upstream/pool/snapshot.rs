//! An immutable view of all endpoints and of the models that each serves. Rebuilt when that changes,
//! and read by every request.

use std::collections::HashMap;
use std::sync::Arc;

use hapa_proto::codegen::v1::EngineFindings;
use tokio::time::Instant;

use super::balancer::{Candidate, choose};
use super::endpoint::Endpoint;
use crate::upstream::engine::Operation;

#[derive(Default)]
pub(crate) struct PoolSnapshot {
    pub(super) endpoints: Vec<Arc<Endpoint>>,
    placements: HashMap<String, Vec<ModelPlacement>>,
    models: Vec<ModelSummary>,
}

/// An endpoint that serves a model.
#[derive(Clone, Copy)]
struct ModelPlacement {
    /// Index into `PoolSnapshot::endpoints`.
    endpoint: usize,
    /// A base model, or an adapter that the engine has in memory.
    is_resident: bool,
}

/// A model or an adapter, and the endpoints that serve it.
#[derive(Clone, Debug, Default)]
pub(crate) struct ModelSummary {
    pub(crate) name: String,
    pub(crate) parent: String,
    /// Origin of the weights, as the first engine that lists the model reports it.
    pub(crate) root: String,
    pub(crate) max_model_len: u32,
    /// Indices into `PoolSnapshot::endpoints`.
    endpoints: Vec<usize>,
    pub(crate) resident_count: u32,
}

/// The number of endpoints, and the problems of the unhealthy ones.
pub(crate) struct UnhealthySummary {
    pub(crate) total: usize,
    problems: Vec<String>,
}

impl UnhealthySummary {
    pub(crate) fn healthy_count(&self) -> usize {
        self.total - self.problems.len()
    }

    /// The number of unhealthy endpoints and the problem of the first; empty if all are healthy.
    pub(crate) fn message(&self) -> String {
        match (self.total, self.problems.as_slice()) {
            (0, _) => "no engine is known at the moment".to_owned(),
            (_, []) => String::new(),
            (1, [only]) => only.clone(),
            (total, [first, ..]) => {
                format!("{} of {total} engines are unhealthy: {first}", self.problems.len())
            }
        }
    }
}

/// Why no endpoint can be picked.
#[derive(Debug)]
pub(super) enum NoEndpoint {
    /// All suitable endpoints were tried, or there are none.
    NoneLeft,
    /// The circuit breakers of all suitable endpoints are open, until this time at the earliest.
    CircuitOpen(Instant),
}

/// Selection criteria of one request.
pub(super) struct EndpointQuery<'q> {
    pub(super) model: &'q str,
    pub(super) operation: Operation,
    pub(super) affinity: Option<u64>,
    /// Ids of the endpoints that this request has tried.
    pub(super) tried: &'q [u64],
}

impl PoolSnapshot {
    pub(super) fn new(endpoints: Vec<Arc<Endpoint>>) -> PoolSnapshot {
        let mut snapshot = PoolSnapshot { endpoints, ..PoolSnapshot::default() };
        let mut rows: HashMap<String, usize> = HashMap::new();
        for endpoint in 0..snapshot.endpoints.len() {
            let served = snapshot.endpoints[endpoint].served_models();
            for model in served.models {
                let row = *rows.entry(model.id.clone()).or_insert(snapshot.models.len());
                if row == snapshot.models.len() {
                    let summary = ModelSummary { name: model.id.clone(), ..Default::default() };
                    snapshot.models.push(summary);
                }
                let parent = model.parent.unwrap_or_default();
                let is_resident = parent.is_empty() || served.adapters.contains(&model.id);
                let summary = &mut snapshot.models[row];
                summary.resident_count += u32::from(is_resident);
                summary.endpoints.push(endpoint);
                if summary.parent.is_empty() {
                    summary.parent = parent;
                }
                if summary.root.is_empty() {
                    summary.root = model.root.unwrap_or_default();
                }
                summary.limit_length(model.max_model_len);
                let placement = ModelPlacement { endpoint, is_resident };
                snapshot.placements.entry(model.id).or_default().push(placement);
            }
        }
        snapshot
    }

    /// Whether any endpoint is known to serve the model.
    pub(super) fn serves(&self, model: &str) -> bool {
        self.placements.contains_key(model)
    }

    /// Every model that an endpoint listed in its last successful probe, in endpoint order.
    pub(crate) fn models(&self) -> &[ModelSummary] {
        &self.models
    }

    /// A listed model by name.
    pub(crate) fn model(&self, name: &str) -> Option<&ModelSummary> {
        self.models.iter().find(|model| model.name == name)
    }

    /// The models that a healthy endpoint serves.
    pub(crate) fn served_models(&self) -> impl Iterator<Item = &ModelSummary> {
        self.models.iter().filter(|model| self.endpoint_counts(model).1 > 0)
    }

    /// The number of endpoints that serve a model, and of the healthy ones among them.
    pub(crate) fn endpoint_counts(&self, model: &ModelSummary) -> (u32, u32) {
        let healthy = model.endpoints.iter().filter(|index| self.endpoints[**index].is_healthy());
        let number = |count: usize| u32::try_from(count).unwrap_or(u32::MAX);
        (number(model.endpoints.len()), number(healthy.count()))
    }

    /// The first listed base model of a healthy endpoint; if none is healthy, of any endpoint.
    pub(crate) fn default_model(&self) -> Option<&str> {
        // Engines may list the base model after its adapters.
        let mut bases = self.models.iter().filter(|model| model.parent.is_empty());
        let healthy = self.served_models().find(|model| model.parent.is_empty());
        let first = healthy.or_else(|| bases.next()).or(self.models.first());
        first.map(|model| model.name.as_str())
    }

    /// What was learned of the engines, sorted by name, without those of which nothing was learned.
    pub(crate) fn engine_findings(&self) -> Vec<EngineFindings> {
        let findings = self.endpoints.iter().filter_map(|endpoint| endpoint.findings());
        let mut findings: Vec<_> = findings.collect();
        findings.sort_by(|a, b| a.name.cmp(&b.name));
        findings
    }

    /// The problems of the endpoints that are not healthy.
    pub(crate) fn unhealthy_summary(&self) -> UnhealthySummary {
        let unhealthy = self.endpoints.iter().filter(|endpoint| !endpoint.is_healthy());
        let problems = unhealthy.map(|endpoint| {
            let default = if endpoint.was_probed() {
                "requests to the engine fail"
            } else {
                "the engine has not been probed yet"
            };
            endpoint.problem().unwrap_or_else(|| default.to_owned())
        });
        UnhealthySummary { total: self.endpoints.len(), problems: problems.collect() }
    }

    /// Picks an endpoint that serves the model. If none is known to, picks among all, because some
    /// engines accept any model name. Endpoints that are unreachable, or that lack the operation, are picked only
    /// if no other is left.
    pub(super) fn pick(
        &self,
        query: &EndpointQuery<'_>,
        now: Instant,
        random: &mut impl FnMut() -> u64,
    ) -> Result<&Arc<Endpoint>, NoEndpoint> {
        let (mut suitable, mut last_resort) = (Vec::new(), Vec::new());
        let mut next_trial: Option<Instant> = None;
        let mut consider = |index: usize, is_resident: bool| {
            let endpoint = &self.endpoints[index];
            if query.tried.contains(&endpoint.id) {
                return;
            }
            match endpoint.admits(now) {
                Ok(())
                    if endpoint.is_up()
                        && !endpoint.problems.lacks(query.operation, query.model, now) =>
                {
                    suitable.push((index, endpoint.candidate(is_resident)));
                }
                Ok(()) => last_resort.push((index, endpoint.candidate(is_resident))),
                Err(at) => next_trial = Some(next_trial.map_or(at, |other| other.min(at))),
            }
        };
        match self.placements.get(query.model) {
            Some(placements) => {
                for placement in placements {
                    consider(placement.endpoint, placement.is_resident);
                }
            }
            None => {
                for index in 0..self.endpoints.len() {
                    consider(index, false);
                }
            }
        }
        let pickable = if suitable.is_empty() { last_resort } else { suitable };
        let (indices, candidates): (Vec<usize>, Vec<Candidate>) = pickable.into_iter().unzip();
        match choose(&candidates, query.affinity, random) {
            Some(chosen) => Ok(&self.endpoints[indices[chosen]]),
            None => Err(next_trial.map_or(NoEndpoint::NoneLeft, NoEndpoint::CircuitOpen)),
        }
    }
}

impl ModelSummary {
    /// Lowers `max_model_len` to the smallest of all endpoints: what fits there fits everywhere.
    /// 0 means unknown.
    fn limit_length(&mut self, reported: Option<u32>) {
        let reported = reported.filter(|length| *length > 0).unwrap_or(u32::MAX);
        let current = if self.max_model_len == 0 { u32::MAX } else { self.max_model_len };
        let smallest = reported.min(current);
        self.max_model_len = if smallest == u32::MAX { 0 } else { smallest };
    }
}
