//! Verification of a server's certificate: it must come from the mesh's authority, and have the host name of the
//! connection or one of the expected roles.

use std::sync::Arc;

use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{CertificateError, DigitallySignedStruct, Error, SignatureScheme};

use super::names::roles;

/// Verifies servers by host name or role.
#[derive(Debug)]
pub(super) struct NameOrRoleVerifier {
    pub(super) chain: Arc<WebPkiServerVerifier>,
    /// The expected roles.
    pub(super) roles: Vec<String>,
    pub(super) prefix: String,
}

impl ServerCertVerifier for NameOrRoleVerifier {
    fn verify_server_cert(
        &self,
        certificate: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        name: &ServerName<'_>,
        ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let result = self.chain.verify_server_cert(certificate, intermediates, name, ocsp, now);
        match result {
            // The name is verified last, so the chain is valid.
            Err(Error::InvalidCertificate(
                CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. },
            )) if self.has_expected_role(certificate) => Ok(ServerCertVerified::assertion()),
            result => result,
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.chain.verify_tls12_signature(message, certificate, signed)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.chain.verify_tls13_signature(message, certificate, signed)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.chain.supported_verify_schemes()
    }
}

impl NameOrRoleVerifier {
    fn has_expected_role(&self, certificate: &CertificateDer<'_>) -> bool {
        let roles = roles(certificate, &self.prefix);
        roles.iter().any(|role| self.roles.iter().any(|expected| expected == role))
    }
}
