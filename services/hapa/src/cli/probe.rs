//! `hapa probe`: the gRPC health of a service as an exit code. Container images without a shell have no other
//! client for it.

use std::time::Duration;

use anyhow::Context as _;
use tokio::time::timeout;
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;

use crate::cli::CliError;
use crate::cli::connection::ServerAddress;

/// Short: a service answers from the results of checks that ran before.
const PROBE_TIMEOUT: Duration = Duration::from_secs(2);

#[derive(clap::Args, Clone, Debug)]
#[command(after_help = "Example:\n  hapa probe --service hapa.auth.v1.KeyService")]
pub(super) struct ProbeArgs {
    #[command(flatten)]
    server: ServerAddress,
    /// Full name of the gRPC service, such as hapa.auth.v1.KeyService; default: the process as a whole.
    #[arg(long, default_value = "", hide_default_value = true)]
    service: String,
}

pub(super) async fn probe(args: &ProbeArgs) -> Result<(), CliError> {
    let check = async {
        let mut client = HealthClient::new(args.server.connect_unauthenticated().await?);
        let request = HealthCheckRequest { service: args.service.clone() };
        let reply = client.check(request).await.context("the health check failed")?;
        Ok::<_, CliError>(reply.into_inner().status())
    };
    let late = || format!("no answer to the health check within {} s", PROBE_TIMEOUT.as_secs());
    match timeout(PROBE_TIMEOUT, check).await.with_context(late)?? {
        ServingStatus::Serving => Ok(()),
        status => Err(anyhow::anyhow!("{}", status.as_str_name().to_lowercase()).into()),
    }
}
