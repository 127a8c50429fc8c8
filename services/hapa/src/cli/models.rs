//! `hapa models`: the models and adapters of the engines, with their tasks and health, and for operators what was
//! learned of the engines.

use std::io::Write as _;

use hapa_proto::codegen::v1::codegen_service_client::CodegenServiceClient;
use hapa_proto::codegen::v1::{EngineFindings, ListModelsRequest, Model};

use crate::cli::connection::ConnectionArgs;
use crate::cli::table::table;
use crate::cli::{CliError, json};

#[derive(clap::Args, Clone, Debug)]
pub(super) struct ModelsArgs {
    /// Print one JSON object per model, without the engines.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    connection: ConnectionArgs,
}

pub(super) async fn models(args: ModelsArgs) -> Result<(), CliError> {
    let mut client = CodegenServiceClient::new(args.connection.connect_as_user().await?);
    let listed = client.list_models(ListModelsRequest {}).await?.into_inner();
    if args.json {
        return json::print_lines(&listed.models);
    }
    let mut out = std::io::stdout();
    let header = ["MODEL", "ADAPTER OF", "TASKS", "STATUS", "ENGINES", "IN MEMORY", "CONTEXT"];
    writeln!(out, "{}", table(header, listed.models.into_iter().map(row)))?;
    if !listed.engine_findings.is_empty() {
        let header = ["ENGINE", "BASE URL FOUND", "REQUEST FIELDS LEFT OUT"];
        writeln!(out, "\n{}", table(header, listed.engine_findings.into_iter().map(engine_row)))?;
    }
    Ok(())
}

fn engine_row(findings: EngineFindings) -> [String; 3] {
    let fields = findings.unsupported_fields.join(", ");
    [findings.name, or_dash(findings.base_url), or_dash(fields)]
}

fn or_dash(text: String) -> String {
    if text.is_empty() { "-".to_owned() } else { text }
}

fn row(model: Model) -> [String; 7] {
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
