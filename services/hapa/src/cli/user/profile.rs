//! `hapa user profile`: how a user wants to be answered where a request does not say it itself.

use std::io::Write as _;

use hapa_proto::auth::v1::{GetProfileRequest, UpdateProfileRequest};
use hapa_proto::codegen::v1::UserProfile;

use super::{Users, open};
use crate::cli::table::facts;
use crate::cli::{Failure, connection, json};

#[derive(Clone, Debug, clap::Subcommand)]
pub(in crate::cli) enum Command {
    /// Show how a user wants to be answered.
    Show(Show),
    Set(Set),
}

#[derive(clap::Args, Clone, Debug)]
#[group(id = "profile_show_args")]
pub(in crate::cli) struct Show {
    /// The user: an id, an address, or me.
    user: String,
    /// The profile as one JSON object.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    connection: connection::Args,
}

/// Set how a user wants to be answered, for every request that does not say it itself.
///
/// What no flag names stays as it was; "" sets one back to the default, --clear all of them.
#[derive(clap::Args, Clone, Debug)]
#[group(id = "profile_set_args")]
pub(in crate::cli) struct Set {
    /// The user: an id, an address, or me.
    user: String,
    /// The profile as one JSON object.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    changes: Changes,
    #[command(flatten)]
    connection: connection::Args,
}

#[derive(clap::Args, Clone, Debug)]
#[command(next_help_heading = "Changes (at least one)")]
#[group(id = "profile_changes", required = true, multiple = true)]
struct Changes {
    /// beginner, intermediate, advanced or expert.
    #[arg(long, value_name = "LEVEL")]
    skill_level: Option<String>,
    /// How much code: minimal, standard, detailed or comprehensive.
    #[arg(long, value_name = "WORD")]
    structure: Option<String>,
    /// How much is explained: brief, standard, detailed or educational.
    #[arg(long, value_name = "WORD")]
    explanation: Option<String>,
    /// What for: web_development, data_science, automation, general_purpose, academic or enterprise.
    #[arg(long, value_name = "WORD")]
    context: Option<String>,
    /// minimal, basic, detailed, comprehensive, robust or production_ready.
    #[arg(long, value_name = "WORD")]
    error_handling: Option<String>,
    /// A feature to use, such as type_hints or f_strings, in place of all that are set now; can be
    /// repeated.
    #[arg(long = "feature")]
    features: Vec<String>,
    /// Start from the defaults, not from what is set now.
    #[arg(long)]
    clear: bool,
}

pub(super) async fn execute(command: Command) -> Result<(), Failure> {
    match command {
        Command::Show(args) => {
            let (mut client, user_id) = open(&args.user, &args.connection).await?;
            print(&get(&mut client, user_id).await?, args.json)
        }
        Command::Set(args) => set(args).await,
    }
}

async fn set(args: Set) -> Result<(), Failure> {
    let (mut client, user_id) = open(&args.user, &args.connection).await?;
    // A profile is set as a whole: what is not given is read first.
    let old = if args.changes.clear {
        UserProfile::default()
    } else {
        get(&mut client, user_id.clone()).await?
    };
    let profile = Some(changed(old, args.changes));
    let request = UpdateProfileRequest { user_id, profile };
    let reply = client.update_profile(request).await?.into_inner();
    print(&reply.profile.unwrap_or_default(), args.json)
}

async fn get(client: &mut Users, user_id: String) -> Result<UserProfile, Failure> {
    let reply = client.get_profile(GetProfileRequest { user_id }).await?.into_inner();
    Ok(reply.profile.unwrap_or_default())
}

fn changed(old: UserProfile, changes: Changes) -> UserProfile {
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

fn print(profile: &UserProfile, as_json: bool) -> Result<(), Failure> {
    let mut out = std::io::stdout();
    if as_json {
        writeln!(out, "{}", json::json(profile)?)?;
        return Ok(());
    }
    let word = |word: &str| if word.is_empty() { "default" } else { word }.to_owned();
    let rows = [
        ("SKILL LEVEL", word(&profile.python_skill_level)),
        ("STRUCTURE", word(&profile.code_output_structure)),
        ("EXPLANATION", word(&profile.explanation_style)),
        ("CONTEXT", word(&profile.project_context)),
        ("ERROR HANDLING", word(&profile.error_handling_preference)),
        ("FEATURES", word(&profile.preferred_language_features.join(" "))),
    ];
    writeln!(out, "{}", facts(rows))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_given_stays_and_an_empty_word_is_the_default() {
        let old = UserProfile {
            python_skill_level: "expert".to_owned(),
            explanation_style: "brief".to_owned(),
            preferred_language_features: vec!["f_strings".to_owned()],
            ..UserProfile::default()
        };
        let changes = Changes {
            skill_level: Some(String::new()),
            structure: Some("minimal".to_owned()),
            explanation: None,
            context: None,
            error_handling: None,
            features: Vec::new(),
            clear: false,
        };
        let new = changed(old.clone(), changes);
        let expected = UserProfile {
            python_skill_level: String::new(),
            code_output_structure: "minimal".to_owned(),
            ..old
        };
        assert_eq!(new, expected);
    }
}
