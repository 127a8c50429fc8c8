//! Passwords and other secrets from a prompt or a pipe. They are never arguments: the process list shows
//! arguments to every user of the machine.

use std::io::{BufRead as _, IsTerminal as _, Read as _};

use anyhow::{Context as _, bail, ensure};

/// Maximum length of a secret; no password, ID token or key is longer.
const MAX_SECRET_BYTES: u64 = 16 * 1_024;

/// Reads the next line of standard input.
pub(super) fn read_line(what: &str) -> anyhow::Result<String> {
    let mut line = String::new();
    let mut input = std::io::stdin().lock().take(MAX_SECRET_BYTES);
    let context = || format!("cannot read the {what} from standard input");
    input.read_line(&mut line).with_context(context)?;
    ensure!(
        input.limit() > 0,
        "the {what} on standard input is longer than {MAX_SECRET_BYTES} bytes"
    );
    let line = line.strip_suffix('\n').unwrap_or(&line);
    let line = line.strip_suffix('\r').unwrap_or(line);
    ensure!(!line.is_empty(), "standard input holds no {what}");
    Ok(line.to_owned())
}

/// Reads an existing password: from a prompt without echo, or the next line of standard input.
pub(super) fn read_current(what: &str, from_stdin: bool) -> anyhow::Result<String> {
    if from_stdin {
        return read_line(what);
    }
    require_terminal(what, "--password-stdin")?;
    prompt(what)
}

/// Reads a new password: from a prompt without echo, twice, or the next line of standard input.
/// `flags` names the flags that make a prompt unnecessary.
pub(super) fn read_new(what: &str, from_stdin: bool, flags: &str) -> anyhow::Result<String> {
    if from_stdin {
        return read_line(what);
    }
    require_terminal(what, flags)?;
    let first = prompt(what)?;
    let second = prompt(&format!("{what} again"))?;
    ensure!(first == second, "the two passwords differ; nothing was changed");
    Ok(first)
}

fn require_terminal(what: &str, flags: &str) -> anyhow::Result<()> {
    if !std::io::stdin().is_terminal() {
        bail!("cannot prompt for the {what}: standard input is not a terminal; pass {flags}");
    }
    Ok(())
}

fn prompt(what: &str) -> anyhow::Result<String> {
    let answer = rpassword::prompt_password(format!("{what}: "));
    let answer = answer.with_context(|| format!("cannot prompt for the {what}"))?;
    ensure!(!answer.is_empty(), "the {what} is empty");
    Ok(answer)
}
