//! The state that the layers of one server share.

use std::sync::Arc;
use std::time::Duration;

use hapa_core::access::AccessTable;
use ipnet::IpNet;
use tokio::sync::Semaphore;

use crate::middleware::admission::Admission;
use crate::middleware::public_calls::PublicCalls;
use crate::outbox::Outbox;

/// The state of the layers of one server.
pub(crate) struct SharedState {
    pub(crate) table: AccessTable,
    /// The maximum duration of a call, whatever its client allows.
    pub(crate) request_timeout: Duration,
    /// Networks of proxies with a trusted `x-forwarded-for` header.
    pub(crate) trusted_proxies: Vec<IpNet>,
    /// One permit for each call in progress with a credential.
    pub(crate) in_flight: Arc<Semaphore>,
    pub(crate) public_calls: PublicCalls,
    /// One permit for each byte of request messages that are being received.
    pub(crate) request_memory: Arc<Semaphore>,
    pub(crate) admission: Admission,
    pub(crate) outbox: Outbox,
    /// Calls that take longer are logged as slow. `None`: no call is.
    pub(crate) slow_call_threshold: Option<Duration>,
}
