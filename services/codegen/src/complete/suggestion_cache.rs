//! A cache of recent suggestions: if a user types the start of a suggestion, the cache returns its
//! remainder without a request to an engine. In memory, per caller and session or file, with a short TTL
//! and size limits; the oldest entries are evicted first.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use hapa_proto::codegen::v1::Suggestion;
use tokio::time::Instant;

use crate::complete::params::{CompletionOptions, CompletionParams};

const CACHE_NAME: &str = "completion";
/// Short, because the code around the cursor changes.
const ENTRY_TTL: Duration = Duration::from_mins(1);
const MAX_ENTRIES: usize = 10_000;
const MAX_BYTES: usize = 32 * 1024 * 1024;
/// Maximum number of entries of one scope that a lookup compares, newest first.
const MAX_COMPARED: usize = 32;

/// The caller, and its session or, without one, its file.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct SuggestionScope {
    actor: String,
    session_id: String,
    file_path: String,
}

impl SuggestionScope {
    pub(crate) fn new(actor: String, params: &CompletionParams) -> SuggestionScope {
        let file_path = match params.session_id.as_str() {
            "" => params.options.file_path.clone(),
            _ => String::new(),
        };
        SuggestionScope { actor, session_id: params.session_id.clone(), file_path }
    }
}

#[derive(Default)]
pub(crate) struct SuggestionCache(Mutex<CacheState>);

#[derive(Default)]
struct CacheState {
    by_scope: HashMap<Arc<SuggestionScope>, VecDeque<CachedSuggestions>>,
    /// The scope and the time of each entry, oldest first. Entries of a scope have the same order.
    order: VecDeque<(Arc<SuggestionScope>, Instant)>,
    bytes: usize,
}

struct CachedSuggestions {
    prefix: String,
    model: String,
    options: CompletionOptions,
    suggestions: Vec<Suggestion>,
}

impl CachedSuggestions {
    fn bytes(&self) -> usize {
        let texts = self.suggestions.iter().map(|one| one.text.len()).sum::<usize>();
        let CompletionOptions { suffix, file_path, .. } = &self.options;
        self.prefix.len() + suffix.len() + file_path.len() + texts + size_of::<CachedSuggestions>()
    }

    /// The remainder of each suggestion whose start has been typed since.
    fn remainders(&self, prefix: &str) -> Vec<Suggestion> {
        let Some(typed) = prefix.strip_prefix(self.prefix.as_str()) else { return Vec::new() };
        let rest = |one: &Suggestion| {
            let rest = one.text.strip_prefix(typed).filter(|rest| !rest.trim().is_empty())?;
            Some(Suggestion { text: rest.to_owned(), ..one.clone() })
        };
        self.suggestions.iter().filter_map(rest).collect()
    }
}

impl SuggestionCache {
    /// The remainders of a cached entry; empty without a match.
    pub(crate) fn find(
        &self,
        scope: &SuggestionScope,
        model: &str,
        params: &CompletionParams,
    ) -> Vec<Suggestion> {
        let mut entries = self.lock();
        entries.evict(Instant::now());
        let existing = entries.by_scope.get(scope);
        let latest =
            existing.into_iter().flat_map(|existing| existing.iter().rev().take(MAX_COMPARED));
        let found = latest
            .filter(|entry| entry.model == model && entry.options == params.options)
            .map(|entry| entry.remainders(&params.prefix))
            .find(|rest| !rest.is_empty());
        match &found {
            Some(_) => {
                metrics::counter!("hapa_cache_hits_total", "cache" => CACHE_NAME).increment(1);
            }
            None => {
                metrics::counter!("hapa_cache_misses_total", "cache" => CACHE_NAME).increment(1);
            }
        }
        found.unwrap_or_default()
    }

    pub(crate) fn insert(
        &self,
        scope: SuggestionScope,
        model: &str,
        params: &CompletionParams,
        suggestions: &[Suggestion],
    ) {
        if suggestions.is_empty() {
            return;
        }
        let entry = CachedSuggestions {
            prefix: params.prefix.clone(),
            model: model.to_owned(),
            options: params.options.clone(),
            suggestions: suggestions.to_vec(),
        };
        self.lock().insert(scope, entry, Instant::now());
    }

    fn lock(&self) -> MutexGuard<'_, CacheState> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl CacheState {
    fn insert(&mut self, scope: SuggestionScope, entry: CachedSuggestions, now: Instant) {
        self.bytes += entry.bytes();
        let scope = match self.by_scope.get_key_value(&scope) {
            Some((existing, _)) => Arc::clone(existing),
            None => Arc::new(scope),
        };
        self.order.push_back((Arc::clone(&scope), now));
        self.by_scope.entry(scope).or_default().push_back(entry);
        self.evict(now);
    }

