//! The checks of `hapa doctor` for what a process needs from its machine: file descriptors, the data directory, the
//! log file, intact stores, and the pepper of the stored keys.

use std::fs::OpenOptions;
use std::path::Path;

use hapa_server::file_descriptors;
use hapa_store::{file_lock, open};

use super::{CheckState, Finding};
use crate::Roles;

/// The services with a store.
const STORES: [&str; 3] = ["auth", "errors", "analytics"];

pub(super) fn process(roles: &Roles) -> Vec<Finding> {
    let mut findings = vec![descriptors(roles), folder(&roles.server.common.data_dir)];
    findings.extend(roles.server.log.log_file.as_deref().and_then(log_file));
    for service in STORES {
        let url = roles.server.common.store_url(service);
        let what = format!("file of the store of {service}");
        if let Some(problem) = open::problem_of(&url) {
            let advice = "keep a copy and restore a backup; see the runbook, damaged stores";
            findings.push(Finding::wrong(what.as_str(), problem, advice));
        }
        for aside in open::set_aside_at(&url) {
            let advice =
                "recover its content and move the file away; see the runbook, damaged stores";
            let found = format!("{} is damaged and was set aside", aside.display());
            findings.push(Finding::wrong(what.as_str(), found, advice));
        }
    }
    findings
}

fn descriptors(roles: &Roles) -> Finding {
    let (needed, limit) = (file_descriptors::needed(&roles.server), file_descriptors::hard_limit());
    let what = "descriptors";
    match limit {
        Some(limit) if limit < needed => {
            let found =
                format!("the limit is {limit}; MAX_CONNECTIONS and MAX_IN_FLIGHT need {needed}");
            // Not an error: the process accepts fewer connections.
            let advice = "raise the limit (ulimit -Hn, LimitNOFILE) or lower these settings";
            Finding::note(what, found, advice)
        }
        Some(limit) => Finding::ok(what, format!("the limit is {limit}; {needed} are needed")),
        None => Finding::ok(what, format!("no limit; {needed} are needed")),
    }
}

fn folder(folder: &Path) -> Finding {
    let what = format!("use of {}", folder.display());
    match file_lock::holders_of(folder) {
        Some(holders) => Finding::ok(what, format!("used by {holders}")),
        None => Finding::absent(what, "no process uses it"),
    }
}

/// Opens the file without creating it.
fn log_file(path: &Path) -> Option<Finding> {
    let what = format!("LOG_FILE {}", path.display());
    if path.as_os_str().is_empty() {
        return None;
    }
    Some(match OpenOptions::new().append(true).open(path) {
        Ok(_) => Finding::ok(what, "writable"),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            Finding::absent(what, "does not exist yet; a role creates it at start-up")
        }
        Err(error) => Finding::wrong(what, error.to_string(), "give this user write permission"),
    })
}

/// Compares the pepper with the auth store, if that is up to date.
pub(super) async fn pepper(roles: &Roles, findings: &[Finding]) -> Option<Finding> {
    let auth = roles.auth.as_ref()?;
    let mut stores = findings.iter().filter(|finding| finding.what == "store of auth");
    let is_up_to_date = |store: &Finding| match store.state {
        CheckState::Ok => true,
        // A slow store is up to date; one with pending migrations is not.
        CheckState::Note => !store.found.contains("migration"),
        CheckState::Wrong | CheckState::Absent => false,
    };
    if !stores.any(is_up_to_date) {
        return None;
    }
    let advice = "set the previous pepper, or accept the loss of keys; see the runbook, E4003";
    Some(match hapa_auth::pepper_is_known(auth, &roles.server.common).await {
        Ok(Some(true)) => Finding::ok("pepper", "matches the stored keys"),
        Ok(Some(false)) => Finding::wrong("pepper", "does not match the stored keys", advice),
        Ok(None) => Finding::absent("pepper", "not set, or no key is stored yet"),
        Err(error) => Finding::wrong("pepper", format!("{error:#}"), advice),
    })
}
