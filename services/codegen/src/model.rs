//! The models that the engine serves: which one answers when none is named, and whether it is there.

use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use hapa_proto::codegen::v1::{GetCodeHealthResponse, ListModelsResponse, Model};
use tokio::time::Instant;

use crate::engine::{self, Engine, ListedModel};
use crate::error::Error;
use crate::task::Specialists;

/// Most models that a reply lists.
const MOST: usize = 1_000;
/// How long a list is believed.
const FRESH: Duration = Duration::from_secs(5);

pub(crate) struct Models {
    engine: Engine,
    /// AI_MODEL_NAME.
    configured: Option<String>,
    /// What the engine listed, until it says that it has a model no more.
    discovered: RwLock<Option<Arc<Discovered>>>,
}

struct Discovered {
    names: Vec<String>,
    /// The base model, where the engine lists it behind its adapters.
    first: Option<String>,
    until: Instant,
}

impl Models {
    pub(crate) fn new(engine: Engine, configured: Option<String>) -> Self {
        let configured = configured.filter(|name| !name.is_empty());
        Models { engine, configured, discovered: RwLock::default() }
    }

    /// The names of what the engine serves, and the one that answers when none is named.
    pub(crate) async fn served(&self) -> Result<(Vec<String>, String), Error> {
        let known = self.known().filter(|known| Instant::now() < known.until);
        if known.is_none() {
            self.list().await?;
        }
        let names = self.known().map(|known| known.names.clone()).unwrap_or_default();
        Ok((names, self.known_default().ok_or(Error::NoModel)?))
    }

    /// The engine says that it has not the default model: ask anew next time.
    pub(crate) fn forget(&self) {
        *self.discovered.write().unwrap_or_else(PoisonError::into_inner) = None;
    }

    fn known(&self) -> Option<Arc<Discovered>> {
        self.discovered.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn known_default(&self) -> Option<String> {
        self.configured.clone().or_else(|| self.known()?.first.clone())
    }

    async fn list(&self) -> Result<Vec<ListedModel>, engine::Error> {
        let mut models = self.engine.models().await?;
        models.truncate(MOST);
        let first = models.iter().find(|model| model.parent.is_none()).or(models.first());
        let first = first.map(|model| model.id.clone());
        let names = models.iter().map(|model| model.id.clone()).collect();
        let known = Discovered { names, first, until: Instant::now() + FRESH };
        *self.discovered.write().unwrap_or_else(PoisonError::into_inner) = Some(Arc::new(known));
        Ok(models)
    }

    pub(crate) async fn show(
        &self,
        specialists: &Specialists,
    ) -> Result<ListModelsResponse, Error> {
        let listed = self.list().await?;
        let default = self.known_default();
        let mut models: Vec<_> = listed
            .into_iter()
            .map(|model| Model {
                default: default.as_ref() == Some(&model.id),
                tasks: specialists.tasks_of(&model.id),
                name: model.id,
                parent: model.parent.unwrap_or_default(),
                max_model_len: model.max_model_len.unwrap_or(0),
            })
            .collect();
        models.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(ListModelsResponse { models })
    }

    pub(crate) async fn health(&self) -> GetCodeHealthResponse {
        let asked = Instant::now();
        let listed = self.list().await;
        let latency_ms = u32::try_from(asked.elapsed().as_millis()).unwrap_or(u32::MAX);
        let model = self.known_default().unwrap_or_default();
        let (status, models, message) = match listed {
            Err(error) => ("unhealthy", 0, error.to_string()),
            Ok(listed) if listed.iter().any(|one| one.id == model) => {
                ("healthy", listed.len(), String::new())
            }
            Ok(listed) if model.is_empty() => {
                ("degraded", listed.len(), Error::NoModel.to_string())
            }
            Ok(listed) => ("degraded", listed.len(), format!("the engine does not serve {model}")),
        };
        let models = u32::try_from(models).unwrap_or(u32::MAX);
        GetCodeHealthResponse { status: status.to_owned(), model, models, latency_ms, message }
    }
}
