//! What the user typed for a model: a hub id `org/name`, optionally `@revision`, held to names that cannot leave the
//! cache directory or the URL they are put into.

use crate::{Result, WeightsError};

/// The longest organisation, name or revision accepted (the hub's own limit for names).
const LONGEST: usize = 96;

/// A checked hub id.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct HubId {
    /// `org/name`.
    pub repo: String,
    /// Branch, tag, `refs/pr/N` or commit hash.
    pub revision: String,
}

impl HubId {
    /// Parses `org/name` or `org/name@revision`.
    pub(crate) fn parse(model: &str) -> Result<Self> {
        let refuse = |problem: &str| {
            Err(WeightsError::ModelId { model: model.to_owned(), problem: problem.to_owned() })
        };
        let (repo, revision) = model.split_once('@').unwrap_or((model, "main"));
        let mut parts = repo.split('/');
        let (Some(org), Some(name), None) = (parts.next(), parts.next(), parts.next()) else {
            return refuse("no such directory, and not a hub id (one organisation, one `/`, one name)");
        };
        if !is_name(org) || !is_name(name) {
            return refuse(
                "no such directory, and not a hub id (letters, digits, `-`, `_` and `.`; no `..` or `--`; not at the \
                 ends)",
            );
        }
        if revision.len() > LONGEST || !revision.split('/').all(is_name) {
            return refuse("the revision behind `@` is not a branch, tag or commit hash");
        }
        Ok(Self { repo: repo.to_owned(), revision: revision.to_owned() })
    }

    /// Name of the model's folder in the cache.
    pub(crate) fn cache_folder(&self) -> String {
        format!("models--{}", self.repo.replace('/', "--"))
    }
}

impl std::fmt::Display for HubId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.repo)?;
        if self.revision == "main" { Ok(()) } else { write!(f, "@{}", self.revision) }
    }
}

/// Whether `part` is a name as the hub allows it: no separators, no relative steps, not hidden.
fn is_name(part: &str) -> bool {
    let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    let bad_end = |c: char| matches!(c, '-' | '.');
    !part.is_empty()
        && part.len() <= LONGEST
        && part.chars().all(allowed)
        && !part.starts_with(bad_end)
        && !part.ends_with(bad_end)
        && !part.contains("..")
        && !part.contains("--")
}

/// Whether `hash` can be a folder of `snapshots/`: what a ref file or a server may name.
pub(crate) fn is_commit(hash: &str) -> bool {
    !hash.is_empty() && hash.len() <= LONGEST && hash.bytes().all(|b| b.is_ascii_alphanumeric())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_and_revisions() {
        let id = HubId::parse("Qwen/Qwen2-0.5B-Instruct").unwrap();
        assert_eq!((id.repo.as_str(), id.revision.as_str()), ("Qwen/Qwen2-0.5B-Instruct", "main"));
        assert_eq!(id.cache_folder(), "models--Qwen--Qwen2-0.5B-Instruct");
        assert_eq!(HubId::parse("a/b@refs/pr/1").unwrap().revision, "refs/pr/1");
        assert_eq!(HubId::parse("a/b@v1.0").unwrap().to_string(), "a/b@v1.0");
    }

    #[test]
    fn ids_that_could_leave_the_cache_are_refused() {
        let long = format!("a/{}", "b".repeat(97));
        for model in [
            "",
            "gpt2",
            "/",
            "a/",
            "/b",
            "a/b/c",
            "../b",
            "a/..",
            "./b",
            "a/b@",
            "a/b@../main",
            "a/b@/main",
            "a/b@x//y",
            "a/b@.hidden",
            "a b/c",
            "a/b?x",
            "a/b#x",
            "a/b%2e",
            "a\\b/c",
            "~/models",
            "a/b@x@y",
            "a--b/c",
            "a/.b",
            "a/-b",
            "a/b\n",
            "ä/b",
            long.as_str(),
        ] {
            let error = HubId::parse(model).unwrap_err();
            assert!(matches!(error, WeightsError::ModelId { .. }), "{model:?}: {error}");
        }
    }
}
