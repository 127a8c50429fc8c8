//! Days of usage.

use std::collections::BTreeMap;

use hapa_store::sql::{Placeholder, SqlText};
use sqlx::any::{AnyArguments, AnyRow};
use sqlx::query::Query;
use sqlx::{Any, AnyConnection, Row as _};

use crate::error::Error;
use crate::rollup::{Use, UseKey};
use crate::store::{Store, portions};

/// Rows of one statement.
const MOST: usize = 64;

/// What usage can be grouped by. The order is that of the columns by which groups are told apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum By {
    Day,
    Owner,
    Key,
    User,
    Model,
}

impl By {
    const fn column(self) -> &'static str {
        match self {
            By::Day => "day",
            By::Owner => "owner",
            By::Key => "key_id",
            By::User => "user_id",
            By::Model => "model",
        }
    }
}

/// Which usage to read. "": all.
#[derive(Clone, Debug)]
pub(crate) struct Usage {
    pub(crate) start: i64,
    /// Until before this.
    pub(crate) end: i64,
    pub(crate) owner: String,
    pub(crate) key_id: String,
    pub(crate) model: String,
}

/// A group's sum; what it is not grouped by is empty.
#[derive(Debug, Default)]
pub(crate) struct Total {
    pub(crate) day: Option<i64>,
    pub(crate) owner: String,
    pub(crate) key_id: String,
    pub(crate) user_id: String,
    pub(crate) model: String,
    pub(crate) used: Use,
}

const SUMS: &str = "CAST(COALESCE(SUM(requests), 0) AS BIGINT) AS requests,
     CAST(COALESCE(SUM(errors), 0) AS BIGINT) AS errors,
     CAST(COALESCE(SUM(prompt_tokens), 0) AS BIGINT) AS prompt_tokens,
     CAST(COALESCE(SUM(completion_tokens), 0) AS BIGINT) AS completion_tokens";
/// Over all groups, whatever page is asked for: so the days are read once.
const WHOLE: &str = "CAST(SUM(SUM(requests)) OVER () AS BIGINT) AS all_requests,
     CAST(SUM(SUM(errors)) OVER () AS BIGINT) AS all_errors,
     CAST(SUM(SUM(prompt_tokens)) OVER () AS BIGINT) AS all_prompt_tokens,
     CAST(SUM(SUM(completion_tokens)) OVER () AS BIGINT) AS all_completion_tokens";
const FROM: &str = "FROM usage_days WHERE day >= $1 AND day < $2
     AND ($3 = '' OR owner = $3) AND ($4 = '' OR key_id = $4) AND ($5 = '' OR model = $5)";

impl Store {
    /// A page of groups: by day, oldest first, where days are asked for, then most tokens first.
    /// And the sum of all groups of all pages.
    pub(crate) async fn usage(
        &self,
        which: &Usage,
        by: &[By],
        size: i64,
        offset: i64,
    ) -> Result<(Vec<Total>, Use), Error> {
        let columns = || by.iter().map(|by| by.column());
        let first = if by.contains(&By::Day) { "day, " } else { "" };
        let text = SqlText::new("SELECT ").list(columns().chain([SUMS, WHOLE])).with(" ");
        let text = text.with(FROM).with(" GROUP BY ").list(columns());
        let text = text.with(" ORDER BY ").with(first);
        let text = text.with("SUM(prompt_tokens + completion_tokens) DESC, ").list(columns());
        let text = text.with(" LIMIT $6 OFFSET $7");
        let rows = bind(sqlx::query(text), which).bind(size).bind(offset);
        let rows = rows.fetch_all(&self.db.reader).await?;
        let whole = match rows.first() {
            Some(row) => used(row, "all_")?,
            // A page beyond the last.
            None => self.whole_usage(which).await?,
        };
        let page = rows.iter().map(|row| total(row, by));
        Ok((page.collect::<Result<_, _>>()?, whole))
    }

    async fn whole_usage(&self, which: &Usage) -> Result<Use, Error> {
        let row = sqlx::query(SqlText::new("SELECT ").list([SUMS]).with(" ").with(FROM));
        used(&bind(row, which).fetch_one(&self.db.reader).await?, "")
    }
}

type AnyQuery<'q> = Query<'q, Any, AnyArguments>;

fn bind<'q>(query: AnyQuery<'q>, which: &Usage) -> AnyQuery<'q> {
    let query = query.bind(which.start).bind(which.end).bind(which.owner.clone());
    query.bind(which.key_id.clone()).bind(which.model.clone())
}

fn used(row: &AnyRow, prefix: &str) -> Result<Use, Error> {
    let read = |name: &str| row.try_get(format!("{prefix}{name}").as_str());
    Ok(Use {
        requests: read("requests")?,
        errors: read("errors")?,
        prompt_tokens: read("prompt_tokens")?,
        completion_tokens: read("completion_tokens")?,
    })
}

fn total(row: &AnyRow, by: &[By]) -> Result<Total, Error> {
    let mut total = Total { used: used(row, "")?, ..Total::default() };
    for by in by {
        match by {
            By::Day => total.day = Some(row.try_get("day")?),
            By::Owner => total.owner = row.try_get("owner")?,
            By::Key => total.key_id = row.try_get("key_id")?,
            By::User => total.user_id = row.try_get("user_id")?,
            By::Model => total.model = row.try_get("model")?,
        }
    }
    Ok(total)
}

/// Adds to the days.
pub(super) async fn add(
    connection: &mut AnyConnection,
    uses: &BTreeMap<UseKey<'_>, Use>,
) -> Result<(), Error> {
    let placeholder = Placeholder::of(connection.backend_name());
    let uses: Vec<_> = uses.iter().collect();
    for portion in portions(&uses, MOST) {
        let text = SqlText::new(
            "INSERT INTO usage_days (day, owner, key_id, user_id, model, requests, errors, prompt_tokens, completion_tokens)
             VALUES ",
        )
        .rows(placeholder, portion.len(), 9, "")
        .with(
            " ON CONFLICT (day, owner, key_id, user_id, model) DO UPDATE
             SET requests = usage_days.requests + excluded.requests,
                 errors = usage_days.errors + excluded.errors,
                 prompt_tokens = usage_days.prompt_tokens + excluded.prompt_tokens,
                 completion_tokens = usage_days.completion_tokens + excluded.completion_tokens",
        );
        let mut update = sqlx::query(text);
        for ((day, owner, key_id, user_id, model), used) in portion {
            update = update.bind(day).bind(*owner).bind(*key_id).bind(*user_id).bind(*model);
            update = update.bind(used.requests).bind(used.errors);
            update = update.bind(used.prompt_tokens).bind(used.completion_tokens);
        }
        update.execute(&mut *connection).await?;
    }
    Ok(())
}
