//! Finding the driver, NVRTC and cuBLASLt at run time. They are asked for before they are used: `cudarc` panics where a
//! library is missing, so nothing of it may be called before [`Library::load`] has succeeded.

use crate::{Error, Result};
use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

/// A shared library that CUDA work needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Library {
    /// `libcuda`: the driver's interface, installed with the driver.
    Driver,
    /// `libnvrtc`: compiles kernels for the device at hand.
    Nvrtc,
    /// `libcublasLt`: matrix products. Without it Felid's own kernel computes them.
    CublasLt,
}

/// Where a library was found, or where it was looked for.
#[derive(Clone, Debug)]
pub struct Search {
    /// The file, where it loaded.
    pub found: Option<PathBuf>,
    /// Everything that was tried, in order.
    pub tried: Vec<PathBuf>,
}

impl Library {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Driver, Self::Nvrtc, Self::CublasLt];

    /// The name that its files begin with.
    pub fn name(self) -> &'static str {
        match self {
            Self::Driver => "libcuda",
            Self::Nvrtc => "libnvrtc",
            Self::CublasLt => "libcublasLt",
        }
    }
    /// What Felid needs it for.
    pub fn purpose(self) -> &'static str {
        match self {
            Self::Driver => "the driver's interface",
            Self::Nvrtc => "compiling kernels",
            Self::CublasLt => "matrix products, optional",
        }
    }
    /// What to do where it is missing.
    pub fn fix(self) -> &'static str {
        match self {
            Self::Driver => "install the NVIDIA driver, or use --device cpu",
            Self::Nvrtc => "install NVRTC (pip install nvidia-cuda-nvrtc, or the CUDA toolkit), or set CUDA_HOME",
            Self::CublasLt => "install cuBLAS (pip install nvidia-cublas, or the CUDA toolkit), or use --gemm native",
        }
    }
    /// File names that the loader may know, those whose interface is used here first.
    fn files(self) -> Vec<String> {
        let name = self.name();
        match self {
            Self::Driver => vec![format!("{name}.so.1"), format!("{name}.so")],
            _ => ["13", "12"].iter().map(|v| format!("{name}.so.{v}")).chain([format!("{name}.so")]).collect(),
        }
    }

    /// Load the library into this process, once; later calls are free. Errors list what was tried.
    pub fn load(self) -> Result<&'static Search> {
        let search = self.search();
        match search.found {
            Some(_) => Ok(search),
            None => Err(Error::Library {
                name: self.name(),
                tried: search.tried.iter().map(|p| p.display().to_string()).collect::<Vec<_>>().join(", "),
                fix: self.fix(),
            }),
        }
    }

    /// As [`Library::load`], with a search that failed as its answer too.
    pub fn search(self) -> &'static Search {
        static FOUND: [OnceLock<Search>; 3] = [const { OnceLock::new() }; 3];
        FOUND[self as usize].get_or_init(|| self.look())
    }

    fn look(self) -> Search {
        let names = self.files();
        let folders = match self {
            Self::Driver => vec![PathBuf::from("/usr/lib/wsl/lib"), PathBuf::from("/usr/local/nvidia/lib64")],
            _ => folders(),
        };
        let bare = names.iter().map(PathBuf::from);
        let placed = folders.iter().flat_map(|dir| names.iter().map(move |n| dir.join(n))).filter(|p| p.exists());
        let mut tried = Vec::new();
        for path in bare.chain(placed) {
            if self == Self::Nvrtc {
                // NVRTC opens this by its bare name, which the loader finds beside it only if it is loaded already
                let beside = path.parent().filter(|p| p.is_absolute());
                let builtins =
                    beside.map(|dir| children(dir, |n| n.starts_with("libnvrtc-builtins.so"))).unwrap_or_default();
                for file in &builtins {
                    let _ = open(file);
                }
            }
            let loaded = open(&path);
            tried.push(path.clone());
            if loaded {
                return Search { found: Some(mapped(self.name()).unwrap_or(path)), tried };
            }
        }
        tried.extend(folders);
        Search { found: None, tried }
    }
}

/// Load a library for good and for all. `cudarc` opens it again by name: the loader answers with what is loaded already under
/// that name (its SONAME), save where an unversioned name, which `cudarc` tries first, leads to another file.
fn open(path: &Path) -> bool {
    #[cfg(unix)]
    {
        use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_NOW};
        // SAFETY: loading runs the library's initialisers. These are NVIDIA's libraries by their fixed names, from the
        // loader's path or the folders that their packages install to, which the user trusts as the loader does.
        unsafe { Library::open(Some(path), RTLD_NOW | RTLD_GLOBAL) }.map(std::mem::forget).is_ok()
    }
    #[cfg(not(unix))]
    {
        // SAFETY: as above.
        unsafe { libloading::Library::new(path) }.map(std::mem::forget).is_ok()
    }
}

/// The file that a loaded library came from, as the system tells (Linux).
fn mapped(name: &str) -> Option<PathBuf> {
    let maps = std::fs::read_to_string("/proc/self/maps").ok()?;
    let paths = maps.lines().filter_map(|l| l.find('/').map(|at| Path::new(&l[at..])));
    let is_it = |p: &&Path| p.file_name().is_some_and(|f| f.to_string_lossy().starts_with(&format!("{name}.so")));
    paths.filter(is_it).map(Path::to_path_buf).next()
}

/// Folders that toolkits and Python packages install to, beyond the loader's own path.
fn folders() -> Vec<PathBuf> {
    let var = |name: &str| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    let mut out = Vec::new();
    for home in ["CUDA_HOME", "CUDA_PATH"].iter().filter_map(|n| var(n)) {
        out.extend([home.join("lib64"), home.join("lib")]);
    }
    out.push("/usr/local/cuda/lib64".into());
    // Python environments: the active one, that of each python on the PATH, and the user's own
    let mut roots: Vec<PathBuf> = ["VIRTUAL_ENV", "CONDA_PREFIX"].iter().filter_map(|n| var(n)).collect();
    for bin in std::env::split_paths(&std::env::var_os("PATH").unwrap_or_default()) {
        let python = bin.join("python3");
        if python.exists() {
            roots.extend(bin.parent().map(Path::to_path_buf));
            // an environment's python may be a link into another's
            roots.extend(std::fs::canonicalize(&python).ok().and_then(|p| Some(p.parent()?.parent()?.to_path_buf())));
        }
    }
    roots.extend(var("HOME").map(|h| h.join(".local")));
    for root in roots {
        for lib in ["lib", "lib64"].map(|l| root.join(l)) {
            for python in children(&lib, |n| n.starts_with("python3")) {
                for packages in ["site-packages", "dist-packages"].map(|s| python.join(s).join("nvidia")) {
                    out.extend(children(&packages, |_| true).into_iter().map(|p| p.join("lib")).filter(|p| p.is_dir()));
                }
            }
        }
    }
    let mut seen = std::collections::HashSet::new();
    out.retain(|p| seen.insert(p.clone()));
    out
}

/// Entries of a folder whose names pass, in order; none where it cannot be read.
fn children(dir: &Path, pass: impl Fn(&str) -> bool) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten().map(|e| e.path());
    let named = |p: &PathBuf| p.file_name().and_then(OsStr::to_str).is_some_and(&pass);
    let mut out: Vec<PathBuf> = entries.filter(named).collect();
    out.sort();
    out
}
