//! `hapa user show`: the properties of one user.

use std::io::Write as _;

use hapa_proto::auth::v1::User;

use super::{client_and_user_id, get};
use crate::cli::connection::ConnectionArgs;
use crate::cli::table::{field_table, to_minute};
use crate::cli::{CliError, budget, json};

/// Show the properties of a user, and the tokens that its sessions and keys used.
#[derive(clap::Args, Clone, Debug)]
pub(in crate::cli) struct ShowUserArgs {
    /// User: an id, an email address, or `me`.
    user: String,
    /// Print the user as one JSON object.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    connection: ConnectionArgs,
}

pub(super) async fn show(args: ShowUserArgs) -> Result<(), CliError> {
    let (mut client, user_id) = client_and_user_id(&args.user, &args.connection).await?;
    print(&get(&mut client, user_id).await?, args.json)
}

/// Prints a user to standard output.
pub(super) fn print(user: &User, as_json: bool) -> Result<(), CliError> {
    if as_json {
        return json::print(user);
    }
    let rows = [
        ("USER ID", user.user_id.clone()),
        ("EMAIL", user.email.clone()),
        ("NAME", user.name.clone()),
        ("SCOPES", user.scopes.join(" ")),
        ("PASSWORD", if user.has_password { "yes" } else { "no" }.to_owned()),
        ("TOKEN BUDGET", budget::describe(user.token_budget)),
        ("TOKENS USED", budget::describe_usage(user.token_usage)),
        ("CREATED", to_minute(user.create_time.as_ref())),
        ("UPDATED", to_minute(user.update_time.as_ref())),
    ];
    writeln!(std::io::stdout(), "{}", field_table(rows))?;
    Ok(())
}
