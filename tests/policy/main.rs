//! The policy tests: dependencies, sizes, words, names, documentation, manifests and the supply chain.
//! They read files and run checkers of files; no service is started.
#![expect(clippy::unwrap_used, reason = "a failing test must show the place")]

mod cycles;
mod deploy;
mod documents;
mod duplicates;
mod names;
mod prose;
mod repository;
mod supply_chain;
