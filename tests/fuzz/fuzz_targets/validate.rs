//! Validates arbitrary code in every supported language.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| hapa_codegen::fuzz::code(bytes));
