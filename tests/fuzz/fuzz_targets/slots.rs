#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| alula_fuzz::slots::run(bytes));
