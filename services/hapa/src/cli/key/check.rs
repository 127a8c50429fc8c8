//! `hapa key check`.

use std::io::Write as _;
use std::path::PathBuf;

use hapa_proto::codegen::v1::GetCodeHealthRequest;
use hapa_proto::codegen::v1::codegen_service_client::CodegenServiceClient;

use crate::cli::{Failure, connection};

/// Say whether the key in a file works.
#[derive(clap::Args, Clone, Debug)]
#[group(id = "key_check_args")]
pub(in crate::cli) struct Args {
    /// The file that holds the key's text.
    #[arg(long, value_name = "FILE", default_value = "data/dev-key")]
    file: PathBuf,
    #[command(flatten)]
    connection: connection::Args,
}

pub(super) async fn check(args: Args) -> Result<(), Failure> {
    let mut client = CodegenServiceClient::new(args.connection.as_holder(&args.file).await?);
    client.get_code_health(GetCodeHealthRequest {}).await?;
    writeln!(std::io::stdout(), "the key in {} works", args.file.display())?;
    Ok(())
}
