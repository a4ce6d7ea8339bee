//! Compiles source files side by side, each only when it or a header it includes has changed.

use std::collections::hash_map::DefaultHasher;
use std::hash::{Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

/// One file to compile: `command` writes `output` and a make-style dependency file.
pub struct Job {
    /// What is compiled, for messages.
    pub source: PathBuf,
    /// What the command writes.
    pub output: PathBuf,
    /// Where the command writes its dependencies (`-MD -MF`).
    pub dependencies: PathBuf,
    /// Compiler and arguments.
    pub command: Command,
}

/// Runs the jobs that are out of date, as many at once as cargo allows. Returns the compilers' messages by source, those of
/// outputs that are kept from an earlier run as well (they lie beside the output, extension `log`).
///
/// # Errors
/// The messages of the compilations that failed.
pub fn run(jobs: Vec<Job>) -> Result<Vec<(PathBuf, String)>, String> {
    let threads = std::env::var("NUM_JOBS").ok().and_then(|n| n.parse().ok()).unwrap_or(1usize);
    let (fresh, stale): (Vec<Job>, Vec<Job>) = jobs.into_iter().partition(is_fresh);
    let kept = fresh.into_iter().map(|job| {
        let message = std::fs::read_to_string(log_path(&job.output)).unwrap_or_default();
        Ok((job.source, message))
    });
    let results = Mutex::new(kept.collect::<Vec<Result<(PathBuf, String), String>>>());
    let queue: Vec<Mutex<Option<Job>>> = stale.into_iter().map(|job| Mutex::new(Some(job))).collect();
    let next = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for _ in 0..threads.min(queue.len()) {
            scope.spawn(|| {
                while let Some(slot) = queue.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let job = slot.lock().expect("no holder panics").take().expect("each slot is taken once");
                    let result = compile(job);
                    results.lock().expect("no holder panics").push(result);
                }
            });
        }
    });
    let (messages, failures): (Vec<_>, Vec<_>) =
        results.into_inner().expect("no holder panics").into_iter().partition(Result::is_ok);
    if failures.is_empty() {
        let mut messages: Vec<_> = messages.into_iter().flatten().collect();
        messages.sort();
        Ok(messages)
    } else {
        Err(failures.into_iter().filter_map(Result::err).collect::<Vec<_>>().join("\n"))
    }
}

fn compile(mut job: Job) -> Result<(PathBuf, String), String> {
    let stamp = stamp_path(&job.output);
    let _ = std::fs::remove_file(&stamp);
    let fingerprint = fingerprint(&job.command);
    let output = job
        .command
        .output()
        .map_err(|e| format!("cannot run {}: {e}", job.command.get_program().to_string_lossy()))?;
    let message =
        String::from_utf8_lossy(&output.stderr).into_owned() + &String::from_utf8_lossy(&output.stdout);
    if !output.status.success() {
        return Err(format!("{} does not compile:\n{message}", job.source.display()));
    }
    let write = |path: &Path, text: &str| {
        std::fs::write(path, text).map_err(|e| format!("cannot write {}: {e}", path.display()))
    };
    write(&log_path(&job.output), &message)?;
    write(&stamp, &fingerprint)?;
    Ok((job.source, message))
}

fn stamp_path(output: &Path) -> PathBuf {
    output.with_extension("stamp")
}

fn log_path(output: &Path) -> PathBuf {
    output.with_extension("log")
}

/// Compiler and flags: other flags make an output stale.
fn fingerprint(command: &Command) -> String {
    let mut hasher = DefaultHasher::new();
    format!("{command:?}").hash(&mut hasher);
    format!("{:016x}", hasher.finish())
}

fn is_fresh(job: &Job) -> bool {
    let modified = |path: &Path| std::fs::metadata(path).and_then(|m| m.modified()).ok();
    let (Some(built), Ok(dependencies)) = (modified(&job.output), std::fs::read_to_string(&job.dependencies))
    else {
        return false;
    };
    if std::fs::read_to_string(stamp_path(&job.output)).ok() != Some(fingerprint(&job.command)) {
        return false;
    }
    let files = dependencies.split_once(':').map_or("", |(_, files)| files);
    files
        .split_whitespace()
        .filter(|token| *token != "\\")
        .all(|file| modified(Path::new(file)).is_some_and(|changed| changed < built))
}
