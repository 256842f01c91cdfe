//! Attention of new rows to what a cache keeps: decoding, of many texts at once and each of its own length. Has no
//! gradient.

use super::Int8Rows;
use super::elementwise::{same_device, same_dtype};
use crate::tensor::Tensor;
use crate::{Error, Result};
use std::ops::Range;
use std::sync::Arc;
#[cfg(feature = "cuda")]
use std::sync::{Mutex, OnceLock};

const OP: &str = "cached_attention";

/// Where new rows lie in a cache, and what they see of it. Cloning is cheap.
///
/// Row r sees the run `start..end` of the cache's rows and lies at its end, in row `end - 1`: that is all a causal mask
/// needs to be told, whatever text the row belongs to, so rows of texts of any lengths and chunk sizes go together.
#[derive(Clone, Debug)]
pub struct CacheRows(Arc<Lists>);

#[derive(Debug)]
struct Lists {
    /// A run for each row, none empty. Of rows whose runs a device knows alone, only as many as they are.
    seen: Vec<Range<usize>>,
    /// The rows that a cache needs to hold them all.
    least: usize,
    /// The keys that a row sees at most.
    #[cfg_attr(not(feature = "cuda"), allow(dead_code))]
    most: usize,
    /// How many groups there are (`CacheRows::groups`); found out when first asked for.
    #[cfg(feature = "cuda")]
    groups: OnceLock<Option<usize>>,
    /// Copies on devices, each made when first asked for: i64 `[2, R]`, the starts and then the ends.
    #[cfg(feature = "cuda")]
    copies: Mutex<Vec<Tensor>>,
    /// The same of groups (`CacheRows::groups_on`).
    #[cfg(feature = "cuda")]
    group_copies: Mutex<Vec<Tensor>>,
}

