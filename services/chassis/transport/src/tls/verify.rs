//! Whom a service believes that it dials: who holds a certificate of the mesh's authority with the
//! name that was dialled, or with the role that was meant.

use std::sync::Arc;

use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{CertificateError, DigitallySignedStruct, Error, SignatureScheme};

use super::names::roles;

#[derive(Debug)]
pub(super) struct ByNameOrRole {
    pub(super) chain: Arc<WebPkiServerVerifier>,
    pub(super) roles: Vec<String>,
    pub(super) prefix: String,
}

impl ServerCertVerifier for ByNameOrRole {
    fn verify_server_cert(
        &self,
        certificate: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        name: &ServerName<'_>,
        ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let found = self.chain.verify_server_cert(certificate, intermediates, name, ocsp, now);
        match found {
            // The name is looked at last: the chain was found good.
            Err(Error::InvalidCertificate(
                CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. },
            )) if self.proves_role(certificate) => Ok(ServerCertVerified::assertion()),
            found => found,
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

impl ByNameOrRole {
    fn proves_role(&self, certificate: &CertificateDer<'_>) -> bool {
        let proven = roles(certificate, &self.prefix);
        proven.iter().any(|role| self.roles.iter().any(|meant| meant == role))
    }
}
