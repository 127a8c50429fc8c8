//! The events of a completed call: one usage event if a user made it, and one occurrence for each of its failures.
//! No event contains a key, a prompt or an answer.

use std::time::{Duration, SystemTime};

use hapa_core::access::Access;
use hapa_core::call::Call;
use hapa_core::call_stats::PublishedFailure;
use hapa_core::redaction::redact_secrets;
use hapa_core::rpc_error::code_name;
use hapa_proto::analytics::v1::UsageEvent;
use hapa_proto::errors::v1::Occurrence;
use prost_types::Timestamp;
use tonic::Code;
use uuid::Uuid;

/// Methods that receive events. Calls of them by services create no events, because those would create events
/// without end. Calls by other callers do.
const INTAKE_METHODS: [&str; 3] = [
    "/hapa.analytics.v1.AnalyticsService/RecordEvents",
    "/hapa.errors.v1.ErrorTrackingService/ReportOccurrences",
    "/hapa.errors.v1.GatewayReportService/ReportRefusals",
];
/// The method by which a service authenticates a caller.
const AUTHENTICATE: &str = "/hapa.auth.v1.AuthService/Authenticate";
/// Maximum length of a message, in characters.
const MAX_MESSAGE_LEN: usize = 2_000;

/// A completed call and its outcome.
pub(crate) struct CompletedCall<'c> {
    /// With the caller that admission found.
    pub(crate) call: &'c Call,
    pub(crate) path: &'static str,
    pub(crate) trace_id: &'c str,
    pub(crate) code: Code,
    pub(crate) failure: Option<&'c PublishedFailure>,
    pub(crate) elapsed: Duration,
}

impl CompletedCall<'_> {
    fn access(&self) -> Option<Access> {
        self.call.rpc.map(|rpc| rpc.access)
    }

    fn delivers_events(&self) -> bool {
        self.call.is_mesh && INTAKE_METHODS.contains(&self.path)
    }

    fn is_user_call(&self) -> bool {
        !self.delivers_events()
            && !matches!(self.access(), None | Some(Access::NoAuth | Access::Service))
    }

    /// Whether failures of the call are reported. A service that shuts down cancels its streams to other services,
    /// which is no failure. An unknown credential is reported for the call that presented it, not for the request to
    /// auth.
    fn reports_failures(&self) -> bool {
        let is_service_shutdown =
            self.access() == Some(Access::Service) && self.code == Code::Cancelled;
        let is_unknown_credential =
            self.call.is_mesh && self.path == AUTHENTICATE && self.code == Code::Unauthenticated;
        !is_service_shutdown
            && !is_unknown_credential
            && self.access() != Some(Access::NoAuth)
            && !self.delivers_events()
    }

    /// The usage event, if a user made the call.
    pub(super) fn usage(&self) -> Option<UsageEvent> {
        if !self.is_user_call() {
            return None;
        }
        let work = self.call.stats().snapshot();
        let caller = self.call.principal.as_deref();
        Some(UsageEvent {
            event_id: Uuid::now_v7().to_string(),
            time: Some(Timestamp::from(SystemTime::now())),
            method: self.path.to_owned(),
            error_code: self.failure.map(|failure| failure.error_code.clone()).unwrap_or_default(),
            grpc_status: code_name(self.code).to_owned(),
            key_id: caller.map(|caller| caller.key_id.clone()).unwrap_or_default(),
            user_id: caller.map(|caller| caller.user_id.clone()).unwrap_or_default(),
            owner: caller.map(|caller| caller.owner.clone()).unwrap_or_default(),
            model: if self.failure.is_some() && work.is_unknown_model {
                String::new()
            } else {
                work.model
            },
            task: work.task,
            prompt_tokens: work.prompt_tokens,
            completion_tokens: work.completion_tokens,
            duration_us: micros(self.elapsed),
            // Analytics refuses a batch with an event that contradicts itself.
            reasoning_tokens: work.reasoning_tokens.min(work.completion_tokens),
            time_to_first_token_us: work.first_token.map(micros),
            time_to_first_answer_token_us: work
                .first_token
                .and_then(|first| work.first_answer_token.map(|answer| micros(answer.max(first)))),
            inter_token_us: work.between_tokens.map(micros),
            cacheable: work.cacheable,
            cached: work.cached,
            service: service(self.path).to_owned(),
        })
    }

    /// The occurrences: of failures that the call recovered from, and of the one that failed it.
    pub(super) fn occurrences(&self) -> Vec<Occurrence> {
        if !self.reports_failures() {
            return Vec::new();
        }
        let recovered = self.call.stats().snapshot().recovered_errors;
        let recovered = recovered.iter().map(|failure| self.occurrence(failure, true));
        recovered.chain(self.failure.map(|failure| self.occurrence(failure, false))).collect()
    }

    fn occurrence(&self, failure: &PublishedFailure, recovered: bool) -> Occurrence {
        let caller = self.call.principal.as_deref();
        Occurrence {
            event_id: Uuid::now_v7().to_string(),
            incident_id: failure.incident_id.clone(),
            time: Some(Timestamp::from(SystemTime::now())),
            error_code: failure.error_code.clone(),
            method: self.path.to_owned(),
            message: redact_secrets(&failure.message, MAX_MESSAGE_LEN),
            causes: failure.causes.clone(),
            service: service(self.path).to_owned(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            request_id: self.call.request_id.to_string(),
            trace_id: self.trace_id.to_owned(),
            actor: self.call.actor(),
            owner: caller.map(|caller| caller.owner.clone()).unwrap_or_default(),
            duration: self.elapsed.try_into().ok(),
            recovered,
        }
    }
}

