//! A real Envoy in front of the mesh: protocols, refusals, hostile clients and drain.

mod drain;
mod hostile_clients;
mod http_details;
mod protocols;
mod refusals;
