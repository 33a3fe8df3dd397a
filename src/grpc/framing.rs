//! Where the messages of a request end: each comes behind a flag and its length, five bytes together.
//!
//! Knows nothing of what they hold. Invariant: however the bytes are cut, messages end at the same places.

/// The flag and the length.
const PREFIX_BYTES: usize = 5;

/// Follows a request's bytes.
#[derive(Debug, Default)]
pub(super) struct Framing {
    prefix: [u8; PREFIX_BYTES],
    /// How much has come of the message that is on its way, its prefix included.
    begun: usize,
}

impl Framing {
    /// Follows some more bytes: whether a message has ended in them.
    pub(super) fn follow(&mut self, bytes: &[u8]) -> bool {
        let mut has_ended = false;
        let mut rest = bytes;
        while !rest.is_empty() {
            let missing = self.known() - self.begun;
            let (some, more) = rest.split_at(rest.len().min(missing));
            if self.begun < PREFIX_BYTES {
                self.prefix[self.begun..][..some.len()].copy_from_slice(some);
            }
            self.begun += some.len();
            rest = more;
            if self.begun >= PREFIX_BYTES && self.begun == self.known() {
                self.begun = 0;
                has_ended = true;
            }
        }
        has_ended
    }

    /// How much has come of the message that is on its way.
    pub(super) fn begun(&self) -> usize {
        self.begun
    }

    /// How long the message on its way is, as far as that is known: its prefix says the rest.
    fn known(&self) -> usize {
        if self.begun < PREFIX_BYTES {
            return PREFIX_BYTES;
        }
        let [_, length @ ..] = self.prefix;
        usize::try_from(u32::from_be_bytes(length)).map_or(usize::MAX, |length| length.saturating_add(PREFIX_BYTES))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A message of so many bytes, which look like prefixes.
    fn message(length: u8) -> Vec<u8> {
        [vec![0, 0, 0, 0, length], vec![1; length.into()]].concat()
    }

    #[test]
    fn messages_end_where_they_end_however_they_are_cut() {
        let lengths = [3, 0, 0, 7, 1, 200, 0];
        let bytes: Vec<u8> = lengths.into_iter().flat_map(message).collect();
        for cut in 1..=bytes.len() {
            let mut framing = Framing::default();
            let mut followed = 0;
            for piece in bytes.chunks(cut) {
                let before = framing.begun();
                let has_ended = framing.follow(piece);
                followed += piece.len();
                // What is on its way is what the whole messages so far leave.
                let mut left = followed;
                for length in lengths {
                    let whole = usize::from(length) + PREFIX_BYTES;
                    if left < whole {
                        break;
                    }
                    left -= whole;
                }
                assert_eq!(framing.begun(), left, "{cut}");
                assert_eq!(has_ended, before + piece.len() != left, "{cut}");
            }
            assert_eq!(framing.begun(), 0);
        }
    }

    #[test]
    fn a_message_of_any_length_is_on_its_way_until_all_of_it_has_come() {
        let mut framing = Framing::default();
        assert!(!framing.follow(&[0, 0xff, 0xff, 0xff, 0xff]));
        assert!(!framing.follow(&[0; 100]));
        assert_eq!(framing.begun(), 105);
    }
}
