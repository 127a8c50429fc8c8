//! The access table: each service lists its RPCs with the required credential. The server refuses every RPC that is
//! not listed.

use std::collections::HashMap;

/// Every scope that a key or a user can have.
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

/// Scopes of a new user if the request names none.
pub const DEFAULT_SCOPES: &[&str] =
    &["codegen:generate", "codegen:complete", "errors:read", "analytics:read"];

/// The credential that an RPC requires.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// None: health and reflection, whose streams have no deadline.
    NoAuth,
    /// None, because the RPC issues credentials. Failures count against the client's network.
    Login,
    /// Any valid credential. The handler returns only what belongs to the caller.
    Authenticated,
    /// A session, for data of its own user; or a credential with this scope, for all data.
    SelfOrScope(&'static str),
    /// A credential with this scope.
    Scope(&'static str),
    /// A credential with one of these scopes. The handler limits the result to what that scope permits.
    AnyScope(&'static [&'static str]),
    /// The mesh token, or a certificate with one of the RPC's roles.
    Service,
}

/// Calls, and the window in seconds, unless the key has a limit of its own.
pub type DefaultLimit = (u32, u32);

/// The access rule of one RPC.
#[derive(Debug, PartialEq, Eq)]
pub struct Rpc {
    /// `/package.Service/Method`.
    pub path: &'static str,
    /// The required credential.
    pub access: Access,
    /// `None`: DEFAULT_RATE_LIMIT in RATE_LIMIT_WINDOW_MINUTES.
    pub limit: Option<DefaultLimit>,
    /// Roles that may call this RPC with a client certificate. `None`: all service roles if the RPC is
    /// service-only, otherwise none. An operator's certificate may call every RPC that is not service-only.
    pub allowed_roles: Option<&'static [&'static str]>,
    /// Whether the call waits for a model, so that its deadline is reported as E5001.
    pub is_model_call: bool,
}

/// The roles of services.
pub const SERVICE_ROLES: &[&str] = &["auth", "codegen", "errors", "analytics"];

/// The role of operators' certificates.
pub const OPERATOR_ROLE: &str = "operator";

/// The role of the gateway.
pub const GATEWAY_ROLE: &str = "gateway";

impl Rpc {
    /// A rule with the default limit.
    pub const fn new(path: &'static str, access: Access) -> Self {
        Rpc { path, access, limit: None, allowed_roles: None, is_model_call: false }
    }

    /// The same rule with its own limit.
    #[must_use]
    pub const fn limited(self, calls: u32, window_seconds: u32) -> Self {
        Rpc { limit: Some((calls, window_seconds)), ..self }
    }

    /// The same rule for an RPC that waits for a model.
    #[must_use]
    pub const fn model_call(self) -> Self {
        Rpc { is_model_call: true, ..self }
    }

    /// Whether the RPC can be called without a credential.
    pub fn needs_no_credential(&self) -> bool {
        matches!(self.access, Access::NoAuth | Access::Login)
    }

    /// Whether the RPC is an event stream, which lasts until its client disconnects.
    pub fn is_watch(&self) -> bool {
        self.method().starts_with("Watch")
    }

    /// The same rule with these roles for client certificates.
    #[must_use]
    pub const fn allowed_roles(self, roles: &'static [&'static str]) -> Self {
        Rpc { allowed_roles: Some(roles), ..self }
    }

    /// Whether a certificate with this role may call the RPC.
    pub fn allows(&self, role: &str) -> bool {
        let for_services = self.access == Access::Service;
        let default_roles = if for_services { SERVICE_ROLES } else { &[] };
        !for_services && role == OPERATOR_ROLE
            || self.allowed_roles.unwrap_or(default_roles).contains(&role)
    }

    /// The last segment of the path.
    pub fn method(&self) -> &'static str {
        self.path.rsplit('/').next().unwrap_or(self.path)
    }
}

/// The access rules of health and reflection, which every server has.
pub const BUILT_IN_RPCS: &[Rpc] = &[
    Rpc::new("/grpc.health.v1.Health/Check", Access::NoAuth),
    Rpc::new("/grpc.health.v1.Health/Watch", Access::NoAuth),
    Rpc::new("/grpc.reflection.v1.ServerReflection/ServerReflectionInfo", Access::NoAuth),
    Rpc::new("/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo", Access::NoAuth),
];

/// The access rules of a server, by path.
#[derive(Clone, Debug, Default)]
pub struct AccessTable(HashMap<&'static str, &'static Rpc>);

impl AccessTable {
    /// Adds the rules of a service.
    pub fn add(&mut self, rows: &'static [Rpc]) {
        self.0.extend(rows.iter().map(|row| (row.path, row)));
    }

    /// The rule of an RPC; `None` if the RPC is unknown.
    pub fn find(&self, path: &str) -> Option<&'static Rpc> {
        self.0.get(path).copied()
    }
}
