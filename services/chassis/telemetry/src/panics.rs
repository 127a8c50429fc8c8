//! What a panic writes: a line of the log in place of text on standard error, which may block, and no value.
//! A formatted message may quote what a caller sent, as that of a string that is cut inside a character does.

use std::any::Any;
use std::backtrace::{Backtrace, BacktraceStatus};
use std::cell::RefCell;
use std::panic::set_hook;
use std::thread;
use std::time::Duration;

use crate::logging::LogWriter;

/// Longest wait for the line: the process may end with the panic.
const FLUSH_TIMEOUT: Duration = Duration::from_millis(100);

thread_local! {
    /// Where this thread panicked last.
    static LOCATION: RefCell<Option<String>> = const { RefCell::new(None) };
}

/// Logs panics from now on. With RUST_BACKTRACE=1 the line has a backtrace.
pub fn log_panics(writer: LogWriter) {
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

/// The panic that was just caught on this thread.
pub fn describe(panic: &(dyn Any + Send)) -> String {
    let message = literal(panic);
    match LOCATION.with(RefCell::take) {
        Some(location) => format!("panic at {location}: {message}"),
        None => format!("panic: {message}"),
    }
}

/// The message where it is a literal of the source.
fn literal(payload: &(dyn Any + Send)) -> &'static str {
    payload.downcast_ref::<&'static str>().copied().unwrap_or("(formatted; not shown)")
}

#[cfg(test)]
mod tests {
    use std::panic::catch_unwind;

    use super::*;

    #[test]
    fn a_panic_shows_what_the_source_says_and_no_data() {
        let prompt = String::from("é, a prompt");
        let payload = |run: &(dyn Fn() + std::panic::RefUnwindSafe)| catch_unwind(run).unwrap_err();
        let told = payload(&|| panic!("a literal"));
        assert!(describe(&*told).ends_with(": a literal"));
        let cut = payload(&|| drop(prompt[1..].to_owned()));
        assert!(cut.downcast_ref::<String>().is_some_and(|text| text.contains("prompt")));
        assert!(!describe(&*cut).contains("prompt"));
        assert!(!describe(&*payload(&|| panic!("about {prompt}"))).contains("prompt"));
    }
}
