//! Records the requests that the gateway refused by itself. Anonymous clients choose parts of these
//! reports, so no text of theirs is stored: codes, paths and reasons are checked against known
//! values.

use std::collections::HashSet;
use std::fmt;
use std::sync::{Arc, LazyLock};

use futures_util::future::BoxFuture;
use hapa_core::call::is_request_id;
use hapa_core::redaction::redact_secrets;
use hapa_core::rpc_error::ErrorCode;
use hapa_core::timestamps::{now, timestamp};
use hapa_core::violations::Violations;
use hapa_proto::FILE_DESCRIPTOR_SET;
use hapa_proto::errors::v1::gateway_report_service_server::GatewayReportService;
use hapa_proto::errors::v1::report_refusals_request::Refusal;
use hapa_proto::errors::v1::{Occurrence, ReportRefusalsRequest, ReportRefusalsResponse};
use prost::Message as _;
use prost_types::FileDescriptorSet;
use tonic::{Request, Response, Status};
use uuid::Uuid;

use crate::validation::is_incident_id;

const MAX_REFUSALS: usize = 100;
const MAX_REASON_LEN: usize = 200;
/// The service of these occurrences, and their method where it is no RPC of the mesh.
const GATEWAY_NAME: &str = "gateway";
/// The codes that Envoy refuses with; the same list stands in `gateway/refusals.lua`.
const GATEWAY_CODES: [ErrorCode; 7] = [
    ErrorCode::InvalidInput,
    ErrorCode::RateLimited,
    ErrorCode::TooLarge,
    ErrorCode::Unsupported,
    ErrorCode::ModelTimeout,
    ErrorCode::Internal,
    ErrorCode::Overloaded,
];

/// `/package.Service/Method` of every RPC.
static RPC_PATHS: LazyLock<HashSet<String>> = LazyLock::new(|| {
    let set = FileDescriptorSet::decode(FILE_DESCRIPTOR_SET).unwrap_or_default();
    let mut methods = HashSet::new();
    for file in &set.file {
        for service in &file.service {
            let name = format!("/{}.{}", file.package(), service.name());
            methods.extend(service.method.iter().map(|method| format!("{name}/{}", method.name())));
        }
    }
    methods
});

/// Records occurrences in the outbox of the process, so that neither a slow store nor a burst of refusals loses any.
/// The future of an accepted occurrence ends when the outbox has written it or given up waiting; a rejected occurrence
/// has none.
#[derive(Clone)]
pub struct OccurrenceRecorder(pub Arc<RecordOccurrence>);

/// Appends one occurrence to the outbox.
pub type RecordOccurrence = dyn Fn(&Occurrence) -> Option<BoxFuture<'static, ()>> + Send + Sync;

impl fmt::Debug for OccurrenceRecorder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("OccurrenceRecorder")
    }
}

pub(crate) struct GatewayReports {
    pub(crate) recorder: OccurrenceRecorder,
}

#[tonic::async_trait]
impl GatewayReportService for GatewayReports {
    async fn report_refusals(
        &self,
        request: Request<ReportRefusalsRequest>,
    ) -> Result<Response<ReportRefusalsResponse>, Status> {
        let occurrences = to_occurrences(request.into_inner().refusals)?;
        let receipts = occurrences.iter().map(|occurrence| (self.recorder.0)(occurrence));
        let receipts: Vec<_> = receipts.collect();
        let mut accepted = 0;
        for receipt in receipts.into_iter().flatten() {
            // The outbox has accepted it, whether it is on disk yet or not.
            receipt.await;
            accepted += 1;
        }
        Ok(Response::new(ReportRefusalsResponse { accepted }))
    }
}

/// Converts all refusals, or names the invalid fields.
fn to_occurrences(refusals: Vec<Refusal>) -> Result<Vec<Occurrence>, Violations> {
    let mut violations = Violations::default();
    if !(1..=MAX_REFUSALS).contains(&refusals.len()) {
        violations.add_invalid("refusals", format!("must have 1 to {MAX_REFUSALS} entries"));
    }
    let now = now();
    let mut occurrences = Vec::with_capacity(refusals.len().min(MAX_REFUSALS));
    for (index, refusal) in refusals.into_iter().take(MAX_REFUSALS).enumerate() {
        let code = GATEWAY_CODES.iter().find(|code| code.entry().name == refusal.error_code);
        if !is_incident_id(&refusal.incident_id) {
            let field = format!("refusals[{index}].incident_id");
            violations.add_invalid(field, "must be INC-YYYYMMDD-XXXXXXXX");
        }
        match code {
            None => {
                let field = format!("refusals[{index}].error_code");
                violations
                    .add_invalid(field, "must be one of the codes that the gateway refuses with");
            }
            Some(&code) => occurrences.push(to_occurrence(refusal, code, now)),
        }
    }
    violations.check()?;
    Ok(occurrences)
}

