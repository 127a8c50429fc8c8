//! One caller's view of an answer: the caller's own names, numbers, times, signs of life and end. What
//! is read comes from the cache, or from a flight that others may read too.

use std::collections::VecDeque;
use std::future::poll_fn;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use hapa_chassis::{Call, Fault, Report};
use hapa_proto::codegen::v1::StreamGenerateCodeResponse;
use hapa_proto::codegen::v1::stream_generate_code_response::{
    Event, Failed, Finished, Heartbeat, Started,
};
use tokio::time::{Instant, Sleep, sleep_until};
use tonic::Status;

use super::entry::Entry;
use super::flight::Read;
use super::flights::Place;
use crate::error::Error;
use crate::watch::{Signal, fired, millis};

/// Who asks, and how the answer names itself to this one.
pub(crate) struct Guest {
    arrived: Instant,
    deadline: Option<Instant>,
    /// The end of the caller's credential.
    revoked: Option<Signal>,
    report: Report,
    request_id: Arc<str>,
    model: String,
    task: String,
    heartbeat: Duration,
    warnings: Vec<String>,
}

impl Guest {
    pub(crate) fn new(
        call: &Call,
        request_id: Arc<str>,
        (model, task): (String, String),
        heartbeat: Duration,
    ) -> Self {
        call.report().model(&model);
        call.report().task(&task);
        Guest {
            arrived: call.arrived,
            deadline: call.deadline,
            revoked: call.ended.clone().map(|ended| Box::pin(ended.cancelled_owned())),
            report: call.report().clone(),
            request_id,
            model,
            task,
            heartbeat,
            warnings: Vec::new(),
        }
    }

    pub(super) fn report(&self) -> &Report {
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
    frames: VecDeque<Event>,
    sequence: u32,
    failure: Option<Status>,
    started: bool,
    /// The last event was read.
    ended: bool,
    first_token: Option<Instant>,
    last_token: Option<Instant>,
    /// The last sign of life.
    last_sent: Instant,
    /// One timer for all waits: set to the earliest, and left alone while tokens push that out.
    alarm: Pin<Box<Sleep>>,
}

impl Seat {
    fn new(place: Option<Place>, guest: Guest) -> Self {
        let now = Instant::now();
        let mut seat = Seat {
            cached: place.as_ref().is_none_or(|place| place.joined),
            place,
            guest,
            frames: VecDeque::new(),
            sequence: 0,
            failure: None,
            started: false,
            ended: false,
            first_token: None,
            last_token: None,
            last_sent: now,
            alarm: Box::pin(sleep_until(now)),
        };
        let due = seat.due();
        seat.alarm.as_mut().reset(due);
        seat
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
                return Err(Fault::internal("a generation ended before it began").into());
            }
            seat.wait().await?;
        }
        Ok(seat)
    }

    /// The next frame of the stream; after `failed`, its status; none after the end.
    pub(crate) async fn next(&mut self) -> Option<Result<StreamGenerateCodeResponse, Status>> {
        loop {
            if let Some(event) = self.frames.pop_front() {
                let sequence = self.sequence;
                self.sequence += 1;
                return Some(Ok(StreamGenerateCodeResponse { sequence, event: Some(event) }));
            }
            if let Some(status) = self.failure.take() {
                return Some(Err(status));
            }
            self.place.as_ref()?;
            if let Err(error) = self.wait().await {
                self.fail(error);
            }
        }
    }

    /// Waits for the answer, the earliest time that means something, or the end of the credential. Can
    /// be dropped at any time and called again.
    async fn wait(&mut self) -> Result<(), Error> {
        let Some(Place { flight, id, .. }) = &self.place else { return Ok(()) };
        let mut events = VecDeque::new();
        let reading = poll_fn(|cx| flight.poll_read(*id, &mut events, cx));
        let read = if self.ended {
            // The connection to the engine is given back; that bounds itself.
            reading.await
        } else {
            tokio::select! {
                biased;
                () = fired(&mut self.guest.revoked) => return Err(Error::KeyEnded),
                read = reading => read,
                () = &mut self.alarm => return self.check_time(),
            }
        };
        match read {
            Read::Events => {
                for event in events {
                    self.take(event);
                }
                // An engine that never pauses leaves the alarm no turn.
                let late = self.guest.deadline.is_some_and(|at| self.last_sent >= at);
                if late && !self.ended { Err(Error::TimeUp) } else { Ok(()) }
            }
            Read::Failed(status) => {
                self.failure = Some(status);
                self.leave();
                Ok(())
            }
            Read::Over => {
                self.leave();
                Ok(())
            }
            Read::TooSlow => Err(Error::ReadTooSlowly),
        }
    }

    fn check_time(&mut self) -> Result<(), Error> {
        let now = Instant::now();
        if self.guest.deadline.is_some_and(|at| now >= at) {
            return Err(Error::TimeUp);
        }
        if self.started && now >= self.last_sent + self.guest.heartbeat {
            self.last_sent = now;
            self.frames.push_back(Event::Heartbeat(Heartbeat {}));
        }
        let due = self.due();
        self.alarm.as_mut().reset(due);
        Ok(())
    }

    fn due(&self) -> Instant {
        let (now, heartbeat) = (Instant::now(), self.guest.heartbeat);
        let next_beat = Some(self.last_sent + heartbeat).filter(|at| *at > now);
        let next_beat = next_beat.unwrap_or(now + heartbeat);
        self.guest.deadline.map_or(next_beat, |at| at.min(next_beat))
    }

    /// An event as this caller is to see it.
    fn take(&mut self, event: Event) {
        let now = Instant::now();
        self.last_sent = now;
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
                self.last_token = Some(now);
                if self.first_token.is_none() {
                    self.first_token = Some(now);
                    self.guest.report.time_to_first_token(now - self.guest.arrived);
                }
                Event::Delta(delta)
            }
            Event::Finished(finished) => {
                self.settle();
                Event::Finished(self.finished(finished))
            }
            Event::Failed(failed) => {
                self.settle();
                Event::Failed(Failed { partial: self.first_token.is_some(), ..failed })
            }
            event @ Event::Heartbeat(_) => event,
        };
        self.frames.push_back(event);
    }

    fn finished(&mut self, mut finished: Finished) -> Finished {
        let arrived = self.guest.arrived;
        finished.time_to_first_token_ms = self.first_token.map_or(0, |at| millis(at - arrived));
        finished.response_time_ms = millis(arrived.elapsed());
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

    /// How fast tokens came, where they were generated for this call.
    fn tell(&self, tokens: Option<u32>) {
        let gaps = tokens.and_then(|tokens| tokens.checked_sub(1)).filter(|gaps| *gaps > 0);
        if let (Some(gaps), Some(first), Some(last)) = (gaps, self.first_token, self.last_token) {
            self.guest.report.between_tokens((last - first) / gaps);
        }
    }

    fn fail(&mut self, error: Error) {
        // Others go on without this one.
        self.leave();
        self.ended = true;
        let partial = self.first_token.is_some();
        let fault: Fault = error.fault(partial);
        let failed = Failed {
            error_code: fault.code().to_string(),
            message: fault.message().to_owned(),
            incident_id: fault.incident_id().to_owned(),
            partial,
        };
        self.frames.push_back(Event::Failed(failed));
        self.failure = Some(fault.into());
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        self.leave();
    }
}
