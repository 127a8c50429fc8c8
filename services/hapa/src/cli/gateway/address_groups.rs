//! Connection limits for groups of client addresses, as fragments of Envoy's configuration.
//!
//! Envoy limits connections per filter chain, not per address. The listener therefore has
//! [`GROUP_COUNT`] equal filter chains, and a hash of the client's address chooses one of them.

/// Number of filter chains. Each costs Envoy about 1 MiB.
const GROUP_COUNT: u32 = 16;
/// Time in which a group may reopen all its connections, in seconds.
const REFILL_SECONDS: u32 = 8;

/// The groups of client addresses of one gateway.
pub(super) struct AddressGroups {
    /// Maximum number of connections of one group.
    pub(super) connections: u32,
    /// Whether the listener terminates TLS.
    pub(super) has_tls: bool,
    /// Differs from gateway to gateway, so that clients cannot compute which addresses share a group.
    pub(super) seed: u32,
}

impl AddressGroups {
    /// New connections per second of one group after its burst.
    pub(super) fn rate(&self) -> u32 {
        (self.connections / REFILL_SECONDS).max(1)
    }

    /// The matchers that map an address to the filter chain of its group.
    pub(super) fn matchers(&self) -> String {
        let matcher = |group: u32| {
            // A matcher accepts hashes from its threshold upwards, and the first match wins.
            let threshold = GROUP_COUNT - 1 - group;
            let seed = self.seed;
            format!(
                "{{predicate: {{single_predicate: {{input: {{name: source, typed_config: {{\"@type\": \
                 type.googleapis.com/envoy.extensions.matching.common_inputs.network.v3.SourceIPInput}}}}, \
                 custom_match: {{name: hash, typed_config: {{\"@type\": \
                 type.googleapis.com/envoy.extensions.matching.input_matchers.consistent_hashing.v3.ConsistentHashing, \
                 threshold: {threshold}, modulo: {GROUP_COUNT}, seed: {seed}}}}}}}}}, \
                 on_match: {{action: {{name: addresses-{group}, typed_config: \
                 {{\"@type\": type.googleapis.com/google.protobuf.StringValue, value: addresses-{group}}}}}}}}}"
            )
        };
        format!("[{}]", (0..GROUP_COUNT).map(matcher).collect::<Vec<_>>().join(", "))
    }

    /// The filter chains of all groups but the first, which the template contains. They are items of a YAML list whose
    /// first dash is in the template.
    pub(super) fn further_chains(&self) -> String {
        let tls = if self.has_tls { ", transport_socket: *public_tls" } else { "" };
        let chain = |group: u32| {
            format!(
                "{{name: addresses-{group}, transport_socket_connect_timeout: 10s, \
                 filters: [*connections, *connection_rate, *http]{tls}}}"
            )
        };
        (1..GROUP_COUNT).map(chain).collect::<Vec<_>>().join("\n        - ")
    }
}