    /// Removes expired entries, and the oldest ones beyond the limits.
    fn evict(&mut self, now: Instant) {
        while let Some((scope, at)) = self.order.front() {
            let fits = self.order.len() <= MAX_ENTRIES && self.bytes <= MAX_BYTES;
            if fits && now.duration_since(*at) < ENTRY_TTL {
                return;
            }
            if let Some(entries) = self.by_scope.get_mut(scope) {
                let gone = entries.pop_front();
                self.bytes -= gone.map_or(0, |entry| entry.bytes());
                if entries.is_empty() {
                    self.by_scope.remove(scope);
                }
            }
            self.order.pop_front();
        }
    }
}

#[cfg(test)]
mod tests {
    use hapa_proto::codegen::v1::CompleteCodeRequest;

    use super::*;

    fn params(prefix: &str, change: impl FnOnce(&mut CompleteCodeRequest)) -> CompletionParams {
        let mut request = CompleteCodeRequest {
            prefix: prefix.to_owned(),
            suffix: ")".to_owned(),
            session_id: "s".to_owned(),
            ..Default::default()
        };
        change(&mut request);
        CompletionParams::validate(request).unwrap()
    }

    fn suggestions(texts: &[&str]) -> Vec<Suggestion> {
        texts
            .iter()
            .map(|&text| Suggestion { text: text.to_owned(), ..Default::default() })
            .collect()
    }

    fn cached_texts(
        cache: &SuggestionCache,
        actor: &str,
        params: &CompletionParams,
    ) -> Vec<String> {
        let scope = SuggestionScope::new(actor.to_owned(), params);
        cache.find(&scope, "m", params).into_iter().map(|one| one.text).collect()
    }

    #[test]
    fn a_typed_start_of_a_suggestion_is_answered_with_its_remainder() {
        let cache = SuggestionCache::default();
        let first = params("print(", |_| {});
        cache.insert(
            SuggestionScope::new("me".to_owned(), &first),
            "m",
            &first,
            &suggestions(&["이름, x", "이것", "other"]),
        );
        let nothing: [&str; 0] = [];
        assert_eq!(
            cached_texts(&cache, "me", &params("print(", |_| {})),
            ["이름, x", "이것", "other"]
        );
        assert_eq!(cached_texts(&cache, "me", &params("print(이", |_| {})), ["름, x", "것"]);
        assert_eq!(
            cached_texts(&cache, "me", &params("print(이름, x", |_| {})),
            nothing,
            "all was typed"
        );
        assert_eq!(cached_texts(&cache, "me", &params("print(z", |_| {})), nothing);
        assert_eq!(cached_texts(&cache, "me", &params("prin", |_| {})), nothing);
        assert_eq!(
            cached_texts(&cache, "you", &first),
            nothing,
            "entries of another caller are not returned"
        );
        for other in [
            params("print(", |request| request.suffix = "]".to_owned()),
            params("print(", |request| request.session_id = "t".to_owned()),
            params("print(", |request| request.completion_type = "block".to_owned()),
            params("print(", |request| request.temperature = Some(1.0)),
        ] {
            assert_eq!(cached_texts(&cache, "me", &other), nothing, "{other:?}");
        }
        let scope = SuggestionScope::new("me".to_owned(), &first);
        assert!(cache.find(&scope, "another model", &first).is_empty());
    }

    #[test]
    fn expired_and_excess_entries_are_evicted_oldest_first() {
        let mut entries = CacheState::default();
        let params = params("a", |_| {});
        let entry = |text: &str| CachedSuggestions {
            prefix: "a".to_owned(),
            model: "m".to_owned(),
            options: params.options.clone(),
            suggestions: suggestions(&[text]),
        };
        let scope = |number: usize| SuggestionScope::new(number.to_string(), &params);
        let now = Instant::now();
        for number in 0..MAX_ENTRIES + 5 {
            entries.insert(scope(number), entry("b"), now);
        }
        assert_eq!((entries.order.len(), entries.by_scope.len()), (MAX_ENTRIES, MAX_ENTRIES));
        assert!(
            !entries.by_scope.contains_key(&scope(4)) && entries.by_scope.contains_key(&scope(5))
        );
        entries.insert(scope(0), entry(&"x".repeat(MAX_BYTES - 64 * 1024)), now);
        assert!(entries.bytes <= MAX_BYTES && entries.by_scope.contains_key(&scope(0)));
        entries.evict(now + ENTRY_TTL);
        assert_eq!((entries.order.len(), entries.by_scope.len(), entries.bytes), (0, 0, 0));
    }
}
