//! Where a server listens.

use std::fmt;
use std::io;
use std::net::{SocketAddr, TcpListener};
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use crate::connection;

/// A place to listen at.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Endpoint {
    /// An address and port; port 0 = a free one.
    Tcp(SocketAddr),
    /// A socket in the file system; who may open the file may call.
    Unix(PathBuf),
}

impl From<SocketAddr> for Endpoint {
    fn from(address: SocketAddr) -> Self {
        Self::Tcp(address)
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => address.fmt(f),
            Self::Unix(path) => path.display().fmt(f),
        }
    }
}

impl Endpoint {
    /// What to change about a place that cannot be had.
    pub(crate) fn remedy(&self) -> &'static str {
        match self {
            Self::Tcp(_) => "choose another --host or --port",
            Self::Unix(_) => "choose another --uds, in a directory that can be written to",
        }
    }

    /// Whether only this machine reaches it.
    pub(crate) fn is_local(&self) -> bool {
        match self {
            Self::Tcp(address) => address.ip().is_loopback(),
            Self::Unix(_) => true,
        }
    }
}

/// An endpoint that is bound. A socket's file is removed with it.
#[derive(Debug)]
pub(crate) enum Bound {
    Tcp(TcpListener),
    Unix(UnixListener, SocketFile),
}

/// The file of a socket.
#[derive(Debug)]
pub(crate) struct SocketFile(PathBuf);

impl Drop for SocketFile {
    fn drop(&mut self) {
        // A file that is gone already is what was wanted.
        let _ = std::fs::remove_file(&self.0);
    }
}

impl Bound {
    pub(crate) fn new(endpoint: &Endpoint) -> io::Result<Self> {
        match endpoint {
            Endpoint::Tcp(address) => {
                let listener = TcpListener::bind(address)?;
                listener.set_nonblocking(true)?;
                Ok(Self::Tcp(listener))
            }
            Endpoint::Unix(path) => {
                let listener = match UnixListener::bind(path) {
                    Err(error) if error.kind() == io::ErrorKind::AddrInUse && is_left_over(path) => {
                        std::fs::remove_file(path)?;
                        UnixListener::bind(path)
                    }
                    bound => bound,
                }?;
                listener.set_nonblocking(true)?;
                Ok(Self::Unix(listener, SocketFile(path.clone())))
            }
        }
    }

    /// The endpoint, with the port that the system chose.
    pub(crate) fn endpoint(&self) -> io::Result<Endpoint> {
        Ok(match self {
            Self::Tcp(listener) => Endpoint::Tcp(listener.local_addr()?),
            Self::Unix(_, file) => Endpoint::Unix(file.0.clone()),
        })
    }

    /// As the runtime listens; the file is kept until the second part is dropped.
    pub(crate) fn listener(self) -> io::Result<(connection::Listener, Option<SocketFile>)> {
        Ok(match self {
            Self::Tcp(listener) => {
                (connection::Listener::Tcp(tokio::net::TcpListener::from_std(listener)?), None)
            }
            Self::Unix(listener, file) => {
                (connection::Listener::Unix(tokio::net::UnixListener::from_std(listener)?), Some(file))
            }
        })
    }
}

/// Whether `path` is a socket that nobody listens at: that of a server that was killed.
fn is_left_over(path: &Path) -> bool {
    let is_socket = std::fs::symlink_metadata(path).is_ok_and(|metadata| metadata.file_type().is_socket());
    let refused = |error: io::Error| error.kind() == io::ErrorKind::ConnectionRefused;
    is_socket && UnixStream::connect(path).is_err_and(refused)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_socket_left_behind_is_replaced_and_one_in_use_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let endpoint = Endpoint::Unix(dir.path().join("longhaul.sock"));
        let path = dir.path().join("longhaul.sock");
        drop(UnixListener::bind(&path).unwrap());
        assert!(path.exists(), "the system leaves the file");
        let bound = Bound::new(&endpoint).unwrap();
        assert_eq!(Bound::new(&endpoint).map(drop).unwrap_err().kind(), io::ErrorKind::AddrInUse);
        UnixStream::connect(&path).unwrap();
        drop(bound);
        assert!(!path.exists());
        // A file of another kind is never removed.
        std::fs::write(&path, "mine").unwrap();
        assert!(Bound::new(&endpoint).is_err());
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "mine");
    }
}
