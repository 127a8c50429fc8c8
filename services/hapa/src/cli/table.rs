//! Tables in one layout for all commands. Control characters in cells are replaced, so that a name cannot move
//! the cursor.

use comfy_table::{Table, presets};
use prost_types::Timestamp;

/// A table with a heading over each column.
pub(super) fn table<const N: usize>(
    header: [&str; N],
    rows: impl IntoIterator<Item = [String; N]>,
) -> Table {
    table_with_columns(header, rows)
}

/// Like [`table`], for a number of columns that is not known at compile time.
pub(super) fn table_with_columns<R: IntoIterator<Item = String>>(
    header: impl IntoIterator<Item = impl Into<String>>,
    rows: impl IntoIterator<Item = R>,
) -> Table {
    let mut table = Table::new();
    let header = header.into_iter().map(Into::<String>::into);
    table.load_preset(presets::NOTHING).set_header(header);
    table.add_rows(rows.into_iter().map(|row| row.into_iter().map(|cell| sanitize(&cell))));
    table
}

/// The fields of one object: a name and a value per line.
pub(super) fn field_table(rows: impl IntoIterator<Item = (&'static str, String)>) -> Table {
    let mut table = Table::new();
    table.load_preset(presets::NOTHING);
    table.add_rows(rows.into_iter().map(|(name, value)| [name.to_owned(), sanitize(&value)]));
    table
}

/// A time in UTC, to the minute.
pub(super) fn to_minute(time: Option<&Timestamp>) -> String {
    time.map_or_else(|| "never".to_owned(), |time| truncate(time, "2026-01-31 12:00".len()))
}

/// A time in UTC, to the second.
pub(super) fn to_second(time: Option<&Timestamp>) -> String {
    time.map_or_else(|| "never".to_owned(), |time| truncate(time, "2026-01-31 12:00:00".len()))
}

fn truncate(time: &Timestamp, length: usize) -> String {
    time.to_string().replace('T', " ").chars().take(length).collect()
}

/// Replaces control characters: names are user input and may hold escape sequences.
pub(super) fn sanitize(text: &str) -> String {
    text.replace(char::is_control, "\u{fffd}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_cannot_move_the_cursor() {
        let shown = table(["NAME"], [["a\u{1b}[2Jb\nc".to_owned()]]).to_string();
        assert!(!shown.contains('\u{1b}') && shown.lines().count() == 2, "{shown:?}");
    }

    #[test]
    fn times_are_short() {
        let at = Timestamp::date_time(2026, 2, 3, 4, 5, 6).unwrap();
        assert_eq!(to_minute(Some(&at)), "2026-02-03 04:05");
        assert_eq!(to_second(Some(&at)), "2026-02-03 04:05:06");
        assert_eq!(to_minute(None), "never");
    }
}
