//! What a caller may see of failures: with errors:admin, and as the mesh, everything; with errors:read what
//! its own owner met, counted for that owner alone, without causes.

use hapa_core::call::Call;

/// Gives every failure to be seen.
pub(crate) const ADMIN: &str = "errors:admin";
/// Gives one's own failures to be seen.
pub(crate) const READ: &str = "errors:read";

/// Which failures a caller may see.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum View {
    /// Those of the whole mesh.
    Mesh,
    /// Those of an owner; "" has none.
    Owner(String),
}

impl View {
    pub(crate) fn of(call: &Call) -> View {
        if call.is_mesh || call.has_scope(ADMIN) {
            return View::Mesh;
        }
        let owner = call.principal.as_ref().map(|principal| principal.owner.clone());
        View::Owner(owner.unwrap_or_default())
    }
}
