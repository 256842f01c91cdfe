//! The dense pieces that attention is made of, on tiles in a task's scratch memory: products in a register tile of 6 x 16
//! (12 AVX2 accumulators), a softmax step, and its derivative.

use crate::ops::cpu::simd;
use crate::tensor::Real;

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
    /// The first row that sees column j.
    #[inline(always)]
    fn from(self, j: usize) -> usize {
        if self.step == 0 { 0 } else { (self.start + j + 1).saturating_sub(self.first) }
    }
}

/// `c = a b`, or `c += a b`: a is M x k by `a(p)[i]`, b has rows of `rb` elements, c of `rc`; N lanes of both are used.
#[inline(always)]
fn product<A: Real, const M: usize, const N: usize>(
    k: usize,
    a: impl Fn(usize) -> [A; M],
    b: (&[A], usize),
    c: (&mut [A], usize),
    add: bool,
) {
    let mut sum = [[A::ZERO; N]; M];
    if add {
        for (sum, c) in sum.iter_mut().zip(c.0.chunks(c.1)) {
            sum.copy_from_slice(&c[..N]);
        }
    }
    for (p, b) in b.0.chunks(b.1).take(k).enumerate() {
        let (a, b) = (a(p), &b[..N]);
        for i in 0..M {
            for l in 0..N {
                sum[i][l] = a[i].fma(b[l], sum[i][l]);
            }
        }
    }
    for (sum, c) in sum.iter().zip(c.0.chunks_mut(c.1)) {
        c[..N].copy_from_slice(sum);
    }
}

