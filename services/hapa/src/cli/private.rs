//! Files that hold secrets.

use std::fs::OpenOptions;
use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;

use anyhow::Context as _;

/// Written aside and moved into place: the file is never readable by others, and never half.
pub(super) fn write(file: &Path, text: &str) -> anyhow::Result<()> {
    let words = || format!("writing {}", file.display());
    if let Some(folder) = file.parent().filter(|folder| !folder.as_os_str().is_empty()) {
        std::fs::create_dir_all(folder).with_context(words)?;
    }
    let aside = file.with_extension(format!("new-{}", std::process::id()));
    let new = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&aside);
    let mut new = new.with_context(words)?;
    writeln!(new, "{text}").with_context(words)?;
    new.sync_all().with_context(words)?;
    std::fs::rename(&aside, file).with_context(words)
}
