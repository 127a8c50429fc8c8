//! Checks that several requests share: names, scopes, limits, budgets, masks.

use std::collections::HashSet;

use hapa_core::access::SCOPES;
use hapa_core::timestamps::{LAST_SECOND, micros};
use hapa_core::violations::Violations;
use hapa_proto::auth::v1::{RateLimit, TokenBudget};
use prost_types::{FieldMask, Timestamp};

const LONGEST_NAME: usize = 100;
const MOST_LIMITS: usize = 32;
const MOST_CALLS: u32 = 1_000_000;
const LONGEST_WINDOW: u32 = 86_400;
const MOST_MODELS: usize = 64;
const MOST_TOKENS: i64 = 1_000_000_000_000;
/// RFC 5321, 4.5.3.1.3, without the angle brackets.
const LONGEST_EMAIL: usize = 254;
const PASSWORD: std::ops::RangeInclusive<usize> = 12..=256;

pub(crate) fn name(field: &'static str, text: &str, found: &mut Violations) {
    if text.trim().is_empty() {
        found.missing(field);
    } else if text.chars().count() > LONGEST_NAME || text.chars().any(char::is_control) {
        found.wrong(field, "must be 1 to 100 characters without control characters");
    }
}

/// In lower case, as the store keeps it.
pub(crate) fn email(text: &str, found: &mut Violations) -> String {
    let text = text.trim().to_lowercase();
    let fits = |text: &str| {
        let (local, domain) = text.split_once('@')?;
        let plain = |letter: char| !letter.is_whitespace() && !letter.is_control() && letter != '@';
        (!local.is_empty() && !domain.is_empty() && local.chars().chain(domain.chars()).all(plain))
            .then_some(())
    };
    if text.is_empty() {
        found.missing("email");
    } else if text.len() > LONGEST_EMAIL || fits(&text).is_none() {
        found.wrong("email", "must be an address of 3 to 254 characters with one @");
    }
    text
}

pub(crate) fn password(text: &str, found: &mut Violations) {
    if !PASSWORD.contains(&text.chars().count()) {
        found.wrong("password", "must be 12 to 256 characters");
    }
}

pub(crate) fn scopes(scopes: &[String], found: &mut Violations) {
    let mut seen = HashSet::new();
    for scope in scopes {
        if !SCOPES.contains(&scope.as_str()) {
            let known = SCOPES.join(", ");
            return found.wrong("scopes", format!("has an unknown scope; known are {known}"));
        }
        if !seen.insert(scope) {
            return found.wrong("scopes", "names a scope twice");
        }
    }
}

pub(crate) fn models(models: &[String], found: &mut Violations) {
    let unfit = |model: &String| model.is_empty() || model.chars().count() > LONGEST_NAME;
    if models.len() > MOST_MODELS || models.iter().any(unfit) {
        found.wrong("allowed_models", "takes at most 64 names of 1 to 100 characters");
    }
}

pub(crate) fn end(time: &Timestamp, now: i64, found: &mut Violations) {
    if micros(time) <= now {
        found.wrong("expire_time", "must be in the future");
    } else if time.seconds > LAST_SECOND || !(0..1_000_000_000).contains(&time.nanos) {
        found.wrong("expire_time", "must be a valid time before the year 10000");
    }
}

pub(crate) fn budget(budget: Option<&TokenBudget>, found: &mut Violations) {
    let Some(budget) = budget else { return };
    for (field, tokens) in
        [("token_budget.per_day", budget.per_day), ("token_budget.per_month", budget.per_month)]
    {
        if !(0..=MOST_TOKENS).contains(&tokens) {
            found.wrong(field, "must be from 0 to 1000000000000");
        }
    }
}

pub(crate) fn limits(limits: &[RateLimit], found: &mut Violations) {
    let mut methods = HashSet::new();
    let method = |name: &str| {
        name == "*"
            || (1..=64).contains(&name.len())
                && name.bytes().all(|byte| byte.is_ascii_alphanumeric())
    };
    if limits.len() > MOST_LIMITS {
        return found.wrong("rate_limits", "takes at most 32 entries");
    }
    let problem = limits.iter().find_map(|limit| {
        if !method(&limit.method) {
            Some("needs a method's name, such as GenerateCode, or * in each entry")
        } else if !methods.insert(&limit.method) {
            Some("may name a method once only")
        } else if limit.limit > MOST_CALLS {
            Some("allows limits from 0 to 1000000")
        } else if limit.limit > 0 && !(1..=LONGEST_WINDOW).contains(&limit.window_seconds) {
            Some("needs window_seconds from 1 to 86400 beside a limit")
        } else {
            None
        }
    });
    if let Some(problem) = problem {
        found.wrong("rate_limits", problem);
    }
}

/// The fields that an update sets.
pub(crate) fn mask(
    mask: Option<FieldMask>,
    known: &'static [&'static str],
    found: &mut Violations,
) -> Vec<String> {
    let paths = mask.map(|mask| mask.paths).unwrap_or_default();
    if paths.is_empty() {
        found.missing("update_mask");
    }
    if paths.iter().any(|path| !known.contains(&path.as_str())) {
        let problem = format!("names an unknown field; known are {}", known.join(", "));
        found.wrong("update_mask", problem);
    }
    paths
}

/// An id that must be there.
pub(crate) fn required(field: &'static str, text: String) -> Result<String, Violations> {
    let mut found = Violations::default();
    if text.is_empty() {
        found.missing(field);
    }
    found.check()?;
    Ok(text)
}

#[cfg(test)]
mod tests {
    use std::borrow::Cow;

    use proptest::prelude::*;

    use super::*;

    fn problems(check: impl FnOnce(&mut Violations)) -> Vec<Cow<'static, str>> {
        let mut found = Violations::default();
        check(&mut found);
        found.fields()
    }

    #[test]
    fn an_address_has_one_at_and_no_blanks() {
        for good in ["a@b", " Kim@Example.COM ", "김@예.kr"] {
            assert!(problems(|found| drop(email(good, found))).is_empty(), "{good}");
        }
        for bad in ["", "a", "@b", "a@", "a@b@c", "a b@c"] {
            assert_eq!(problems(|found| drop(email(bad, found))), ["email"], "{bad}");
        }
        assert_eq!(email(" Kim@Example.COM ", &mut Violations::default()), "kim@example.com");
    }

    #[test]
    fn a_mask_names_fields_that_can_be_set() {
        let paths = |paths: &[&str]| {
            let paths = paths.iter().map(|&path| path.to_owned()).collect();
            problems(|found| drop(mask(Some(FieldMask { paths }), &["name"], found)))
        };
        assert!(paths(&["name"]).is_empty());
        assert_eq!(paths(&[]), ["update_mask"]);
        assert_eq!(paths(&["name", "hash"]), ["update_mask"]);
    }

    proptest! {
        #[test]
        fn no_address_makes_it_panic(text in "\\PC{0,300}") {
            let _ = email(&text, &mut Violations::default());
        }
    }
}
