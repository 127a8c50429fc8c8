//! Users.

use hapa_core::pagination::After;
use hapa_core::timestamps::timestamp;
use hapa_proto::auth::v1::{TokenBudget, User};
use hapa_proto::codegen::v1::UserProfile;
use prost::Message;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use sqlx::any::AnyRow;
use sqlx::{AnyConnection, Row as _};
use tonic::Response;

use crate::error::Error;
use crate::store::budgets::usage_of;
use crate::store::keys::budget_detail;
use crate::store::{
    Attempt, By, Effect, Note, Store, budget, from_json, json as to_json, sessions,
};

/// A user, as far as it concerns who calls.
#[derive(Clone, Debug)]
pub(crate) struct Who {
    pub(crate) user_id: String,
    pub(crate) scopes: Vec<String>,
    pub(crate) profile: Option<UserProfile>,
    pub(crate) has_budget: bool,
}

/// A user to be.
pub(crate) struct NewUser {
    pub(crate) user: User,
    pub(crate) password_hash: Option<String>,
    /// Issuer and subject at the identity provider.
    pub(crate) identity: Option<String>,
    pub(crate) profile: UserProfile,
}

/// What to set; none: it stays.
#[derive(Clone, Debug, Default)]
pub(crate) struct UserChanges {
    pub(crate) email: Option<String>,
    pub(crate) name: Option<String>,
    pub(crate) password_hash: Option<String>,
    pub(crate) scopes: Option<Vec<String>>,
    pub(crate) token_budget: Option<TokenBudget>,
}

/// A profile as it is kept: what is empty is a default.
#[derive(Default, Deserialize, PartialEq, Serialize)]
#[serde(default)]
struct StoredProfile {
    python_skill_level: String,
    code_output_structure: String,
    explanation_style: String,
    project_context: String,
    error_handling_preference: String,
    preferred_language_features: Vec<String>,
}

