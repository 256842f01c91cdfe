//! Launching kernels: a grid, and arguments by value.

use super::gpu::{Gpu, check};
use super::module::{Symbol, Variant};
use super::spans::Work;
use crate::{Error, Result};
use cudarc::driver::sys;
use std::ffi::c_void;

/// How many blocks of how many threads.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Grid {
    pub blocks: [usize; 3],
    pub threads: [usize; 3],
    /// Dynamic shared memory of a block, in bytes.
    pub shared: usize,
    /// Blocks may begin while the kernel before is still under way, if that allows it (`launch_dependents`): this kernel
    /// waits by itself (`await_kernel_before` in common.cuh) before it reads or writes what others write.
    pub early: bool,
}

impl Grid {
    pub fn new(blocks: usize, threads: usize) -> Self {
        Self { blocks: [blocks, 1, 1], threads: [threads, 1, 1], shared: 0, early: false }
    }
    /// A thread for each of `n` items, as far as a grid reaches: kernels loop on by `thread_count()`.
    pub fn for_each(n: usize, threads: usize) -> Self {
        Self::new(n.div_ceil(threads).min(1 << 20), threads)
    }
    pub fn shared(self, bytes: usize) -> Self {
        Self { shared: bytes, ..self }
    }
    pub fn early(self, early: bool) -> Self {
        Self { early, ..self }
    }
}

/// Dimensions that a view has at most once merged, as `MAX_RANK` in common.cuh.
const MAX_RANK: usize = 8;

/// A strided view as kernels take it (`View` in common.cuh): dimensions of size 1 dropped, neighbours that behave as one
/// merged. Strides count elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub(crate) struct View {
    rank: i64,
    shape: [i64; MAX_RANK],
    stride: [i64; MAX_RANK],
}

impl View {
    pub fn new(op: &'static str, shape: &[usize], strides: &[usize]) -> Result<Self> {
        let mut merged: Vec<(usize, usize)> = Vec::with_capacity(shape.len());
        for (&n, &s) in shape.iter().zip(strides).filter(|(n, _)| **n != 1) {
            match merged.last_mut() {
                Some((outer, stride)) if *stride == n * s => (*outer, *stride) = (*outer * n, s),
                _ => merged.push((n, s)),
            }
        }
        if merged.is_empty() {
            merged.push((1, 0));
        }
        if merged.len() > MAX_RANK {
            let detail = format!("a view of shape {shape:?}, strides {strides:?} has over {MAX_RANK} dimensions: copy it");
            return Err(Error::shape(op, detail));
        }
        let mut view = Self { rank: merged.len() as i64, shape: [1; MAX_RANK], stride: [0; MAX_RANK] };
        for (i, (n, s)) in merged.into_iter().enumerate() {
            (view.shape[i], view.stride[i]) = (n as i64, s as i64);
        }
        Ok(view)
    }
    /// The innermost dimension's size and stride.
    pub fn innermost(&self) -> (usize, usize) {
        let last = self.rank as usize - 1;
        (self.shape[last] as usize, self.stride[last] as usize)
    }
    /// The strides of all dimensions but the innermost.
    pub fn outer_strides(&self) -> impl Iterator<Item = usize> + '_ {
        self.stride[..self.rank as usize - 1].iter().map(|&s| s as usize)
    }
    /// How the elements can be taken 16 bytes at a time, in row-major order, `size` bytes each and the first at `pointer`.
    /// Packs may not straddle rows, save that the last pack of a single row may be short.
    pub fn packs(&self, pointer: u64, size: usize) -> Packs {
        let pack = 16 / size;
        let (width, stride) = self.innermost();
        let whole = self.rank == 1 || width % pack == 0;
        match stride {
            0 if whole => Packs::Repeated,
            1 if whole && pointer.is_multiple_of(16) && self.outer_strides().all(|s| s % pack == 0) => Packs::Dense,
            _ => Packs::None,
        }
    }
    /// Sizes and strides, outermost first.
    pub fn dims(&self) -> impl Iterator<Item = (usize, usize)> + '_ {
        (0..self.rank as usize).map(|i| (self.shape[i] as usize, self.stride[i] as usize))
    }
}

/// Fields that a block of parameters has at most.
const WORDS: usize = 32;

/// What 16 bytes' worth of a view's elements are: see [`View::packs`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Packs {
    /// Not to be had: elements are taken one by one.
    None,
    /// 16 bytes, aligned.
    Dense,
    /// One element, repeated.
    Repeated,
}

/// An argument of a kernel. Integers are passed as 64 bits; a kernel that takes 32 reads the low half.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Arg {
    Word(u64),
    View(View),
    /// A block of parameters by value: a struct of 64-bit fields, at most as many as this has.
    Words([u64; WORDS]),
}

impl From<usize> for Arg {
    fn from(x: usize) -> Self {
        Self::Word(x as u64)
    }
}
impl From<u64> for Arg {
    fn from(x: u64) -> Self {
        Self::Word(x)
    }
}
impl From<i64> for Arg {
    fn from(x: i64) -> Self {
        Self::Word(x as u64)
    }
}
impl From<bool> for Arg {
    fn from(x: bool) -> Self {
        Self::Word(x.into())
    }
}
impl From<f32> for Arg {
    fn from(x: f32) -> Self {
        Self::Word(x.to_bits().into())
    }
}
impl From<View> for Arg {
    fn from(x: View) -> Self {
        Self::View(x)
    }
}
impl<const N: usize> From<[u64; N]> for Arg {
    fn from(x: [u64; N]) -> Self {
        const { assert!(N <= WORDS) };
        Self::Words(std::array::from_fn(|i| x.get(i).copied().unwrap_or(0)))
    }
}