/// `codegen` of `/hapa.codegen.v1.CodegenService/GenerateCode`.
fn service(path: &'static str) -> &'static str {
    path.trim_start_matches("/hapa.").split('.').next().unwrap_or(path)
}

fn micros(duration: Duration) -> i64 {
    i64::try_from(duration.as_micros()).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use std::net::{IpAddr, Ipv4Addr};

    use hapa_core::access::Rpc;

    use super::*;

    const RPC: Rpc = Rpc::new("/a.B/C", Access::Scope("a:b"));

    /// Milliseconds to the first token and to the first answer token, and tokens of the answer and of reasoning.
    fn usage(first_ms: Option<u64>, answer_ms: u64, tokens: (u32, u32)) -> UsageEvent {
        let call = Call::new(None, Some(&RPC), IpAddr::V4(Ipv4Addr::LOCALHOST));
        if let Some(first_ms) = first_ms {
            call.stats().set_time_to_first_token(Duration::from_millis(first_ms));
        }
        call.stats().set_time_to_first_answer_token(Duration::from_millis(answer_ms));
        call.stats().set_tokens(1, tokens.0);
        call.stats().set_reasoning_tokens(tokens.1);
        let (trace_id, code, elapsed) = ("", Code::Ok, Duration::from_secs(1));
        let completed =
            CompletedCall { call: &call, path: RPC.path, trace_id, code, failure: None, elapsed };
        completed.usage().unwrap()
    }

    #[test]
    fn a_usage_event_holds_reasoning_and_never_contradicts_itself() {
        let event = usage(Some(5), 8, (40, 30));
        assert_eq!(event.time_to_first_token_us, Some(5_000));
        assert_eq!(event.time_to_first_answer_token_us, Some(8_000));
        assert_eq!((event.completion_tokens, event.reasoning_tokens), (40, 30));
        assert_eq!(usage(Some(5), 4, (0, 0)).time_to_first_answer_token_us, Some(5_000));
        assert_eq!(usage(None, 4, (0, 0)).time_to_first_answer_token_us, None);
        assert_eq!(usage(Some(5), 8, (40, 41)).reasoning_tokens, 40);
    }
}
