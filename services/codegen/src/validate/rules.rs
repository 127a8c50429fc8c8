//! Which calls are dangerous, and when: `rules.toml` says it, this file knows what its conditions mean.

use std::collections::HashMap;
use std::sync::LazyLock;

use serde::Deserialize;

use crate::validate::calls::Call;
use crate::validate::grammar::Language;
use crate::validate::{Finding, Severity};

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    rule: Vec<Rule>,
}

/// Calls of one kind of danger.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Rule {
    language: Language,
    /// What is called, by its path.
    calls: Vec<String>,
    #[serde(default)]
    when: When,
    issue: String,
    severity: Severity,
    /// Where all arguments are literals.
    literal: Option<Severity>,
    /// `{}` stands for what is called.
    message: String,
    #[serde(default)]
    suggestion: String,
}

/// What must hold of the arguments.
#[derive(Clone, Copy, Debug, Default, Deserialize)]
#[serde(rename_all = "snake_case")]
enum When {
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
static RULES: LazyLock<Vec<Rule>> =
    LazyLock::new(|| toml::from_str::<File>(include_str!("rules.toml")).expect("rules.toml").rule);

type ByCall = HashMap<&'static str, Vec<&'static Rule>>;

static BY_CALL: LazyLock<HashMap<Language, ByCall>> = LazyLock::new(|| {
    let mut rules = HashMap::<_, ByCall>::new();
    for rule in &*RULES {
        for call in &rule.calls {
            rules.entry(rule.language).or_default().entry(call).or_default().push(rule);
        }
    }
    rules
});

/// The worst that the rules have to say of a call.
pub(super) fn apply(call: &Call<'_>, language: Language) -> Option<Finding> {
    let rules = BY_CALL.get(&language.family())?;
    let found = call.paths.iter().flat_map(|path| {
        let found = rules.get(path.as_str()).into_iter().flatten();
        found.map(move |rule| (path, *rule))
    });
    let found = found.filter(|(_, rule)| rule.when.holds(call));
    let found = found.map(|(path, rule)| {
        let severity = rule.literal.filter(|_| call.is_literal()).unwrap_or(rule.severity);
        (severity, path, rule)
    });
    let (severity, path, rule) = found.max_by_key(|(severity, ..)| *severity)?;
    let finding = Finding::at(call.node, severity, &rule.issue);
    Some(finding.says(rule.message.replace("{}", path), &rule.suggestion))
}

impl When {
    fn holds(self, call: &Call<'_>) -> bool {
        match self {
            When::Always => true,
            When::FirstComputed => call.computes_first(),
            When::AnyComputed => call.computes_any(),
            When::Shell => call.uses_shell(),
            When::OneString => call.takes_one_string() && !call.uses_shell(),
            When::NoSafeLoader => !call.has_safe_loader(),
            When::WritesOutside => call.writes() && call.leads_outside(1),
            When::FirstOutside => call.leads_outside(1),
            When::AnyOutside => call.leads_outside(2),
            When::ReceiverOutside => call.receiver_leads_outside(),
            When::ReceiverWritesOutside => call.receiver_leads_outside() && call.opens_to_write(),
        }
    }
}
