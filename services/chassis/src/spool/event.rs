//! What a call that ended is remembered as: one usage event where it was a user's, and one occurrence
//! where it failed. No key, prompt or answer is in either.

use std::time::{Duration, SystemTime};

use hapa_proto::analytics::v1::UsageEvent;
use hapa_proto::errors::v1::Occurrence;
use http::HeaderMap;
use prost_types::Timestamp;
use tonic::Code;
use uuid::Uuid;

use super::{Kind, Receipt, Spool};
use crate::causes;
use crate::context::Call;
use crate::rpc::Access;
use crate::scrub::scrub;
use crate::status::{Fault, code_name};

/// What takes events in: about what a service delivers no event is made, or there would be no end of
/// them. Others who ask are calls like any other.
const INTAKES: [&str; 3] = [
    "/hapa.analytics.v1.AnalyticsService/RecordEvents",
    "/hapa.errors.v1.ErrorTrackingService/ReportOccurrences",
    "/hapa.errors.v1.GatewayReportService/ReportRefusals",
];
/// Where a service asks whose credential it was shown.
const AUTHENTICATE: &str = "/hapa.auth.v1.AuthService/Authenticate";
/// Characters of a message that are kept.
const LONGEST: usize = 2_000;

/// A published failure.
#[derive(Clone, Debug)]
pub(crate) struct Failure {
    pub(crate) error_code: String,
    pub(crate) incident_id: String,
    pub(crate) message: String,
}

impl Failure {
    pub(crate) fn of(fault: &Fault) -> Failure {
        Failure {
            error_code: fault.code().to_string(),
            incident_id: fault.incident_id().to_owned(),
            message: fault.message().to_owned(),
        }
    }
}

/// How a call ended.
pub(crate) struct Ended<'c> {
    /// With what admission found out.
    pub(crate) call: &'c Call,
    pub(crate) path: &'static str,
    pub(crate) trace_id: &'c str,
    pub(crate) code: Code,
    pub(crate) failure: Option<&'c Failure>,
    pub(crate) elapsed: Duration,
}

impl Spool {
    /// Remembers a call; the receipt comes when the call may be over. `waits`: whether anyone would
    /// wait for it.
    pub(crate) fn remember(&self, ended: &Ended<'_>, waits: bool) -> Option<Receipt> {
        let overcome = ended.call.report().work().overcome;
        let failures = overcome.iter().map(|failure| (failure, true));
        let failures = failures.chain(ended.failure.map(|failure| (failure, false)));
        // Causes are taken in any case: nobody else will ask for them.
        let failures = failures
            .map(|(failure, recovered)| (failure, causes::take(&failure.incident_id), recovered));
        let mut occurrences: Vec<_> = failures
            .map(|(failure, causes, recovered)| Occurrence {
                recovered,
                ..ended.occurrence(failure, causes)
            })
            .collect();
        if !self.takes(Kind::Occurrence) || !ended.is_occurrence() {
            occurrences.clear();
        }
        let usage = (self.takes(Kind::Usage) && ended.is_usage()).then(|| ended.usage());
        self.append_all(usage.as_ref(), &occurrences, waits)
    }
}

