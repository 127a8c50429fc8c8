//! File descriptors: the limit of the process, how many connections fit below it, and a reserve for probes.
//!
//! Invariant: connections of callers leave descriptors for stores, for engines and for the port of probes, which
//! answers also when the process has none left.

use std::fs::{File, read_dir};
use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::net::{TcpListener, TcpStream};

use crate::config::Config;

/// What a process opens beside connections and engines: stores, their readers, logs, peers. `hapa all` has about
/// 60 when it starts.
pub const OWN: u64 = 128;
/// Most descriptors that are kept for growth of what is open when the server starts.
const MOST_SPARE: u64 = 64;
const LEAST_SPARE: u64 = 16;
/// Descriptors that are held for probes.
const RESERVE: usize = 8;

/// The limit that a process may raise its own to (RLIMIT_NOFILE, hard); none: there is none.
pub fn hard_limit() -> Option<u64> {
    getrlimit(Resource::Nofile).maximum
}

/// Raises the limit as far as the process may. A shell's is often 1,024, for programs that use `select`.
pub fn raise_limit() {
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    if current == maximum {
        return;
    }
    if let Err(error) = setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum }) {
        tracing::warn!(%error, limit = current, "RLIMIT_NOFILE can't be raised");
    }
}

/// How many descriptors MAX_CONNECTIONS and MAX_IN_FLIGHT need: a call may take a second one, to an engine.
pub fn needed(config: &Config) -> u64 {
    u64::from(config.max_connections) + u64::from(config.max_in_flight) + OWN
}

/// MAX_CONNECTIONS, or as many as the limit of the process leaves room for.
pub(crate) fn connections(config: &Config) -> u32 {
    let Some(limit) = getrlimit(Resource::Nofile).current else { return config.max_connections };
    let fit = fit(limit, open(), config.max_connections, config.max_in_flight);
    if fit < config.max_connections {
        let (wanted, needed) = (config.max_connections, needed(config));
        tracing::warn!(
            limit,
            needed,
            wanted,
            connections = fit,
            "MAX_CONNECTIONS does not fit into RLIMIT_NOFILE: raise the limit (ulimit -n, LimitNOFILE)"
        );
    }
    fit
}

/// Descriptors that are open now.
fn open() -> u64 {
    // Where there is no such folder, it is guessed.
    read_dir("/proc/self/fd").map_or(OWN / 2, |entries| entries.count() as u64)
}

/// How many connections of `wanted` fit, where engines may take as many as there are calls, but no more than a
/// third of what is left.
fn fit(limit: u64, open: u64, wanted: u32, in_flight: u32) -> u32 {
    let free = limit.saturating_sub(open);
    let left = free.saturating_sub((free / 4).clamp(LEAST_SPARE, MOST_SPARE));
    let connections = left - u64::from(in_flight).min(left / 3);
    u32::try_from(connections).unwrap_or(u32::MAX).clamp(1, wanted)
}

/// Descriptors that are held, so that one can be given up for a probe when the process has none left. Clones
/// are one.
#[derive(Clone, Debug, Default)]
pub(crate) struct Reserve(Arc<Mutex<Vec<File>>>);

impl Reserve {
    pub(crate) fn new() -> Reserve {
        let reserve = Reserve::default();
        reserve.fill();
        reserve
    }

    /// Takes back what was given up, as far as there is any.
    pub(crate) fn fill(&self) {
        let mut held = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        while held.len() < RESERVE {
            let Ok(file) = File::open("/dev/null") else { return };
            held.push(file);
        }
    }

    /// Whether there was one to give up.
    fn give_up_one(&self) -> bool {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).pop().is_some()
    }

    /// Accepts, with a descriptor of the reserve where there is no other.
    pub(crate) async fn accept(&self, listener: &TcpListener) -> io::Result<TcpStream> {
        loop {
            match listener.accept().await {
                Ok((stream, _)) => return Ok(stream),
                Err(error) if is_exhausted(&error) && self.give_up_one() => {}
                Err(error) => return Err(error),
            }
        }
    }
}

/// No descriptor is left, to the process or to the machine.
fn is_exhausted(error: &io::Error) -> bool {
    let code = error.raw_os_error();
    [rustix::io::Errno::MFILE, rustix::io::Errno::NFILE]
        .iter()
        .any(|errno| code == Some(errno.raw_os_error()))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn what_fits_is_as_it_was_set_and_what_does_not_leaves_room_for_the_rest() {
        assert_eq!(fit(1 << 20, 60, 4_096, 2_048), 4_096);
        assert_eq!(fit(1_024, 60, 4_096, 2_048), 600);
        assert_eq!(fit(128, 60, 4_096, 2_048), 34);
        assert_eq!(fit(64, 60, 4_096, 2_048), 1);
        assert_eq!(fit(1_024, 60, 100, 2_048), 100);
    }

    proptest! {
        #[test]
        fn connections_and_engines_never_take_the_last_descriptors(
            limit: u64, open in 0_u64..10_000, wanted in 1_u32.., in_flight in 1_u32..
        ) {
            let connections = fit(limit, open, wanted, in_flight);
            prop_assert!((1..=wanted).contains(&connections));
            if connections > 1 {
                let left = limit - open - u64::from(connections);
                prop_assert!(left >= LEAST_SPARE, "{left} are left for all else");
                let engines = u64::from(in_flight).min(u64::from(connections) / 2);
                prop_assert!(left >= engines, "{left} are left for {engines} engines");
            }
        }
    }

    #[tokio::test]
    async fn a_reserve_takes_back_what_it_gave_up() {
        let reserve = Reserve::new();
        for _ in 0..RESERVE {
            assert!(reserve.give_up_one());
        }
        assert!(!reserve.give_up_one());
        reserve.fill();
        assert_eq!(reserve.0.lock().unwrap().len(), RESERVE);
    }
}
