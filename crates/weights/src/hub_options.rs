//! Where the hub cache lies and how the hub is reached, taken from the environment by the caller.

use std::ffi::OsString;
use std::fmt;
use std::path::PathBuf;

/// Hub settings; [`HubOptions::from_env`] reads the variables that huggingface_hub reads.
#[derive(Clone)]
pub struct HubOptions {
    /// Directory that holds `models--org--name` folders.
    pub cache_dir: PathBuf,
    /// Never connect.
    pub offline: bool,
    /// Base URL of the hub or a mirror of it.
    pub endpoint: String,
    /// Access token for gated and private models.
    pub token: Option<String>,
}

impl fmt::Debug for HubOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // The token must not reach a log.
        let token = self.token.as_ref().map(|_| "(set)");
        f.debug_struct("HubOptions")
            .field("cache_dir", &self.cache_dir)
            .field("offline", &self.offline)
            .field("endpoint", &self.endpoint)
            .field("token", &token)
            .finish()
    }
}

impl HubOptions {
    /// The public hub.
    pub const DEFAULT_ENDPOINT: &'static str = "https://huggingface.co";

    /// From `HF_HUB_CACHE`, `HF_HOME`, `XDG_CACHE_HOME`, `HF_HUB_OFFLINE`, `TRANSFORMERS_OFFLINE`, `HF_ENDPOINT`,
    /// `HF_TOKEN` and the token file, with huggingface_hub's precedence and defaults.
    pub fn from_env() -> Self {
        Self::from_vars(|name| std::env::var_os(name), std::env::home_dir())
    }

    /// As [`HubOptions::from_env`], with the variables and the home directory given.
    pub fn from_vars(var: impl Fn(&str) -> Option<OsString>, home: Option<PathBuf>) -> Self {
        let set = |name: &str| var(name).filter(|value| !value.is_empty());
        let text = |name: &str| set(name).map(|v| v.to_string_lossy().trim().to_owned());
        let flag = |name: &str| {
            text(name).is_some_and(|v| ["1", "on", "yes", "true"].contains(&v.to_ascii_lowercase().as_str()))
        };
        let hf_home = set("HF_HOME").map(PathBuf::from).unwrap_or_else(|| {
            let cache = set("XDG_CACHE_HOME").map(PathBuf::from);
            cache.unwrap_or_else(|| home.unwrap_or_default().join(".cache")).join("huggingface")
        });
        let token_file = || set("HF_TOKEN_PATH").map(PathBuf::from).unwrap_or_else(|| hf_home.join("token"));
        let token = text("HF_TOKEN")
            .or_else(|| text("HUGGING_FACE_HUB_TOKEN"))
            .or_else(|| std::fs::read_to_string(token_file()).ok().map(|t| t.trim().to_owned()))
            .filter(|token| !token.is_empty());
        Self {
            cache_dir: set("HF_HUB_CACHE").map(PathBuf::from).unwrap_or_else(|| hf_home.join("hub")),
            offline: flag("HF_HUB_OFFLINE") || flag("TRANSFORMERS_OFFLINE"),
            endpoint: text("HF_ENDPOINT")
                .map_or_else(|| Self::DEFAULT_ENDPOINT.to_owned(), |e| e.trim_end_matches('/').to_owned()),
            token,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(vars: &[(&str, &str)]) -> HubOptions {
        let lookup = |name: &str| vars.iter().find(|(n, _)| *n == name).map(|(_, v)| OsString::from(v));
        HubOptions::from_vars(lookup, Some(PathBuf::from("/home/nobody-here")))
    }

    #[test]
    fn cache_precedence_is_that_of_huggingface_hub() {
        let cache = |vars: &[(&str, &str)]| options(vars).cache_dir.display().to_string();
        assert_eq!(cache(&[]), "/home/nobody-here/.cache/huggingface/hub");
        assert_eq!(cache(&[("XDG_CACHE_HOME", "/x")]), "/x/huggingface/hub");
        assert_eq!(cache(&[("XDG_CACHE_HOME", "/x"), ("HF_HOME", "/h")]), "/h/hub");
        assert_eq!(cache(&[("HF_HUB_CACHE", "/c"), ("HF_HOME", "/h")]), "/c");
        assert_eq!(cache(&[("HF_HUB_CACHE", ""), ("HF_HOME", "/h")]), "/h/hub");
    }

    #[test]
    fn offline_flags() {
        for (vars, expected) in [
            (vec![], false),
            (vec![("HF_HUB_OFFLINE", "1")], true),
            (vec![("HF_HUB_OFFLINE", "True")], true),
            (vec![("HF_HUB_OFFLINE", "0")], false),
            (vec![("TRANSFORMERS_OFFLINE", "yes")], true),
        ] {
            assert_eq!(options(&vars).offline, expected, "{vars:?}");
        }
    }

    #[test]
    fn endpoint_and_token() {
        assert_eq!(options(&[]).endpoint, HubOptions::DEFAULT_ENDPOINT);
        let set = options(&[("HF_ENDPOINT", "https://mirror.example/"), ("HF_TOKEN", "hf_secret")]);
        assert_eq!(set.endpoint, "https://mirror.example");
        assert_eq!(set.token.as_deref(), Some("hf_secret"));
        assert!(!format!("{set:?}").contains("hf_secret"));
    }
}
