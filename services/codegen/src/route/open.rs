//! An answer's way to its first token: which engine is asked, and which next where one fails.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use hapa_core::call_stats::Report;
use reqwest::StatusCode;
use tokio::time::{Instant, sleep_until};
use tokio_util::sync::CancellationToken;
use tracing::Span;

use super::Fleet;
use super::board::{Nobody, Wanted};
use super::breaker::Verdict;
use super::replica::{Attempt, Replica};
use crate::engine::{self, Ask, Events, Tokens};

/// Engines that one call asks.
const MOST_ATTEMPTS: usize = 3;

/// What is asked for.
pub(crate) struct Request {
    pub(crate) ask: Ask,
    pub(crate) body: Bytes,
    pub(crate) model: String,
    /// What requests share that should go to one engine.
    pub(crate) affinity: Option<u64>,
    /// Where it is noted what failed and was overcome.
    pub(crate) report: Report,
    /// Fired when an engine has answered: from then on the prompt was read.
    pub(crate) answered: CancellationToken,
    /// Under which each engine that is asked has its span.
    pub(crate) span: Span,
}

/// An answer from its first token on.
pub(crate) struct Opened<E> {
    pub(crate) tokens: Tokens,
    /// What came until now.
    pub(crate) events: E,
    /// It broke in the same read in which it began.
    pub(crate) broke: Option<engine::Error>,
    attempt: Attempt,
    /// The model that was asked for.
    model: String,
}

impl<E> Opened<E> {
    /// The engine that answers: `host:port`.
    pub(crate) fn place(&self) -> &str {
        self.attempt.place()
    }

    /// Whether this is the name of the model that was asked for, or of one that the engine lists. An
    /// engine may name the model that answers as it likes.
    pub(crate) fn has_model(&self, name: &str) -> bool {
        name == self.model || self.attempt.replica.lists(name)
    }
}

/// Why no answer has begun.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error("the engine serves no model at the moment")]
    NoModel,
    /// Every engine that could answer failed of late, and is left alone for so long.
    #[error("the AI model fails at the moment and is left alone; try again shortly")]
    CircuitOpen(Duration),
    /// The one that was asked last.
    #[error(transparent)]
    Engine(#[from] engine::Error),
}

impl Error {
    /// A word for its kind, from a short list.
    pub(crate) fn kind(&self) -> String {
        match self {
            Error::NoModel => "no_engine".to_owned(),
            Error::CircuitOpen(_) => "circuit_open".to_owned(),
            Error::Engine(error) => error.kind(),
        }
    }
}

/// What became of a failed attempt.
enum After {
    /// Another is asked.
    Next(Attempt),
    /// It is over; the reason where asking again might have helped.
    Over(Option<&'static str>),
}

impl Fleet {
    /// Asks until a first token has come, or no more may be asked. Can be dropped at any time.
    pub(crate) async fn open<E: Events>(&self, request: Request) -> Result<Opened<E>, Error> {
        self.board().await;
        self.0.budget.earn();
        let (mut tried, mut failed) = (Vec::new(), Vec::new());
        let mut attempt = self.pick(&request, &tried).map_err(|nobody| missed(&nobody))?;
        loop {
            tried.push(attempt.replica.id);
            let (error, after) = match self.attempt(&request, attempt, &tried).await {
                Ok(opened) => {
                    overcome(&request.report, failed);
                    return Ok(opened);
                }
                Err(failure) => failure,
            };
            match after {
                After::Next(next) => {
                    failed.push(error);
                    attempt = next;
                }
                After::Over(reason) => {
                    count_retries(reason.unwrap_or_default(), usize::from(reason.is_some()));
                    count_retries("failed", failed.len());
                    return Err(error.into());
                }
            }
        }
    }

    /// One engine, until its first token; with what is to be done where that does not come.
    async fn attempt<E: Events>(
        &self,
        request: &Request,
        attempt: Attempt,
        tried: &[u64],
    ) -> Result<Opened<E>, (engine::Error, After)> {
        let (replica, patient_until) = (Arc::clone(&attempt.replica), attempt.patient_until);
        let mut first = std::pin::pin!(first_token(request, attempt));
        let error = tokio::select! {
            biased;
            opened = &mut first => match opened {
                Ok(opened) => return Ok(opened),
                Err(error) => error,
            },
            () = sleep_until(patient_until) => match self.after(request, tried) {
                // Dropping what was asked is what stops the engine.
                After::Next(next) => return Err((engine::Error::Silent, After::Next(next))),
                // Nobody else may be asked: wait on, as long as the caller does.
                After::Over(_) => match first.await {
                    Ok(opened) => return Ok(opened),
                    Err(error) => error,
                },
            },
        };
        if matches!(&error, engine::Error::Unreachable(how) if how.is_connect()) {
            replica.is_away(&error);
        }
        let lost = lacks_model(&error) && self.lost(&replica, &request.model);
        let after = if is_retryable(&error) || lost {
            self.after(request, tried)
        } else {
            After::Over(None)
        };
        Err((error, after))
    }

