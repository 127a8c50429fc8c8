//! The terminal in raw mode on the alternate screen. Dropping it restores the previous state.

use std::io::{Read as _, Write as _};

use crossterm::cursor::{Hide, MoveTo, Show};
use crossterm::execute;
use crossterm::terminal::{
    Clear, ClearType, EnterAlternateScreen, LeaveAlternateScreen, disable_raw_mode,
    enable_raw_mode, size,
};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::mpsc;

/// In raw mode, Ctrl-C arrives as a byte and not as a signal.
const CTRL_C: u8 = 3;
/// Last line of the screen.
const FOOTER: &str = "q quits";

pub(super) struct Terminal {
    keys: mpsc::Receiver<u8>,
    signals: [Signal; 3],
    _guard: RestoreGuard,
}

/// Restores the terminal.
struct RestoreGuard;

impl Terminal {
    pub(super) fn enter() -> anyhow::Result<Terminal> {
        let signals = [SignalKind::interrupt(), SignalKind::terminate(), SignalKind::hangup()];
        let [interrupt, terminate, hangup] = signals.map(signal);
        let signals = [interrupt?, terminate?, hangup?];
        let guard = RestoreGuard;
        enable_raw_mode()?;
        execute!(std::io::stdout(), EnterAlternateScreen, Hide)?;
        Ok(Terminal { keys: keys(), signals, _guard: guard })
    }

    /// Draws the text; lines and columns beyond the screen are cut off.
    pub(super) fn show(text: &str) -> anyhow::Result<()> {
        let (columns, rows) = size().unwrap_or((80, 24));
        let mut out = std::io::stdout().lock();
        execute!(out, MoveTo(0, 0))?;
        // Each line overwrites the previous frame: clearing the screen first would flicker.
        let lines = text.lines().take(usize::from(rows).saturating_sub(2)).chain(["", FOOTER]);
        for (row, line) in (0u16..).zip(lines) {
            let line: String = line.chars().take(columns.into()).collect();
            execute!(out, MoveTo(0, row))?;
            write!(out, "{line}")?;
            execute!(out, Clear(ClearType::UntilNewLine))?;
        }
        execute!(out, Clear(ClearType::FromCursorDown))?;
        Ok(out.flush()?)
    }

    /// Waits for a key or a signal that quits.
    pub(super) async fn quit(&mut self) {
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

impl Drop for RestoreGuard {
    fn drop(&mut self) {
        let _ = execute!(std::io::stdout(), Show, LeaveAlternateScreen);
        let _ = disable_raw_mode();
    }
}

/// Bytes from the keyboard, read by a thread of its own: a read from a terminal cannot be cancelled, and the
/// runtime waits for its own threads at shutdown.
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
