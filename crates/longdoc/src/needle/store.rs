//! Results on disk: one JSON record a line, appended as cells finish, so that an interrupted run goes on where it was.
//!
//! `results.jsonl` starts with the settings; then come what the models say about themselves, and cells. A last line that
//! was cut off is dropped. The file is locked while a run writes it.

use std::collections::HashMap;
use std::fs::{File, OpenOptions, TryLockError};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::config::Settings;
use super::plan::PlannedCell;
use super::report::{Cell, CellKey, ModeInfo};
use crate::{LongdocError, Result};

/// Name of the results file.
pub(crate) const RESULTS: &str = "results.jsonl";

/// Where results go.
#[derive(Debug, Clone)]
pub struct NeedleOutput {
    /// Folder; made when it is missing.
    pub dir: PathBuf,
    /// Start again, whatever the folder holds of an earlier run.
    pub overwrite: bool,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Record {
    Settings(Settings),
    Mode(ModeInfo),
    Cell(Box<Cell>),
}

/// The results of a run so far.
pub(crate) struct Store {
    file: Option<(PathBuf, File)>,
    cells: HashMap<CellKey, Cell>,
    modes: Vec<ModeInfo>,
}

impl Store {
    /// Keeps results in memory only.
    pub(crate) fn memory() -> Self {
        Self { file: None, cells: HashMap::new(), modes: Vec::new() }
    }

    /// Opens the results in a folder, or starts them.
    pub(crate) fn open(output: &NeedleOutput, settings: &Settings) -> Result<Self> {
        let io = |path: &Path, action, source| LongdocError::Io { path: path.into(), action, source };
        std::fs::create_dir_all(&output.dir).map_err(|e| io(&output.dir, "cannot make the folder", e))?;
        let path = output.dir.join(RESULTS);
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(&path)
            .map_err(|e| io(&path, "cannot open", e))?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(LongdocError::Locked { path }),
            // Some network file systems have no locks.
            Err(TryLockError::Error(e)) if e.kind() == io::ErrorKind::Unsupported => {}
            Err(TryLockError::Error(e)) => return Err(io(&path, "cannot lock", e)),
        }
        if output.overwrite {
            file.set_len(0).map_err(|e| io(&path, "cannot empty", e))?;
        }
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes).map_err(|e| io(&path, "cannot read", e))?;
        let mut store = Self::memory();
        let kept = store.load(&path, &bytes, settings)?;
        file.set_len(kept as u64).map_err(|e| io(&path, "cannot write", e))?;
        file.seek(SeekFrom::End(0)).map_err(|e| io(&path, "cannot write", e))?;
        store.file = Some((path, file));
        if kept == 0 {
            store.append(&Record::Settings(settings.clone()))?;
        }
        Ok(store)
    }

    /// Takes the records of a file; returns the bytes of it that are whole.
    fn load(&mut self, path: &Path, bytes: &[u8], settings: &Settings) -> Result<usize> {
        let mut kept = 0;
        for (number, line) in bytes.split_inclusive(|&b| b == b'\n').enumerate() {
            let last = kept + line.len() == bytes.len();
            let wrong =
                |message: String| LongdocError::Results { path: path.into(), line: number + 1, message };
            let record = match serde_json::from_slice::<Record>(line) {
                Ok(record) if line.ends_with(b"\n") => record,
                // A write that was cut off. The first line must be ours, or the file belongs to somebody else.
                Ok(_) => return Ok(kept),
                Err(_) if last && (number > 0 || line.starts_with(b"{\"settings\"")) => return Ok(kept),
                Err(e) => return Err(wrong(format!("not a record of a needle run ({e})"))),
            };
            match record {
                Record::Settings(there) if number == 0 => {
                    let differences = differences(&there, settings);
                    if !differences.is_empty() {
                        return Err(LongdocError::OtherSettings { path: path.into(), differences });
                    }
                }
                Record::Settings(_) => return Err(wrong("settings may only be on the first line".into())),
                _ if number == 0 => return Err(wrong("the first line must hold the settings".into())),
                Record::Mode(info) => self.keep_mode(info),
                Record::Cell(cell) => {
                    self.cells.insert(cell.key(), *cell);
                }
            }
            kept += line.len();
        }
        Ok(kept)
    }

    /// The result of a cell, if it asked the same question.
    pub(crate) fn get(&self, planned: &PlannedCell) -> Option<&Cell> {
        let cell = self.cells.get(&planned.key())?;
        (cell.expected == planned.fact.expected && cell.question == planned.fact.question).then_some(cell)
    }

    pub(crate) fn modes(&self) -> &[ModeInfo] {
        &self.modes
    }

    pub(crate) fn add_mode(&mut self, info: ModeInfo) -> Result<()> {
        if !self.modes.contains(&info) {
            self.append(&Record::Mode(info.clone()))?;
            self.keep_mode(info);
        }
        Ok(())
    }

    pub(crate) fn add(&mut self, cell: Cell) -> Result<()> {
        self.append(&Record::Cell(Box::new(cell.clone())))?;
        self.cells.insert(cell.key(), cell);
        Ok(())
    }

    fn keep_mode(&mut self, info: ModeInfo) {
        self.modes.retain(|m| m.mode != info.mode);
        self.modes.push(info);
    }

    /// Writes one line at once and waits until it is on disk: a cell may stand for minutes of work.
    fn append(&mut self, record: &Record) -> Result<()> {
        let Some((path, file)) = &mut self.file else { return Ok(()) };
        let mut write = || -> io::Result<()> {
            let mut line = serde_json::to_vec(record)?;
            line.push(b'\n');
            file.write_all(&line)?;
            file.sync_data()
        };
        write().map_err(|source| LongdocError::Io { path: path.clone(), action: "cannot write", source })
    }
}

/// Settings that differ, there and here. The haystack's name may: its content counts.
fn differences(there: &Settings, here: &Settings) -> String {
    let json = |s: &Settings| match serde_json::to_value(s) {
        Ok(serde_json::Value::Object(map)) => map,
        _ => serde_json::Map::new(),
    };
    let (there, here) = (json(there), json(here));
    let differ = here.iter().filter(|(name, value)| *name != "haystack" && there.get(*name) != Some(value));
    let parts: Vec<String> = differ
        .map(|(name, value)| {
            format!("{name}: {} there, {value} here", there.get(name).unwrap_or(&serde_json::Value::Null))
        })
        .collect();
    parts.join("; ")
}

/// Writes a file in one step: readers see the old one or the new one, never half of it.
pub(crate) fn write_atomically(path: &Path, content: &[u8]) -> io::Result<()> {
    let mut temporary = path.as_os_str().to_owned();
    temporary.push(format!(".{}.tmp", std::process::id()));
    let temporary = PathBuf::from(temporary);
    let write = || -> io::Result<()> {
        let mut file = File::create(&temporary)?;
        file.write_all(content)?;
        file.sync_all()?;
        std::fs::rename(&temporary, path)
    };
    write().inspect_err(|_| {
        // The error that counts is the first one.
        let _ = std::fs::remove_file(&temporary);
    })
}
