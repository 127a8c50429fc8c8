//! `hapa models`: the models and adapters of the engines, with their tasks and health.

use std::io::Write as _;

use hapa_proto::codegen::v1::codegen_service_client::CodegenServiceClient;
use hapa_proto::codegen::v1::{ListModelsRequest, Model};

use crate::cli::connection::ConnectionArgs;
use crate::cli::table::table;
use crate::cli::{CliError, json};

#[derive(clap::Args, Clone, Debug)]
pub(super) struct ModelsArgs {
    /// Print one JSON object per model.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    connection: ConnectionArgs,
}

pub(super) async fn models(args: ModelsArgs) -> Result<(), CliError> {
    let mut client = CodegenServiceClient::new(args.connection.connect_as_user().await?);
    let models = client.list_models(ListModelsRequest {}).await?.into_inner().models;
    if args.json {
        return json::print_lines(&models);
    }
    let header = ["MODEL", "ADAPTER OF", "TASKS", "STATUS", "ENGINES", "IN MEMORY", "CONTEXT"];
    writeln!(std::io::stdout(), "{}", table(header, models.into_iter().map(row)))?;
    Ok(())
}

fn row(model: Model) -> [String; 7] {
    let or_dash = |text: String| if text.is_empty() { "-".to_owned() } else { text };
    let tasks = match (model.tasks.join(" "), model.default) {
        (tasks, false) => tasks,
        (tasks, true) if tasks.is_empty() => "all others".to_owned(),
        (tasks, true) => format!("{tasks} and all others"),
    };
    let context = match model.max_model_len {
        0 => String::new(),
        tokens => tokens.to_string(),
    };
    [
        model.name,
        or_dash(model.parent),
        or_dash(tasks),
        model.status,
        format!("{} of {}", model.replicas_healthy, model.replicas),
        model.replicas_resident.to_string(),
        or_dash(context),
    ]
}
