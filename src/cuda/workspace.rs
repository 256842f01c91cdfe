//! Memory for works that run in turn and need the same each time: what one asks for is noted while it runs as usual, and then
//! laid out once, so that all of it takes little more than the work ever holds at a time.

use super::gpu::Gpu;
use super::memory::CudaBuffer;
use super::replay::outside;
use crate::{Error, Result};
use std::sync::Mutex;

/// Memory that a work asked for: bytes, and when it took and gave them back, in numbers of such events.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Request {
    bytes: usize,
    from: usize,
    to: usize,
}

/// What a work asks for, in order.
#[derive(Clone, Debug, Default)]
pub(crate) struct Needs(Vec<Request>);

impl Needs {
    /// Where each request may lie, apart from all that are held at the same time, and how many bytes that takes. No order of placing
    /// them is the best always: the largest first, or those that are large for long.
    fn layout(&self) -> (Vec<usize>, usize) {
        let by_size = self.placed(|r| r.bytes as u128);
        let by_both = self.placed(|r| (r.bytes as u128).pow(2) * (r.to - r.from) as u128);
        if by_both.1 < by_size.1 { by_both } else { by_size }
    }
    /// Those of the highest `rank` first, each as low as it can lie.
    fn placed(&self, rank: impl Fn(&Request) -> u128) -> (Vec<usize>, usize) {
        let mut order: Vec<usize> = (0..self.0.len()).collect();
        order.sort_by_key(|&i| std::cmp::Reverse(rank(&self.0[i])));
        let (mut offsets, mut placed, mut all) = (vec![0; self.0.len()], Vec::<usize>::new(), 0);
        for i in order {
            let Request { bytes, from, to } = self.0[i];
            let mut offset = 0;
            // in the order of their places, so the first gap that is large enough
            for &j in placed.iter().filter(|&&j| self.0[j].from < to && from < self.0[j].to) {
                if offset + bytes <= offsets[j] {
                    break;
                }
                offset = offset.max(offsets[j] + self.0[j].bytes);
            }
            offsets[i] = offset;
            all = all.max(offset + bytes);
            placed.insert(placed.partition_point(|&j| offsets[j] <= offset), i);
        }
        (offsets, all)
    }
}

/// Requests as they come while a work runs.
#[derive(Debug, Default)]
pub(super) struct Notes(Mutex<(Vec<Request>, usize)>);

impl Notes {
    /// The number of the request.
    pub fn take(&self, bytes: usize) -> usize {
        let (requests, now) = &mut *self.0.lock().unwrap_or_else(|e| e.into_inner());
        *now += 1;
        requests.push(Request { bytes, from: *now, to: usize::MAX });
        requests.len() - 1
    }
    pub fn give(&self, number: usize) {
        let (requests, now) = &mut *self.0.lock().unwrap_or_else(|e| e.into_inner());
        *now += 1;
        requests[number].to = *now;
    }
    /// All of them, or the bytes of those that are still held.
    pub fn needs(&self) -> std::result::Result<Needs, usize> {
        let (requests, _) = &*self.0.lock().unwrap_or_else(|e| e.into_inner());
        match requests.iter().filter(|r| r.to == usize::MAX).map(|r| r.bytes).sum() {
            0 => Ok(Needs(requests.clone())),
            held => Err(held),
        }
    }
}

/// A workspace's memory, lent to one work request by request.
#[derive(Debug)]
pub(super) struct Lender {
    ordinal: usize,
    base: u64,
    bytes: Vec<usize>,
    offsets: Vec<usize>,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// Requests so far.
    asked: usize,
    /// Those that are held.
    held: Vec<usize>,
}

