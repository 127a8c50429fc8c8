//! `hapa key check`.

use std::io::Write as _;
use std::path::PathBuf;

use hapa_proto::codegen::v1::GetCodeHealthRequest;
use hapa_proto::codegen::v1::codegen_service_client::CodegenServiceClient;

use crate::cli::CliError;
use crate::cli::connection::ConnectionArgs;

/// Check that the mesh accepts the key in a file; the exit code is 0 if it does.
#[derive(clap::Args, Clone, Debug)]
pub(in crate::cli) struct CheckKeyArgs {
    /// File with the key.
    #[arg(long, value_name = "FILE", default_value = "data/dev-key")]
    file: PathBuf,
    #[command(flatten)]
    connection: ConnectionArgs,
}

pub(super) async fn check(args: CheckKeyArgs) -> Result<(), CliError> {
    let connection = args.connection.connect_with_key_file(&args.file).await?;
    CodegenServiceClient::new(connection).get_code_health(GetCodeHealthRequest {}).await?;
    writeln!(std::io::stdout(), "the key in {} is valid", args.file.display())?;
    Ok(())
}
