//! The key of an answer: a hash of everything that the answer depends on. The request cannot be read from its key.

use sha2::{Digest as _, Sha256};

/// Increased when entries with equal keys change their meaning.
const VERSION: u32 = 1;

/// See the module. Two requests have the same key if the same tenant sends the same bytes to the same model.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct CacheKey(pub(super) [u8; 32]);

/// Everything that an answer depends on.
#[derive(Clone, Copy, Debug)]
pub(crate) struct CacheKeyInput<'a> {
    /// The owner of the key or session; `None` for calls of the mesh itself.
    pub(crate) tenant: Option<&'a str>,
    pub(crate) model: &'a str,
    /// What the engine reports about the model besides its name.
    pub(crate) revision: &'a str,
    /// The body of the request to the engine.
    pub(crate) body: &'a [u8],
    /// What the answer depends on besides the body.
    pub(crate) options: &'a [&'a [u8]],
}

impl CacheKey {
    pub(crate) fn new(input: CacheKeyInput<'_>) -> CacheKey {
        let CacheKeyInput { tenant, model, revision, body, options } = input;
        let mut hash = Sha256::new();
        hash.update(VERSION.to_be_bytes());
        hash.update([u8::from(tenant.is_some())]);
        let fixed =
            [tenant.unwrap_or_default().as_bytes(), model.as_bytes(), revision.as_bytes(), body];
        // Each part with its length, so that no part can extend into the next.
        for part in fixed.iter().chain(options) {
            hash.update((part.len() as u64).to_be_bytes());
            hash.update(part);
        }
        CacheKey(hash.finalize().into())
    }

    pub(super) fn hex(self) -> String {
        hex::encode(self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_part_of_the_input_changes_the_key() {
        let input = CacheKeyInput {
            tenant: Some("a"),
            model: "m",
            revision: "r",
            body: b"{}",
            options: &[],
        };
        let keys = [
            input,
            CacheKeyInput { tenant: Some("b"), ..input },
            CacheKeyInput { tenant: None, ..input },
            CacheKeyInput { tenant: Some(""), ..input },
            CacheKeyInput { model: "n", ..input },
            CacheKeyInput { revision: "", ..input },
            CacheKeyInput { body: b"{} ", ..input },
            CacheKeyInput { options: &[b""], ..input },
            // The same bytes, divided differently.
            CacheKeyInput { tenant: Some("am"), model: "", ..input },
        ]
        .map(|input| CacheKey::new(input).hex());
        let different: std::collections::BTreeSet<_> = keys.iter().collect();
        assert_eq!(different.len(), keys.len());
        assert_eq!(CacheKey::new(input).hex(), keys[0]);
        assert_eq!(keys[0].len(), 64);
    }
}
