//! The codegen service: generates, completes and validates code with the models behind vLLM-compatible
//! engines.

mod cache_service;
mod complete;
mod error;
#[cfg(feature = "fuzzing")]
#[doc(hidden)]
pub mod fuzz;
mod generate;
mod idempotency;
mod request;
mod rpc;
mod schedule;
mod stream;
pub mod upstream;
mod validate;

use std::sync::Arc;
use std::time::Duration;

use clap::ArgAction;
use hapa_core::access::{Access, Rpc};
use hapa_core::config::{CommonConfig, ConfigError, seconds};
use hapa_core::health_check::HealthCheck;
use hapa_core::principal_cache::PrincipalCacheHandle;
use hapa_core::service::{ServiceSpec, Shutdown};
use hapa_proto::codegen::v1::cache_service_server::CacheServiceServer;
use hapa_proto::codegen::v1::codegen_service_server::CodegenServiceServer;
use hapa_transport::peer::AuthClient;
use secrecy::SecretString;

use crate::cache_service::Caches;
use crate::complete::Completions;
use crate::generate::Generations;
use crate::idempotency::Idempotency;
use crate::request::model::ModelCatalog;
use crate::request::task::Specialists;
use crate::rpc::Codegen;
use crate::schedule::Scheduler;
use crate::schedule::budget::Budgets;
use crate::schedule::fair_queue::{FairQueue, QueueConfig};
pub use crate::stream::cache::CacheConfig;
use crate::stream::cache::ResponseCache;
use crate::stream::{Engines, Pipeline, Timeouts};
use crate::upstream::engine::EngineOptions;
use crate::upstream::pool::{EnginePool, EngineSource, PoolTimeouts};
use crate::validate::ValidationPool;

/// Settings of this service.
#[derive(clap::Args, Clone, Debug)]
#[command(next_help_heading = "Codegen")]
#[group(id = "codegen")]
pub struct Config {
    /// Base URLs of the OpenAI-compatible engines, such as vLLM, comma-separated. dns+http://name:port/v1
    /// stands for every address of a DNS name.
    #[arg(long, env = "AI_MODEL_ENDPOINT", default_value = "http://127.0.0.1:8002/v1")]
    pub ai_model_endpoint: String,
    /// API key of the engines, if they require one.
    #[arg(long, env = "AI_MODEL_API_KEY", hide_env_values = true)]
    pub ai_model_api_key: Option<SecretString>,
    /// Whether error texts of engines are logged, at level debug and without secrets. They may repeat
    /// prompts.
    #[arg(long, env = "LOG_ENGINE_ERRORS", action = ArgAction::Set, value_parser = hapa_core::config::boolean, default_value_t = false)]
    pub log_engine_errors: bool,
    /// Model of requests that name none; default: the first model that an engine lists.
    #[arg(long, env = "AI_MODEL_NAME")]
    pub ai_model_name: Option<String>,
    /// Models or adapters for tasks, such as fix=my-fixer,test=my-tester. Defaults, if an engine
    /// serves them: autocomplete (complete), prompt (generate, optimize, test), comment (comment,
    /// explain, review) and error_fix (fix).
    #[arg(long, env = "TASK_MODELS", default_value = "", hide_default_value = true)]
    pub task_models: String,
    /// Replacement for a task's model that no engine serves or that the key may not use; default: the
    /// model of AI_MODEL_NAME.
    #[arg(long, env = "FALLBACK_MODEL")]
    pub fallback_model: Option<String>,
    /// Maximum wait for the first token, in seconds.
    #[arg(long, env = "FIRST_TOKEN_TIMEOUT_SECONDS", default_value = "60", value_parser = seconds)]
    pub first_token_timeout_seconds: Duration,
    /// Time after which an engine that runs requests but generates no token counts as stalled, in
    /// seconds.
    #[arg(long, env = "ENGINE_STALL_SECONDS", default_value = "20", value_parser = seconds)]
    pub engine_stall_seconds: Duration,
    /// Maximum gap between two tokens, in seconds.
    #[arg(long, env = "TOKEN_GAP_TIMEOUT_SECONDS", default_value = "30", value_parser = seconds)]
    pub token_gap_timeout_seconds: Duration,
    /// Maximum duration of reasoning, from its first token to the first token of the answer, in seconds.
    #[arg(long, env = "REASONING_TIMEOUT_SECONDS", default_value = "300", value_parser = seconds)]
    pub reasoning_timeout_seconds: Duration,
    /// Maximum duration of a whole response, in seconds.
    #[arg(long, env = "VLLM_TIMEOUT_SECONDS", default_value = "300", value_parser = seconds)]
    pub vllm_timeout_seconds: Duration,
    /// Limits of concurrent generations.
    #[command(flatten)]
    pub queue: QueueConfig,
    /// Time without an event after which a stream sends a heartbeat, in seconds.
    #[arg(long, env = "HEARTBEAT_SECONDS", default_value = "10", value_parser = seconds)]
    pub heartbeat_seconds: Duration,
    /// Settings of the response cache.
    #[command(flatten)]
    pub cache: CacheConfig,
}

impl Config {
    fn timeouts(&self) -> Timeouts {
        Timeouts {
            first_token: self.first_token_timeout_seconds,
            between_tokens: self.token_gap_timeout_seconds,
            reasoning: self.reasoning_timeout_seconds,
            whole: self.vllm_timeout_seconds,
            heartbeat: self.heartbeat_seconds,
        }
    }

