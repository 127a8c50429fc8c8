//! The rules about dangerous calls: `rules.toml` lists them, this file evaluates their conditions.

use std::collections::HashMap;
use std::sync::LazyLock;

use serde::Deserialize;

use crate::validate::call_site::CallSite;
use crate::validate::grammar::Language;
use crate::validate::{Finding, Severity};

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct RuleFile {
    rule: Vec<CallRule>,
}

/// One kind of dangerous calls.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct CallRule {
    language: Language,
    /// The paths of the called functions.
    calls: Vec<String>,
    #[serde(default)]
    when: RuleCondition,
    issue: String,
    severity: Severity,
    /// The severity if all arguments are literals.
    literal: Option<Severity>,
    /// `{}` stands for the path of the called function.
    message: String,
    #[serde(default)]
    suggestion: String,
}

/// The condition on the arguments.
#[derive(Clone, Copy, Debug, Default, Deserialize)]
#[serde(rename_all = "snake_case")]
enum RuleCondition {
    #[default]
    Always,
    FirstComputed,
    AnyComputed,
    Shell,
    OneString,
    NoSafeLoader,
    WritesOutside,
    FirstOutside,
    AnyOutside,
    ReceiverOutside,
    ReceiverWritesOutside,
}

#[expect(clippy::expect_used, reason = "the file is part of the binary and a test reads it")]
static RULES: LazyLock<Vec<CallRule>> = LazyLock::new(|| {
    toml::from_str::<RuleFile>(include_str!("rules.toml")).expect("rules.toml").rule
});

type RulesByCall = HashMap<&'static str, Vec<&'static CallRule>>;

static RULES_BY_LANGUAGE: LazyLock<HashMap<Language, RulesByCall>> = LazyLock::new(|| {
    let mut rules = HashMap::<_, RulesByCall>::new();
    for rule in &*RULES {
        for call in &rule.calls {
            rules.entry(rule.language).or_default().entry(call).or_default().push(rule);
        }
    }
    rules
});

/// The most severe finding of all rules for a call.
pub(super) fn check(call: &CallSite<'_>, language: Language) -> Option<Finding> {
    let rules = RULES_BY_LANGUAGE.get(&language.family())?;
    let candidates = call.paths.iter().flat_map(|path| {
        let rules = rules.get(path.as_str()).into_iter().flatten();
        rules.map(move |rule| (path, *rule))
    });
    let matches = candidates.filter(|(_, rule)| rule.when.is_met(call));
    let matches = matches.map(|(path, rule)| {
        let severity = rule.literal.filter(|_| call.is_literal()).unwrap_or(rule.severity);
        (severity, path, rule)
    });
    let (severity, path, rule) = matches.max_by_key(|(severity, ..)| *severity)?;
    let finding = Finding::at(call.node, severity, &rule.issue);
    Some(finding.with_message(rule.message.replace("{}", path), &rule.suggestion))
}

impl RuleCondition {
    fn is_met(self, call: &CallSite<'_>) -> bool {
        match self {
            RuleCondition::Always => true,
            RuleCondition::FirstComputed => call.has_computed_first_argument(),
            RuleCondition::AnyComputed => call.has_computed_argument(),
            RuleCondition::Shell => call.uses_shell(),
            RuleCondition::OneString => call.has_string_command() && !call.uses_shell(),
            RuleCondition::NoSafeLoader => !call.has_safe_loader(),
            RuleCondition::WritesOutside => call.opens_for_writing() && call.has_outside_path(1),
            RuleCondition::FirstOutside => call.has_outside_path(1),
            RuleCondition::AnyOutside => call.has_outside_path(2),
            RuleCondition::ReceiverOutside => call.has_outside_receiver(),
            RuleCondition::ReceiverWritesOutside => {
                call.has_outside_receiver() && call.opens_receiver_for_writing()
            }
        }
    }
}
