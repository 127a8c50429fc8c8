//! The idempotency key of a command that can be repeated.

use hapa_core::idempotency::HEADER;
use tonic::Request;
use tonic::metadata::{Ascii, MetadataValue};

use crate::cli::Failure;

/// The key that a repeated command is recognised by.
#[derive(clap::Args, Clone, Debug)]
#[group(id = "once_args")]
pub(super) struct Args {
    /// Key of this command, 1 to 128 visible ASCII characters: repeated with the same key and
    /// arguments within 24 hours, it changes nothing and prints the first result again.
    #[arg(long, value_name = "KEY")]
    idempotency_key: Option<String>,
}

impl Args {
    /// The request with its key.
    pub(super) fn request<T>(&self, message: T) -> Result<Request<T>, Failure> {
        let mut request = Request::new(message);
        if let Some(key) = &self.idempotency_key {
            let value = key.parse();
            let value: MetadataValue<Ascii> = value.map_err(|_| {
                anyhow::anyhow!("--idempotency-key must be 1 to 128 visible ASCII characters")
            })?;
            request.metadata_mut().insert(HEADER, value);
        }
        Ok(request)
    }
}
