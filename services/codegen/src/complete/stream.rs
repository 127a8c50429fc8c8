//! One caller's completion on its way: rides a flight, sends what grows, and ends in exactly one of
//! two ways, `finished` or `failed`. It is pulled, and dropping it gives up its seat.

use std::collections::VecDeque;
use std::sync::Arc;

use hapa_core::call::Call;
use hapa_core::call_stats::CallStats;
use hapa_core::rpc_error::RpcError;
use hapa_proto::codegen::v1::stream_complete_code_response::{
    Delta, Event, Failed, Finished, Heartbeat, Started,
};
use hapa_proto::codegen::v1::{Suggestion, Usage};
use tokio::time::Instant;
use tonic::Status;

use crate::complete::flight::{Ride, State};
use crate::complete::params::CompletionParams;
use crate::complete::session_guard::SessionGuard;
use crate::complete::suggestion_cache::{SuggestionCache, SuggestionScope};
use crate::error::Error;
use crate::watch::Watch;

/// What a completion is told about itself.
pub(crate) struct Order {
    pub(crate) model: String,
    pub(crate) request_id: Arc<str>,
    pub(crate) question: CompletionParams,
    pub(crate) warnings: Vec<String>,
    /// Where its suggestions are remembered.
    pub(crate) recent: Arc<SuggestionCache>,
    pub(crate) place: SuggestionScope,
    /// Its place in the session, if it has one.
    pub(crate) latest: Option<SessionGuard>,
}

enum Seat {
    Riding(Ride),
    /// All was said; the connection can be kept for the next call once its end was read.
    Closing(Ride),
    /// Nothing more will be read.
    Left,
}

pub(crate) struct Completion {
    seat: Seat,
    order: Order,
    watch: Watch,
    /// Where it says once what it used.
    report: Option<CallStats>,
    boarded: Instant,
    /// How much of each suggestion was sent, in bytes.
    sent: Vec<usize>,
    events: VecDeque<Event>,
    failure: Option<Status>,
}

impl Completion {
    /// Waits for the engine's answer to begin as long as nothing need be sent: so that an engine that
    /// refuses at once gives a plain status and no stream.
    pub(crate) async fn begin(
        ride: Ride,
        order: Order,
        watch: Watch,
        call: &Call,
    ) -> Result<Completion, Error> {
        let mut completion = Completion::new(Seat::Riding(ride), order, watch, call);
        let news = completion.wait().await?;
        completion.start(false);
        let begun = if news { completion.take_news() } else { completion.watch.check() };
        match begun {
            // Text that came in the same read is the caller's.
            Err(error) if completion.watch.has_text() => completion.fail(error),
            begun => begun?,
        }
        Ok(completion)
    }

    /// What was suggested a moment ago answers.
    pub(crate) fn known(
        suggestions: Vec<Suggestion>,
        order: Order,
        watch: Watch,
        call: &Call,
    ) -> Completion {
        let mut completion = Completion::new(Seat::Left, order, watch, call);
        completion.start(true);
        completion.watch.text();
        for Suggestion { index, text, .. } in &suggestions {
            completion.send(Event::Delta(Delta { suggestion: *index, text: text.clone() }));
        }
        completion.finish(suggestions, Some(Usage::default()));
        completion
    }

    fn new(seat: Seat, order: Order, watch: Watch, call: &Call) -> Completion {
        Completion {
            seat,
            sent: vec![0; order.question.options.max_suggestions],
            order,
            watch,
            report: Some(call.stats().clone()),
            boarded: Instant::now(),
            events: VecDeque::new(),
            failure: None,
        }
    }

    /// The next event; after `failed`, its status; none after the end.
    pub(crate) async fn next(&mut self) -> Option<Result<Event, Status>> {
        loop {
            if let Some(event) = self.events.pop_front() {
                return Some(Ok(event));
            }
            if let Some(status) = self.failure.take() {
                return Some(Err(status));
            }
            match &mut self.seat {
                Seat::Left => return None,
                Seat::Closing(ride) => {
                    ride.close().await;
                    self.seat = Seat::Left;
                }
                Seat::Riding(_) => {
                    if let Err(error) = self.advance().await {
                        self.fail(error);
                    }
                }
            }
        }
    }

    pub(crate) fn model(&self) -> &str {
        &self.order.model
    }

    pub(crate) fn request_id(&self) -> &str {
        &self.order.request_id
    }

    async fn advance(&mut self) -> Result<(), Error> {
        if self.wait().await? {
            return self.take_news();
        }
        self.watch.check()?;
        if self.watch.wants_heartbeat() {
            self.send(Event::Heartbeat(Heartbeat {}));
        }
        Ok(())
    }

