//! Token budgets: their flags, and the tokens that remain.

use hapa_proto::auth::v1::{TokenBudget, TokenUsage};

#[derive(clap::Args, Clone, Debug)]
pub(super) struct BudgetArgs {
    /// Token budget per day (UTC), prompts and answers together; 0: no limit.
    #[arg(long, value_name = "N", value_parser = token_count_parser())]
    tokens_per_day: Option<i64>,
    /// Token budget per month (UTC), prompts and answers together; 0: no limit.
    #[arg(long, value_name = "N", value_parser = token_count_parser())]
    tokens_per_month: Option<i64>,
}

impl BudgetArgs {
    pub(super) fn budget(&self) -> Option<TokenBudget> {
        merge(None, self.tokens_per_day, self.tokens_per_month)
    }
}

/// The range that the API accepts.
pub(super) fn token_count_parser() -> clap::builder::RangedI64ValueParser<i64> {
    clap::value_parser!(i64).range(0..=1_000_000_000_000)
}

/// The old budget with the new numbers in it; `None` if both numbers are unlimited.
pub(super) fn merge(
    old: Option<TokenBudget>,
    per_day: Option<i64>,
    per_month: Option<i64>,
) -> Option<TokenBudget> {
    let old = old.unwrap_or_default();
    let per_day = per_day.unwrap_or(old.per_day);
    let per_month = per_month.unwrap_or(old.per_month);
    (per_day > 0 || per_month > 0).then_some(TokenBudget { per_day, per_month })
}

/// Whether only one of the two numbers is given, so that the other must be read.
pub(super) fn is_partial(per_day: Option<i64>, per_month: Option<i64>) -> bool {
    per_day.is_some() != per_month.is_some()
}

/// Remaining tokens of today and of this month; reserved tokens count as used. `None`: unlimited.
pub(super) fn remaining(
    budget: Option<TokenBudget>,
    usage: Option<TokenUsage>,
) -> (Option<i64>, Option<i64>) {
    let (budget, usage) = (budget.unwrap_or_default(), usage.unwrap_or_default());
    let remaining = |budget: i64, used: i64| {
        let rest = budget.saturating_sub(used).saturating_sub(usage.reserved_tokens);
        (budget > 0).then_some(rest.max(0))
    };
    let day = remaining(budget.per_day, usage.day_tokens);
    (day, remaining(budget.per_month, usage.month_tokens))
}

/// A budget as text.
pub(super) fn describe(budget: Option<TokenBudget>) -> String {
    let number = |tokens: i64| match tokens {
        0 => "unlimited".to_owned(),
        tokens => tokens.to_string(),
    };
    match budget.filter(|budget| budget.per_day > 0 || budget.per_month > 0) {
        None => "unlimited".to_owned(),
        Some(TokenBudget { per_day, per_month }) => {
            format!("{} a day, {} a month", number(per_day), number(per_month))
        }
    }
}

/// Token usage as text.
pub(super) fn describe_usage(usage: Option<TokenUsage>) -> String {
    let TokenUsage { day_tokens, month_tokens, reserved_tokens } = usage.unwrap_or_default();
    format!("{day_tokens} today, {month_tokens} this month, {reserved_tokens} reserved")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_that_is_not_given_keeps_its_value() {
        let old = Some(TokenBudget { per_day: 5, per_month: 50 });
        let both = |per_day, per_month| Some(TokenBudget { per_day, per_month });
        assert_eq!(merge(old, Some(7), None), both(7, 50));
        assert_eq!(merge(old, None, Some(70)), both(5, 70));
        assert_eq!(merge(old, Some(0), Some(0)), None);
        assert_eq!(merge(None, Some(7), None), both(7, 0));
        assert_eq!(merge(None, None, None), None);
    }

    #[test]
    fn reserved_tokens_do_not_remain() {
        let budget = Some(TokenBudget { per_day: 100, per_month: 0 });
        let usage = Some(TokenUsage { day_tokens: 30, month_tokens: 60, reserved_tokens: 20 });
        assert_eq!(remaining(budget, usage), (Some(50), None));
        let over = Some(TokenUsage { day_tokens: 130, month_tokens: 130, reserved_tokens: 0 });
        assert_eq!(remaining(budget, over), (Some(0), None));
        assert_eq!(remaining(None, None), (None, None));
    }
}
