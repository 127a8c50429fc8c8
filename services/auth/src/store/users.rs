//! Users, their profiles, and the identities linked to them.

use hapa_core::pagination::PageCursor;
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
use crate::store::budgets::token_usage_of;
use crate::store::keys::budget_detail;
use crate::store::{
    AuditContext, AuditEvent, CacheEffect, ChangeRequest, Store, detail_of_changes, from_json,
    sessions, to_json, token_budget_from_row,
};

/// The properties of a user that authentication needs.
#[derive(Clone, Debug)]
pub(crate) struct UserRef {
    pub(crate) user_id: String,
    pub(crate) scopes: Vec<String>,
    pub(crate) profile: Option<UserProfile>,
    pub(crate) has_budget: bool,
}

/// A user to insert.
pub(crate) struct NewUser {
    pub(crate) user: User,
    pub(crate) password_hash: Option<String>,
    /// Issuer and subject at the identity provider.
    pub(crate) identity: Option<String>,
    pub(crate) profile: UserProfile,
}

/// The fields of a user to set; `None` leaves a field as it is.
#[derive(Clone, Debug, Default)]
pub(crate) struct UserChanges {
    pub(crate) email: Option<String>,
    pub(crate) name: Option<String>,
    pub(crate) password_hash: Option<String>,
    pub(crate) scopes: Option<Vec<String>>,
    pub(crate) token_budget: Option<TokenBudget>,
}

