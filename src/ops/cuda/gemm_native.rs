//! Felid's own matrix product on CUDA: `kernels/gemm_sm90.cu` on Hopper, `kernels/gemm.cu` elsewhere and for operands that
//! its copies cannot take, `kernels/gemm_f32.cu` for f32.
//!
//! Which tile makes a product, and into how many parts k is split, is a guess at the time that each choice takes. It depends
//! on sizes and device alone, so results are the same from run to run.

use crate::Result;
use crate::cuda::kernels::{gemm, gemm_f32, gemm_sm90};
use crate::cuda::{Arg, CudaBuffer, Gpu, Grid, Kind, Matrix, Product, Symbol, Variant, boxes};
use crate::memory::{Category, counted_as};
use crate::tensor::Tensor;

/// A kernel and the tile that it makes.
struct Tile {
    symbol: Symbol,
    rows: usize,
    cols: usize,
    threads: usize,
    shared: usize,
    /// Blocks that a multiprocessor holds, and blocks that make one tile together.
    resident: usize,
    cluster: usize,
    /// TFLOP/s of an H200 whose multiprocessors are all busy with it.
    rate: f64,
}

const fn tile(symbol: Symbol, [rows, cols]: [usize; 2], threads: usize, shared: usize, resident: usize, rate: f64) -> Tile {
    Tile { symbol, rows, cols, threads, shared, resident, cluster: 1, rate }
}

static HOPPER: [Tile; 3] = [
    Tile { cluster: 2, ..tile(gemm_sm90::gemm_tma_256x2, [256, 256], 384, 229_632, 1, 640.0) },
    tile(gemm_sm90::gemm_tma_256, [128, 256], 384, 229_632, 1, 600.0),
    tile(gemm_sm90::gemm_tma_128, [128, 128], 384, 229_632, 1, 520.0),
];
static HALF: [Tile; 3] = [
    tile(gemm::gemm_128x256, [128, 256], 256, 196_608, 1, 400.0),
    tile(gemm::gemm_128x128, [128, 128], 128, 98_304, 2, 380.0),
    tile(gemm::gemm_64x64, [64, 64], 128, 65_536, 3, 250.0),
];
static HALF_ANY: [Tile; 1] = [tile(gemm::gemm_any, [128, 128], 128, 98_304, 2, 120.0)];
static FULL: [Tile; 2] =
    [tile(gemm_f32::gemm_128x128, [128, 128], 256, 0, 2, 45.0), tile(gemm_f32::gemm_64x64, [64, 64], 256, 0, 2, 30.0)];
static FULL_ANY: [Tile; 1] = [tile(gemm_f32::gemm_any, [128, 128], 256, 0, 2, 35.0)];

/// What `GEMM` may be (`gemm.cuh`), by its value.
const LAYOUTS: [&str; 8] = ["GEMM=0", "GEMM=1", "GEMM=2", "GEMM=3", "GEMM=4", "GEMM=5", "GEMM=6", "GEMM=7"];
/// Parts of k end on multiples of this.
const STEP: usize = 64;
/// Bytes that the sums of the parts may take together.
const PARTS_LIMIT: usize = 64 << 20;

/// An operand as its lines of memory: `lines` of `along` elements, `leading` apart.
struct Operand {
    pointer: u64,
    along: usize,
    lines: usize,
    leading: usize,
    batch_stride: usize,
}

impl Operand {
    fn new(m: &Matrix, batch: usize, kind: Kind) -> Self {
        let (along, lines) = if m.by_columns { (m.rows, m.cols) } else { (m.cols, m.rows) };
        // a stride over one line or one matrix is never used: any that suits the copies will do
        let leading = if lines == 1 { along.next_multiple_of(16 / kind.size()) } else { m.leading };
        Self { pointer: m.pointer, along, lines, leading, batch_stride: if batch == 1 { 0 } else { m.batch_stride } }
    }
    /// True where every line begins on 16 bytes.
    fn aligned(&self, kind: Kind) -> bool {
        (self.pointer | ((self.leading | self.batch_stride) * kind.size()) as u64).is_multiple_of(16)
    }
    /// For the copy engine. One matrix stands for all of a batch that repeats it.
    fn map(&self, gpu: &Gpu, kind: Kind, batch: usize) -> Result<Option<Arg>> {
        let (batch, stride) = if self.batch_stride == 0 { (1, self.leading) } else { (batch, self.batch_stride) };
        boxes(gpu, self.pointer, kind, [self.along, self.lines, batch], [self.leading, stride])
    }
}

/// The tile, and the number of parts of k, that should take the least time.
fn choose<'a>(tiles: &[&'a Tile], processors: usize, [m, n, k, batch]: [usize; 4]) -> (&'a Tile, usize) {
    let time = |t: &Tile, splits: usize| {
        let depth = k.div_ceil(splits).next_multiple_of(STEP) as f64;
        let groups = (processors / t.cluster).max(1);
        let blocks = m.div_ceil(t.rows) * n.div_ceil(t.cols) * batch * splits;
        // few blocks have a multiprocessor each to themselves
        let slots = groups * t.resident.min(blocks.div_ceil(groups));
        let rounds = blocks.div_ceil(slots) as f64;
        let full = (2 * t.rows * t.cols * slots) as f64 * depth / (t.rate * 1e6); // microseconds
        let parts = if splits == 1 { 0.0 } else { 3.0 + (8 * m * n * batch * splits) as f64 / 3e6 };
        rounds * (full + 1.5) + parts
    };
    let mut best = (f64::INFINITY, tiles[0], 1);
    for &t in tiles {
        for splits in (0..8).map(|i| 1 << i) {
            if splits > 1 && (k / splits < 4 * STEP || splits * m * n * batch * 4 > PARTS_LIMIT) {
                break;
            }
            let time = time(t, splits);
            if time < best.0 {
                best = (time, t, splits);
            }
        }
    }
    (best.1, best.2)
}

