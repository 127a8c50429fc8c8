//! The request fields that an engine does not support, learned from its refusals.
//!
//! A field is left out for good only after the engine has accepted a request without it. An error text that
//! repeats a prompt can therefore not switch off a field.

use std::collections::HashMap;
use std::sync::{PoisonError, RwLock};

use bytes::Bytes;
use serde_json::{Map, Value};

use crate::upstream::engine::request_field::RequestField;
use crate::upstream::engine::{EngineError, Operation, RefusalReason};

/// Maximum number of fields that one attempt leaves out anew.
const MAX_NEW_FIELDS: u32 = 4;
/// Maximum number of models whose limits are known.
const MAX_MODELS: usize = 1_000;
/// Name of the message that is merged into another one.
const SYSTEM_MESSAGE: &str = "system message";

/// What one engine does not support, by model and operation.
#[derive(Debug, Default)]
pub(crate) struct LearnedLimits(RwLock<HashMap<String, [Limits; 2]>>);

/// What is not supported.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Limits {
    fields: FieldSet,
    /// The model has no system messages, so that the first message of the user contains its text.
    is_system_refused: bool,
}

/// A set of request fields.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct FieldSet(u32);

/// What one attempt leaves out: what was learned before, and what is new.
#[derive(Debug)]
pub(crate) struct Adaptation<'l> {
    limits: &'l LearnedLimits,
    operation: Operation,
    model: &'l str,
    left_out: Limits,
    new: Limits,
}

impl LearnedLimits {
    /// Begins an attempt.
    pub(crate) fn adaptation<'l>(&'l self, operation: Operation, model: &'l str) -> Adaptation<'l> {
        let known = self.0.read().unwrap_or_else(PoisonError::into_inner);
        let left_out = known.get(model).map(|limits| limits[operation as usize]);
        let (left_out, new) = (left_out.unwrap_or_default(), Limits::default());
        Adaptation { limits: self, operation, model, left_out, new }
    }

    /// The names of all fields that are left out, for any model and operation.
    pub(crate) fn names(&self) -> Vec<&'static str> {
        let known = self.0.read().unwrap_or_else(PoisonError::into_inner);
        let all = known.values().flatten().fold(Limits::default(), |all, one| all.union(*one));
        all.names().collect()
    }

    /// Adds limits. Returns those that were not known.
    fn insert(&self, operation: Operation, model: &str, new: Limits) -> Limits {
        if new == Limits::default() {
            return new;
        }
        let mut known = self.0.write().unwrap_or_else(PoisonError::into_inner);
        if known.len() >= MAX_MODELS
            && !known.contains_key(model)
            && let Some(any) = known.keys().next().cloned()
        {
            known.remove(&any);
        }
        let limits = &mut known.entry(model.to_owned()).or_default()[operation as usize];
        let before = std::mem::replace(limits, limits.union(new));
        Limits {
            fields: FieldSet(new.fields.0 & !before.fields.0),
            is_system_refused: new.is_system_refused && !before.is_system_refused,
        }
    }
}

impl Limits {
    fn union(self, other: Limits) -> Limits {
        Limits {
            fields: FieldSet(self.fields.0 | other.fields.0),
            is_system_refused: self.is_system_refused || other.is_system_refused,
        }
    }

    fn names(self) -> impl Iterator<Item = &'static str> {
        self.fields.names().chain(self.is_system_refused.then_some(SYSTEM_MESSAGE))
    }
}

