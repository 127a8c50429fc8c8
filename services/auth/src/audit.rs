//! `AuditService`: lists and verifies the audit log.

use hapa_core::pagination;
use hapa_core::timestamps::micros;
use hapa_core::violations::Violations;
use hapa_proto::auth::v1::audit_service_server::AuditService;
use hapa_proto::auth::v1::{
    ListAuditEntriesRequest, ListAuditEntriesResponse, VerifyAuditLogRequest,
    VerifyAuditLogResponse,
};
use tonic::{Request, Response, Status};

use crate::store::{AuditFilter, Store};

pub(crate) struct AuditApi {
    pub(crate) store: Store,
}

#[tonic::async_trait]
impl AuditService for AuditApi {
    async fn list_audit_entries(
        &self,
        request: Request<ListAuditEntriesRequest>,
    ) -> Result<Response<ListAuditEntriesResponse>, Status> {
        let request = request.into_inner();
        let size = pagination::page_size(request.page_size)?;
        let before = match request.page_token.as_str() {
            "" => i64::MAX,
            token => token.parse().map_err(|_| {
                Violations::single("page_token", "is not a next_page_token of an earlier reply")
            })?,
        };
        let filter = AuditFilter {
            before,
            actor: request.actor,
            subject: request.subject,
            action: request.action,
            start: request.start_time.as_ref().map_or(i64::MIN, micros),
            end: request.end_time.as_ref().map_or(i64::MAX, micros),
        };
        let page = self.store.audit_page(&filter, size + 1).await?;
        let (entries, has_more) = pagination::split_page(page, size);
        let last_entry = entries.last().filter(|_| has_more);
        let next_page_token =
            last_entry.map(|entry| entry.sequence.to_string()).unwrap_or_default();
        Ok(Response::new(ListAuditEntriesResponse { entries, next_page_token }))
    }

    async fn verify_audit_log(
        &self,
        _: Request<VerifyAuditLogRequest>,
    ) -> Result<Response<VerifyAuditLogResponse>, Status> {
        let verification = self.store.verify_audit().await?;
        let (broken_sequence, problem) = verification.first_broken.clone().unwrap_or_default();
        Ok(Response::new(VerifyAuditLogResponse {
            intact: verification.first_broken.is_none(),
            entries: verification.entry_count,
            head_hash: verification.head_hash,
            broken_sequence,
            problem,
        }))
    }
}