/// A profile as the store holds it; an empty field has its default.
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
    /// Inserts a user. `reply` receives it as [`Self::user_by_id`] returns it.
    pub(crate) async fn insert_user<R: Message + Default + 'static>(
        &self,
        change: ChangeRequest,
        new: NewUser,
        reply: impl FnOnce(User) -> R + Send + 'static,
    ) -> Result<Response<R>, Error> {
        let now = change.context.time;
        self.change_once(change, move |connection| {
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
                    "INSERT INTO users (user_id, email, name, password_hash, identity, scopes,
                                        day_budget, month_budget, profile, create_time, update_time)
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
                let user = user.ok_or(Error::NotFound("user"))?;
                Ok((
                    reply(user),
                    vec![AuditEvent::new("user.create", subject, detail, CacheEffect::None)],
                ))
            })
        })
        .await
    }

    /// A user with its token usage.
    pub(crate) async fn user_by_id(&self, user_id: &str, now: i64) -> Result<Option<User>, Error> {
        user_by_id(&mut *self.db.reader.acquire().await?, user_id, now).await
    }

    /// A user with its password hash, if it has a password.
    pub(crate) async fn user_by_email(
        &self,
        email: &str,
    ) -> Result<Option<(User, Option<String>)>, Error> {
        let row = sqlx::query("SELECT * FROM users WHERE email = $1").bind(email.to_owned());
        let row = row.fetch_optional(&self.db.reader).await?;
        row.map(|row| Ok((user_from_row(&row)?, row.try_get("password_hash")?))).transpose()
    }

    /// The user that is linked to this issuer and subject.
    pub(crate) async fn user_by_identity(&self, identity: &str) -> Result<Option<User>, Error> {
        let row = sqlx::query("SELECT * FROM users WHERE identity = $1").bind(identity.to_owned());
        row.fetch_optional(&self.db.reader).await?.map(|row| user_from_row(&row)).transpose()
    }

    /// Links a user to an identity, unless it is linked already. Returns whether it was linked here.
    pub(crate) async fn link_identity(
        &self,
        context: AuditContext,
        user_id: String,
        identity: String,
    ) -> Result<bool, Error> {
        self.audited_transaction(context, move |connection| {
            Box::pin(async move {
                let update = sqlx::query(
                    "UPDATE users SET identity = $2 WHERE user_id = $1 AND identity IS NULL",
                );
                let update = update.bind(user_id.clone()).bind(identity.clone());
                let is_linked = update.execute(connection).await?.rows_affected() > 0;
                let detail = json!({ "identity": identity });
                let event = AuditEvent::new(
                    "user.identify",
                    format!("user:{user_id}"),
                    detail,
                    CacheEffect::None,
                );
                Ok((is_linked, if is_linked { vec![event] } else { Vec::new() }))
            })
        })
        .await
    }

    /// One page of users, newest first. An empty `email` matches every user.
    pub(crate) async fn users_page(
        &self,
        email: &str,
        after: &PageCursor,
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
        rows.fetch_all(&self.db.reader).await?.iter().map(user_from_row).collect()
    }

    /// Updates a user. A new password revokes the user's sessions.
    pub(crate) async fn update_user(
        &self,
        context: AuditContext,
        user_id: String,
        changes: UserChanges,
    ) -> Result<(), Error> {
        let now = context.time;
        self.audited_transaction(context, move |connection| {
            Box::pin(async move {
                let old = lock_user(connection, &user_id).await?;
                let (detail, drops_scopes) = (changes.audit_detail(), changes.drops_scopes(&old));
                if let Some(email) = &changes.email {
                    let taken =
                        sqlx::query("SELECT 1 FROM users WHERE email = $1 AND user_id <> $2");
                    let taken = taken.bind(email.clone()).bind(user_id.clone());
                    if taken.fetch_optional(&mut *connection).await?.is_some() {
                        return Err(Error::EmailTaken);
                    }
                }
                let budget = changes.token_budget.or(old.token_budget).unwrap_or_default();
                let sets_password = changes.password_hash.is_some();
                let update = sqlx::query(
                    "UPDATE users SET email = $2, name = $3, scopes = $4, day_budget = $5,
                            month_budget = $6, password_hash = COALESCE($7, password_hash),
                            update_time = $8
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
                let effect =
                    if drops_scopes { CacheEffect::EndCalls } else { CacheEffect::Invalidate };
                let subject = format!("user:{user_id}");
                let mut events = vec![AuditEvent::new("user.update", subject, detail, effect)];
                if sets_password {
                    events.extend(sessions::revoke_all_of_user(connection, &user_id, now).await?);
                }
                Ok(((), events))
            })
        })
        .await
    }

    /// Deletes a user and revokes its keys and sessions. Returns how many of each were active.
    pub(crate) async fn delete_user(
        &self,
        context: AuditContext,
        user_id: String,
    ) -> Result<(u64, u64), Error> {
        let now = context.time;
        self.audited_transaction(context, move |connection| {
            Box::pin(async move {
                lock_user(connection, &user_id).await?;
                let keys = sqlx::query(
                    "UPDATE keys SET revoke_time = $2
                     WHERE owner = $1 AND revoke_time IS NULL
                       AND (expire_time IS NULL OR expire_time > $2)",
                );
                let keys = keys.bind(user_id.clone()).bind(now).execute(&mut *connection).await?;
                let revoked_sessions =
                    sessions::revoke_all_of_user(connection, &user_id, now).await?;
                let delete = sqlx::query("DELETE FROM users WHERE user_id = $1");
                delete.bind(user_id.clone()).execute(connection).await?;
                let counts = (keys.rows_affected(), revoked_sessions.len() as u64);
                let detail = json!({ "revoked_keys": counts.0, "revoked_sessions": counts.1 });
                let event = AuditEvent::new(
                    "user.delete",
                    format!("user:{user_id}"),
                    detail,
                    CacheEffect::EndCalls,
                );
                let mut events = revoked_sessions;
                events.push(event);
                Ok((counts, events))
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
        context: AuditContext,
        user_id: String,
        profile: UserProfile,
    ) -> Result<(), Error> {
        self.audited_transaction(context, move |connection| {
            Box::pin(async move {
                lock_user(connection, &user_id).await?;
                let text = profile_json(profile)?;
                let detail = json!({ "profile": from_json::<Value>(&text)? });
                let update = sqlx::query("UPDATE users SET profile = $2 WHERE user_id = $1");
                update.bind(user_id.clone()).bind(text).execute(connection).await?;
                let subject = format!("user:{user_id}");
                Ok((
                    (),
                    vec![AuditEvent::new("user.profile", subject, detail, CacheEffect::Invalidate)],
                ))
            })
        })
        .await
    }
}

impl UserChanges {
    fn drops_scopes(&self, old: &User) -> bool {
        let scopes = self.scopes.as_ref();
        scopes.is_some_and(|new| old.scopes.iter().any(|scope| !new.contains(scope)))
    }

    fn audit_detail(&self) -> Value {
        detail_of_changes([
            ("email", self.email.as_ref().map(|email| json!(email))),
            ("name", self.name.as_ref().map(|name| json!(name))),
            ("password", self.password_hash.as_ref().map(|_| json!("(set)"))),
            ("scopes", self.scopes.as_ref().map(|scopes| json!(scopes))),
            ("token_budget", self.token_budget.as_ref().map(budget_detail)),
        ])
    }
}

async fn user_by_id(
    connection: &mut AnyConnection,
    user_id: &str,
    now: i64,
) -> Result<Option<User>, Error> {
    let row = sqlx::query("SELECT * FROM users WHERE user_id = $1").bind(user_id.to_owned());
    let Some(row) = row.fetch_optional(&mut *connection).await? else { return Ok(None) };
    let usage = token_usage_of(connection, format!("user:{user_id}"), now).await?;
    Ok(Some(User { token_usage: Some(usage), ..user_from_row(&row)? }))
}

pub(super) async fn user_exists(
    connection: &mut AnyConnection,
    user_id: &str,
) -> Result<bool, Error> {
    let row = sqlx::query("SELECT 1 FROM users WHERE user_id = $1").bind(user_id.to_owned());
    Ok(row.fetch_optional(connection).await?.is_some())
}

async fn lock_user(connection: &mut AnyConnection, user_id: &str) -> Result<User, Error> {
    let row = sqlx::query("SELECT * FROM users WHERE user_id = $1").bind(user_id.to_owned());
    let row = row.fetch_optional(connection).await?;
    user_from_row(&row.ok_or(Error::NotFound("user"))?)
}

/// The user of a `LEFT JOIN`; `None` if the owner is not a user.
pub(super) fn user_ref_from_row(row: &AnyRow) -> Result<Option<UserRef>, Error> {
    let user_id: Option<String> = row.try_get("user_id")?;
    let Some(user_id) = user_id else { return Ok(None) };
    let (day, month): (i64, i64) =
        (row.try_get("user_day_budget")?, row.try_get("user_month_budget")?);
    Ok(Some(UserRef {
        user_id,
        scopes: from_json(row.try_get("user_scopes")?)?,
        profile: stored_profile(row.try_get("profile")?)?,
        has_budget: day > 0 || month > 0,
    }))
}

fn user_from_row(row: &AnyRow) -> Result<User, Error> {
    Ok(User {
        user_id: row.try_get("user_id")?,
        email: row.try_get("email")?,
        name: row.try_get("name")?,
        scopes: from_json(row.try_get("scopes")?)?,
        token_budget: token_budget_from_row(row)?,
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

/// `None` if no field was ever set.
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
