//! Questions in, code out: prompts, the engine's stream, and what is said about it.

mod budget;
mod cache;
mod completion;
mod engine;
mod error;
mod fence;
#[cfg(feature = "fuzzing")]
#[doc(hidden)]
pub mod fuzz;
mod generation;
mod idempotency;
mod model;
mod order;
mod prompt;
mod question;
pub mod route;
mod service;
mod share;
mod span;
mod task;
mod turn;
mod unicode;
mod validate;
mod watch;

use std::sync::Arc;
use std::time::Duration;

use clap::ArgAction;
use hapa_core::access::{Access, Rpc};
use hapa_core::config::{CommonConfig, Wrong, seconds};
use hapa_core::health_check::HealthCheck;
use hapa_core::principal_cache::PrincipalCacheHandle;
use hapa_core::service::{ServiceSpec, Shutdown};
use hapa_proto::codegen::v1::cache_service_server::CacheServiceServer;
use hapa_proto::codegen::v1::codegen_service_server::CodegenServiceServer;
use hapa_transport::peer::AuthClient;
use secrecy::SecretString;

use crate::budget::Budgets;
pub use crate::cache::Config as CacheConfig;
use crate::cache::{Cache, Caches};
use crate::completion::{Completions, Running};
use crate::engine::{Engine, EngineAccess};
use crate::idempotency::Idempotency;
use crate::model::Models;
use crate::route::{Bounds, Fleet, Source};
use crate::service::Codegen;
use crate::task::Specialists;
use crate::turn::{TurnConfig, Turns};
use crate::validate::Validators;
use crate::watch::Patience;

/// Settings of this service.
#[derive(clap::Args, Clone, Debug)]
#[command(next_help_heading = "Codegen")]
#[group(id = "codegen")]
pub struct Config {
    /// The OpenAI-compatible servers that have the models, vLLM for one: base URLs, comma-separated;
    /// dns+http://name:port/v1 stands for every address of a name.
    #[arg(long, env = "AI_MODEL_ENDPOINT", default_value = "http://127.0.0.1:8002/v1")]
    pub ai_model_endpoint: String,
    /// Its key, where it asks for one.
    #[arg(long, env = "AI_MODEL_API_KEY", hide_env_values = true)]
    pub ai_model_api_key: Option<SecretString>,
    /// Whether what engines say of their failures is logged, at debug and without secrets. It may repeat
    /// prompts.
    #[arg(long, env = "LOG_ENGINE_ERRORS", action = ArgAction::Set, default_value_t = false)]
    pub log_engine_errors: bool,
    /// The model that answers when none is named; default: the first that an endpoint lists.
    #[arg(long, env = "AI_MODEL_NAME")]
    pub ai_model_name: Option<String>,
    /// Models or adapters for tasks, such as fix=my-fixer,test=my-tester; the others are done by
    /// autocomplete (complete), prompt (generate, optimize, test), comment (comment, explain, review)
    /// and error_fix (fix), where an engine serves them.
    #[arg(long, env = "TASK_MODELS", default_value = "", hide_default_value = true)]
    pub task_models: String,
    /// The model that answers for one that no engine serves or that a key may not use; default: the
    /// one that answers when none is named.
    #[arg(long, env = "FALLBACK_MODEL")]
    pub fallback_model: Option<String>,
    /// Longest wait for the first token, in seconds.
    #[arg(long, env = "FIRST_TOKEN_TIMEOUT_SECONDS", default_value = "60", value_parser = seconds)]
    pub first_token_timeout_seconds: Duration,
    /// An engine that runs requests and makes no token for so long is taken for stuck, in seconds.
    #[arg(long, env = "ENGINE_STALL_SECONDS", default_value = "20", value_parser = seconds)]
    pub engine_stall_seconds: Duration,
    /// Longest gap between two tokens, in seconds.
    #[arg(long, env = "TOKEN_GAP_TIMEOUT_SECONDS", default_value = "30", value_parser = seconds)]
    pub token_gap_timeout_seconds: Duration,
    /// Longest that a whole answer may take, in seconds.
    #[arg(long, env = "VLLM_TIMEOUT_SECONDS", default_value = "300", value_parser = seconds)]
    pub vllm_timeout_seconds: Duration,
    /// How much is asked of the engines at once.
    #[command(flatten)]
    pub turn: TurnConfig,
    /// Silence after which a stream sends a heartbeat, in seconds.
    #[arg(long, env = "HEARTBEAT_SECONDS", default_value = "10", value_parser = seconds)]
    pub heartbeat_seconds: Duration,
    /// What is remembered of answers.
    #[command(flatten)]
    pub cache: CacheConfig,
}

impl Config {
    fn access(&self) -> EngineAccess {
        EngineAccess::new(self.ai_model_api_key.as_ref(), self.log_engine_errors)
    }
}

const CACHE_RPCS: &[Rpc] = &[
    Rpc::new("/hapa.codegen.v1.CacheService/ClearCache", Access::Scope("cache:admin")),
    Rpc::new("/hapa.codegen.v1.CacheService/GetCacheStats", Access::Scope("cache:admin")),
];

