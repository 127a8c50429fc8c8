//! Usage totals by day, owner, key, user and model.

use std::collections::BTreeMap;

use hapa_store::sql::{Placeholder, SqlText};
use sqlx::any::{AnyArguments, AnyRow};
use sqlx::query::Query;
use sqlx::{Any, AnyConnection, Row as _};

use crate::error::Error;
use crate::rollup::{UsageKey, UsageTotals};
use crate::store::{Store, power_of_two_chunks};

/// Most rows in one statement.
const MAX_ROWS_PER_STATEMENT: usize = 64;

/// The dimensions by which usage can be grouped, in the order of the result columns.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum UsageDimension {
    Day,
    Owner,
    Key,
    User,
    Model,
}

impl UsageDimension {
    const fn column(self) -> &'static str {
        match self {
            UsageDimension::Day => "day",
            UsageDimension::Owner => "owner",
            UsageDimension::Key => "key_id",
            UsageDimension::User => "user_id",
            UsageDimension::Model => "model",
        }
    }
}

/// Selects the usage to read. "": all.
#[derive(Clone, Debug)]
pub(crate) struct UsageFilter {
    pub(crate) start: i64,
    /// Exclusive.
    pub(crate) end: i64,
    pub(crate) owner: String,
    pub(crate) key_id: String,
    pub(crate) model: String,
}

/// The totals of a group. Dimensions that are not grouped by are empty.
#[derive(Debug, Default)]
pub(crate) struct UsageGroup {
    pub(crate) day: Option<i64>,
    pub(crate) owner: String,
    pub(crate) key_id: String,
    pub(crate) user_id: String,
    pub(crate) model: String,
    pub(crate) totals: UsageTotals,
}

const SUM_COLUMNS: &str = "CAST(COALESCE(SUM(requests), 0) AS BIGINT) AS requests,
     CAST(COALESCE(SUM(errors), 0) AS BIGINT) AS errors,
     CAST(COALESCE(SUM(prompt_tokens), 0) AS BIGINT) AS prompt_tokens,
     CAST(COALESCE(SUM(completion_tokens), 0) AS BIGINT) AS completion_tokens,
     CAST(COALESCE(SUM(reasoning_tokens), 0) AS BIGINT) AS reasoning_tokens";
/// Totals over the groups of all pages, so that one query reads the days once.
const GRAND_TOTAL_COLUMNS: &str = "CAST(SUM(SUM(requests)) OVER () AS BIGINT) AS all_requests,
     CAST(SUM(SUM(errors)) OVER () AS BIGINT) AS all_errors,
     CAST(SUM(SUM(prompt_tokens)) OVER () AS BIGINT) AS all_prompt_tokens,
     CAST(SUM(SUM(completion_tokens)) OVER () AS BIGINT) AS all_completion_tokens,
     CAST(SUM(SUM(reasoning_tokens)) OVER () AS BIGINT) AS all_reasoning_tokens";
const FROM_CLAUSE: &str = "FROM usage_days WHERE day >= $1 AND day < $2
     AND ($3 = '' OR owner = $3) AND ($4 = '' OR key_id = $4) AND ($5 = '' OR model = $5)";

impl Store {
    /// A page of groups and the totals over all pages. Groups are sorted by day (if grouped by
    /// day), oldest first, then by tokens, most first.
    pub(crate) async fn usage(
        &self,
        filter: &UsageFilter,
        dimensions: &[UsageDimension],
        size: i64,
        offset: i64,
    ) -> Result<(Vec<UsageGroup>, UsageTotals), Error> {
        let columns = || dimensions.iter().map(|dimension| dimension.column());
        let sort_by_day = if dimensions.contains(&UsageDimension::Day) { "day, " } else { "" };
        let text = SqlText::new("SELECT ");
        let text = text.list(columns().chain([SUM_COLUMNS, GRAND_TOTAL_COLUMNS])).with(" ");
        let text = text.with(FROM_CLAUSE).with(" GROUP BY ").list(columns());
        let text = text.with(" ORDER BY ").with(sort_by_day);
        let text = text.with("SUM(prompt_tokens + completion_tokens) DESC, ").list(columns());
        let text = text.with(" LIMIT $6 OFFSET $7");
        let rows = bind_filter(sqlx::query(text), filter).bind(size).bind(offset);
        let rows = rows.fetch_all(&self.db.reader).await?;
        let grand_total = match rows.first() {
            Some(row) => read_totals(row, "all_")?,
            // The page is beyond the last one.
            None => self.usage_grand_total(filter).await?,
        };
        let page = rows.iter().map(|row| read_group(row, dimensions));
        Ok((page.collect::<Result<_, _>>()?, grand_total))
    }

