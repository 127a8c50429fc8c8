//! Bounds for groups of client addresses, as parts of Envoy's configuration.
//!
//! Envoy bounds connections for each filter chain and not for each address. The listener therefore has
//! [`GROUPS`] equal filter chains, and a hash of the client's address chooses one of them.

/// Number of filter chains. Each costs Envoy about 1 MiB.
const GROUPS: u32 = 16;
/// The connections of a group may be opened anew in so many seconds.
const REFILL_SECONDS: u32 = 8;

/// The client addresses of one gateway, in groups.
pub(super) struct AddressGroups {
    /// Connections that one group may hold.
    pub(super) connections: u32,
    /// Whether the listener terminates TLS.
    pub(super) has_tls: bool,
    /// Differs from gateway to gateway, so that clients can't tell which addresses share a group.
    pub(super) seed: u32,
}

impl AddressGroups {
    /// New connections a group may open each second, once its burst is used up.
    pub(super) fn rate(&self) -> u32 {
        (self.connections / REFILL_SECONDS).max(1)
    }

    /// The matchers that send an address to the filter chain of its group.
    pub(super) fn matchers(&self) -> String {
        let matcher = |group: u32| {
            // A matcher fits from its threshold upwards, and the first that fits counts.
            let threshold = GROUPS - 1 - group;
            let seed = self.seed;
            format!(
                "{{predicate: {{single_predicate: {{input: {{name: source, typed_config: {{\"@type\": \
                 type.googleapis.com/envoy.extensions.matching.common_inputs.network.v3.SourceIPInput}}}}, \
                 custom_match: {{name: hash, typed_config: {{\"@type\": \
                 type.googleapis.com/envoy.extensions.matching.input_matchers.consistent_hashing.v3.ConsistentHashing, \
                 threshold: {threshold}, modulo: {GROUPS}, seed: {seed}}}}}}}}}, \
                 on_match: {{action: {{name: addresses-{group}, typed_config: \
                 {{\"@type\": type.googleapis.com/google.protobuf.StringValue, value: addresses-{group}}}}}}}}}"
            )
        };
        format!("[{}]", (0..GROUPS).map(matcher).collect::<Vec<_>>().join(", "))
    }

    /// The filter chains of all groups but the first, which the template spells out: items of a YAML list
    /// whose first dash stands in the template.
    pub(super) fn further_chains(&self) -> String {
        let tls = if self.has_tls { ", transport_socket: *public_tls" } else { "" };
        let chain = |group: u32| {
            format!(
                "{{name: addresses-{group}, transport_socket_connect_timeout: 10s, \
                 filters: [*connections, *connection_rate, *http]{tls}}}"
            )
        };
        (1..GROUPS).map(chain).collect::<Vec<_>>().join("\n        - ")
    }
}