impl Lender {
    pub fn new(block: &CudaBuffer, needs: &Needs) -> Result<Self> {
        Self::of(block.gpu().ordinal, block.pointer(), block.bytes(), needs)
    }
    /// Of a device's memory from `base` on.
    fn of(ordinal: usize, base: u64, bytes: usize, needs: &Needs) -> Result<Self> {
        let (offsets, all) = needs.layout();
        let lender =
            Self { ordinal, base, bytes: needs.0.iter().map(|r| r.bytes).collect(), offsets, state: Mutex::default() };
        match all <= bytes {
            true => Ok(lender),
            false => Err(lender.refused(format!("a work needs {all} bytes of a workspace of {bytes}"))),
        }
    }
    /// The number and the address of the next request. Errors where it is not what the work has asked for before, or where
    /// something is still held that was given back before: which of two pieces goes first may depend on where they lie.
    pub fn take(&self, bytes: usize) -> Result<(usize, u64)> {
        let State { asked, held } = &mut *self.state.lock().unwrap_or_else(|e| e.into_inner());
        let number = *asked;
        *asked += 1;
        if self.bytes.get(number) != Some(&bytes) {
            let before = self.bytes.get(number).map_or("none".into(), |n| format!("one of {n} bytes"));
            let detail = format!("request {number} of a captured work is of {bytes} bytes, where {before} was before");
            return Err(self.refused(detail));
        }
        let run = |i: usize| self.offsets[i]..self.offsets[i] + self.bytes[i];
        let new = run(number);
        if let Some(&other) = held.iter().find(|&&i| run(i).start < new.end && new.start < run(i).end) {
            let detail = format!("request {number} of a captured work lies where request {other} is still held");
            return Err(self.refused(detail));
        }
        held.push(number);
        Ok((number, self.base + new.start as u64))
    }
    pub fn give(&self, number: usize) {
        self.state.lock().unwrap_or_else(|e| e.into_inner()).held.retain(|&i| i != number);
    }
    /// Errors where the work has kept something.
    pub fn done(&self) -> Result<()> {
        match self.state.lock().unwrap_or_else(|e| e.into_inner()).held.len() {
            0 => Ok(()),
            n => Err(self.refused(format!("a captured work has kept {n} pieces of its workspace: take them outside"))),
        }
    }
    fn refused(&self, detail: String) -> Error {
        Error::Device { device: format!("cuda:{}", self.ordinal), detail }
    }
}

/// Memory for works of these needs, one at a time.
pub(super) fn block(gpu: &'static Gpu, works: &[&Needs]) -> Result<CudaBuffer> {
    let bytes = works.iter().map(|w| w.layout().1).max().unwrap_or(0);
    outside(|| CudaBuffer::new(gpu, bytes))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Of two pieces either may be held longer, as addresses will have it: that is an error where something was to lie there.
    #[test]
    fn nothing_is_lent_twice() {
        let notes = Notes::default();
        let [a, b] = [notes.take(1024), notes.take(1024)];
        notes.give(a);
        let c = notes.take(1024);
        [b, c].into_iter().for_each(|i| notes.give(i));
        let needs = notes.needs().unwrap();
        assert_eq!(needs.layout().1, 2048);
        let lender = || Lender::of(0, 4096, 2048, &needs).unwrap();
        for (first, works) in [(a, true), (b, false)] {
            let lender = lender();
            let places = [(); 2].map(|()| lender.take(1024).unwrap());
            assert!(places[0].1 >= 4096 && places.map(|p| p.0) == [a, b]);
            lender.give(first);
            assert_eq!(lender.take(1024).is_ok(), works);
            assert!(lender.done().is_err());
        }
        assert!(lender().take(512).is_err(), "another size than before");
        assert!(Lender::of(0, 4096, 1024, &needs).is_err(), "too little");
    }

    proptest! {
        /// What is held at the same time lies apart, and all of it takes no less than is held at a time, and not much more.
        #[test]
        fn requests_lie_apart(events in prop::collection::vec((0usize..40, any::<u16>()), 0..60)) {
            let (notes, mut held, mut now, mut most, mut trace) = (Notes::default(), vec![], 0, 0, vec![]);
            for (units, choice) in events {
                if units == 0 && !held.is_empty() {
                    let (number, bytes) = held.swap_remove(choice as usize % held.len());
                    notes.give(number);
                    trace.push((number, 0));
                    now -= bytes;
                } else {
                    let bytes = 512 * (units + 1);
                    let number = notes.take(bytes);
                    held.push((number, bytes));
                    trace.push((number, bytes));
                    now += bytes;
                    most = most.max(now);
                }
            }
            prop_assert_eq!(notes.needs().err(), Some(now).filter(|n| *n > 0));
            held.iter().for_each(|h| notes.give(h.0));
            let needs = notes.needs().unwrap();
            // the same once more is served, each at its place
            let lender = Lender::of(0, 0, needs.layout().1, &needs).unwrap();
            for (number, bytes) in trace {
                match bytes {
                    0 => lender.give(number),
                    _ => prop_assert_eq!(lender.take(bytes).unwrap(), (number, needs.layout().0[number] as u64)),
                }
            }
            let (offsets, all) = needs.layout();
            prop_assert!((most..=2 * most).contains(&all), "{} for {}", all, most);
            for (i, a) in needs.0.iter().enumerate() {
                prop_assert!(offsets[i] + a.bytes <= all && offsets[i].is_multiple_of(512));
                for (j, b) in needs.0.iter().enumerate().skip(i + 1) {
                    let together = a.from < b.to && b.from < a.to;
                    let apart = offsets[i] + a.bytes <= offsets[j] || offsets[j] + b.bytes <= offsets[i];
                    prop_assert!(!together || apart, "{:?} at {} and {:?} at {}", a, offsets[i], b, offsets[j]);
                }
            }
        }
    }
}
