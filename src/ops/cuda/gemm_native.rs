//! Felid's own matrix product on CUDA: `kernels/gemm_sm90.cu` on Hopper, `kernels/gemm.cu` elsewhere and for operands that
//! its copies cannot take, `kernels/gemm_f32.cu` for f32.
//!
//! Which tile makes a product, and into how many parts k is split, is a guess at the time that each choice takes, from what
//! an H100 showed. It depends on sizes, alignment and device alone, so results are the same from run to run.

use crate::cuda::kernels::{gemm, gemm_f32, gemm_sm90};
use crate::cuda::{Arg, CudaBuffer, Gpu, Grid, Kind, Matrix, Product, Symbol, Variant, boxes};
use crate::memory::{Category, counted_as};
use crate::{Error, Result};

/// A kernel and the tile that it makes.
struct Tile {
    symbol: Symbol,
    rows: usize,
    cols: usize,
    threads: usize,
    shared: usize,
    /// Blocks that a multiprocessor holds.
    resident: usize,
    /// TFLOP/s when all multiprocessors of an H100 are busy with it.
    rate: f64,
    /// Microseconds to start and to finish.
    setup: f64,
}

macro_rules! tile {
    ($symbol:path, $rows:literal x $cols:literal, $threads:literal, $shared:literal, $resident:literal, $rate:literal, $setup:literal) => {
        Tile {
            symbol: $symbol,
            rows: $rows,
            cols: $cols,
            threads: $threads,
            shared: $shared,
            resident: $resident,
            rate: $rate,
            setup: $setup,
        }
    };
}

static HOPPER: [Tile; 2] = [
    tile!(gemm_sm90::gemm_tma_256, 128 x 256, 384, 229_632, 1, 700.0, 7.0),
    tile!(gemm_sm90::gemm_tma_128, 128 x 128, 384, 229_632, 1, 600.0, 7.0),
];
static HALF: [Tile; 3] = [
    tile!(gemm::gemm_128x256, 128 x 256, 256, 196_608, 1, 340.0, 4.0),
    tile!(gemm::gemm_128x128, 128 x 128, 128, 98_304, 2, 380.0, 4.0),
    tile!(gemm::gemm_64x64, 64 x 64, 128, 65_536, 3, 270.0, 4.0),
];
static HALF_ANY: [Tile; 1] = [tile!(gemm::gemm_any, 128 x 128, 128, 98_304, 2, 115.0, 4.0)];
static FULL: [Tile; 2] = [
    tile!(gemm_f32::gemm_128x128, 128 x 128, 256, 0, 2, 43.0, 4.0),
    tile!(gemm_f32::gemm_64x64, 64 x 64, 256, 0, 3, 31.0, 4.0),
];
static FULL_ANY: [Tile; 1] = [tile!(gemm_f32::gemm_any, 128 x 128, 256, 0, 2, 36.0, 4.0)];

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
        boxes(gpu, self.pointer, kind, [self.along, self.lines, batch], [1, self.leading, stride], 64)
    }
}

