//! One caller's view of an answer: the caller's own names, numbers, times, signs of life and end. What
//! is read comes from the cache, or from a flight that others may read too.

use std::collections::VecDeque;
use std::future::poll_fn;
use std::sync::Arc;
use std::time::Duration;

use hapa_core::call::Call;
use hapa_core::call_stats::CallStats;
use hapa_core::rpc_error::RpcError;
use hapa_proto::codegen::v1::stream_generate_code_response::{
    Event, Failed, Finished, Heartbeat, Started,
};
use tonic::Status;

use super::entry::Entry;
use super::flight::{Place, Read};
use crate::error::Error;
use crate::generation::failed;
use crate::watch::Watch;

/// Who asks, and how the answer names itself to this one.
pub(crate) struct Guest {
    watch: Watch,
    report: CallStats,
    request_id: Arc<str>,
    model: String,
    task: String,
    warnings: Vec<String>,
}

impl Guest {
    pub(crate) fn new(
        call: &Call,
        request_id: Arc<str>,
        (model, task): (String, String),
        heartbeat: Duration,
    ) -> Self {
        call.stats().set_model(&model);
        call.stats().set_task(&task);
        Guest {
            watch: Watch::of_caller(call, heartbeat),
            report: call.stats().clone(),
            request_id,
            model,
            task,
            warnings: Vec::new(),
        }
    }

    pub(super) fn report(&self) -> &CallStats {
        &self.report
    }

    /// Says it with the answer.
    pub(crate) fn warn(&mut self, words: String) {
        self.warnings.push(words);
    }
}

/// See the module.
pub(crate) struct Seat {
    /// None where nothing more will come.
    place: Option<Place>,
    guest: Guest,
    cached: bool,
    events: VecDeque<Event>,
    failure: Option<Status>,
    started: bool,
    /// The last event was read.
    ended: bool,
}

impl Seat {
    fn new(place: Option<Place>, guest: Guest) -> Self {
        Seat {
            cached: place.as_ref().is_none_or(|place| place.joined),
            place,
            guest,
            events: VecDeque::new(),
            failure: None,
            started: false,
            ended: false,
        }
    }

    /// For an answer that is known.
    pub(super) fn known(entry: &Entry, guest: Guest) -> Self {
        let mut seat = Seat::new(None, guest);
        seat.take(Event::Started(Started::default()));
        for part in &entry.parts {
            seat.take(Event::Delta(part.clone()));
        }
        seat.take(Event::Finished(entry.finished.clone().unwrap_or_default()));
        seat
    }

    /// For one that is on its way. Waits until it begins, so that an engine which refuses at once
    /// gives a plain status and no stream.
    pub(super) async fn begin(place: Place, guest: Guest) -> Result<Self, Status> {
        let mut seat = Seat::new(Some(place), guest);
        while !seat.started {
            if let Some(status) = seat.failure.take() {
                return Err(status);
            }
            if seat.place.is_none() {
                return Err(RpcError::internal("a generation ended before it began").into());
            }
            if !seat.wait().await? {
                seat.guest.watch.check()?;
            }
        }
        Ok(seat)
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
            self.place.as_ref()?;
            if let Err(error) = self.advance().await {
                self.fail(error);
            }
        }
    }

    async fn advance(&mut self) -> Result<(), Error> {
        if self.wait().await? {
            return Ok(());
        }
        self.guest.watch.check()?;
        if self.guest.watch.wants_heartbeat() {
            self.guest.watch.sent();
            self.events.push_back(Event::Heartbeat(Heartbeat::default()));
        }
        Ok(())
    }

    /// Whether there is news, which is taken; if not, a time has come that means something. Can be
    /// dropped at any time and called again.
    async fn wait(&mut self) -> Result<bool, Error> {
        let Some(Place { flight, id, .. }) = &self.place else { return Ok(true) };
        let mut events = VecDeque::new();
        let reading = poll_fn(|cx| flight.poll_read(*id, &mut events, cx));
        let read = if self.ended {
            // The connection to the engine is given back; that bounds itself.
            reading.await
        } else {
            let reading = async { Ok::<_, Error>(reading.await) };
            let Some(read) = self.guest.watch.on(reading).await? else { return Ok(false) };
            read
        };
        match read {
            Read::Events => {
                flight.tell_heard(&self.guest.report);
                let heard = self.guest.watch.heard();
                for event in events {
                    self.take(event);
                }
                if !self.ended {
                    heard?;
                }
            }
            Read::Failed(status) => {
                self.failure = Some(status);
                self.leave();
            }
            Read::Over => self.leave(),
            Read::TooSlow => return Err(Error::SlowReader),
        }
        Ok(true)
    }

    /// An event as this caller is to see it.
    fn take(&mut self, event: Event) {
        self.guest.watch.sent();
        let event = match event {
            Event::Started(_) => {
                self.started = true;
                Event::Started(Started {
                    request_id: self.guest.request_id.to_string(),
                    model: self.guest.model.clone(),
                    task: self.guest.task.clone(),
                    cached: self.cached,
                })
            }
            Event::Delta(delta) => {
                self.guest.watch.text();
                Event::Delta(delta)
            }
            Event::Finished(finished) => {
                self.settle();
                Event::Finished(self.finished(finished))
            }
            Event::Failed(failed) => {
                self.settle();
                Event::Failed(Failed { partial: self.guest.watch.has_text(), ..failed })
            }
            event @ Event::Heartbeat(_) => event,
        };
        self.events.push_back(event);
    }

    fn finished(&mut self, mut finished: Finished) -> Finished {
        finished.time_to_first_token_ms = self.guest.watch.first_token_ms();
        finished.response_time_ms = self.guest.watch.elapsed_ms();
        finished.warnings.append(&mut self.guest.warnings);
        finished
    }

    /// The end was read.
    fn settle(&mut self) {
        self.ended = true;
        let tokens = self.place.as_ref().and_then(|place| place.flight.settle(place.id));
        self.tell(tokens);
    }

    fn leave(&mut self) {
        let tokens = self.place.take().and_then(|place| place.flight.leave(place.id));
        self.tell(tokens);
    }

    /// How fast tokens came; between two of them where they were generated for this call.
    fn tell(&self, tokens: Option<u32>) {
        self.guest.watch.tell_times(&self.guest.report, tokens.unwrap_or(0));
    }

    fn fail(&mut self, error: Error) {
        // Others go on without this one.
        self.leave();
        self.ended = true;
        let partial = self.guest.watch.has_text();
        let fault: RpcError = error.into_rpc_error(partial);
        self.events.push_back(failed(&fault, partial));
        self.failure = Some(fault.into());
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        self.leave();
    }
}
