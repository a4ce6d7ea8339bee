//! Recorded work as CUDA graphs.

use std::sync::Arc;

use cudarc::driver::sys::{
    self, CUdeviceptr, CUgraph, CUgraphExec, CUstreamCaptureMode_enum::CU_STREAM_CAPTURE_MODE_RELAXED,
};

use super::context::Stream;
use super::status::{Blame, Status};
use crate::driver::GraphId;
use crate::{CudaError, Result};

/// The graphs of a driver and whether one is being recorded.
pub(super) struct Graphs {
    stream: Arc<Stream>,
    recording: bool,
    /// Memory given back during a recording: freeing waits for the device, which a recording may not.
    freed: Vec<CUdeviceptr>,
    /// By number; `None` once it was dropped.
    graphs: Vec<Option<Graph>>,
}

/// An instantiated graph.
struct Graph(CUgraphExec);

// SAFETY: handles may be used from any thread that binds their context; calls are made under a lock.
unsafe impl Send for Graphs {}

impl Graphs {
    pub fn new(stream: &Arc<Stream>) -> Self {
        Self { stream: stream.clone(), recording: false, freed: Vec::new(), graphs: Vec::new() }
    }

    /// Whether work is being recorded.
    pub fn is_recording(&self) -> bool {
        self.recording
    }

    /// Refuses `call` while recording.
    ///
    /// # Errors
    /// [`CudaError::Call`].
    pub fn not_recording(&self, call: &str) -> Result<()> {
        if self.recording {
            return Err(CudaError::Call {
                call: call.into(),
                message: "is not possible while recording".into(),
            });
        }
        Ok(())
    }

    /// Keeps `memory` until the recording ends.
    pub fn free_later(&mut self, memory: CUdeviceptr) {
        self.freed.push(memory);
    }

    /// Starts a recording. Calls that a stricter mode forbids stay allowed: libraries load code at first use.
    ///
    /// # Errors
    /// Recording already; the driver's.
    pub fn begin(&mut self, blame: Blame<'_>) -> Result<()> {
        self.not_recording("begin_recording")?;
        // SAFETY: the stream lives; the caller has bound the context.
        let result =
            unsafe { sys::cuStreamBeginCapture_v2(self.stream.raw(), CU_STREAM_CAPTURE_MODE_RELAXED) };
        Status::of(result).map_err(|status| blame("begin_recording", status))?;
        self.recording = true;
        Ok(())
    }

    /// Ends the recording. Whatever happens, the stream runs work again.
    ///
    /// # Errors
    /// Not recording; a recording that an operation in between has spoilt; the driver's.
    pub fn end(&mut self, blame: Blame<'_>) -> Result<GraphId> {
        if !self.recording {
            return Err(CudaError::Call {
                call: "end_recording".into(),
                message: "nothing is being recorded".into(),
            });
        }
        self.recording = false;
        let mut recorded: CUgraph = std::ptr::null_mut();
        // SAFETY: the stream is being captured; `recorded` is a live local.
        let ended = Status::of(unsafe { sys::cuStreamEndCapture(self.stream.raw(), &mut recorded) });
        for memory in self.freed.drain(..) {
            // SAFETY: given back by its owner.
            let _ = unsafe { sys::cuMemFree_v2(memory) };
        }
        ended.map_err(|status| blame("end_recording", status))?;
        if recorded.is_null() {
            return Err(CudaError::Call {
                call: "end_recording".into(),
                message: "the recording was spoilt".into(),
            });
        }
        let mut exec: CUgraphExec = std::ptr::null_mut();
        // SAFETY: `recorded` is a graph; `exec` is a live local.
        let instantiated = Status::of(unsafe { sys::cuGraphInstantiateWithFlags(&mut exec, recorded, 0) });
        // SAFETY: the graph is ours, and what was instantiated does not refer to it.
        let _ = unsafe { sys::cuGraphDestroy(recorded) };
        instantiated.map_err(|status| blame("end_recording (instantiate)", status))?;
        let graph = Graph(exec);
        // Its device memory now rather than in the first replay.
        // SAFETY: both handles live.
        Status::of(unsafe { sys::cuGraphUpload(graph.0, self.stream.raw()) })
            .map_err(|status| blame("end_recording (upload)", status))?;
        self.graphs.push(Some(graph));
        Ok(GraphId(self.graphs.len() - 1))
    }

    /// Destroys a recording that no queued work uses any more.
    pub fn remove(&mut self, id: GraphId) {
        if let Some(graph) = self.graphs.get_mut(id.0) {
            *graph = None;
        }
    }

    /// Queues a recording.
    ///
    /// # Errors
    /// Recording; no such graph; the driver's.
    pub fn replay(&self, id: GraphId, blame: Blame<'_>) -> Result<()> {
        self.not_recording("replay")?;
        let graph = self.graphs.get(id.0).and_then(Option::as_ref).ok_or_else(|| CudaError::Call {
            call: "replay".into(),
            message: format!("there is no graph {}", id.0),
        })?;
        // SAFETY: both handles live.
        let result = unsafe { sys::cuGraphLaunch(graph.0, self.stream.raw()) };
        Status::of(result).map_err(|status| blame("replay", status))
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        // SAFETY: instantiated by `Graphs::end`; the driver has waited for the stream and bound the context.
        let _ = unsafe { sys::cuGraphExecDestroy(self.0) };
    }
}