/// The tile, and the number of parts of k, that should take the least time.
fn choose(tiles: &[&'static Tile], processors: usize, [m, n, k, batch]: [usize; 4]) -> (&'static Tile, usize) {
    let time = |t: &Tile, splits: usize| {
        let depth = k.div_ceil(splits).next_multiple_of(STEP) as f64;
        let blocks = m.div_ceil(t.rows) * n.div_ceil(t.cols) * batch * splits;
        // few blocks have a multiprocessor each to themselves
        let slots = processors * t.resident.min(blocks.div_ceil(processors));
        let round = (2 * t.rows * t.cols * slots) as f64 * depth / (t.rate * 1e6); // microseconds
        // parts are written and read, and another kernel adds them up
        let parts = if splits == 1 { 0.0 } else { 3.5 + (8 * m * n * batch * splits) as f64 / 2e6 };
        t.setup + blocks.div_ceil(slots) as f64 * (round + 1.5) + parts
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

/// `D = A B (+ D)`.
///
/// # Safety
///
/// The matrices are of this device, as large as their sizes and strides say, and D overlaps neither A nor B.
pub(crate) unsafe fn native_product(gpu: &'static Gpu, product: &Product) -> Result<()> {
    let p = product;
    if p.output != p.input && p.output != Kind::F32 {
        let detail = format!("{} from {} elements is nothing that the kernels store", p.output.element(), p.input.element());
        return Err(Error::dtype("matmul", detail));
    }
    if [p.a.rows, p.b.cols, p.a.cols].into_iter().any(|n| n > i32::MAX as usize) {
        let detail = format!("m {}, n {}, k {}: each must be below 2^31", p.a.rows, p.b.cols, p.a.cols);
        return Err(Error::shape("matmul", detail));
    }
    // the batch is a dimension of the grid
    const MOST: usize = 65_535;
    for first in (0..p.batch).step_by(MOST) {
        let from =
            |m: Matrix, kind: Kind| Matrix { pointer: m.pointer + (first * m.batch_stride * kind.size()) as u64, ..m };
        let (a, b, d) = (from(p.a, p.input), from(p.b, p.input), from(p.d, p.output));
        // SAFETY: a part of the caller's batch.
        unsafe { multiply(gpu, &Product { a, b, d, batch: MOST.min(p.batch - first), ..*p })? };
    }
    Ok(())
}

/// As [`native_product`], all at once.
///
/// # Safety
///
/// As there.
unsafe fn multiply(gpu: &'static Gpu, p: &Product) -> Result<()> {
    let (m, n, k, kind) = (p.a.rows, p.b.cols, p.a.cols, p.input);
    let (a, b) = (Operand::new(&p.a, p.batch, kind), Operand::new(&p.b, p.batch, kind));
    let (single, aligned) = (kind == Kind::F32, a.aligned(kind) && b.aligned(kind));
    let maps = match aligned && !single && gpu.capability == (9, 0) {
        true => a.map(gpu, kind, p.batch)?.zip(b.map(gpu, kind, p.batch)?),
        false => None,
    };
    let plain: &'static [Tile] = match (single, aligned) {
        (true, true) => &FULL,
        (true, false) => &FULL_ANY,
        (false, true) => &HALF,
        (false, false) => &HALF_ANY,
    };
    let hopper: &'static [Tile] = if maps.is_some() { &HOPPER } else { &[] };
    let tiles: Vec<&'static Tile> =
        hopper.iter().chain(plain).filter(|t| t.shared <= gpu.shared_per_block as usize).collect();
    if tiles.is_empty() {
        let detail = format!("blocks may have {} bytes of shared memory: too few", gpu.shared_per_block);
        return Err(Error::Kernel { kernel: "gemm".into(), detail });
    }
    let (t, splits) = choose(&tiles, gpu.multiprocessors as usize, [m, n, k, p.batch]);
    let depth = k.div_ceil(splits).next_multiple_of(STEP);
    let splits = k.div_ceil(depth);
    let parts = match splits {
        1 => None,
        _ => Some(counted_as(Category::Other, || CudaBuffer::new(gpu, splits * p.batch * m * n * 4))?),
    };
    let layout = usize::from(!p.a.by_columns) + 2 * usize::from(p.b.by_columns) + 4 * usize::from(p.output != kind);
    let variant = Variant { element: kind.element(), define: Some(LAYOUTS[layout]) };
    let (c, partial) = (if p.accumulate { p.d.pointer } else { 0 }, parts.as_ref().map_or(0, CudaBuffer::pointer));
    // `Product` in gemm.cuh: a, b, c, d, bias, partial; m, n, k; lda, ldb, ldd; batch_a, batch_b, batch_d; batches; splits, depth
    let pointers = [a.pointer, b.pointer, c, p.d.pointer, 0, partial];
    let steps = [a.leading, b.leading, p.d.leading, a.batch_stride, b.batch_stride, p.d.batch_stride];
    let sizes = [m, n, k].into_iter().chain(steps).chain([p.batch, splits, depth]);
    let mut words = [0u64; 18];
    words.iter_mut().zip(pointers.into_iter().chain(sizes.map(|n| n as u64))).for_each(|(w, x)| *w = x);
    let arg = Arg::from(words);
    let tiles = m.div_ceil(t.rows) * n.div_ceil(t.cols);
    let stays = HOPPER.iter().any(|h| std::ptr::eq(h, t));
    let (blocks, args) = match (stays, maps) {
        // these blocks walk the tiles
        (true, Some((a, b))) => ([(tiles * splits * p.batch).min(gpu.multiprocessors as usize), 1, 1], vec![a, b, arg]),
        _ => ([tiles, splits, p.batch], vec![arg]),
    };
    let grid = Grid { blocks, ..Grid::new(0, t.threads).shared(t.shared) };
    // SAFETY: the matrices are the caller's obligation, and the parts have a place for each of splits x batch x m x n floats.
    // The words are `Product`'s fields in order, after two tensor maps where the kernel takes them.
    unsafe { gpu.launch(t.symbol, variant, grid, &args)? };
    if parts.is_some() {
        let symbol = if single { gemm_f32::gemm_sum } else { gemm::gemm_sum };
        let grid = Grid { blocks: [(m * n).div_ceil(256).min(65_535), 1, p.batch], ..Grid::new(0, 256) };
        // SAFETY: as above; the launch before, on the same stream, wrote every part.
        unsafe { gpu.launch(symbol, variant, grid, &[arg])? };
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn large_products_take_large_tiles_and_long_sums_split() {
        let tiles: Vec<&Tile> = HOPPER.iter().chain(&HALF).collect();
        let chosen = |m, n, k| {
            let (t, splits) = choose(&tiles, 132, [m, n, k, 1]);
            (t.rows, t.cols, splits)
        };
        assert_eq!(chosen(34_816, 6144, 2048), (128, 256, 1));
        assert_eq!(chosen(6144, 2048, 36_880), (128, 256, 1));
        assert_eq!(chosen(320, 6144, 2048), (128, 256, 1));
        assert_eq!(chosen(33, 17, 40), (64, 64, 1));
        assert!(chosen(64, 64, 100_000).2 > 16);
        assert!(chosen(16, 2048, 2048).2 > 1);
        assert_eq!(chosen(1, 50_304, 256).2, 1);
    }
}
