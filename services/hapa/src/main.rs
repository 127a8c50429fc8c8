//! `hapa`: see `hapa --help`.

use std::process::ExitCode;
use std::sync::mpsc::channel;
use std::thread;
use std::time::Duration;

use hapa::cli::{Failure, execute, parse};

/// How long what can't be dropped may still run: a question to a name server, say, that nobody waits
/// for any more.
const PATIENCE: Duration = Duration::from_secs(1);

fn main() -> ExitCode {
    let cli = match parse() {
        Ok(cli) => cli,
        Err(failure) => return report(failure),
    };
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build();
    let done = runtime.map_err(Failure::from).and_then(|runtime| {
        let done = runtime.block_on(execute(cli));
        runtime.shutdown_timeout(PATIENCE);
        done
    });
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => report(failure),
    }
}

/// Standard error may be a pipe that nobody reads: the process ends all the same.
fn report(failure: Failure) -> ExitCode {
    let code = failure.exit_code();
    let (printed, is_printed) = channel();
    thread::spawn(move || {
        failure.print();
        printed.send(())
    });
    // Late or never: there is nothing left to be done about it.
    let _ = is_printed.recv_timeout(PATIENCE);
    code
}
