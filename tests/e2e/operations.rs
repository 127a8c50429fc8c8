//! Processes: start, stop, health, logs, traces, stores, disks and what manifests configure.

mod container_commands;
mod data_dir;
mod full_disk;
mod health;
mod lifecycle;
mod logs;
mod make_run;
mod manifests;
mod pasted_settings;
mod renamed_settings;
mod stores;
mod traces;
