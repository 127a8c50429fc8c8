//! Health of the process: background checks of its dependencies, with a timeout, so that a health request calls no
//! dependency and never waits.
//!
//! One task alone sets the gRPC health, in order: no service reports SERVING after the drain has started.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures_util::future::join_all;
use hapa_core::health_check::HealthCheck;
use tokio::time::{Instant, sleep_until};
use tokio_util::sync::CancellationToken;
use tonic_health::ServingStatus;
use tonic_health::server::HealthReporter;

/// The check of the Redis that replicas share for rate limits.
pub(crate) const REDIS: &str = "redis";

/// Interval between the starts of two rounds of checks. With the timeout of a check, no reported result is older than
/// 5 s.
const CHECK_INTERVAL: Duration = Duration::from_secs(3);
/// Delay before the next round while a check fails, so that a recovery is reported within 2 s.
const RECHECK_INTERVAL: Duration = Duration::from_millis(500);

/// The last result of a check.
#[derive(Clone, Debug)]
pub struct ComponentStatus {
    /// The name of the check, such as "database".
    pub name: &'static str,
    /// The message for all callers while the check fails.
    pub problem: String,
    /// The services that can't work while the check fails.
    pub needed_by: &'static [&'static str],
    /// The result; the error is for operators.
    pub outcome: Result<(), String>,
    /// When the check ran.
    pub checked: Instant,
}

/// A handle on the health of the process. Clones share one state.
#[derive(Clone, Debug)]
pub struct Health(Arc<HealthState>);

#[derive(Debug)]
struct HealthState {
    started: Instant,
    snapshot: Mutex<HealthSnapshot>,
}

#[derive(Debug, Default)]
struct HealthSnapshot {
    components: Vec<ComponentStatus>,
    services: Vec<MountedService>,
    is_draining: bool,
}

#[derive(Clone, Copy, Debug)]
struct MountedService {
    name: &'static str,
    /// Whether the service counts towards the readiness of the process.
    counts_for_readiness: bool,
}

impl Health {
    /// The time since the process started.
    pub fn uptime(&self) -> Duration {
        self.0.started.elapsed()
    }

    /// The last result of every check.
    pub fn components(&self) -> Vec<ComponentStatus> {
        self.snapshot().components.clone()
    }

    /// The services of this process, and whether each can work.
    pub fn services(&self) -> Vec<(&'static str, bool)> {
        let snapshot = self.snapshot();
        let services = snapshot.services.iter();
        services.map(|service| (service.name, snapshot.serves(service.name))).collect()
    }

    /// Whether the process is shutting down.
    pub fn is_draining(&self) -> bool {
        self.snapshot().is_draining
    }

    /// Whether calls should be sent to this process: one of its services can work, or it has none.
    pub fn is_ready(&self) -> bool {
        self.snapshot().is_ready()
    }

