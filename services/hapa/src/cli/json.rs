//! Protobuf messages as canonical JSON, in the form that the gateway's JSON API returns.

use std::io::Write as _;

use anyhow::Context as _;
use hapa_proto::FILE_DESCRIPTOR_SET;
use prost_reflect::prost::{Message, Name};
use prost_reflect::{DescriptorPool, DynamicMessage, SerializeOptions};

use crate::cli::CliError;

/// Prints a message to standard output as one line of JSON.
pub(super) fn print<M: Message + Name>(message: &M) -> Result<(), CliError> {
    writeln!(std::io::stdout(), "{}", to_json(message)?)?;
    Ok(())
}

/// Prints one line of JSON per message.
pub(super) fn print_lines<M: Message + Name>(messages: &[M]) -> Result<(), CliError> {
    messages.iter().try_for_each(print)
}

/// Serialises a message with the field names of the .proto file; fields with default values are included.
fn to_json<M: Message + Name>(message: &M) -> anyhow::Result<String> {
    let pool = DescriptorPool::decode(FILE_DESCRIPTOR_SET)?;
    let name = M::full_name();
    let descriptor =
        pool.get_message_by_name(&name).with_context(|| format!("unknown message type {name}"))?;
    let message = DynamicMessage::decode(descriptor, message.encode_to_vec().as_slice())?;
    let options = SerializeOptions::new().use_proto_field_name(true).skip_default_fields(false);
    let mut text = Vec::new();
    message.serialize_with_options(&mut serde_json::Serializer::new(&mut text), &options)?;
    Ok(String::from_utf8(text)?)
}
