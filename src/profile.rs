//! Which op is under way, for profiles: its calls, the work that it says it does, and the time that the host spends in it.
//! Costs next to nothing while no profile is taken.

use std::cell::RefCell;
use std::time::{Duration, Instant};

/// Why an op runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Why {
    /// Its own time has come.
    Asked,
    /// Backward needs its output again.
    Again,
    /// What backward of a recorded op does outside of other ops.
    Backward,
}

/// One op in a profile.
#[derive(Clone, Debug)]
pub(crate) struct Op {
    name: &'static str,
    why: Why,
    pub calls: usize,
    /// Host time, that of ops inside it left out.
    pub time: Duration,
    /// Bytes that must move, and operations: 0 where nobody has counted them.
    pub bytes: f64,
    pub flops: f64,
}

impl Op {
    /// As tables call it.
    pub fn name(&self) -> String {
        // paths come from tokens, with or without spaces
        let name = self.name.replace(' ', "");
        match self.why {
            Why::Asked => name,
            Why::Again => format!("{name} (again)"),
            Why::Backward => format!("{name} (backward)"),
        }
    }
}

struct Record {
    ops: Vec<Op>,
    /// Ops under way, innermost last.
    stack: Vec<usize>,
    /// The op that returned last.
    last: Option<usize>,
    /// How many recipes are running.
    again: usize,
    /// When the innermost op last changed.
    since: Instant,
}

impl Record {
    fn spend(&mut self) {
        let now = Instant::now();
        if let Some(&i) = self.stack.last() {
            self.ops[i].time += now - self.since;
        }
        self.since = now;
    }
    fn enter(&mut self, name: &'static str, why: Why) {
        self.spend();
        let found = self.ops.iter().position(|op| op.name == name && op.why == why);
        let i = found.unwrap_or(self.ops.len());
        if found.is_none() {
            self.ops.push(Op { name, why, calls: 0, time: Duration::ZERO, bytes: 0.0, flops: 0.0 });
        }
        self.ops[i].calls += 1;
        self.stack.push(i);
    }
}

thread_local! {
    static RECORD: RefCell<Option<Record>> = const { RefCell::new(None) };
}

fn with<R>(f: impl FnOnce(&mut Record) -> R) -> Option<R> {
    RECORD.with_borrow_mut(|r| r.as_mut().map(f))
}

/// Note from now on what this thread does.
pub(crate) fn start() {
    let record = Record { ops: Vec::new(), stack: Vec::new(), last: None, again: 0, since: Instant::now() };
    RECORD.set(Some(record));
}
/// What was noted; empty if nothing was.
pub(crate) fn stop() -> Vec<Op> {
    RECORD.take().map_or(Vec::new(), |r| r.ops)
}
/// The op under way, by its number in what [`stop`] will return.
#[cfg(feature = "cuda")]
pub(crate) fn current() -> Option<usize> {
    with(|r| r.stack.last().copied()).flatten()
}

/// Ends what it was returned for.
#[must_use]
pub(crate) struct Scope {
    op: bool,
    again: bool,
}

impl Drop for Scope {
    fn drop(&mut self) {
        with(|r| {
            if self.op {
                r.spend();
                r.last = r.stack.pop();
            }
            r.again -= usize::from(self.again && r.again > 0);
        });
    }
}

/// An op begins.
pub(crate) fn enter(name: &'static str) -> Scope {
    let op = with(|r| {
        let why = if r.again > 0 { Why::Again } else { Why::Asked };
        r.enter(name, why);
    });
    Scope { op: op.is_some(), again: false }
}
/// Backward of a recorded op begins.
pub(crate) fn backward(name: &'static str) -> Scope {
    Scope { op: with(|r| r.enter(name, Why::Backward)).is_some(), again: false }
}
/// What ops do now is done again.
pub(crate) fn again() -> Scope {
    Scope { op: false, again: with(|r| r.again += 1).is_some() }
}

/// The op that returned last moved at least so many bytes.
pub(crate) fn moved(bytes: usize) {
    with(|r| r.last.map(|i| r.ops[i].bytes += bytes as f64));
}
/// The op that returned last computed so many operations.
pub(crate) fn computed(flops: f64) {
    with(|r| r.last.map(|i| r.ops[i].flops += flops));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ops_are_told_apart_and_time_counts_once() {
        {
            let _nothing = enter("before");
        }
        moved(5);
        start();
        let begin = Instant::now();
        {
            let _outer = backward("outer");
            {
                let _again = again();
                let _inner = enter("inner :: forward");
                std::thread::sleep(Duration::from_millis(5));
            }
            moved(8);
            drop(enter("inner :: forward"));
            moved(4);
            computed(2.0);
        }
        let whole = begin.elapsed();
        let ops = stop();
        let got: Vec<_> = ops.iter().map(|o| (o.name(), o.calls, o.bytes, o.flops)).collect();
        let name = |s: &str| s.to_string();
        let want = [
            (name("outer (backward)"), 1, 0.0, 0.0),
            (name("inner::forward (again)"), 1, 8.0, 0.0),
            (name("inner::forward"), 1, 4.0, 2.0),
        ];
        assert_eq!(got, want);
        assert!(ops[1].time >= Duration::from_millis(5));
        assert!(ops.iter().map(|o| o.time).sum::<Duration>() <= whole);
        assert!(stop().is_empty());
    }
}
