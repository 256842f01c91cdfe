//! The dense pieces that attention is made of, on tiles in a task's scratch memory: products in a register tile of 6 x 16
//! (12 AVX2 accumulators), a softmax step, and its derivative.

use crate::ops::cpu::simd;
use crate::tensor::Real;
use bytemuck::Pod;
use pulp::{Simd, WithSimd};

/// Lanes of a product's full and half width. Tiles that lie beside the lanes are padded to `HALF`.
pub const FULL: usize = 16;
pub const HALF: usize = 8;
/// Rows of one register tile.
const HEIGHT: usize = 6;
/// Query rows and keys of one tile of scores: 48 x 128 in f32 are 24 KB, so that it stays near the core.
pub const ROWS: usize = 48;
pub const KEYS: usize = 128;

/// What the rows of a score tile see of its columns: row r those below `first + step * r`, counted from `start`.
#[derive(Clone, Copy)]
pub struct Seen {
    pub first: usize,
    pub step: usize,
    pub start: usize,
}

impl Seen {
    #[inline(always)]
    fn by(self, row: usize) -> usize {
        (self.first + self.step * row).saturating_sub(self.start).min(KEYS)
    }
    /// Row length of the score tile of `m` rows: all columns that any of them sees, and up to a multiple of `HALF`.
    pub fn wide(self, m: usize) -> usize {
        self.by(m - 1).next_multiple_of(HALF)
    }
    /// The first row that sees column j.
    #[inline(always)]
    fn from(self, j: usize) -> usize {
        if self.step == 0 { 0 } else { (self.start + j + 1).saturating_sub(self.first) }
    }
}

/// The accumulator types in the vector registers of an instruction set. Spelled out for the products alone: whether a
/// compiler keeps a register tile in vectors by itself depends on its size.
pub trait Lanes: Real {
    type Of<S: Simd>: Pod;
    fn splat<S: Simd>(s: S, x: Self) -> Self::Of<S>;
    /// `a * b + c` in one rounding.
    fn mul_add<S: Simd>(s: S, a: Self::Of<S>, b: Self::Of<S>, c: Self::Of<S>) -> Self::Of<S>;
}

macro_rules! lanes {
    ($t:ident, $of:ident, $splat:ident, $mul_add:ident) => {
        impl Lanes for $t {
            type Of<S: Simd> = S::$of;
            #[inline(always)]
            fn splat<S: Simd>(s: S, x: Self) -> S::$of {
                s.$splat(x)
            }
            #[inline(always)]
            fn mul_add<S: Simd>(s: S, a: S::$of, b: S::$of, c: S::$of) -> S::$of {
                s.$mul_add(a, b, c)
            }
        }
    };
}
lanes!(f32, f32s, splat_f32s, mul_add_f32s);
lanes!(f64, f64s, splat_f64s, mul_add_f64s);

/// The left side of a product: m x k, by rows or (transposed) by columns, with the distance between them.
#[derive(Clone, Copy)]
enum Left<'a, A> {
    Rows(&'a [A], usize),
    Columns(&'a [A], usize),
}

/// Up to `HEIGHT` rows of a product: `height` x `k` times `k` x `lanes`.
struct Strip<'a, A> {
    height: usize,
    k: usize,
    lanes: usize,
    a: Left<'a, A>,
    b: &'a [A],
}

/// `c = a b`, or `c += a b`, by strips: `strip(i)` are the rows from i on. Rows of b and c are `b.0` and `row` elements
/// apart, and b's next `FULL` lanes lie `b.1` elements further.
struct Sweep<'c, A, F> {
    rows: usize,
    b: (usize, usize),
    c: &'c mut [A],
    row: usize,
    add: bool,
    strip: F,
}

fn sweep<'a, A: Lanes>(
    rows: usize,
    b: (usize, usize),
    (c, row): (&mut [A], usize),
    add: bool,
    strip: impl Fn(usize) -> Strip<'a, A>,
) {
    pulp::Arch::new().dispatch(Sweep { rows, b, c, row, add, strip })
}

impl<'a, A: Lanes, F: Fn(usize) -> Strip<'a, A>> WithSimd for Sweep<'_, A, F> {
    type Output = ();
    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        for i in (0..self.rows).step_by(HEIGHT) {
            let strip = (self.strip)(i);
            if strip.k == 0 && self.add {
                continue;
            }
            for e in (0..strip.lanes).step_by(FULL) {
                let b = (&strip.b[e / FULL * self.b.1..], self.b.0);
                let c = (&mut self.c[i * self.row + e..], self.row);
                let n = if strip.lanes - e > HALF { FULL } else { HALF };
                match strip.height {
                    1 => rows::<S, A, 1>(simd, strip.k, n, strip.a, b, c, self.add),
                    2 => rows::<S, A, 2>(simd, strip.k, n, strip.a, b, c, self.add),
                    3 => rows::<S, A, 3>(simd, strip.k, n, strip.a, b, c, self.add),
                    4 => rows::<S, A, 4>(simd, strip.k, n, strip.a, b, c, self.add),
                    5 => rows::<S, A, 5>(simd, strip.k, n, strip.a, b, c, self.add),
                    _ => rows::<S, A, HEIGHT>(simd, strip.k, n, strip.a, b, c, self.add),
                }
            }
        }
    }
}

