//! Decodes arbitrary bytes as the request of every RPC, and runs codegen's request validation on them.
#![no_main]

use std::sync::LazyLock;

use prost_reflect::{DescriptorPool, DynamicMessage, MessageDescriptor};

static REQUESTS: LazyLock<Vec<MessageDescriptor>> = LazyLock::new(|| {
    let pool = DescriptorPool::decode(hapa_proto::FILE_DESCRIPTOR_SET)
        .expect("hapa-proto embeds a valid descriptor set");
    let services = pool.services().filter(|service| service.full_name().starts_with("hapa."));
    services.flat_map(|service| service.methods().map(|rpc| rpc.input()).collect::<Vec<_>>()).collect()
});

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    for message in &*REQUESTS {
        let _ = DynamicMessage::decode(message.clone(), bytes);
    }
    hapa_codegen::fuzz::requests(bytes);
});