impl Ended<'_> {
    fn access(&self) -> Option<Access> {
        self.call.rpc.map(|rpc| rpc.access)
    }

    fn delivers(&self) -> bool {
        self.call.is_mesh && INTAKES.contains(&self.path)
    }

    /// Whether it was a user's call.
    fn is_usage(&self) -> bool {
        !self.delivers() && !matches!(self.access(), None | Some(Access::Public | Access::Mesh))
    }

    /// A service that goes leaves its streams to other services: no failure. A credential that nobody
    /// has is a failure of the call that showed it, and remembered there.
    fn is_occurrence(&self) -> bool {
        let left = self.access() == Some(Access::Mesh) && self.code == Code::Cancelled;
        let asked = self.call.is_mesh && self.path == AUTHENTICATE;
        let told = asked && self.code == Code::Unauthenticated;
        !left && !told && self.access() != Some(Access::Public) && !self.delivers()
    }

    fn usage(&self) -> UsageEvent {
        let work = self.call.report().work();
        let caller = self.call.principal.as_deref();
        UsageEvent {
            event_id: Uuid::now_v7().to_string(),
            time: Some(Timestamp::from(SystemTime::now())),
            method: self.path.to_owned(),
            error_code: self.failure.map(|failure| failure.error_code.clone()).unwrap_or_default(),
            grpc_status: code_name(self.code).to_owned(),
            key_id: caller.map(|caller| caller.key_id.clone()).unwrap_or_default(),
            user_id: caller.map(|caller| caller.user_id.clone()).unwrap_or_default(),
            owner: caller.map(|caller| caller.owner.clone()).unwrap_or_default(),
            model: if self.failure.is_some() && work.unlisted { String::new() } else { work.model },
            task: work.task,
            prompt_tokens: work.prompt_tokens,
            completion_tokens: work.completion_tokens,
            duration_us: micros(self.elapsed),
            time_to_first_token_us: work.first_token.map(micros),
            inter_token_us: work.between_tokens.map(micros),
            cacheable: work.cacheable,
            cached: work.cached,
            service: role(self.path).to_owned(),
        }
    }

    fn occurrence(&self, failure: &Failure, causes: Vec<String>) -> Occurrence {
        let caller = self.call.principal.as_deref();
        Occurrence {
            event_id: Uuid::now_v7().to_string(),
            incident_id: failure.incident_id.clone(),
            time: Some(Timestamp::from(SystemTime::now())),
            error_code: failure.error_code.clone(),
            method: self.path.to_owned(),
            message: scrub(&failure.message, LONGEST),
            causes,
            service: role(self.path).to_owned(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            request_id: self.call.request_id.to_string(),
            trace_id: self.trace_id.to_owned(),
            actor: self.call.actor(),
            owner: caller.map(|caller| caller.owner.clone()).unwrap_or_default(),
            duration: self.elapsed.try_into().ok(),
            recovered: false,
        }
    }
}

/// The trace that a caller names, "" where it names none:
/// <https://www.w3.org/TR/trace-context/#traceparent-header>
pub(crate) fn trace_id(headers: &HeaderMap) -> &str {
    let value = headers.get("traceparent").and_then(|value| value.to_str().ok());
    let Some(parts) = value.map(|value| value.split('-').collect::<Vec<_>>()) else { return "" };
    let id = |text: &str, length| {
        let hex = |byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f');
        text.len() == length && text.bytes().all(hex) && text.bytes().any(|byte| byte != b'0')
    };
    match parts[..] {
        // Later versions may have more parts.
        [version, trace, span, ..] if version.len() == 2 && id(trace, 32) && id(span, 16) => trace,
        _ => "",
    }
}

/// `codegen` of `/hapa.codegen.v1.CodegenService/GenerateCode`.
fn role(path: &'static str) -> &'static str {
    path.trim_start_matches("/hapa.").split('.').next().unwrap_or(path)
}

fn micros(span: Duration) -> i64 {
    i64::try_from(span.as_micros()).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_trace_is_taken_where_it_is_valid() {
        let read = |text: &str| {
            let headers = [("traceparent".parse().unwrap(), text.parse().unwrap())];
            trace_id(&HeaderMap::from_iter(headers)).to_owned()
        };
        let id = "4bf92f3577b34da6a3ce929d0e0e4736";
        assert_eq!(read(&format!("00-{id}-00f067aa0ba902b7-01")), id);
        let zero = "0".repeat(32);
        for wrong in ["", "x", id, &format!("00-{zero}-00f067aa0ba902b7-01"), "00-ab-cd-01"] {
            assert_eq!(read(wrong), "", "{wrong}");
        }
    }
}
