//! From what the user typed to a directory: a directory as it is, or a hub id found in the hub cache, or downloaded
//! into it.
//!
//! Only the files that are needed are fetched, all of one commit. What the server says (commit, etag) is checked before
//! it becomes part of a path, and the size on disk before a file counts as downloaded.

use std::path::{Component, Path, PathBuf};

use hf_hub::api::sync::{Api, ApiBuilder, ApiError, ApiRepo};
use hf_hub::{Cache, Repo, RepoType};

use crate::checkpoint::SINGLE_FILE;
use crate::error::shown;
use crate::hub_cache::{OPTIONAL, REQUIRED, missing_files, shards, snapshot};
use crate::hub_id::{HubId, is_commit};
use crate::index::INDEX_FILE;
use crate::{DownloadProgress, HubOptions, Result, StderrBar, WeightsError};

/// Attempts for one file; an interrupted download continues where it stopped.
const ATTEMPTS: usize = 3;

/// Which of a model's files are wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wanted {
    /// Config, tokenizer and templates: what describes it, a few megabytes.
    Description,
    /// Its weights, too.
    Weights,
}

/// The directory of `model`, with settings from the environment and a progress bar on standard error.
///
/// `offline` forbids connections even where `HF_HUB_OFFLINE` does not.
///
/// # Errors
/// As [`locate_with`].
pub fn locate(model: &str, wanted: Wanted, offline: bool) -> Result<PathBuf> {
    let mut options = HubOptions::from_env();
    options.offline |= offline;
    locate_with(model, wanted, &options, &mut StderrBar::new())
}

/// The directory of `model`: an existing directory, or a hub id `org/name[@revision]` from the cache or, if what is wanted is
/// not there, from the hub.
///
/// # Errors
/// [`WeightsError::ModelId`] for what is neither, [`WeightsError::Unavailable`] when a hub model cannot be had, with the
/// reason and the remedies.
pub fn locate_with(
    model: &str,
    wanted: Wanted,
    options: &HubOptions,
    progress: &mut dyn DownloadProgress,
) -> Result<PathBuf> {
    let path = Path::new(model);
    if path.is_dir() {
        return Ok(path.to_owned());
    }
    if path.is_file() {
        return Err(WeightsError::NotADirectory { path: path.to_owned() });
    }
    // What can only be meant as a path is not sent to a server.
    if path.is_absolute()
        || model.starts_with('.')
        || model.ends_with('/')
        || model.matches('/').count() > 1 && !model.contains('@')
    {
        return Err(WeightsError::NoSuchDirectory { dir: path.to_owned() });
    }
    let id = HubId::parse(model)?;
    let cached = snapshot(&options.cache_dir, &id);
    let missing = match &cached {
        Some(dir) => {
            let missing = missing_files(dir, wanted)?;
            if missing.is_empty() {
                return Ok(dir.clone());
            }
            missing
        }
        None => Vec::new(),
    };
    let download = Download { id: &id, wanted, options, missing };
    if options.offline {
        return Err(download.unavailable("offline mode is on (HF_HUB_OFFLINE or the offline flag)"));
    }
    download.run(progress)
}

/// One model's download.
struct Download<'a> {
    id: &'a HubId,
    wanted: Wanted,
    options: &'a HubOptions,
    /// What a partial cache entry lacked at the start, for messages.
    missing: Vec<String>,
}

