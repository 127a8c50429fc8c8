//! The rows of the access table: each service lists its RPCs, and what is not listed is refused.

use std::collections::HashMap;

/// What a key may be allowed to do.
pub const SCOPES: &[&str] = &[
    "codegen:generate",
    "codegen:complete",
    "cache:admin",
    "errors:read",
    "errors:write",
    "errors:admin",
    "analytics:read",
    "analytics:write",
    "auth:admin",
];

/// What a user may do unless its maker says otherwise.
pub const DEFAULT_SCOPES: &[&str] =
    &["codegen:generate", "codegen:complete", "errors:read", "analytics:read"];

/// What a caller must show.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Nothing: health and reflection, which live as long as they want.
    Public,
    /// Nothing, since it is how one comes by a credential; failures count for the address.
    Open,
    /// Any credential that is alive; the handler shows what is its caller's.
    Caller,
    /// A session, for what is its user's; or a credential with this scope, for everything.
    Own(&'static str),
    /// A credential with this scope.
    Scope(&'static str),
    /// A credential with one of these scopes; the handler shows what its caller's gives.
    AnyScope(&'static [&'static str]),
    /// To be a service: by the mesh token, or by a certificate with one of the row's roles.
    Mesh,
}

/// Calls in a window of seconds, unless the key says otherwise.
pub type DefaultLimit = (u32, u32);

/// One RPC of a service.
#[derive(Debug, PartialEq, Eq)]
pub struct Rpc {
    /// `/package.Service/Method`.
    pub path: &'static str,
    /// What a caller must show.
    pub access: Access,
    /// None: DEFAULT_RATE_LIMIT in RATE_LIMIT_WINDOW_MINUTES.
    pub limit: Option<DefaultLimit>,
    /// Whose certificates suffice, besides an operator's where it is not for services alone. None:
    /// every service's where it is, and nobody's where it is not.
    pub by: Option<&'static [&'static str]>,
}

/// The roles that are services.
pub const SERVICES: &[&str] = &["auth", "codegen", "errors", "analytics"];

/// The role of people who operate the mesh.
pub const OPERATOR: &str = "operator";

/// The role of the gateway.
pub const GATEWAY: &str = "gateway";

impl Rpc {
    /// A row with the default limit.
    pub const fn new(path: &'static str, access: Access) -> Self {
        Rpc { path, access, limit: None, by: None }
    }

    /// The same row with a limit of its own.
    #[must_use]
    pub const fn limited(self, calls: u32, window_seconds: u32) -> Self {
        Rpc { limit: Some((calls, window_seconds)), ..self }
    }

    /// Whether anyone may call it.
    pub fn needs_no_credential(&self) -> bool {
        matches!(self.access, Access::Public | Access::Open)
    }

    /// Whether it lives as long as its caller wants to hear news.
    pub fn is_watch(&self) -> bool {
        self.method().starts_with("Watch")
    }

    /// The same row for services with these roles, where certificates prove them.
    #[must_use]
    pub const fn by(self, roles: &'static [&'static str]) -> Self {
        Rpc { by: Some(roles), ..self }
    }

    /// Whether a certificate with this role suffices.
    pub fn takes(&self, role: &str) -> bool {
        let for_services = self.access == Access::Mesh;
        let usual = if for_services { SERVICES } else { &[] };
        !for_services && role == OPERATOR || self.by.unwrap_or(usual).contains(&role)
    }

    /// The last part of the path.
    pub fn method(&self) -> &'static str {
        self.path.rsplit('/').next().unwrap_or(self.path)
    }
}

/// The rows of what every server has beside its services.
pub const BUILT_IN: &[Rpc] = &[
    Rpc::new("/grpc.health.v1.Health/Check", Access::Public),
    Rpc::new("/grpc.health.v1.Health/Watch", Access::Public),
    Rpc::new("/grpc.reflection.v1.ServerReflection/ServerReflectionInfo", Access::Public),
    Rpc::new("/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo", Access::Public),
];

/// Every row of a server, by path.
#[derive(Clone, Debug, Default)]
pub struct Table(HashMap<&'static str, &'static Rpc>);

impl Table {
    pub fn add(&mut self, rows: &'static [Rpc]) {
        self.0.extend(rows.iter().map(|row| (row.path, row)));
    }

    pub fn find(&self, path: &str) -> Option<&'static Rpc> {
        self.0.get(path).copied()
    }
}
