//! Panics as log lines, instead of text on standard error, which may block. Formatted messages are not logged: they may
//! quote what a caller sent, such as the message about a string that is cut inside a character.

use std::any::Any;
use std::backtrace::{Backtrace, BacktraceStatus};
use std::cell::RefCell;
use std::panic::set_hook;
use std::thread;
use std::time::Duration;

use crate::logging::LogWriter;

/// Maximum wait for the line, because the process may end with the panic.
const FLUSH_TIMEOUT: Duration = Duration::from_millis(100);

thread_local! {
    /// Location of the latest panic of this thread.
    static LOCATION: RefCell<Option<String>> = const { RefCell::new(None) };
}

/// Installs a panic hook that logs panics. With RUST_BACKTRACE=1 the line has a backtrace.
pub(crate) fn log_panics(writer: LogWriter) {
    set_hook(Box::new(move |info| {
        let thread = thread::current();
        let thread = thread.name().unwrap_or("unnamed");
        let location = info.location().map(ToString::to_string);
        LOCATION.with(|last| last.replace(location.clone()));
        let message = literal(info.payload());
        let backtrace = Backtrace::capture();
        if backtrace.status() == BacktraceStatus::Captured {
            tracing::error!(thread, location, message, %backtrace, "panicked");
        } else {
            tracing::error!(thread, location, message, "panicked");
        }
        writer.flush(FLUSH_TIMEOUT);
    }));
}

/// Describes the panic that was just caught on this thread.
pub fn describe(panic: &(dyn Any + Send)) -> String {
    let message = literal(panic);
    match LOCATION.with(RefCell::take) {
        Some(location) => format!("panic at {location}: {message}"),
        None => format!("panic: {message}"),
    }
}

/// The message, if it is a literal in the source.
fn literal(payload: &(dyn Any + Send)) -> &'static str {
    payload.downcast_ref::<&'static str>().copied().unwrap_or("(formatted; not shown)")
}

#[cfg(test)]
mod tests {
    use std::panic::catch_unwind;

    use super::*;

    #[test]
    fn a_panic_is_described_by_its_literal_message_only() {
        let prompt = String::from("é, a prompt");
        let payload = |run: &(dyn Fn() + std::panic::RefUnwindSafe)| catch_unwind(run).unwrap_err();
        let literal = payload(&|| panic!("a literal"));
        assert!(describe(&*literal).ends_with(": a literal"));
        let cut = payload(&|| drop(prompt[1..].to_owned()));
        assert!(cut.downcast_ref::<String>().is_some_and(|text| text.contains("prompt")));
        assert!(!describe(&*cut).contains("prompt"));
        assert!(!describe(&*payload(&|| panic!("about {prompt}"))).contains("prompt"));
    }
}
