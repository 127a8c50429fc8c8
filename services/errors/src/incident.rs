//! Incidents: lookup by any id that a user was shown, listing, and changes of status.

use hapa_core::call::Call;
use hapa_core::pagination as pages;
use hapa_core::pagination::PageCursor;
use hapa_core::timestamps::{micros, now, timestamp};
use hapa_core::violations::Violations;
use hapa_proto::errors::v1::{
    GetIncidentRequest, GetIncidentResponse, Incident, ListIncidentsRequest, ListIncidentsResponse,
    UpdateIncidentRequest, UpdateIncidentResponse,
};

use crate::error::Error;
use crate::store::{ErrorGroup, IncidentFilter, RESOLVED, StatusChange, Store};
use crate::validation;
use crate::visibility::Visibility;

const STATUSES: [&str; 3] = ["open", "acknowledged", RESOLVED];
const STATUS_RULE: &str = "must be open, acknowledged or resolved";
const MAX_ID_LEN: usize = 100;
const MAX_VERSION_LEN: usize = 50;
const MAX_NOTE_LEN: usize = 1_000;
/// Occurrences returned with an incident.
const OCCURRENCE_COUNT: usize = 20;

pub(crate) async fn list(
    store: &Store,
    visibility: &Visibility,
    request: ListIncidentsRequest,
) -> Result<ListIncidentsResponse, Error> {
    let mut violations = Violations::default();
    if !request.status.is_empty() && !STATUSES.contains(&request.status.as_str()) {
        violations.add_invalid("status", format!("{STATUS_RULE}, or empty"));
    }
    validation::validate_code_filter(&request.error_code, &mut violations);
    violations.check()?;
    let size = pages::page_size(request.page_size)?;
    let after = pages::parse_page_token(&request.page_token)?;
    let filter = IncidentFilter {
        status: request.status,
        error_code: request.error_code,
        seen_after: request.seen_after.as_ref().map_or(i64::MIN, micros),
    };
    let groups = page(store, visibility, &filter, &after, size + 1).await?;
    let (groups, has_more) = pages::split_page(groups, size);
    let token = |last: &ErrorGroup| pages::page_token(last.last_seen, &last.incident_id);
    let next_page_token = groups.last().filter(|_| has_more).map(token).unwrap_or_default();
    let incidents = groups.into_iter().map(to_incident).collect();
    Ok(ListIncidentsResponse { incidents, next_page_token })
}

/// A page of the incidents that a caller may see, last seen first.
pub(crate) async fn page(
    store: &Store,
    visibility: &Visibility,
    filter: &IncidentFilter,
    after: &PageCursor,
    size: i64,
) -> Result<Vec<ErrorGroup>, Error> {
    match visibility {
        Visibility::All => store.incidents_page(filter, after, size).await,
        Visibility::Owner(owner) => store.owner_incidents_page(owner, filter, after, size).await,
    }
}

pub(crate) async fn get(
    store: &Store,
    visibility: &Visibility,
    request: GetIncidentRequest,
) -> Result<GetIncidentResponse, Error> {
    let id = request.incident_id;
    let mut violations = Violations::default();
    validate_id(&id, &mut violations);
    violations.check()?;
    let group = match visibility {
        Visibility::All => store.incident(&id).await?,
        Visibility::Owner(owner) => store.owner_incident(owner, &id).await?,
    };
    let group = group.ok_or(Error::IncidentNotFound)?;
    let fingerprint = &group.fingerprint;
    let occurrences = match visibility {
        Visibility::All => store.occurrences_of(fingerprint, &id, OCCURRENCE_COUNT).await?,
        Visibility::Owner(owner) => {
            store.owner_occurrences_of(owner, fingerprint, &id, OCCURRENCE_COUNT).await?
        }
    };
    Ok(GetIncidentResponse { incident: Some(to_incident(group)), occurrences })
}

