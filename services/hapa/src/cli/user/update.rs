//! `hapa user update`: the flags that are given become the update mask.

use hapa_core::access::SCOPES;
use hapa_proto::auth::v1::UpdateUserRequest;
use prost_types::FieldMask;

use super::{get, open, required, show};
use crate::cli::{Failure, budget, connection};

/// Change a user's address, name, scopes or budget.
///
/// What no flag names stays as it was. Scopes that are taken away are gone from its sessions within a
/// second. `hapa user passwd` sets the password.
#[derive(clap::Args, Clone, Debug)]
#[group(id = "user_update_args")]
pub(in crate::cli) struct Args {
    /// The user: an id, an address, or me.
    user: String,
    /// The changed user as JSON.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    changes: Changes,
    #[command(flatten)]
    connection: connection::Args,
}

#[derive(clap::Args, Clone, Debug)]
#[command(next_help_heading = "Changes (at least one)")]
#[group(id = "user_changes", required = true, multiple = true)]
struct Changes {
    /// Its address, with which it logs in.
    #[arg(long)]
    email: Option<String>,
    /// What it is called.
    #[arg(long)]
    name: Option<String>,
    /// What it may do, in place of all that it may now; can be repeated.
    #[arg(long = "scope")]
    scopes: Vec<String>,
    /// It may do everything.
    #[arg(long, conflicts_with = "scopes")]
    admin: bool,
    /// It may do nothing: it can log in, and that is all.
    #[arg(long, conflicts_with_all = ["scopes", "admin"])]
    no_scopes: bool,
    /// Tokens that its sessions and keys together may use in a day (UTC); 0: any number.
    #[arg(long, value_name = "N", value_parser = budget::tokens())]
    tokens_per_day: Option<i64>,
    /// Tokens that its sessions and keys together may use in a month (UTC); 0: any number.
    #[arg(long, value_name = "N", value_parser = budget::tokens())]
    tokens_per_month: Option<i64>,
}

pub(super) async fn update(args: Args) -> Result<(), Failure> {
    let (mut client, user_id) = open(&args.user, &args.connection).await?;
    let (per_day, per_month) = (args.changes.tokens_per_day, args.changes.tokens_per_month);
    // Budgets are set as one: the half that is not given is read first.
    let old = if budget::is_half(per_day, per_month) {
        get(&mut client, user_id.clone()).await?.token_budget
    } else {
        None
    };
    let token_budget = budget::changed(old, per_day, per_month);
    let request = UpdateUserRequest { user_id, token_budget, ..args.changes.into() };
    let reply = client.update_user(request).await?.into_inner();
    show::print(&required(reply.user)?, args.json)
}

impl From<Changes> for UpdateUserRequest {
    fn from(changes: Changes) -> UpdateUserRequest {
        let given = [
            ("email", changes.email.is_some()),
            ("name", changes.name.is_some()),
            ("scopes", changes.admin || changes.no_scopes || !changes.scopes.is_empty()),
            (
                "token_budget",
                changes.tokens_per_day.is_some() || changes.tokens_per_month.is_some(),
            ),
        ];
        let paths = given.into_iter().filter(|(_, given)| *given).map(|(path, _)| path.to_owned());
        let all = || SCOPES.iter().map(|scope| (*scope).to_owned()).collect();
        UpdateUserRequest {
            update_mask: Some(FieldMask { paths: paths.collect() }),
            email: changes.email.unwrap_or_default(),
            name: changes.name.unwrap_or_default(),
            scopes: if changes.admin { all() } else { changes.scopes },
            ..UpdateUserRequest::default()
        }
    }
}
