//! What a certificate says: the roles that it proves, and until when it holds. Nothing here trusts
//! it: its chain was verified before anyone asks.

use std::time::Duration;

use hapa_core::access::OPERATOR;
use rustls::pki_types::CertificateDer;
use time::PrimitiveDateTime;
use time::format_description::BorrowedFormatItem;
use time::macros::format_description;
use webpki::EndEntityCert;

/// Who may stand at the other end of a connection.
const ROLES: &[&str] = &["auth", "codegen", "errors", "analytics", "gateway", OPERATOR];

/// What DER calls a sequence, the version's wrapper, and the two kinds of times.
const SEQUENCE: u8 = 0x30;
const VERSION: u8 = 0xa0;
const SHORT_TIME: u8 = 0x17;
const LONG_TIME: u8 = 0x18;
const TIME: &[BorrowedFormatItem<'_>] =
    format_description!("[year][month][day][hour][minute][second]Z");

/// The roles that a certificate proves: by a DNS name that is one, such as `codegen`, or by a URI
/// that begins with `prefix` and ends with one, such as `spiffe://hapa/ns/hapa/sa/codegen`.
pub fn roles(certificate: &CertificateDer<'_>, prefix: &str) -> Vec<&'static str> {
    let Ok(certificate) = EndEntityCert::try_from(certificate) else { return Vec::new() };
    let named: Vec<_> = certificate.valid_dns_names().collect();
    let uris = certificate.valid_uri_names();
    let paths = uris.filter_map(|uri| uri.strip_prefix(prefix).filter(|_| !prefix.is_empty()));
    let paths: Vec<_> = paths.filter_map(|path| path.rsplit('/').next()).collect();
    let proves = |role: &&&str| named.contains(*role) || paths.contains(*role);
    ROLES.iter().filter(proves).copied().collect()
}

/// When a certificate begins and ends to hold, as seconds since 1970.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Validity {
    /// From then on.
    pub from: i64,
    /// Until then.
    pub until: i64,
}

impl Validity {
    /// Of a certificate; none where it can't be read.
    pub fn of(certificate: &CertificateDer<'_>) -> Option<Validity> {
        let (_, certificate, _) = element(certificate)?;
        let (_, mut rest, _) = element(certificate)?;
        if rest.first() == Some(&VERSION) {
            rest = element(rest)?.2;
        }
        // The serial number, the signature's kind, the issuer.
        for _ in 0..3 {
            rest = element(rest)?.2;
        }
        let (tag, validity, _) = element(rest)?;
        let (from, text, rest) = element(validity).filter(|_| tag == SEQUENCE)?;
        let (until, end, _) = element(rest)?;
        Some(Validity { from: seconds(from, text)?, until: seconds(until, end)? })
    }

    /// How long it still holds.
    pub fn left(&self, now: i64) -> Duration {
        Duration::from_secs(u64::try_from(self.until - now).unwrap_or_default())
    }

    /// Whether less than a tenth of its life is left: whoever renews it has not for long.
    pub fn is_ending(&self, now: i64) -> bool {
        self.until - now < (self.until - self.from) / 10
    }
}

/// One element of DER: its tag, what is in it, and what follows.
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
        LONG_TIME => text.to_owned(),
        // <https://www.rfc-editor.org/rfc/rfc5280#section-4.1.2.5.1>
        SHORT_TIME => {
            let century = if text.get(..2)? < "50" { "20" } else { "19" };
            format!("{century}{text}")
        }
        _ => return None,
    };
    let time = PrimitiveDateTime::parse(&text, TIME).ok()?;
    Some(time.assume_utc().unix_timestamp())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_read_in_both_of_their_forms() {
        assert_eq!(seconds(SHORT_TIME, b"700101000010Z"), Some(10));
        assert_eq!(seconds(SHORT_TIME, b"490101000000Z"), seconds(LONG_TIME, b"20490101000000Z"));
        assert_eq!(seconds(LONG_TIME, b"20261123000000Z"), Some(1_795_392_000));
        assert_eq!(seconds(LONG_TIME, b"no time"), None);
        assert_eq!(seconds(0x02, b"20261123000000Z"), None);
    }

    #[test]
    fn what_is_cut_off_anywhere_is_not_read_and_does_no_harm() {
        let long = [0x30, 0x82, 0x01, 0x00];
        assert_eq!(element(&long), None);
        assert_eq!(element(&[0x30, 0x89, 1, 1, 1, 1, 1, 1, 1, 1, 1]), None);
        assert_eq!(element(&[]), None);
        assert_eq!(element(&[4, 1, 7, 9]), Some((4, &[7][..], &[9][..])));
    }

    #[test]
    fn a_certificate_ends_when_a_tenth_of_its_life_is_left() {
        let life = Validity { from: 0, until: 1_000 };
        assert!(!life.is_ending(899) && life.is_ending(901));
        assert_eq!(life.left(990), Duration::from_secs(10));
        assert_eq!(life.left(2_000), Duration::ZERO);
    }
}
