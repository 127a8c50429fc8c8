//! What a call that ended is remembered as: one usage event where it was a user's, and one occurrence
//! where it failed. No key, prompt or answer is in either.

use std::time::{Duration, SystemTime};

use hapa_core::access::Access;
use hapa_core::call::Call;
use hapa_core::call_stats::Failure;
use hapa_core::error_chain;
use hapa_core::redaction::scrub;
use hapa_core::rpc_error::code_name;
use hapa_proto::analytics::v1::UsageEvent;
use hapa_proto::errors::v1::Occurrence;
use prost_types::Timestamp;
use tonic::Code;
use uuid::Uuid;

use super::{Kind, Receipt, Spool};

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
        let failures = failures.map(|(failure, recovered)| {
            (failure, error_chain::take(&failure.incident_id), recovered)
        });
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

/// `codegen` of `/hapa.codegen.v1.CodegenService/GenerateCode`.
fn role(path: &'static str) -> &'static str {
    path.trim_start_matches("/hapa.").split('.').next().unwrap_or(path)
}

fn micros(span: Duration) -> i64 {
    i64::try_from(span.as_micros()).unwrap_or(i64::MAX)
}
