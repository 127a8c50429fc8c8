//! The API for code: generation, completion, cache, idempotency, limits and errors.

mod admission;
mod cache;
mod complete;
mod failures;
mod fair_queue;
pub(crate) mod generate;
mod idempotency;
mod kinds_of_text;
mod limits;
mod malformed_requests;
mod slow_readers;
mod task_models;
mod validate;
