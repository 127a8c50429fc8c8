//! The reply of an overloaded gateway. Envoy runs no filter then, so the reply is a part of its configuration.

use std::time::Duration;

use hapa_core::rpc_error::{ERROR_DOMAIN, ErrorCode};
use tonic::{Code, Status};
use tonic_types::{ErrorDetail, ErrorInfo, RetryInfo, StatusExt as _};

/// The message of E5005, of an overloaded gateway and of every 503 that refusals.lua rewrites.
pub(super) const MESSAGE: &str = "The service can't be reached or is overloaded. Try again.";
const RETRY_DELAY: Duration = Duration::from_secs(1);

/// The value of the header `grpc-status-details-bin`. The incident id differs between replies, so Envoy
/// sends it in a header of its own.
pub(super) fn status_details() -> String {
    let entry = ErrorCode::Overloaded.entry();
    let metadata = [("error_code".to_owned(), entry.name.to_owned())];
    let details: [ErrorDetail; 2] = [
        ErrorInfo::new(entry.reason, ERROR_DOMAIN, metadata).into(),
        RetryInfo::new(Some(RETRY_DELAY)).into(),
    ];
    let code = entry.grpc.unwrap_or(Code::Unavailable);
    let reply = Status::with_error_details_vec(code, MESSAGE, details).into_http::<()>();
    let header = reply.headers().get("grpc-status-details-bin");
    header.and_then(|value| value.to_str().ok()).unwrap_or_default().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_status_details_are_the_published_error_and_retry_advice() {
        let value = status_details().parse().unwrap();
        let headers = [("grpc-status", "14".parse().unwrap()), ("grpc-status-details-bin", value)];
        let headers = headers.map(|(name, value)| (name.parse().unwrap(), value));
        let status = Status::from_header_map(&headers.into_iter().collect()).unwrap();
        let info = status.get_details_error_info().unwrap();
        assert_eq!((info.reason.as_str(), info.domain.as_str()), ("OVERLOADED", "hapa"));
        assert_eq!(info.metadata["error_code"], "E5005");
        assert_eq!(status.get_details_retry_info().unwrap().retry_delay, Some(RETRY_DELAY));
    }
}
