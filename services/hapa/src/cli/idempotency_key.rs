//! The idempotency key of a command that a script may repeat.

use hapa_core::idempotency::HEADER;
use tonic::Request;
use tonic::metadata::{Ascii, MetadataValue};

use crate::cli::CliError;

#[derive(clap::Args, Clone, Debug)]
pub(super) struct IdempotencyArgs {
    /// Idempotency key, 1 to 128 visible ASCII characters. A command repeated with the same key and
    /// arguments within 24 hours changes nothing and prints the first result again.
    #[arg(long, value_name = "KEY")]
    idempotency_key: Option<String>,
}

impl IdempotencyArgs {
    /// The request with its idempotency key in the metadata.
    pub(super) fn request<T>(&self, message: T) -> Result<Request<T>, CliError> {
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
