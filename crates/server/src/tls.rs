//! TLS: a certificate chain and its key, from PEM files.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::pki_types::pem::{Error as PemError, PemObject};
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio_rustls::rustls::{Error as RustlsError, ServerConfig, crypto::ring};

/// What a server proves itself with.
#[derive(Clone)]
pub struct Tls(Arc<ServerConfig>);

/// Why files make no TLS.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file cannot be read.
    #[error("{path}: cannot be read: {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// A file is no PEM, or has not the section that it should.
    #[error("{path}: {message}")]
    Pem {
        /// The file.
        path: PathBuf,
        /// What is wrong, and the remedy.
        message: String,
    },
    /// Certificate and key, each good, are not a pair, or of a kind that is not supported.
    #[error("{certificate} with {key}: {message}")]
    Pair {
        /// The certificate's file.
        certificate: PathBuf,
        /// The key's file.
        key: PathBuf,
        /// What is wrong, and the remedy.
        message: String,
    },
}

impl Tls {
    /// Reads a certificate chain, the server's own certificate first, and its private key. Both may be in one file.
    ///
    /// # Errors
    /// [`TlsError`], which names the file.
    pub fn from_files(certificate: &Path, key: &Path) -> Result<Self, TlsError> {
        let chain = CertificateDer::pem_slice_iter(&read(certificate)?)
            .collect::<Result<Vec<_>, _>>()
            .map_err(|error| malformed(certificate, &error))?;
        if chain.is_empty() {
            return Err(TlsError::Pem {
                path: certificate.into(),
                message: "has no certificate; a PEM file is expected, with BEGIN CERTIFICATE".into(),
            });
        }
        let text = read(key)?;
        let private = PrivateKeyDer::from_pem_slice(&text).map_err(|error| match error {
            PemError::NoItemsFound if has(&text, b"ENCRYPTED PRIVATE KEY") => TlsError::Pem {
                path: key.into(),
                message: "the key is encrypted; decrypt it with `openssl pkey -in FILE -out PLAIN`".into(),
            },
            PemError::NoItemsFound => TlsError::Pem {
                path: key.into(),
                message: "has no private key; a PEM file is expected, with BEGIN PRIVATE KEY".into(),
            },
            error => malformed(key, &error),
        })?;
        let pair = |error: RustlsError| {
            TlsError::Pair {
            certificate: certificate.into(),
            key: key.into(),
            message: match error {
                RustlsError::InconsistentKeys(_) => {
                    "the key does not belong to the first certificate of the file; the server's own comes first"
                        .into()
                }
                error => format!("{error}; give an RSA, ECDSA or Ed25519 certificate of version 3"),
            },
        }
        };
        let mut config = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_safe_default_protocol_versions()
            .map_err(pair)?
            .with_no_client_auth()
            .with_single_cert(chain, private)
            .map_err(pair)?;
        // What is spoken behind it: a client that offers HTTP/2 as well is told at once.
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        Ok(Self(Arc::new(config)))
    }

    pub(crate) fn acceptor(&self) -> TlsAcceptor {
        TlsAcceptor::from(Arc::clone(&self.0))
    }
}

/// Never the key.
impl fmt::Debug for Tls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Tls")
    }
}

fn read(path: &Path) -> Result<Vec<u8>, TlsError> {
    std::fs::read(path).map_err(|source| TlsError::Read { path: path.into(), source })
}

fn malformed(path: &Path, error: &PemError) -> TlsError {
    TlsError::Pem { path: path.into(), message: format!("is not a PEM file: {error}") }
}

fn has(text: &[u8], word: &[u8]) -> bool {
    text.windows(word.len()).any(|window| window == word)
}
