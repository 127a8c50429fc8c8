//! Several engines as one pool, and the texts of engines in errors.

mod error_texts;
mod pool;
