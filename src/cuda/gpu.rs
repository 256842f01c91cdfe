//! Devices: a context and one stream each, made when first asked for and kept for the life of the process.

use super::libraries::Library;
use super::memory::Memory;
use super::module::Modules;
use super::spans::Work;
use crate::{Error, Result};
use cudarc::driver::{CudaContext, CudaStream, DriverError, result, sys};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use sys::CUdevice_attribute as Attribute;

/// A CUDA device. All work on it goes through one stream, in order.
pub struct Gpu {
    /// Its number among the devices that CUDA_VISIBLE_DEVICES leaves visible.
    pub ordinal: usize,
    /// As its maker calls it.
    pub name: String,
    /// Compute capability, such as (9, 0).
    pub capability: (u32, u32),
    /// Bytes of device memory.
    pub total_memory: usize,
    /// Streaming multiprocessors.
    pub multiprocessors: u32,
    /// Shared memory that a block may ask for, in bytes.
    pub shared_per_block: u32,
    /// Bytes of the second-level cache.
    pub l2_bytes: usize,
    pub(super) context: Arc<CudaContext>,
    pub(super) stream: Arc<CudaStream>,
    pub(super) memory: Memory,
    pub(super) modules: Modules,
}

impl std::fmt::Debug for Gpu {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Gpu(cuda:{}, {})", self.ordinal, self.name)
    }
}

/// The functions of the driver that are called here are all there since CUDA 12.8; `cudarc` panics where one is missing.
const OLDEST_DRIVER: u32 = 12_080;

/// The driver's answer, as an error that names the device and what was attempted.
pub(super) fn check<T>(ordinal: usize, what: &str, answer: std::result::Result<T, DriverError>) -> Result<T> {
    answer.map_err(|e| Error::Device { device: format!("cuda:{ordinal}"), detail: format!("cannot {what}: {e}") })
}

/// The number of visible devices. Errors where there is no driver.
pub fn device_count() -> Result<usize> {
    Library::Driver.load()?;
    match CudaContext::device_count() {
        Ok(n) => Ok(n as usize),
        Err(e) if e.0 == sys::CUresult::CUDA_ERROR_NO_DEVICE => Ok(0),
        Err(e) => check(0, "start the driver", Err(e)),
    }
}

/// Device number `ordinal`. Errors where the driver or the device is missing.
pub fn gpu(ordinal: usize) -> Result<&'static Gpu> {
    static GPUS: Mutex<BTreeMap<usize, &'static Gpu>> = Mutex::new(BTreeMap::new());
    let mut gpus = GPUS.lock().unwrap_or_else(|e| e.into_inner());
    if let Some(gpu) = gpus.get(&ordinal) {
        return Ok(gpu);
    }
    let gpu: &'static Gpu = Box::leak(Box::new(Gpu::open(ordinal)?));
    gpus.insert(ordinal, gpu);
    Ok(gpu)
}

