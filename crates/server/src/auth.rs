//! API keys. They come from a file or the environment, are kept as SHA-256 digests, and are compared in constant time.

use std::fmt;
use std::sync::Arc;

use axum::http::HeaderMap;
use axum::http::header::AUTHORIZATION;
use sha2::{Digest, Sha256};
use subtle::{Choice, ConstantTimeEq};

use crate::serving::Namespace;

/// Longest key.
const MAX_KEY_BYTES: usize = 1024;

/// The keys that may call the API.
#[derive(Clone, Default)]
pub struct ApiKeys {
    digests: Arc<[[u8; 32]]>,
}

/// A key that is none.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum KeyError {
    /// A line without a key, or a key too long to be one.
    #[error("key {0}: an API key has 1 to {MAX_KEY_BYTES} printable ASCII characters without spaces")]
    Malformed(usize),
    /// A source of keys that has none.
    #[error("no API key in it; one key a line is expected")]
    Empty,
}

impl ApiKeys {
    /// The keys in `keys`, numbered from 1 in errors.
    ///
    /// # Errors
    /// [`KeyError::Malformed`].
    pub fn new<'a>(keys: impl IntoIterator<Item = &'a str>) -> Result<Self, KeyError> {
        let mut digests = Vec::new();
        for (index, key) in keys.into_iter().enumerate() {
            let printable = key.bytes().all(|b| b.is_ascii_graphic());
            if key.is_empty() || key.len() > MAX_KEY_BYTES || !printable {
                return Err(KeyError::Malformed(index + 1));
            }
            digests.push(digest(key.as_bytes()));
        }
        Ok(Self { digests: digests.into() })
    }

    /// One key a line; empty lines and lines that begin with `#` are skipped.
    ///
    /// # Errors
    /// [`KeyError::Malformed`], and [`KeyError::Empty`] for a text without keys.
    pub fn parse(text: &str) -> Result<Self, KeyError> {
        let keys = text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'));
        let keys = Self::new(keys)?;
        if keys.is_empty() { Err(KeyError::Empty) } else { Ok(keys) }
    }

    /// These keys and those of `other`.
    pub fn and(&self, other: &Self) -> Self {
        Self { digests: self.digests.iter().chain(other.digests.iter()).copied().collect() }
    }

    /// Whether there is no key: everybody may call.
    pub fn is_empty(&self) -> bool {
        self.digests.is_empty()
    }

    /// Whose request it is; none when it may not be served. Without keys every request may, in one namespace.
    pub(crate) fn admit(&self, headers: &HeaderMap) -> Option<Namespace> {
        if self.is_empty() {
            return Some(Namespace::default());
        }
        let mut values = headers.get_all(AUTHORIZATION).iter();
        let (value, None) = (values.next()?, values.next()) else { return None };
        let (scheme, token) = value.to_str().ok()?.split_once(' ')?;
        if !scheme.eq_ignore_ascii_case("bearer") {
            return None;
        }
        let given = digest(token.as_bytes());
        // Every key is looked at, so the time tells nothing of which one matched or how far.
        let known = self.digests.iter().fold(Choice::from(0), |known, key| known | key.ct_eq(&given));
        bool::from(known).then(|| {
            let name: String = given.iter().take(8).map(|byte| format!("{byte:02x}")).collect();
            Namespace(Some(name.into()))
        })
    }
}

/// Never the keys.
impl fmt::Debug for ApiKeys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ApiKeys({})", self.digests.len())
    }
}

fn digest(bytes: &[u8]) -> [u8; 32] {
    Sha256::digest(bytes).into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use axum::http::HeaderValue;

    fn headers(values: &[&str]) -> HeaderMap {
        let mut headers = HeaderMap::new();
        for value in values {
            headers.append(AUTHORIZATION, HeaderValue::from_str(value).unwrap());
        }
        headers
    }

    #[test]
    fn only_a_whole_key_opens() {
        let keys = ApiKeys::parse("# keys of the team\nsecret-1\n\n  secret-2  \n").unwrap();
        for good in ["Bearer secret-1", "bearer secret-2", "BEARER secret-1"] {
            assert!(keys.admit(&headers(&[good])).is_some(), "{good}");
        }
        for bad in [
            "",
            "secret-1",
            "Bearer",
            "Bearer ",
            "Bearer secret",
            "Bearer secret-12",
            "Basic secret-1",
            "Bearer  secret-1",
            "Bearer secret-1 ",
            "Bearer # keys of the team",
            "Bearer SECRET-1",
        ] {
            assert!(keys.admit(&headers(&[bad])).is_none(), "{bad}");
        }
        assert!(keys.admit(&headers(&[])).is_none());
        assert!(keys.admit(&headers(&["Bearer secret-1", "Bearer secret-1"])).is_none(), "two headers");
    }

    #[test]
    fn a_key_is_a_namespace_and_never_shown() {
        let keys = ApiKeys::new(["canary-one", "canary-two"]).unwrap();
        let one = keys.admit(&headers(&["Bearer canary-one"])).unwrap();
        let two = keys.admit(&headers(&["Bearer canary-two"])).unwrap();
        assert_ne!(one, two);
        assert_eq!(one, keys.admit(&headers(&["Bearer canary-one"])).unwrap());
        assert!(!format!("{keys:?} {one:?}").contains("canary"));
    }

    #[test]
    fn what_is_no_key_is_refused_by_number() {
        assert_eq!(ApiKeys::new(["ok", "with space"]).unwrap_err(), KeyError::Malformed(2));
        assert_eq!(ApiKeys::new([""]).unwrap_err(), KeyError::Malformed(1));
        assert_eq!(ApiKeys::new(["x".repeat(1025).as_str()]).unwrap_err(), KeyError::Malformed(1));
        assert!(ApiKeys::new(["x".repeat(1024).as_str()]).is_ok());
        assert_eq!(ApiKeys::parse("\n# nothing\n").unwrap_err(), KeyError::Empty);
        assert!(ApiKeys::default().admit(&headers(&[])).is_some());
    }
}
