//! Validation of request fields. Each function adds what it finds to the caller's violations.

use std::collections::HashSet;

use hapa_core::access::SCOPES;
use hapa_core::timestamps::{LAST_SECOND, micros};
use hapa_core::violations::Violations;
use hapa_proto::auth::v1::{RateLimit, TokenBudget};
use prost_types::{FieldMask, Timestamp};

pub(crate) const MAX_NAME_LEN: usize = 100;
const MAX_RATE_LIMITS: usize = 32;
const MAX_CALLS_PER_WINDOW: u32 = 1_000_000;
const MAX_WINDOW_SECONDS: u32 = 86_400;
const MAX_ALLOWED_MODELS: usize = 64;
const MAX_BUDGET_TOKENS: i64 = 1_000_000_000_000;
/// RFC 5321, 4.5.3.1.3, without the angle brackets.
const MAX_EMAIL_BYTES: usize = 254;
const PASSWORD_LEN: std::ops::RangeInclusive<usize> = 12..=256;

pub(crate) fn name(field: &'static str, text: &str, violations: &mut Violations) {
    if text.trim().is_empty() {
        violations.add_missing(field);
    } else if text.chars().count() > MAX_NAME_LEN || text.chars().any(char::is_control) {
        violations.add_invalid(field, "must be 1 to 100 characters without control characters");
    }
}

/// Returns the address trimmed and in lower case, as the store holds it.
pub(crate) fn email(text: &str, violations: &mut Violations) -> String {
    let text = text.trim().to_lowercase();
    if text.is_empty() {
        violations.add_missing("email");
    } else if email_domain(&text).is_none() {
        violations.add_invalid("email", "must be an address of 3 to 254 characters with one @");
    }
    text
}

/// The domain of an email address; `None` if the address is invalid.
pub(crate) fn email_domain(email: &str) -> Option<&str> {
    let (local, domain) = email.split_once('@')?;
    let is_valid = |char: char| char != '@' && !char.is_control() && !char.is_whitespace();
    let is_complete = !local.is_empty() && !domain.is_empty() && email.len() <= MAX_EMAIL_BYTES;
    (is_complete && local.chars().chain(domain.chars()).all(is_valid)).then_some(domain)
}

pub(crate) fn password(text: &str, violations: &mut Violations) {
    if !PASSWORD_LEN.contains(&text.chars().count()) {
        violations.add_invalid("password", "must be 12 to 256 characters");
    }
}

pub(crate) fn scopes(scopes: &[String], violations: &mut Violations) {
    let mut seen = HashSet::new();
    for scope in scopes {
        if !SCOPES.contains(&scope.as_str()) {
            let valid = SCOPES.join(", ");
            return violations
                .add_invalid("scopes", format!("has an unknown scope; valid scopes are {valid}"));
        }
        if !seen.insert(scope) {
            return violations.add_invalid("scopes", "lists a scope twice");
        }
    }
}

pub(crate) fn allowed_models(models: &[String], violations: &mut Violations) {
    let is_invalid = |model: &String| model.is_empty() || model.chars().count() > MAX_NAME_LEN;
    if models.len() > MAX_ALLOWED_MODELS || models.iter().any(is_invalid) {
        violations
            .add_invalid("allowed_models", "must hold at most 64 names of 1 to 100 characters");
    }
}

pub(crate) fn expire_time(time: &Timestamp, now: i64, violations: &mut Violations) {
    if micros(time) <= now {
        violations.add_invalid("expire_time", "must be in the future");
    } else if time.seconds > LAST_SECOND || !(0..1_000_000_000).contains(&time.nanos) {
        violations.add_invalid("expire_time", "must be a valid time before the year 10000");
    }
}

