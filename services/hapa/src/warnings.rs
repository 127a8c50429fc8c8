//! Warnings about settings that are valid but unsuitable for the deployment.

use hapa_core::config::Environment;
use hapa_store::database::Engine;

use crate::{Roles, renamed_settings};

/// Whether a warning applies, and its sentence, which starts with the name of a setting.
type Row = (bool, &'static str);

/// One sentence per warning, which starts with the name of a setting.
pub(crate) fn warnings(roles: &Roles) -> Vec<String> {
    let rows = store_rows(roles).into_iter().chain(security_rows(roles)).chain(peer_rows(roles));
    let unsuitable = rows.filter(|(applies, _)| *applies).map(|(_, warning)| warning.to_owned());
    renamed_settings::warnings(&roles.settings).chain(unsuitable).collect()
}

fn store_rows(roles: &Roles) -> [Row; 3] {
    let common = &roles.server.common;
    let is_sqlite = Engine::from_url(&common.store_url("")) == Ok(Engine::Sqlite);
    let has_store = roles.auth.is_some() || roles.errors.is_some() || roles.analytics.is_some();
    let has_redis = common.redis_url().is_some();
    [
        (
            has_store && is_sqlite && has_redis,
            "REDIS_URL is set for replicas, but only one process can use a SQLite store: set DATABASE_URL",
        ),
        (
            is_production(roles) && has_store && is_sqlite,
            "DATABASE_URL: production data is in SQLite files, which suit only one process on a disk with backups",
        ),
        (
            is_production(roles) && !is_sqlite && !has_redis,
            "REDIS_URL is not set: each replica applies the rate limits on its own",
        ),
    ]
}

/// Warnings in production only.
fn security_rows(roles: &Roles) -> [Row; 5] {
    let server = &roles.server;
    let is_production = is_production(roles);
    let codegen_in_production = |has_problem: fn(&hapa_codegen::Config) -> bool| {
        is_production && roles.codegen.as_ref().is_some_and(has_problem)
    };
    let trusts_loopback_only = server.trusted_proxies.iter().all(|net| net.addr().is_loopback());
    [
        (
            codegen_in_production(|codegen| codegen.log_engine_errors),
            "LOG_ENGINE_ERRORS is on in production: the log may hold prompts at level debug",
        ),
        (
            is_production && server.reflects(),
            "REFLECTION is on in production: it lists every method to every client",
        ),
        (
            is_production && !server.limits.rate_limit_enabled,
            "RATE_LIMIT_ENABLED is off in production",
        ),
        (
            codegen_in_production(|codegen| is_local(&codegen.ai_model_endpoint)),
            "AI_MODEL_ENDPOINT is on this machine in production: set it if the default is not intended",
        ),
        (
            is_production && trusts_loopback_only && !server.host.is_loopback(),
            "TRUSTED_PROXIES holds only loopback: callers behind a gateway on another machine share its address and its limit on failed authentications",
        ),
    ]
}

fn peer_rows(roles: &Roles) -> [Row; 3] {
    let longest_answer = roles.codegen.as_ref().map(|codegen| codegen.vllm_timeout_seconds);
    let is_unset = |address: &Option<String>| address.as_deref().is_none_or(str::is_empty);
    [
        (
            longest_answer.is_some_and(|timeout| timeout > roles.server.request_timeout),
            "VLLM_TIMEOUT_SECONDS is longer than REQUEST_TIMEOUT, which ends every call: raise REQUEST_TIMEOUT too",
        ),
        (
            roles.errors.is_none() && is_unset(&roles.server.errors_address),
            "ERRORS_ADDRESS is not set: errors are logged but not reported",
        ),
        (
            roles.analytics.is_none() && is_unset(&roles.server.analytics_address),
            "ANALYTICS_ADDRESS is not set: usage is not recorded",
        ),
    ]
}

fn is_production(roles: &Roles) -> bool {
    roles.server.common.environment == Environment::Production
}

fn is_local(address: &str) -> bool {
    address.contains("127.0.0.1") || address.contains("localhost")
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::AllRolesArgs;

    #[derive(Parser)]
    struct TestArgs {
        #[command(flatten)]
        all: AllRolesArgs,
    }

    fn names(roles: &Roles) -> Vec<String> {
        let name = |warning: &String| warning.split([' ', ':']).next().unwrap().to_owned();
        warnings(roles).iter().map(name).collect()
    }

    fn all(flags: &[&str]) -> Roles {
        TestArgs::parse_from([&["hapa"], flags].concat()).all.into()
    }

    #[test]
    fn the_defaults_cause_no_warning() {
        assert_eq!(names(&all(&[])), [""; 0]);
    }

    #[test]
    fn an_unsuitable_setting_is_named() {
        assert_eq!(names(&all(&["--redis-url=redis://r"])), ["REDIS_URL"]);
        let production = names(&all(&[
            "--environment=production",
            "--reflection=true",
            "--host=0.0.0.0",
            "--log-engine-errors=true",
        ]));
        let expected = [
            "DATABASE_URL",
            "LOG_ENGINE_ERRORS",
            "REFLECTION",
            "AI_MODEL_ENDPOINT",
            "TRUSTED_PROXIES",
        ];
        assert_eq!(production, expected);
        let no_roles = Roles::none(all(&[]).server);
        assert_eq!(names(&no_roles), ["ERRORS_ADDRESS", "ANALYTICS_ADDRESS"]);
        let suitable = [
            "--environment=production",
            "--database-url=postgres://p/d",
            "--redis-url=redis://r",
            "--ai-model-endpoint=http://engine:8002/v1",
            "--trusted-proxies=10.0.0.0/8",
            "--host=0.0.0.0",
        ];
        assert_eq!(names(&all(&suitable)), [""; 0]);
    }
}
