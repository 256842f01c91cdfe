//! Work that is captured once and submitted again as a whole, as a CUDA graph: one call instead of one for each kernel.
//!
//! A graph repeats every kernel with the very arguments that it was captured with, so what it works on must stay where it is.
//! Memory that its work takes and gives back on the way comes from a [`Workspace`]: the work is run once as usual, when that is
//! noted ([`noted`]), and then captured, when it asks for the same in the same order. Several works may share one, if they run in
//! turn: what one leaves the next overwrites, so nothing that stays after a work may lie there ([`outside`]).
//!
//! Capturing happens on a stream of its own, by one thread, so others may go on submitting work to the device meanwhile.

use super::gpu::{Gpu, check};
use super::memory::CudaBuffer;
use super::spans;
use super::workspace::{self, Lender, Needs, Notes};
use crate::{Error, Result};
use cudarc::driver::{CudaStream, result, sys};
use std::cell::RefCell;
use std::sync::Arc;

thread_local! {
    static CURRENT: RefCell<Option<Current>> = const { RefCell::new(None) };
}

/// What becomes of this thread's requests for memory.
#[derive(Clone)]
enum Current {
    /// They are served by the pool as usual, and noted.
    Noting(Arc<Notes>),
    /// They are served by a workspace, and kernels are captured.
    Capturing(Arc<CudaStream>, Arc<Lender>),
}

/// Memory that this thread asks for, and who is told when it is given back.
pub(super) enum Home {
    Pool,
    Noted(Arc<Notes>, usize),
    Lent(Arc<Lender>, usize),
}

/// A request of this thread: where it is served, and the address if that is not the pool.
pub(super) fn request(bytes: usize) -> Result<(Home, Option<u64>)> {
    CURRENT.with_borrow(|c| match c {
        None => Ok((Home::Pool, None)),
        Some(Current::Noting(notes)) => Ok((Home::Noted(notes.clone(), notes.take(bytes)), None)),
        Some(Current::Capturing(_, lender)) => {
            let (number, at) = lender.take(bytes)?;
            Ok((Home::Lent(lender.clone(), number), Some(at)))
        }
    })
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
    CURRENT.with_borrow(|c| match c {
        Some(Current::Capturing(stream, _)) => Some(stream.cu_stream()),
        _ => None,
    })
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

/// Run `work` as usual: what memory it takes and gives back. Errors if it keeps some.
pub(crate) fn noted(work: impl FnOnce() -> Result<()>) -> Result<Needs> {
    let notes = Arc::new(Notes::default());
    within(Current::Noting(notes.clone()), work)?;
    notes
        .needs()
        .map_err(|held| Error::config(format!("a step that is to be captured has kept {held} bytes: take them outside")))
}

/// Memory for works that run in turn.
#[derive(Clone)]
pub(crate) struct Workspace(Arc<CudaBuffer>);

impl Workspace {
    /// Enough for any of these.
    pub fn new(gpu: &'static Gpu, works: &[&Needs]) -> Result<Self> {
        Ok(Self(Arc::new(workspace::block(gpu, works)?)))
    }
    /// Capture work that has run, and whose needs are known. Nothing is executed. Errors on anything that cannot be repeated:
    /// copies from and to main memory, other requests for memory than before.
    ///
    /// # Safety
    ///
    /// All memory that the work reads or writes, other than what it takes and gives back itself, lives as long as the result.
    pub unsafe fn capture(&self, needs: &Needs, work: impl FnOnce() -> Result<()>) -> Result<Replay> {
        let gpu = self.0.gpu();
        if spans::noting() {
            return Err(Error::Usage("work that a profile is taken of is not captured".into()));
        }
        gpu.bind()?;
        let lender = Arc::new(Lender::new(&self.0, needs)?);
        let stream = check(gpu.ordinal, "make a stream", gpu.context.new_stream())?;
        // other threads, and this one elsewhere, may do as they like
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED;
        check(gpu.ordinal, "capture work", stream.begin_capture(mode))?;
        let done = within(Current::Capturing(stream.clone(), lender.clone()), work).and_then(|()| lender.done());
        // SAFETY: the stream captures since the call above; ending that is due whatever came of the work.
        let graph = unsafe { result::stream::end_capture(stream.cu_stream()) }.map(Captured);
        done?;
        let graph = check(gpu.ordinal, "capture work", graph)?;
        if graph.0.is_null() {
            return Err(Error::Device { device: format!("cuda:{}", gpu.ordinal), detail: "nothing was captured".into() });
        }
        // SAFETY: the graph is whole, and not needed afterwards.
        let whole = unsafe { result::graph::instantiate(graph.0, sys::CUgraphInstantiate_flags(0)) };
        let whole = check(gpu.ordinal, "prepare captured work", whole)?;
        Ok(Replay { whole, workspace: self.clone() })
    }
}

/// A graph as it was captured.
struct Captured(sys::CUgraph);

impl Drop for Captured {
    fn drop(&mut self) {
        if !self.0.is_null() {
            // SAFETY: destroyed once, here.
            let _ = unsafe { result::graph::destroy(self.0) };
        }
    }
}

/// Captured work.
pub(crate) struct Replay {
    whole: sys::CUgraphExec,
    workspace: Workspace,
}

// SAFETY: a graph may be used by any thread, one at a time: submitting it takes `&mut self`.
unsafe impl Send for Replay {}
// SAFETY: as above.
unsafe impl Sync for Replay {}

impl Replay {
    /// Submit all of it.
    pub fn submit(&mut self) -> Result<()> {
        let gpu = self.workspace.0.gpu();
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
        if self.workspace.0.gpu().bind().is_ok() {
            // SAFETY: destroyed once, here. The driver waits with that until a run under way is done, and the memory is given
            // back on the stream, after it.
            let _ = unsafe { result::graph::exec_destroy(self.whole) };
        }
    }
}

impl std::fmt::Debug for Workspace {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Workspace({:?})", self.0)
    }
}
impl std::fmt::Debug for Replay {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Replay({:?})", self.workspace)
    }
}
