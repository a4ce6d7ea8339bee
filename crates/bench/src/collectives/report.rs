use std::fmt;

use longhaul_cuda::Context;
use serde::Serialize;

use super::measure::Timed;
use super::{Case, Operation};
use crate::latency::Spread;

/// One operation on one message, by one implementation.
#[derive(Debug, Clone, Serialize)]
pub struct CollectiveFigure {
    /// `threads`, `processes` or `peer`.
    pub implementation: &'static str,
    /// Ranks.
    pub ranks: usize,
    /// The operation.
    pub operation: Operation,
    /// The elements' type; absent for a barrier.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub element: Option<&'static str>,
    /// Bytes of the whole message.
    pub bytes: usize,
    /// The kernel, where there are several.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub algorithm: Option<&'static str>,
    /// Bytes that a rank reads from the memory of its peers; counted for kernels only.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub peer_bytes: Option<u64>,
    /// Timed samples, and the calls of each.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub samples: Option<(usize, usize)>,
    /// Microseconds of a call, that of the slowest rank; absent where nothing was run.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub microseconds: Option<Spread>,
    /// Size over median time.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub algorithm_bytes_per_second: Option<f64>,
    /// The above times the operation's factor.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bus_bytes_per_second: Option<f64>,
    /// What copies of this size allow of it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub limit_bus_bytes_per_second: Option<f64>,
    /// Bus bandwidth over its limit.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fraction_of_limit: Option<f64>,
}

impl CollectiveFigure {
    /// Without times.
    pub(super) fn new(implementation: &'static str, ranks: usize, case: &Case) -> Self {
        Self {
            implementation,
            ranks,
            operation: case.operation,
            element: (case.operation != Operation::Barrier).then(|| case.element.name()),
            bytes: case.bytes,
            algorithm: None,
            peer_bytes: None,
            samples: None,
            microseconds: None,
            algorithm_bytes_per_second: None,
            bus_bytes_per_second: None,
            limit_bus_bytes_per_second: None,
            fraction_of_limit: None,
        }
    }

    /// Adds the time of a call; `copied` is what the ranks together can copy, bytes per second.
    pub(super) fn set_time(&mut self, microseconds: Spread, copied: Option<f64>) {
        self.microseconds = Some(microseconds);
        let Some(factor) = self.operation.bus_factor(self.ranks) else { return };
        let rate = self.bytes as f64 / (microseconds.median * 1e-6);
        self.algorithm_bytes_per_second = Some(rate);
        self.bus_bytes_per_second = Some(rate * factor);
        let copies = self.operation.copies(self.ranks);
        if copies > 0.0 {
            let limit = copied.map(|copied| copied / copies * factor);
            self.limit_bus_bytes_per_second = limit;
            self.fraction_of_limit = limit.map(|limit| rate * factor / limit);
        }
    }
}

/// The figures of `cases`, which were `timed`; `limits` has the copied bytes per second for each size.
pub(super) fn figures(
    implementation: &'static str,
    ranks: usize,
    cases: &[Case],
    timed: Vec<Timed>,
    limits: &[(usize, f64)],
) -> Vec<CollectiveFigure> {
    let figure = |(case, timed): (&Case, Timed)| {
        let mut figure = CollectiveFigure::new(implementation, ranks, case);
        figure.samples = Some((timed.samples, timed.calls));
        let copied = limits.iter().find(|(bytes, _)| *bytes == case.bytes).map(|(_, copied)| *copied);
        figure.set_time(timed.microseconds, copied);
        figure
    };
    cases.iter().zip(timed).map(figure).collect()
}

/// The table.
#[derive(Debug, Clone, Serialize)]
pub struct CollectivesReport {
    /// Cores of this machine; with more ranks than that, ranks wait for each other's turns.
    pub cores: usize,
    /// The device of the peer-to-peer kernels, in words.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub device: Option<String>,
    /// The operations.
    pub collectives: Vec<CollectiveFigure>,
}

impl CollectivesReport {
    /// Without figures; `device` is that of the peer-to-peer kernels, if they are measured.
    pub fn new(device: Option<&Context>) -> Self {
        Self {
            cores: std::thread::available_parallelism().map_or(1, usize::from),
            device: device.map(longhaul_cuda::describe),
            collectives: Vec::new(),
        }
    }
}

/// `4096` as `4 KiB`.
fn size(bytes: usize) -> String {
    match bytes {
        0 => "-".into(),
        b if b % (1 << 20) == 0 => format!("{} MiB", b >> 20),
        b if b % (1 << 10) == 0 => format!("{} KiB", b >> 10),
        b => format!("{b} B"),
    }
}

impl fmt::Display for CollectivesReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} cores", self.cores)?;
        if let Some(device) = &self.device {
            write!(f, "; {device}")?;
            if self.collectives.iter().any(|c| c.peer_bytes.is_some() && c.microseconds.is_none()) {
                write!(f, "; counts only, nothing was launched")?;
            }
        }
        writeln!(f, "; medians (range) of the slowest rank")?;
        writeln!(
            f,
            "{:<10} {:>5} {:<15} {:<9} {:>8} {:>30} {:>10} {:>10} {:>7} {:>12} {:>9}",
            "by",
            "ranks",
            "operation",
            "element",
            "size",
            "µs",
            "alg GB/s",
            "bus GB/s",
            "limit",
            "peer bytes",
            "kernel"
        )?;
        let rate = |r: Option<f64>| r.map_or("-".into(), |r| format!("{:.2}", r / 1e9));
        let mut lines = self.collectives.iter().peekable();
        while let Some(c) = lines.next() {
            let time = |t: Spread| format!("{:.1} ({:.1}..{:.1})", t.median, t.min, t.max);
            let line = format!(
                "{:<10} {:>5} {:<15} {:<9} {:>8} {:>30} {:>10} {:>10} {:>7} {:>12} {:>9}",
                c.implementation,
                c.ranks,
                c.operation.name(),
                c.element.unwrap_or("-"),
                size(c.bytes),
                c.microseconds.map_or("-".into(), time),
                rate(c.algorithm_bytes_per_second),
                rate(c.bus_bytes_per_second),
                c.fraction_of_limit.map_or("-".into(), |p| format!("{:.0} %", 100.0 * p)),
                c.peer_bytes.map_or("-".into(), |bytes| bytes.to_string()),
                c.algorithm.unwrap_or("-"),
            );
            f.write_str(&line)?;
            if lines.peek().is_some() {
                writeln!(f)?;
            }
        }
        Ok(())
    }
}