/// M rows and n lanes: two vectors at a time, then one, then what is no whole vector.
#[inline(always)]
fn rows<S: Simd, A: Lanes, const M: usize>(
    simd: S,
    k: usize,
    n: usize,
    a: Left<A>,
    (b, rb): (&[A], usize),
    (c, rc): (&mut [A], usize),
    add: bool,
) {
    let lanes = size_of::<A::Of<S>>() / size_of::<A>();
    let mut l = 0;
    while l + 2 * lanes <= n {
        tile::<S, A, M, 2>(simd, k, a, (&b[l..], rb), (&mut c[l..], rc), add);
        l += 2 * lanes;
    }
    while l + lanes <= n {
        tile::<S, A, M, 1>(simd, k, a, (&b[l..], rb), (&mut c[l..], rc), add);
        l += lanes;
    }
    for l in l..n {
        for i in 0..M {
            let mut sum = if add { c[i * rc + l] } else { A::ZERO };
            for p in 0..k {
                let a = match a {
                    Left::Rows(a, ra) => a[i * ra + p],
                    Left::Columns(a, ra) => a[p * ra + i],
                };
                sum = a.fma(b[p * rb + l], sum);
            }
            c[i * rc + l] = sum;
        }
    }
}

#[inline(always)]
fn tile<S: Simd, A: Lanes, const M: usize, const V: usize>(
    simd: S,
    k: usize,
    a: Left<A>,
    b: (&[A], usize),
    c: (&mut [A], usize),
    add: bool,
) {
    match a {
        Left::Rows(a, ra) => {
            let rows: [&[A]; M] = std::array::from_fn(
                #[inline(always)]
                |i| &a[i * ra..][..k],
            );
            accumulate::<S, A, M, V>(
                simd,
                k,
                #[inline(always)]
                |p, i| rows[i][p],
                b,
                c,
                add,
            )
        }
        Left::Columns(a, ra) => accumulate::<S, A, M, V>(
            simd,
            k,
            #[inline(always)]
            |p, i| a[p * ra + i],
            b,
            c,
            add,
        ),
    }
}

/// A register tile of M rows and V vectors: `c (+)= sum over p of a(p, i) b[p]`.
#[inline(always)]
fn accumulate<S: Simd, A: Lanes, const M: usize, const V: usize>(
    simd: S,
    k: usize,
    a: impl Fn(usize, usize) -> A,
    (b, rb): (&[A], usize),
    (c, rc): (&mut [A], usize),
    add: bool,
) {
    let n = V * size_of::<A::Of<S>>() / size_of::<A>();
    let mut sum = [[A::splat(simd, A::ZERO); V]; M];
    if add {
        for i in 0..M {
            sum[i].copy_from_slice(bytemuck::cast_slice(&c[i * rc..][..n]));
        }
    }
    for (p, b) in b.chunks(rb).take(k).enumerate() {
        let b: &[A::Of<S>] = bytemuck::cast_slice(&b[..n]);
        // a counted loop, so that all M sums stay in registers
        #[allow(clippy::needless_range_loop)]
        for i in 0..M {
            let a = A::splat(simd, a(p, i));
            for v in 0..V {
                sum[i][v] = A::mul_add(simd, a, b[v], sum[i][v]);
            }
        }
    }
    for i in 0..M {
        bytemuck::cast_slice_mut(&mut c[i * rc..][..n]).copy_from_slice(&sum[i]);
    }
}

/// Transposed keys (or values) in panels of `FULL` columns: element e of column j lies at
/// `(j / FULL * d + e) * FULL + j % FULL`, so a product streams them.
pub fn panels(columns: usize, d: usize) -> usize {
    columns.div_ceil(FULL) * FULL * d
}

/// Put rows into the panels, from column `at` on.
pub fn pack<A: Real>(panels: &mut [A], d: usize, at: usize, rows: &[A], width: usize) {
    for (i, row) in rows.chunks_exact(width).enumerate() {
        let (panel, lane) = ((at + i) / FULL, (at + i) % FULL);
        let panel = &mut panels[panel * d * FULL..][..d * FULL];
        for (y, x) in panel.chunks_exact_mut(FULL).zip(row) {
            y[lane] = *x;
        }
    }
}

/// `s = a panels`: a `[m, d]` with rows of `width`, s `[m, wide]` from column `seen.start` on; columns that a row does not
/// see are left unspecified.
pub fn scores<A: Lanes>(m: usize, d: usize, a: &[A], width: usize, panels: &[A], seen: Seen, s: &mut [A]) {
    let b = &panels[seen.start * d..];
    sweep(
        m,
        (FULL, FULL * d),
        (s, seen.wide(m)),
        false,
        #[inline(always)]
        |r| {
            let height = HEIGHT.min(m - r);
            Strip { height, k: d, lanes: seen.by(r + height - 1), a: Left::Rows(&a[r * width..], width), b }
        },
    )
}

