//! The base URL of an engine's API. A setting may name it with or without `/v1`, and may end with the path
//! of an operation. The engine's reply to the first request for its models decides.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use reqwest::Url;

/// Paths that a copied URL may end with.
const OPERATION_PATHS: [&str; 3] = ["/chat/completions", "/completions", "/models"];
const VERSION_PATH: &str = "/v1";

#[derive(Debug)]
pub(crate) struct BaseUrl {
    /// The URL as it was set, and with or without `/v1`; neither has a query or a final slash.
    candidates: [Url; 2],
    /// Query of every request, such as `api-version=…` of Azure.
    query: Option<String>,
    /// The path of an operation was removed from the setting.
    is_stripped: bool,
    /// Index of the candidate in use.
    chosen: AtomicUsize,
    /// The engine has listed its models below a candidate.
    is_confirmed: AtomicBool,
}

impl BaseUrl {
    /// Parses an absolute URL with a host. Error texts continue a sentence.
    pub(crate) fn parse(text: &str) -> Result<BaseUrl, String> {
        let mut base: Url =
            text.trim().parse().map_err(|error| format!("is not a URL: {error}"))?;
        if base.cannot_be_a_base() || !base.has_host() {
            return Err("has no host".to_owned());
        }
        let query = base.query().filter(|query| !query.is_empty()).map(str::to_owned);
        base.set_query(None);
        base.set_fragment(None);
        let path = base.path().trim_end_matches('/');
        let stripped = OPERATION_PATHS.iter().find_map(|end| path.strip_suffix(end));
        let is_stripped = stripped.is_some();
        let path = stripped.unwrap_or(path).trim_end_matches('/').to_owned();
        let mut other = base.clone();
        base.set_path(&path);
        match path.strip_suffix(VERSION_PATH) {
            Some(without) => other.set_path(without),
            None => other.set_path(&(path + VERSION_PATH)),
        }
        let (chosen, is_confirmed) = (AtomicUsize::new(0), AtomicBool::new(false));
        Ok(BaseUrl { candidates: [base, other], query, is_stripped, chosen, is_confirmed })
    }

    /// The URL as it was set.
    pub(crate) fn configured(&self) -> &Url {
        &self.candidates[0]
    }

    /// The URL of a path below the base URL.
    pub(super) fn join(&self, path: &str) -> Url {
        self.join_candidate(self.chosen(), path)
    }

    /// The same below the other candidate, and its index.
    pub(super) fn join_other(&self, path: &str) -> (usize, Url) {
        let other = 1 - self.chosen();
        (other, self.join_candidate(other, path))
    }

    /// The URL of a path beside `/v1`.
    pub(super) fn join_beside(&self, path: &str) -> Url {
        let base = &self.candidates[self.chosen()];
        let root = base.path().trim_end_matches('/');
        self.with_path(&format!("{}/{path}", root.strip_suffix(VERSION_PATH).unwrap_or(root)))
    }

    /// Uses a candidate from now on. Returns its text, without credentials and query, if it differs from the setting and
    /// was not returned yet.
    pub(super) fn confirm(&self, candidate: usize) -> Option<String> {
        let before = self.chosen.swap(candidate, Ordering::Relaxed);
        let is_first = !self.is_confirmed.swap(true, Ordering::Relaxed);
        let is_new = before != candidate || (is_first && self.is_stripped);
        is_new.then(|| self.shown(candidate))
    }

    /// The confirmed base URL, without credentials and query, if it differs from the setting.
    pub(super) fn found(&self) -> Option<String> {
        let chosen = self.chosen();
        let is_found = self.is_confirmed.load(Ordering::Relaxed);
        (is_found && (chosen != 0 || self.is_stripped)).then(|| self.shown(chosen))
    }

    fn shown(&self, candidate: usize) -> String {
        let mut shown = self.candidates[candidate].clone();
        // Both fail only for URLs without a host.
        let _ = shown.set_username("");
        let _ = shown.set_password(None);
        shown.as_str().trim_end_matches('/').to_owned()
    }

    pub(super) fn chosen(&self) -> usize {
        self.chosen.load(Ordering::Relaxed)
    }

    fn join_candidate(&self, candidate: usize, path: &str) -> Url {
        let base = self.candidates[candidate].path().trim_end_matches('/');
        self.with_path(&format!("{base}/{path}"))
    }

    fn with_path(&self, path: &str) -> Url {
        let mut url = self.configured().clone();
        url.set_path(path);
        url.set_query(self.query.as_deref());
        url
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn copied_urls_and_final_slashes_name_the_same_base() {
        for text in [
            "http://h:1/v1",
            "http://h:1/v1/",
            "http://h:1/v1//",
            " http://h:1/v1/chat/completions",
            "http://h:1/v1/completions/",
            "http://h:1/v1/models#part",
        ] {
            let base = BaseUrl::parse(text).unwrap();
            assert_eq!(base.join("models").as_str(), "http://h:1/v1/models", "{text}");
            assert_eq!(base.join_other("models").1.as_str(), "http://h:1/models", "{text}");
            assert_eq!(base.join_beside("metrics").as_str(), "http://h:1/metrics", "{text}");
        }
        for text in ["http://h:1", "http://h:1/", "http://h:1/chat/completions"] {
            let base = BaseUrl::parse(text).unwrap();
            assert_eq!(base.join("models").as_str(), "http://h:1/models", "{text}");
            let (other, url) = base.join_other("models");
            assert_eq!(url.as_str(), "http://h:1/v1/models", "{text}");
            base.confirm(other);
            assert_eq!(base.join("completions").as_str(), "http://h:1/v1/completions", "{text}");
            assert_eq!(base.join_beside("metrics").as_str(), "http://h:1/metrics", "{text}");
        }
    }

    #[test]
    fn the_query_is_kept_for_every_request() {
        let text = "https://x.openai.azure.com/openai/deployments/d/chat/completions?api-version=1";
        let base = BaseUrl::parse(text).unwrap();
        let expected = "https://x.openai.azure.com/openai/deployments/d/completions?api-version=1";
        assert_eq!(base.join("completions").as_str(), expected);
        assert!(base.join_other("models").1.as_str().ends_with("/d/v1/models?api-version=1"));
    }

    #[test]
    fn the_found_base_is_shown_once_and_without_credentials() {
        let base = BaseUrl::parse("http://me:hunter2@h:1/x?key=hunter3").unwrap();
        let (other, _) = base.join_other("models");
        assert_eq!(base.found(), None);
        assert_eq!(base.confirm(other).as_deref(), Some("http://h:1/x/v1"));
        assert_eq!(base.confirm(other), None);
        assert_eq!(base.found().as_deref(), Some("http://h:1/x/v1"));
        assert!(base.join("models").as_str().contains("hunter2"));
    }

    #[test]
    fn a_base_that_differs_from_the_setting_is_found_once_the_engine_has_confirmed_it() {
        for (text, found) in [
            ("http://h:1/v1/", None),
            ("http://h:1", None),
            ("http://h:1/v1/chat/completions", Some("http://h:1/v1")),
        ] {
            let base = BaseUrl::parse(text).unwrap();
            assert_eq!(base.found(), None, "{text}");
            for expected in [found, None] {
                assert_eq!(base.confirm(0).as_deref(), expected, "{text}");
                assert_eq!(base.found().as_deref(), found, "{text}");
            }
        }
    }

    #[test]
    fn a_text_without_a_host_is_rejected() {
        for text in ["", "nowhere", "h:1", "mailto:a@b", "http://"] {
            assert!(BaseUrl::parse(text).is_err(), "{text}");
        }
    }
}
