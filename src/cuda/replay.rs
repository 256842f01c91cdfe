//! Work that is captured once and submitted again as a whole, as a CUDA graph: one call instead of one for each kernel.
//!
//! A graph repeats every kernel with the very arguments that it was captured with, so what it works on must stay where it is.
//! Memory that its work takes and gives back on the way comes from a [`Workspace`], which keeps it: the work is run in it once or
//! more as usual, until it finds all that it asks for, and then captured. Several works may share one, if they run in turn: what
//! one leaves the next may take, so nothing that stays after a work may lie there ([`outside`]).
//!
//! Capturing happens on a stream of its own, by one thread, so others may go on submitting work to the device meanwhile.

use super::gpu::{Gpu, check};
use super::memory::Piece;
use super::spans;
use crate::runs::Runs;
use crate::{Error, Result};
use cudarc::driver::{CudaStream, result, sys};
use std::cell::RefCell;
use std::sync::{Arc, Mutex, MutexGuard};

thread_local! {
    static CURRENT: RefCell<Option<Current>> = const { RefCell::new(None) };
}

/// What this thread works in.
#[derive(Clone)]
struct Current {
    pieces: Arc<Pieces>,
    /// The stream that it captures, if it does.
    capture: Option<Arc<CudaStream>>,
}

/// Run `f` with this thread in no workspace, for what outlives them all.
pub(crate) fn outside<R>(f: impl FnOnce() -> R) -> R {
    with_current(None, f)
}
/// Run `f` with this thread in a workspace.
fn within<R>(current: Current, f: impl FnOnce() -> R) -> R {
    with_current(Some(current), f)
}
fn with_current<R>(current: Option<Current>, f: impl FnOnce() -> R) -> R {
    struct Restore(Option<Current>);
    impl Drop for Restore {
        fn drop(&mut self) {
            CURRENT.set(self.0.take());
        }
    }
    let _restore = Restore(CURRENT.replace(current));
    f()
}

/// The stream that this thread captures.
pub(super) fn queue() -> Option<sys::CUstream> {
    CURRENT.with_borrow(|c| c.as_ref().and_then(|c| c.capture.as_ref()).map(|s| s.cu_stream()))
}
/// True while this thread captures.
pub(super) fn capturing() -> bool {
    queue().is_some()
}
/// Errors while this thread captures, for what cannot be repeated.
pub(super) fn refuse_here(ordinal: usize, what: &str) -> Result<()> {
    if !capturing() {
        return Ok(());
    }
    let detail = format!("cannot {what} in work that is captured");
    Err(Error::Device { device: format!("cuda:{ordinal}"), detail })
}

/// The memory of a workspace: what it took of the device, and which bytes of each piece nobody holds.
pub(crate) struct Pieces {
    gpu: &'static Gpu,
    all: Mutex<Vec<(Piece, Runs)>>,
}

impl Pieces {
    /// Of the workspace that this thread works in.
    pub(super) fn current(gpu: &Gpu) -> Option<Arc<Self>> {
        CURRENT.with_borrow(|c| c.as_ref().map(|c| c.pieces.clone()).filter(|p| p.gpu.ordinal == gpu.ordinal))
    }
    fn all(&self) -> MutexGuard<'_, Vec<(Piece, Runs)>> {
        self.all.lock().unwrap_or_else(|e| e.into_inner())
    }
    /// Bytes that somebody holds.
    fn held(&self) -> usize {
        self.all().iter().map(|(piece, free)| piece.counted - free.len()).sum()
    }
    /// So many bytes, of the shortest run that has them.
    pub(super) fn take(&self, bytes: usize) -> Option<u64> {
        let mut all = self.all();
        let rooms = all.iter_mut().filter_map(|(piece, free)| Some((free.room(bytes)?, piece.pointer, free)));
        let (_, pointer, free) = rooms.min_by_key(|(room, ..)| *room)?;
        free.take(bytes).map(|run| pointer + run.start as u64)
    }
    /// One piece more, all of which somebody holds.
    pub(super) fn add(&self, piece: Piece) {
        self.all().push((piece, Runs::new(0)));
    }
    pub(super) fn give(&self, pointer: u64, bytes: usize) {
        let mut all = self.all();
        let of = all.iter_mut().find(|(p, _)| (p.pointer..p.pointer + p.counted as u64).contains(&pointer));
        if let Some((piece, free)) = of {
            let start = (pointer - piece.pointer) as usize;
            free.give(start..start + bytes);
        }
    }
}

