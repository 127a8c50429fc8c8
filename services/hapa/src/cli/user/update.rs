//! `hapa user update`: the flags of the command determine the update mask.

use hapa_core::access::SCOPES;
use hapa_proto::auth::v1::UpdateUserRequest;
use prost_types::FieldMask;

use super::{client_and_user_id, get, require_user, show};
use crate::cli::connection::ConnectionArgs;
use crate::cli::{CliError, budget};

/// Change a user's email address, name, scopes or budget.
///
/// Fields without a flag keep their value. A withdrawn scope ends in the user's sessions within 1 s.
/// `hapa user passwd` sets the password.
#[derive(clap::Args, Clone, Debug)]
#[command(after_help = "Example:\n  hapa user update mina@example.com --tokens-per-month 5000000")]
pub(in crate::cli) struct UpdateUserArgs {
    /// User: an id, an email address, or `me`.
    user: String,
    /// Print the updated user as JSON.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    changes: UserChanges,
    #[command(flatten)]
    connection: ConnectionArgs,
}

#[derive(clap::Args, Clone, Debug)]
#[command(next_help_heading = "Changes (at least one)")]
#[group(required = true, multiple = true)]
struct UserChanges {
    /// Email address, used to log in.
    #[arg(long)]
    email: Option<String>,
    /// Display name.
    #[arg(long)]
    name: Option<String>,
    /// Scope to grant, replacing all scopes of the user; repeatable.
    #[arg(long = "scope", value_name = "SCOPE")]
    scopes: Vec<String>,
    /// Grant every scope.
    #[arg(long, conflicts_with = "scopes")]
    admin: bool,
    /// Withdraw every scope: the user can log in and do nothing else.
    #[arg(long, conflicts_with_all = ["scopes", "admin"])]
    no_scopes: bool,
    /// Token budget per day (UTC) for all sessions and keys of the user together; 0: no limit.
    #[arg(long, value_name = "N", value_parser = budget::token_count_parser())]
    tokens_per_day: Option<i64>,
    /// Token budget per month (UTC) for all sessions and keys of the user together; 0: no limit.
    #[arg(long, value_name = "N", value_parser = budget::token_count_parser())]
    tokens_per_month: Option<i64>,
}

pub(super) async fn update(args: UpdateUserArgs) -> Result<(), CliError> {
    let (mut client, user_id) = client_and_user_id(&args.user, &args.connection).await?;
    let (per_day, per_month) = (args.changes.tokens_per_day, args.changes.tokens_per_month);
    // The API replaces both budgets together, so a budget without a flag is read first.
    let old = if budget::is_partial(per_day, per_month) {
        get(&mut client, user_id.clone()).await?.token_budget
    } else {
        None
    };
    let token_budget = budget::merge(old, per_day, per_month);
    let request = UpdateUserRequest { user_id, token_budget, ..args.changes.into() };
    let reply = client.update_user(request).await?.into_inner();
    show::print(&require_user(reply.user)?, args.json)
}

impl From<UserChanges> for UpdateUserRequest {
    fn from(changes: UserChanges) -> UpdateUserRequest {
        let fields = [
            ("email", changes.email.is_some()),
            ("name", changes.name.is_some()),
            ("scopes", changes.admin || changes.no_scopes || !changes.scopes.is_empty()),
            (
                "token_budget",
                changes.tokens_per_day.is_some() || changes.tokens_per_month.is_some(),
            ),
        ];
        let paths = fields.into_iter().filter(|(_, is_set)| *is_set);
        let paths = paths.map(|(path, _)| path.to_owned());
        let all_scopes = || SCOPES.iter().map(|scope| (*scope).to_owned()).collect();
        UpdateUserRequest {
            update_mask: Some(FieldMask { paths: paths.collect() }),
            email: changes.email.unwrap_or_default(),
            name: changes.name.unwrap_or_default(),
            scopes: if changes.admin { all_scopes() } else { changes.scopes },
            ..UpdateUserRequest::default()
        }
    }
}
