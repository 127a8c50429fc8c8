//! Code generation: splits the answer of a model into code and explanation.

pub(crate) mod fence;
