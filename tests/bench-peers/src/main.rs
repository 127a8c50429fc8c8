//! The comparison of HAPA with its peers: what each adds to an upstream, in one run on one machine.
//!
//! The binary has four roles. Without a command it compares. It starts itself again as the upstream simulator, the
//! floor and the load generator, so that the processor time of each is its own. All processes use loopback only.

mod compare;
mod floor;
mod load;
mod process;
mod sim_text;
mod spec;
mod upstream;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

use crate::compare::CompareArgs;

/// Worker threads of the simulator, the floor and the load generator.
const THREAD_COUNT: usize = 2;

/// Compares HAPA with its peers.
#[derive(Debug, Parser)]
struct Args {
    #[command(subcommand)]
    role: Option<Role>,
    #[command(flatten)]
    compare: CompareArgs,
}

#[derive(Debug, Subcommand)]
enum Role {
    /// Runs as the upstream simulator.
    #[command(hide = true)]
    Upstream {
        /// Port on loopback.
        port: u16,
    },
    /// Runs as the floor.
    #[command(hide = true)]
    Floor {
        /// Port on loopback.
        port: u16,
        /// Port of the upstream.
        upstream: u16,
    },
    /// Runs as the load generator, which reads a specification from standard input.
    #[command(hide = true)]
    Load,
}

fn main() -> ExitCode {
    run(Args::parse()).unwrap_or_else(|error| {
        eprintln!("{error:#}");
        ExitCode::FAILURE
    })
}

fn run(args: Args) -> anyhow::Result<ExitCode> {
    let Some(role) = args.role else { return compare::run(&args.compare) };
    let mut runtime = tokio::runtime::Builder::new_multi_thread();
    let runtime = runtime.worker_threads(THREAD_COUNT).enable_all().build()?;
    runtime.block_on(async {
        match role {
            Role::Upstream { port } => upstream::serve(port).await,
            Role::Floor { port, upstream } => floor::serve(port, upstream).await,
            Role::Load => load::run().await,
        }
    })?;
    Ok(ExitCode::SUCCESS)
}
