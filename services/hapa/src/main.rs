//! Entry point of the `hapa` binary.

use std::process::ExitCode;
use std::sync::mpsc::channel;
use std::thread;
use std::time::Duration;

use hapa::cli::{CliError, execute, parse};

/// Calls allocate and free much on the threads that serve them, which this allocator does without locks.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Maximum time at exit for work that cannot be cancelled, such as a name lookup on a blocking thread.
const EXIT_TIMEOUT: Duration = Duration::from_secs(1);

fn main() -> ExitCode {
    let cli = match parse() {
        Ok(cli) => cli,
        Err(error) => return report(error),
    };
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build();
    let result = runtime.map_err(CliError::from).and_then(|runtime| {
        let result = runtime.block_on(execute(cli));
        runtime.shutdown_timeout(EXIT_TIMEOUT);
        result
    });
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => report(error),
    }
}

/// Prints the error from a thread of its own: standard error may be a full pipe without a reader, and the process
/// must end all the same.
fn report(error: CliError) -> ExitCode {
    let code = error.exit_code();
    let (sender, printed) = channel();
    thread::spawn(move || {
        error.print();
        sender.send(())
    });
    let _ = printed.recv_timeout(EXIT_TIMEOUT);
    code
}
