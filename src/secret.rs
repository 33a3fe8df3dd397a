//! Text that no log may show.

use std::fmt;

use zeroize::Zeroizing;

/// A password. `Debug` does not show it, there is no `Display`, and its memory is overwritten when it goes.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(Zeroizing<String>);

impl Secret {
    /// Keeps `text` from being shown.
    pub fn new(text: String) -> Self {
        Self(Zeroizing::new(text))
    }

    /// The text itself, for whoever must prove to know it.
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("<redacted>")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_shown_to_nobody_but_who_asks() {
        let secret = Secret::new("hush".into());
        assert_eq!((format!("{secret:?}").as_str(), secret.expose()), ("<redacted>", "hush"));
    }
}
