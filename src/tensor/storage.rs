//! Where elements live. CPU buffers are 64-byte aligned and recycled, since a training step asks for the same sizes
//! again and again and fresh pages cost more than most of its passes.

use super::DType;
use bytemuck::{Pod, Zeroable};
use std::collections::BTreeMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

/// A device that tensors live on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
#[non_exhaustive]
pub enum Device {
    /// Main memory, computed on by all cores.
    #[default]
    Cpu,
    /// An NVIDIA GPU, numbered among those that CUDA_VISIBLE_DEVICES leaves visible.
    Cuda(usize),
}

impl Device {
    /// Errors where this device cannot be used: no driver, no such GPU, or a build without CUDA.
    pub fn check(self) -> crate::Result<()> {
        match self {
            Self::Cpu => Ok(()),
            #[cfg(feature = "cuda")]
            Self::Cuda(n) => crate::cuda::gpu(n).map(drop),
            #[cfg(not(feature = "cuda"))]
            Self::Cuda(_) => Err(no_backend(self)),
        }
    }
    /// Wait until all work submitted to the device is done; errors of earlier kernels appear here.
    pub fn synchronize(self) -> crate::Result<()> {
        match self {
            Self::Cpu => Ok(()),
            #[cfg(feature = "cuda")]
            Self::Cuda(n) => crate::cuda::gpu(n)?.synchronize(),
            #[cfg(not(feature = "cuda"))]
            Self::Cuda(_) => Err(no_backend(self)),
        }
    }
    /// Bytes that could be taken beside what is held, pieces kept for reuse included; `None` where that is not known.
    pub fn free_memory(self) -> Option<usize> {
        match self {
            #[cfg(feature = "cuda")]
            Self::Cuda(n) => crate::cuda::gpu(n).ok()?.free_memory(),
            #[cfg(not(feature = "cuda"))]
            Self::Cuda(_) => None,
            Self::Cpu => {
                let all = std::fs::read_to_string("/proc/meminfo").ok()?;
                let line = all.lines().find_map(|l| l.strip_prefix("MemAvailable:"))?;
                let kib: usize = line.split_whitespace().next()?.parse().ok()?;
                Some(kib * 1024 + memory_stats().pooled)
            }
        }
    }
    /// Bytes that tensors on the device hold now, held at most so far, and bytes kept for reuse.
    pub fn memory_stats(self) -> MemoryStats {
        match self {
            #[cfg(feature = "cuda")]
            Self::Cuda(n) => crate::cuda::gpu(n).map_or(MemoryStats::default(), |gpu| {
                let s = gpu.memory_stats();
                MemoryStats { current: s.current, peak: s.peak, pooled: s.reserved.saturating_sub(s.current) }
            }),
            _ => memory_stats(),
        }
    }
    /// Begin a new count of the most bytes held, from what is held now.
    pub fn forget_peak(self) {
        match self {
            #[cfg(feature = "cuda")]
            Self::Cuda(n) => {
                if let Ok(gpu) = crate::cuda::gpu(n) {
                    gpu.forget_peak();
                }
            }
            _ => PEAK.store(CURRENT.load(Relaxed), Relaxed),
        }
    }
}

#[cfg(feature = "cuda")]
pub(super) fn elsewhere(device: Device) -> crate::Error {
    let detail = "the elements are not in main memory: call to_device(Device::Cpu) first".into();
    crate::Error::Device { device: device.to_string(), detail }
}

#[cfg(not(feature = "cuda"))]
pub(crate) fn no_backend(device: Device) -> crate::Error {
    let detail = "this build has no CUDA backend: build with the feature cuda, or use --device cpu".into();
    crate::Error::Device { device: device.to_string(), detail }
}

impl std::fmt::Display for Device {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Cpu => f.write_str("cpu"),
            Self::Cuda(n) => write!(f, "cuda:{n}"),
        }
    }
}

impl std::str::FromStr for Device {
    type Err = crate::Error;
    fn from_str(s: &str) -> crate::Result<Self> {
        match s {
            "cpu" => Ok(Self::Cpu),
            "cuda" => Ok(Self::Cuda(0)),
            _ => match s.strip_prefix("cuda:").and_then(|n| n.parse().ok()) {
                Some(n) => Ok(Self::Cuda(n)),
                None => Err(crate::Error::Usage(format!("unknown device '{s}': use cpu, cuda or cuda:N"))),
            },
        }
    }
}

/// The elements of a tensor, on one device.
#[derive(Debug)]
pub(crate) enum Storage {
    Cpu(CpuBuffer),
    #[cfg(feature = "cuda")]
    Cuda(crate::cuda::CudaBuffer),
}

impl Storage {
    pub fn device(&self) -> Device {
        match self {
            Self::Cpu(_) => Device::Cpu,
            #[cfg(feature = "cuda")]
            Self::Cuda(b) => Device::Cuda(b.gpu().ordinal),
        }
    }
}

#[derive(Clone, Copy, Zeroable, Pod)]
#[repr(C, align(64))]
struct Line([u8; 64]);

