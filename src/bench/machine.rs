//! Where a measurement ran, what that machine reaches at most, and how things are timed on it.

use super::Spread;
use crate::autograd::{Var, no_grad};
use crate::ops;
use crate::random;
use crate::tensor::{DType, Device, Tensor};
use crate::{Error, Result};
use serde::Serialize;
use std::time::Instant;

/// What a number was measured on.
#[derive(Clone, Debug, Serialize)]
pub struct Machine {
    /// Felid's version.
    pub felid: &'static str,
    /// The device asked for.
    pub device: String,
    /// The GPU as its maker calls it; `None` for the CPU.
    pub gpu: Option<String>,
    /// The CUDA version that the driver supports, such as 13000.
    pub driver_cuda_version: Option<u32>,
    /// The processor, as the system names it.
    pub cpu: String,
    /// CPU threads.
    pub threads: usize,
    /// Who computes matrix products on CUDA.
    pub gemm: Option<String>,
    /// Bytes a second, read and written, of a large copy on the device, measured in this call.
    pub copy_bytes_per_s: f64,
    /// Operations a second of a large matrix product in the dtype measured, in this call.
    pub matmul_flops_per_s: f64,
    /// The dtype of that product.
    pub matmul_dtype: DType,
}

impl Machine {
    /// Measure the ceilings of a device.
    pub fn measure(device: Device, dtype: DType) -> Result<Self> {
        let (gpu, driver_cuda_version, gemm) = about(device)?;
        Ok(Self {
            felid: env!("CARGO_PKG_VERSION"),
            device: device.to_string(),
            gpu,
            driver_cuda_version,
            cpu: cpu_name(),
            threads: rayon::current_num_threads(),
            gemm,
            copy_bytes_per_s: copy_ceiling(device)?,
            matmul_flops_per_s: matmul_ceiling(device, dtype)?,
            matmul_dtype: dtype,
        })
    }
    /// As tables head it.
    pub fn name(&self) -> &str {
        self.gpu.as_deref().unwrap_or(&self.cpu)
    }
}

fn about(device: Device) -> Result<(Option<String>, Option<u32>, Option<String>)> {
    match device {
        #[cfg(feature = "cuda")]
        Device::Cuda(n) => {
            let gpu = crate::cuda::gpu(n)?;
            let gemm = format!("{:?}", crate::cuda::gemm()).to_lowercase();
            Ok((Some(gpu.name.clone()), Some(gpu.driver_version()?), Some(gemm)))
        }
        _ => Ok((None, None, None)),
    }
}

/// What device memory was for at its peak, in bytes; empty on the CPU, which does not count that.
pub(super) fn held_at_peak(device: Device) -> Vec<(&'static str, usize)> {
    match device {
        #[cfg(feature = "cuda")]
        Device::Cuda(n) => crate::cuda::gpu(n).map_or(vec![], |gpu| gpu.memory_stats().at_peak),
        _ => vec![],
    }
}

fn cpu_name() -> String {
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let name = info.lines().find_map(|l| l.strip_prefix("model name")?.split_once(':'));
    name.map_or_else(|| std::env::consts::ARCH.to_string(), |(_, n)| n.trim().to_string())
}

/// Random values in [-1, 1): never time zeros, they draw less power.
pub(super) fn random_tensor(shape: &[usize], dtype: DType, device: Device, key: u64) -> Result<Tensor> {
    let n: usize = shape.iter().product();
    // a period prime to every size in use; drawing billions of numbers would take longer than measuring
    let few: Vec<f32> = (0..65_521).map(|i| (random::uniform_at(key, i) * 2.0 - 1.0) as f32).collect();
    let values: Vec<f32> = few.iter().copied().cycle().take(n).collect();
    ops::cast_tensor(&Tensor::from_vec(values, shape)?.to_device(device)?, dtype)
}

/// Time `runs` runs of `f` (told the number of the run, to take its inputs in turn), after `warmup` others. On a GPU the
/// device's own clock counts, and runs are submitted ahead, so that the host is not measured.
pub fn time(device: Device, warmup: usize, runs: usize, mut f: impl FnMut(usize) -> Result<()>) -> Result<Spread> {
    for i in 0..warmup {
        f(i)?;
    }
    device.synchronize()?;
    let seconds = match device {
        #[cfg(feature = "cuda")]
        Device::Cuda(n) => {
            let gpu = crate::cuda::gpu(n)?;
            let mut laps = gpu.stopwatch()?;
            for i in 0..runs {
                f(warmup + i)?;
                laps.lap()?;
            }
            laps.seconds()?
        }
        _ => {
            let mut seconds = Vec::with_capacity(runs);
            for i in 0..runs {
                let start = Instant::now();
                f(warmup + i)?;
                seconds.push(start.elapsed().as_secs_f64());
            }
            seconds
        }
    };
    if seconds.is_empty() {
        return Err(Error::Usage("runs must be at least 1".into()));
    }
    Ok(Spread::of(&seconds))
}

/// Bytes a second, read and written, of the best of several copies: 512 MiB on a GPU, 64 MiB on a CPU.
fn copy_ceiling(device: Device) -> Result<f64> {
    let n = if device == Device::Cpu { 16 << 20 } else { 128 << 20 };
    let x = random_tensor(&[n], DType::F32, device, 1)?;
    let spread = time(device, 3, 12, |_| x.copy().map(drop))?;
    Ok(2.0 * 4.0 * n as f64 / (spread.best_ms / 1e3))
}

/// Operations a second of a large matrix product on this device, the best of several.
pub fn matmul_ceiling(device: Device, dtype: DType) -> Result<f64> {
    let n = if device == Device::Cpu { 1024 } else { 8192 };
    let make = |key| random_tensor(&[n, n], dtype, device, key).map(Var::constant);
    let (a, b) = (make(1)?, make(2)?);
    let spread = no_grad(|| time(device, 2, 12, |_| ops::matmul(&a, &b).map(drop)))?;
    Ok(2.0 * (n as f64).powi(3) / (spread.best_ms / 1e3))
}

/// Run a peer's command in a shell, and return what it printed.
pub fn peer_output(command: &str) -> Result<String> {
    let failed = |why: String| Error::Usage(format!("peer '{command}': {why}"));
    let out = std::process::Command::new("sh").arg("-c").arg(command).output().map_err(|e| failed(e.to_string()))?;
    if !out.status.success() {
        let last = String::from_utf8_lossy(&out.stderr).lines().last().unwrap_or("").to_string();
        return Err(failed(format!("{}; {last}", out.status)));
    }
    Ok(String::from_utf8_lossy(&out.stdout).into_owned())
}
