//! API keys. They come from a file or the environment, are kept as SHA-256 digests, and are compared in constant time.

use std::fmt;
use std::sync::Arc;
use std::time::Instant;

use axum::http::HeaderMap;
use axum::http::header::AUTHORIZATION;
use sha2::{Digest, Sha256};
use subtle::{ConditionallySelectable, ConstantTimeEq};

use crate::quota::{KeyTerms, Quota};
use crate::serving::Namespace;

/// Longest key.
const MAX_KEY_BYTES: usize = 1024;

/// The keys that may call the API.
#[derive(Clone, Default)]
pub struct ApiKeys {
    keys: Arc<[Key]>,
}

#[derive(Clone)]
struct Key {
    digest: [u8; 32],
    quota: Arc<Quota>,
}

/// Who a request is from.
#[derive(Debug, Clone, Default)]
pub(crate) struct Admitted {
    pub(crate) namespace: Namespace,
    /// None without keys.
    pub(crate) quota: Option<Arc<Quota>>,
}

/// A key that is none.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum KeyError {
    /// A line without a key, or a key too long to be one.
    #[error("key {0}: an API key has 1 to {MAX_KEY_BYTES} printable ASCII characters without spaces")]
    Malformed(usize),
    /// A term of a key that is none.
    #[error("key {key}: {term:?} is none of name=NAME, rpm=N, tpm=N, concurrent=N, priority=N")]
    Term {
        /// The key's number.
        key: usize,
        /// What was written.
        term: String,
    },
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
        Self::with_terms(keys.into_iter().map(|key| (key, KeyTerms::default())))
    }

    /// Keys with what their owners may ask for.
    ///
    /// # Errors
    /// [`KeyError::Malformed`].
    pub fn with_terms<'a>(keys: impl IntoIterator<Item = (&'a str, KeyTerms)>) -> Result<Self, KeyError> {
        let now = Instant::now();
        let mut all = Vec::new();
        for (index, (key, terms)) in keys.into_iter().enumerate() {
            let printable = key.bytes().all(|b| b.is_ascii_graphic());
            if key.is_empty() || key.len() > MAX_KEY_BYTES || !printable {
                return Err(KeyError::Malformed(index + 1));
            }
            all.push(Key { digest: digest(key.as_bytes()), quota: Arc::new(Quota::new(terms, now)) });
        }
        Ok(Self { keys: all.into() })
    }

    /// One key a line, with its terms after it: `KEY [name=NAME] [rpm=N] [tpm=N] [concurrent=N] [priority=N]`. Empty lines
    /// and lines that begin with `#` are skipped.
    ///
    /// # Errors
    /// [`KeyError::Malformed`], [`KeyError::Term`], and [`KeyError::Empty`] for a text without keys.
    pub fn parse(text: &str) -> Result<Self, KeyError> {
        let keys = text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'));
        let mut all = Vec::new();
        for (index, line) in keys.enumerate() {
            let mut words = line.split_ascii_whitespace();
            let key = words.next().unwrap_or_default();
            let mut terms = KeyTerms::default();
            for word in words {
                term(&mut terms, word).ok_or_else(|| KeyError::Term {
                    key: index + 1,
                    term: word.chars().take(64).collect(),
                })?;
            }
            all.push((key, terms));
        }
        let keys = Self::with_terms(all)?;
        if keys.is_empty() { Err(KeyError::Empty) } else { Ok(keys) }
    }

    /// These keys and those of `other`.
    pub fn and(&self, other: &Self) -> Self {
        Self { keys: self.keys.iter().chain(other.keys.iter()).cloned().collect() }
    }

    /// Whether there is no key: everybody may call.
    pub fn is_empty(&self) -> bool {
        self.keys.is_empty()
    }

    /// Whether a key has a priority of its own.
    pub fn have_priorities(&self) -> bool {
        self.keys.iter().any(|key| key.quota.terms.priority != 0)
    }

    /// Whose request it is; none when it may not be served. Without keys every request may, in one namespace.
    pub(crate) fn admit(&self, headers: &HeaderMap) -> Option<Admitted> {
        if self.is_empty() {
            return Some(Admitted::default());
        }
        let mut values = headers.get_all(AUTHORIZATION).iter();
        let (value, None) = (values.next()?, values.next()) else { return None };
        let (scheme, token) = value.to_str().ok()?.split_once(' ')?;
        if !scheme.eq_ignore_ascii_case("bearer") {
            return None;
        }
        let given = digest(token.as_bytes());
        // Every key is looked at, so the time tells nothing of which one matched or how far.
        let mut found = 0u64;
        for (number, key) in (1..).zip(self.keys.iter()) {
            found = u64::conditional_select(&found, &number, key.digest.ct_eq(&given));
        }
        let key = self.keys.get(usize::try_from(found.checked_sub(1)?).ok()?)?;
        let name: String = given.iter().take(8).map(|byte| format!("{byte:02x}")).collect();
        Some(Admitted { namespace: Namespace(Some(name.into())), quota: Some(Arc::clone(&key.quota)) })
    }
}

/// Never the keys.
impl fmt::Debug for ApiKeys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ApiKeys({})", self.keys.len())
    }
}

/// Takes a term of a key; none when it is none.
fn term(terms: &mut KeyTerms, word: &str) -> Option<()> {
    let (name, value) = word.split_once('=')?;
    let count = || value.parse::<u32>().ok().filter(|n| *n > 0);
    match name {
        "name" => {
            let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.' | b'@');
            let good = (1..=64).contains(&value.len()) && value.bytes().all(plain);
            terms.name = good.then(|| value.to_owned());
            terms.name.is_some().then_some(())
        }
        "rpm" => count().map(|n| terms.requests_per_minute = Some(n)),
        "tpm" => count().map(|n| terms.tokens_per_minute = Some(n)),
        "concurrent" => count().map(|n| terms.concurrent = Some(n)),
        "priority" => value.parse().ok().map(|n| terms.priority = n),
        _ => None,
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
        let of = |key: &str| keys.admit(&headers(&[&format!("Bearer {key}")])).unwrap().namespace;
        let (one, two) = (of("canary-one"), of("canary-two"));
        assert_ne!(one, two);
        assert_eq!(one, of("canary-one"));
        assert!(!format!("{keys:?} {one:?}").contains("canary"));
    }

    #[test]
    fn terms_stand_after_their_key() {
        let keys = ApiKeys::parse("plain\nsecret name=team-a rpm=60 tpm=100000\tconcurrent=4 priority=-1\n")
            .unwrap();
        let terms = |key: &str| {
            let admitted = keys.admit(&headers(&[&format!("Bearer {key}")])).unwrap();
            admitted.quota.unwrap().terms.clone()
        };
        assert_eq!(terms("plain"), KeyTerms::default());
        let all = KeyTerms {
            name: Some("team-a".into()),
            requests_per_minute: Some(60),
            tokens_per_minute: Some(100_000),
            concurrent: Some(4),
            priority: -1,
        };
        assert_eq!(terms("secret"), all);
        for bad in
            ["rpm", "rpm=", "rpm=0", "rpm=-1", "rpm=x", "RPM=1", "name=", "name=a/b", "priority=high", "more"]
        {
            let error = ApiKeys::parse(&format!("first\nsecret {bad}")).unwrap_err();
            assert_eq!(error, KeyError::Term { key: 2, term: bad.into() });
            assert!(!error.to_string().contains("secret"), "{error}");
        }
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
