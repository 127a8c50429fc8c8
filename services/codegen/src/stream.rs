//! From a prepared request to the events of its response: response cache, single flight, the generation itself, and what
//! each subscriber sees of it. The same for every operation; only the fold differs.

mod accounting;
pub(crate) mod cache;
mod deadlines;
mod fold;
mod generation;
mod in_flight;
mod item;
mod log;
mod pipeline;
mod respond;
mod shared;
mod waker_set;

pub(crate) use self::deadlines::{Timeouts, millis};
pub(crate) use self::fold::Fold;
pub(crate) use self::generation::{Engines, GenerationJob};
pub(crate) use self::item::{AnswerEnd, Delta, StreamItem, Track, push_delta};
pub(crate) use self::pipeline::{Pipeline, Sharing};
pub(crate) use self::respond::{Finished, Response, ResponseEvent, SubscriberContext};
