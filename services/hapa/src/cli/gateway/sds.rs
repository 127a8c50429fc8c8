//! Envoy's SDS resources: one file per certificate, with the paths of its PEM files and the directory to watch. They
//! hold no secrets.

use std::path::Path;

use hapa_core::config::ConfigError;
use serde_json::{Value, json};

use super::GatewayArgs;

/// One SDS resource file. Its content is JSON, which is valid YAML.
pub(super) struct SdsFile {
    pub(super) name: &'static str,
    pub(super) text: String,
}

/// The resource files for the certificates in the settings.
pub(super) fn sds_files(args: &GatewayArgs) -> Result<Vec<SdsFile>, ConfigError> {
    let mut files = Vec::new();
    if let (Some(certificate), Some(key)) =
        (&args.gateway_tls_cert_file, &args.gateway_tls_key_file)
    {
        files.push(sds_file("sds-public.yaml", key_pair("public", certificate, key)));
    }
    if let Some(tls) = args.tls.files()? {
        files.push(sds_file("sds-mesh.yaml", key_pair("mesh", &tls.certificate, &tls.key)));
        let authority = json!({
            "name": "authority",
            "validation_context": {
                "trusted_ca": {"filename": tls.authority},
                "watched_directory": {"path": folder(&tls.authority)},
            },
        });
        files.push(sds_file("sds-authority.yaml", authority));
    }
    Ok(files)
}

fn key_pair(name: &str, certificate: &Path, key: &Path) -> Value {
    json!({
        "name": name,
        "tls_certificate": {
            "certificate_chain": {"filename": certificate},
            "private_key": {"filename": key},
            "watched_directory": {"path": folder(certificate)},
        },
    })
}

fn folder(file: &Path) -> &Path {
    let folder = file.parent().filter(|folder| !folder.as_os_str().is_empty());
    folder.unwrap_or(Path::new("."))
}

fn sds_file(name: &'static str, mut resource: Value) -> SdsFile {
    resource["@type"] =
        "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret".into();
    SdsFile { name, text: json!({"resources": [resource]}).to_string() }
}