    fn engine_options(&self) -> EngineOptions {
        EngineOptions::new(self.ai_model_api_key.as_ref(), self.log_engine_errors)
    }
}

const CACHE_RPCS: &[Rpc] = &[
    Rpc::new("/hapa.codegen.v1.CacheService/ClearCache", Access::Scope("cache:admin")),
    Rpc::new("/hapa.codegen.v1.CacheService/GetCacheStats", Access::Scope("cache:admin")),
];

/// The rate limits are those documented for the predecessor's endpoints, except for completion.
const RPCS: &[Rpc] = &[
    Rpc::new("/hapa.codegen.v1.CodegenService/GenerateCode", Access::Scope("codegen:generate"))
        .limited(50, 60)
        .model_call(),
    Rpc::new(
        "/hapa.codegen.v1.CodegenService/StreamGenerateCode",
        Access::Scope("codegen:generate"),
    )
    .limited(20, 60)
    .model_call(),
    // The predecessor allowed 50 a minute, which fast typing uses up in half a minute.
    Rpc::new("/hapa.codegen.v1.CodegenService/CompleteCode", Access::Scope("codegen:complete"))
        .limited(120, 60)
        .model_call(),
    Rpc::new(
        "/hapa.codegen.v1.CodegenService/StreamCompleteCode",
        Access::Scope("codegen:complete"),
    )
    .limited(120, 60)
    .model_call(),
    Rpc::new("/hapa.codegen.v1.CodegenService/ValidateCode", Access::Scope("codegen:generate"))
        .limited(100, 3_600),
    Rpc::new("/hapa.codegen.v1.CodegenService/ListModels", Access::Authenticated),
    Rpc::new("/hapa.codegen.v1.CodegenService/GetCodeHealth", Access::Authenticated),
];

/// The reply of an engine to a request for its models.
#[derive(Clone, Debug)]
pub struct EngineSurvey {
    /// Number of models and adapters.
    pub models: usize,
    /// The base URL in use, without credentials and query, if it differs from the setting.
    pub found_base_url: Option<String>,
}

/// Requests the list of models of each engine: its survey, or the error. Each request has a timeout.
pub async fn survey(config: &Config) -> Vec<(String, Result<EngineSurvey, String>)> {
    let urls = config.ai_model_endpoint.split(',').map(str::trim).filter(|url| !url.is_empty());
    let count_models = async |url: &str| {
        let source = EngineSource::parse_list(url)?.remove(0);
        let engine = source.build_engine(None, &config.engine_options());
        let engine = engine.map_err(|error| error.to_string())?;
        let models = engine.models().await.map_err(|error| error.to_string())?;
        Ok(EngineSurvey { models: models.len(), found_base_url: engine.found_base_url() })
    };
    let mut results = Vec::new();
    for url in urls {
        results.push((url.to_owned(), count_models(url).await));
    }
    results
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

/// Builds the gRPC services, their health checks and their background tasks.
pub fn service(config: &Config, dependencies: Dependencies) -> anyhow::Result<ServiceSpec> {
    let Dependencies { common, auth, shutdown, principals } = dependencies;
    let mut spec = ServiceSpec::default();
    let specialists = Specialists::new(&config.task_models, config.fallback_model.as_deref())
        .map_err(|error| ConfigError::new("TASK_MODELS", error))?;
    let sources = EngineSource::parse_list(&config.ai_model_endpoint)
        .map_err(|error| ConfigError::new("AI_MODEL_ENDPOINT", error))?;
    let timeouts = PoolTimeouts {
        attempt: config.first_token_timeout_seconds / 3,
        stall: config.engine_stall_seconds,
    };
    let pool = EnginePool::new(sources, config.engine_options(), timeouts)?;
    pool.spawn_background_tasks(&mut spec);
    let models =
        Arc::new(ModelCatalog::new(pool.clone(), config.ai_model_name.clone(), specialists));
    spec.check(engine_check(Arc::clone(&models)));
    let budgets = Budgets::new(auth, &mut spec, config.vllm_timeout_seconds);
    let queue = FairQueue::new(config.queue.clone());
    let engines = Engines {
        pool,
        scheduler: Scheduler { queue, budgets },
        timeouts: config.timeouts(),
        shutdown: shutdown.end_streams.clone(),
    };
    let cache = ResponseCache::new(&config.cache, common.redis_url(), &mut spec)?;
    let pipeline = Arc::new(Pipeline::new(engines, cache.clone()));
    let redis_timeout = config.cache.cache_timeout_seconds;
    let idempotency = Idempotency::new(common.redis_url(), redis_timeout, &shutdown, &mut spec)?;
    let codegen = Codegen {
        models: Arc::clone(&models),
        generations: Generations::new(Arc::clone(&models), Arc::clone(&pipeline)),
        completions: Completions::new(models, pipeline),
        validation_pool: ValidationPool::default(),
        idempotency,
    };
    let caches = Caches { cache, principals };
    spec.add(CodegenServiceServer::new(codegen), RPCS);
    spec.add(CacheServiceServer::new(caches), CACHE_RPCS);
    Ok(spec)
}

/// Not part of readiness: all replicas share the engines, so a load balancer gains nothing from another
/// replica. An error with a code (E5006) and a retry delay helps a client more than a refused connection.
fn engine_check(models: Arc<ModelCatalog>) -> HealthCheck {
    let run = move || {
        let models = Arc::clone(&models);
        async move { models.check().await }
    };
    HealthCheck::new("ai_model", "the AI model is unavailable", run)
}
