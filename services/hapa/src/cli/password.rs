//! Passwords and other secrets that are typed or piped, and never stand in an argument: the list of
//! processes shows those to everyone.

use std::io::{BufRead as _, IsTerminal as _, Read as _};

use anyhow::{Context as _, bail, ensure};

/// No password, ID token or key is longer.
const MOST_BYTES: u64 = 16 * 1_024;

/// The next line of standard input.
pub(super) fn line(what: &str) -> anyhow::Result<String> {
    let mut line = String::new();
    let mut input = std::io::stdin().lock().take(MOST_BYTES);
    let words = || format!("reading the {what} from standard input");
    input.read_line(&mut line).with_context(words)?;
    ensure!(input.limit() > 0, "the {what} on standard input is too long");
    let line = line.strip_suffix('\n').unwrap_or(&line);
    let line = line.strip_suffix('\r').unwrap_or(line);
    ensure!(!line.is_empty(), "standard input holds no {what}");
    Ok(line.to_owned())
}

/// A password that exists: typed without echo, or the next line of standard input.
pub(super) fn known(what: &str, from_stdin: bool) -> anyhow::Result<String> {
    if from_stdin {
        return line(what);
    }
    terminal(what, "--password-stdin")?;
    ask(what)
}

/// A new password: typed twice without echo, or the next line of standard input.
pub(super) fn new(what: &str, from_stdin: bool, otherwise: &str) -> anyhow::Result<String> {
    if from_stdin {
        return line(what);
    }
    terminal(what, otherwise)?;
    let first = ask(what)?;
    let second = ask(&format!("{what} again"))?;
    ensure!(first == second, "the two are not alike; nothing was changed");
    Ok(first)
}

fn terminal(what: &str, otherwise: &str) -> anyhow::Result<()> {
    if !std::io::stdin().is_terminal() {
        bail!("can't ask for the {what}: standard input is no terminal; pass {otherwise}");
    }
    Ok(())
}

fn ask(what: &str) -> anyhow::Result<String> {
    let answer = rpassword::prompt_password(format!("{what}: "));
    let answer = answer.with_context(|| format!("asking for the {what}"))?;
    ensure!(!answer.is_empty(), "the {what} is empty");
    Ok(answer)
}
