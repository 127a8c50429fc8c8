//! A check of one thing that services depend on. The server runs checks in the background and derives health from
//! them.

use std::fmt;
use std::panic::AssertUnwindSafe;
use std::time::Duration;

use futures_util::FutureExt as _;
use futures_util::future::BoxFuture;
use tokio::time::timeout;

/// Maximum duration of a check.
pub const CHECK_TIMEOUT: Duration = Duration::from_secs(2);

type Run = Box<dyn Fn() -> BoxFuture<'static, Result<(), String>> + Send + Sync>;

/// A check of one dependency.
pub struct HealthCheck {
    name: &'static str,
    problem: String,
    needed_by: &'static [&'static str],
    run: Run,
}

impl HealthCheck {
    /// A check. `problem` is the public description of a failure and must contain no host and no cause. The error
    /// of `run` is for operators. A check that takes longer than 2 s fails.
    pub fn new<F>(
        name: &'static str,
        problem: impl Into<String>,
        run: impl Fn() -> F + Send + Sync + 'static,
    ) -> HealthCheck
    where
        F: Future<Output = Result<(), String>> + Send + 'static,
    {
        let run: Run = Box::new(move || Box::pin(run()));
        HealthCheck { name, problem: problem.into(), needed_by: &[], run }
    }

    /// Sets the services that cannot work while the check fails. They report not ready, so that load balancers
    /// remove them.
    #[must_use]
    pub fn needed_by(self, services: &'static [&'static str]) -> HealthCheck {
        HealthCheck { needed_by: services, ..self }
    }

    /// The name of the dependency, such as "database".
    pub fn name(&self) -> &'static str {
        self.name
    }

    /// The public description of a failure.
    pub fn problem(&self) -> &str {
        &self.problem
    }

    /// The services that cannot work while it fails.
    pub fn services(&self) -> &'static [&'static str] {
        self.needed_by
    }

    /// Runs the check for at most 2 s.
    pub async fn run(&self) -> Result<(), String> {
        let run = AssertUnwindSafe(async { (self.run)().await }).catch_unwind();
        match timeout(CHECK_TIMEOUT, run).await {
            Ok(Ok(outcome)) => outcome,
            Ok(Err(_)) => Err("the check panicked".to_owned()),
            Err(_) => Err(format!("no answer within {} s", CHECK_TIMEOUT.as_secs())),
        }
    }
}

impl fmt::Debug for HealthCheck {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name)
    }
}
