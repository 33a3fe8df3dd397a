//! Who calls.

use std::fmt;
use std::sync::{Arc, LazyLock};

/// The authenticated caller. A session answers to its own principal only.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Principal(Arc<str>);

impl Principal {
    /// The principal of that name.
    pub fn new(name: &str) -> Self {
        Self(name.into())
    }

    /// The longest name: as long as a host's may be.
    pub const NAME_BYTES_MAX: usize = 253;

    /// Whether a principal may have that name.
    pub fn is_name(name: &str) -> bool {
        (1..=Self::NAME_BYTES_MAX).contains(&name.len()) && !name.contains(char::is_control)
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.0
    }

    /// The one principal of a broker that authenticates nobody.
    pub fn anonymous() -> Self {
        static ANONYMOUS: LazyLock<Principal> = LazyLock::new(|| Principal::new("anonymous"));
        ANONYMOUS.clone()
    }
}

impl fmt::Display for Principal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}
