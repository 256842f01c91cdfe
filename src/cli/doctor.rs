//! `felid doctor`.

use super::print;
use clap::Args;
use felid::Result;
use serde::Serialize;
use std::path::PathBuf;

/// Show what this machine offers, what CUDA would need, and what to do about what is missing.
#[derive(Args)]
pub struct Doctor {
    /// Print JSON
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Report {
    version: &'static str,
    target: String,
    cpu_features: Vec<&'static str>,
    threads: usize,
    cuda: Cuda,
}

/// What a CUDA backend would need. Libraries are looked for by name in the usual folders; nothing is loaded.
#[derive(Serialize)]
struct Cuda {
    /// This build computes on the CPU only.
    backend: bool,
    driver: Option<String>,
    libraries: Vec<Library>,
    advice: Vec<String>,
}

#[derive(Serialize)]
struct Library {
    name: &'static str,
    needed_for: &'static str,
    found: Option<PathBuf>,
}

impl Doctor {
    pub fn run(self) -> Result<()> {
        let report = Report {
            version: env!("CARGO_PKG_VERSION"),
            target: format!("{}-{}", std::env::consts::ARCH, std::env::consts::OS),
            cpu_features: cpu_features(),
            threads: std::thread::available_parallelism().map_or(1, usize::from),
            cuda: cuda(),
        };
        if self.json {
            return print::json(&report);
        }
        let none = |s: String| if s.is_empty() { "none".into() } else { s };
        print::line(&format!("felid        {} ({})", report.version, report.target))?;
        print::line(&format!("cpu          {}", none(report.cpu_features.join(" "))))?;
        print::line(&format!("threads      {}", report.threads))?;
        print::line("cuda         not in this build: everything runs on the CPU")?;
        print::line(&format!("  driver     {}", report.cuda.driver.as_deref().unwrap_or("none found")))?;
        for l in &report.cuda.libraries {
            let found = l.found.as_ref().map_or("not found".into(), |p| p.display().to_string());
            print::line(&format!("  {:<10} {found} ({})", l.name, l.needed_for))?;
        }
        report.cuda.advice.iter().try_for_each(|a| print::line(&format!("  -> {a}")))
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

fn cuda() -> Cuda {
    let driver = std::fs::read_to_string("/proc/driver/nvidia/version").ok();
    let driver = driver.and_then(|t| t.lines().next().map(|l| l.trim().to_string()));
    let libraries = [
        ("libcuda", "the driver's interface"),
        ("libnvrtc", "compiling kernels"),
        ("libcublasLt", "matrix products, optional"),
    ]
    .map(|(name, needed_for)| Library { name, needed_for, found: find(name) });
    let mut advice = Vec::new();
    if driver.is_none() {
        advice.push("no NVIDIA driver is loaded: on a machine with such a GPU, install its driver".into());
    }
    let missing = |name: &str| libraries.iter().any(|l| l.name == name && l.found.is_none());
    if driver.is_some() && missing("libnvrtc") {
        advice.push("install NVRTC (pip install nvidia-cuda-nvrtc, or the CUDA toolkit), or set CUDA_HOME".into());
    }
    Cuda { backend: false, driver, libraries: libraries.into(), advice }
}

/// The first file called `name.so*` in the folders where loaders look.
fn find(name: &str) -> Option<PathBuf> {
    let paths = std::env::var_os("LD_LIBRARY_PATH").unwrap_or_default();
    let mut folders: Vec<PathBuf> = std::env::split_paths(&paths).filter(|p| !p.as_os_str().is_empty()).collect();
    for home in ["CUDA_HOME", "CUDA_PATH"].iter().filter_map(std::env::var_os) {
        folders.push(PathBuf::from(home).join("lib64"));
    }
    let usual = [
        "/usr/local/cuda/lib64",
        "/usr/lib/x86_64-linux-gnu",
        "/usr/lib/aarch64-linux-gnu",
        "/usr/lib64",
        "/usr/lib/wsl/lib",
    ];
    folders.extend(usual.map(PathBuf::from));
    let prefix = format!("{name}.so");
    folders.iter().find_map(|dir| {
        let mut hits: Vec<PathBuf> = std::fs::read_dir(dir)
            .ok()?
            .filter_map(|e| Some(e.ok()?.path()))
            .filter(|p| p.file_name().is_some_and(|n| n.to_string_lossy().starts_with(&prefix)))
            .collect();
        hits.sort();
        hits.into_iter().next()
    })
}
