//! The confirmation prompt of commands that delete data.

use std::io::{IsTerminal as _, Write as _};

use anyhow::anyhow;

use crate::cli::CliError;

/// Fails if standard input is not a terminal and `--yes` is absent: no prompt is possible then.
pub(super) fn require_terminal_or_yes(has_yes: bool) -> Result<(), CliError> {
    if has_yes || std::io::stdin().is_terminal() {
        return Ok(());
    }
    Err(anyhow!("cannot ask for confirmation: standard input is not a terminal; pass --yes").into())
}

/// Asks a yes/no question on standard error; any answer but `y` or `yes` means no.
pub(super) fn ask(question: &str) -> Result<bool, CliError> {
    let mut stderr = anstream::stderr();
    write!(stderr, "{question} [y/N] ")?;
    stderr.flush()?;
    let mut answer = String::new();
    std::io::stdin().read_line(&mut answer)?;
    Ok(matches!(answer.trim().to_lowercase().as_str(), "y" | "yes"))
}