impl Store {
    /// The new user goes into the reply as `user_by_id` shows it.
    pub(crate) async fn insert_user<R: Message + Default + 'static>(
        &self,
        attempt: Attempt,
        new: NewUser,
        reply: impl FnOnce(User) -> R + Send + 'static,
    ) -> Result<Response<R>, Error> {
        let now = attempt.by.time;
        self.change_once(attempt, move |connection| {
            Box::pin(async move {
                let NewUser { user, password_hash, identity, profile } = new;
                let budget = user.token_budget.unwrap_or_default();
                let detail = json!({
                    "email": user.email,
                    "name": user.name,
                    "scopes": user.scopes,
                    "token_budget": user.token_budget.as_ref().map(budget_detail),
                    "has_password": password_hash.is_some(),
                    "identity": identity,
                });
                let user_id = user.user_id;
                let insert = sqlx::query(
                    "INSERT INTO users (user_id, email, name, password_hash, identity, scopes, day_budget, month_budget, profile, create_time, update_time)
                     VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $10)
                     ON CONFLICT DO NOTHING",
                )
                .bind(user_id.clone())
                .bind(user.email)
                .bind(user.name)
                .bind(password_hash)
                .bind(identity)
                .bind(to_json(&user.scopes)?)
                .bind(budget.per_day)
                .bind(budget.per_month)
                .bind(profile_json(profile)?)
                .bind(now);
                if insert.execute(&mut *connection).await?.rows_affected() == 0 {
                    return Err(Error::EmailTaken);
                }
                let user = user_by_id(connection, &user_id, now).await?;
                let subject = format!("user:{user_id}");
                let user = user.ok_or(Error::NoSuch("user"))?;
                Ok((reply(user), vec![Note::new("user.create", subject, detail, Effect::None)]))
            })
        })
        .await
    }

    /// With what it has used.
    pub(crate) async fn user_by_id(&self, user_id: &str, now: i64) -> Result<Option<User>, Error> {
        user_by_id(&mut *self.db.reader.acquire().await?, user_id, now).await
    }

    /// With the hash of its password.
    pub(crate) async fn user_by_email(
        &self,
        email: &str,
    ) -> Result<Option<(User, Option<String>)>, Error> {
        let row = sqlx::query("SELECT * FROM users WHERE email = $1").bind(email.to_owned());
        let row = row.fetch_optional(&self.db.reader).await?;
        row.map(|row| Ok((user(&row)?, row.try_get("password_hash")?))).transpose()
    }

    /// Whom an identity provider knows by this name.
    pub(crate) async fn user_by_identity(&self, identity: &str) -> Result<Option<User>, Error> {
        let row = sqlx::query("SELECT * FROM users WHERE identity = $1").bind(identity.to_owned());
        row.fetch_optional(&self.db.reader).await?.map(|row| user(&row)).transpose()
    }

    /// Ties a user to whom an identity provider knows, unless it is tied to another.
    pub(crate) async fn tie_identity(
        &self,
        by: By,
        user_id: String,
        identity: String,
    ) -> Result<bool, Error> {
        self.change(by, move |connection| {
            Box::pin(async move {
                let update = sqlx::query(
                    "UPDATE users SET identity = $2 WHERE user_id = $1 AND identity IS NULL",
                );
                let update = update.bind(user_id.clone()).bind(identity.clone());
                let tied = update.execute(connection).await?.rows_affected() > 0;
                let detail = json!({ "identity": identity });
                let note =
                    Note::new("user.identify", format!("user:{user_id}"), detail, Effect::None);
                Ok((tied, if tied { vec![note] } else { Vec::new() }))
            })
        })
        .await
    }

    /// Newest first; an empty address means every one.
    pub(crate) async fn users_page(
        &self,
        email: &str,
        after: &After,
        size: i64,
    ) -> Result<Vec<User>, Error> {
        let rows = sqlx::query(
            "SELECT * FROM users
             WHERE ($1 = '' OR email = $1)
               AND (create_time < $2 OR (create_time = $2 AND user_id < $3))
             ORDER BY create_time DESC, user_id DESC
             LIMIT $4",
        )
        .bind(email.to_owned())
        .bind(after.time)
        .bind(after.id.clone())
        .bind(size);
        rows.fetch_all(&self.db.reader).await?.iter().map(user).collect()
    }

    /// A new password ends the user's sessions.
    pub(crate) async fn update_user(
        &self,
        by: By,
        user_id: String,
        changes: UserChanges,
    ) -> Result<(), Error> {
        let now = by.time;
        self.change(by, move |connection| {
            Box::pin(async move {
                let old = lock(connection, &user_id).await?;
                let (detail, narrows) = (changes.detail(), changes.narrows(&old));
                if let Some(email) = &changes.email {
                    let taken =
                        sqlx::query("SELECT 1 FROM users WHERE email = $1 AND user_id <> $2");
                    let taken = taken.bind(email.clone()).bind(user_id.clone());
                    if taken.fetch_optional(&mut *connection).await?.is_some() {
                        return Err(Error::EmailTaken);
                    }
                }
                let budget = changes.token_budget.or(old.token_budget).unwrap_or_default();
                let new_password = changes.password_hash.is_some();
                let update = sqlx::query(
                    "UPDATE users SET email = $2, name = $3, scopes = $4, day_budget = $5, month_budget = $6,
                            password_hash = COALESCE($7, password_hash), update_time = $8
                     WHERE user_id = $1",
                )
                .bind(user_id.clone())
                .bind(changes.email.unwrap_or(old.email))
                .bind(changes.name.unwrap_or(old.name))
                .bind(to_json(&changes.scopes.unwrap_or(old.scopes))?)
                .bind(budget.per_day)
                .bind(budget.per_month)
                .bind(changes.password_hash)
                .bind(now);
                update.execute(&mut *connection).await?;
                let effect = if narrows { Effect::Ended } else { Effect::Changed };
                let subject = format!("user:{user_id}");
                let mut notes = vec![Note::new("user.update", subject, detail, effect)];
                if new_password {
                    notes.extend(sessions::revoke_all(connection, &user_id, now).await?);
                }
                Ok(((), notes))
            })
        })
        .await
    }

    /// Removes a user, and ends its keys and sessions; how many of each were alive.
    pub(crate) async fn delete_user(&self, by: By, user_id: String) -> Result<(u64, u64), Error> {
        let now = by.time;
        self.change(by, move |connection| {
            Box::pin(async move {
                lock(connection, &user_id).await?;
                let keys = sqlx::query(
                    "UPDATE keys SET revoke_time = $2
                     WHERE owner = $1 AND revoke_time IS NULL AND (expire_time IS NULL OR expire_time > $2)",
                );
                let keys = keys.bind(user_id.clone()).bind(now).execute(&mut *connection).await?;
                let ended = sessions::revoke_all(connection, &user_id, now).await?;
                let delete = sqlx::query("DELETE FROM users WHERE user_id = $1");
                delete.bind(user_id.clone()).execute(connection).await?;
                let counts = (keys.rows_affected(), ended.len() as u64);
                let detail = json!({ "revoked_keys": counts.0, "revoked_sessions": counts.1 });
                let note = Note::new("user.delete", format!("user:{user_id}"), detail, Effect::Ended);
                let mut notes = ended;
                notes.push(note);
                Ok((counts, notes))
            })
        })
        .await
    }

    pub(crate) async fn profile(&self, user_id: &str) -> Result<Option<UserProfile>, Error> {
        let row = sqlx::query("SELECT profile FROM users WHERE user_id = $1");
        let row = row.bind(user_id.to_owned()).fetch_optional(&self.db.reader).await?;
        let Some(row) = row else { return Ok(None) };
        Ok(Some(stored_profile(row.try_get("profile")?)?.unwrap_or_default()))
    }

    pub(crate) async fn set_profile(
        &self,
        by: By,
        user_id: String,
        profile: UserProfile,
    ) -> Result<(), Error> {
        self.change(by, move |connection| {
            Box::pin(async move {
                lock(connection, &user_id).await?;
                let text = profile_json(profile)?;
                let detail = json!({ "profile": from_json::<Value>(&text)? });
                let update = sqlx::query("UPDATE users SET profile = $2 WHERE user_id = $1");
                update.bind(user_id.clone()).bind(text).execute(connection).await?;
                let subject = format!("user:{user_id}");
                Ok(((), vec![Note::new("user.profile", subject, detail, Effect::Changed)]))
            })
        })
        .await
    }
}

