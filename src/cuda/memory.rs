//! Device memory: the driver's stream-ordered pool, which keeps what is freed for the next request, with counts of who
//! holds what.

use super::gpu::{Gpu, check};
use super::replay::Home;
use super::spans::Work;
use crate::memory::{Category, category};
use crate::{Error, Result};
use cudarc::driver::{CudaContext, result, sys};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed};

/// Device memory of this process, in bytes.
#[derive(Clone, Debug, Default, serde::Serialize)]
pub struct CudaMemory {
    /// Held by tensors now.
    pub current: usize,
    /// The most that `current` has been.
    pub peak: usize,
    /// What the pool has taken from the device, free pieces included.
    pub reserved: usize,
    /// `current` by what it is for.
    pub by_category: Vec<(&'static str, usize)>,
    /// What each category held when `current` was at its peak.
    pub at_peak: Vec<(&'static str, usize)>,
}

const CATEGORIES: usize = Category::ALL.len();

pub(super) struct Memory {
    ordinal: usize,
    pool: sys::CUmemoryPool,
    current: AtomicUsize,
    peak: AtomicUsize,
    by_category: [AtomicUsize; CATEGORIES],
    at_peak: [AtomicUsize; CATEGORIES],
}

// SAFETY: the pool is a handle that the driver lets any thread use.
unsafe impl Send for Memory {}
// SAFETY: as above; the counts are atomic.
unsafe impl Sync for Memory {}

impl Memory {
    pub fn new(ordinal: usize, context: &Arc<CudaContext>) -> Result<Self> {
        check(ordinal, "use the device on this thread", context.bind_to_thread())?;
        // SAFETY: the device is open; the threshold is the 64-bit integer that this attribute takes.
        let pool = unsafe {
            let pool = check(ordinal, "find the memory pool", result::device::get_default_mem_pool(context.cu_device()))?;
            // keep what is freed: giving it back to the system at every synchronisation costs milliseconds
            let mut threshold = u64::MAX;
            let attribute = sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
            let value = (&raw mut threshold).cast();
            check(ordinal, "set up the memory pool", result::mem_pool::set_attribute(pool, attribute, value))?;
            pool
        };
        Ok(Self {
            ordinal,
            pool,
            current: AtomicUsize::new(0),
            peak: AtomicUsize::new(0),
            by_category: Default::default(),
            at_peak: Default::default(),
        })
    }

    fn take(&self, bytes: usize, category: Category) {
        let now = self.current.fetch_add(bytes, Relaxed) + bytes;
        self.by_category[category as usize].fetch_add(bytes, Relaxed);
        if self.peak.fetch_max(now, Relaxed) < now {
            for (at, held) in self.at_peak.iter().zip(&self.by_category) {
                at.store(held.load(Relaxed), Relaxed);
            }
        }
    }
    fn give(&self, bytes: usize, category: Category) {
        self.current.fetch_sub(bytes, Relaxed);
        self.by_category[category as usize].fetch_sub(bytes, Relaxed);
    }

    /// Begin a new count of the peak.
    pub fn forget_peak(&self) {
        self.peak.store(0, Relaxed);
        self.take(0, Category::Other);
    }

    pub fn stats(&self) -> CudaMemory {
        let reserved = AtomicU64::new(0);
        let attribute = sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_RESERVED_MEM_CURRENT;
        // SAFETY: the pool lives as long as the process, and this attribute is a 64-bit integer.
        let _ = unsafe { result::mem_pool::get_attribute(self.pool, attribute, reserved.as_ptr().cast()) };
        let named = |counts: &[AtomicUsize; CATEGORIES]| {
            let pairs = Category::ALL.iter().zip(counts).map(|(c, n)| (c.name(), n.load(Relaxed)));
            pairs.filter(|(_, n)| *n > 0).collect()
        };
        CudaMemory {
            current: self.current.load(Relaxed),
            peak: self.peak.load(Relaxed),
            reserved: reserved.into_inner() as usize,
            by_category: named(&self.by_category),
            at_peak: named(&self.at_peak),
        }
    }

    /// Give the pool's free pieces back to the device.
    fn trim(&self) {
        // SAFETY: the pool lives as long as the process.
        let _ = unsafe { result::mem_pool::trim_to(self.pool, 0) };
    }

    fn exhausted(&self, bytes: usize, free: Option<usize>) -> Error {
        let stats = self.stats();
        let held: Vec<String> = stats.by_category.iter().map(|(name, n)| format!("{name} {}", gib(*n))).collect();
        let free = free.map_or(String::new(), |n| format!(", {} free on the device", gib(n)));
        let held = if held.is_empty() { "nothing".into() } else { held.join(", ") };
        Error::OutOfMemory {
            device: format!("cuda:{}", self.ordinal),
            detail: format!("a request of {} does not fit: this process holds {held}{free}", gib(bytes)),
        }
    }
}

/// Bytes in words.
pub(super) fn gib(bytes: usize) -> String {
    match bytes {
        n if n >= 1 << 30 => format!("{:.2} GiB", n as f64 / (1u64 << 30) as f64),
        n if n >= 1 << 20 => format!("{:.1} MiB", n as f64 / (1u64 << 20) as f64),
        n => format!("{n} bytes"),
    }
}

/// A run of device memory. Freed on the stream, after the work that was submitted before.
pub(crate) struct CudaBuffer {
    gpu: &'static Gpu,
    pointer: u64,
    bytes: usize,
    /// As counted: what was asked for, rounded up to the pool's granularity.
    counted: usize,
    category: Category,
    home: Home,
}

impl CudaBuffer {
    /// Memory whose contents are unspecified. Counts as the thread's current category.
    pub fn new(gpu: &'static Gpu, bytes: usize) -> Result<Self> {
        let counted = bytes.max(1).next_multiple_of(512);
        let category = category();
        let (home, lent) = super::replay::request(counted)?;
        if let Some(pointer) = lent {
            return Ok(Self { gpu, pointer, bytes, counted, category, home });
        }
        gpu.bind()?;
        let stream = gpu.stream.cu_stream();
        // SAFETY: the stream is alive, and all use of the memory is on it.
        let ask = || unsafe { result::malloc_async(stream, counted) };
        let out_of_memory = sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY;
        let pointer = match ask() {
            Err(e) if e.0 == out_of_memory => {
                // pieces that are free but too small, or freed by work still under way
                gpu.synchronize()?;
                gpu.memory.trim();
                match ask() {
                    Err(e) if e.0 == out_of_memory => {
                        let free = gpu.context.mem_get_info().ok().map(|(free, _)| free);
                        return Err(gpu.memory.exhausted(bytes, free));
                    }
                    other => check(gpu.ordinal, "take device memory", other)?,
                }
            }
            other => check(gpu.ordinal, "take device memory", other)?,
        };
        gpu.memory.take(counted, category);
        Ok(Self { gpu, pointer, bytes, counted, category, home })
    }
    pub fn zeroed(gpu: &'static Gpu, bytes: usize) -> Result<Self> {
        let buffer = Self::new(gpu, bytes)?;
        if bytes > 0 {
            let clear = || {
                // SAFETY: the buffer holds that many bytes and is used on this stream only.
                let answer = unsafe { result::memset_d8_async(buffer.pointer, 0, bytes, gpu.queue()) };
                check(gpu.ordinal, "clear device memory", answer)
            };
            gpu.timed(|| Work::moving("memset", bytes), clear)?;
        }
        Ok(buffer)
    }
    /// A copy of bytes in main memory.
    pub fn from_host(gpu: &'static Gpu, bytes: &[u8]) -> Result<Self> {
        let buffer = Self::new(gpu, bytes.len())?;
        if !bytes.is_empty() {
            gpu.upload(bytes, buffer.pointer)?;
        }
        Ok(buffer)
    }
    pub fn gpu(&self) -> &'static Gpu {
        self.gpu
    }
    pub fn pointer(&self) -> u64 {
        self.pointer
    }
    pub fn bytes(&self) -> usize {
        self.bytes
    }
    /// Overwrite bytes from the first on with some of main memory.
    pub fn upload(&self, from: &[u8]) -> Result<()> {
        if from.len() > self.bytes {
            let detail = format!("{} bytes into a buffer of {}", from.len(), self.bytes);
            return Err(Error::Device { device: format!("cuda:{}", self.gpu.ordinal), detail });
        }
        if from.is_empty() { Ok(()) } else { self.gpu.upload(from, self.pointer) }
    }
    /// Copy `to.len()` bytes, from byte `at` on, to main memory; waits for the device.
    pub fn download(&self, at: usize, to: &mut [u8]) -> Result<()> {
        if at.checked_add(to.len()).is_none_or(|end| end > self.bytes) {
            let detail = format!("bytes {at}..+{} of a buffer of {}", to.len(), self.bytes);
            return Err(Error::Device { device: format!("cuda:{}", self.gpu.ordinal), detail });
        }
        if to.is_empty() { Ok(()) } else { self.gpu.download(self.pointer + at as u64, to) }
    }
}

impl std::fmt::Debug for CudaBuffer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "CudaBuffer({} bytes on cuda:{})", self.bytes, self.gpu.ordinal)
    }
}

impl Drop for CudaBuffer {
    fn drop(&mut self) {
        match &self.home {
            Home::Pool => {}
            Home::Noted(notes, number) => notes.give(*number),
            Home::Lent(lender, number) => return lender.give(*number),
        }
        self.gpu.memory.give(self.counted, self.category);
        if self.gpu.bind().is_ok() {
            // SAFETY: this pointer came from malloc_async and is freed once, on the stream of all its uses. An error here
            // belongs to earlier work and is reported where that is waited for.
            let _ = unsafe { result::free_async(self.pointer, self.gpu.stream.cu_stream()) };
        }
    }
}
