//! The words of a user's profile, which auth keeps and codegen acts on.

use hapa_proto::codegen::v1::UserProfile;

use crate::check::Violations;

/// A field of the profile, and its words.
pub type Words = (&'static str, &'static [&'static str]);

/// Each field that takes one word.
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

/// The field that takes several.
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

/// Names every word of a profile that is none. What is empty is a default.
pub fn check(profile: &UserProfile, found: &mut Violations) {
    let given = [
        &profile.python_skill_level,
        &profile.code_output_structure,
        &profile.explanation_style,
        &profile.project_context,
        &profile.error_handling_preference,
    ];
    for ((field, words), word) in FIELDS.iter().zip(given) {
        if !word.is_empty() {
            check_word(field, word, words, found);
        }
    }
    let (field, words) = FEATURES;
    if profile.preferred_language_features.len() > words.len() {
        found.wrong(field, "names a feature more than once");
    }
    for word in profile.preferred_language_features.iter().take(words.len()) {
        check_word(field, word, words, found);
    }
}

/// Names a word that is not among the known ones.
pub fn check_word(field: &'static str, word: &str, words: &[&str], found: &mut Violations) {
    if !words.contains(&word) {
        found.wrong(field, format!("has an unknown word; known are {}", words.join(", ")));
    }
}
