//! Prepares reported occurrences for storage: validates the batch, redacts secrets and sets the
//! reporting identity.

use hapa_core::call::Call;
use hapa_core::redaction::redact_secrets;
use hapa_core::timestamps::{micros, now};
use hapa_core::violations::Violations;
use hapa_proto::errors::v1::Occurrence;

use crate::fingerprint::fingerprint;
use crate::store::{NewOccurrence, OccurrenceBatch};
use crate::validation;

/// Longest stored text.
const MAX_TEXT_LEN: usize = 2_000;

/// Validates the reported occurrences and prepares them for storage.
pub(crate) fn prepare(
    call: &Call,
    occurrences: Vec<Occurrence>,
    incident_tracking_enabled: bool,
) -> Result<OccurrenceBatch, Violations> {
    let now = now();
    validation::validate_batch(&occurrences, now)?;
    let prepare = |mut occurrence: Occurrence| {
        // Services report the identity of their caller. Other callers report under their own
        // identity only.
        if !call.is_mesh {
            occurrence.actor = call.actor();
            let owner = call.principal.as_ref().map(|caller| caller.owner.clone());
            occurrence.owner = owner.unwrap_or_default();
        }
        occurrence.message = redact(&occurrence.message);
        occurrence.causes = occurrence.causes.iter().map(|cause| redact(cause)).collect();
        NewOccurrence {
            fingerprint: fingerprint(&occurrence),
            time: occurrence.time.as_ref().map_or(now, micros),
            occurrence,
        }
    };
    let occurrences = occurrences.into_iter().map(prepare).collect();
    Ok(OccurrenceBatch { now, incident_tracking_enabled, occurrences })
}

/// Removes secrets and NUL characters from a text.
fn redact(text: &str) -> String {
    // PostgreSQL rejects NUL in TEXT values.
    redact_secrets(&text.replace('\0', ""), MAX_TEXT_LEN)
}
