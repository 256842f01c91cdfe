//! `felid doctor`.

use super::print;
use clap::Args;
use felid::{Error, Result};
use serde::Serialize;
use std::path::PathBuf;

/// Show what this machine offers, and what to do about what is missing.
#[derive(Args)]
pub struct Doctor {
    /// Print JSON
    #[arg(long)]
    json: bool,
    /// Compile and load every kernel for the devices that are here
    #[arg(long)]
    warm_up: bool,
    /// Compile every kernel for an architecture such as sm_80, whether or not such a device is here
    #[arg(long, value_name = "ARCH", value_delimiter = ',')]
    compile: Vec<String>,
}

#[derive(Serialize)]
struct Report {
    version: &'static str,
    target: String,
    cpu_features: Vec<&'static str>,
    threads: usize,
    cuda: Cuda,
}

/// The CUDA backend: what it found, and what is missing.
#[derive(Default, Serialize)]
struct Cuda {
    /// Whether this build has it.
    backend: bool,
    /// The driver, as the kernel names it.
    driver: Option<String>,
    libraries: Vec<Library>,
    devices: Vec<Device>,
    kernel_cache: Option<KernelCache>,
    compiled: Vec<serde_json::Value>,
    advice: Vec<String>,
}

#[derive(Serialize)]
struct Library {
    name: &'static str,
    needed_for: &'static str,
    found: Option<PathBuf>,
}

#[derive(Serialize)]
struct Device {
    name: String,
    device: String,
    compute_capability: String,
    kernels_for: String,
    memory_bytes: usize,
    multiprocessors: u32,
    driver_cuda_version: u32,
}

#[derive(Serialize)]
struct KernelCache {
    folder: PathBuf,
    files: usize,
    bytes: u64,
}

impl Doctor {
    pub fn run(self) -> Result<()> {
        let report = Report {
            version: env!("CARGO_PKG_VERSION"),
            target: format!("{}-{}", std::env::consts::ARCH, std::env::consts::OS),
            cpu_features: cpu_features(),
            threads: std::thread::available_parallelism().map_or(1, usize::from),
            cuda: self.cuda()?,
        };
        if self.json {
            return print::json(&report);
        }
        let none = |s: String| if s.is_empty() { "none".into() } else { s };
        print::line(&format!("felid        {} ({})", report.version, report.target))?;
        print::line(&format!("cpu          {}", none(report.cpu_features.join(" "))))?;
        print::line(&format!("threads      {}", report.threads))?;
        report.cuda.print()
    }

    fn cuda(&self) -> Result<Cuda> {
        let driver = std::fs::read_to_string("/proc/driver/nvidia/version").ok();
        let driver = driver.and_then(|t| t.lines().next().map(|l| l.trim().to_string()));
        #[cfg(feature = "cuda")]
        return self.backend(driver);
        #[cfg(not(feature = "cuda"))]
        match self.warm_up || !self.compile.is_empty() {
            true => Err(Error::Usage("this build has no CUDA backend: build with the feature cuda".into())),
            false => Ok(Cuda { driver, ..Cuda::default() }),
        }
    }