/// An aligned run of bytes, viewed as whatever `Pod` type is asked for.
pub(crate) struct CpuBuffer {
    lines: Vec<Line>,
    bytes: usize,
}

impl std::fmt::Debug for CpuBuffer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "CpuBuffer({} bytes)", self.bytes)
    }
}

/// Free buffers by their length in lines; what a step drops, the next one takes.
static FREE: Mutex<BTreeMap<usize, Vec<Vec<Line>>>> = Mutex::new(BTreeMap::new());
static FREE_BYTES: AtomicUsize = AtomicUsize::new(0);
static CURRENT: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);
/// Smaller buffers are left to the system's allocator.
const POOLED_LINES: usize = 256;

/// Bytes that tensors on the CPU hold now, held at most so far, and bytes kept for reuse.
#[derive(Clone, Copy, Debug, Default, serde::Serialize)]
pub struct MemoryStats {
    /// Bytes of all tensors now.
    pub current: usize,
    /// The most that `current` has been.
    pub peak: usize,
    /// Bytes of dropped tensors that wait for the next ones of their size.
    pub pooled: usize,
}

/// Memory of all CPU tensors of this process.
pub fn memory_stats() -> MemoryStats {
    MemoryStats { current: CURRENT.load(Relaxed), peak: PEAK.load(Relaxed), pooled: FREE_BYTES.load(Relaxed) }
}

/// Round up to one of four sizes per power of two, so that nearby sizes share buffers.
fn size_class(lines: usize) -> usize {
    if lines < POOLED_LINES {
        return lines;
    }
    let step = lines.next_power_of_two() / 8;
    lines.div_ceil(step) * step
}

/// A free buffer of this many lines, if there is one.
fn reuse(lines: usize) -> Option<Vec<Line>> {
    if lines < POOLED_LINES {
        return None;
    }
    let found = FREE.lock().ok()?.get_mut(&lines)?.pop()?;
    FREE_BYTES.fetch_sub(lines * 64, Relaxed);
    Some(found)
}

/// Errors where this process could not get so much memory at once. Asks the system, touches nothing.
pub(crate) fn check_memory(what: &str, bytes: u128) -> crate::Result<()> {
    let fits = usize::try_from(bytes).is_ok_and(|n| Vec::<u8>::new().try_reserve_exact(n).is_ok());
    if fits { Ok(()) } else { Err(no_memory(what, bytes)) }
}

pub(super) fn no_memory(what: &str, bytes: u128) -> crate::Error {
    let detail = format!("{what} needs {bytes} bytes, more memory than there is: choose smaller sizes");
    crate::Error::Device { device: "cpu".into(), detail }
}

impl CpuBuffer {
    /// A buffer whose elements are unspecified (valid, but possibly left over): for outputs that are written whole.
    pub fn unspecified(dtype: DType, n: usize) -> Self {
        let bytes = n * dtype.size();
        let class = size_class(bytes.div_ceil(64));
        Self::of(reuse(class).unwrap_or_else(|| bytemuck::allocation::zeroed_vec(class)), bytes)
    }
    /// `None` where there is not so much memory: sizes out of a file or a command line end here.
    pub fn zeroed(dtype: DType, n: usize) -> Option<Self> {
        let bytes = n * dtype.size();
        let class = size_class(bytes.div_ceil(64));
        if let Some(lines) = reuse(class) {
            let mut b = Self::of(lines, bytes);
            b.as_mut_slice::<u8>().fill(0);
            return Some(b);
        }
        bytemuck::allocation::try_zeroed_vec(class).ok().map(|lines| Self::of(lines, bytes))
    }
    fn of(lines: Vec<Line>, bytes: usize) -> Self {
        let more = lines.len() * 64;
        let held = CURRENT.fetch_add(more, Relaxed) + more;
        PEAK.fetch_max(held, Relaxed);
        Self { lines, bytes }
    }
    pub fn as_slice<T: Pod>(&self) -> &[T] {
        let bytes: &[u8] = bytemuck::cast_slice(&self.lines);
        bytemuck::cast_slice(&bytes[..self.bytes])
    }
    pub fn as_mut_slice<T: Pod>(&mut self) -> &mut [T] {
        let bytes: &mut [u8] = bytemuck::cast_slice_mut(&mut self.lines);
        bytemuck::cast_slice_mut(&mut bytes[..self.bytes])
    }
}

impl Drop for CpuBuffer {
    fn drop(&mut self) {
        let lines = std::mem::take(&mut self.lines);
        let bytes = lines.len() * 64;
        let current = CURRENT.fetch_sub(bytes, Relaxed) - bytes;
        // Keep for reuse no more than what was ever needed at once beside what is still held.
        let room = PEAK.load(Relaxed).saturating_sub(current);
        if lines.len() >= POOLED_LINES
            && FREE_BYTES.load(Relaxed) + bytes <= room
            && let Ok(mut free) = FREE.lock()
        {
            FREE_BYTES.fetch_add(bytes, Relaxed);
            free.entry(lines.len()).or_default().push(lines);
        }
    }
}