impl CacheRows {
    /// Errors on an empty run.
    pub fn new(seen: Vec<Range<usize>>) -> Result<Self> {
        let most = seen.iter().map(Range::len).max().unwrap_or(0);
        Self::within(most, seen)
    }
    /// Runs of at most `most` rows each, and a launch that depends on `most`, and on how rows of a text follow one another, alone:
    /// while runs grow it may stay the same, as where launches are recorded once and run again. What is computed does not depend
    /// on it, in any bit.
    pub fn within(most: usize, seen: Vec<Range<usize>>) -> Result<Self> {
        if let Some(r) = seen.iter().position(|s| s.len() > most) {
            return Err(Error::shape(OP, format!("row {r} sees {:?}, more than {most} rows", seen[r])));
        }
        if let Some(r) = seen.iter().position(|s| s.start >= s.end) {
            return Err(Error::shape(OP, format!("row {r} sees nothing, not even itself: {:?}", seen[r])));
        }
        let least = seen.iter().map(|s| s.end).max().unwrap_or(0);
        #[cfg(feature = "cuda")]
        let lists =
            Lists { seen, least, most, groups: OnceLock::new(), copies: Mutex::default(), group_copies: Mutex::default() };
        #[cfg(not(feature = "cuda"))]
        let lists = Lists { seen, least, most };
        Ok(Self(Arc::new(lists)))
    }
    /// Rows whose runs a device knows alone: i64 `[2, R]`, the starts and then the ends. Whatever they become, they are at
    /// most `most` long, in a cache of at least `least` rows, and each row has its own. No other device may be asked.
    #[cfg(feature = "cuda")]
    pub(crate) fn on_device(list: Tensor, most: usize, least: usize) -> Self {
        let (seen, groups) = (vec![0..0; list.dim(1)], OnceLock::from(Some(list.dim(1))));
        let copies = Mutex::new(vec![list]);
        Self(Arc::new(Lists { seen, least, most, groups, copies, group_copies: Mutex::default() }))
    }
    /// As [`CacheRows::on_device`], for rows in groups of two (`CacheRows::groups`), as `groups` says, i64 `[R / 2, 4]`.
    #[cfg(feature = "cuda")]
    pub(crate) fn pairs_on_device(list: Tensor, groups: Tensor, most: usize, least: usize) -> Self {
        let (seen, n) = (vec![0..0; list.dim(1)], OnceLock::from(Some(groups.dim(0))));
        let (copies, group_copies) = (Mutex::new(vec![list]), Mutex::new(vec![groups]));
        Self(Arc::new(Lists { seen, least, most, groups: n, copies, group_copies }))
    }
    /// The number of rows, R.
    pub fn len(&self) -> usize {
        self.0.seen.len()
    }
    /// True for no rows.
    pub fn is_empty(&self) -> bool {
        self.0.seen.is_empty()
    }
    /// What each row sees.
    pub(crate) fn seen(&self) -> &[Range<usize>] {
        &self.0.seen
    }
    /// The rows that a cache needs to hold them all.
    pub(crate) fn least(&self) -> usize {
        self.0.least
    }
    /// The keys that a row sees at most.
    #[cfg(feature = "cuda")]
    pub(crate) fn most(&self) -> usize {
        self.0.most
    }
    /// The number of groups that rows stand in, if no group sees a place of another. A group is a row alone, or two neighbours
    /// from one start of which the second sees one place more than the first, its own. As many groups as rows: no row sees
    /// another's place.
    #[cfg(feature = "cuda")]
    pub(crate) fn groups(&self) -> Option<usize> {
        *self.0.groups.get_or_init(|| {
            let seen = &self.0.seen;
            let mut runs: Vec<_> = groups_of(seen).map(|(i, n)| (seen[i].start, seen[i + n - 1].end)).collect();
            runs.sort_unstable();
            runs.windows(2).all(|w| w[0].1 <= w[1].0).then_some(runs.len())
        })
    }
    /// Each group's first row, its number of rows, and the start and the end of what the first sees, i64 `[groups, 4]` on a
    /// device, uploaded once.
    #[cfg(feature = "cuda")]
    pub(crate) fn groups_on(&self, device: crate::tensor::Device) -> Result<Tensor> {
        let seen = &self.0.seen;
        copy_on(&self.0.group_copies, device, || {
            let list: Vec<i64> =
                groups_of(seen).flat_map(|(i, n)| [i, n, seen[i].start, seen[i].end]).map(|x| x as i64).collect();
            Tensor::ids(&list, &[list.len() / 4, 4])
        })
    }
    /// The starts and the ends on a device, i64 `[2, R]`, uploaded once.
    #[cfg(feature = "cuda")]
    pub(crate) fn on(&self, device: crate::tensor::Device) -> Result<Tensor> {
        let seen = &self.0.seen;
        copy_on(&self.0.copies, device, || {
            let list = seen.iter().map(|s| s.start).chain(seen.iter().map(|s| s.end)).map(|i| i as i64);
            Tensor::ids(&list.collect::<Vec<_>>(), &[2, seen.len()])
        })
    }
}

/// Rows in groups of one or two, as `CacheRows::groups` says: the first row of each, and how many it has.
#[cfg(feature = "cuda")]
fn groups_of(seen: &[Range<usize>]) -> impl Iterator<Item = (usize, usize)> {
    let mut next = 0;
    std::iter::from_fn(move || {
        let first = seen.get(next)?;
        let two = seen.get(next + 1).is_some_and(|s| s.start == first.start && s.end == first.end + 1);
        let group = (next, if two { 2 } else { 1 });
        next += group.1;
        Some(group)
    })
}

/// The copy on a device, made where there is none yet.
#[cfg(feature = "cuda")]
fn copy_on(
    copies: &Mutex<Vec<Tensor>>,
    device: crate::tensor::Device,
    list: impl FnOnce() -> Result<Tensor>,
) -> Result<Tensor> {
    let mut copies = copies.lock().unwrap_or_else(|e| e.into_inner());
    if let Some(copy) = copies.iter().find(|c| c.device() == device) {
        return Ok(copy.clone());
    }
    let copy = list()?.to_device(device)?;
    copies.push(copy.clone());
    Ok(copy)
}

