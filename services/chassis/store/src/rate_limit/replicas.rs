//! How many replicas count calls together, so that each knows its part of a limit while Redis is away.
//!
//! A replica registers in Redis under each of its roles and renews that with every heartbeat. What it
//! learned last holds while Redis is away.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Replicas of a role, and this one's place among them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Group {
    /// At least 1.
    pub(super) replicas: u32,
    /// How many ids are lower than this replica's.
    pub(super) position: u32,
}

impl Group {
    /// A replica that knows of no other.
    pub(super) const ALONE: Group = Group { replicas: 1, position: 0 };

    /// This replica's part of so many calls. The parts of all replicas add up to the whole.
    pub(super) fn share(self, calls: u32) -> u32 {
        let remainder = calls % self.replicas;
        calls / self.replicas + u32::from(self.position % self.replicas < remainder)
    }
}

/// The groups that this replica belongs to.
#[derive(Debug)]
pub(super) struct Replicas {
    roles: Vec<String>,
    /// A setting that replaces what is known from Redis.
    fixed: Option<u32>,
    /// By role; "" has all replicas.
    known: Mutex<HashMap<String, Group>>,
}

impl Replicas {
    pub(super) fn new(roles: &[&str], fixed: Option<u32>) -> Self {
        let roles = std::iter::once("").chain(roles.iter().copied()).map(str::to_owned).collect();
        Replicas { roles, fixed, known: Mutex::default() }
    }

    /// The keys to register under. The braces keep them on one node of a cluster.
    pub(super) fn keys(&self) -> Vec<String> {
        self.roles.iter().map(|role| format!("hapa:limit:{{replicas}}:{role}")).collect()
    }

    /// Takes over what a heartbeat found: for each key the number of replicas and this one's position.
    /// While the others come back after an outage, a number only grows.
    pub(super) fn learn(&self, found: &[u32], may_shrink: bool) {
        let mut known = self.known();
        for (role, pair) in self.roles.iter().zip(found.chunks_exact(2)) {
            let group = Group { replicas: pair[0].max(1), position: pair[1] };
            let is_more = known.get(role).is_none_or(|before| before.replicas <= group.replicas);
            if may_shrink || is_more {
                known.insert(role.clone(), group);
            }
        }
    }

    /// Those that serve a method such as `/hapa.codegen.v1.CodegenService/GenerateCode`; all of them
    /// where it names no role of this replica.
    pub(super) fn serving(&self, method: &str) -> Group {
        let role = method.strip_prefix("/hapa.").and_then(|rest| rest.split('.').next());
        let known = self.known();
        let group = role.and_then(|role| known.get(role)).or_else(|| known.get(""));
        let group = group.copied().unwrap_or(Group::ALONE);
        match self.fixed {
            Some(replicas) => Group { replicas, ..group },
            None => group,
        }
    }

    fn known(&self) -> MutexGuard<'_, HashMap<String, Group>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_shares_of_all_replicas_add_up_to_the_limit() {
        for replicas in 1..9 {
            for limit in 0..40 {
                let group = |position| Group { replicas, position };
                let total: u32 = (0..replicas).map(|at| group(at).share(limit)).sum();
                assert_eq!(total, limit, "of {replicas} replicas");
            }
        }
    }

    #[test]
    fn a_method_counts_the_replicas_of_its_role() {
        let replicas = Replicas::new(&["codegen"], None);
        let (codegen, other) = ("/hapa.codegen.v1.CodegenService/X", "Authentication");
        assert_eq!(replicas.serving(codegen), Group::ALONE);
        replicas.learn(&[3, 2, 2, 1], true);
        assert_eq!(replicas.serving(codegen), Group { replicas: 2, position: 1 });
        assert_eq!(replicas.serving(other), Group { replicas: 3, position: 2 });
        replicas.learn(&[1, 0, 1, 0], false);
        assert_eq!(replicas.serving(codegen).replicas, 2, "the others may be coming back");
        replicas.learn(&[1, 0, 1, 0], true);
        assert_eq!(replicas.serving(codegen), Group::ALONE);
        let fixed = Replicas::new(&["codegen"], Some(4));
        assert_eq!(fixed.serving(codegen).share(100), 25);
    }
}
