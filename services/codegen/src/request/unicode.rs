//! Removes invisible characters from prompts and answers, so that a person, a model and an
//! interpreter read the same text.
//!
//! Removed: control characters except tab, LF and CR; bidirectional controls and marks; other
//! default-ignorable characters (zero-width and tag characters, fillers, invisible operators);
//! noncharacters.
//!
//! Kept once, after a character that needs it: joiners (UAX #31, 2.3: Arabic, Indic and related
//! scripts, emoji sequences) and variation selectors (emoji, symbols, Mongolian, ideographs).
//!
//! Always kept, because they are visible: line separators, spaces of any width, and private-use
//! characters, which symbol fonts use. Tags are removed even from the flags of England, Scotland
//! and Wales, because tags can encode hidden text.
//! <https://www.unicode.org/reports/tr55/> <https://www.unicode.org/reports/tr39/>
//!
//! Each decision depends on the previous characters only, so a stream is never delayed.

use std::borrow::Cow;

/// Removes invisible characters. Copies the text only if there are any.
pub(crate) fn strip(text: &str) -> Cow<'_, str> {
    InvisibleCharFilter::default().strip(text)
}

/// Removes invisible characters in place.
pub(crate) fn strip_in_place(text: &mut String) {
    if let Cow::Owned(stripped) = strip(text) {
        *text = stripped;
    }
}

/// Removes invisible characters from a text that arrives in pieces.
#[derive(Debug, Default)]
pub(crate) struct InvisibleCharFilter {
    /// The last kept character.
    previous: char,
    /// The number of removed characters.
    pub(crate) removed_count: usize,
}

impl InvisibleCharFilter {
    /// Filters the next piece.
    pub(crate) fn strip<'t>(&mut self, text: &'t str) -> Cow<'t, str> {
        let Some(previous) = text.chars().next_back() else { return Cow::Borrowed(text) };
        if text.is_ascii() && !text.bytes().any(|byte| is_control(byte.into())) {
            self.previous = previous;
            return Cow::Borrowed(text);
        }
        let first = text.char_indices().find(|(_, letter)| !self.should_keep(*letter));
        let Some((index, _)) = first else { return Cow::Borrowed(text) };
        let (visible, rest) = text.split_at(index);
        let mut kept = String::with_capacity(text.len());
        kept.push_str(visible);
        for letter in rest.chars() {
            if self.should_keep(letter) {
                kept.push(letter);
            } else {
                self.removed_count += 1;
            }
        }
        Cow::Owned(kept)
    }

    fn should_keep(&mut self, letter: char) -> bool {
        let is_kept = match letter {
            '\u{200c}' => uses_joiners(self.previous),
            '\u{200d}' => {
                uses_joiners(self.previous)
                    || is_emoji(self.previous)
                    || self.previous == '\u{fe0f}'
            }
            '\u{fe00}'..='\u{fe0f}' => accepts_variation_selector(self.previous, letter),
            '\u{180b}'..='\u{180d}' | '\u{180f}' => is_mongolian(self.previous),
            '\u{e0100}'..='\u{e01ef}' => is_ideograph(self.previous),
            // The filler of an Old Korean syllable without a vowel.
            '\u{1160}' => {
                matches!(self.previous, '\u{1100}'..='\u{115e}' | '\u{a960}'..='\u{a97c}')
            }
            letter => !is_invisible(letter),
        };
        if is_kept {
            self.previous = letter;
        }
        is_kept
    }
}

/// C0 and C1 controls, except tab and line breaks.
fn is_control(letter: char) -> bool {
    letter.is_control() && !matches!(letter, '\t' | '\n' | '\r')
}

