//! SQL text that is assembled at run time: the one place of the mesh that asserts that such text is
//! safe.
//!
//! Invariant: a text consists of parts of the source code (`&'static str`) and of placeholders. No
//! value can become part of it, so no caller's input can; values are bound.

use std::fmt::Write as _;

use sqlx::{AssertSqlSafe, SqlSafeStr, SqlStr};

/// SQL text, put together from parts of the source code.
#[derive(Clone, Debug)]
#[must_use]
pub struct SqlText(String);

/// How placeholders are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Placeholder {
    /// `$1`, `$2`: PostgreSQL needs these.
    Numbered,
    /// `?`: SQLite takes `$1` for a name and looks each up among all others, which took longer than
    /// all the rest of a statement with thousands of them.
    Anonymous,
}

impl Placeholder {
    /// The fastest that a backend takes; `name` is that of sqlx.
    pub fn of(name: &str) -> Self {
        if name == "SQLite" { Placeholder::Anonymous } else { Placeholder::Numbered }
    }
}

impl SqlText {
    /// Begins with this part.
    pub fn new(part: &'static str) -> Self {
        SqlText(part.to_owned())
    }

    /// Adds a part.
    pub fn with(mut self, part: &'static str) -> Self {
        self.0.push_str(part);
        self
    }

    /// Adds parts with commas between them.
    pub fn list(mut self, parts: impl IntoIterator<Item = &'static str>) -> Self {
        for (number, part) in parts.into_iter().enumerate() {
            self.0.push_str(if number == 0 { "" } else { ", " });
            self.0.push_str(part);
        }
        self
    }

    /// Adds `$first, …`: so many placeholders.
    pub fn places(mut self, first: usize, count: usize) -> Self {
        self.add_places(Placeholder::Numbered, first, count);
        self
    }

    /// Adds `($1, $2), ($3, $4)`: so many rows of so many placeholders. `more` ends each row.
    pub fn rows(
        mut self,
        placeholder: Placeholder,
        rows: usize,
        columns: usize,
        more: &'static str,
    ) -> Self {
        self.0.reserve(rows * (columns * 8 + more.len() + 4));
        for row in 0..rows {
            self.0.push_str(if row == 0 { "(" } else { ", (" });
            self.add_places(placeholder, row * columns + 1, columns);
            self.0.push_str(more);
            self.0.push(')');
        }
        self
    }

    fn add_places(&mut self, placeholder: Placeholder, first: usize, count: usize) {
        for number in first..first + count {
            self.0.push_str(if number == first { "" } else { ", " });
            match placeholder {
                // Writing to a String does not fail.
                Placeholder::Numbered => drop(write!(self.0, "${number}")),
                Placeholder::Anonymous => self.0.push('?'),
            }
        }
    }
}

impl SqlSafeStr for SqlText {
    fn into_sql_str(self) -> SqlStr {
        AssertSqlSafe(self.0).into_sql_str()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_and_placeholders_stand_in_the_order_in_which_they_were_added() {
        let text = SqlText::new("KEEP ").list(["a", "b"]).with(" WHERE c IN (");
        assert_eq!(text.places(3, 2).with(")").0, "KEEP a, b WHERE c IN ($3, $4)");
        let rows = |placeholder| SqlText::new("VALUES ").rows(placeholder, 2, 2, ", 0").0;
        assert_eq!(rows(Placeholder::of("PostgreSQL")), "VALUES ($1, $2, 0), ($3, $4, 0)");
        assert_eq!(rows(Placeholder::of("SQLite")), "VALUES (?, ?, 0), (?, ?, 0)");
        assert_eq!(SqlText::new("x").list([]).places(1, 0).0, "x");
    }
}
