//! Text input of bounded size, from a file or from standard input.

use std::io::Read;
use std::path::Path;

use anyhow::{Context as _, ensure};

/// Maximum size of code that a request carries: 50,000 characters of at most 4 bytes.
pub(super) const MAX_CODE_BYTES: u64 = 4 * 50_000;

/// Maximum size of the code before the cursor in a completion: 8,000 characters of at most 4 bytes.
pub(super) const MAX_PREFIX_BYTES: u64 = 4 * 8_000;

/// Reads a text file of at most `max_bytes`; the path `-` stands for standard input.
pub(super) fn read_path(path: &Path, max_bytes: u64) -> anyhow::Result<String> {
    if is_stdin(path) {
        return read_stdin(max_bytes);
    }
    let file = std::fs::File::open(path);
    let file = file.with_context(|| format!("cannot open {}", path.display()))?;
    read(file, max_bytes).with_context(|| format!("cannot read {}", path.display()))
}

/// Reads standard input to its end, at most `max_bytes`.
pub(super) fn read_stdin(max_bytes: u64) -> anyhow::Result<String> {
    read(std::io::stdin(), max_bytes).context("cannot read standard input")
}

/// Whether a path argument means standard input.
pub(super) fn is_stdin(path: &Path) -> bool {
    path.as_os_str() == "-"
}

fn read(source: impl Read, max_bytes: u64) -> anyhow::Result<String> {
    let mut text = String::new();
    source.take(max_bytes + 1).read_to_string(&mut text)?;
    let length = text.len() as u64;
    ensure!(length <= max_bytes, "it is larger than {max_bytes} bytes; send a smaller part of it");
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn input_above_the_limit_is_refused() {
        assert_eq!(read("1234".as_bytes(), 4).unwrap(), "1234");
        assert!(read("12345".as_bytes(), 4).is_err());
    }
}
