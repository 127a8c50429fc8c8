//! Whether what the services stand on is there: checks that run in the background, bounded, so that
//! a question about health asks nobody and waits for nothing.
//!
//! One task alone sets the gRPC health, in order: nothing says "serving" after a drain has begun.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures_util::future::join_all;
use hapa_core::health_check::HealthCheck;
use tokio::time::{Instant, sleep_until};
use tokio_util::sync::CancellationToken;
use tonic_health::ServingStatus;
use tonic_health::server::HealthReporter;

/// From the beginning of a round to that of the next. With the bound it makes 5 s: nothing that is
/// told is older.
const PERIOD: Duration = Duration::from_secs(3);
/// Pause before the next round while a check fails, so that a recovery is reported within 2 s.
const RECHECK_INTERVAL: Duration = Duration::from_millis(500);

/// What a check found last.
#[derive(Clone, Debug)]
pub struct Part {
    /// Such as "database".
    pub name: &'static str,
    /// What to tell everyone while it is ill.
    pub problem: String,
    /// Which services can't work while it is ill.
    pub needed_by: &'static [&'static str],
    /// What was found; the words are for operators.
    pub outcome: Result<(), String>,
    /// When.
    pub checked: Instant,
}

/// What is known now. Clones are one.
#[derive(Clone, Debug)]
pub struct Health(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    started: Instant,
    known: Mutex<Known>,
}

#[derive(Debug, Default)]
struct Known {
    parts: Vec<Part>,
    services: Vec<Service>,
    draining: bool,
}

#[derive(Clone, Copy, Debug)]
struct Service {
    name: &'static str,
    /// Whether this process is there for it, not it for this process.
    is_work: bool,
}

impl Health {
    /// Since this process started.
    pub fn uptime(&self) -> Duration {
        self.0.started.elapsed()
    }

    /// What each check found last.
    pub fn parts(&self) -> Vec<Part> {
        self.known().parts.clone()
    }

    /// The services of this process, and whether each can work.
    pub fn services(&self) -> Vec<(&'static str, bool)> {
        let known = self.known();
        known.services.iter().map(|service| (service.name, known.serves(service.name))).collect()
    }

    /// Whether this process is on its way out.
    pub fn is_draining(&self) -> bool {
        self.known().draining
    }

    /// Whether calls should be sent here: while any of its services can work. Of many, one may lack
    /// what another does without.
    pub fn is_ready(&self) -> bool {
        self.known().is_ready()
    }

