//! Chance from the operating system, fit for secrets.

use std::time::Duration;

/// So many random bytes.
pub(crate) fn random<const N: usize>() -> [u8; N] {
    let mut bytes = [0; N];
    getrandom::fill(&mut bytes).expect("the operating system always has random bytes once it has booted");
    bytes
}

/// A random time from half of `longest` to all of it.
pub(crate) fn jittered(longest: Duration) -> Duration {
    longest.mul_f64(0.5 + f64::from(u32::from_be_bytes(random())) / f64::from(u32::MAX) / 2.0)
}