/// `D = A B (+ D)`: `b` and `y` are the tensors that the product's B and D are of.
pub(crate) fn native_product(gpu: &'static Gpu, _b: &Tensor, _y: &mut Tensor, product: &Product) -> Result<()> {
    // the batch is a dimension of the grid
    const MOST: usize = 65_535;
    for first in (0..product.batch).step_by(MOST) {
        let from =
            |m: Matrix, kind: Kind| Matrix { pointer: m.pointer + (first * m.batch_stride * kind.size()) as u64, ..m };
        let part = Product {
            a: from(product.a, product.input),
            b: from(product.b, product.input),
            d: from(product.d, product.output),
            batch: MOST.min(product.batch - first),
            ..*product
        };
        multiply(gpu, &part)?;
    }
    Ok(())
}

fn multiply(gpu: &'static Gpu, p: &Product) -> Result<()> {
    let (m, n, k, kind) = (p.a.rows, p.b.cols, p.a.cols, p.input);
    let (a, b) = (Operand::new(&p.a, p.batch, kind), Operand::new(&p.b, p.batch, kind));
    let aligned = a.aligned(kind) && b.aligned(kind);
    let single = kind == Kind::F32;
    let maps = match aligned && !single && gpu.capability == (9, 0) {
        true => a.map(gpu, kind, p.batch)?.zip(b.map(gpu, kind, p.batch)?),
        false => None,
    };
    let mut tiles: Vec<&Tile> = match (single, aligned) {
        (true, true) => FULL.iter().collect(),
        (true, false) => FULL_ANY.iter().collect(),
        (false, true) => HALF.iter().filter(|t| t.shared <= gpu.shared_per_block as usize).collect(),
        (false, false) => HALF_ANY.iter().collect(),
    };
    if maps.is_some() {
        tiles.splice(0..0, &HOPPER);
    }
    let (t, splits) = choose(&tiles, gpu.multiprocessors as usize, [m, n, k, p.batch]);
    let depth = k.div_ceil(splits).next_multiple_of(STEP);
    let splits = k.div_ceil(depth);
    let parts = match splits {
        1 => None,
        _ => Some(counted_as(Category::Other, || CudaBuffer::new(gpu, splits * p.batch * m * n * 4))?),
    };
    let layout = usize::from(!p.a.by_columns) + 2 * usize::from(p.b.by_columns);
    let layout = layout + if p.output == kind { 0 } else { 4 };
    let variant = Variant { element: kind.element(), define: Some(LAYOUTS[layout]) };
    let d = p.d.pointer;
    // `Product` in gemm.cuh
    let pointers =
        [a.pointer, b.pointer, if p.accumulate { d } else { 0 }, d, 0, parts.as_ref().map_or(0, CudaBuffer::pointer)];
    let sizes = [
        m,
        n,
        k,
        a.leading,
        b.leading,
        p.d.leading,
        a.batch_stride,
        b.batch_stride,
        p.d.batch_stride,
        p.batch,
        splits,
        depth,
    ];
    let mut words = [0u64; 18];
    words[..6].copy_from_slice(&pointers);
    words[6..].copy_from_slice(&sizes.map(|n| n as u64));
    let arg = Arg::from(words);
    let tiles = m.div_ceil(t.rows) * n.div_ceil(t.cols);
    let hopper = HOPPER.iter().any(|h| std::ptr::eq(h, t));
    let blocks = match hopper {
        true => [(tiles * splits * p.batch).min(gpu.multiprocessors as usize / t.cluster) * t.cluster, 1, 1],
        false => [tiles, splits, p.batch],
    };
    let grid = Grid { blocks, threads: [t.threads, 1, 1], shared: t.shared };
    let args = match (hopper, maps) {
        (true, Some((a, b))) => vec![a, b, arg],
        _ => vec![arg],
    };
    // SAFETY: the caller's matrices are alive and as large as their sizes and strides; D is owned alone and overlaps neither
    // A nor B; the parts have a place for each of splits x batch x m x n floats. The structure's words are `Product`'s fields
    // in order, after the two maps where the kernel takes them.
    unsafe { gpu.launch(t.symbol, variant, grid, &args)? };
    if parts.is_some() {
        let symbol = if single { gemm_f32::gemm_sum } else { gemm::gemm_sum };
        let grid = Grid { blocks: [(m * n).div_ceil(256).min(65_535), 1, p.batch], threads: [256, 1, 1], shared: 0 };
        // SAFETY: as above; every part was written by the launch before, on the same stream.
        unsafe { gpu.launch(symbol, variant, grid, &[arg])? };
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn large_products_take_large_tiles_and_long_sums_split() {
        let hopper: Vec<&Tile> = HOPPER.iter().chain(&HALF).collect();
        let chosen = |m, n, k| {
            let (t, splits) = choose(&hopper, 132, [m, n, k, 1]);
            (t.rows, t.cols, splits)
        };
        assert_eq!(chosen(34_816, 6144, 2048), (256, 256, 1));
        assert_eq!(chosen(6144, 2048, 36_880).2, 1);
        assert!(chosen(64, 64, 100_000).2 > 16);
        assert_eq!(chosen(33, 17, 40), (64, 64, 1));
        let (rows, cols, _) = chosen(320, 2048, 2048);
        assert!(rows * cols <= 128 * 128);
    }
}
