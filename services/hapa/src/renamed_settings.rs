//! Settings with a new name. The environment variable of the old name counts for one release.
//!
//! clap alone reads the environment. Where the old variable is set and the new one is not, the argument of the
//! setting is bound to the old variable before parsing. A flag therefore takes precedence as always, a secret
//! never becomes an argument, and commands without the setting do not change.

use std::ffi::OsString;

use clap::{Arg, ArgMatches, Command};

use crate::setting::Setting;

/// A setting and its former name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct RenamedSetting {
    old: &'static str,
    new: &'static str,
}

const RENAMED: &[RenamedSetting] = &[
    renamed("API_KEY_PEPPER_ALSO", "API_KEY_PEPPER_PREVIOUS"),
    renamed("SECRET_KEY_ALSO", "SECRET_KEY_PREVIOUS"),
    renamed("SESSION_KEY_FILE_ALSO", "SESSION_KEY_FILE_PREVIOUS"),
    renamed("MESH_TOKEN_ALSO", "MESH_TOKEN_PREVIOUS"),
    renamed("COMPLETION_FIRST", "PRIORITIZE_COMPLETIONS"),
    renamed("VLLM_SERVER_URL", "AI_MODEL_ENDPOINT"),
    renamed("SPOOL_MAX_EVENTS", "OUTBOX_MAX_EVENTS"),
    renamed("SPOOL_MAX_AGE_HOURS", "OUTBOX_MAX_AGE_HOURS"),
];

/// Settings of the backend that HAPA replaces which have no effect, and what to do instead.
const WITHOUT_EFFECT: &[(&str, &str)] = &[
    ("DEBUG", "set LOG_LEVEL=debug"),
    (
        "VLLM_MAX_RETRIES",
        "requests are retried on other engines within a budget, before the first token",
    ),
    ("DATABASE_POOL_SIZE", "the pools of connections have fixed sizes"),
    ("DATABASE_MAX_OVERFLOW", "the pools of connections have fixed sizes"),
    ("REDIS_PASSWORD", "put it into REDIS_URL: redis://:password@host:6379"),
    ("ALLOWED_ORIGINS", "set CORS_ORIGINS for the gateway"),
    ("ACCESS_TOKEN_EXPIRE_MINUTES", "set ACCESS_TOKEN_MINUTES"),
    (
        "ALGORITHM",
        "access tokens are signed with HS256, or with Ed25519 if SESSION_KEY_FILE is set",
    ),
];

const fn renamed(old: &'static str, new: &'static str) -> RenamedSetting {
    RenamedSetting { old, new }
}

/// The renamed settings that the environment has under their old names.
#[derive(Clone, Debug, Default)]
pub(crate) struct FormerNames {
    /// Only the old name is set.
    in_use: Vec<RenamedSetting>,
    /// Both names are set, with different values.
    conflicting: Vec<RenamedSetting>,
    /// Set, but without effect.
    without_effect: Vec<(&'static str, &'static str)>,
}

impl FormerNames {
    /// Reads the environment.
    pub(crate) fn read() -> FormerNames {
        let names = RENAMED.iter().flat_map(|setting| [setting.old, setting.new]);
        let names = names.chain(WITHOUT_EFFECT.iter().map(|(name, _)| *name));
        let command = Command::new("environment").no_binary_name(true);
        let command = command.args(names.map(|name| Arg::new(name).long(name).env(name)));
        let matches = command.try_get_matches_from([""; 0]).unwrap_or_default();
        FormerNames::from_values(|name| value(&matches, name))
    }

    /// An empty variable counts as not set.
    fn from_values(value: impl Fn(&str) -> Option<OsString>) -> FormerNames {
        let mut names = FormerNames::default();
        for setting in RENAMED {
            match (value(setting.old), value(setting.new)) {
                (Some(_), None) => names.in_use.push(*setting),
                (Some(old), Some(new)) if old != new => names.conflicting.push(*setting),
                _ => {}
            }
        }
        let is_set = |(name, _): &&(&str, &str)| value(name).is_some();
        names.without_effect = WITHOUT_EFFECT.iter().filter(is_set).copied().collect();
        names
    }

    /// A row for each variable that is set without effect.
    pub(crate) fn settings_without_effect(&self) -> impl Iterator<Item = Setting> {
        self.without_effect.iter().map(|(name, advice)| Setting {
            name: (*name).to_owned(),
            value: "(no effect)".to_owned(),
            source: "environment",
            former_name: None,
            advice: Some(advice),
        })
    }

    /// Binds the settings of a command and of its subcommands to the old variables that are in use.
    pub(crate) fn bind(&self, mut command: Command) -> Command {
        for RenamedSetting { old, new } in &self.in_use {
            let argument = command.get_arguments().find(|argument| has_name(argument, new));
            if let Some(id) = argument.map(|argument| argument.get_id().clone()) {
                command = command.mut_arg(id, |argument| argument.env(old));
            }
        }
        let subcommands: Vec<_> =
            command.get_subcommands().map(|command| command.get_name().to_owned()).collect();
        subcommands.iter().fold(command, |command, name| {
            command.mut_subcommand(name, |subcommand| self.bind(subcommand))
        })
    }

