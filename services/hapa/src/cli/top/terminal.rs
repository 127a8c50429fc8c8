//! The terminal while `hapa top` has it; it comes back as it was, however that ends.

use std::io::{Read as _, Write as _};

use crossterm::cursor::{Hide, MoveTo, Show};
use crossterm::execute;
use crossterm::terminal::{
    Clear, ClearType, EnterAlternateScreen, LeaveAlternateScreen, disable_raw_mode,
    enable_raw_mode, size,
};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::mpsc;

/// Ctrl-C is a key here like any other.
const CTRL_C: u8 = 3;
/// Below it the screen says how to leave it.
const FOOT: &str = "q ends";

pub(super) struct Terminal {
    keys: mpsc::Receiver<u8>,
    signals: [Signal; 3],
    _taken: Taken,
}

/// Gives it back.
struct Taken;

impl Terminal {
    pub(super) fn take() -> anyhow::Result<Terminal> {
        let signals = [SignalKind::interrupt(), SignalKind::terminate(), SignalKind::hangup()];
        let [interrupt, terminate, hangup] = signals.map(signal);
        let signals = [interrupt?, terminate?, hangup?];
        let taken = Taken;
        enable_raw_mode()?;
        execute!(std::io::stdout(), EnterAlternateScreen, Hide)?;
        Ok(Terminal { keys: keys(), signals, _taken: taken })
    }

    /// What does not fit is left out.
    pub(super) fn show(text: &str) -> anyhow::Result<()> {
        let (columns, rows) = size().unwrap_or((80, 24));
        let mut out = std::io::stdout().lock();
        execute!(out, MoveTo(0, 0))?;
        // Line by line over what was there: a screen that is cleared first would flicker.
        let lines = text.lines().take(usize::from(rows).saturating_sub(2)).chain(["", FOOT]);
        for (row, line) in (0u16..).zip(lines) {
            let line: String = line.chars().take(columns.into()).collect();
            execute!(out, MoveTo(0, row))?;
            write!(out, "{line}")?;
            execute!(out, Clear(ClearType::UntilNewLine))?;
        }
        execute!(out, Clear(ClearType::FromCursorDown))?;
        Ok(out.flush()?)
    }

    /// A key or a signal that ends it.
    pub(super) async fn end(&mut self) {
        let [interrupt, terminate, hangup] = &mut self.signals;
        loop {
            tokio::select! {
                key = self.keys.recv() => match key {
                    Some(b'q' | b'Q' | CTRL_C) | None => return,
                    Some(_) => {}
                },
                _ = interrupt.recv() => return,
                _ = terminate.recv() => return,
                _ = hangup.recv() => return,
            }
        }
    }
}

impl Drop for Taken {
    fn drop(&mut self) {
        let _ = execute!(std::io::stdout(), Show, LeaveAlternateScreen);
        let _ = disable_raw_mode();
    }
}

/// The keys as they are pressed. The thread ends with the process: a read from a terminal can't be
/// called off, and one of the runtime's would hold up its end.
fn keys() -> mpsc::Receiver<u8> {
    let (sender, keys) = mpsc::channel(16);
    std::thread::spawn(move || {
        for key in std::io::stdin().lock().bytes() {
            let Ok(key) = key else { return };
            if sender.blocking_send(key).is_err() {
                return;
            }
        }
    });
    keys
}
