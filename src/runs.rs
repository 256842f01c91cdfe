//! Runs of numbers that are taken and given back: rows of a cache, bytes of memory.

use std::ops::Range;

/// Of the numbers `0..n`, those that are free.
#[derive(Clone, Debug)]
pub(crate) struct Runs {
    /// In order; neighbours are joined.
    free: Vec<Range<usize>>,
}

impl Runs {
    /// All of `0..n` free.
    pub fn new(n: usize) -> Self {
        Self { free: std::iter::once(0..n).filter(|all| !all.is_empty()).collect() }
    }
    /// Where the shortest run of at least `n` is.
    fn fitting(&self, n: usize) -> Option<usize> {
        let all = self.free.iter().enumerate().filter(|(_, r)| r.len() >= n);
        all.min_by_key(|(_, r)| r.len()).map(|(at, _)| at)
    }
    /// How many are free.
    #[cfg(feature = "cuda")]
    pub fn len(&self) -> usize {
        self.free.iter().map(Range::len).sum()
    }
    /// The length of the shortest run of at least `n`.
    #[cfg(feature = "cuda")]
    pub fn room(&self, n: usize) -> Option<usize> {
        self.fitting(n).map(|at| self.free[at].len())
    }
    /// `n` in a run, of the shortest that is so long; none where there is no such.
    pub fn take(&mut self, n: usize) -> Option<Range<usize>> {
        if n == 0 {
            return Some(0..0);
        }
        let at = self.fitting(n)?;
        let run = &mut self.free[at];
        let taken = run.start..run.start + n;
        run.start += n;
        self.free.retain(|r| !r.is_empty());
        Some(taken)
    }
    pub fn give(&mut self, run: Range<usize>) {
        if run.is_empty() {
            return;
        }
        let at = self.free.partition_point(|r| r.start < run.start);
        self.free.insert(at, run);
        self.free.dedup_by(|next, before| {
            let joined = before.end == next.start;
            if joined {
                before.end = next.end;
            }
            joined
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// Runs never overlap, and what was given back can be taken again as one.
        #[test]
        fn runs_are_taken_once(sizes in prop::collection::vec(0usize..9, 1..40), keep in any::<u64>()) {
            let (mut runs, mut held, mut owner) = (Runs::new(60), Vec::new(), [false; 60]);
            for (i, &n) in sizes.iter().enumerate() {
                let free: usize = runs.free.iter().map(|r| r.len()).sum();
                prop_assert_eq!(free, owner.iter().filter(|o| !**o).count());
                match runs.take(n) {
                    Some(run) => {
                        prop_assert_eq!(run.len(), n);
                        run.clone().for_each(|r| assert!(!std::mem::replace(&mut owner[r], true)));
                        held.push(run);
                    }
                    None => prop_assert!(runs.free.iter().all(|r| r.len() < n)),
                }
                if keep >> (i % 64) & 1 == 1 && !held.is_empty() {
                    let run = held.swap_remove(i % held.len());
                    run.clone().for_each(|r| owner[r] = false);
                    runs.give(run);
                }
            }
            held.into_iter().for_each(|r| runs.give(r));
            prop_assert_eq!(runs.free, std::iter::once(0..60).collect::<Vec<_>>());
        }
    }
}
