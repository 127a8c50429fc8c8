//! `hapa user profile`: defaults for the style of generated answers, for requests without their own.

use std::io::Write as _;

use hapa_proto::auth::v1::{GetProfileRequest, UpdateProfileRequest};
use hapa_proto::codegen::v1::UserProfile;

use super::{UserClient, client_and_user_id};
use crate::cli::connection::ConnectionArgs;
use crate::cli::table::field_table;
use crate::cli::{CliError, json};

#[derive(Clone, Debug, clap::Subcommand)]
pub(in crate::cli) enum ProfileCommand {
    /// Show a user's profile.
    Show(ShowProfileArgs),
    Set(SetProfileArgs),
}

#[derive(clap::Args, Clone, Debug)]
pub(in crate::cli) struct ShowProfileArgs {
    /// User: an id, an email address, or `me`.
    user: String,
    /// Print the profile as one JSON object.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    connection: ConnectionArgs,
}

/// Set a user's profile: the style of answers to requests that do not specify it.
///
/// Fields without a flag keep their value. "" resets a field to its default; --clear resets all fields.
#[derive(clap::Args, Clone, Debug)]
#[command(
    after_help = "Example:\n  hapa user profile set me --as-me --skill-level expert --explanation brief"
)]
pub(in crate::cli) struct SetProfileArgs {
    /// User: an id, an email address, or `me`.
    user: String,
    /// Print the profile as one JSON object.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    changes: ProfileChanges,
    #[command(flatten)]
    connection: ConnectionArgs,
}

#[derive(clap::Args, Clone, Debug)]
#[command(next_help_heading = "Changes (at least one)")]
#[group(required = true, multiple = true)]
struct ProfileChanges {
    /// Python skill level: beginner, intermediate, advanced or expert.
    #[arg(long, value_name = "LEVEL")]
    skill_level: Option<String>,
    /// Amount of code: minimal, standard, detailed or comprehensive.
    #[arg(long, value_name = "STRUCTURE")]
    structure: Option<String>,
    /// Amount of explanation: brief, standard, detailed or educational.
    #[arg(long, value_name = "STYLE")]
    explanation: Option<String>,
    /// Kind of project: web_development, data_science, automation, general_purpose, academic or enterprise.
    #[arg(long, value_name = "CONTEXT")]
    context: Option<String>,
    /// Error handling: minimal, basic, detailed, comprehensive, robust or production_ready.
    #[arg(long, value_name = "HANDLING")]
    error_handling: Option<String>,
    /// Language feature to use, such as type_hints or f_strings, replacing all features of the profile;
    /// repeatable.
    #[arg(long = "feature", value_name = "FEATURE")]
    features: Vec<String>,
    /// Start from the defaults instead of the current profile.
    #[arg(long)]
    clear: bool,
}

pub(super) async fn execute(command: ProfileCommand) -> Result<(), CliError> {
    match command {
        ProfileCommand::Show(args) => {
            let (mut client, user_id) = client_and_user_id(&args.user, &args.connection).await?;
            print(&get(&mut client, user_id).await?, args.json)
        }
        ProfileCommand::Set(args) => set(args).await,
    }
}

async fn set(args: SetProfileArgs) -> Result<(), CliError> {
    let (mut client, user_id) = client_and_user_id(&args.user, &args.connection).await?;
    // The API replaces the whole profile, so fields without a flag are read first.
    let old = if args.changes.clear {
        UserProfile::default()
    } else {
        get(&mut client, user_id.clone()).await?
    };
    let profile = Some(apply(old, args.changes));
    let request = UpdateProfileRequest { user_id, profile };
    let reply = client.update_profile(request).await?.into_inner();
    print(&reply.profile.unwrap_or_default(), args.json)
}

async fn get(client: &mut UserClient, user_id: String) -> Result<UserProfile, CliError> {
    let reply = client.get_profile(GetProfileRequest { user_id }).await?.into_inner();
    Ok(reply.profile.unwrap_or_default())
}

fn apply(old: UserProfile, changes: ProfileChanges) -> UserProfile {
    let mut features = changes.features;
    if features.is_empty() {
        features = old.preferred_language_features;
    }
    features.retain(|feature| !feature.is_empty());
    UserProfile {
        python_skill_level: changes.skill_level.unwrap_or(old.python_skill_level),
        code_output_structure: changes.structure.unwrap_or(old.code_output_structure),
        explanation_style: changes.explanation.unwrap_or(old.explanation_style),
        project_context: changes.context.unwrap_or(old.project_context),
        error_handling_preference: changes.error_handling.unwrap_or(old.error_handling_preference),
        preferred_language_features: features,
    }
}

fn print(profile: &UserProfile, as_json: bool) -> Result<(), CliError> {
    if as_json {
        return json::print(profile);
    }
    let or_default = |value: &str| if value.is_empty() { "default" } else { value }.to_owned();
    let rows = [
        ("SKILL LEVEL", or_default(&profile.python_skill_level)),
        ("STRUCTURE", or_default(&profile.code_output_structure)),
        ("EXPLANATION", or_default(&profile.explanation_style)),
        ("CONTEXT", or_default(&profile.project_context)),
        ("ERROR HANDLING", or_default(&profile.error_handling_preference)),
        ("FEATURES", or_default(&profile.preferred_language_features.join(" "))),
    ];
    writeln!(std::io::stdout(), "{}", field_table(rows))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_field_without_a_flag_keeps_its_value_and_an_empty_one_is_reset() {
        let old = UserProfile {
            python_skill_level: "expert".to_owned(),
            explanation_style: "brief".to_owned(),
            preferred_language_features: vec!["f_strings".to_owned()],
            ..UserProfile::default()
        };
        let changes = ProfileChanges {
            skill_level: Some(String::new()),
            structure: Some("minimal".to_owned()),
            explanation: None,
            context: None,
            error_handling: None,
            features: Vec::new(),
            clear: false,
        };
        let new = apply(old.clone(), changes);
        let expected = UserProfile {
            python_skill_level: String::new(),
            code_output_structure: "minimal".to_owned(),
            ..old
        };
        assert_eq!(new, expected);
    }
}
