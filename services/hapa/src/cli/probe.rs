//! `hapa probe`: whether a service can work, as its gRPC health says it. An image without a shell has
//! no other way to ask.

use std::time::Duration;

use anyhow::Context as _;
use tokio::time::timeout;
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;

use crate::cli::{Failure, connection};

/// The checks behind the answer ran before the question.
const PATIENCE: Duration = Duration::from_secs(2);

#[derive(clap::Args, Clone, Debug)]
#[group(id = "probe_args")]
pub(super) struct Args {
    #[command(flatten)]
    place: connection::Place,
    /// Such as hapa.auth.v1.KeyService; default: the process as a whole.
    #[arg(long, default_value = "")]
    service: String,
}

pub(super) async fn probe(args: &Args) -> Result<(), Failure> {
    let asked = async {
        let mut client = HealthClient::new(args.place.as_nobody().await?);
        let request = HealthCheckRequest { service: args.service.clone() };
        let reply = client.check(request).await.context("health can't be asked")?;
        Ok::<_, Failure>(reply.into_inner().status())
    };
    match timeout(PATIENCE, asked).await.context("no answer in time")?? {
        ServingStatus::Serving => Ok(()),
        status => Err(anyhow::anyhow!("{}", status.as_str_name().to_lowercase()).into()),
    }
}
