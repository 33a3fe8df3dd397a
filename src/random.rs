//! Random bytes from the operating system, fit for secrets.

/// So many random bytes.
pub(crate) fn random<const N: usize>() -> [u8; N] {
    let mut bytes = [0; N];
    getrandom::fill(&mut bytes).expect("the operating system always has random bytes once it has booted");
    bytes
}
