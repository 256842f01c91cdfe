//! Time of single pieces of work on a device, for profiles: an event before and after each, and nothing that waits.

use super::gpu::{Gpu, check};
use crate::{Result, profile};
use cudarc::driver::{CudaEvent, sys};
use std::cell::RefCell;

/// What one piece of work is.
#[derive(Clone, Debug)]
pub(crate) struct Work {
    pub name: String,
    /// Bytes that must move, and operations: 0 where nobody has counted them.
    pub bytes: f64,
    pub flops: f64,
}

impl Work {
    /// Of which only the name is known.
    pub fn named(name: &str) -> Self {
        Self::moving(name, 0)
    }
    pub fn moving(name: &str, bytes: usize) -> Self {
        Self { name: name.into(), bytes: bytes as f64, flops: 0.0 }
    }
}

struct Marked {
    op: Option<usize>,
    work: Work,
    from: CudaEvent,
    to: CudaEvent,
}

/// One piece of work, as it went.
#[derive(Clone, Debug)]
pub(crate) struct Span {
    /// The number of its op in the profile.
    pub op: Option<usize>,
    pub work: Work,
    pub seconds: f64,
    /// From the end of the piece before.
    pub gap: f64,
}

#[derive(Default)]
struct Record {
    spans: Vec<Marked>,
    /// Inside a piece of work; what it submits is part of it.
    inside: bool,
}

thread_local! {
    static RECORD: RefCell<Option<Record>> = const { RefCell::new(None) };
}

/// Note from now on what this thread submits.
pub(crate) fn start() {
    RECORD.set(Some(Record::default()));
}
/// True while what this thread submits is noted.
pub(super) fn noting() -> bool {
    RECORD.with_borrow(Option::is_some)
}
/// Note nothing more, and forget what was noted.
pub(crate) fn stop() {
    RECORD.take();
}

impl Gpu {
    fn mark(&self) -> Result<CudaEvent> {
        let flags = Some(sys::CUevent_flags::CU_EVENT_DEFAULT);
        check(self.ordinal, "record an event", self.stream.record_event(flags))
    }
    /// Submit a piece of work by `f`, and time it if a profile is taken.
    pub(crate) fn timed<R>(&self, work: impl FnOnce() -> Work, f: impl FnOnce() -> Result<R>) -> Result<R> {
        let outermost = RECORD.with_borrow_mut(|r| r.as_mut().is_some_and(|r| !std::mem::replace(&mut r.inside, true)));
        if !outermost {
            return f();
        }
        let timed = || {
            let from = self.mark()?;
            let result = f()?;
            Ok((result, Marked { op: profile::current(), work: work(), from, to: self.mark()? }))
        };
        let timed = timed();
        RECORD.with_borrow_mut(|r| {
            if let Some(r) = r {
                r.inside = false;
            }
        });
        let (result, span) = timed?;
        RECORD.with_borrow_mut(|r| r.as_mut().map(|r| r.spans.push(span)));
        Ok(result)
    }
    /// Wait for the device: what was noted, in order.
    pub(crate) fn spans(&self) -> Result<Vec<Span>> {
        self.synchronize()?;
        let marked = RECORD.take().map_or(Vec::new(), |r| r.spans);
        let between = |a: &CudaEvent, b: &CudaEvent| {
            let ms = check(self.ordinal, "time the work submitted before", a.elapsed_ms(b))?;
            Ok(f64::from(ms) / 1e3)
        };
        let gaps = marked.windows(2).map(|w| between(&w[0].to, &w[1].from)).collect::<Result<Vec<_>>>()?;
        let gaps = std::iter::once(0.0).chain(gaps);
        let spans = marked.into_iter().zip(gaps);
        spans.map(|(m, gap)| Ok(Span { op: m.op, seconds: between(&m.from, &m.to)?, work: m.work, gap })).collect()
    }
}
