//! Where answers are kept: nowhere, in this process, or in a Redis that replicas share.

use std::sync::Arc;

use hapa_store::redis::RedisUnavailable;
use uuid::Uuid;

use super::entry::Entry;
use super::key::Key;
use super::memory::Memory;
use super::redis::Shared;

/// The time between two clearings; an answer is found in the one in which it was asked for.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Era(pub(super) Arc<str>);

impl Era {
    pub(super) fn new() -> Self {
        Era(Uuid::now_v7().to_string().into())
    }
}

/// What was found.
#[derive(Default)]
pub(super) struct Looked {
    pub(super) answer: Option<Arc<Entry>>,
    /// None where a fresh answer can't be kept.
    pub(super) era: Option<Era>,
    /// Nothing could be looked up.
    pub(super) failed: Option<RedisUnavailable>,
}

/// How full it is.
#[derive(Default)]
pub(super) struct Held {
    /// None where that can't be found out.
    pub(super) entries: Option<u64>,
    pub(super) bytes: Option<u64>,
    pub(super) evictions: u64,
}

pub(super) enum Store {
    /// CACHE_TTL=0.
    Off,
    Memory(Memory),
    Redis(Box<Shared>),
}

impl Store {
    pub(super) fn is_off(&self) -> bool {
        matches!(self, Store::Off)
    }

    /// As stats call it.
    pub(super) fn word(&self) -> &'static str {
        match self {
            Store::Off => "off",
            Store::Memory(_) => "memory",
            Store::Redis(_) => "redis",
        }
    }

    /// The answer, where it `reads`; in any case the era.
    pub(super) async fn look(&self, key: Key, reads: bool) -> Looked {
        match self {
            Store::Off => Looked::default(),
            Store::Memory(memory) => memory.look(key, reads),
            Store::Redis(redis) => redis.look(key, reads).await,
        }
    }

    pub(super) async fn clear(&self) -> Result<u64, RedisUnavailable> {
        match self {
            Store::Off => Ok(0),
            Store::Memory(memory) => Ok(memory.clear()),
            Store::Redis(redis) => redis.clear().await,
        }
    }

    pub(super) async fn held(&self) -> Held {
        match self {
            Store::Off => Held { entries: Some(0), bytes: Some(0), evictions: 0 },
            Store::Memory(memory) => memory.held(),
            Store::Redis(redis) => redis.held().await,
        }
    }
}
