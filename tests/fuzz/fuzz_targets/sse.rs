//! Feeds arbitrary bytes to codegen as an engine's SSE stream, in chunks of varying length.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| hapa_codegen::fuzz::stream(bytes));