pub(crate) fn token_budget(budget: Option<&TokenBudget>, violations: &mut Violations) {
    let Some(budget) = budget else { return };
    for (field, tokens) in
        [("token_budget.per_day", budget.per_day), ("token_budget.per_month", budget.per_month)]
    {
        if !(0..=MAX_BUDGET_TOKENS).contains(&tokens) {
            violations.add_invalid(field, "must be from 0 to 1000000000000");
        }
    }
}

pub(crate) fn rate_limits(limits: &[RateLimit], violations: &mut Violations) {
    let mut methods = HashSet::new();
    let is_method = |name: &str| {
        name == "*"
            || (1..=64).contains(&name.len())
                && name.bytes().all(|byte| byte.is_ascii_alphanumeric())
    };
    if limits.len() > MAX_RATE_LIMITS {
        return violations.add_invalid("rate_limits", "must hold at most 32 entries");
    }
    let problem = limits.iter().find_map(|limit| {
        if !is_method(&limit.method) {
            Some("needs a method name, such as GenerateCode, or * in each entry")
        } else if !methods.insert(&limit.method) {
            Some("must not name a method twice")
        } else if limit.limit > MAX_CALLS_PER_WINDOW {
            Some("must have limits from 0 to 1000000")
        } else if limit.limit > 0 && !(1..=MAX_WINDOW_SECONDS).contains(&limit.window_seconds) {
            Some("needs window_seconds from 1 to 86400 with each limit above 0")
        } else {
            None
        }
    });
    if let Some(problem) = problem {
        violations.add_invalid("rate_limits", problem);
    }
}

/// The fields that an update sets, which must be in `updatable`.
pub(crate) fn update_mask(
    mask: Option<FieldMask>,
    updatable: &'static [&'static str],
    violations: &mut Violations,
) -> Vec<String> {
    let paths = mask.map(|mask| mask.paths).unwrap_or_default();
    if paths.is_empty() {
        violations.add_missing("update_mask");
    }
    if paths.iter().any(|path| !updatable.contains(&path.as_str())) {
        let problem = format!("names an unknown field; valid fields are {}", updatable.join(", "));
        violations.add_invalid("update_mask", problem);
    }
    paths
}

/// The text of a required field.
pub(crate) fn required(field: &'static str, text: String) -> Result<String, Violations> {
    let mut violations = Violations::default();
    if text.is_empty() {
        violations.add_missing(field);
    }
    violations.check()?;
    Ok(text)
}

#[cfg(test)]
mod tests {
    use std::borrow::Cow;

    use proptest::prelude::*;

    use super::*;

    fn invalid_fields(check: impl FnOnce(&mut Violations)) -> Vec<Cow<'static, str>> {
        let mut violations = Violations::default();
        check(&mut violations);
        violations.fields()
    }

    #[test]
    fn an_email_address_has_one_at_sign_and_no_whitespace() {
        for good in ["a@b", " Kim@Example.COM ", "김@예.kr"] {
            assert!(
                invalid_fields(|violations| drop(email(good, violations))).is_empty(),
                "{good}"
            );
        }
        for bad in ["", "a", "@b", "a@", "a@b@c", "a b@c"] {
            assert_eq!(
                invalid_fields(|violations| drop(email(bad, violations))),
                ["email"],
                "{bad}"
            );
        }
        assert_eq!(email(" Kim@Example.COM ", &mut Violations::default()), "kim@example.com");
    }

    #[test]
    fn an_update_mask_names_updatable_fields_only() {
        let paths = |paths: &[&str]| {
            let paths = paths.iter().map(|&path| path.to_owned()).collect();
            invalid_fields(|violations| {
                drop(update_mask(Some(FieldMask { paths }), &["name"], violations));
            })
        };
        assert!(paths(&["name"]).is_empty());
        assert_eq!(paths(&[]), ["update_mask"]);
        assert_eq!(paths(&["name", "hash"]), ["update_mask"]);
    }

    proptest! {
        #[test]
        fn email_validation_never_panics(text in "\\PC{0,300}") {
            let _ = email(&text, &mut Violations::default());
        }
    }
}