/// The documented limits of the original's endpoints, but for completion.
const RPCS: &[Rpc] = &[
    Rpc::new("/hapa.codegen.v1.CodegenService/GenerateCode", Access::Scope("codegen:generate"))
        .limited(50, 60),
    Rpc::new(
        "/hapa.codegen.v1.CodegenService/StreamGenerateCode",
        Access::Scope("codegen:generate"),
    )
    .limited(20, 60),
    // The original allowed 50 in a minute, which a fast writer uses up in half of one.
    Rpc::new("/hapa.codegen.v1.CodegenService/CompleteCode", Access::Scope("codegen:complete"))
        .limited(120, 60),
    Rpc::new(
        "/hapa.codegen.v1.CodegenService/StreamCompleteCode",
        Access::Scope("codegen:complete"),
    )
    .limited(120, 60),
    Rpc::new("/hapa.codegen.v1.CodegenService/ValidateCode", Access::Scope("codegen:generate"))
        .limited(100, 3_600),
    Rpc::new("/hapa.codegen.v1.CodegenService/ListModels", Access::Caller),
    Rpc::new("/hapa.codegen.v1.CodegenService/GetCodeHealth", Access::Caller),
];

/// Asks each engine which models it serves: how many, or why it does not say. Bounded for each.
pub async fn survey(config: &Config) -> Vec<(String, Result<usize, String>)> {
    let urls = config.ai_model_endpoint.split(',').map(str::trim).filter(|url| !url.is_empty());
    let ask = async |url: &str| {
        let engine = Engine::new(url, None, &config.access());
        let engine = engine.map_err(|error| error.to_string())?;
        engine.models().await.map(|models| models.len()).map_err(|error| error.to_string())
    };
    let mut found = Vec::new();
    for url in urls {
        found.push((url.to_owned(), ask(url).await));
    }
    found
}

/// What the service needs of its process.
#[derive(Debug)]
pub struct Dependencies {
    /// Settings that services share.
    pub common: CommonConfig,
    /// The auth service, which reserves and settles tokens.
    pub auth: AuthClient,
    /// The shutdown of the server.
    pub shutdown: Shutdown,
    /// The server's cache of principals.
    pub principals: PrincipalCacheHandle,
}

/// The services.
pub fn service(config: &Config, dependencies: Dependencies) -> anyhow::Result<ServiceSpec> {
    let Dependencies { common, auth, shutdown, principals } = dependencies;
    let mut spec = ServiceSpec::default();
    let specialists = Specialists::new(&config.task_models, config.fallback_model.as_deref())
        .map_err(|wrong| Wrong::new("TASK_MODELS", wrong))?;
    let sources = Source::read(&config.ai_model_endpoint)
        .map_err(|words| Wrong::new("AI_MODEL_ENDPOINT", words))?;
    let bounds = Bounds {
        attempt: config.first_token_timeout_seconds / 3,
        stuck: config.engine_stall_seconds,
    };
    let fleet = Fleet::new(sources, config.access(), bounds)?;
    fleet.watch(&mut spec);
    let patience = Patience {
        first_token: config.first_token_timeout_seconds,
        between_tokens: config.token_gap_timeout_seconds,
        whole: config.vllm_timeout_seconds,
        heartbeat: config.heartbeat_seconds,
    };
    let models = Arc::new(Models::new(fleet.clone(), config.ai_model_name.clone(), specialists));
    spec.check(engine_check(Arc::clone(&models)));
    let budgets = Budgets::new(auth, &mut spec, config.vllm_timeout_seconds);
    let turns = Turns::new(config.turn.clone());
    let streams_end = shutdown.end_streams.clone();
    let completions = Completions::new(Running {
        fleet: fleet.clone(),
        models: Arc::clone(&models),
        turns: turns.clone(),
        budgets: budgets.clone(),
        patience,
        streams_end: streams_end.clone(),
    });
    let cache = Cache::new(&config.cache, common.redis_url(), &mut spec)?;
    let redis_timeout = config.cache.cache_timeout_seconds;
    let idempotency = Idempotency::new(common.redis_url(), redis_timeout, &shutdown, &mut spec)?;
    let caches = Caches { cache: cache.clone(), principals };
    let codegen = Codegen {
        fleet,
        models,
        turns,
        budgets,
        cache,
        patience,
        validators: Validators::default(),
        streams_end,
        completions,
        idempotency,
    };
    spec.add(CodegenServiceServer::new(codegen), RPCS);
    spec.add(CacheServiceServer::new(caches), CACHE_RPCS);
    Ok(spec)
}

/// Needed by no service as far as load balancers go: replicas share the engine, so another would
/// answer no better, and what this one says of an engine that is away (E5006, when to try again)
/// tells a caller more than a connection that is refused.
fn engine_check(models: Arc<Models>) -> HealthCheck {
    let run = move || {
        let models = Arc::clone(&models);
        async move { models.check().await }
    };
    HealthCheck::new("ai_model", "the AI model can't be asked", run)
}
