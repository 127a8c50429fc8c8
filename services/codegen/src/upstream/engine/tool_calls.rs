//! Assembles the tool calls of a response from the parts that arrive in its stream.

use crate::upstream::engine::delta::ToolCallDelta;

/// Maximum number of tool calls of a response.
const MAX_TOOL_CALLS: usize = 128;
/// Maximum size of all arguments, names and ids of a response.
const MAX_TOOL_CALL_BYTES: usize = 1024 * 1024;

/// A response has too many tool calls, or too large ones.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("the tool calls of a response exceed 128 calls or 1 MiB")]
pub(crate) struct ToolCallsTooLarge;

/// A tool call of an answer.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct ToolCall {
    /// Index of the answer, from 0.
    pub(crate) choice: usize,
    /// Index that the engine reports. Not unique: some engines report 0 for all calls.
    pub(crate) index: usize,
    /// Empty if the engine reports none.
    pub(crate) id: String,
    pub(crate) name: String,
    /// Exactly what the engine sent: usually a JSON object.
    pub(crate) arguments: String,
}

/// The tool calls of all answers of a response.
#[derive(Debug, Default)]
pub(crate) struct ToolCalls {
    calls: Vec<ToolCall>,
    bytes: usize,
}

impl ToolCalls {
    /// Adds a part. A part that exceeds a limit changes nothing.
    pub(crate) fn push(
        &mut self,
        choice: usize,
        part: &ToolCallDelta,
    ) -> Result<(), ToolCallsTooLarge> {
        let id = part.id.as_deref().unwrap_or_default();
        let name = part.name.as_deref().unwrap_or_default();
        let position = self.position(choice, part.index, id, name);
        let call = position.map(|position| &self.calls[position]);
        // The first id and the first name count; engines repeat them.
        let id = if call.is_none_or(|call| call.id.is_empty()) { id } else { "" };
        let name = if call.is_none_or(|call| call.name.is_empty()) { name } else { "" };
        let bytes = self.bytes + id.len() + name.len() + part.arguments.len();
        if bytes > MAX_TOOL_CALL_BYTES || position.is_none() && self.calls.len() == MAX_TOOL_CALLS {
            return Err(ToolCallsTooLarge);
        }
        self.bytes = bytes;
        let position = position.unwrap_or_else(|| {
            self.calls.push(ToolCall { choice, index: part.index, ..ToolCall::default() });
            self.calls.len() - 1
        });
        let call = &mut self.calls[position];
        call.id.push_str(id);
        call.name.push_str(name);
        call.arguments.push_str(&part.arguments);
        Ok(())
    }

    /// The call that a part continues: the one with its id, or else the last one with its index. Some
    /// engines report the same index for all calls, so another id together with a name begins a call.
    fn position(&self, choice: usize, index: usize, id: &str, name: &str) -> Option<usize> {
        let last = |matches: &dyn Fn(&ToolCall) -> bool| {
            self.calls.iter().rposition(|call| call.choice == choice && matches(call))
        };
        let same_id = || last(&|call| !id.is_empty() && call.id == id);
        let position = last(&|call| call.index == index);
        let Some(call) = position.map(|position| &self.calls[position]) else { return same_id() };
        let is_other_id = !id.is_empty() && !call.id.is_empty() && id != call.id;
        if is_other_id && !name.is_empty() {
            return same_id();
        }
        same_id().or(position)
    }

    /// The calls of one answer, in their order of arrival.
    pub(crate) fn of_choice(&self, choice: usize) -> impl Iterator<Item = &ToolCall> {
        self.calls.iter().filter(move |call| call.choice == choice)
    }

    /// The calls of all answers, in their order of arrival.
    pub(crate) fn into_calls(self) -> Vec<ToolCall> {
        self.calls
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.calls.is_empty()
    }
}

#[cfg(test)]
mod tests;
