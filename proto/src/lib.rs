//! Messages, clients and servers that prost and tonic generate from `proto/hapa`, and the descriptor
//! set of all packages.
#![allow(missing_docs, clippy::pedantic)]

/// Binary `FileDescriptorSet` of every package of the mesh and of the `google.rpc` error details.
pub const FILE_DESCRIPTOR_SET: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/hapa.binpb"));

pub mod user_profile;

pub use hapa::{analytics, auth, codegen, errors, system};

// The modules are nested like the packages, because generated code refers to other packages by
// relative paths.
mod hapa {
    pub mod analytics {
        pub mod v1 {
            tonic::include_proto!("hapa.analytics.v1");
        }
    }

    pub mod auth {
        pub mod v1 {
            tonic::include_proto!("hapa.auth.v1");
        }
    }

    pub mod codegen {
        pub mod v1 {
            tonic::include_proto!("hapa.codegen.v1");
        }
    }

    pub mod errors {
        pub mod v1 {
            tonic::include_proto!("hapa.errors.v1");
        }
    }

    pub mod system {
        pub mod v1 {
            tonic::include_proto!("hapa.system.v1");
        }
    }
}

pub mod google {
    pub mod api {
        tonic::include_proto!("google.api");
    }
}
