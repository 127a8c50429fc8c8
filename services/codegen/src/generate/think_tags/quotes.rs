//! Whether a place in a line is in quotation marks or backticks.

/// What the current line contains so far.
#[derive(Debug, Default)]
pub(super) struct LineQuotes {
    is_in_double: bool,
    is_in_single: bool,
    is_in_backticks: bool,
    last: Option<char>,
}

impl LineQuotes {
    pub(super) fn push(&mut self, text: &str) {
        for letter in text.chars() {
            match letter {
                '\n' => *self = LineQuotes::default(),
                '"' => self.is_in_double = !self.is_in_double,
                '`' => self.is_in_backticks = !self.is_in_backticks,
                // After a letter it is an apostrophe, or it closes a quotation.
                '\'' => {
                    let is_after_word = self.last.is_some_and(char::is_alphanumeric);
                    self.is_in_single = !self.is_in_single && !is_after_word;
                }
                _ => {}
            }
            self.last = Some(letter);
        }
    }

    /// Whether a tag at this place, before the given text, is quoted text or an argument in code.
    pub(super) fn is_quoted(&self, after: &str) -> bool {
        let is_quote = |letter: char| matches!(letter, '"' | '\'' | '`' | '“' | '‘');
        self.is_in_double
            || self.is_in_single
            || self.is_in_backticks
            || self.last.is_some_and(|last| is_quote(last) || last == '(')
            || after.starts_with(['"', '\''])
    }
}