impl Drop for Pieces {
    fn drop(&mut self) {
        std::mem::take(&mut *self.all()).into_iter().for_each(|(piece, _)| piece.free(self.gpu));
    }
}

/// Memory for works that run in turn and need the same each time. Given back when nobody holds any of it.
pub(crate) struct Workspace(Arc<Pieces>);

impl Workspace {
    pub fn new(gpu: &'static Gpu) -> Self {
        Self(Arc::new(Pieces { gpu, all: Mutex::default() }))
    }
    /// Run the work, in this memory. Errors if some of it stays in use: the next work would overwrite it.
    pub fn run(&self, work: impl FnOnce() -> Result<()>) -> Result<()> {
        within(Current { pieces: self.0.clone(), capture: None }, work)?;
        match self.0.held() {
            0 => Ok(()),
            n => {
                let detail = format!("{n} bytes of a workspace are in use after the work: take them outside");
                Err(Error::Device { device: format!("cuda:{}", self.0.gpu.ordinal), detail })
            }
        }
    }
    /// Capture the work, which has run in this workspace before. Nothing is executed. Errors on anything that cannot be
    /// repeated: copies from and to main memory, requests for more memory.
    ///
    /// # Safety
    ///
    /// All memory that the work reads or writes, other than what it takes and gives back itself, lives as long as the result.
    pub unsafe fn capture(&self, work: impl FnOnce() -> Result<()>) -> Result<Replay> {
        let gpu = self.0.gpu;
        if spans::noting() {
            return Err(Error::Usage("work that a profile is taken of is not captured".into()));
        }
        gpu.bind()?;
        let stream = check(gpu.ordinal, "make a stream", gpu.context.new_stream())?;
        // other threads, and this one elsewhere, may do as they like
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED;
        check(gpu.ordinal, "capture work", stream.begin_capture(mode))?;
        let done = within(Current { pieces: self.0.clone(), capture: Some(stream.clone()) }, work);
        // SAFETY: the stream captures since the call above; ending that is due whatever came of the work.
        let graph = unsafe { result::stream::end_capture(stream.cu_stream()) };
        done?;
        let graph = check(gpu.ordinal, "capture work", graph)?;
        if graph.is_null() {
            return Err(Error::Device { device: format!("cuda:{}", gpu.ordinal), detail: "nothing was captured".into() });
        }
        // SAFETY: the graph is whole, and destroyed once, here: what is instantiated does not need it.
        let whole = unsafe {
            let whole = result::graph::instantiate(graph, sys::CUgraphInstantiate_flags(0));
            let _ = result::graph::destroy(graph);
            check(gpu.ordinal, "prepare captured work", whole)?
        };
        Ok(Replay { whole, pieces: self.0.clone() })
    }
}

/// Captured work.
pub(crate) struct Replay {
    whole: sys::CUgraphExec,
    pieces: Arc<Pieces>,
}

// SAFETY: a graph may be used by any thread, one at a time: submitting it takes `&mut self`.
unsafe impl Send for Replay {}
// SAFETY: as above.
unsafe impl Sync for Replay {}

impl Replay {
    /// Submit all of it.
    pub fn submit(&mut self) -> Result<()> {
        let gpu = self.pieces.gpu;
        gpu.bind()?;
        // its products use the same workspace as those of other threads
        let _alone = gpu.blas_alone()?;
        // SAFETY: the graph is alive, and so is all that it works on, as who captured it has promised.
        let answer = unsafe { result::graph::launch(self.whole, gpu.stream.cu_stream()) };
        check(gpu.ordinal, "submit captured work", answer)
    }
}

impl Drop for Replay {
    fn drop(&mut self) {
        if self.pieces.gpu.bind().is_ok() {
            // SAFETY: destroyed once, here. The driver waits with that until a run under way is done, and the memory is given
            // back on the stream, after it.
            let _ = unsafe { result::graph::exec_destroy(self.whole) };
        }
    }
}

impl std::fmt::Debug for Workspace {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Workspace({:?})", self.0.gpu)
    }
}
impl std::fmt::Debug for Replay {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Replay({:?})", self.pieces.gpu)
    }
}
