//! Failures as gRPC responses: with headers only, or as the last frame of a stream.

use bytes::Bytes;
use hapa_core::rpc_error::RpcError;
use http::{HeaderMap, Response};
use http_body::Frame;
use tonic::Status;

/// A failure as a response without a body.
pub(crate) fn refuse<B: Default>(fault: RpcError) -> Response<B> {
    Status::from(fault).into_http()
}

/// A status as the trailers of a stream.
pub(crate) fn trailers(status: &Status) -> Frame<Bytes> {
    let mut headers = HeaderMap::new();
    write_status(status, &mut headers);
    Frame::trailers(headers)
}

/// Writes a status into headers or trailers.
pub(crate) fn write_status(status: &Status, headers: &mut HeaderMap) {
    if status.add_header(headers).is_err() {
        headers.insert("grpc-status", (status.code() as i32).into());
    }
}
