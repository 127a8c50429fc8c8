//! Cuts texts into pieces for property tests.

use proptest::sample::Index;

/// Cuts a text at these places.
pub(crate) fn cut<'t>(text: &'t str, places: &[Index]) -> Vec<&'t str> {
    let mut ends: Vec<_> = places
        .iter()
        .map(|place| text.floor_char_boundary(place.index(text.len() + 1)))
        .chain([text.len()])
        .collect();
    ends.sort_unstable();
    let mut from = 0;
    ends.into_iter().map(|to| &text[std::mem::replace(&mut from, to)..to]).collect()
}
