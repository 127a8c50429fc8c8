//! Tasks: infers the kind of work from a question and chooses the model or adapter for it.
//! `prompts/tasks.toml` holds the rules. If no engine serves a specialist, the fallback model
//! answers with a warning.

use std::collections::BTreeMap;
use std::sync::LazyLock;

use regex::{RegexSet, RegexSetBuilder};
use serde::Deserialize;

use crate::error::Error;

/// The task of questions that match no rule.
const DEFAULT_TASK: &str = "generate";
/// The specialist for unknown tasks.
const DEFAULT_SPECIALIST: &str = "prompt";

/// `prompts/tasks.toml`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct TaskFile {
    specialist: BTreeMap<String, Specialist>,
    rule: Vec<TaskRule>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Specialist {
    tasks: Vec<String>,
    max_tokens: i32,
    temperature: f64,
    top_p: f64,
}

/// The sampling parameters of a specialist. Requests may override each of them.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Sampling {
    pub(crate) max_tokens: i32,
    pub(crate) temperature: f64,
    pub(crate) top_p: f64,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct TaskRule {
    task: String,
    #[serde(default)]
    question: PatternSet,
    #[serde(default)]
    context: PatternSet,
}

/// Regular expressions that are matched in one pass, in time linear in the text.
#[derive(Debug, Deserialize)]
#[serde(try_from = "Vec<String>")]
struct PatternSet(RegexSet);

impl Default for PatternSet {
    fn default() -> Self {
        PatternSet(RegexSet::empty())
    }
}

impl TryFrom<Vec<String>> for PatternSet {
    type Error = regex::Error;

    fn try_from(patterns: Vec<String>) -> Result<Self, regex::Error> {
        RegexSetBuilder::new(patterns)
            .case_insensitive(true)
            .multi_line(true)
            .build()
            .map(PatternSet)
    }
}

#[expect(clippy::expect_used, reason = "the file is part of the binary and a test reads it")]
static TASKS: LazyLock<TaskFile> =
    LazyLock::new(|| toml::from_str(include_str!("../../prompts/tasks.toml")).expect("tasks.toml"));

/// Infers the task from a question and the code around it.
pub(crate) fn infer(question: &str, context: &str) -> &'static str {
    let fits =
        |rule: &&TaskRule| rule.question.0.is_match(question) || rule.context.0.is_match(context);
    TASKS.rule.iter().find(fits).map_or(DEFAULT_TASK, |rule| &rule.task)
}

/// The default sampling parameters of a task.
pub(crate) fn sampling(task: &str) -> Sampling {
    let is_assigned = |one: &&Specialist| one.tasks.iter().any(|name| name == task);
    let specialist = TASKS.specialist.values().find(is_assigned);
    let Specialist { max_tokens, temperature, top_p, .. } =
        *specialist.unwrap_or(&TASKS.specialist[DEFAULT_SPECIALIST]);
    Sampling { max_tokens, temperature, top_p }
}

/// The models of all tasks, and the fallback model.
#[derive(Debug)]
pub(crate) struct Specialists {
    /// By task.
    models: BTreeMap<String, TaskModel>,
    /// FALLBACK_MODEL.
    fallback: Option<String>,
}

#[derive(Debug)]
struct TaskModel {
    model: String,
    /// Set by TASK_MODELS: then its absence causes a warning even if the engines serve no
    /// specialist at all.
    is_configured: bool,
}

/// The model chosen for a task.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct ModelChoice {
    pub(crate) model: String,
    /// Why the fallback model was chosen.
    pub(crate) warning: Option<String>,
}

impl Specialists {
    /// Parses TASK_MODELS, such as `fix=my-fixer,test=prompt`. An error describes the invalid part.
    pub(crate) fn new(task_models: &str, fallback: Option<&str>) -> Result<Specialists, String> {
        let mut models = BTreeMap::new();
        for (name, specialist) in &TASKS.specialist {
            for task in &specialist.tasks {
                let assigned = TaskModel { model: name.clone(), is_configured: false };
                models.insert(task.clone(), assigned);
            }
        }
        for pair in task_models.split(',').map(str::trim).filter(|pair| !pair.is_empty()) {
            let (task, model) = pair.split_once('=').unwrap_or((pair, ""));
            let (task, model) = (task.trim(), model.trim().to_owned());
            if model.is_empty() {
                return Err(format!("contains {pair:?}, which is not TASK=MODEL"));
            }
            let known_tasks = models.keys().cloned().collect::<Vec<_>>().join(", ");
            let Some(assigned) = models.get_mut(task) else {
                return Err(format!("names the unknown task {task:?}; known are {known_tasks}"));
            };
            *assigned = TaskModel { model, is_configured: true };
        }
        let fallback = fallback.filter(|model| !model.is_empty()).map(str::to_owned);
        Ok(Specialists { models, fallback })
    }

    /// Chooses the model for a request that names none: the specialist, if an engine serves it and
    /// the key may use it, or else the fallback.
    pub(crate) fn choose(
        &self,
        task: &str,
        served: &[&str],
        default: &str,
        allowed: &[String],
    ) -> Result<ModelChoice, Error> {
        let is_allowed =
            |model: &str| allowed.is_empty() || allowed.iter().any(|name| name == model);
        let fallback = self.fallback.as_deref().unwrap_or(default);
        let assigned = self.models.get(task);
        let specialist = assigned.and_then(|assigned| find_served(served, &assigned.model));
        if let Some(model) = specialist.filter(|model| is_allowed(model)) {
            return Ok(ModelChoice { model: model.to_owned(), warning: None });
        }
        if !is_allowed(fallback) {
            return Err(Error::ModelNotAllowed);
        }
        let warning = assigned.filter(|assigned| assigned.model != fallback).and_then(|assigned| {
            let why = if specialist.is_some() {
                "this key may not use"
            } else if assigned.is_configured || self.serves_any_specialist(served) {
                "no engine serves"
            } else {
                // The engines serve no specialists at all: the base model is the intended one.
                return None;
            };
            let TaskModel { model, .. } = assigned;
            Some(format!("{why} {model}, the model for the task {task}: {fallback} answered"))
        });
        Ok(ModelChoice { model: fallback.to_owned(), warning })
    }

    /// The tasks that are assigned to a model.
    pub(crate) fn tasks_of(&self, model: &str) -> Vec<String> {
        let is_assigned = |assigned: &TaskModel| is_same_model(&assigned.model, model);
        self.models
            .iter()
            .filter(|(_, assigned)| is_assigned(assigned))
            .map(|(task, _)| task.clone())
            .collect()
    }

    fn serves_any_specialist(&self, served: &[&str]) -> bool {
        self.models.values().any(|assigned| find_served(served, &assigned.model).is_some())
    }
}

/// The name under which an engine serves a model.
fn find_served<'a>(served: &[&'a str], model: &str) -> Option<&'a str> {
    served.iter().find(|name| is_same_model(name, model)).copied()
}

/// Compares model names and treats `-` and `_` as equal: vLLM may be started with `error-fix=…` or
/// `error_fix=…`.
fn is_same_model(a: &str, b: &str) -> bool {
    let plain = |byte: u8| if byte == b'-' { b'_' } else { byte };
    a.len() == b.len() && a.bytes().map(plain).eq(b.bytes().map(plain))
}

#[cfg(test)]
mod tests;