    #[cfg(feature = "cuda")]
    fn backend(&self, driver: Option<String>) -> Result<Cuda> {
        use felid::cuda::{cache_folder, compile_for, device_count, gpu, libraries};
        let mut advice = Vec::new();
        let mut compiled = Vec::new();
        for arch in &self.compile {
            compiled.push(serde_json::to_value(compile_for(arch)?).map_err(|e| Error::Config(e.to_string()))?);
        }
        let mut devices = Vec::new();
        match device_count() {
            Ok(0) if self.warm_up => {
                let detail = "no CUDA device is visible: there is nothing to warm up".into();
                return Err(Error::Device { device: "cuda".into(), detail });
            }
            Ok(0) => advice.push("no CUDA device is visible: look at CUDA_VISIBLE_DEVICES and nvidia-smi".into()),
            Ok(n) => {
                for i in 0..n {
                    let gpu = match gpu(i) {
                        Ok(gpu) => gpu,
                        Err(e) => {
                            advice.push(e.to_string());
                            continue;
                        }
                    };
                    if self.warm_up {
                        let (modules, symbols) = gpu.warm_up()?;
                        compiled.push(serde_json::json!({
                            "arch": gpu.arch(), "device": format!("cuda:{i}"), "modules": modules, "symbols": symbols,
                        }));
                    }
                    let (major, minor) = gpu.capability;
                    devices.push(Device {
                        name: gpu.name.clone(),
                        device: format!("cuda:{i}"),
                        compute_capability: format!("{major}.{minor}"),
                        kernels_for: gpu.arch(),
                        memory_bytes: gpu.total_memory,
                        multiprocessors: gpu.multiprocessors,
                        driver_cuda_version: gpu.driver_version()?,
                    });
                }
            }
            Err(e) if self.warm_up => return Err(e),
            Err(e) if driver.is_some() => advice.push(e.to_string()),
            Err(_) => advice.push("no NVIDIA driver is loaded: on a machine with such a GPU, install its driver".into()),
        }
        let found = |l: libraries::Library| l.search().found.clone();
        let libraries: Vec<Library> = libraries::Library::ALL
            .iter()
            .map(|&l| Library { name: l.name(), needed_for: l.purpose(), found: found(l) })
            .collect();
        if driver.is_some() || !devices.is_empty() {
            let missing = libraries::Library::ALL.iter().filter(|l| found(**l).is_none());
            advice.extend(missing.map(|l| format!("{} is missing: {}", l.name(), l.fix())));
        }
        let kernel_cache = cache_folder().map(|folder| {
            let sizes: Vec<u64> = std::fs::read_dir(&folder)
                .into_iter()
                .flatten()
                .filter_map(|e| Some(e.ok()?.metadata().ok()?.len()))
                .collect();
            KernelCache { folder, files: sizes.len(), bytes: sizes.iter().sum() }
        });
        Ok(Cuda { backend: true, driver, libraries, devices, kernel_cache, compiled, advice })
    }
}

impl Cuda {
    fn print(&self) -> Result<()> {
        match (self.backend, self.devices.len()) {
            (false, _) => print::line("cuda         not in this build: everything runs on the CPU")?,
            (true, 0) => print::line("cuda         no device: everything runs on the CPU")?,
            (true, n) => print::line(&format!("cuda         {n} device{}", if n == 1 { "" } else { "s" }))?,
        }
        print::line(&format!("  driver     {}", self.driver.as_deref().unwrap_or("none found")))?;
        for l in &self.libraries {
            let found = l.found.as_ref().map_or("not found".into(), |p| p.display().to_string());
            print::line(&format!("  {:<10} {found} ({})", l.name, l.needed_for))?;
        }
        for d in &self.devices {
            print::line(&format!(
                "  {:<10} {}, compute capability {}, {}, {} multiprocessors, driver for CUDA {}.{}",
                d.device,
                d.name,
                d.compute_capability,
                print::bytes(d.memory_bytes),
                d.multiprocessors,
                d.driver_cuda_version / 1000,
                d.driver_cuda_version % 1000 / 10,
            ))?;
        }
        if let Some(c) = &self.kernel_cache {
            let (folder, size) = (c.folder.display(), print::bytes(c.bytes as usize));
            print::line(&format!("  kernels    {folder}: {} files, {size}", c.files))?;
        }
        for c in &self.compiled {
            print::line(&format!("  compiled   {c}"))?;
        }
        self.advice.iter().try_for_each(|a| print::line(&format!("  -> {a}")))
    }
}

fn cpu_features() -> Vec<&'static str> {
    #[cfg(target_arch = "x86_64")]
    let known = [
        ("sse4.2", std::arch::is_x86_feature_detected!("sse4.2")),
        ("avx", std::arch::is_x86_feature_detected!("avx")),
        ("avx2", std::arch::is_x86_feature_detected!("avx2")),
        ("fma", std::arch::is_x86_feature_detected!("fma")),
        ("f16c", std::arch::is_x86_feature_detected!("f16c")),
        ("avx512f", std::arch::is_x86_feature_detected!("avx512f")),
    ];
    #[cfg(target_arch = "aarch64")]
    let known = [("neon", std::arch::is_aarch64_feature_detected!("neon"))];
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    let known: [(&str, bool); 0] = [];
    known.iter().filter(|(_, there)| *there).map(|(name, _)| *name).collect()
}
