//! The failures that a caller may see. Services and callers with `errors:admin` see all of them. A
//! caller with `errors:read` sees the occurrences and counts of its own owner, without causes.

use hapa_core::call::Call;

/// Scope to read all failures and to update incidents.
pub(crate) const ADMIN_SCOPE: &str = "errors:admin";
/// Scope to read the failures of the caller's own owner.
pub(crate) const READ_SCOPE: &str = "errors:read";

/// The set of failures that a caller may see.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Visibility {
    /// The failures of all owners.
    All,
    /// The failures of one owner. "" sees none.
    Owner(String),
}

impl Visibility {
    pub(crate) fn from_call(call: &Call) -> Visibility {
        if call.is_mesh || call.has_scope(ADMIN_SCOPE) {
            return Visibility::All;
        }
        let owner = call.principal.as_ref().map(|principal| principal.owner.clone());
        Visibility::Owner(owner.unwrap_or_default())
    }
}