impl UserChanges {
    fn narrows(&self, old: &User) -> bool {
        let scopes = self.scopes.as_ref();
        scopes.is_some_and(|new| old.scopes.iter().any(|scope| !new.contains(scope)))
    }

    fn detail(&self) -> Value {
        let mut set = serde_json::Map::new();
        let mut put = |name: &str, value: Option<Value>| {
            if let Some(value) = value {
                set.insert(name.to_owned(), value);
            }
        };
        put("email", self.email.as_ref().map(|email| json!(email)));
        put("name", self.name.as_ref().map(|name| json!(name)));
        put("password", self.password_hash.as_ref().map(|_| json!("(set)")));
        put("scopes", self.scopes.as_ref().map(|scopes| json!(scopes)));
        put("token_budget", self.token_budget.as_ref().map(budget_detail));
        Value::Object(set)
    }
}

async fn user_by_id(
    connection: &mut AnyConnection,
    user_id: &str,
    now: i64,
) -> Result<Option<User>, Error> {
    let row = sqlx::query("SELECT * FROM users WHERE user_id = $1").bind(user_id.to_owned());
    let Some(row) = row.fetch_optional(&mut *connection).await? else { return Ok(None) };
    let usage = usage_of(connection, format!("user:{user_id}"), now).await?;
    Ok(Some(User { token_usage: Some(usage), ..user(&row)? }))
}

pub(super) async fn exists(connection: &mut AnyConnection, user_id: &str) -> Result<bool, Error> {
    let row = sqlx::query("SELECT 1 FROM users WHERE user_id = $1").bind(user_id.to_owned());
    Ok(row.fetch_optional(connection).await?.is_some())
}

async fn lock(connection: &mut AnyConnection, user_id: &str) -> Result<User, Error> {
    let row = sqlx::query("SELECT * FROM users WHERE user_id = $1").bind(user_id.to_owned());
    let row = row.fetch_optional(connection).await?;
    user(&row.ok_or(Error::NoSuch("user"))?)
}

/// The user that a row was joined with, if it was with one.
pub(super) fn joined(row: &AnyRow) -> Result<Option<Who>, Error> {
    let user_id: Option<String> = row.try_get("user_id")?;
    let Some(user_id) = user_id else { return Ok(None) };
    let (day, month): (i64, i64) =
        (row.try_get("user_day_budget")?, row.try_get("user_month_budget")?);
    Ok(Some(Who {
        user_id,
        scopes: from_json(row.try_get("user_scopes")?)?,
        profile: stored_profile(row.try_get("profile")?)?,
        has_budget: day > 0 || month > 0,
    }))
}

fn user(row: &AnyRow) -> Result<User, Error> {
    Ok(User {
        user_id: row.try_get("user_id")?,
        email: row.try_get("email")?,
        name: row.try_get("name")?,
        scopes: from_json(row.try_get("scopes")?)?,
        token_budget: budget(row)?,
        token_usage: None,
        has_password: row.try_get::<Option<String>, _>("password_hash")?.is_some(),
        create_time: Some(timestamp(row.try_get("create_time")?)),
        update_time: Some(timestamp(row.try_get("update_time")?)),
    })
}

fn profile_json(profile: UserProfile) -> Result<String, Error> {
    let UserProfile {
        python_skill_level,
        code_output_structure,
        explanation_style,
        project_context,
        error_handling_preference,
        preferred_language_features,
    } = profile;
    to_json(&StoredProfile {
        python_skill_level,
        code_output_structure,
        explanation_style,
        project_context,
        error_handling_preference,
        preferred_language_features,
    })
}

/// None where nothing was ever set.
fn stored_profile(text: &str) -> Result<Option<UserProfile>, Error> {
    let stored: StoredProfile = from_json(text)?;
    if stored == StoredProfile::default() {
        return Ok(None);
    }
    Ok(Some(UserProfile {
        python_skill_level: stored.python_skill_level,
        code_output_structure: stored.code_output_structure,
        explanation_style: stored.explanation_style,
        project_context: stored.project_context,
        error_handling_preference: stored.error_handling_preference,
        preferred_language_features: stored.preferred_language_features,
    }))
}
