//! Panics, told without values: a formatted message may quote what a caller sent, as that of a string
//! that is cut inside of a letter does. The place in the source says as much.

use std::any::Any;
use std::cell::RefCell;
use std::panic::{PanicHookInfo, set_hook};

thread_local! {
    /// Where this thread panicked last.
    static PLACE: RefCell<Option<String>> = const { RefCell::new(None) };
}

/// Logs panics of this process from now on, in place of writing them to standard error.
pub fn log() {
    set_hook(Box::new(|info: &PanicHookInfo<'_>| {
        let place = info.location().map(ToString::to_string);
        PLACE.with(|last| last.replace(place.clone()));
        tracing::error!(place, "a panic: {}", literal(info.payload()));
    }));
}

/// The panic that was just caught on this thread.
pub(crate) fn describe(panic: &(dyn Any + Send)) -> String {
    let words = literal(panic);
    match PLACE.with(RefCell::take) {
        Some(place) => format!("panic at {place}: {words}"),
        None => format!("panic: {words}"),
    }
}

/// Words that stand in the source.
fn literal(panic: &(dyn Any + Send)) -> &'static str {
    panic.downcast_ref::<&'static str>().copied().unwrap_or("its words are not shown")
}

#[cfg(test)]
mod tests {
    use std::panic::catch_unwind;

    use super::*;

    #[test]
    fn words_of_the_source_are_told_and_values_are_not() {
        let told = |panics: fn()| describe(&*catch_unwind(panics).unwrap_err());
        assert!(told(|| panic!("words of the source")).ends_with(": words of the source"));
        let cut = told(|| {
            let asked = std::hint::black_box("이것은 what was asked");
            let _ = std::hint::black_box(&asked[..1]);
        });
        assert!(!cut.contains("asked") && cut.ends_with("its words are not shown"), "{cut}");
    }
}
