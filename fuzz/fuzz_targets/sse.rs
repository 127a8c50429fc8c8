//! What an engine may send, in any pieces.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| hapa_codegen::fuzz::stream(bytes));
