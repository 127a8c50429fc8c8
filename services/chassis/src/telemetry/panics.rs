//! What a panic writes: a line of the log in place of text on standard error, which may block.

use std::any::Any;
use std::backtrace::{Backtrace, BacktraceStatus};
use std::panic::set_hook;
use std::thread;
use std::time::Duration;

use super::writer::LogWriter;

/// Longest wait for the line: the process may end with the panic.
const FLUSH_TIMEOUT: Duration = Duration::from_millis(100);

/// Logs panics from now on. With RUST_BACKTRACE=1 the line has a backtrace.
pub(super) fn log_panics(writer: LogWriter) {
    set_hook(Box::new(move |info| {
        let thread = thread::current();
        let thread = thread.name().unwrap_or("unnamed");
        let location = info.location().map(ToString::to_string).unwrap_or_default();
        let message = message(info.payload());
        let backtrace = Backtrace::capture();
        if backtrace.status() == BacktraceStatus::Captured {
            tracing::error!(thread, location, message, %backtrace, "panicked");
        } else {
            tracing::error!(thread, location, message, "panicked");
        }
        writer.flush(FLUSH_TIMEOUT);
    }));
}

/// The message where it is a literal. A formatted one may quote what it was about: a slice that is cut inside
/// of a character repeats its text, which may be a prompt.
fn message(payload: &(dyn Any + Send)) -> &'static str {
    payload.downcast_ref::<&'static str>().copied().unwrap_or("(formatted; not logged)")
}

#[cfg(test)]
mod tests {
    use std::panic::catch_unwind;

    use super::*;

    #[test]
    fn a_panic_shows_what_the_source_says_and_no_data() {
        let prompt = String::from("é, a prompt");
        let payload = |run: &(dyn Fn() + std::panic::RefUnwindSafe)| catch_unwind(run).unwrap_err();
        assert_eq!(message(&*payload(&|| panic!("a literal"))), "a literal");
        let cut = payload(&|| drop(prompt[1..].to_owned()));
        assert!(cut.downcast_ref::<String>().is_some_and(|text| text.contains("prompt")));
        assert!(!message(&*cut).contains("prompt"));
        assert!(!message(&*payload(&|| panic!("about {prompt}"))).contains("prompt"));
    }
}