    async fn usage_grand_total(&self, filter: &UsageFilter) -> Result<UsageTotals, Error> {
        let text = SqlText::new("SELECT ").list([SUM_COLUMNS]).with(" ").with(FROM_CLAUSE);
        let row = sqlx::query(text);
        read_totals(&bind_filter(row, filter).fetch_one(&self.db.reader).await?, "")
    }
}

type AnyQuery<'q> = Query<'q, Any, AnyArguments>;

fn bind_filter<'q>(query: AnyQuery<'q>, filter: &UsageFilter) -> AnyQuery<'q> {
    let query = query.bind(filter.start).bind(filter.end).bind(filter.owner.clone());
    query.bind(filter.key_id.clone()).bind(filter.model.clone())
}

fn read_totals(row: &AnyRow, prefix: &str) -> Result<UsageTotals, Error> {
    let read = |name: &str| row.try_get(format!("{prefix}{name}").as_str());
    Ok(UsageTotals {
        requests: read("requests")?,
        errors: read("errors")?,
        prompt_tokens: read("prompt_tokens")?,
        completion_tokens: read("completion_tokens")?,
        reasoning_tokens: read("reasoning_tokens")?,
    })
}

fn read_group(row: &AnyRow, dimensions: &[UsageDimension]) -> Result<UsageGroup, Error> {
    let mut group = UsageGroup { totals: read_totals(row, "")?, ..UsageGroup::default() };
    for dimension in dimensions {
        match dimension {
            UsageDimension::Day => group.day = Some(row.try_get("day")?),
            UsageDimension::Owner => group.owner = row.try_get("owner")?,
            UsageDimension::Key => group.key_id = row.try_get("key_id")?,
            UsageDimension::User => group.user_id = row.try_get("user_id")?,
            UsageDimension::Model => group.model = row.try_get("model")?,
        }
    }
    Ok(group)
}

/// Adds to the usage of days.
pub(super) async fn upsert_usage_days(
    connection: &mut AnyConnection,
    usage: &BTreeMap<UsageKey<'_>, UsageTotals>,
) -> Result<(), Error> {
    let placeholder = Placeholder::for_backend(connection.backend_name());
    let usage: Vec<_> = usage.iter().collect();
    for chunk in power_of_two_chunks(&usage, MAX_ROWS_PER_STATEMENT) {
        let text = SqlText::new(
            "INSERT INTO usage_days (day, owner, key_id, user_id, model, requests, errors, prompt_tokens, completion_tokens,
                    reasoning_tokens)
             VALUES ",
        )
        .rows(placeholder, chunk.len(), 10, "")
        .with(
            " ON CONFLICT (day, owner, key_id, user_id, model) DO UPDATE
             SET requests = usage_days.requests + excluded.requests,
                 errors = usage_days.errors + excluded.errors,
                 prompt_tokens = usage_days.prompt_tokens + excluded.prompt_tokens,
                 completion_tokens = usage_days.completion_tokens + excluded.completion_tokens,
                 reasoning_tokens = usage_days.reasoning_tokens + excluded.reasoning_tokens",
        );
        let mut update = sqlx::query(text);
        for ((day, owner, key_id, user_id, model), totals) in chunk {
            update = update.bind(day).bind(*owner).bind(*key_id).bind(*user_id).bind(*model);
            update = update.bind(totals.requests).bind(totals.errors);
            update = update.bind(totals.prompt_tokens).bind(totals.completion_tokens);
            update = update.bind(totals.reasoning_tokens);
        }
        update.execute(&mut *connection).await?;
    }
    Ok(())
}