    fn snapshot(&self) -> MutexGuard<'_, HealthSnapshot> {
        self.0.snapshot.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl HealthSnapshot {
    fn serves(&self, service: &str) -> bool {
        let mut failing = self.components.iter().filter(|component| component.outcome.is_err());
        !self.is_draining && !failing.any(|component| component.needed_by.contains(&service))
    }

    fn is_ready(&self) -> bool {
        let mut counting =
            self.services.iter().filter(|service| service.counts_for_readiness).peekable();
        let has_none = counting.peek().is_none();
        !self.is_draining && (has_none || counting.any(|service| self.serves(service.name)))
    }
}

/// The checks of a server, and the gRPC health that follows from them.
pub(crate) struct HealthChecks {
    checks: Vec<HealthCheck>,
    health: Health,
    reporter: HealthReporter,
    /// The last reported status of each service; "" is the whole process.
    reported: Vec<(&'static str, bool)>,
    /// The problems that are logged and not over.
    logged: Vec<(&'static str, String)>,
}

impl HealthChecks {
    /// The checks of a server that does not serve yet.
    pub(crate) async fn new(reporter: HealthReporter) -> Self {
        reporter.set_service_status("", ServingStatus::NotServing).await;
        let state = HealthState { started: Instant::now(), snapshot: Mutex::default() };
        let health = Health(Arc::new(state));
        let (checks, logged) = (Vec::new(), Vec::new());
        HealthChecks { checks, health, reporter, reported: vec![("", false)], logged }
    }

    pub(crate) fn health(&self) -> Health {
        self.health.clone()
    }

    pub(crate) fn add(&mut self, check: HealthCheck) {
        self.checks.push(check);
    }

    /// Adds a service that does not serve yet.
    pub(crate) async fn add_service(&mut self, name: &'static str, counts_for_readiness: bool) {
        self.reporter.set_service_status(name, ServingStatus::NotServing).await;
        self.reported.push((name, false));
        self.health.snapshot().services.push(MountedService { name, counts_for_readiness });
    }

    /// Runs every check once, concurrently.
    pub(crate) async fn run(&self) {
        let outcomes = join_all(self.checks.iter().map(HealthCheck::run)).await;
        let components = self.checks.iter().zip(outcomes).map(|(check, outcome)| ComponentStatus {
            name: check.name(),
            problem: check.problem().to_owned(),
            needed_by: check.services(),
            outcome,
            checked: Instant::now(),
        });
        let components = components.collect();
        self.health.snapshot().components = components;
    }

    /// Maximum delay from the end of a round to the start of the next.
    fn max_delay(&self) -> Duration {
        let components = &self.health.snapshot().components;
        let has_failure = components.iter().any(|component| component.outcome.is_err());
        if has_failure { RECHECK_INTERVAL } else { CHECK_INTERVAL }
    }

    /// Logs what has changed. It is separate from `run`, because the first log line of a process must be that it
    /// serves.
    fn log(&mut self) {
        for component in self.health.components() {
            let (name, problem) = (component.name, component.problem);
            let logged = self.logged.iter().position(|logged| *logged == (name, problem.clone()));
            match component.outcome {
                Err(why) if logged.is_none() => {
                    tracing::warn!(check = name, why, "{problem}");
                    self.logged.push((name, problem));
                }
                Ok(()) => {
                    if let Some((_, problem)) = logged.map(|at| self.logged.swap_remove(at)) {
                        tracing::info!(check = name, "resolved: {problem}");
                    }
                }
                Err(_) => {}
            }
        }
    }

    /// Reports the status of each service if it has changed, because watchers get a message for every report.
    pub(crate) async fn report(&mut self) {
        let health = self.health();
        for (name, reported) in &mut self.reported {
            let serves = match *name {
                "" => health.is_ready(),
                name => health.snapshot().serves(name),
            };
            if std::mem::replace(reported, serves) != serves {
                let status =
                    if serves { ServingStatus::Serving } else { ServingStatus::NotServing };
                self.reporter.set_service_status(*name, status).await;
            }
        }
    }

    /// Runs rounds of checks until the drain, then reports that nothing serves, and ends.
    pub(crate) async fn watch(mut self, draining: CancellationToken) {
        self.log();
        let mut next = Instant::now() + self.max_delay();
        let rounds = async {
            loop {
                sleep_until(next).await;
                let started = Instant::now();
                self.run().await;
                self.report().await;
                self.log();
                next = (started + CHECK_INTERVAL).min(Instant::now() + self.max_delay());
            }
        };
        // A round may be dropped at any await: the report below comes last.
        tokio::select! {
            biased;
            () = draining.cancelled() => {}
            () = rounds => {}
        }
        self.health.snapshot().is_draining = true;
        // A report that was dropped half-way may have changed a status without recording it.
        self.reported.iter_mut().for_each(|(_, reported)| *reported = true);
        self.report().await;
    }
}

#[cfg(test)]
mod tests {
    use std::future::pending;
    use std::sync::atomic::{AtomicBool, Ordering};

    use tonic_health::pb::HealthCheckRequest;
    use tonic_health::pb::health_server::Health as _;
    use tonic_health::server::HealthService;

    use hapa_core::health_check;

    use super::*;

    const STORE: &str = "hapa.test.v1.NeedsStore";
    const FREE: &str = "hapa.test.v1.NeedsNothing";
    const AUXILIARY: &str = "hapa.test.v1.Auxiliary";

    async fn checks(check: HealthCheck) -> (HealthChecks, HealthService) {
        let reporter = HealthReporter::new();
        let service = HealthService::from_health_reporter(reporter.clone());
        let mut checks = HealthChecks::new(reporter).await;
        checks.add_service(STORE, true).await;
        checks.add_service(AUXILIARY, false).await;
        checks.add(check);
        (checks, service)
    }

    async fn serves(service: &HealthService, name: &str) -> bool {
        let request = tonic::Request::new(HealthCheckRequest { service: name.to_owned() });
        let status = service.check(request).await.unwrap().into_inner().status;
        status == ServingStatus::Serving as i32
    }

    fn switch() -> (Arc<AtomicBool>, HealthCheck) {
        let is_healthy = Arc::new(AtomicBool::new(true));
        let probed = Arc::clone(&is_healthy);
        let run = move || {
            let is_healthy = probed.load(Ordering::Relaxed);
            async move { is_healthy.then_some(()).ok_or_else(|| "secret words".to_owned()) }
        };
        (is_healthy, HealthCheck::new("database", "no store", run).needed_by(&[STORE]))
    }

    #[tokio::test(start_paused = true)]
    async fn a_failing_check_takes_out_the_services_that_need_it_until_it_succeeds() {
        let (is_healthy, check) = switch();
        let (mut checks, service) = checks(check).await;
        checks.add_service(FREE, true).await;
        let (health, draining) = (checks.health(), CancellationToken::new());
        checks.run().await;
        assert!(!serves(&service, STORE).await && !serves(&service, "").await, "not reported yet");
        checks.report().await;
        assert!(serves(&service, STORE).await && serves(&service, "").await);
        let watch = checks.watch(draining.clone());
        let scenario = async {
            is_healthy.store(false, Ordering::Relaxed);
            tokio::time::sleep(CHECK_INTERVAL + health_check::CHECK_TIMEOUT).await;
            assert!(!serves(&service, STORE).await && serves(&service, FREE).await);
            assert!(serves(&service, "").await, "one of two services can work");
            assert_eq!(health.components()[0].outcome, Err("secret words".to_owned()));
            assert!(
                health.components()[0].checked.elapsed()
                    <= CHECK_INTERVAL + health_check::CHECK_TIMEOUT
            );
            is_healthy.store(true, Ordering::Relaxed);
            tokio::time::sleep(CHECK_INTERVAL + health_check::CHECK_TIMEOUT).await;
            assert!(serves(&service, STORE).await);
            draining.cancel();
        };
        tokio::join!(watch, scenario);
        for name in ["", STORE, FREE, AUXILIARY] {
            assert!(!serves(&service, name).await, "{name:?} serves while it drains");
        }
        assert!(health.is_draining() && !health.is_ready());
    }

    #[tokio::test(start_paused = true)]
    async fn an_auxiliary_service_does_not_make_a_process_ready() {
        let (is_healthy, check) = switch();
        let (mut checks, service) = checks(check).await;
        is_healthy.store(false, Ordering::Relaxed);
        checks.run().await;
        checks.report().await;
        assert!(!serves(&service, STORE).await && !serves(&service, "").await);
        assert!(serves(&service, AUXILIARY).await);
    }

    #[tokio::test(start_paused = true)]
    async fn a_check_that_hangs_or_panics_fails_within_its_timeout() {
        let hangs = HealthCheck::new("engine", "no engine", pending);
        let (mut checks, _) = checks(hangs).await;
        checks.add(HealthCheck::new("panics", "?", || async { panic!("on purpose") }));
        let started = Instant::now();
        checks.run().await;
        assert_eq!(started.elapsed(), health_check::CHECK_TIMEOUT);
        let outcomes: Vec<_> =
            checks.health().components().into_iter().map(|component| component.outcome).collect();
        let words = ["no answer within 2 s", "the check panicked"];
        assert_eq!(outcomes, words.map(|words| Err(words.to_owned())));
    }
}
