//! Tables for people: the same look everywhere, and nothing in a cell that moves the cursor.

use comfy_table::{Table, presets};
use prost_types::Timestamp;

/// A row under each heading.
pub(super) fn table<const N: usize>(
    header: [&str; N],
    rows: impl IntoIterator<Item = [String; N]>,
) -> Table {
    table_of(header, rows)
}

/// The same where the columns are known later.
pub(super) fn table_of<R: IntoIterator<Item = String>>(
    header: impl IntoIterator<Item = impl Into<String>>,
    rows: impl IntoIterator<Item = R>,
) -> Table {
    let mut table = Table::new();
    let header = header.into_iter().map(Into::<String>::into);
    table.load_preset(presets::NOTHING).set_header(header);
    table.add_rows(rows.into_iter().map(|row| row.into_iter().map(|cell| plain(&cell))));
    table
}

/// One thing: a name and a value a line.
pub(super) fn facts(rows: impl IntoIterator<Item = (&'static str, String)>) -> Table {
    let mut table = Table::new();
    table.load_preset(presets::NOTHING);
    table.add_rows(rows.into_iter().map(|(name, value)| [name.to_owned(), plain(&value)]));
    table
}

/// To the minute, in UTC.
pub(super) fn time(time: Option<&Timestamp>) -> String {
    time.map_or_else(|| "never".to_owned(), |time| to(16, time))
}

/// To the second, in UTC.
pub(super) fn second(time: Option<&Timestamp>) -> String {
    time.map_or_else(|| "never".to_owned(), |time| to(19, time))
}

fn to(characters: usize, time: &Timestamp) -> String {
    time.to_string().replace('T', " ").chars().take(characters).collect()
}

/// Names come from people: one with an escape sequence must not reach the terminal as such.
pub(super) fn plain(text: &str) -> String {
    text.replace(char::is_control, "\u{fffd}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_can_not_move_the_cursor() {
        let shown = table(["NAME"], [["a\u{1b}[2Jb\nc".to_owned()]]).to_string();
        assert!(!shown.contains('\u{1b}') && shown.lines().count() == 2, "{shown:?}");
    }

    #[test]
    fn times_are_short() {
        let at = Timestamp::date_time(2026, 2, 3, 4, 5, 6).unwrap();
        assert_eq!(time(Some(&at)), "2026-02-03 04:05");
        assert_eq!(second(Some(&at)), "2026-02-03 04:05:06");
        assert_eq!(time(None), "never");
    }
}
