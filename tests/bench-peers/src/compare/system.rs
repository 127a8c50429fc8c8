//! The compared systems.

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

use crate::spec::Protocol;

/// A path from a client to the upstream, in the order of the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Deserialize, Serialize)]
pub(crate) enum System {
    /// The upstream itself.
    #[value(name = "upstream")]
    Upstream,
    /// `hapa all` with keys, limits, outbox and logs.
    #[value(name = "hapa")]
    Hapa,
    /// The same through the gateway, with gRPC.
    #[value(name = "gateway")]
    Gateway,
    /// The same through the gateway, with gRPC-Web.
    #[value(name = "gateway-web")]
    GatewayWeb,
    /// The least that a tonic relay does.
    #[value(name = "floor")]
    Floor,
    /// Envoy as a plain HTTP proxy.
    #[value(name = "envoy")]
    Envoy,
    /// The router of vLLM.
    #[value(name = "vllm-router")]
    VllmRouter,
    /// The Shepherd Model Gateway of SGLang.
    #[value(name = "smg")]
    Smg,
}

impl System {
    /// The name in the table.
    pub(crate) fn title(self) -> &'static str {
        match self {
            System::Upstream => "the upstream itself, SSE",
            System::Hapa => "HAPA, gRPC",
            System::Gateway => "HAPA, gateway, gRPC",
            System::GatewayWeb => "HAPA, gateway, gRPC-Web",
            System::Floor => "floor: a tonic relay, gRPC",
            System::Envoy => "plain Envoy, SSE",
            System::VllmRouter => "vllm-router, SSE",
            System::Smg => "smg, SSE",
        }
    }

    pub(crate) fn protocol(self) -> Protocol {
        match self {
            System::Hapa | System::Gateway | System::Floor => Protocol::Grpc,
            System::GatewayWeb => Protocol::GrpcWeb,
            System::Upstream | System::Envoy | System::VllmRouter | System::Smg => Protocol::OpenAi,
        }
    }

    /// Whether a known question has a cached answer.
    pub(crate) fn has_cache(self) -> bool {
        matches!(self, System::Hapa | System::Gateway | System::GatewayWeb)
    }
}
