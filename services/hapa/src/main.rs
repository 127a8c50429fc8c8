//! `hapa`: see `hapa --help`.

use std::process::ExitCode;
use std::time::Duration;

use hapa::cli::{Failure, execute, parse};

/// How long what can't be dropped may still run: a question to a name server, say, that nobody waits
/// for any more.
const PATIENCE: Duration = Duration::from_secs(1);

fn main() -> ExitCode {
    let cli = match parse() {
        Ok(cli) => cli,
        Err(failure) => return report(&failure),
    };
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build();
    let done = runtime.map_err(Failure::from).and_then(|runtime| {
        let done = runtime.block_on(execute(cli));
        runtime.shutdown_timeout(PATIENCE);
        done
    });
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => report(&failure),
    }
}

fn report(failure: &Failure) -> ExitCode {
    failure.print();
    failure.exit_code()
}
