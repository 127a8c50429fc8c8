//! Characters that nobody sees, taken out of prompts and answers: what a person reads and what a
//! model or an interpreter reads is to be the same text.
//!
//! Removed: controls but tab, LF and CR; bidirectional controls and marks; every other character that
//! is ignorable by default (zero-width and tag characters, fillers, invisible operators), and those
//! that are no characters. Kept, after a character that needs it and once: joiners (UAX #31, 2.3:
//! Arabic, Indic and kindred scripts, and emoji sequences) and variation selectors (emoji, symbols,
//! Mongolian, and ideographs). Line separators and spaces of any width are seen, and stay; so are
//! private-use characters, which fonts of symbols use. Not kept: the tags in flags of England, Scotland
//! and Wales, since tags can spell anything unseen.
//! <https://www.unicode.org/reports/tr55/> <https://www.unicode.org/reports/tr39/>
//!
//! Each decision needs the character before and nothing after, so that a stream holds nothing back.

use std::borrow::Cow;

/// Takes out what can't be seen. Copies only where there is something to take out.
pub(crate) fn strip(text: &str) -> Cow<'_, str> {
    Sieve::default().strip(text)
}

/// The same in place.
pub(crate) fn strip_in(text: &mut String) {
    if let Cow::Owned(stripped) = strip(text) {
        *text = stripped;
    }
}

/// The same for a text that comes in pieces.
#[derive(Debug, Default)]
pub(crate) struct Sieve {
    /// The last character that was kept.
    last: char,
    /// How many were taken out.
    pub(crate) removed: usize,
}

impl Sieve {
    /// The next piece.
    pub(crate) fn strip<'t>(&mut self, text: &'t str) -> Cow<'t, str> {
        let Some(last) = text.chars().next_back() else { return Cow::Borrowed(text) };
        if text.is_ascii() && !text.bytes().any(|byte| is_control(byte.into())) {
            self.last = last;
            return Cow::Borrowed(text);
        }
        let first = text.char_indices().find(|(_, letter)| !self.keeps(*letter));
        let Some((from, _)) = first else { return Cow::Borrowed(text) };
        let (seen, rest) = text.split_at(from);
        let mut kept = String::with_capacity(text.len());
        kept.push_str(seen);
        for letter in rest.chars() {
            if self.keeps(letter) {
                kept.push(letter);
            } else {
                self.removed += 1;
            }
        }
        Cow::Owned(kept)
    }

    fn keeps(&mut self, letter: char) -> bool {
        let keeps = match letter {
            '\u{200c}' => joins(self.last),
            '\u{200d}' => joins(self.last) || is_emoji(self.last) || self.last == '\u{fe0f}',
            '\u{fe00}'..='\u{fe0f}' => takes_variation(self.last, letter),
            '\u{180b}'..='\u{180d}' | '\u{180f}' => is_mongolian(self.last),
            '\u{e0100}'..='\u{e01ef}' => is_ideograph(self.last),
            // Filler of an old Korean syllable without a vowel.
            '\u{1160}' => matches!(self.last, '\u{1100}'..='\u{115e}' | '\u{a960}'..='\u{a97c}'),
            letter => !is_invisible(letter),
        };
        if keeps {
            self.last = letter;
        }
        keeps
    }
}

/// C0 and C1 but what text is laid out with.
fn is_control(letter: char) -> bool {
    letter.is_control() && !matches!(letter, '\t' | '\n' | '\r')
}

/// Changes the order in which a line is shown.
pub(crate) fn is_bidi(letter: char) -> bool {
    matches!(letter, '\u{61c}' | '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

/// Controls, bidirectional controls, `Default_Ignorable_Code_Point`, and what is no character.
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

/// Letters and signs of scripts in which a joiner changes what is seen.
fn joins(letter: char) -> bool {
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

fn takes_variation(base: char, selector: char) -> bool {
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
    fn what_reorders_hides_or_smuggles_is_removed() {
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
    fn what_scripts_and_emoji_need_is_kept_once() {
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
        fn twice_is_as_once(text in any_text()) {
            let once = strip(&text).into_owned();
            prop_assert_eq!(strip(&once), once.as_str());
        }

        #[test]
        fn printable_ascii_and_korean_are_never_copied(text in "[ -~\t\n\r가-힣ㄱ-ㅎㅏ-ㅣ]{0,80}") {
            prop_assert!(matches!(strip(&text), Cow::Borrowed(same) if same == text));
        }

        #[test]
        fn nothing_unseen_is_left_without_the_character_that_needs_it(text in any_text()) {
            let mut before = '\0';
            for letter in strip(&text).chars() {
                let needed = joins(before) || is_emoji(before) || is_mongolian(before) || is_ideograph(before)
                    || before == '\u{fe0f}' || before.is_ascii_digit() || matches!(before, '#' | '*')
                    || matches!(before, '\u{1100}'..='\u{115e}' | '\u{a960}'..='\u{a97c}' | '\u{3000}'..='\u{303f}' | '\u{a840}'..='\u{a877}');
                prop_assert!(!is_invisible(letter) || needed, "{:?} after {:?}", letter, before);
                before = letter;
            }
        }

        #[test]
        fn pieces_come_out_as_the_whole_does(text in any_text()) {
            let mut sieve = Sieve::default();
            let joined: String = text.chars().map(|letter| sieve.strip(letter.encode_utf8(&mut [0; 4])).into_owned()).collect();
            prop_assert_eq!(&joined, &strip(&text));
            prop_assert_eq!(sieve.removed, text.chars().count() - joined.chars().count());
        }
    }
}
