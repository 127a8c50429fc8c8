//! The looks of `hapa doctor` at what a process needs of its machine: descriptors, a folder of its own, a place for
//! its log, stores that are whole, and the pepper that they were made with.

use std::fs::OpenOptions;
use std::path::Path;

use hapa_server::file_descriptors;
use hapa_store::{file_lock, open};

use super::{Finding, State};
use crate::Roles;

/// What stores are called in the report.
const STORES: [&str; 3] = ["auth", "errors", "analytics"];

pub(super) fn process(roles: &Roles) -> Vec<Finding> {
    let mut findings = vec![descriptors(roles), folder(&roles.server.common.data_dir)];
    findings.extend(roles.server.log.log_file.as_deref().and_then(log_file));
    for service in STORES {
        let url = roles.server.common.store_url(service);
        let what = format!("file of the store of {service}");
        if let Some(problem) = open::problem_of(&url) {
            let advice = "keep a copy, and restore a backup. Runbook, damaged stores";
            findings.push(Finding::ill(what.as_str(), problem, advice));
        }
        for aside in open::set_aside_at(&url) {
            let advice = "recover what it holds, and move it away. Runbook, damaged stores";
            let found = format!("{} was damaged and set aside", aside.display());
            findings.push(Finding::ill(what.as_str(), found, advice));
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
                format!("{limit} at most, and MAX_CONNECTIONS and MAX_IN_FLIGHT need {needed}");
            // Nothing is broken: the process takes fewer.
            Finding::note(what, found, "raise the limit (ulimit -Hn, LimitNOFILE), or lower these")
        }
        Some(limit) => Finding::well(what, format!("{limit} at most, {needed} are needed")),
        None => Finding::well(what, format!("no limit, {needed} are needed")),
    }
}

fn folder(folder: &Path) -> Finding {
    let what = format!("use of {}", folder.display());
    match file_lock::holders_of(folder) {
        Some(holders) => Finding::well(what, format!("by {holders}")),
        None => Finding::absent(what, "by no process"),
    }
}

/// Nothing is made: what is not there yet is made by a role.
fn log_file(path: &Path) -> Option<Finding> {
    let what = format!("LOG_FILE {}", path.display());
    if path.as_os_str().is_empty() {
        return None;
    }
    Some(match OpenOptions::new().append(true).open(path) {
        Ok(_) => Finding::well(what, "can be written to"),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            Finding::absent(what, "not made yet; a role does when it starts")
        }
        Err(error) => Finding::ill(what, error.to_string(), "may this user write there?"),
    })
}

/// Of a store that was found to be up to date.
pub(super) async fn pepper(roles: &Roles, found: &[Finding]) -> Option<Finding> {
    let auth = roles.auth.as_ref()?;
    let mut stores = found.iter().filter(|finding| finding.what == "store of auth");
    let is_up_to_date = |store: &Finding| match store.state {
        State::Well => true,
        // Slow, and nothing else.
        State::Note => !store.found.contains("migration"),
        State::Ill | State::Absent => false,
    };
    if !stores.any(is_up_to_date) {
        return None;
    }
    let advice = "set the one before, or accept the loss. Runbook, E4003";
    Some(match hapa_auth::pepper_is_known(auth, &roles.server.common).await {
        Ok(Some(true)) => Finding::well("pepper", "the one that stored keys were made with"),
        Ok(Some(false)) => {
            Finding::ill("pepper", "not the one that stored keys were made with", advice)
        }
        Ok(None) => Finding::absent("pepper", "not set, or nothing was kept under one yet"),
        Err(error) => Finding::ill("pepper", format!("{error:#}"), advice),
    })
}