/// `y = p x`, or `y += p x`: p `[m, wide]` (0 where masked), x the tile's key rows, y `[m, width]`.
pub fn mix<A: Lanes>(m: usize, p: &[A], x: &[A], width: usize, seen: Seen, y: &mut [A], add: bool) {
    let (b, wide) = (&x[seen.start * width..], seen.wide(m));
    sweep(
        m,
        (width, FULL),
        (y, width),
        add,
        #[inline(always)]
        |r| {
            let height = HEIGHT.min(m - r);
            Strip { height, k: seen.by(r + height - 1), lanes: width, a: Left::Rows(&p[r * wide..], wide), b }
        },
    )
}

/// `y += p^T x`: p `[m, wide]` (0 where masked), x `[m, width]`, y the tile's key rows.
pub fn spread<A: Lanes>(m: usize, p: &[A], x: &[A], width: usize, seen: Seen, y: &mut [A]) {
    let (columns, wide) = (seen.by(m - 1), seen.wide(m));
    sweep(
        columns,
        (width, FULL),
        (&mut y[seen.start * width..], width),
        true,
        #[inline(always)]
        |j| {
            let r = seen.from(j);
            let a = Left::Columns(&p[r * wide + j..], wide);
            Strip { height: HEIGHT.min(columns - j), k: m - r, lanes: width, a, b: &x[r * width..] }
        },
    )
}

/// Running maximum and sum of `e^(s - maximum)` of a row.
#[derive(Clone, Copy)]
pub struct Stat<A> {
    pub max: A,
    pub sum: A,
}

/// One step of the online softmax: scores become `e^(s - maximum so far)`, 0 where masked; what earlier tiles left in
/// `stats` and in `y` `[m, width]` is brought to the new maximum.
pub fn softmax<A: Real>(m: usize, seen: Seen, s: &mut [A], stats: &mut [Stat<A>], y: &mut [A], width: usize) {
    let wide = seen.wide(m);
    simd(
        #[inline(always)]
        || {
            for (r, stat) in stats[..m].iter_mut().enumerate() {
                let row = &mut s[r * wide..][..wide];
                row[seen.by(r)..].fill(A::NEG_INFINITY);
                let (row, _) = row.as_chunks_mut::<HALF>();
                let mut max = [stat.max; HALF];
                for c in row.iter() {
                    for l in 0..HALF {
                        max[l] = c[l].maximum(max[l]);
                    }
                }
                let max = max.into_iter().fold(stat.max, A::maximum);
                for c in row.iter_mut() {
                    for x in c {
                        *x -= max;
                    }
                }
                if seen.start == 0 {
                    *stat = Stat { max, sum: A::ZERO };
                } else {
                    let shrink = (stat.max - max).exp();
                    *stat = Stat { max, sum: stat.sum * shrink };
                    for y in &mut y[r * width..][..width] {
                        *y *= shrink;
                    }
                }
            }
            // one long loop, since most rows are too short for one that vectorises
            for x in &mut s[..m * wide] {
                *x = x.exp();
            }
            for (stat, row) in stats[..m].iter_mut().zip(s.chunks_exact(wide)) {
                let mut sum = [A::ZERO; HALF];
                for c in row.as_chunks::<HALF>().0 {
                    for l in 0..HALF {
                        sum[l] += c[l];
                    }
                }
                stat.sum += sum.into_iter().sum::<A>();
            }
        },
    )
}

/// Probabilities and the scores' gradient: `s` becomes `P = e^(s - lse)`, `t = G V^T` becomes `dS = P (t - delta)`;
/// both 0 where masked. `rows` holds (lse, delta).
pub fn softmax_backward<A: Real>(m: usize, seen: Seen, s: &mut [A], t: &mut [A], rows: &[(A, A)]) {
    let wide = seen.wide(m);
    let (s, t) = (&mut s[..m * wide], &mut t[..m * wide]);
    simd(
        #[inline(always)]
        || {
            for (r, (s, &(lse, _))) in s.chunks_exact_mut(wide).zip(rows).enumerate() {
                s[seen.by(r)..].fill(A::NEG_INFINITY);
                for c in s.as_chunks_mut::<HALF>().0 {
                    for x in c {
                        *x -= lse;
                    }
                }
            }
            for x in s.iter_mut() {
                *x = x.exp();
            }
            for (r, (t, &(_, delta))) in t.chunks_exact_mut(wide).zip(rows).enumerate() {
                t[seen.by(r)..].fill(A::ZERO);
                let s = &s[r * wide..][..wide];
                for (t, s) in t.as_chunks_mut::<HALF>().0.iter_mut().zip(s.as_chunks::<HALF>().0) {
                    for l in 0..HALF {
                        t[l] = s[l] * (t[l] - delta);
                    }
                }
            }
        },
    )
}