impl Gpu {
    fn open(ordinal: usize) -> Result<Self> {
        let count = device_count()?;
        if ordinal >= count {
            let detail = match count {
                0 => "no CUDA device is visible: look at CUDA_VISIBLE_DEVICES and nvidia-smi, or use --device cpu".into(),
                n => format!("there are {n} devices, numbered from 0"),
            };
            return Err(Error::Device { device: format!("cuda:{ordinal}"), detail });
        }
        let context = check(ordinal, "open the device", CudaContext::new(ordinal))?;
        // SAFETY: events would guard buffers shared between streams; here one stream carries all work, and buffers are
        // freed on it.
        unsafe { context.disable_event_tracking() };
        let attribute = |a| check(ordinal, "ask the device", context.attribute(a)).map(|n| n.max(0) as usize);
        let capability = (
            attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)? as u32,
            attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)? as u32,
        );
        if capability.0 < 8 {
            let (major, minor) = capability;
            let detail = format!("compute capability {major}.{minor} is too old: the kernels need 8.0 (Ampere) or later");
            return Err(Error::Device { device: format!("cuda:{ordinal}"), detail });
        }
        let stream = check(ordinal, "make a stream", context.new_stream())?;
        let gpu = Self {
            ordinal,
            name: check(ordinal, "ask the device", context.name())?,
            capability,
            total_memory: check(ordinal, "ask the device", context.total_mem())?,
            multiprocessors: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)? as u32,
            shared_per_block: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)? as u32,
            l2_bytes: attribute(Attribute::CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE)?,
            memory: Memory::new(ordinal, &context)?,
            modules: Modules::default(),
            context,
            stream,
        };
        match gpu.driver_version()? {
            v if v < OLDEST_DRIVER => {
                let detail = format!("the driver is of CUDA {}.{}: Felid needs 12.8 or later", v / 1000, v % 1000 / 10);
                Err(Error::Device { device: format!("cuda:{ordinal}"), detail })
            }
            _ => Ok(gpu),
        }
    }

    /// What kernels are compiled for: `sm_90a` on Hopper, whose own instructions need the `a`, else `sm_XY`.
    pub fn arch(&self) -> String {
        match self.capability {
            (9, 0) => "sm_90a".into(),
            (major, minor) => format!("sm_{major}{minor}"),
        }
    }
    /// The driver's version, such as 13000 for CUDA 13.0.
    pub fn driver_version(&self) -> Result<u32> {
        let mut version = 0;
        // SAFETY: the driver is loaded, and writes one integer to where it is told.
        let answer = unsafe { sys::cuDriverGetVersion(&mut version) }.result();
        check(self.ordinal, "ask the driver", answer)?;
        Ok(version.max(0) as u32)
    }
    /// Wait until everything submitted so far is done. Errors of earlier kernels appear here.
    pub fn synchronize(&self) -> Result<()> {
        check(self.ordinal, "finish the work submitted before", self.stream.synchronize())
    }
    /// Make the context current on this thread, as raw driver calls need it.
    pub(super) fn bind(&self) -> Result<()> {
        check(self.ordinal, "use the device on this thread", self.context.bind_to_thread())
    }
    /// Bytes that could be taken: free on the device, or in pieces that the pool keeps.
    pub fn free_memory(&self) -> Option<usize> {
        let (free, _) = self.context.mem_get_info().ok()?;
        let held = self.memory_stats();
        Some(free + held.reserved.saturating_sub(held.current))
    }
    /// Device memory held by tensors, and what the pool keeps.
    pub fn memory_stats(&self) -> super::CudaMemory {
        self.memory.stats()
    }

    pub(crate) fn forget_peak(&self) {
        self.memory.forget_peak();
    }
    /// Where work is submitted: to the device's stream, or into what this thread captures.
    pub(super) fn queue(&self) -> sys::CUstream {
        super::replay::queue().unwrap_or(self.stream.cu_stream())
    }
    pub(super) fn upload(&self, from: &[u8], to: u64) -> Result<()> {
        super::replay::refuse_here(self.ordinal, "copy from main memory")?;
        self.bind()?;
        let copy = || {
            // SAFETY: `to` is a buffer of at least from.len() bytes of this device (callers' buffers know their size). The
            // driver stages pageable memory: it has read `from` before this returns.
            let answer = unsafe { result::memcpy_htod_async(to, from, self.stream.cu_stream()) };
            check(self.ordinal, "copy to the device", answer)
        };
        self.timed(|| Work::moving("copy from main memory", from.len()), copy)
    }
    /// Copy on the device, by the driver.
    ///
    /// # Safety
    ///
    /// Both are of buffers of this device that hold so many bytes from there on, apart from each other; what is written is
    /// nobody else's.
    pub(super) unsafe fn copy_bytes(&self, from: u64, to: u64, bytes: usize) -> Result<()> {
        self.bind()?;
        let copy = || {
            // SAFETY: the caller's, as above.
            let answer = unsafe { result::memcpy_dtod_async(to, from, bytes, self.queue()) };
            check(self.ordinal, "copy on the device", answer)
        };
        self.timed(|| Work::moving("copy on the device", 2 * bytes), copy)
    }
    pub(super) fn download(&self, from: u64, to: &mut [u8]) -> Result<()> {
        super::replay::refuse_here(self.ordinal, "copy to main memory")?;
        self.bind()?;
        let bytes = to.len();
        let copy = || {
            // SAFETY: `from` is a buffer of at least to.len() bytes, and `to` outlives the wait below.
            let answer = unsafe { result::memcpy_dtoh_async(to, from, self.stream.cu_stream()) };
            check(self.ordinal, "copy from the device", answer)
        };
        self.timed(|| Work::moving("copy to main memory", bytes), copy)?;
        self.synchronize()
    }
}

/// Times work on a device by its own clock, without waiting in between.
pub struct Stopwatch {
    gpu: &'static Gpu,
    marks: Vec<cudarc::driver::CudaEvent>,
}

impl Gpu {
    /// Start timing.
    pub fn stopwatch(&'static self) -> Result<Stopwatch> {
        let mut watch = Stopwatch { gpu: self, marks: Vec::new() };
        watch.lap()?;
        Ok(watch)
    }
}

impl Stopwatch {
    /// What was submitted since the last call is one lap.
    pub fn lap(&mut self) -> Result<()> {
        let flags = Some(sys::CUevent_flags::CU_EVENT_DEFAULT);
        self.marks.push(check(self.gpu.ordinal, "record an event", self.gpu.stream.record_event(flags))?);
        Ok(())
    }
    /// Wait for the device, and return the time of each lap in seconds.
    pub fn seconds(self) -> Result<Vec<f64>> {
        self.gpu.synchronize()?;
        let lap = |w: &[cudarc::driver::CudaEvent]| {
            let ms = check(self.gpu.ordinal, "time the work submitted before", w[0].elapsed_ms(&w[1]))?;
            Ok(f64::from(ms) / 1e3)
        };
        self.marks.windows(2).map(lap).collect()
    }
}
