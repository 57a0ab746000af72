#![no_main]

use alula_fuzz::allocator::Peaking;

#[global_allocator]
static ALLOCATOR: Peaking = Peaking;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| alula_fuzz::kernel::run(bytes));
