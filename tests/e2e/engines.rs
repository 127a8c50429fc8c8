//! Several engines as one pool, and the texts of engines in errors.

mod answers;
mod error_texts;
mod pool;
mod reasoning;
