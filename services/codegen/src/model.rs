//! The models that the engines serve: which one answers when none is named, and whether it is there.

use hapa_core::call::Call;
use hapa_proto::codegen::v1::{GetCodeHealthResponse, ListModelsResponse, Model};
use tokio::time::Instant;

use crate::error::Error;
use crate::route::{self, Board, Fleet, Listed};
use crate::task::{Chosen, Specialists};

/// Most models that a reply lists.
const MOST: usize = 1_000;

pub(crate) struct Models {
    fleet: Fleet,
    /// AI_MODEL_NAME.
    configured: Option<String>,
    specialists: Specialists,
}

impl Models {
    pub(crate) fn new(fleet: Fleet, configured: Option<String>, specialists: Specialists) -> Self {
        Models { fleet, configured: configured.filter(|name| !name.is_empty()), specialists }
    }

    /// The model that answers a call: the one that it names, if its caller may use that, else the
    /// one for the task.
    pub(crate) async fn choose(
        &self,
        call: &Call,
        task: &str,
        named: Option<&str>,
    ) -> Result<Chosen, Error> {
        let board = self.fleet.board().await;
        let caller = call.principal.as_ref();
        let allowed = caller.map_or(&[][..], |principal| &principal.allowed_models);
        if let Some(named) = named {
            if !allowed.is_empty() && !allowed.iter().any(|name| name == named) {
                return Err(Error::ModelNotAllowed);
            }
            let configured = self.configured.as_deref() == Some(named);
            if !configured && !board.listed().iter().any(|listed| listed.name == named) {
                call.report().unlisted();
            }
            return Ok(Chosen { model: named.to_owned(), warning: None });
        }
        let default = self.default(&board).await?;
        let served = board.listed().iter().filter(|listed| board.counts(listed).1 > 0);
        let served: Vec<_> = served.map(|listed| listed.name.as_str()).collect();
        self.specialists.choose(task, &served, &default, allowed)
    }

    /// The base model of an adapter; none for a base model, and where no engine says.
    pub(crate) fn parent(&self, model: &str) -> Option<String> {
        let board = self.fleet.known();
        let listed = board.listed().iter().find(|listed| listed.name == model)?;
        Some(listed.parent.clone()).filter(|parent| !parent.is_empty())
    }

    /// Tells a model from another that had its name before: "" where no engine has listed it.
    pub(crate) fn revision(&self, model: &str) -> String {
        let board = self.fleet.known();
        let listed = board.listed().iter().find(|listed| listed.name == model);
        let revision =
            |one: &Listed| format!("{:?} {:?} {}", one.root, one.parent, one.max_model_len);
        listed.map(revision).unwrap_or_default()
    }

    /// The model that answers when nothing says which.
    async fn default(&self, board: &Board) -> Result<String, Error> {
        if let Some(name) = &self.configured {
            return Ok(name.clone());
        }
        if let Some(name) = board.first_model() {
            return Ok(name.to_owned());
        }
        self.fleet.refresh().await;
        self.fleet
            .known()
            .first_model()
            .map(str::to_owned)
            .ok_or(Error::from(route::Error::NoModel))
    }

    pub(crate) async fn show(&self) -> Result<ListModelsResponse, Error> {
        let mut board = self.fleet.board().await;
        if board.troubles().well() == 0 {
            self.fleet.refresh().await;
            board = self.fleet.known();
        }
        let troubles = board.troubles();
        if troubles.well() == 0 {
            return Err(Error::Away(troubles.words()));
        }
        let default = self.known_default(&board);
        let mut models: Vec<_> =
            board.listed().iter().map(|listed| self.model(&board, listed, &default)).collect();
        models.sort_by(|a, b| a.name.cmp(&b.name));
        models.truncate(MOST);
        Ok(ListModelsResponse { models })
    }

    /// Asks the engines anew: what it says is true now.
    pub(crate) async fn health(&self) -> GetCodeHealthResponse {
        let asked = Instant::now();
        self.fleet.board().await;
        self.fleet.refresh().await;
        let latency_ms = u32::try_from(asked.elapsed().as_millis()).unwrap_or(u32::MAX);
        let board = self.fleet.known();
        let (model, troubles) = (self.known_default(&board), board.troubles());
        let (status, message) = match self.problem(&board) {
            Some(words) if troubles.well() == 0 => ("unhealthy", words),
            Some(words) => ("degraded", words),
            None if troubles.well() < troubles.all => ("degraded", troubles.words()),
            None => ("healthy", String::new()),
        };
        let served = board.listed().iter().filter(|listed| board.counts(listed).1 > 0);
        let models = u32::try_from(served.count()).unwrap_or(u32::MAX);
        GetCodeHealthResponse { status: status.to_owned(), model, models, latency_ms, message }
    }

    /// Whether code can be generated, as far as is known.
    pub(crate) async fn check(&self) -> Result<(), String> {
        self.problem(&*self.fleet.board().await).map_or(Ok(()), Err)
    }

    /// Why no code can be generated.
    fn problem(&self, board: &Board) -> Option<String> {
        let (model, troubles) = (self.known_default(board), board.troubles());
        if troubles.well() == 0 {
            return Some(troubles.words());
        }
        if model.is_empty() {
            return Some(Error::from(route::Error::NoModel).to_string());
        }
        let listed = board.listed().iter().find(|listed| listed.name == model);
        let served = listed.is_some_and(|listed| board.counts(listed).1 > 0);
        (!served).then(|| format!("no engine serves {model}"))
    }

    fn known_default(&self, board: &Board) -> String {
        let configured = self.configured.as_deref();
        configured.or_else(|| board.first_model()).unwrap_or_default().to_owned()
    }

    fn model(&self, board: &Board, listed: &Listed, default: &str) -> Model {
        let (replicas, replicas_healthy) = board.counts(listed);
        let status = match replicas_healthy {
            0 => "unhealthy",
            well if well < replicas => "degraded",
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
            replicas_resident: listed.resident,
            status: status.to_owned(),
        }
    }
}