    /// An engine says that it has not a model: tells whether another has.
    fn lost(&self, replica: &Replica, model: &str) -> bool {
        if self.known().has(model) {
            replica.has_not(model);
            self.publish();
        }
        self.known().has(model)
    }

    /// Whom to ask next, where anyone may be.
    fn after(&self, request: &Request, tried: &[u64]) -> After {
        if tried.len() >= MOST_ATTEMPTS {
            return After::Over(Some("exhausted"));
        }
        // Looked for before it is paid for.
        let Ok(next) = self.pick(request, tried) else {
            return After::Over(Some("exhausted"));
        };
        if self.0.budget.spend(Instant::now()) {
            After::Next(next)
        } else {
            After::Over(Some("budget"))
        }
    }

    pub(super) fn pick(&self, request: &Request, tried: &[u64]) -> Result<Attempt, Nobody> {
        let (board, now) = (self.known(), Instant::now());
        let mut tried = tried.to_vec();
        loop {
            let (model, affinity) = (request.model.as_str(), request.affinity);
            let wanted = Wanted { model, affinity, tried: &tried };
            let replica = board.pick(&wanted, now, &mut rand::random)?;
            match replica.enter(now, self.0.bounds.attempt) {
                Ok(attempt) => return Ok(attempt),
                // Another has taken its trial since: each goes round once at most.
                Err(_) => tried.push(replica.id),
            }
        }
    }
}

async fn first_token<E: Events>(
    request: &Request,
    mut attempt: Attempt,
) -> Result<Opened<E>, engine::Error> {
    let headers = attempt.ask(&request.span, request.ask);
    let asked = attempt.replica.engine.ask(request.ask, headers, request.body.clone()).await;
    let mut tokens = asked.inspect_err(|error| {
        attempt.failed(error);
        attempt.went(verdict(error));
    })?;
    attempt.answers();
    request.answered.cancel();
    let mut events = E::default();
    let mut broke = None;
    while broke.is_none() && !events.has_begun() && !events.is_done() {
        broke = tokens.read(&mut events).await.err();
    }
    if let Some(error) = broke.take_if(|_| !events.has_begun()) {
        attempt.failed(&error);
        attempt.went(verdict(&error));
        return Err(error);
    }
    attempt.went(Verdict::Success);
    Ok(Opened { tokens, events, broke, attempt, model: request.model.clone() })
}

/// What an error before the first token says of the engine.
fn verdict(error: &engine::Error) -> Verdict {
    match error {
        engine::Error::Refused { status, .. } => match *status {
            StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE => Verdict::Neutral,
            status if status.is_client_error() => Verdict::Success,
            _ => Verdict::Failure,
        },
        _ => Verdict::Failure,
    }
}

/// Whether another engine may do better.
fn is_retryable(error: &engine::Error) -> bool {
    match error {
        engine::Error::Refused { status, .. } => {
            !status.is_client_error() || *status == StatusCode::TOO_MANY_REQUESTS
        }
        _ => true,
    }
}

fn lacks_model(error: &engine::Error) -> bool {
    matches!(error, engine::Error::Refused { status: StatusCode::NOT_FOUND, .. })
}

fn missed(nobody: &Nobody) -> Error {
    match *nobody {
        Nobody::Left => Error::NoModel,
        Nobody::Closed(until) => {
            let wait = until.saturating_duration_since(Instant::now());
            Error::CircuitOpen(wait.max(Duration::from_millis(100)))
        }
    }
}

/// Nobody was shown these failures: they are remembered as overcome.
fn overcome(report: &Report, failed: Vec<engine::Error>) {
    count_retries("recovered", failed.len());
    for error in failed {
        report.overcame(&crate::error::Error::from(Error::from(error)).fault(false));
    }
}

fn count_retries(outcome: &'static str, count: usize) {
    if count > 0 {
        metrics::counter!("hapa_engine_retries_total", "outcome" => outcome)
            .increment(count as u64);
    }
}