    /// Refuses a setting of the command that has different values under its two names.
    pub(crate) fn check(&self, command: &Command) -> Result<(), String> {
        let is_setting = |new| command.get_arguments().any(|argument| has_name(argument, new));
        match self.conflicting.iter().find(|setting| is_setting(setting.new)) {
            None => Ok(()),
            Some(RenamedSetting { old, new }) => Err(format!(
                "{new} and its former name {old} are both set, to different values; unset {old}"
            )),
        }
    }

    /// Marks the settings that come from an old variable.
    pub(crate) fn mark(&self, settings: &mut [Setting]) {
        for setting in settings.iter_mut().filter(|setting| setting.source == "environment") {
            let former = self.in_use.iter().find(|renamed| renamed.new == setting.name);
            setting.former_name = former.map(|renamed| renamed.old);
        }
    }
}

/// One warning for each setting that comes from an old variable, and for each variable without effect.
pub(crate) fn warnings(settings: &[Setting]) -> impl Iterator<Item = String> {
    settings.iter().filter_map(|Setting { name, former_name, advice, .. }| {
        if let Some(advice) = advice {
            return Some(format!("{name} has no effect: {advice}"));
        }
        let old = (*former_name)?;
        Some(format!("{old} is the former name of {name} and counts for one release: set {name}"))
    })
}

fn has_name(argument: &Arg, name: &str) -> bool {
    argument.get_env().is_some_and(|env| env == name)
}

fn value(matches: &ArgMatches, name: &str) -> Option<OsString> {
    let value = matches.get_raw(name).and_then(|mut values| values.next());
    value.filter(|value| !value.is_empty()).map(ToOwned::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::setting::settings;

    const OLD: &str = "MESH_TOKEN_ALSO";
    const NEW: &str = "MESH_TOKEN_PREVIOUS";

    fn names(values: &[(&str, &str)]) -> FormerNames {
        FormerNames::from_values(|name| {
            let value = values.iter().find(|(key, value)| *key == name && !value.is_empty());
            value.map(|(_, value)| OsString::from(value))
        })
    }

    /// A command with the renamed setting, and a subcommand with and one without it.
    fn command() -> Command {
        let setting = || Arg::new("previous").long("mesh-token-previous").env(NEW);
        Command::new("hapa")
            .subcommand(Command::new("role").arg(setting()).subcommand(Command::new("other")))
            .subcommand(Command::new("client").arg(Arg::new("port").long("port").env("X_PORT")))
    }

    fn variable<'a>(command: &'a Command, name: &str) -> Option<&'a str> {
        let argument = command.find_subcommand(name).unwrap().get_arguments().next().unwrap();
        argument.get_env().and_then(|env| env.to_str())
    }

    #[test]
    fn the_old_name_counts_only_while_the_new_one_is_not_set() {
        assert_eq!(variable(&names(&[(OLD, "a")]).bind(command()), "role"), Some(OLD));
        for values in [&[(OLD, "a"), (NEW, "a")][..], &[(NEW, "a")], &[(OLD, "")], &[]] {
            let bound = names(values).bind(command());
            assert_eq!(variable(&bound, "role"), Some(NEW), "{values:?}");
            assert!(names(values).check(command().find_subcommand("role").unwrap()).is_ok());
        }
        let bound = names(&[(OLD, "a"), (NEW, "")]).bind(command());
        assert_eq!(variable(&bound, "role"), Some(OLD), "an empty variable is not set");
    }

    #[test]
    fn different_values_are_refused_by_commands_with_the_setting() {
        let names = names(&[(OLD, "secret-a"), (NEW, "secret-b")]);
        let error = names.check(command().find_subcommand("role").unwrap()).unwrap_err();
        assert!(error.contains(OLD) && error.contains(NEW) && !error.contains("secret"), "{error}");
        assert!(names.check(command().find_subcommand("client").unwrap()).is_ok());
    }

    #[test]
    fn a_setting_under_its_old_name_is_marked_and_a_flag_is_not() {
        let names = names(&[(OLD, "a")]);
        let role = command();
        let role = role.find_subcommand("role").unwrap();
        let mut rows = settings(role, &role.clone().get_matches_from(["role"]));
        rows[0].source = "environment";
        names.mark(&mut rows);
        assert_eq!(rows[0].source_description(), format!("environment ({OLD})"));
        let [warning] = &warnings(&rows).collect::<Vec<_>>()[..] else { panic!("one warning") };
        assert!(warning.contains(OLD) && warning.contains(NEW));

        let given = role.clone().get_matches_from(["role", "--mesh-token-previous=b"]);
        let mut rows = settings(role, &given);
        names.mark(&mut rows);
        assert_eq!(rows[0].source_description(), "flag");
        assert_eq!(warnings(&rows).count(), 0);
    }

    #[test]
    fn no_name_is_renamed_twice() {
        let mut all: Vec<_> =
            RENAMED.iter().flat_map(|setting| [setting.old, setting.new]).collect();
        all.sort_unstable();
        let count = all.len();
        all.dedup();
        assert_eq!(all.len(), count);
    }
}
