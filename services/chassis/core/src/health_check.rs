//! A check of one thing that services depend on. The server runs checks in the background and derives health from
//! them.

use std::fmt;
use std::panic::AssertUnwindSafe;
use std::time::Duration;

use futures_util::FutureExt as _;
use futures_util::future::BoxFuture;
use tokio::time::timeout;

/// The longest that a check may take.
pub const TIMEOUT: Duration = Duration::from_secs(2);

type Run = Box<dyn Fn() -> BoxFuture<'static, Result<(), String>> + Send + Sync>;

/// How to find out whether one thing is there.
pub struct HealthCheck {
    name: &'static str,
    problem: String,
    needed_by: &'static [&'static str],
    run: Run,
}

impl HealthCheck {
    /// A check, and how its failure is told to everyone: `problem` names no host and no cause. What
    /// `run` says is for operators; it is stopped after 2 s, which is a failure too.
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

    /// These can't work while it fails: they are taken out of load balancers.
    #[must_use]
    pub fn needed_by(self, services: &'static [&'static str]) -> HealthCheck {
        HealthCheck { needed_by: services, ..self }
    }

    /// The name of what it checks, such as "database".
    pub fn name(&self) -> &'static str {
        self.name
    }

    /// How its failure is described to everyone.
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
        match timeout(TIMEOUT, run).await {
            Ok(Ok(outcome)) => outcome,
            Ok(Err(_)) => Err("the check panicked".to_owned()),
            Err(_) => Err(format!("no answer within {} s", TIMEOUT.as_secs())),
        }
    }
}

impl fmt::Debug for HealthCheck {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name)
    }
}