/// Bidirectional controls and marks, which change the order in which a line is displayed.
pub(crate) fn is_bidi(letter: char) -> bool {
    matches!(letter, '\u{61c}' | '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

/// Controls, bidirectional controls, `Default_Ignorable_Code_Point` and noncharacters.
pub(crate) fn is_invisible(letter: char) -> bool {
    if letter.is_ascii() {
        return is_control(letter);
    }
    is_control(letter)
        || is_bidi(letter)
        || matches!(letter,
            '\u{ad}' | '\u{34f}' | '\u{115f}' | '\u{1160}' | '\u{17b4}' | '\u{17b5}'
            | '\u{180b}'..='\u{180f}' | '\u{200b}'..='\u{200d}' | '\u{2060}'..='\u{2065}'
            | '\u{206a}'..='\u{206f}' | '\u{3164}' | '\u{fe00}'..='\u{fe0f}' | '\u{feff}'
            | '\u{ffa0}' | '\u{fff0}'..='\u{fffb}' | '\u{1bca0}'..='\u{1bca3}'
            | '\u{1d173}'..='\u{1d17a}' | '\u{e0000}'..='\u{e0fff}' | '\u{fdd0}'..='\u{fdef}')
        || u32::from(letter) & 0xfffe == 0xfffe
}

/// Characters of scripts in which a joiner changes the displayed text.
fn uses_joiners(letter: char) -> bool {
    matches!(letter,
        '\u{620}'..='\u{6ff}' | '\u{710}'..='\u{74f}' | '\u{750}'..='\u{77f}' | '\u{7ca}'..='\u{7f5}'
        | '\u{860}'..='\u{8ff}' | '\u{900}'..='\u{dff}' | '\u{1000}'..='\u{109f}'
        | '\u{1780}'..='\u{17b3}' | '\u{17b6}'..='\u{17ff}' | '\u{1b00}'..='\u{1b7f}'
        | '\u{fb50}'..='\u{fdcf}' | '\u{fdf0}'..='\u{fdff}' | '\u{fe70}'..='\u{fefc}')
        || is_mongolian(letter)
}

fn is_mongolian(letter: char) -> bool {
    matches!(letter, '\u{1807}' | '\u{180a}' | '\u{1820}'..='\u{18aa}')
}

fn is_emoji(letter: char) -> bool {
    matches!(letter, '\u{a9}' | '\u{ae}' | '\u{203c}' | '\u{2049}' | '\u{2122}' | '\u{2139}'
        | '\u{2190}'..='\u{2bff}' | '\u{3030}' | '\u{303d}' | '\u{3297}' | '\u{3299}'
        | '\u{1f000}'..='\u{1faff}')
}

fn accepts_variation_selector(base: char, selector: char) -> bool {
    match base {
        '0'..='9' | '#' | '*' => matches!(selector, '\u{fe0e}' | '\u{fe0f}'),
        '\u{1000}'..='\u{109f}' | '\u{3000}'..='\u{303f}' | '\u{a840}'..='\u{a877}' => true,
        base => is_emoji(base) || is_ideograph(base),
    }
}

fn is_ideograph(letter: char) -> bool {
    matches!(letter, '\u{3400}'..='\u{4dbf}' | '\u{4e00}'..='\u{9fff}' | '\u{f900}'..='\u{faff}'
        | '\u{20000}'..='\u{3fffd}')
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn reordering_hidden_and_tag_characters_are_removed() {
        for hidden in [
            "\u{202e}",
            "\u{2066}",
            "\u{2069}",
            "\u{200b}",
            "\u{2060}",
            "\u{feff}",
            "\u{200e}",
            "\u{ad}",
            "\u{3164}",
            "\u{0}",
            "\u{1b}",
            "\u{7f}",
            "\u{9b}",
            "\u{e0041}",
            "\u{e007f}",
            "\u{200d}",
            "\u{200c}",
            "\u{fe0f}",
            "\u{e0100}",
            "\u{ffff}",
            "\u{2062}",
        ] {
            assert_eq!(strip(&format!("a{hidden}b")), "ab", "{hidden:?}");
            assert_eq!(strip(&format!("가{hidden}나")), "가나", "{hidden:?}");
        }
    }

    #[test]
    fn characters_that_scripts_and_emoji_need_are_kept_once() {
        for whole in [
            "할 일: 리스트\t\r\n",
            "각\u{1112}\u{1160}",
            "👩\u{200d}💻 ❤\u{fe0f}\u{200d}🔥 1\u{fe0f}\u{20e3} 👍🏽 🇰🇷",
            "می\u{200c}خواهم",
            "क्\u{200d}ष",
            "葛\u{e0100}",
            "\u{1820}\u{180b}",
            "日本語　です",
            "\u{e0b0}",
        ] {
            assert!(matches!(strip(whole), Cow::Borrowed(same) if same == whole), "{whole:?}");
        }
        assert_eq!(strip("👩\u{200d}\u{200d}\u{200d}💻"), "👩\u{200d}💻");
        assert_eq!(strip("葛\u{e0100}\u{e0101}\u{e0102}"), "葛\u{e0100}");
        assert_eq!(strip("🏴\u{e0067}\u{e0062}\u{e007f}"), "🏴");
    }

    fn any_text() -> impl Strategy<Value = String> {
        let hidden = prop::sample::select(vec![
            '\u{200d}',
            '\u{200c}',
            '\u{fe0f}',
            '\u{202e}',
            '\u{e0061}',
            '\u{200b}',
            '\u{1160}',
            '👩',
            'ب',
            '\u{1112}',
            '葛',
            '\u{e0101}',
        ]);
        prop::collection::vec(prop_oneof![any::<char>(), hidden], 0..60)
            .prop_map(|letters| letters.into_iter().collect())
    }

    proptest! {
        #[test]
        fn stripping_twice_changes_nothing(text in any_text()) {
            let once = strip(&text).into_owned();
            prop_assert_eq!(strip(&once), once.as_str());
        }

        #[test]
        fn printable_ascii_and_korean_are_never_copied(text in "[ -~\t\n\r가-힣ㄱ-ㅎㅏ-ㅣ]{0,80}") {
            prop_assert!(matches!(strip(&text), Cow::Borrowed(same) if same == text));
        }

        #[test]
        fn every_kept_invisible_character_follows_one_that_needs_it(text in any_text()) {
            let mut before = '\0';
            for letter in strip(&text).chars() {
                let needed = uses_joiners(before) || is_emoji(before) || is_mongolian(before) || is_ideograph(before)
                    || before == '\u{fe0f}' || before.is_ascii_digit() || matches!(before, '#' | '*')
                    || matches!(before, '\u{1100}'..='\u{115e}' | '\u{a960}'..='\u{a97c}' | '\u{3000}'..='\u{303f}' | '\u{a840}'..='\u{a877}');
                prop_assert!(!is_invisible(letter) || needed, "{:?} after {:?}", letter, before);
                before = letter;
            }
        }

        #[test]
        fn filtering_pieces_equals_filtering_the_whole(text in any_text()) {
            let mut char_filter = InvisibleCharFilter::default();
            let joined: String = text.chars().map(|letter| char_filter.strip(letter.encode_utf8(&mut [0; 4])).into_owned()).collect();
            prop_assert_eq!(&joined, &strip(&text));
            prop_assert_eq!(char_filter.removed_count, text.chars().count() - joined.chars().count());
        }
    }
}
