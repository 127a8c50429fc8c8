//! The catalog of models that the engines serve: the choice of a model, the list and the health status.

use hapa_core::call::Call;
use hapa_proto::codegen::v1::{GetCodeHealthResponse, ListModelsResponse, Model};
use tokio::time::Instant;

use crate::error::Error;
use crate::request::task::{ModelChoice, Specialists};
use crate::upstream::pool::{DispatchError, EnginePool, ModelSummary, PoolSnapshot};

/// Maximum number of models in a reply.
const MAX_LISTED_MODELS: usize = 1_000;

pub(crate) struct ModelCatalog {
    pool: EnginePool,
    /// AI_MODEL_NAME.
    configured: Option<String>,
    specialists: Specialists,
}

impl ModelCatalog {
    pub(crate) fn new(
        pool: EnginePool,
        configured: Option<String>,
        specialists: Specialists,
    ) -> Self {
        ModelCatalog { pool, configured: configured.filter(|name| !name.is_empty()), specialists }
    }

    /// Chooses the model of a call: the named one, if the key may use it, or else the model for the task.
    pub(crate) async fn choose(
        &self,
        call: &Call,
        task: &str,
        named: Option<&str>,
    ) -> Result<ModelChoice, Error> {
        let snapshot = self.pool.ready_snapshot().await;
        let principal = call.principal.as_ref();
        let allowed = principal.map_or(&[][..], |principal| &principal.allowed_models);
        if let Some(named) = named {
            if !allowed.is_empty() && !allowed.iter().any(|name| name == named) {
                return Err(Error::ModelNotAllowed);
            }
            let is_configured = self.configured.as_deref() == Some(named);
            if !is_configured && snapshot.model(named).is_none() {
                call.stats().unknown_model();
            }
            return Ok(ModelChoice { model: named.to_owned(), warning: None });
        }
        let default = self.default_model(&snapshot).await?;
        let served: Vec<_> = snapshot.served_models().map(|model| model.name.as_str()).collect();
        self.specialists.choose(task, &served, &default, allowed)
    }

    /// The base model of an adapter; `None` for a base model and if no engine reports one.
    pub(crate) fn base_model(&self, model: &str) -> Option<String> {
        let snapshot = self.pool.snapshot();
        let model = snapshot.model(model)?;
        Some(model.parent.clone()).filter(|parent| !parent.is_empty())
    }

    /// Distinguishes a model from an earlier one with the same name; empty if no engine lists it.
    pub(crate) fn revision(&self, model: &str) -> String {
        let snapshot = self.pool.snapshot();
        let revision =
            |one: &ModelSummary| format!("{:?} {:?} {}", one.root, one.parent, one.max_model_len);
        snapshot.model(model).map(revision).unwrap_or_default()
    }

    /// The configured model, or else the first listed one.
    async fn default_model(&self, snapshot: &PoolSnapshot) -> Result<String, Error> {
        if let Some(name) = &self.configured {
            return Ok(name.clone());
        }
        if let Some(name) = snapshot.default_model() {
            return Ok(name.to_owned());
        }
        self.pool.refresh().await;
        self.pool
            .snapshot()
            .default_model()
            .map(str::to_owned)
            .ok_or(Error::from(DispatchError::NoModel))
    }

    /// The models, and what was learned of the engines if the caller has all permissions.
    pub(crate) async fn list(&self, call: &Call) -> Result<ListModelsResponse, Error> {
        let mut snapshot = self.pool.ready_snapshot().await;
        if snapshot.unhealthy_summary().healthy_count() == 0 {
            self.pool.refresh().await;
            snapshot = self.pool.snapshot();
        }
        let summary = snapshot.unhealthy_summary();
        if summary.healthy_count() == 0 {
            return Err(Error::NoEngine(summary.message()));
        }
        let default = self.cached_default(&snapshot);
        let mut models: Vec<_> = snapshot
            .models()
            .iter()
            .map(|listed| self.to_proto(&snapshot, listed, &default))
            .collect();
        models.sort_by(|a, b| a.name.cmp(&b.name));
        models.truncate(MAX_LISTED_MODELS);
        let engine_findings = if call.is_admin() { snapshot.engine_findings() } else { Vec::new() };
        Ok(ListModelsResponse { models, engine_findings })
    }

    /// The health status after a new probe of all engines.
    pub(crate) async fn health(&self) -> GetCodeHealthResponse {
        let started = Instant::now();
        self.pool.ready_snapshot().await;
        self.pool.refresh().await;
        let latency_ms = u32::try_from(started.elapsed().as_millis()).unwrap_or(u32::MAX);
        let snapshot = self.pool.snapshot();
        let (model, summary) = (self.cached_default(&snapshot), snapshot.unhealthy_summary());
        let (status, message) = match self.problem(&snapshot) {
            Some(message) if summary.healthy_count() == 0 => ("unhealthy", message),
            Some(message) => ("degraded", message),
            None if summary.healthy_count() < summary.total => ("degraded", summary.message()),
            None => ("healthy", String::new()),
        };
        let models = u32::try_from(snapshot.served_models().count()).unwrap_or(u32::MAX);
        GetCodeHealthResponse { status: status.to_owned(), model, models, latency_ms, message }
    }

    /// Health check: whether code can be generated, according to the last probe.
    pub(crate) async fn check(&self) -> Result<(), String> {
        self.problem(&*self.pool.ready_snapshot().await).map_or(Ok(()), Err)
    }

    /// Why no code can be generated; `None` if it can.
    fn problem(&self, snapshot: &PoolSnapshot) -> Option<String> {
        let (model, summary) = (self.cached_default(snapshot), snapshot.unhealthy_summary());
        if summary.healthy_count() == 0 {
            return Some(summary.message());
        }
        if model.is_empty() {
            return Some(Error::from(DispatchError::NoModel).to_string());
        }
        let is_served = snapshot.served_models().any(|served| served.name == model);
        (!is_served).then(|| format!("no engine serves {model}"))
    }

    fn cached_default(&self, snapshot: &PoolSnapshot) -> String {
        let configured = self.configured.as_deref();
        configured.or_else(|| snapshot.default_model()).unwrap_or_default().to_owned()
    }

    fn to_proto(&self, snapshot: &PoolSnapshot, listed: &ModelSummary, default: &str) -> Model {
        let (replicas, replicas_healthy) = snapshot.endpoint_counts(listed);
        let status = match replicas_healthy {
            0 => "unhealthy",
            healthy if healthy < replicas => "degraded",
            _ => "healthy",
        };
        Model {
            default: listed.name == *default,
            name: listed.name.clone(),
            tasks: self.specialists.tasks_of(&listed.name),
            parent: listed.parent.clone(),
            max_model_len: listed.max_model_len,
            replicas,
            replicas_healthy,
            replicas_resident: listed.resident_count,
            status: status.to_owned(),
        }
    }
}