/// `y[b, h, i] = softmax(scale q[b, h, i] k^T) v` over the cache rows that row `r = b n + i` sees: q `[B, H, n, d]`, k and
/// v `[Hkv, T, d]`, result `[B, H, n, d]`, lying in memory as `[B, n, H, d]`.
///
/// H is a multiple of Hkv; query head h reads key head `h / (H/Hkv)`. Arithmetic runs in f32 (f64 for f64) and rounds
/// once. A row's result does not depend on the other rows, in any bit.
pub fn cached_attention(q: &Tensor, k: &Tensor, v: &Tensor, rows: &CacheRows, scale: f64) -> Result<Tensor> {
    same_dtype(OP, &[q, k, v])?;
    check(q, k, v, rows)?;
    let (q, k, v) = (q.dense_rows()?, k.dense_rows()?, v.dense_rows()?);
    on_device!(q.device(), cached_attention::forward(&q, &k, &v, rows, scale))
}

/// As [`cached_attention`] to keys and values that are kept in 8 bits: what is summed are the integers, each row's sum times
/// its scale. Of the integers nothing is rounded; the result has the dtype of q.
pub fn cached_attention_int8(q: &Tensor, k: &Int8Rows, v: &Int8Rows, rows: &CacheRows, scale: f64) -> Result<Tensor> {
    same_device(OP, &[q, &k.numbers, &v.numbers])?;
    check(q, &k.numbers, &v.numbers, rows)?;
    let (q, k, v) = (q.dense_rows()?, k.dense()?, v.dense()?);
    on_device!(q.device(), cached_attention::forward_int8(&q, &k, &v, rows, scale))
}

/// Shapes, and what each row sees; keys and values may be of another dtype.
fn check(q: &Tensor, k: &Tensor, v: &Tensor, rows: &CacheRows) -> Result<()> {
    let (qs, ks) = (q.shape(), k.shape());
    if !q.dtype().is_float() {
        return Err(Error::dtype(OP, format!("needs a float dtype, got {}", q.dtype())));
    }
    if qs.len() != 4 || ks.len() != 3 || ks != v.shape() || qs[3] != ks[2] {
        let detail = format!("q {qs:?}, k {ks:?}, v {:?}: give q [B, H, n, d] and k, v [Hkv, T, d]", v.shape());
        return Err(Error::shape(OP, detail));
    }
    if qs[1] != 0 && (ks[0] == 0 || qs[1] % ks[0] != 0) {
        return Err(Error::shape(OP, format!("{} query heads cannot share {} key heads evenly", qs[1], ks[0])));
    }
    check_rows(OP, rows, qs[0] * qs[2], ks[1])
}

/// That there is a place for each of `n` rows, inside a cache of `room`.
pub(super) fn check_rows(op: &'static str, rows: &CacheRows, n: usize, room: usize) -> Result<()> {
    if rows.len() != n || rows.least() > room {
        let (have, least) = (rows.len(), rows.least());
        return Err(Error::shape(op, format!("{have} places up to row {least} for {n} rows in a cache of {room}")));
    }
    Ok(())
}

#[cfg(all(test, feature = "cuda"))]
mod tests {
    use super::*;

    #[test]
    fn rows_stand_in_groups_of_one_or_two() {
        let groups = |seen: &[Range<usize>]| CacheRows::new(seen.to_vec()).unwrap().groups();
        assert_eq!(groups(&[]), Some(0));
        assert_eq!(groups(&[5..9, 0..3]), Some(2));
        assert_eq!(groups(&[5..9, 5..10, 0..3, 10..11]), Some(3));
        assert_eq!(groups(&[0..3, 5..9, 5..10, 10..14, 10..15]), Some(3));
        // three rows; the second first; not neighbours; another start; two places more; one place twice; a place of another's
        let apart: [&[Range<usize>]; 7] = [
            &[0..1, 0..2, 0..3],
            &[0..2, 0..1],
            &[0..1, 4..5, 0..2],
            &[0..2, 1..3],
            &[0..1, 0..3],
            &[0..2, 0..2],
            &[0..2, 0..3, 2..6],
        ];
        for seen in apart {
            assert_eq!(groups(seen), None, "{seen:?}");
        }
    }
}