    fn known(&self) -> MutexGuard<'_, Known> {
        self.0.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Known {
    fn serves(&self, service: &str) -> bool {
        let mut ill = self.parts.iter().filter(|part| part.outcome.is_err());
        !self.draining && !ill.any(|part| part.needed_by.contains(&service))
    }

    fn is_ready(&self) -> bool {
        let mut work = self.services.iter().filter(|service| service.is_work).peekable();
        let has_none = work.peek().is_none();
        !self.draining && (has_none || work.any(|service| self.serves(service.name)))
    }
}

/// The checks of a server, and the gRPC health that follows from them.
pub(crate) struct Checks {
    list: Vec<HealthCheck>,
    health: Health,
    reporter: HealthReporter,
    /// What was said of each service last; "" is the whole.
    told: Vec<(&'static str, bool)>,
    /// The problems that stand in the log and are not over.
    logged: Vec<(&'static str, String)>,
}

impl Checks {
    /// Of a server that serves nothing yet.
    pub(crate) async fn new(reporter: HealthReporter) -> Self {
        reporter.set_service_status("", ServingStatus::NotServing).await;
        let inner = Inner { started: Instant::now(), known: Mutex::default() };
        let health = Health(Arc::new(inner));
        Checks { list: Vec::new(), health, reporter, told: vec![("", false)], logged: Vec::new() }
    }

    pub(crate) fn health(&self) -> Health {
        self.health.clone()
    }

    pub(crate) fn add(&mut self, check: HealthCheck) {
        self.list.push(check);
    }

    /// A service that does not serve yet.
    pub(crate) async fn add_service(&mut self, name: &'static str, is_work: bool) {
        self.reporter.set_service_status(name, ServingStatus::NotServing).await;
        self.told.push((name, false));
        self.health.known().services.push(Service { name, is_work });
    }

    /// Runs every check once, side by side.
    pub(crate) async fn round(&self) {
        let outcomes = join_all(self.list.iter().map(HealthCheck::run)).await;
        let found = self.list.iter().zip(outcomes).map(|(check, outcome)| Part {
            name: check.name(),
            problem: check.problem().to_owned(),
            needed_by: check.services(),
            outcome,
            checked: Instant::now(),
        });
        let found = found.collect();
        self.health.known().parts = found;
    }

    /// From the end of a round to the begin of the next, at most.
    fn pause(&self) -> Duration {
        let fails = self.health.known().parts.iter().any(|part| part.outcome.is_err());
        if fails { RECHECK_INTERVAL } else { PERIOD }
    }

    /// Logs what changed. The first line of a process is that it serves, so a round does not.
    fn log(&mut self) {
        for part in self.health.parts() {
            let (name, problem) = (part.name, part.problem);
            let at = self.logged.iter().position(|known| *known == (name, problem.clone()));
            match part.outcome {
                Err(why) if at.is_none() => {
                    tracing::warn!(check = name, why, "{problem}");
                    self.logged.push((name, problem));
                }
                Ok(()) => {
                    if let Some((_, problem)) = at.map(|at| self.logged.swap_remove(at)) {
                        tracing::info!(check = name, "no more: {problem}");
                    }
                }
                Err(_) => {}
            }
        }
    }

    /// Says of each service what follows, where that is news: watchers are told every time.
    pub(crate) async fn tell(&mut self) {
        let health = self.health();
        for (name, told) in &mut self.told {
            let serves = match *name {
                "" => health.is_ready(),
                name => health.known().serves(name),
            };
            if std::mem::replace(told, serves) != serves {
                let status =
                    if serves { ServingStatus::Serving } else { ServingStatus::NotServing };
                self.reporter.set_service_status(*name, status).await;
            }
        }
    }

    /// Goes on with rounds until the drain; says then that nothing serves, and ends.
    pub(crate) async fn watch(mut self, draining: CancellationToken) {
        self.log();
        let mut next = Instant::now() + self.pause();
        let rounds = async {
            loop {
                sleep_until(next).await;
                let begun = Instant::now();
                self.round().await;
                self.tell().await;
                self.log();
                next = (begun + PERIOD).min(Instant::now() + self.pause());
            }
        };
        // Dropped half way it has said nothing wrong: what follows says the last word.
        tokio::select! {
            biased;
            () = draining.cancelled() => {}
            () = rounds => {}
        }
        self.health.known().draining = true;
        // What was being told when the drain began may be told, and not be noted.
        self.told.iter_mut().for_each(|(_, told)| *told = true);
        self.tell().await;
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
    const ASIDE: &str = "hapa.test.v1.TellsOfOthers";

    async fn checks(check: HealthCheck) -> (Checks, HealthService) {
        let reporter = HealthReporter::new();
        let service = HealthService::from_health_reporter(reporter.clone());
        let mut checks = Checks::new(reporter).await;
        checks.add_service(STORE, true).await;
        checks.add_service(ASIDE, false).await;
        checks.add(check);
        (checks, service)
    }

    async fn serves(service: &HealthService, name: &str) -> bool {
        let asked = tonic::Request::new(HealthCheckRequest { service: name.to_owned() });
        let status = service.check(asked).await.unwrap().into_inner().status;
        status == ServingStatus::Serving as i32
    }

    fn switch() -> (Arc<AtomicBool>, HealthCheck) {
        let well = Arc::new(AtomicBool::new(true));
        let seen = Arc::clone(&well);
        let run = move || {
            let well = seen.load(Ordering::Relaxed);
            async move { well.then_some(()).ok_or_else(|| "secret words".to_owned()) }
        };
        (well, HealthCheck::new("database", "no store", run).needed_by(&[STORE]))
    }

    #[tokio::test(start_paused = true)]
    async fn a_failing_check_takes_out_what_needs_it_and_a_good_one_brings_it_back() {
        let (well, check) = switch();
        let (mut checks, service) = checks(check).await;
        checks.add_service(FREE, true).await;
        let (health, draining) = (checks.health(), CancellationToken::new());
        checks.round().await;
        assert!(!serves(&service, STORE).await && !serves(&service, "").await, "not told yet");
        checks.tell().await;
        assert!(serves(&service, STORE).await && serves(&service, "").await);
        let watch = checks.watch(draining.clone());
        let story = async {
            well.store(false, Ordering::Relaxed);
            tokio::time::sleep(PERIOD + health_check::TIMEOUT).await;
            assert!(!serves(&service, STORE).await && serves(&service, FREE).await);
            assert!(serves(&service, "").await, "one of two can work");
            assert_eq!(health.parts()[0].outcome, Err("secret words".to_owned()));
            assert!(health.parts()[0].checked.elapsed() <= PERIOD + health_check::TIMEOUT);
            well.store(true, Ordering::Relaxed);
            tokio::time::sleep(PERIOD + health_check::TIMEOUT).await;
            assert!(serves(&service, STORE).await);
            draining.cancel();
        };
        tokio::join!(watch, story);
        for name in ["", STORE, FREE, ASIDE] {
            assert!(!serves(&service, name).await, "{name:?} serves while it drains");
        }
        assert!(health.is_draining() && !health.is_ready());
    }

    #[tokio::test(start_paused = true)]
    async fn a_process_whose_work_can_not_be_done_is_not_ready_whatever_tells_of_it() {
        let (well, check) = switch();
        let (mut checks, service) = checks(check).await;
        well.store(false, Ordering::Relaxed);
        checks.round().await;
        checks.tell().await;
        assert!(!serves(&service, STORE).await && !serves(&service, "").await);
        assert!(serves(&service, ASIDE).await);
    }

    #[tokio::test(start_paused = true)]
    async fn a_check_that_hangs_or_panics_is_a_failure_and_bounded() {
        let hangs = HealthCheck::new("engine", "no engine", pending);
        let (mut checks, _) = checks(hangs).await;
        checks.add(HealthCheck::new("panics", "?", || async { panic!("on purpose") }));
        let begun = Instant::now();
        checks.round().await;
        assert_eq!(begun.elapsed(), health_check::TIMEOUT);
        let outcomes: Vec<_> =
            checks.health().parts().into_iter().map(|part| part.outcome).collect();
        let words = ["no answer within 2 s", "the check panicked"];
        assert_eq!(outcomes, words.map(|words| Err(words.to_owned())));
    }
}
