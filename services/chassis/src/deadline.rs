//! A call ends when its time is up, also in the middle of a stream.
//!
//! tonic's own timeouts end at the response's headers and say CANCELLED; this one covers the body
//! and says DEADLINE_EXCEEDED. What is below gets to speak first, so that a handler which watches
//! the same deadline can say what broke.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::body::Body;
use axum::extract::{Request, State};
use axum::middleware::Next;
use axum::response::Response;
use bytes::Bytes;
use http::HeaderMap;
use http_body::{Body as HttpBody, Frame, SizeHint};
use pin_project_lite::pin_project;
use tokio::time::{Sleep, sleep_until, timeout_at};
use tonic::Status;

use crate::context::Call;
use crate::layers::{Shared, refuse, trailers};
use crate::rpc::Access;
use crate::status::{ErrorCode, Fault};

pub(crate) async fn deadline(
    State(shared): State<Arc<Shared>>,
    mut request: Request,
    next: Next,
) -> Response {
    let asked = match grpc_timeout(request.headers()) {
        Ok(asked) => asked,
        Err(fault) => return refuse(fault),
    };
    let Some(call) = request.extensions_mut().get_mut::<Call>() else {
        return next.run(request).await;
    };
    // What services and probes watch lives as long as they want.
    let bound = match call.rpc.map(|rpc| rpc.access) {
        Some(Access::Public | Access::Mesh) => None,
        _ => Some(shared.request_timeout),
    };
    let Some(span) = asked.into_iter().chain(bound).min() else {
        return next.run(request).await;
    };
    let at = call.arrived + span;
    call.deadline = Some(at);
    match timeout_at(at, next.run(request)).await {
        Ok(response) => response.map(|body| Body::new(Timed { body, timer: sleep_until(at) })),
        Err(_) => refuse(passed()),
    }
}

fn passed() -> Fault {
    Fault::new(
        ErrorCode::ModelTimeout,
        "the call's deadline has passed; allow more time or ask for less",
    )
}

/// <https://github.com/grpc/grpc/blob/master/doc/PROTOCOL-HTTP2.md>: at most 8 digits and a unit.
pub(crate) fn grpc_timeout(headers: &HeaderMap) -> Result<Option<Duration>, Fault> {
    let Some(value) = headers.get("grpc-timeout") else {
        return Ok(None);
    };
    let parsed = value.to_str().ok().and_then(|text| {
        let (digits, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
        let number: u64 = digits.parse().ok().filter(|_| (1..=8).contains(&digits.len()))?;
        Some(match unit {
            "H" => Duration::from_secs(number * 3600),
            "M" => Duration::from_secs(number * 60),
            "S" => Duration::from_secs(number),
            "m" => Duration::from_millis(number),
            "u" => Duration::from_micros(number),
            "n" => Duration::from_nanos(number),
            _ => return None,
        })
    });
    let problem = || Fault::new(ErrorCode::InvalidInput, "the grpc-timeout header can't be read");
    parsed.map(Some).ok_or_else(problem)
}

pin_project! {
    struct Timed {
        body: Body,
        #[pin]
        timer: Sleep,
    }
}

impl HttpBody for Timed {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        let this = self.project();
        if let Poll::Ready(frame) = Pin::new(&mut *this.body).poll_frame(cx) {
            return Poll::Ready(frame);
        }
        if this.body.is_end_stream() || this.timer.poll(cx).is_pending() {
            return Poll::Pending;
        }
        // Dropped now: what feeds it must not run on.
        *this.body = Body::empty();
        Poll::Ready(Some(Ok(trailers(&Status::from(passed())))))
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Option<Duration>, Fault> {
        let headers = [("grpc-timeout".parse().unwrap(), text.parse().unwrap())];
        grpc_timeout(&HeaderMap::from_iter(headers))
    }

    #[test]
    fn timeouts_are_read_as_the_protocol_says() {
        assert_eq!(parse("100m").unwrap(), Some(Duration::from_millis(100)));
        assert_eq!(parse("2S").unwrap(), Some(Duration::from_secs(2)));
        assert_eq!(parse("99999999H").unwrap(), Some(Duration::from_hours(99_999_999)));
        for wrong in ["", "S", "1", "1x", "-1S", "123456789S", "1é"] {
            assert!(parse(wrong).is_err(), "{wrong}");
        }
    }
}
