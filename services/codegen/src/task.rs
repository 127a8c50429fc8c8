//! Tasks: what kind of work a question is, and which model or adapter does that work. Both are data,
//! `prompts/tasks.toml`; a specialist that nobody serves is replaced, and never silently.

use std::collections::BTreeMap;
use std::sync::LazyLock;

use regex::{RegexSet, RegexSetBuilder};
use serde::Deserialize;

use crate::error::Error;

/// What is done where nothing says otherwise.
const DEFAULT: &str = "generate";
/// The specialist for that.
const PROMPT: &str = "prompt";

/// `prompts/tasks.toml`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Tasks {
    specialist: BTreeMap<String, Specialist>,
    rule: Vec<Rule>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Specialist {
    tasks: Vec<String>,
    max_tokens: i32,
    temperature: f64,
    top_p: f64,
}

/// How a specialist is asked where a request says nothing.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Sampling {
    pub(crate) max_tokens: i32,
    pub(crate) temperature: f64,
    pub(crate) top_p: f64,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Rule {
    task: String,
    #[serde(default)]
    question: Patterns,
    #[serde(default)]
    context: Patterns,
}

/// All are tried in one pass, in time that grows with the text alone.
#[derive(Debug, Deserialize)]
#[serde(try_from = "Vec<String>")]
struct Patterns(RegexSet);

impl Default for Patterns {
    fn default() -> Self {
        Patterns(RegexSet::empty())
    }
}

impl TryFrom<Vec<String>> for Patterns {
    type Error = regex::Error;

    fn try_from(patterns: Vec<String>) -> Result<Self, regex::Error> {
        RegexSetBuilder::new(patterns).case_insensitive(true).multi_line(true).build().map(Patterns)
    }
}

#[expect(clippy::expect_used, reason = "the file is part of the binary and a test reads it")]
static TASKS: LazyLock<Tasks> =
    LazyLock::new(|| toml::from_str(include_str!("../prompts/tasks.toml")).expect("tasks.toml"));

/// The kind of work that a question asks for.
pub(crate) fn infer(question: &str, context: &str) -> &'static str {
    let fits =
        |rule: &&Rule| rule.question.0.is_match(question) || rule.context.0.is_match(context);
    TASKS.rule.iter().find(fits).map_or(DEFAULT, |rule| &rule.task)
}

/// How a task is asked where a request says nothing.
pub(crate) fn sampling(task: &str) -> Sampling {
    let does = |one: &&Specialist| one.tasks.iter().any(|name| name == task);
    let specialist = TASKS.specialist.values().find(does);
    let Specialist { max_tokens, temperature, top_p, .. } =
        *specialist.unwrap_or(&TASKS.specialist[PROMPT]);
    Sampling { max_tokens, temperature, top_p }
}

/// Which model does which task.
#[derive(Debug)]
pub(crate) struct Specialists {
    /// By task.
    models: BTreeMap<String, Wanted>,
    /// FALLBACK_MODEL.
    fallback: Option<String>,
}

#[derive(Debug)]
struct Wanted {
    model: String,
    /// By a setting: then its absence is said even where the engine has no specialist at all.
    configured: bool,
}

/// The model that does the work.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Chosen {
    pub(crate) model: String,
    /// What the caller should know about the choice.
    pub(crate) warning: Option<String>,
}

impl Specialists {
    /// From TASK_MODELS, such as `fix=my-fixer,test=prompt`; an error says what is wrong with it.
    pub(crate) fn new(task_models: &str, fallback: Option<&str>) -> Result<Specialists, String> {
        let mut models = BTreeMap::new();
        for (name, specialist) in &TASKS.specialist {
            for task in &specialist.tasks {
                let wanted = Wanted { model: name.clone(), configured: false };
                models.insert(task.clone(), wanted);
            }
        }
        for pair in task_models.split(',').map(str::trim).filter(|pair| !pair.is_empty()) {
            let (task, model) = pair.split_once('=').unwrap_or((pair, ""));
            let (task, model) = (task.trim(), model.trim().to_owned());
            if model.is_empty() {
                return Err(format!("has {pair:?}, which is not TASK=MODEL"));
            }
            let known = models.keys().cloned().collect::<Vec<_>>().join(", ");
            let Some(wanted) = models.get_mut(task) else {
                return Err(format!("names the task {task:?}; known are {known}"));
            };
            *wanted = Wanted { model, configured: true };
        }
        let fallback = fallback.filter(|model| !model.is_empty()).map(str::to_owned);
        Ok(Specialists { models, fallback })
    }

    /// The model for a task that names none: the specialist, where it is served and the caller may
    /// use it, else the fallback.
    pub(crate) fn choose(
        &self,
        task: &str,
        served: &[&str],
        default: &str,
        allowed: &[String],
    ) -> Result<Chosen, Error> {
        let may = |model: &str| allowed.is_empty() || allowed.iter().any(|name| name == model);
        let fallback = self.fallback.as_deref().unwrap_or(default);
        let wanted = self.models.get(task);
        let specialist = wanted.and_then(|wanted| find(served, &wanted.model));
        if let Some(model) = specialist.filter(|model| may(model)) {
            return Ok(Chosen { model: model.to_owned(), warning: None });
        }
        if !may(fallback) {
            return Err(Error::ModelNotAllowed);
        }
        let warning = wanted.filter(|wanted| wanted.model != fallback).and_then(|wanted| {
            let why = if specialist.is_some() {
                "this key may not use"
            } else if wanted.configured || self.any_served(served) {
                "no engine serves"
            } else {
                // No specialists here: the one model is what was set up.
                return None;
            };
            let Wanted { model, .. } = wanted;
            Some(format!("{why} {model}, the model for the task {task}: {fallback} answered"))
        });
        Ok(Chosen { model: fallback.to_owned(), warning })
    }

    /// The tasks that a model does.
    pub(crate) fn tasks_of(&self, model: &str) -> Vec<String> {
        let does = |wanted: &Wanted| same(&wanted.model, model);
        self.models.iter().filter(|(_, one)| does(one)).map(|(task, _)| task.clone()).collect()
    }

    fn any_served(&self, served: &[&str]) -> bool {
        self.models.values().any(|wanted| find(served, &wanted.model).is_some())
    }
}

/// The name by which a model is served.
fn find<'a>(served: &[&'a str], model: &str) -> Option<&'a str> {
    served.iter().find(|name| same(name, model)).copied()
}

/// vLLM is started with `error-fix=…` or `error_fix=…`: the same specialist.
fn same(a: &str, b: &str) -> bool {
    let plain = |byte: u8| if byte == b'-' { b'_' } else { byte };
    a.len() == b.len() && a.bytes().map(plain).eq(b.bytes().map(plain))
}

#[cfg(test)]
mod tests;
