//! Tables of the results.

use std::fmt::{self, Display, Formatter};

/// A title, a head and rows; the first column is words, the others numbers.
#[derive(Debug)]
pub(crate) struct Table {
    title: String,
    rows: Vec<Vec<String>>,
}

impl Table {
    pub(crate) fn new(title: String, head: &[&str]) -> Self {
        Table { title, rows: vec![head.iter().map(|&name| name.to_owned()).collect()] }
    }

    pub(crate) fn row<const N: usize>(&mut self, cells: [String; N]) {
        self.rows.push(cells.into());
    }
}

impl Display for Table {
    fn fmt(&self, out: &mut Formatter<'_>) -> fmt::Result {
        writeln!(out, "\n{}", self.title)?;
        let columns = self.rows.iter().map(Vec::len).max().unwrap_or(0);
        let widest = |column: usize| {
            let cells = self.rows.iter().filter_map(|row| row.get(column));
            cells.map(|cell| cell.chars().count()).max().unwrap_or(0)
        };
        let widths: Vec<_> = (0..columns).map(widest).collect();
        for row in &self.rows {
            let cells = row.iter().zip(&widths).enumerate();
            let cells: Vec<_> = cells
                .map(|(column, (cell, width))| match column {
                    0 => format!("  {cell:<width$}"),
                    _ if column + 1 == columns => cell.clone(),
                    _ => format!("{cell:>width$}"),
                })
                .collect();
            writeln!(out, "{}", cells.join("  ").trim_end())?;
        }
        Ok(())
    }
}

pub(crate) fn ms(value: f64) -> String {
    format!("{value:.2}")
}

pub(crate) fn times(value: f64) -> String {
    format!("{value:.2}x")
}

/// A target and whether a value keeps it: `<` or else "at most".
pub(crate) fn verdict(value: f64, relation: &str, target: f64, unit: &str) -> String {
    let met = if relation == "<" { value < target } else { value <= target };
    format!("{relation} {target}{unit}: {}", if met { "met" } else { "MISSED" })
}