    /// Whether there is news; if not, a time has come that means something.
    async fn wait(&mut self) -> Result<bool, Error> {
        let seat = &mut self.seat;
        let news = async {
            match seat {
                // It ends only after this rider has seen how.
                Seat::Riding(ride) => Ok::<_, Error>(ride.news().await),
                Seat::Closing(_) | Seat::Left => std::future::pending().await,
            }
        };
        Ok(self.watch.on(news).await?.is_some())
    }

    fn start(&mut self, cached: bool) {
        let (request_id, model) = (self.order.request_id.to_string(), self.order.model.clone());
        self.events.push_back(Event::Started(Started { request_id, model, cached }));
    }

    fn send(&mut self, event: Event) {
        self.watch.sent();
        self.events.push_back(event);
    }

    /// Turns what the flight knows into events.
    fn take_news(&mut self) -> Result<(), Error> {
        let Seat::Riding(ride) = &self.seat else { return Ok(()) };
        let (sent, question) = (&mut self.sent, &self.order.question);
        let (deltas, end, spoke) =
            ride.look(|state| (grown(state, sent), ended(state, question), state.take_heard()));
        if let Some((report, at)) = self.report.as_ref().zip(spoke) {
            report.upstream_chunk_at(at);
        }
        let heard = self.watch.heard();
        if !deltas.is_empty() {
            self.watch.text();
            self.events.extend(deltas.into_iter().map(Event::Delta));
        }
        heard?;
        let Some(end) = end else { return Ok(()) };
        let (suggestions, usage) = end?;
        let Order { model, question, recent, place, .. } = &self.order;
        recent.insert(place.clone(), model, question, &suggestions);
        self.tell();
        self.finish(suggestions, usage);
        if let Seat::Riding(ride) = std::mem::replace(&mut self.seat, Seat::Left) {
            self.seat = Seat::Closing(ride);
        }
        Ok(())
    }

    fn finish(&mut self, suggestions: Vec<Suggestion>, usage: Option<Usage>) {
        // From here on nobody supersedes it.
        self.order.latest = None;
        let finished = Finished {
            suggestions,
            usage,
            time_to_first_token_ms: self.watch.first_token_ms(),
            response_time_ms: self.watch.elapsed_ms(),
            warnings: std::mem::take(&mut self.order.warnings),
        };
        self.send(Event::Finished(finished));
    }

    fn fail(&mut self, error: Error) {
        self.tell();
        let partial = self.watch.has_text();
        let fault: RpcError = error.into_rpc_error(partial);
        let failed = Failed {
            error_code: fault.code().to_string(),
            message: fault.message().to_owned(),
            incident_id: fault.incident_id().to_owned(),
            partial,
        };
        self.send(Event::Failed(failed));
        self.failure = Some(fault.into());
        self.order.latest = None;
        // Giving up the last seat is what stops the engine.
        self.seat = Seat::Left;
    }

    /// Says once what was used and nobody who shares it has told.
    fn tell(&mut self) {
        let Some(report) = self.report.take() else { return };
        let (Seat::Riding(ride) | Seat::Closing(ride)) = &self.seat else { return };
        let (prompt, tokens) = ride.look(State::untold);
        report.set_tokens(prompt, tokens);
        report.set_engine_time(self.boarded.elapsed());
        let each = u32::try_from(self.sent.len()).unwrap_or(1).max(1);
        self.watch.tell_times(&report, tokens / each);
        self.watch.count_times(tokens / each);
    }
}

impl Drop for Completion {
    fn drop(&mut self) {
        // A caller who left: what was read until then was used.
        self.tell();
    }
}

/// What there is of each suggestion beyond what was sent.
fn grown(state: &State, sent: &mut [usize]) -> Vec<Delta> {
    let texts = (0..).zip(state.choices.texts()).zip(sent);
    let grown = texts.filter_map(|((suggestion, text), sent)| {
        // The end of a text may turn out to have been before what was sent.
        let new = text.get(*sent..).filter(|new| !new.is_empty())?.to_owned();
        *sent = text.len();
        Some(Delta { suggestion, text: new })
    });
    grown.collect()
}

type Made = (Vec<Suggestion>, Option<Usage>);

fn ended(state: &State, question: &CompletionParams) -> Option<Result<Made, Error>> {
    let end = state.end.as_ref()?;
    let made = || {
        let choices = &state.choices;
        (choices.suggestions(&question.prefix, &question.options), choices.usage())
    };
    Some(end.clone().map(|()| made()).map_err(Error::SharedRouting))
}
