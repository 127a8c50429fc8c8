//! File descriptors: the limit of the process, the number of connections below it, and a reserve for probes.
//!
//! Invariant: connections of callers leave descriptors for stores, for engines and for the port of probes. That port
//! answers even if the process has no descriptor left.

use std::fs::{File, read_dir};
use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::net::{TcpListener, TcpStream};

use crate::config::Config;

/// Descriptors of a process apart from connections and engines: stores, their readers, logs, peers. `hapa all` has
/// about 60 after its start.
pub const OWN_DESCRIPTOR_COUNT: u64 = 128;
/// Maximum number of descriptors that are kept free for stores, logs and peers that open later.
const MAX_SPARE_COUNT: u64 = 64;
/// Minimum number of descriptors that are kept free for them.
const MIN_SPARE_COUNT: u64 = 16;
/// Descriptors that are reserved for probes.
const RESERVE_SIZE: usize = 8;

/// The hard limit of the process (RLIMIT_NOFILE); `None`: unlimited.
pub fn hard_limit() -> Option<u64> {
    getrlimit(Resource::Nofile).maximum
}

/// Raises the limit of the process to its hard limit. A shell's limit is often 1,024, for programs that use `select`.
pub fn raise_limit() {
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    if current == maximum {
        return;
    }
    if let Err(error) = setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum }) {
        tracing::warn!(%error, limit = current, "RLIMIT_NOFILE can't be raised");
    }
}

/// The number of descriptors that MAX_CONNECTIONS and MAX_IN_FLIGHT need: a call may use a second one, to an engine.
pub fn needed(config: &Config) -> u64 {
    u64::from(config.max_connections) + u64::from(config.max_in_flight) + OWN_DESCRIPTOR_COUNT
}

/// MAX_CONNECTIONS, or fewer if the limit of the process does not allow as many.
pub(crate) fn allowed_connections(config: &Config) -> u32 {
    let Some(limit) = getrlimit(Resource::Nofile).current else { return config.max_connections };
    let allowed =
        fitting_connections(limit, open_count(), config.max_connections, config.max_in_flight);
    if allowed < config.max_connections {
        let (wanted, needed) = (config.max_connections, needed(config));
        tracing::warn!(
            limit,
            needed,
            wanted,
            connections = allowed,
            "MAX_CONNECTIONS does not fit into RLIMIT_NOFILE: raise the limit (ulimit -n, LimitNOFILE)"
        );
    }
    allowed
}

/// The number of open descriptors.
fn open_count() -> u64 {
    // An estimate on systems without /proc.
    read_dir("/proc/self/fd").map_or(OWN_DESCRIPTOR_COUNT / 2, |entries| entries.count() as u64)
}

/// The number of connections, at most `wanted`, that the limit allows. Engines may use one descriptor for each call,
/// but at most a third of the free ones.
fn fitting_connections(limit: u64, open: u64, wanted: u32, in_flight: u32) -> u32 {
    let free = limit.saturating_sub(open);
    let left = free.saturating_sub((free / 4).clamp(MIN_SPARE_COUNT, MAX_SPARE_COUNT));
    let connections = left - u64::from(in_flight).min(left / 3);
    u32::try_from(connections).unwrap_or(u32::MAX).clamp(1, wanted)
}

/// Open descriptors, of which one is closed for a probe if the process has no other left. Clones share one reserve.
#[derive(Clone, Debug, Default)]
pub(crate) struct DescriptorReserve(Arc<Mutex<Vec<File>>>);

impl DescriptorReserve {
    pub(crate) fn new() -> DescriptorReserve {
        let reserve = DescriptorReserve::default();
        reserve.fill();
        reserve
    }

    /// Refills the reserve, as far as descriptors are free.
    pub(crate) fn fill(&self) {
        let mut files = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        while files.len() < RESERVE_SIZE {
            let Ok(file) = File::open("/dev/null") else { return };
            files.push(file);
        }
    }

    /// Closes one descriptor; false if the reserve is empty.
    fn release_one(&self) -> bool {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).pop().is_some()
    }

    /// Accepts a connection, with a descriptor of the reserve if there is no other.
    pub(crate) async fn accept(&self, listener: &TcpListener) -> io::Result<TcpStream> {
        loop {
            match listener.accept().await {
                Ok((stream, _)) => return Ok(stream),
                Err(error) if is_exhausted(&error) && self.release_one() => {}
                Err(error) => return Err(error),
            }
        }
    }
}

/// Whether the process or the machine has no descriptor left.
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
    fn the_number_of_connections_is_lowered_only_if_the_limit_is_too_low() {
        assert_eq!(fitting_connections(1 << 20, 60, 4_096, 2_048), 4_096);
        assert_eq!(fitting_connections(1_024, 60, 4_096, 2_048), 600);
        assert_eq!(fitting_connections(128, 60, 4_096, 2_048), 34);
        assert_eq!(fitting_connections(64, 60, 4_096, 2_048), 1);
        assert_eq!(fitting_connections(1_024, 60, 100, 2_048), 100);
    }

    proptest! {
        #[test]
        fn connections_and_engines_never_use_the_last_descriptors(
            limit: u64, open in 0_u64..10_000, wanted in 1_u32.., in_flight in 1_u32..
        ) {
            let connections = fitting_connections(limit, open, wanted, in_flight);
            prop_assert!((1..=wanted).contains(&connections));
            if connections > 1 {
                let left = limit - open - u64::from(connections);
                prop_assert!(left >= MIN_SPARE_COUNT, "{left} are left for the rest");
                let engines = u64::from(in_flight).min(u64::from(connections) / 2);
                prop_assert!(left >= engines, "{left} are left for {engines} engines");
            }
        }
    }

    #[tokio::test]
    async fn a_reserve_refills_itself() {
        let reserve = DescriptorReserve::new();
        for _ in 0..RESERVE_SIZE {
            assert!(reserve.release_one());
        }
        assert!(!reserve.release_one());
        reserve.fill();
        assert_eq!(reserve.0.lock().unwrap().len(), RESERVE_SIZE);
    }
}
