//! Tables for the terminal and as Markdown.

use std::fmt::Write as _;

use anstyle::{AnsiColor, Style};

/// A table. A head may have two lines; the first column is text, the others are figures.
#[derive(Debug)]
pub(crate) struct Table {
    pub(crate) title: String,
    pub(crate) heads: Vec<&'static str>,
    pub(crate) rows: Vec<Row>,
}

/// A row, and whether it is a target that is met.
#[derive(Debug)]
pub(crate) struct Row {
    pub(crate) cells: Vec<String>,
    pub(crate) mark: Mark,
}

/// The colour of a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mark {
    None,
    Ours,
    Met,
    NotMet,
}

impl Mark {
    fn style(self) -> Style {
        match self {
            Mark::None => Style::new(),
            Mark::Ours => AnsiColor::Cyan.on_default(),
            Mark::Met => AnsiColor::Green.on_default(),
            Mark::NotMet => AnsiColor::Red.on_default(),
        }
    }
}

impl Table {
    /// The table with colours, which the caller removes where there is no terminal.
    pub(crate) fn terminal(&self) -> String {
        let bold = Style::new().bold();
        let mut out = format!("\n{bold}{}{bold:#}\n", self.title);
        let heads: Vec<_> =
            self.heads.iter().map(|head| head.split_once('\n').unwrap_or(("", head))).collect();
        let widths = self.widths();
        for line in 0..2 {
            let cells = heads.iter().map(|head| if line == 0 { head.0 } else { head.1 });
            let text = aligned(cells, &widths);
            if !text.trim().is_empty() {
                let _ = writeln!(out, "{bold}{text}{bold:#}");
            }
        }
        for row in &self.rows {
            let (style, text) =
                (row.mark.style(), aligned(row.cells.iter().map(String::as_str), &widths));
            let _ = writeln!(out, "{style}{text}{style:#}");
        }
        out
    }

    pub(crate) fn markdown(&self) -> String {
        let heads: Vec<_> = self.heads.iter().map(|head| head.replace('\n', " ")).collect();
        let rule = vec!["---"; heads.len()].join(" | ");
        let mut out = format!("{}:\n\n| {} |\n| {rule} |\n", self.title, heads.join(" | "));
        for row in &self.rows {
            let _ = writeln!(out, "| {} |", row.cells.join(" | "));
        }
        out
    }

    fn widths(&self) -> Vec<usize> {
        let width = |text: &str| text.lines().map(|line| line.chars().count()).max().unwrap_or(0);
        let column = |at: usize| {
            let cells = self.rows.iter().map(|row| width(&row.cells[at]));
            cells.chain([width(self.heads[at])]).max().unwrap_or(0)
        };
        (0..self.heads.len()).map(column).collect()
    }
}

fn aligned<'a>(cells: impl Iterator<Item = &'a str>, widths: &[usize]) -> String {
    let cells = cells.zip(widths).enumerate().map(|(at, (cell, width))| {
        if at == 0 { format!("{cell:<width$}") } else { format!("{cell:>width$}") }
    });
    cells.collect::<Vec<_>>().join("  ").trim_end().to_owned()
}

/// A figure with about three digits; a dash where nothing was measured.
pub(crate) fn figure(value: Option<f64>) -> String {
    let Some(value) = value else { return "–".to_owned() };
    match value.abs() {
        size if size >= 1_000.0 => grouped(value),
        size if size >= 100.0 => format!("{value:.0}"),
        size if size >= 10.0 => format!("{value:.1}"),
        _ => format!("{value:.2}"),
    }
}

/// Two figures, or one dash.
pub(crate) fn pair(first: Option<f64>, second: Option<f64>) -> String {
    if first.is_none() && second.is_none() {
        return figure(None);
    }
    format!("{} / {}", figure(first), figure(second))
}

fn grouped(value: f64) -> String {
    let digits = format!("{value:.0}");
    let mut out = String::new();
    for (at, digit) in digits.chars().enumerate() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) && !out.ends_with('-') {
            out.push(',');
        }
        out.push(digit);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_have_about_three_digits() {
        let found = [Some(0.514), Some(12.34), Some(-333.3), Some(1_234_567.8), None].map(figure);
        assert_eq!(found, ["0.51", "12.3", "-333", "1,234,568", "–"]);
    }

    #[test]
    fn a_table_is_printed_in_both_forms() {
        let row = Row { cells: vec!["a".to_owned(), "1.0".to_owned()], mark: Mark::None };
        let table =
            Table { title: "T".to_owned(), heads: vec!["name", "long\nhead"], rows: vec![row] };
        assert_eq!(table.markdown(), "T:\n\n| name | long head |\n| --- | --- |\n| a | 1.0 |\n");
        let plain = anstream::adapter::strip_str(&table.terminal()).to_string();
        assert_eq!(plain, "\nT\n      long\nname  head\na      1.0\n");
    }
}
