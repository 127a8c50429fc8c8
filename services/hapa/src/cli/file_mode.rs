//! Files that hold secrets: mode 600.

use std::fs::OpenOptions;
use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;

use anyhow::Context as _;

/// Writes a temporary file beside `file` and renames it: the file is never readable by other users and never
/// incomplete.
pub(super) fn write_private(file: &Path, text: &str) -> anyhow::Result<()> {
    let context = || format!("cannot write {}", file.display());
    if let Some(folder) = file.parent().filter(|folder| !folder.as_os_str().is_empty()) {
        std::fs::create_dir_all(folder).with_context(context)?;
    }
    let temporary = file.with_extension(format!("new-{}", std::process::id()));
    let new = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&temporary);
    let mut new = new.with_context(context)?;
    writeln!(new, "{text}").with_context(context)?;
    new.sync_all().with_context(context)?;
    std::fs::rename(&temporary, file).with_context(context)
}