impl Gpu {
    /// Submit a kernel. A grid without blocks is no work, and none is done.
    ///
    /// # Safety
    ///
    /// - `args` are the kernel's parameters, in number, order and kind.
    /// - Pointers among them are of buffers of this device that live until this returns (they are freed on the same stream,
    ///   so after the kernel), as large as the kernel's index arithmetic reaches with these sizes and strides.
    /// - What the kernel writes is not shared: its tensor is the only owner of its storage.
    pub(crate) unsafe fn launch(&self, symbol: Symbol, variant: Variant, grid: Grid, args: &[Arg]) -> Result<()> {
        if grid.blocks.contains(&0) {
            return Ok(());
        }
        let fits = grid.blocks[0] < 1 << 31 && grid.blocks[1] <= 65_535 && grid.blocks[2] <= 65_535;
        if !fits || grid.threads.iter().product::<usize>() > 1024 || grid.shared > self.shared_per_block as usize {
            return Err(Error::Kernel {
                kernel: symbol.name.into(),
                detail: format!("{grid:?} is more than the device takes: choose smaller sizes"),
            });
        }
        let function = self.function(symbol, variant)?;
        let mut pointers: Vec<*mut c_void> = args
            .iter()
            .map(|a| match a {
                Arg::Word(w) => (w as *const u64).cast_mut().cast(),
                Arg::View(v) => (v as *const View).cast_mut().cast(),
                Arg::Words(w) => w.as_ptr().cast_mut().cast(),
            })
            .collect();
        let ([grid_x, grid_y, grid_z], [x, y, z]) = (grid.blocks.map(|n| n as u32), grid.threads.map(|n| n as u32));
        let mut early = sys::CUlaunchAttribute {
            id: sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
            pad: [0; 4],
            value: sys::CUlaunchAttributeValue { programmaticStreamSerializationAllowed: 1 },
        };
        let config = sys::CUlaunchConfig {
            gridDimX: grid_x,
            gridDimY: grid_y,
            gridDimZ: grid_z,
            blockDimX: x,
            blockDimY: y,
            blockDimZ: z,
            sharedMemBytes: grid.shared as u32,
            hStream: self.queue(),
            attrs: &raw mut early,
            numAttrs: u32::from(grid.early && self.capability >= (9, 0)),
        };
        self.bind()?;
        self.timed(
            || Work::named(symbol.name),
            || {
                // SAFETY: the caller's, as above; the driver copies the arguments before this returns.
                let answer = unsafe {
                    sys::cuLaunchKernelEx(&raw const config, function.0, pointers.as_mut_ptr(), std::ptr::null_mut())
                };
                check(self.ordinal, symbol.name, answer.result())
            },
        )?;
        if synchronous() && !super::replay::capturing() {
            check(self.ordinal, symbol.name, self.stream.synchronize())?;
        }
        Ok(())
    }
}

/// `FELID_CUDA_SYNC=1` waits for each kernel, so that an error names the kernel it is of.
fn synchronous() -> bool {
    static SYNC: std::sync::OnceLock<bool> = std::sync::OnceLock::new();
    *SYNC.get_or_init(|| std::env::var_os("FELID_CUDA_SYNC").is_some_and(|v| v == "1"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn views_merge_what_behaves_as_one() {
        let dims =
            |shape: &[usize], strides: &[usize]| View::new("test", shape, strides).unwrap().dims().collect::<Vec<_>>();
        assert_eq!(dims(&[2, 3, 4], &[12, 4, 1]), [(24, 1)]);
        assert_eq!(dims(&[2, 3, 4], &[24, 4, 1]), [(2, 24), (12, 1)]);
        assert_eq!(dims(&[2, 1, 4], &[4, 99, 1]), [(8, 1)]);
        assert_eq!(dims(&[5, 3], &[0, 0]), [(15, 0)]);
        assert_eq!(dims(&[5, 3], &[1, 5]), [(5, 1), (3, 5)]);
        assert_eq!(dims(&[], &[]), [(1, 0)]);
        assert!(View::new("test", &[2; 9], &[1; 9]).is_err());
        assert_eq!(size_of::<View>(), 136);
    }

    #[test]
    fn packs_are_whole_and_aligned() {
        let packs = |shape: &[usize], strides: &[usize], at| View::new("test", shape, strides).unwrap().packs(at, 2);
        assert_eq!(packs(&[3, 16], &[16, 1], 512), Packs::Dense);
        assert_eq!(packs(&[3, 7], &[7, 1], 512), Packs::Dense);
        assert_eq!(packs(&[3, 16], &[24, 1], 512), Packs::Dense);
        assert_eq!(packs(&[3, 16], &[24, 1], 514), Packs::None);
        assert_eq!(packs(&[3, 16], &[20, 1], 512), Packs::None);
        assert_eq!(packs(&[3, 15], &[16, 1], 512), Packs::None);
        assert_eq!(packs(&[3, 16], &[1, 0], 514), Packs::Repeated);
        assert_eq!(packs(&[3, 15], &[1, 0], 512), Packs::None);
        assert_eq!(packs(&[16, 3], &[1, 16], 512), Packs::None);
    }
}
