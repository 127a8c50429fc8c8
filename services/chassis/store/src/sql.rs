//! SQL text that is assembled at run time. This is the only module that asserts that such text is safe.
//!
//! Invariant: a text consists of parts of the source code (`&'static str`) and of placeholders. Values are bound, so no
//! input of a caller can become part of the text.

use std::fmt::Write as _;

use sqlx::{AssertSqlSafe, SqlSafeStr, SqlStr};

/// SQL text that is assembled from parts of the source code.
#[derive(Clone, Debug)]
#[must_use]
pub struct SqlText(String);

/// The syntax of placeholders.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Placeholder {
    /// `$1`, `$2`: required by PostgreSQL.
    Numbered,
    /// `?`: faster on SQLite, which treats `$1` as a name and searches it among all others. With thousands of
    /// placeholders the search took longer than the rest of the statement.
    Anonymous,
}

impl Placeholder {
    /// The fastest syntax of a backend. `name` is sqlx's name of the backend.
    pub fn for_backend(name: &str) -> Self {
        if name == "SQLite" { Placeholder::Anonymous } else { Placeholder::Numbered }
    }
}

impl SqlText {
    /// A text that begins with this part.
    pub fn new(part: &'static str) -> Self {
        SqlText(part.to_owned())
    }

    /// Appends a part.
    pub fn with(mut self, part: &'static str) -> Self {
        self.0.push_str(part);
        self
    }

    /// Appends parts, separated by commas.
    pub fn list(mut self, parts: impl IntoIterator<Item = &'static str>) -> Self {
        for (number, part) in parts.into_iter().enumerate() {
            self.0.push_str(if number == 0 { "" } else { ", " });
            self.0.push_str(part);
        }
        self
    }

    /// Appends `count` placeholders: `$first, …`.
    pub fn places(mut self, first: usize, count: usize) -> Self {
        self.add_places(Placeholder::Numbered, first, count);
        self
    }

    /// Appends rows of placeholders: `($1, $2), ($3, $4)`. `more` is appended to each row.
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
    fn parts_and_placeholders_keep_the_order_in_which_they_were_added() {
        let text = SqlText::new("KEEP ").list(["a", "b"]).with(" WHERE c IN (");
        assert_eq!(text.places(3, 2).with(")").0, "KEEP a, b WHERE c IN ($3, $4)");
        let rows = |placeholder| SqlText::new("VALUES ").rows(placeholder, 2, 2, ", 0").0;
        assert_eq!(rows(Placeholder::for_backend("PostgreSQL")), "VALUES ($1, $2, 0), ($3, $4, 0)");
        assert_eq!(rows(Placeholder::for_backend("SQLite")), "VALUES (?, ?, 0), (?, ?, 0)");
        assert_eq!(SqlText::new("x").list([]).places(1, 0).0, "x");
    }
}
