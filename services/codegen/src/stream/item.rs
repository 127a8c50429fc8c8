//! What an answer consists of, for every operation: deltas of its tracks, and one end.

use std::sync::Arc;

use hapa_core::rpc_error::RpcError;
use hapa_proto::codegen::v1::{Suggestion, Usage};
use tonic::Status;

/// Text of a delta that is extended before a new one begins, in bytes. Deltas are dropped as a whole.
const MAX_JOINED_BYTES: usize = 2 * 1024;

/// The part of an answer that a delta belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Track {
    Code,
    Explanation,
    Reasoning,
    /// A suggestion of a completion, by its index.
    Suggestion(u32),
}

/// A piece of text. Never empty.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Delta {
    pub(crate) track: Track,
    pub(crate) text: String,
}

/// The end of a complete answer.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct AnswerEnd {
    pub(crate) finish_reason: String,
    pub(crate) usage: Option<Usage>,
    pub(crate) warnings: Vec<String>,
    /// The final suggestions of a completion.
    pub(crate) suggestions: Vec<Suggestion>,
    /// Whether the same request may be answered with this answer again.
    pub(crate) is_reusable: bool,
}

/// The end of a failed answer.
#[derive(Debug)]
pub(crate) struct Failure {
    pub(crate) status: Status,
    pub(crate) error_code: String,
    pub(crate) message: String,
    pub(crate) incident_id: String,
}

/// One item of an answer. An answer is `Started`, deltas, and one of `Finished` and `Failed`, or only `Failed`.
#[derive(Clone, Debug)]
pub(crate) enum StreamItem {
    Started,
    Delta(Delta),
    /// All deltas so far are reasoning, whatever their track.
    Reclassified,
    Finished(Arc<AnswerEnd>),
    Failed(Arc<Failure>),
}

impl Delta {
    pub(crate) fn new(track: Track, text: &str) -> Delta {
        Delta { track, text: text.to_owned() }
    }
}

impl From<RpcError> for Failure {
    fn from(error: RpcError) -> Failure {
        Failure {
            error_code: error.code().to_string(),
            message: error.message().to_owned(),
            incident_id: error.incident_id().to_owned(),
            status: error.into(),
        }
    }
}

impl From<Status> for Failure {
    /// For a failure before the answer has started: only its status is sent.
    fn from(status: Status) -> Failure {
        let (error_code, message, incident_id) = Default::default();
        Failure { status, error_code, message, incident_id }
    }
}

/// Appends text to the last delta if that is of the same track, or else as a new delta.
pub(crate) fn push_delta(items: &mut Vec<StreamItem>, track: Track, text: &str) {
    if text.is_empty() {
        return;
    }
    match items.last_mut() {
        Some(StreamItem::Delta(last)) if last.track == track => last.text.push_str(text),
        _ => items.push(StreamItem::Delta(Delta::new(track, text))),
    }
}

impl StreamItem {
    /// The track of a delta.
    pub(crate) fn track(&self) -> Option<Track> {
        if let StreamItem::Delta(delta) = self { Some(delta.track) } else { None }
    }

    /// Size of its text in bytes.
    pub(crate) fn text_bytes(&self) -> usize {
        if let StreamItem::Delta(delta) = self { delta.text.len() } else { 0 }
    }

    /// Joins the text of the next item, if both are short deltas of one track. Otherwise returns the item.
    pub(crate) fn try_join(&mut self, next: StreamItem) -> Option<StreamItem> {
        match (self, next) {
            (StreamItem::Delta(last), StreamItem::Delta(next))
                if last.track == next.track && last.text.len() < MAX_JOINED_BYTES =>
            {
                last.text.push_str(&next.text);
                None
            }
            (_, next) => Some(next),
        }
    }
}
