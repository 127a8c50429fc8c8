//! The terminal of `hapa top`: raw mode, the alternate screen and the keyboard. Dropping it restores the previous state.

use ratatui::crossterm::event::{self, Event, KeyCode, KeyEvent, KeyEventKind, KeyModifiers};
use ratatui::text::Line;
use ratatui::widgets::Paragraph;
use ratatui::{DefaultTerminal, Frame};
use tokio::sync::mpsc;

use crate::cli::serve::ShutdownSignals;

/// The line below the snapshot.
const FOOTER: &str = "q quits";

pub(super) struct Screen {
    terminal: DefaultTerminal,
    events: mpsc::Receiver<Event>,
    signals: ShutdownSignals,
    _guard: RestoreGuard,
}

/// Restores the terminal.
struct RestoreGuard;

impl Screen {
    pub(super) fn enter() -> anyhow::Result<Screen> {
        let signals = ShutdownSignals::new(true)?;
        let guard = RestoreGuard;
        let terminal = ratatui::try_init()?;
        Ok(Screen { terminal, events: events(), signals, _guard: guard })
    }

    /// Draws a snapshot; lines and columns beyond the screen are cut off.
    pub(super) fn draw(&mut self, snapshot: &str) -> anyhow::Result<()> {
        self.terminal.draw(|frame| draw_snapshot(frame, snapshot))?;
        Ok(())
    }

    /// Waits for a key or a signal that quits.
    pub(super) async fn quit(&mut self) {
        let key = async {
            while let Some(event) = self.events.recv().await {
                if is_quit(&event) {
                    return;
                }
            }
        };
        tokio::select! {
            () = key => {}
            () = self.signals.next() => {}
        }
    }
}

impl Drop for RestoreGuard {
    fn drop(&mut self) {
        // There is no other way to restore it, and the process ends.
        let _ = ratatui::try_restore();
    }
}

fn draw_snapshot(frame: &mut Frame<'_>, snapshot: &str) {
    let rows = usize::from(frame.area().height).saturating_sub(2);
    let lines = snapshot.lines().take(rows).chain(["", FOOTER]);
    frame.render_widget(Paragraph::new(lines.map(Line::from).collect::<Vec<_>>()), frame.area());
}

/// q, Q or Ctrl-C, which is a key in raw mode and not a signal.
fn is_quit(event: &Event) -> bool {
    let Event::Key(KeyEvent { code, modifiers, kind: KeyEventKind::Press, .. }) = event else {
        return false;
    };
    match code {
        KeyCode::Char('q' | 'Q') => true,
        KeyCode::Char('c') => modifiers.contains(KeyModifiers::CONTROL),
        _ => false,
    }
}

/// Events of the terminal, read by a thread of its own: a read cannot be cancelled, and the runtime waits for its own
/// threads at shutdown.
fn events() -> mpsc::Receiver<Event> {
    let (sender, events) = mpsc::channel(16);
    std::thread::spawn(move || {
        while let Ok(event) = event::read() {
            if sender.blocking_send(event).is_err() {
                return;
            }
        }
    });
    events
}

#[cfg(test)]
mod tests {
    use ratatui::Terminal;
    use ratatui::backend::TestBackend;

    use super::*;

    #[test]
    fn a_snapshot_is_cut_to_the_screen_and_followed_by_the_footer() {
        let mut terminal = Terminal::new(TestBackend::new(10, 5)).unwrap();
        let long = "first line is long\n2\n3\n4\n5";
        terminal.draw(|frame| draw_snapshot(frame, long)).unwrap();
        let expected = ["first line", "2         ", "3         ", "          ", "q quits   "];
        terminal.backend().assert_buffer_lines(expected);
        terminal.draw(|frame| draw_snapshot(frame, "short")).unwrap();
        let expected = ["short     ", "          ", "q quits   ", "          ", "          "];
        terminal.backend().assert_buffer_lines(expected);
    }

    #[test]
    fn q_and_ctrl_c_quit() {
        let key = |code, modifiers| is_quit(&Event::Key(KeyEvent::new(code, modifiers)));
        assert!(key(KeyCode::Char('q'), KeyModifiers::NONE));
        assert!(key(KeyCode::Char('Q'), KeyModifiers::SHIFT));
        assert!(key(KeyCode::Char('c'), KeyModifiers::CONTROL));
        assert!(!key(KeyCode::Char('c'), KeyModifiers::NONE));
        assert!(!is_quit(&Event::Resize(80, 24)));
    }
}
