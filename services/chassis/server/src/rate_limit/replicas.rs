//! The number of replicas that count calls together, which determines each replica's share of a limit while Redis is
//! unavailable.
//!
//! A replica registers in Redis under each of its roles and renews the registration with every heartbeat. The latest
//! numbers stay in effect while Redis is unavailable.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// The replicas of a role, and the position of this one among them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct ReplicaGroup {
    /// Number of replicas, at least 1.
    pub(super) replicas: u32,
    /// Number of replicas with a lower id.
    pub(super) position: u32,
}

impl ReplicaGroup {
    /// A single replica.
    pub(super) const SINGLE: ReplicaGroup = ReplicaGroup { replicas: 1, position: 0 };

    /// This replica's share of a number of calls. The shares of all replicas add up to it.
    pub(super) fn share(self, calls: u32) -> u32 {
        let remainder = calls % self.replicas;
        calls / self.replicas + u32::from(self.position % self.replicas < remainder)
    }
}

/// The groups of this replica.
#[derive(Debug)]
pub(super) struct Replicas {
    roles: Vec<String>,
    /// The configured number of replicas, which has precedence over Redis.
    fixed_count: Option<u32>,
    /// By role; "" is the group of all replicas.
    groups: Mutex<HashMap<String, ReplicaGroup>>,
}

impl Replicas {
    pub(super) fn new(roles: &[&str], fixed_count: Option<u32>) -> Self {
        let roles = std::iter::once("").chain(roles.iter().copied()).map(str::to_owned).collect();
        Replicas { roles, fixed_count, groups: Mutex::default() }
    }

    /// The Redis keys of the registration. The braces keep them on one node of a cluster.
    pub(super) fn keys(&self) -> Vec<String> {
        self.roles.iter().map(|role| format!("hapa:limit:{{replicas}}:{role}")).collect()
    }

    /// Applies the result of a heartbeat: for each key the number of replicas and the position of this one. After an
    /// outage, while other replicas reconnect, numbers must not shrink.
    pub(super) fn update(&self, counts: &[u32], may_shrink: bool) {
        let mut groups = self.groups();
        for (role, pair) in self.roles.iter().zip(counts.chunks_exact(2)) {
            let group = ReplicaGroup { replicas: pair[0].max(1), position: pair[1] };
            let has_grown = groups.get(role).is_none_or(|old| old.replicas <= group.replicas);
            if may_shrink || has_grown {
                groups.insert(role.clone(), group);
            }
        }
    }

    /// The replicas that serve a method, such as `/hapa.codegen.v1.CodegenService/GenerateCode`. All replicas if the
    /// method belongs to no role of this replica.
    pub(super) fn serving(&self, method: &str) -> ReplicaGroup {
        let role = method.strip_prefix("/hapa.").and_then(|rest| rest.split('.').next());
        let groups = self.groups();
        let group = role.and_then(|role| groups.get(role)).or_else(|| groups.get(""));
        let group = group.copied().unwrap_or(ReplicaGroup::SINGLE);
        match self.fixed_count {
            Some(replicas) => ReplicaGroup { replicas, ..group },
            None => group,
        }
    }

    fn groups(&self) -> MutexGuard<'_, HashMap<String, ReplicaGroup>> {
        self.groups.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_shares_of_all_replicas_add_up_to_the_limit() {
        for replicas in 1..9 {
            for limit in 0..40 {
                let group = |position| ReplicaGroup { replicas, position };
                let total: u32 = (0..replicas).map(|at| group(at).share(limit)).sum();
                assert_eq!(total, limit, "of {replicas} replicas");
            }
        }
    }

    #[test]
    fn a_method_is_shared_by_the_replicas_of_its_role() {
        let replicas = Replicas::new(&["codegen"], None);
        let (codegen, other) = ("/hapa.codegen.v1.CodegenService/X", "Authentication");
        assert_eq!(replicas.serving(codegen), ReplicaGroup::SINGLE);
        replicas.update(&[3, 2, 2, 1], true);
        assert_eq!(replicas.serving(codegen), ReplicaGroup { replicas: 2, position: 1 });
        assert_eq!(replicas.serving(other), ReplicaGroup { replicas: 3, position: 2 });
        replicas.update(&[1, 0, 1, 0], false);
        assert_eq!(replicas.serving(codegen).replicas, 2, "other replicas may be reconnecting");
        replicas.update(&[1, 0, 1, 0], true);
        assert_eq!(replicas.serving(codegen), ReplicaGroup::SINGLE);
        let fixed_count = Replicas::new(&["codegen"], Some(4));
        assert_eq!(fixed_count.serving(codegen).share(100), 25);
    }
}
