//! What an answer is found by. Two questions have one key when the same tenant sends the engine the
//! same bytes for the same model; nothing of a question can be read in its key.

use sha2::{Digest as _, Sha256};

/// Grows when what is kept means something else than before.
const VERSION: u32 = 1;

/// See the module.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Key(pub(super) [u8; 32]);

/// What an answer depends on.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Question<'a> {
    /// Whose answer it is; none of the mesh itself.
    pub(crate) tenant: Option<&'a str>,
    pub(crate) model: &'a str,
    /// What the engine says that tells a model from another of its name.
    pub(crate) revision: &'a str,
    /// What the engine is sent.
    pub(crate) body: &'a [u8],
}

impl Key {
    pub(crate) fn of(question: Question<'_>) -> Key {
        let Question { tenant, model, revision, body } = question;
        let mut hash = Sha256::new();
        hash.update(VERSION.to_be_bytes());
        hash.update([u8::from(tenant.is_some())]);
        // With its length, so that no part runs over into the next.
        for part in
            [tenant.unwrap_or_default().as_bytes(), model.as_bytes(), revision.as_bytes(), body]
        {
            hash.update((part.len() as u64).to_be_bytes());
            hash.update(part);
        }
        Key(hash.finalize().into())
    }

    pub(super) fn hex(self) -> String {
        hex::encode(self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_part_of_a_question_changes_its_key() {
        let question = Question { tenant: Some("a"), model: "m", revision: "r", body: b"{}" };
        let keys = [
            question,
            Question { tenant: Some("b"), ..question },
            Question { tenant: None, ..question },
            Question { tenant: Some(""), ..question },
            Question { model: "n", ..question },
            Question { revision: "", ..question },
            Question { body: b"{} ", ..question },
            // The same letters, cut elsewhere.
            Question { tenant: Some("am"), model: "", ..question },
        ]
        .map(|question| Key::of(question).hex());
        let different: std::collections::BTreeSet<_> = keys.iter().collect();
        assert_eq!(different.len(), keys.len());
        assert_eq!(Key::of(question).hex(), keys[0]);
        assert_eq!(keys[0].len(), 64);
    }
}
