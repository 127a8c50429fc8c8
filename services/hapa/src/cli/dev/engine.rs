//! The engine behind the mesh of `hapa dev`.

use std::path::Path;
use std::str::FromStr;

use anyhow::Context as _;
use tokio::process::Command;

use super::require_file;

/// File name of the engine simulator; it is expected beside this binary.
const SIMULATOR: &str = "hapa-engine-sim";

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Engine {
    /// SmolLM2-135M behind llama.cpp, on this machine.
    Model,
    /// The scripted engine simulator of the tests.
    Sim,
    /// A running OpenAI-compatible server.
    Url(String),
}

impl FromStr for Engine {
    type Err = String;

    fn from_str(text: &str) -> Result<Engine, String> {
        match text {
            "model" => Ok(Engine::Model),
            "sim" => Ok(Engine::Sim),
            url if url.starts_with("http://") || url.starts_with("https://") => {
                Ok(Engine::Url(url.to_owned()))
            }
            _ => Err("must be model, sim, or a URL such as http://127.0.0.1:8000/v1".to_owned()),
        }
    }
}

impl Engine {
    pub(super) fn description(&self) -> &str {
        match self {
            Engine::Model => "SmolLM2-135M",
            Engine::Sim => "the engine simulator",
            Engine::Url(url) => url,
        }
    }
}

pub(super) fn model_command(repository: &Path, port: u16) -> anyhow::Result<Command> {
    let python = repository.join(".tools/python/bin/python");
    require_file(&python, "infra/tools/install run")?;
    let mut command = Command::new(python);
    command.arg(repository.join("infra/model/serve.py")).args(["--port", &port.to_string()]);
    Ok(command)
}

pub(super) fn simulator_command(port: u16) -> anyhow::Result<Command> {
    let hapa = std::env::current_exe().context("cannot find the path of this binary")?;
    let simulator = hapa.with_file_name(SIMULATOR);
    require_file(&simulator, "cargo build --package hapa-engine-sim")?;
    let mut command = Command::new(simulator);
    command.args(["--port", &port.to_string()]);
    Ok(command)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_engine_is_the_model_the_simulator_or_a_url() {
        assert_eq!("model".parse(), Ok(Engine::Model));
        assert_eq!("sim".parse(), Ok(Engine::Sim));
        let url = "https://gpu-box:8000/v1";
        assert_eq!(url.parse(), Ok(Engine::Url(url.to_owned())));
        assert!("gpu-box:8000".parse::<Engine>().is_err());
    }
}
