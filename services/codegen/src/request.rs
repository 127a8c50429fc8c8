//! From a request message to what an engine is asked: limits, defaults, the task, the model and the prompt.

pub(crate) mod control_tokens;
pub(crate) mod generate_params;
pub(crate) mod model;
pub(crate) mod prompt;
pub(crate) mod task;
pub(crate) mod unicode;
