//! Duplicate code: the number of pairs of runs of six lines that are equal except for names and literals.

use std::collections::{BTreeSet, HashMap};
use std::path::PathBuf;
use std::sync::LazyLock;

use hapa_policy::{rust, sources};
use regex::Regex;

/// Lines of a run.
const RUN_LEN: usize = 6;

/// The pairs in services/. Lower it when a pair is removed; a change must not raise it.
const MAX_PAIR_COUNT: usize = 95;

/// Runs with fewer names, literals and keywords are too common to be duplicates.
const MIN_WORD_COUNT: usize = 24;

/// A run in more places than these is an idiom.
const MAX_PLACE_COUNT: usize = 8;

/// A line of code in its shape, with its place.
struct Line {
    file: usize,
    number: usize,
    shape: String,
    words: usize,
}

/// A line with every literal and every name replaced; keywords and methods stay.
fn shape(line: &str) -> (String, usize) {
    static WORD: LazyLock<Regex> = LazyLock::new(|| Regex::new(r"\.?\b[A-Za-z_0-9]+\b").unwrap());
    const KEYWORDS: &[&str] = &[
        "as", "async", "await", "break", "const", "continue", "else", "enum", "fn", "for", "if",
        "impl", "in", "let", "loop", "match", "move", "mut", "pub", "ref", "return", "self",
        "struct", "super", "trait", "use", "where", "while",
    ];
    let words = WORD.find_iter(line).count();
    let shape = WORD.replace_all(line.trim(), |found: &regex::Captures<'_>| {
        let word = &found[0];
        let stays = word.starts_with('.') || KEYWORDS.contains(&word);
        if stays { word.to_owned() } else { "_".to_owned() }
    });
    (shape.into_owned(), words)
}

/// The lines of code in services/ without tests, imports and lines of punctuation.
fn lines(files: &[(PathBuf, String)]) -> Vec<Line> {
    let mut found = Vec::new();
    for (file, (path, text)) in files.iter().enumerate() {
        if rust::is_test(path) {
            continue;
        }
        let code = rust::without_tests(&rust::code(text));
        let mut is_import = false;
        for (number, line) in (1..).zip(code.lines()) {
            is_import |= line.starts_with("use ") || line.starts_with("pub use ");
            if !is_import && line.contains(char::is_alphanumeric) {
                let (shape, words) = shape(line);
                found.push(Line { file, number, shape, words });
            }
            is_import &= !line.trim_end().ends_with(';');
        }
    }
    found
}

#[test]
fn duplicate_code_does_not_grow() {
    let files = sources("services");
    let lines = lines(&files);
    let mut places = HashMap::<String, Vec<usize>>::new();
    for (at, run) in lines.windows(RUN_LEN).enumerate() {
        let is_one_file = run[0].file == run[RUN_LEN - 1].file;
        let words: usize = run.iter().map(|line| line.words).sum();
        if is_one_file && words >= MIN_WORD_COUNT {
            let shapes: Vec<_> = run.iter().map(|line| line.shape.as_str()).collect();
            places.entry(shapes.join("\n")).or_default().push(at);
        }
    }
    let mut pairs = BTreeSet::<(usize, usize)>::new();
    for places in places.values().filter(|places| (2..=MAX_PLACE_COUNT).contains(&places.len())) {
        for (index, &one) in places.iter().enumerate() {
            let others = places[index + 1..].iter().filter(|&&other| other >= one + RUN_LEN);
            pairs.extend(others.map(|&other| (one, other)));
        }
    }
    // A longer run is one pair, at its first line.
    let is_first = |&(one, other): &(usize, usize)| {
        one == 0 || other == 0 || !pairs.contains(&(one - 1, other - 1))
    };
    let mut found: Vec<_> = pairs
        .iter()
        .copied()
        .filter(is_first)
        .map(|(one, other)| {
            let is_pair = |more: &usize| pairs.contains(&(one + more, other + more));
            let more = (1..lines.len()).take_while(is_pair).count();
            let place =
                |at: usize| format!("{}:{}", files[lines[at].file].0.display(), lines[at].number);
            (RUN_LEN + more, format!("{} and {}", place(one), place(other)))
        })
        .collect();
    found.sort_by(|one, other| other.cmp(one));
    let worst = found.iter().take(20).map(|(len, places)| format!("{len} lines: {places}"));
    let worst: Vec<_> = worst.collect();
    assert!(
        found.len() <= MAX_PAIR_COUNT,
        "{} pairs of duplicate code in services/, of at most {MAX_PAIR_COUNT}; the longest:\n{}",
        found.len(),
        worst.join("\n")
    );
}
