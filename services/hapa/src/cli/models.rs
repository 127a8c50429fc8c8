//! `hapa models`: which models and adapters the engines serve, what each is for, and how it is doing.

use std::io::Write as _;

use hapa_proto::codegen::v1::codegen_service_client::CodegenServiceClient;
use hapa_proto::codegen::v1::{ListModelsRequest, Model};

use super::table::table;
use super::{Failure, connection, json};

#[derive(clap::Args, Clone, Debug)]
#[group(id = "models_args")]
pub(super) struct Args {
    /// Each model as a line of JSON.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    connection: connection::Args,
}

pub(super) async fn models(args: Args) -> Result<(), Failure> {
    let mut client = CodegenServiceClient::new(args.connection.as_user().await?);
    let models = client.list_models(ListModelsRequest {}).await?.into_inner().models;
    let mut out = std::io::stdout();
    if args.json {
        for model in &models {
            writeln!(out, "{}", json::json(model)?)?;
        }
        return Ok(());
    }
    let header = ["MODEL", "ADAPTER OF", "TASKS", "STATUS", "ENGINES", "IN MEMORY", "CONTEXT"];
    writeln!(out, "{}", table(header, models.into_iter().map(row)))?;
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
