//! The roles and the validity period in a certificate. Callers must have verified the certificate's chain.

use std::time::Duration;

use hapa_core::access::OPERATOR_ROLE;
use rustls::pki_types::CertificateDer;
use time::PrimitiveDateTime;
use time::format_description::BorrowedFormatItem;
use time::macros::format_description;
use webpki::EndEntityCert;

/// All roles of peers.
const ROLES: &[&str] = &["auth", "codegen", "errors", "analytics", "gateway", OPERATOR_ROLE];

/// DER tags: a sequence, the version field, and the two types of times.
const SEQUENCE_TAG: u8 = 0x30;
const VERSION_TAG: u8 = 0xa0;
const UTC_TIME_TAG: u8 = 0x17;
const GENERALIZED_TIME_TAG: u8 = 0x18;
const TIME_FORMAT: &[BorrowedFormatItem<'_>] =
    format_description!("[year][month][day][hour][minute][second]Z");

/// The roles in a certificate. A role is a DNS name, such as `codegen`, or the last segment of a URI name that begins
/// with `prefix`, such as `spiffe://hapa/ns/hapa/sa/codegen`.
pub(super) fn roles(certificate: &CertificateDer<'_>, prefix: &str) -> Vec<&'static str> {
    let Ok(certificate) = EndEntityCert::try_from(certificate) else { return Vec::new() };
    let named: Vec<_> = certificate.valid_dns_names().collect();
    let uris = certificate.valid_uri_names();
    let paths = uris.filter_map(|uri| uri.strip_prefix(prefix).filter(|_| !prefix.is_empty()));
    let paths: Vec<_> = paths.filter_map(|path| path.rsplit('/').next()).collect();
    let has_role = |role: &&&str| named.contains(*role) || paths.contains(*role);
    ROLES.iter().filter(has_role).copied().collect()
}

/// The validity period of a certificate, in seconds since 1970.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Validity {
    from: i64,
    until: i64,
}

impl Validity {
    /// The validity period of a certificate; `None` if it can't be parsed.
    pub(super) fn parse(certificate: &CertificateDer<'_>) -> Option<Validity> {
        let (_, certificate, _) = element(certificate)?;
        let (_, mut rest, _) = element(certificate)?;
        if rest.first() == Some(&VERSION_TAG) {
            rest = element(rest)?.2;
        }
        // Skip the serial number, the signature algorithm and the issuer.
        for _ in 0..3 {
            rest = element(rest)?.2;
        }
        let (tag, validity, _) = element(rest)?;
        let (from, text, rest) = element(validity).filter(|_| tag == SEQUENCE_TAG)?;
        let (until, end, _) = element(rest)?;
        Some(Validity { from: seconds(from, text)?, until: seconds(until, end)? })
    }

    /// The remaining validity.
    pub fn left(&self, now: i64) -> Duration {
        Duration::from_secs(u64::try_from(self.until - now).unwrap_or_default())
    }

    /// Whether less than a tenth of the validity period remains: the renewal is overdue.
    pub(super) fn is_ending(&self, now: i64) -> bool {
        self.until - now < (self.until - self.from) / 10
    }
}

/// Parses one DER element: its tag, its content, and the remaining bytes.
fn element(bytes: &[u8]) -> Option<(u8, &[u8], &[u8])> {
    let (&tag, rest) = bytes.split_first()?;
    let (&first, rest) = rest.split_first()?;
    let (length, rest) = if first < 0x80 {
        (usize::from(first), rest)
    } else {
        let (digits, rest) = rest.split_at_checked(usize::from(first & 0x7f))?;
        let number = |sum: usize, digit: &u8| sum.checked_mul(256)?.checked_add((*digit).into());
        (digits.iter().try_fold(0, number)?, rest)
    };
    let (content, rest) = rest.split_at_checked(length)?;
    Some((tag, content, rest))
}

fn seconds(tag: u8, text: &[u8]) -> Option<i64> {
    let text = std::str::from_utf8(text).ok()?;
    let text = match tag {
        GENERALIZED_TIME_TAG => text.to_owned(),
        // <https://www.rfc-editor.org/rfc/rfc5280#section-4.1.2.5.1>
        UTC_TIME_TAG => {
            let century = if text.get(..2)? < "50" { "20" } else { "19" };
            format!("{century}{text}")
        }
        _ => return None,
    };
    let time = PrimitiveDateTime::parse(&text, TIME_FORMAT).ok()?;
    Some(time.assume_utc().unix_timestamp())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_parsed_in_both_formats() {
        assert_eq!(seconds(UTC_TIME_TAG, b"700101000010Z"), Some(10));
        assert_eq!(
            seconds(UTC_TIME_TAG, b"490101000000Z"),
            seconds(GENERALIZED_TIME_TAG, b"20490101000000Z")
        );
        assert_eq!(seconds(GENERALIZED_TIME_TAG, b"20261123000000Z"), Some(1_795_392_000));
        assert_eq!(seconds(GENERALIZED_TIME_TAG, b"no time"), None);
        assert_eq!(seconds(0x02, b"20261123000000Z"), None);
    }

    #[test]
    fn a_truncated_element_is_rejected() {
        let long = [0x30, 0x82, 0x01, 0x00];
        assert_eq!(element(&long), None);
        assert_eq!(element(&[0x30, 0x89, 1, 1, 1, 1, 1, 1, 1, 1, 1]), None);
        assert_eq!(element(&[]), None);
        assert_eq!(element(&[4, 1, 7, 9]), Some((4, &[7][..], &[9][..])));
    }

    #[test]
    fn a_certificate_is_ending_when_a_tenth_of_its_validity_remains() {
        let life = Validity { from: 0, until: 1_000 };
        assert!(!life.is_ending(899) && life.is_ending(901));
        assert_eq!(life.left(990), Duration::from_secs(10));
        assert_eq!(life.left(2_000), Duration::ZERO);
    }
}