impl Download<'_> {
    fn unavailable(&self, reason: impl Into<String>) -> WeightsError {
        WeightsError::Unavailable {
            model: self.id.to_string(),
            cache: self.options.cache_dir.join(self.id.cache_folder()),
            missing: self.missing.clone(),
            reason: reason.into(),
        }
    }

    fn run(&self, progress: &mut dyn DownloadProgress) -> Result<PathBuf> {
        let io = |action| {
            let path = self.options.cache_dir.clone();
            move |source| WeightsError::Io { path, action, source }
        };
        // hf-hub links blobs with relative paths, for which it needs an absolute cache path.
        let cache_dir = std::path::absolute(&self.options.cache_dir).map_err(io("resolve"))?;
        std::fs::create_dir_all(&cache_dir).map_err(io("create the hub cache"))?;
        let cache = Cache::new(cache_dir.clone());
        let api = ApiBuilder::from_cache(cache.clone())
            .with_endpoint(self.options.endpoint.clone())
            .with_token(self.options.token.clone())
            .with_progress(false)
            .build()
            .map_err(|error| self.unavailable(self.explain(&error)))?;
        let repo = Repo::with_revision(self.id.repo.clone(), RepoType::Model, self.id.revision.clone());
        let files = Files { download: self, cache, repo: repo.clone(), remote: api.repo(repo), api };

        progress.contacting(&self.options.endpoint);
        let info = files.remote.info().map_err(|error| self.unavailable(self.explain(&error)))?;
        if !is_commit(&info.sha) {
            return Err(
                self.unavailable(format!("the hub named an impossible commit `{}`", shown(&info.sha)))
            );
        }
        let offered = |name: &str| info.siblings.iter().any(|s| s.rfilename == name);
        if let Some(name) = REQUIRED.iter().find(|name| !offered(name)) {
            return Err(self.unavailable(format!("the repository has no {name}")));
        }
        let weights = [SINGLE_FILE, INDEX_FILE].into_iter().find(|name| offered(name));
        if self.wanted == Wanted::Weights && weights.is_none() {
            return Err(self.unavailable(
                "the repository has no model.safetensors and no index of shards; no other format is read",
            ));
        }
        for name in REQUIRED.iter().chain(OPTIONAL.iter().filter(|name| offered(name))) {
            files.fetch(name, &info.sha, progress)?;
        }
        if let Some(weights) = weights.filter(|_| self.wanted == Wanted::Weights) {
            let path = files.fetch(weights, &info.sha, progress)?;
            let shards = if weights == INDEX_FILE { shards(&path)? } else { Vec::new() };
            for shard in shards {
                files.fetch(&shard, &info.sha, progress)?;
            }
        }
        let dir = cache_dir.join(self.id.cache_folder()).join("snapshots").join(&info.sha);
        match missing_files(&dir, self.wanted)? {
            missing if missing.is_empty() => Ok(dir),
            missing => Err(self.unavailable(format!("{} did not arrive", missing.join(", ")))),
        }
    }

    /// An API error in words, with what to do about it.
    fn explain(&self, error: &ApiError) -> String {
        let endpoint = &self.options.endpoint;
        match error {
            ApiError::RequestError(request) => match &**request {
                ureq::Error::StatusCode(status @ (401 | 403)) => format!(
                    "{endpoint} answered {status}: the model does not exist, is private, or is gated (accept its terms \
                     and set HF_TOKEN)"
                ),
                ureq::Error::StatusCode(404) => {
                    format!("{endpoint} answered 404: no such model, revision or file; check the spelling")
                }
                ureq::Error::StatusCode(status) => format!("{endpoint} answered {status}"),
                other => format!("{endpoint} cannot be reached ({})", shown(&other.to_string())),
            },
            other => format!("of an error with {endpoint}: {}", shown(&other.to_string())),
        }
    }
}

/// The remote repository and where its files go.
struct Files<'a> {
    download: &'a Download<'a>,
    cache: Cache,
    repo: Repo,
    api: Api,
    remote: ApiRepo,
}

impl Files<'_> {
    /// Path of `name` in the snapshot of `commit`, downloaded if it is not there.
    fn fetch(&self, name: &str, commit: &str, progress: &mut dyn DownloadProgress) -> Result<PathBuf> {
        let repo = self.cache.repo(self.repo.clone());
        let path = repo.pointer_path(commit).join(name);
        if path.is_file() {
            return Ok(path);
        }
        let fail = |reason: String| self.download.unavailable(format!("{name}: {reason}"));
        let url = self.remote.url(name);
        progress.contacting(&url);
        let remote = self.api.metadata(&url).map_err(|error| fail(self.download.explain(&error)))?;
        if remote.commit_hash() != commit {
            return Err(fail("the repository changed during the download; start again".to_owned()));
        }
        // hf-hub names the blob after the etag.
        if !Path::new(remote.etag()).components().all(|c| matches!(c, Component::Normal(_))) {
            return Err(fail(format!("the server sent an impossible etag `{}`", shown(remote.etag()))));
        }
        let blob = repo.blob_path(remote.etag());
        let partial = blob.with_extension("part");
        let size = remote.size() as u64;
        let is_whole = |path: &Path| std::fs::metadata(path).is_ok_and(|m| m.len() == size);
        let mut reason = String::new();
        for _ in 0..ATTEMPTS {
            // A partial file as long as the whole (or longer) cannot be continued with a range request.
            if std::fs::metadata(&partial).is_ok_and(|m| m.len() >= size) {
                let _ = std::fs::remove_file(&partial);
            }
            match self.remote.download_with_progress(name, Meter { progress: &mut *progress }) {
                Ok(_) if is_whole(&path) => return Ok(path),
                Ok(_) => {
                    reason = format!("arrived with another size than the announced {size} bytes");
                    let _ = std::fs::remove_file(&path);
                    let _ = std::fs::remove_file(&blob);
                }
                Err(error) => {
                    reason = self.download.explain(&error);
                    let final_answer = matches!(
                        &error,
                        ApiError::RequestError(e) if matches!(**e, ureq::Error::StatusCode(400..=499))
                    );
                    if final_answer || matches!(error, ApiError::LockAcquisition(_)) {
                        break;
                    }
                }
            }
        }
        Err(fail(reason))
    }
}

/// Passes hf-hub's progress on.
struct Meter<'a> {
    progress: &'a mut dyn DownloadProgress,
}

impl hf_hub::api::Progress for Meter<'_> {
    fn init(&mut self, size: usize, filename: &str) {
        self.progress.start(filename, size as u64);
    }

    fn update(&mut self, size: usize) {
        self.progress.advance(size as u64);
    }

    fn finish(&mut self) {
        self.progress.finish();
    }
}
