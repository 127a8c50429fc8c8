//! Incidents: found by any id that a user was shown, listed, and moved from state to state.

use hapa_core::call::Call;
use hapa_core::pagination as pages;
use hapa_core::pagination::After;
use hapa_core::timestamps::{micros, now, timestamp};
use hapa_core::violations::Violations;
use hapa_proto::errors::v1::{
    GetIncidentRequest, GetIncidentResponse, Incident, ListIncidentsRequest, ListIncidentsResponse,
    UpdateIncidentRequest, UpdateIncidentResponse,
};

use crate::check;
use crate::error::Error;
use crate::store::{Change, Filter, Pattern, RESOLVED, Store};
use crate::view::View;

const STATUSES: [&str; 3] = ["open", "acknowledged", RESOLVED];
const STATUS: &str = "must be open, acknowledged or resolved";
const LONGEST_ID: usize = 100;
const LONGEST_VERSION: usize = 50;
const LONGEST_NOTE: usize = 1_000;
/// Occurrences that are shown with an incident.
const SHOWN: usize = 20;

pub(crate) async fn list(
    store: &Store,
    view: &View,
    request: ListIncidentsRequest,
) -> Result<ListIncidentsResponse, Error> {
    let mut found = Violations::default();
    if !request.status.is_empty() && !STATUSES.contains(&request.status.as_str()) {
        found.wrong("status", format!("{STATUS}, or nothing"));
    }
    check::code_or_none(&request.error_code, &mut found);
    found.check()?;
    let size = pages::size(request.page_size)?;
    let after = pages::after(&request.page_token)?;
    let filter = Filter {
        status: request.status,
        error_code: request.error_code,
        seen_after: request.seen_after.as_ref().map_or(i64::MIN, micros),
    };
    let found = page(store, view, &filter, &after, size + 1).await?;
    let (found, more) = pages::cut(found, size);
    let token = |last: &Pattern| pages::token(last.last_seen, &last.incident_id);
    let next_page_token = found.last().filter(|_| more).map(token).unwrap_or_default();
    let incidents = found.into_iter().map(incident).collect();
    Ok(ListIncidentsResponse { incidents, next_page_token })
}

/// What a caller may see of them, last seen first.
pub(crate) async fn page(
    store: &Store,
    view: &View,
    filter: &Filter,
    after: &After,
    size: i64,
) -> Result<Vec<Pattern>, Error> {
    match view {
        View::Mesh => store.incidents_page(filter, after, size).await,
        View::Owner(owner) => store.own_incidents_page(owner, filter, after, size).await,
    }
}

pub(crate) async fn get(
    store: &Store,
    view: &View,
    request: GetIncidentRequest,
) -> Result<GetIncidentResponse, Error> {
    let id = request.incident_id;
    let mut found = Violations::default();
    check_id(&id, &mut found);
    found.check()?;
    let found = match view {
        View::Mesh => store.incident(&id).await?,
        View::Owner(owner) => store.own_incident(owner, &id).await?,
    };
    let found = found.ok_or(Error::NoSuch)?;
    let occurrences = match view {
        View::Mesh => store.occurrences_of(&found.fingerprint, &id, SHOWN).await?,
        View::Owner(owner) => {
            store.own_occurrences_of(owner, &found.fingerprint, &id, SHOWN).await?
        }
    };
    Ok(GetIncidentResponse { incident: Some(incident(found)), occurrences })
}

pub(crate) async fn update(
    store: &Store,
    call: &Call,
    request: UpdateIncidentRequest,
) -> Result<UpdateIncidentResponse, Error> {
    check_update(&request)?;
    let id = request.incident_id;
    let change = Change {
        status: request.status,
        version: request.version,
        note: request.note,
        expected_status: request.expected_status,
        actor: call.actor(),
        time: now(),
    };
    let changed = store.change_incident(id, change).await?;
    let incident = Some(incident(changed.ok_or(Error::NoSuch)?));
    Ok(UpdateIncidentResponse { incident })
}

fn check_update(request: &UpdateIncidentRequest) -> Result<(), Violations> {
    let mut found = Violations::default();
    check_id(&request.incident_id, &mut found);
    let status = request.status.as_str();
    if status.is_empty() {
        found.missing("status");
    } else if !STATUSES.contains(&status) {
        found.wrong("status", STATUS);
    }
    let version = &request.version;
    if version.chars().count() > LONGEST_VERSION || version.chars().any(char::is_control) {
        found.wrong("version", "must be at most 50 characters without control characters");
    } else if !version.is_empty() && status != RESOLVED {
        found.wrong("version", "stands beside the status resolved alone");
    }
    if request.note.chars().count() > LONGEST_NOTE || request.note.contains('\0') {
        found.wrong("note", "must be at most 1000 characters");
    }
    let expected = request.expected_status.as_str();
    if !expected.is_empty() && !STATUSES.contains(&expected) {
        found.wrong("expected_status", format!("{STATUS}, or nothing"));
    }
    found.check()
}

fn check_id(id: &str, found: &mut Violations) {
    if id.is_empty() {
        found.missing("incident_id");
    } else if id.len() > LONGEST_ID || id.chars().any(char::is_control) {
        found.wrong("incident_id", "must be like INC-20260131-0123ABCD");
    }
}

/// As the wire counts.
pub(crate) fn count(number: i64) -> u32 {
    u32::try_from(number.max(0)).unwrap_or(u32::MAX)
}

fn incident(pattern: Pattern) -> Incident {
    Incident {
        incident_id: pattern.incident_id,
        error_code: pattern.error_code,
        status: pattern.status,
        fingerprint: pattern.fingerprint,
        count: count(pattern.total),
        first_seen: Some(timestamp(pattern.first_seen)),
        last_seen: Some(timestamp(pattern.last_seen)),
        method: pattern.method,
        message: pattern.message,
        affected_users: count(pattern.affected_users),
        recovered_count: count(pattern.recovered_count),
        reopened: pattern.reopened,
        resolved_in_version: pattern.resolved_in_version,
        last_seen_version: pattern.last_seen_version,
        status_time: Some(pattern.status_time).filter(|time| *time > 0).map(timestamp),
        status_actor: pattern.status_actor,
        note: pattern.note,
    }
}

#[cfg(test)]
mod tests {
    use std::borrow::Cow;

    use super::*;

    fn fields(request: &UpdateIncidentRequest) -> Vec<Cow<'static, str>> {
        check_update(request).err().map(|found| found.fields()).unwrap_or_default()
    }

    #[test]
    fn every_wrong_field_is_named_at_once() {
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
