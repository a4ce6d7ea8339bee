//! Ranks that are processes. This process is rank 0; the others are started with a command that calls [`rank_process`].

use std::io::{self, Read, Write};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use longhaul_collective::{Options, Processes, Segment, end_with_parent};
use serde::{Deserialize, Serialize};

use super::{Case, CollectiveFigure, CollectivesError, Progress, limits, measure, report};

/// Makes the command of a rank's process.
pub type RankCommand<'a> = &'a dyn Fn() -> io::Result<Command>;

/// What a rank's process is told through its standard input, as JSON.
#[derive(Debug, Serialize, Deserialize)]
struct Task {
    segment: PathBuf,
    rank: usize,
    ranks: usize,
    parent: u32,
    timeout: Duration,
    cases: Vec<Case>,
    case_seconds: f64,
}

/// A rank's process; ends with this value.
struct Rank {
    rank: usize,
    child: Child,
}

impl Rank {
    fn start(command: RankCommand<'_>, task: &Task) -> Result<Self, CollectivesError> {
        let rank = task.rank;
        let failed = |source| CollectivesError::Process { rank, source };
        let mut command = command().map_err(failed)?;
        let child = command.stdin(Stdio::piped()).stdout(Stdio::null()).spawn().map_err(failed)?;
        let mut rank = Self { rank, child };
        let text = serde_json::to_vec(task).map_err(|e| failed(e.into()))?;
        if let Some(mut input) = rank.child.stdin.take() {
            input.write_all(&text).map_err(failed)?;
        }
        Ok(rank)
    }

    fn wait(&mut self) -> Result<(), CollectivesError> {
        let status =
            self.child.wait().map_err(|source| CollectivesError::Process { rank: self.rank, source })?;
        if status.success() { Ok(()) } else { Err(CollectivesError::Ended { rank: self.rank, status }) }
    }
}

impl Drop for Rank {
    fn drop(&mut self) {
        // One that has ended cannot be killed again, and is not waited for twice.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Measures `cases`, each for about `case_seconds`, among `ranks` (1 to 64) processes: this one and others that `command` starts, each of which must call
/// [`rank_process`].
///
/// # Errors
/// [`CollectivesError`].
pub fn processes(
    ranks: usize,
    cases: &[Case],
    case_seconds: f64,
    command: RankCommand<'_>,
    progress: Progress<'_>,
) -> Result<Vec<CollectiveFigure>, CollectivesError> {
    let limits = limits(ranks, cases);
    let options = Options::default();
    let segment = Segment::create(ranks, options)?;
    let task = |rank| Task {
        segment: segment.path(),
        rank,
        ranks,
        parent: std::process::id(),
        timeout: options.timeout,
        cases: cases.to_vec(),
        case_seconds,
    };
    let mut others =
        (1..ranks).map(|rank| Rank::start(command, &task(rank))).collect::<Result<Vec<_>, _>>()?;
    let samples = Processes::attach(&segment.path(), 0, ranks, options.timeout)
        .map_err(CollectivesError::from)
        .and_then(|group| measure::rank(&group, cases, case_seconds, progress));
    if samples.is_err() {
        // Let them say why before they are ended.
        if let Some(error) = others.iter_mut().find_map(|rank| rank.wait().err()) {
            return Err(error);
        }
    }
    let samples = samples?;
    others.iter_mut().try_for_each(Rank::wait)?;
    Ok(report::figures("processes", ranks, cases, samples, &limits))
}

/// What a rank's process does; `input` is its standard input.
///
/// # Errors
/// [`CollectivesError`], or an input that is none.
pub fn rank_process(input: impl Read) -> Result<(), CollectivesError> {
    let task: Task = serde_json::from_reader(input)
        .map_err(|e| CollectivesError::Process { rank: 0, source: e.into() })?;
    let rank = task.rank;
    end_with_parent(task.parent).map_err(|source| CollectivesError::Process { rank, source })?;
    let group = Processes::attach(&task.segment, rank, task.ranks, task.timeout)?;
    measure::rank(&group, &task.cases, task.case_seconds, &mut |_, _| {}).map(drop)
}
