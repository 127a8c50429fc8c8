//! Token budgets: the flags, and how much is left.

use hapa_proto::auth::v1::{TokenBudget, TokenUsage};

/// Flags of commands that make something with a budget.
#[derive(clap::Args, Clone, Debug)]
#[group(id = "budget_args")]
pub(super) struct Args {
    /// Tokens that it may use in a day (UTC), prompts and answers together; 0: any number.
    #[arg(long, value_name = "N", value_parser = tokens())]
    tokens_per_day: Option<i64>,
    /// Tokens that it may use in a month (UTC); 0: any number.
    #[arg(long, value_name = "N", value_parser = tokens())]
    tokens_per_month: Option<i64>,
}

impl Args {
    pub(super) fn budget(&self) -> Option<TokenBudget> {
        changed(None, self.tokens_per_day, self.tokens_per_month)
    }
}

/// What the API takes.
pub(super) fn tokens() -> clap::builder::RangedI64ValueParser<i64> {
    clap::value_parser!(i64).range(0..=1_000_000_000_000)
}

/// The budget with the new numbers, the old ones where there is no new one; none where both are
/// unlimited.
pub(super) fn changed(
    old: Option<TokenBudget>,
    per_day: Option<i64>,
    per_month: Option<i64>,
) -> Option<TokenBudget> {
    let old = old.unwrap_or_default();
    let per_day = per_day.unwrap_or(old.per_day);
    let per_month = per_month.unwrap_or(old.per_month);
    (per_day > 0 || per_month > 0).then_some(TokenBudget { per_day, per_month })
}

/// Whether only one half was given, so that the other has to be read.
pub(super) fn is_half(per_day: Option<i64>, per_month: Option<i64>) -> bool {
    per_day.is_some() != per_month.is_some()
}

/// Tokens left today and this month, what is held counted as used; none: any number.
pub(super) fn left(
    budget: Option<TokenBudget>,
    usage: Option<TokenUsage>,
) -> (Option<i64>, Option<i64>) {
    let (budget, usage) = (budget.unwrap_or_default(), usage.unwrap_or_default());
    let left = |most: i64, used: i64| {
        let rest = most.saturating_sub(used).saturating_sub(usage.reserved_tokens);
        (most > 0).then_some(rest.max(0))
    };
    (left(budget.per_day, usage.day_tokens), left(budget.per_month, usage.month_tokens))
}

/// What may be used, in words.
pub(super) fn words(budget: Option<TokenBudget>) -> String {
    let number = |tokens: i64| match tokens {
        0 => "any number".to_owned(),
        tokens => tokens.to_string(),
    };
    match budget.filter(|budget| budget.per_day > 0 || budget.per_month > 0) {
        None => "any number".to_owned(),
        Some(TokenBudget { per_day, per_month }) => {
            format!("{} a day, {} a month", number(per_day), number(per_month))
        }
    }
}

/// What was used, in words.
pub(super) fn used(usage: Option<TokenUsage>) -> String {
    let TokenUsage { day_tokens, month_tokens, reserved_tokens } = usage.unwrap_or_default();
    format!("{day_tokens} today, {month_tokens} this month, {reserved_tokens} reserved")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_given_stays_as_it_was() {
        let old = Some(TokenBudget { per_day: 5, per_month: 50 });
        let both = |per_day, per_month| Some(TokenBudget { per_day, per_month });
        assert_eq!(changed(old, Some(7), None), both(7, 50));
        assert_eq!(changed(old, None, Some(70)), both(5, 70));
        assert_eq!(changed(old, Some(0), Some(0)), None);
        assert_eq!(changed(None, Some(7), None), both(7, 0));
        assert_eq!(changed(None, None, None), None);
    }

    #[test]
    fn what_is_held_is_not_left() {
        let budget = Some(TokenBudget { per_day: 100, per_month: 0 });
        let usage = Some(TokenUsage { day_tokens: 30, month_tokens: 60, reserved_tokens: 20 });
        assert_eq!(left(budget, usage), (Some(50), None));
        let over = Some(TokenUsage { day_tokens: 130, month_tokens: 130, reserved_tokens: 0 });
        assert_eq!(left(budget, over), (Some(0), None));
        assert_eq!(left(None, None), (None, None));
    }
}
