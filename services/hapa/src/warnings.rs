//! What an operator should look at: settings that work and don't suit what they are used for.

use hapa_core::config::Environment;
use hapa_store::database::Engine;

use crate::Roles;

/// In a sentence each.
pub(crate) fn warnings(roles: &Roles) -> Vec<String> {
    let server = &roles.server;
    let production = server.common.environment == Environment::Production;
    let file = Engine::of(&server.common.store_url("")) == Ok(Engine::Sqlite);
    let stores = roles.auth.is_some() || roles.errors.is_some() || roles.analytics.is_some();
    let shares = server.common.redis_url().is_some();
    let nobody = |address: &Option<String>| address.as_deref().is_none_or(str::is_empty);
    let engines = |is_so: fn(&hapa_codegen::Config) -> bool| {
        production && roles.codegen.as_ref().is_some_and(is_so)
    };
    let only_local = server.trusted_proxies.iter().all(|net| net.addr().is_loopback());
    let limits = production && !server.limits.rate_limit_enabled;
    let rows = [
        (
            stores && file && shares,
            "REDIS_URL is set for replicas, but the store is a SQLite file, which one process alone can use: set DATABASE_URL",
        ),
        (
            production && stores && file,
            "DATABASE_URL: production keeps its data in SQLite files in DATA_DIR: fine for one process on a disk that is backed up",
        ),
        (
            production && !file && !shares,
            "REDIS_URL is not set: replicas limit calls each on its own",
        ),
        (
            engines(|codegen| codegen.log_engine_errors),
            "LOG_ENGINE_ERRORS is on in production: at debug the log may hold prompts",
        ),
        (production && server.reflects(), "REFLECTION is on in production: it shows every method"),
        (limits, "RATE_LIMIT_ENABLED is off in production"),
        (
            engines(|codegen| is_local(&codegen.ai_model_endpoint)),
            "AI_MODEL_ENDPOINT is on this machine in production: is the default meant?",
        ),
        (
            production && only_local && !server.host.is_loopback(),
            "TRUSTED_PROXIES has loopback alone: callers behind a gateway elsewhere share its address, and the limit on failed authentications",
        ),
        (
            roles.errors.is_none() && nobody(&server.errors_address),
            "ERRORS_ADDRESS is not set: failures are logged only",
        ),
        (
            roles.analytics.is_none() && nobody(&server.analytics_address),
            "ANALYTICS_ADDRESS is not set: what is used is not recorded",
        ),
    ];
    rows.into_iter().filter(|(is_so, _)| *is_so).map(|(_, words)| words.to_owned()).collect()
}

fn is_local(address: &str) -> bool {
    address.contains("127.0.0.1") || address.contains("localhost")
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::All;

    #[derive(Parser)]
    struct Settings {
        #[command(flatten)]
        all: All,
    }

    fn names(roles: &Roles) -> Vec<String> {
        let name = |words: &String| words.split([' ', ':']).next().unwrap().to_owned();
        warnings(roles).iter().map(name).collect()
    }

    fn all(flags: &[&str]) -> Roles {
        Settings::parse_from([&["hapa"], flags].concat()).all.into()
    }

    #[test]
    fn a_newcomer_is_left_alone() {
        assert_eq!(names(&all(&[])), [""; 0]);
    }

    #[test]
    fn what_does_not_suit_is_named() {
        assert_eq!(names(&all(&["--redis-url=redis://r"])), ["REDIS_URL"]);
        let bare = names(&all(&[
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
        assert_eq!(bare, expected);
        let alone = Roles::none(all(&[]).server);
        assert_eq!(names(&alone), ["ERRORS_ADDRESS", "ANALYTICS_ADDRESS"]);
        let good = [
            "--environment=production",
            "--database-url=postgres://p/d",
            "--redis-url=redis://r",
            "--ai-model-endpoint=http://engine:8002/v1",
            "--trusted-proxies=10.0.0.0/8",
            "--host=0.0.0.0",
        ];
        assert_eq!(names(&all(&good)), [""; 0]);
    }
}