pub(crate) async fn update(
    store: &Store,
    call: &Call,
    request: UpdateIncidentRequest,
) -> Result<UpdateIncidentResponse, Error> {
    validate_update(&request)?;
    let id = request.incident_id;
    let change = StatusChange {
        status: request.status,
        version: request.version,
        note: request.note,
        expected_status: request.expected_status,
        actor: call.actor(),
        time: now(),
    };
    let changed = store.change_incident(id, change).await?;
    let incident = to_incident(changed.ok_or(Error::IncidentNotFound)?);
    Ok(UpdateIncidentResponse { incident: Some(incident) })
}

fn validate_update(request: &UpdateIncidentRequest) -> Result<(), Violations> {
    let mut violations = Violations::default();
    validate_id(&request.incident_id, &mut violations);
    let status = request.status.as_str();
    if status.is_empty() {
        violations.add_missing("status");
    } else if !STATUSES.contains(&status) {
        violations.add_invalid("status", STATUS_RULE);
    }
    let version = &request.version;
    if version.chars().count() > MAX_VERSION_LEN || version.chars().any(char::is_control) {
        violations
            .add_invalid("version", "must be at most 50 characters without control characters");
    } else if !version.is_empty() && status != RESOLVED {
        violations.add_invalid("version", "may be set with the status resolved only");
    }
    if request.note.chars().count() > MAX_NOTE_LEN || request.note.contains('\0') {
        violations.add_invalid("note", "must be at most 1000 characters");
    }
    let expected = request.expected_status.as_str();
    if !expected.is_empty() && !STATUSES.contains(&expected) {
        violations.add_invalid("expected_status", format!("{STATUS_RULE}, or empty"));
    }
    violations.check()
}

fn validate_id(id: &str, violations: &mut Violations) {
    if id.is_empty() {
        violations.add_missing("incident_id");
    } else if id.len() > MAX_ID_LEN || id.chars().any(char::is_control) {
        violations.add_invalid("incident_id", "must be like INC-20260131-0123ABCD");
    }
}

/// A count as the API's `uint32`: clamped to its range.
pub(crate) fn saturating_u32(number: i64) -> u32 {
    u32::try_from(number.max(0)).unwrap_or(u32::MAX)
}

fn to_incident(group: ErrorGroup) -> Incident {
    Incident {
        incident_id: group.incident_id,
        error_code: group.error_code,
        status: group.status,
        fingerprint: group.fingerprint,
        count: saturating_u32(group.total),
        first_seen: Some(timestamp(group.first_seen)),
        last_seen: Some(timestamp(group.last_seen)),
        method: group.method,
        message: group.message,
        affected_users: saturating_u32(group.affected_users),
        recovered_count: saturating_u32(group.recovered_count),
        reopened: group.reopened,
        resolved_in_version: group.resolved_in_version,
        last_seen_version: group.last_seen_version,
        status_time: Some(group.status_time).filter(|time| *time > 0).map(timestamp),
        status_actor: group.status_actor,
        note: group.note,
    }
}

#[cfg(test)]
mod tests {
    use std::borrow::Cow;

    use super::*;

    fn fields(request: &UpdateIncidentRequest) -> Vec<Cow<'static, str>> {
        validate_update(request).err().map(|violations| violations.fields()).unwrap_or_default()
    }

    #[test]
    fn one_reply_names_every_invalid_field() {
        assert_eq!(fields(&UpdateIncidentRequest::default()), ["incident_id", "status"]);
        let good = UpdateIncidentRequest {
            incident_id: "INC-20260131-0123ABCD".to_owned(),
            status: RESOLVED.to_owned(),
            version: "1.2.3".to_owned(),
            ..UpdateIncidentRequest::default()
        };
        assert_eq!(fields(&good), Vec::<&str>::new());
        let wrong = UpdateIncidentRequest {
            status: "open".to_owned(),
            note: "n".repeat(1_001),
            expected_status: "closed".to_owned(),
            ..good
        };
        assert_eq!(fields(&wrong), ["version", "note", "expected_status"]);
    }
}
