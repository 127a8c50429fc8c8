//! The `grpc-timeout` header: the time that the client allows for a call.

use std::time::Duration;

use http::HeaderMap;

use crate::rpc_error::{ErrorCode, RpcError};

/// Parses the header: at most 8 digits and a unit
/// (<https://github.com/grpc/grpc/blob/master/doc/PROTOCOL-HTTP2.md>). `None` if there is no such header.
pub fn grpc_timeout(headers: &HeaderMap) -> Result<Option<Duration>, RpcError> {
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
    let problem = || RpcError::new(ErrorCode::InvalidInput, "the grpc-timeout header is invalid");
    parsed.map(Some).ok_or_else(problem)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Option<Duration>, RpcError> {
        let headers = [("grpc-timeout".parse().unwrap(), text.parse().unwrap())];
        grpc_timeout(&HeaderMap::from_iter(headers))
    }

    #[test]
    fn timeouts_are_parsed_by_the_specification() {
        assert_eq!(parse("100m").unwrap(), Some(Duration::from_millis(100)));
        assert_eq!(parse("2S").unwrap(), Some(Duration::from_secs(2)));
        assert_eq!(parse("99999999H").unwrap(), Some(Duration::from_hours(99_999_999)));
        for wrong in ["", "S", "1", "1x", "-1S", "123456789S", "1é"] {
            assert!(parse(wrong).is_err(), "{wrong}");
        }
    }
}
