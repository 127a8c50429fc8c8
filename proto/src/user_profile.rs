//! The words that the fields of a `UserProfile` accept. Auth stores profiles, and codegen builds prompts from them.

use crate::codegen::v1::UserProfile;

/// A field of the profile and the words that it accepts.
pub type Words = (&'static str, &'static [&'static str]);

/// Each field that accepts one word.
pub const FIELDS: [Words; 5] = [
    ("user_profile.python_skill_level", &["advanced", "beginner", "expert", "intermediate"]),
    ("user_profile.code_output_structure", &["comprehensive", "detailed", "minimal", "standard"]),
    ("user_profile.explanation_style", &["brief", "detailed", "educational", "standard"]),
    (
        "user_profile.project_context",
        &[
            "academic",
            "automation",
            "data_science",
            "enterprise",
            "general_purpose",
            "web_development",
        ],
    ),
    (
        "user_profile.error_handling_preference",
        &["basic", "comprehensive", "detailed", "minimal", "production_ready", "robust"],
    ),
];

/// The field that accepts several words.
pub const FEATURES: Words = (
    "user_profile.preferred_language_features",
    &[
        "async_await",
        "comprehensions",
        "context_managers",
        "dataclasses",
        "decorators",
        "f_strings",
        "generators",
        "type_hints",
    ],
);

/// Every field of `profile` with a word that it does not accept, and the problem. An empty field means the default.
pub fn violations(profile: &UserProfile) -> Vec<(&'static str, String)> {
    let values = [
        &profile.python_skill_level,
        &profile.code_output_structure,
        &profile.explanation_style,
        &profile.project_context,
        &profile.error_handling_preference,
    ];
    let mut found: Vec<_> = FIELDS
        .iter()
        .zip(values)
        .filter(|(_, word)| !word.is_empty())
        .filter_map(|((field, words), word)| word_violation(field, word, words))
        .collect();
    let (field, words) = FEATURES;
    if profile.preferred_language_features.len() > words.len() {
        found.push((field, "names a feature more than once".to_owned()));
    }
    let features = profile.preferred_language_features.iter().take(words.len());
    found.extend(features.filter_map(|word| word_violation(field, word, words)));
    found
}

/// The field and the problem if `word` is not among `words`.
fn word_violation(
    field: &'static str,
    word: &str,
    words: &[&str],
) -> Option<(&'static str, String)> {
    let problem = || format!("is unknown; known are {}", words.join(", "));
    (!words.contains(&word)).then(|| (field, problem()))
}
