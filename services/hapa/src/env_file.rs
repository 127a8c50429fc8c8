//! Settings in `.env` files of the working directory. Variables of the environment take precedence, and `.env.NAME`
//! over `.env`, where NAME is ENVIRONMENT in lower case.

use std::io::ErrorKind;
use std::path::Path;

use dotenvy::Error;

const ENVIRONMENT: &str = "ENVIRONMENT";
/// Commands that run, check or prepare a server. Commands of its users do not read the file, because they run in
/// directories of other projects.
const SERVER_COMMANDS: [&str; 11] = [
    "all",
    "auth",
    "codegen",
    "errors",
    "analytics",
    "config",
    "doctor",
    "migrate",
    "gateway",
    "dev",
    "probe",
];

/// Loads the files if this command uses them. An error names the file and never its contents.
pub(crate) fn load(command: Option<&str>) -> Result<(), String> {
    if command.is_none_or(|command| !SERVER_COMMANDS.contains(&command)) {
        return Ok(());
    }
    let path = Path::new(".env");
    // Not through clap, whose settings the file may change, and not through dotenvy, which would load `.env` first.
    let variable = std::env::vars_os().find(|(name, _)| name == ENVIRONMENT);
    let variable = variable.and_then(|(_, value)| value.into_string().ok());
    let environment = variable.or_else(|| environment_of(path));
    if let Some(name) =
        environment.filter(|name| name.bytes().all(|byte| byte.is_ascii_alphanumeric()))
    {
        load_file(&format!(".env.{}", name.to_ascii_lowercase()))?;
    }
    load_file(".env")
}

fn environment_of(path: &Path) -> Option<String> {
    if !path.is_file() {
        return None;
    }
    // Up to a line that can't be read, which the load of the file names.
    let mut variables = dotenvy::from_path_iter(path).ok()?.map_while(Result::ok);
    variables.find_map(|(name, value)| (name == ENVIRONMENT).then_some(value))
}

fn load_file(name: &str) -> Result<(), String> {
    let path = Path::new(name);
    // Python projects have virtual environments in folders of this name.
    if path.is_dir() {
        return Ok(());
    }
    match dotenvy::from_path(path) {
        Ok(()) => Ok(()),
        Err(Error::Io(error)) if error.kind() == ErrorKind::NotFound => Ok(()),
        Err(Error::Io(error)) => Err(format!("{name}: can't be read: {}", error.kind())),
        // The error repeats the line, which may hold a secret.
        Err(_) => {
            Err(format!("{name}: has a line that is not NAME=value; quote values with spaces"))
        }
    }
}
