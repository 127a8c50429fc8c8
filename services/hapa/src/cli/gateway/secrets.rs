//! Where Envoy finds its certificates: a file for each, which names the files and the folder to watch.
//! Nothing secret stands in them.

use std::path::Path;

use hapa_core::config::Wrong;
use serde_json::{Value, json};

use super::Args;

/// One file for Envoy to read. JSON is YAML.
pub(super) struct Secret {
    pub(super) file: &'static str,
    pub(super) text: String,
}

/// Those that the settings ask for.
pub(super) fn secrets(args: &Args) -> Result<Vec<Secret>, Wrong> {
    let mut found = Vec::new();
    if let (Some(certificate), Some(key)) =
        (&args.gateway_tls_cert_file, &args.gateway_tls_key_file)
    {
        found.push(secret("sds-public.yaml", pair("public", certificate, key)));
    }
    if let Some(files) = args.tls.files()? {
        found.push(secret("sds-mesh.yaml", pair("mesh", &files.certificate, &files.key)));
        let authority = json!({
            "name": "authority",
            "validation_context": {
                "trusted_ca": {"filename": files.authority},
                "watched_directory": {"path": folder(&files.authority)},
            },
        });
        found.push(secret("sds-authority.yaml", authority));
    }
    Ok(found)
}

fn pair(name: &str, certificate: &Path, key: &Path) -> Value {
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

fn secret(file: &'static str, mut resource: Value) -> Secret {
    resource["@type"] =
        "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret".into();
    Secret { file, text: json!({"resources": [resource]}).to_string() }
}
