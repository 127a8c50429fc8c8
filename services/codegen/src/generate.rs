//! Code generation: splits the answer of a model into reasoning, code and explanation.

pub(crate) mod code_block_tracker;
pub(crate) mod control_token_filter;
pub(crate) mod fence;
#[cfg(test)]
mod pieces;
pub(crate) mod think_tags;
pub(crate) mod unfenced;