impl Adaptation<'_> {
    /// The body without what is left out.
    pub(crate) fn apply(&self, body: &Bytes) -> Bytes {
        if self.left_out == Limits::default() {
            return body.clone();
        }
        let Ok(Value::Object(mut request)) = serde_json::from_slice(body) else {
            return body.clone();
        };
        for field in self.left_out.fields.iter() {
            remove(&mut request, field);
        }
        if self.left_out.is_system_refused {
            merge_system_message(&mut request);
        }
        serde_json::to_vec(&request).map_or_else(|_| body.clone(), Bytes::from)
    }

    /// Leaves out what an error names. Returns whether the request is different without it, so that
    /// the engine may accept it. `body` is the request before any adaptation.
    pub(crate) fn learn_from(&mut self, error: &EngineError, body: &Bytes) -> bool {
        match error.rejection() {
            Some((_, RefusalReason::FieldRefused { field, is_unsupported })) => {
                self.leave_out(field, is_unsupported, body)
            }
            Some((_, RefusalReason::SystemRoleRefused)) => {
                let is_new = !std::mem::replace(&mut self.left_out.is_system_refused, true);
                let is_changed = is_new && changes(body, merge_system_message);
                self.new.is_system_refused |= is_changed;
                is_changed
            }
            _ => false,
        }
    }

    fn leave_out(&mut self, field: RequestField, is_unsupported: bool, body: &Bytes) -> bool {
        let is_learnable =
            is_extra(field) || (is_unsupported && is_optional(field, self.operation));
        let is_known =
            self.left_out.fields.contains(field) || self.new.fields.len() >= MAX_NEW_FIELDS;
        if !is_learnable || is_known || !changes(body, |request| remove(request, field)) {
            return false;
        }
        self.left_out.fields.insert(field);
        self.new.fields.insert(field);
        true
    }

    /// The fields of callers in this request that are left out. A renamed field is not.
    pub(crate) fn left_out_of_caller(&self, body: &Bytes) -> Vec<&'static str> {
        let fields = self.left_out.fields.iter().filter(|field| {
            *field != RequestField::MaxTokens && changes(body, |request| remove(request, *field))
        });
        fields.filter_map(RequestField::caller_field).collect()
    }

    /// The engine has accepted the request: what is new is left out from now on. Returns the names of
    /// what no other attempt has learned meanwhile.
    pub(crate) fn keep(self) -> Vec<&'static str> {
        self.limits.insert(self.operation, self.model, self.new).names().collect()
    }
}

impl FieldSet {
    fn bit(field: RequestField) -> u32 {
        1 << field as u32
    }

    fn insert(&mut self, field: RequestField) {
        self.0 |= FieldSet::bit(field);
    }

    fn contains(self, field: RequestField) -> bool {
        self.0 & FieldSet::bit(field) != 0
    }

    fn len(self) -> u32 {
        self.0.count_ones()
    }

    fn iter(self) -> impl Iterator<Item = RequestField> {
        RequestField::ALL.into_iter().filter(move |field| self.contains(*field))
    }

    fn names(self) -> impl Iterator<Item = &'static str> {
        self.iter().map(RequestField::name)
    }
}

/// Fields that this server adds on its own: an engine may refuse them for any reason.
fn is_extra(field: RequestField) -> bool {
    matches!(
        field,
        RequestField::CacheSalt
            | RequestField::Priority
            | RequestField::StreamOptions
            | RequestField::ContinuousUsageStats
            | RequestField::Logprobs
    )
}

/// Fields without which an engine applies its own default. A refused value of them is the caller's.
fn is_optional(field: RequestField, operation: Operation) -> bool {
    match field {
        RequestField::N | RequestField::Stop | RequestField::Temperature | RequestField::TopP => {
            true
        }
        // Its replacement exists for chats only.
        RequestField::MaxTokens => matches!(operation, Operation::Chat),
        _ => false,
    }
}

/// Whether a change to the request has an effect.
fn changes(body: &Bytes, change: impl FnOnce(&mut Map<String, Value>) -> bool) -> bool {
    serde_json::from_slice(body).is_ok_and(|mut request| change(&mut request))
}

/// Puts the system message before the text of the first message of the user. Returns whether there was one.
fn merge_system_message(request: &mut Map<String, Value>) -> bool {
    let Some(messages) =
        request.get_mut(RequestField::Messages.name()).and_then(Value::as_array_mut)
    else {
        return false;
    };
    let [first, second, ..] = messages.as_mut_slice() else { return false };
    if first["role"] != "system" || second["role"] != "user" {
        return false;
    }
    let (Some(system), Some(user)) = (first["content"].as_str(), second["content"].as_str()) else {
        return false;
    };
    second["content"] = Value::from(format!("{system}\n\n{user}"));
    messages.remove(0);
    true
}

/// Removes a field, or renames it. Returns whether the request had it.
fn remove(request: &mut Map<String, Value>, field: RequestField) -> bool {
    match field {
        RequestField::ContinuousUsageStats => request
            .get_mut(RequestField::StreamOptions.name())
            .and_then(Value::as_object_mut)
            .is_some_and(|options| options.remove(field.name()).is_some()),
        RequestField::MaxTokens => {
            let Some(limit) = request.remove(field.name()) else { return false };
            request.insert("max_completion_tokens".to_owned(), limit);
            true
        }
        RequestField::Logprobs => {
            request.remove("top_logprobs");
            request.remove(field.name()).is_some()
        }
        field => request.remove(field.name()).is_some(),
    }
}

#[cfg(test)]
mod tests;