/// The left side of a product: m x k, by rows or (transposed) by columns, with the distance between them.
#[derive(Clone, Copy)]
enum Left<'a, A> {
    Rows(&'a [A], usize),
    Columns(&'a [A], usize),
}

#[inline(always)]
fn product_of<A: Real, const M: usize, const N: usize>(
    k: usize,
    a: Left<A>,
    b: (&[A], usize),
    c: (&mut [A], usize),
    add: bool,
) {
    match a {
        Left::Rows(a, ra) => {
            let rows: [&[A]; M] = std::array::from_fn(|i| &a[i * ra..][..k]);
            product::<A, M, N>(k, |p| std::array::from_fn(|i| rows[i][p]), b, c, add)
        }
        Left::Columns(a, ra) => product::<A, M, N>(
            k,
            |p| {
                let column = &a[p * ra..][..M];
                std::array::from_fn(|i| column[i])
            },
            b,
            c,
            add,
        ),
    }
}

/// `m <= HEIGHT` rows of a product, `n` (a multiple of `HALF`) lanes.
#[inline(always)]
fn strip<A: Real, const N: usize>(m: usize, k: usize, a: Left<A>, b: (&[A], usize), c: (&mut [A], usize), add: bool) {
    match m {
        1 => product_of::<A, 1, N>(k, a, b, c, add),
        2 => product_of::<A, 2, N>(k, a, b, c, add),
        3 => product_of::<A, 3, N>(k, a, b, c, add),
        4 => product_of::<A, 4, N>(k, a, b, c, add),
        5 => product_of::<A, 5, N>(k, a, b, c, add),
        _ => product_of::<A, HEIGHT, N>(k, a, b, c, add),
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

/// `s = a panels`: a `[m, d]` with rows of `width`, s `[m, KEYS]` from column `seen.start` on; columns that a row does not
/// see are left unspecified.
pub fn scores<A: Real>(m: usize, d: usize, a: &[A], width: usize, panels: &[A], seen: Seen, s: &mut [A]) {
    simd(
        #[inline(always)]
        || {
            for r in (0..m).step_by(HEIGHT) {
                let height = HEIGHT.min(m - r);
                let n = seen.by(r + height - 1);
                let a = Left::Rows(&a[r * width..], width);
                for j in (0..n).step_by(FULL) {
                    let b = (&panels[(seen.start + j) * d..], FULL);
                    let c = (&mut s[r * KEYS + j..], KEYS);
                    if n - j > HALF {
                        strip::<A, FULL>(height, d, a, b, c, false);
                    } else {
                        strip::<A, HALF>(height, d, a, b, c, false);
                    }
                }
            }
        },
    )
}

/// `y = p x`, or `y += p x`: p `[m, KEYS]` (0 where masked), x the tile's key rows, y `[m, width]`.
pub fn mix<A: Real>(m: usize, p: &[A], x: &[A], width: usize, seen: Seen, y: &mut [A], add: bool) {
    let x = &x[seen.start * width..];
    simd(
        #[inline(always)]
        || {
            for r in (0..m).step_by(HEIGHT) {
                let height = HEIGHT.min(m - r);
                let n = seen.by(r + height - 1);
                lanes(height, n, Left::Rows(&p[r * KEYS..], KEYS), x, &mut y[r * width..], width, add);
            }
        },
    )
}

/// `y += p^T x`: p `[m, KEYS]` (0 where masked), x `[m, width]`, y the tile's key rows.
pub fn spread<A: Real>(m: usize, p: &[A], x: &[A], width: usize, seen: Seen, y: &mut [A]) {
    let n = seen.by(m - 1);
    let y = &mut y[seen.start * width..];
    simd(
        #[inline(always)]
        || {
            for j in (0..n).step_by(HEIGHT) {
                let r = seen.from(j).min(m);
                let p = Left::Columns(&p[r * KEYS + j..], KEYS);
                lanes(HEIGHT.min(n - j), m - r, p, &x[r * width..], &mut y[j * width..], width, true);
            }
        },
    )
}

/// A strip of `m` rows over all lanes of `width`.
#[inline(always)]
fn lanes<A: Real>(m: usize, k: usize, a: Left<A>, b: &[A], c: &mut [A], width: usize, add: bool) {
    for e in (0..width).step_by(FULL) {
        let (b, c) = ((&b[e.min(b.len())..], width), (&mut c[e..], width));
        if width - e > HALF {
            strip::<A, FULL>(m, k, a, b, c, add);
        } else {
            strip::<A, HALF>(m, k, a, b, c, add);
        }
    }
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
    simd(
        #[inline(always)]
        || {
            let wide = seen.by(m - 1).next_multiple_of(HALF);
            for (r, stat) in stats[..m].iter_mut().enumerate() {
                let row = &mut s[r * KEYS..][..wide];
                let n = seen.by(r);
                row[n..].fill(A::NEG_INFINITY);
                let (row, _) = row.as_chunks_mut::<HALF>();
                let (row, rest) = row.split_at_mut(n.div_ceil(HALF));
                rest.as_flattened_mut().fill(A::ZERO);
                let mut max = [stat.max; HALF];
                for c in row.iter() {
                    for l in 0..HALF {
                        max[l] = c[l].maximum(max[l]);
                    }
                }
                let max = max.into_iter().fold(stat.max, A::maximum);
                let mut sum = [A::ZERO; HALF];
                for c in row.iter_mut() {
                    for l in 0..HALF {
                        c[l] = (c[l] - max).exp();
                        sum[l] += c[l];
                    }
                }
                let sum = sum.into_iter().sum::<A>();
                if seen.start == 0 {
                    *stat = Stat { max, sum };
                } else {
                    let shrink = (stat.max - max).exp();
                    *stat = Stat { max, sum: stat.sum * shrink + sum };
                    for y in &mut y[r * width..][..width] {
                        *y *= shrink;
                    }
                }
            }
        },
    )
}

/// Probabilities and the scores' gradient: `s` becomes `P = e^(s - lse)`, `t = G V^T` becomes `dS = P (t - delta)`;
/// both 0 where masked. `rows` holds (lse, delta).
pub fn softmax_backward<A: Real>(m: usize, seen: Seen, s: &mut [A], t: &mut [A], rows: &[(A, A)]) {
    simd(
        #[inline(always)]
        || {
            let wide = seen.by(m - 1).next_multiple_of(HALF);
            for (r, &(lse, delta)) in rows[..m].iter().enumerate() {
                let (s, t) = (&mut s[r * KEYS..][..wide], &mut t[r * KEYS..][..wide]);
                let n = seen.by(r);
                let whole = n.div_ceil(HALF);
                for (s, t) in s.as_chunks_mut::<HALF>().0[..whole].iter_mut().zip(t.as_chunks_mut::<HALF>().0) {
                    for l in 0..HALF {
                        s[l] = (s[l] - lse).exp();
                        t[l] = s[l] * (t[l] - delta);
                    }
                }
                s[n..].fill(A::ZERO);
                t[n..].fill(A::ZERO);
            }
        },
    )
}