fn to_occurrence(refusal: Refusal, code: ErrorCode, now: i64) -> Occurrence {
    let entry = code.entry();
    let is_rpc = RPC_PATHS.contains(&refusal.path);
    let request_id = Some(refusal.request_id).filter(|id| is_request_id(id));
    let reason = sanitize_reason(&refusal.reason);
    Occurrence {
        event_id: Uuid::now_v7().to_string(),
        incident_id: refusal.incident_id,
        time: Some(timestamp(now)),
        error_code: entry.name.to_owned(),
        method: if is_rpc { refusal.path } else { GATEWAY_NAME.to_owned() },
        message: format!("refused by the gateway: {}", entry.meaning),
        causes: if reason.is_empty() { Vec::new() } else { vec![reason] },
        service: GATEWAY_NAME.to_owned(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        request_id: request_id.unwrap_or_default(),
        actor: "anonymous".to_owned(),
        ..Occurrence::default()
    }
}

/// The reason that Envoy gives, without secrets and unexpected characters.
fn sanitize_reason(text: &str) -> String {
    let is_allowed = |c: &char| c.is_ascii_alphanumeric() || "_-.:|{}()".contains(*c);
    let allowed: String = text.chars().filter(is_allowed).take(MAX_REASON_LEN).collect();
    redact_secrets(&allowed, MAX_REASON_LEN)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::fingerprint::fingerprint;

    fn refusal() -> Refusal {
        Refusal {
            incident_id: "INC-20260101-0123ABCD".to_owned(),
            error_code: "E4012".to_owned(),
            path: "/hapa.codegen.v1.CodegenService/GenerateCode".to_owned(),
            request_id: "r-1".to_owned(),
            reason: "direct_response".to_owned(),
        }
    }

    #[test]
    fn a_refusal_becomes_a_gateway_occurrence_with_the_incident_id_shown_to_the_user() {
        let stored = to_occurrences(vec![refusal()]).unwrap();
        assert_eq!(stored[0].incident_id, "INC-20260101-0123ABCD");
        assert_eq!(stored[0].method, "/hapa.codegen.v1.CodegenService/GenerateCode");
        assert_eq!((stored[0].service.as_str(), stored[0].request_id.as_str()), ("gateway", "r-1"));
        assert_eq!(stored[0].causes, ["direct_response"]);
        assert!(crate::validation::validate_batch(&stored, now()).is_ok());
    }

    #[test]
    fn a_batch_of_a_wrong_size_or_with_an_invalid_id_or_code_is_rejected() {
        assert!(to_occurrences(Vec::new()).is_err());
        assert!(to_occurrences(vec![refusal(); 101]).is_err());
        let wrong_id = Refusal { incident_id: "x".to_owned(), ..refusal() };
        assert!(to_occurrences(vec![wrong_id]).is_err());
        for code in ["", "E4003", "E9999"] {
            let wrong_code = Refusal { error_code: code.to_owned(), ..refusal() };
            assert!(to_occurrences(vec![refusal(), wrong_code]).is_err(), "{code}");
        }
    }

    proptest! {
        /// Anonymous clients choose paths, ids and, in part, reasons. These texts must not be
        /// stored and must not create fingerprints.
        #[test]
        fn texts_chosen_by_anonymous_clients_are_not_stored(
            path in "\\PC{0,300}",
            id in "\\PC{0,200}",
            why in "\\PC{0,300}",
        ) {
            let refusal = Refusal { path, request_id: id, reason: why, ..refusal() };
            let other = Refusal { path: "/".to_owned(), ..refusal.clone() };
            let stored = to_occurrences(vec![refusal, other]).unwrap();
            prop_assert_eq!(fingerprint(&stored[0]), fingerprint(&stored[1]));
            prop_assert_eq!(stored[0].method.as_str(), GATEWAY_NAME);
            prop_assert!(stored[0].request_id.is_empty() || is_request_id(&stored[0].request_id));
            let is_short = |cause: &String| cause.len() <= MAX_REASON_LEN && cause.is_ascii();
            prop_assert!(stored[0].causes.iter().all(is_short));
            prop_assert!(crate::validation::validate_batch(&stored, now()).is_ok());
        }
    }
}
