//! Compiling kernels for the device at hand, and keeping what was compiled.
//!
//! A module is one .cu file for one element type, compiled by NVRTC straight to a cubin, so that no driver has to know
//! a PTX newer than itself. Cubins are cached on disk under a name that hashes source, options and NVRTC's version.
//! Files appear there whole (written aside, then renamed), so processes may share the folder, and one that does not hold
//! what was written, by its own checksum, is compiled again.

use super::gpu::{Gpu, check};
use super::kernels::{ALL, HEADERS};
use super::libraries::Library;
use crate::{Error, Result};
use cudarc::driver::{result, sys};
use cudarc::nvrtc::{result as nvrtc, sys as nvrtc_sys};
use std::collections::HashMap;
use std::ffi::CString;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

/// A .cu file and what it defines.
#[derive(Debug)]
pub struct Source {
    pub(super) name: &'static str,
    pub(super) text: &'static str,
    /// Element types that it may be compiled for, as C++ names them.
    pub(super) elements: &'static [&'static str],
    /// Further defines, `NAME=VALUE`: a module has one of them. Empty where there are none.
    pub(super) defines: &'static [&'static str],
    pub(super) symbols: &'static [&'static str],
}

/// An entry point.
#[derive(Clone, Copy, Debug)]
pub struct Symbol {
    pub(super) source: &'static Source,
    pub(super) name: &'static str,
}

/// What a file is compiled as: one of its element types and, where it has any, one of its defines.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Variant {
    pub(crate) element: &'static str,
    pub(crate) define: Option<&'static str>,
}

impl From<&'static str> for Variant {
    fn from(element: &'static str) -> Self {
        Self { element, define: None }
    }
}

impl Source {
    fn variants(&self) -> impl Iterator<Item = Variant> + '_ {
        let defines: Vec<Option<&'static str>> = match self.defines {
            [] => vec![None],
            some => some.iter().copied().map(Some).collect(),
        };
        self.elements
            .iter()
            .flat_map(move |&element| defines.clone().into_iter().map(move |define| Variant { element, define }))
    }
    fn options(&self, variant: Variant, arch: &str) -> Vec<String> {
        let mut options = vec![
            format!("--gpu-architecture={arch}"),
            "--std=c++17".into(),
            "--device-as-default-execution-space".into(),
            format!("-DFELID_T={}", variant.element),
        ];
        options.extend(variant.define.map(|d| format!("-D{d}")));
        options
    }
    fn failed(&self, variant: Variant, detail: String) -> Error {
        let define = variant.define.map_or(String::new(), |d| format!(", {d}"));
        Error::Kernel { kernel: format!("{}.cu ({}{define})", self.name, variant.element), detail }
    }

    /// The cubin for `arch`, from the cache or compiled now.
    fn cubin(&self, variant: Variant, arch: &str) -> Result<Vec<u8>> {
        Library::Nvrtc.load()?;
        let version = nvrtc_version();
        let options = self.options(variant, arch);
        let mut key = Fnv::new();
        for part in [self.text, &version].into_iter().chain(options.iter().map(String::as_str)) {
            key.add(part.as_bytes());
        }
        HEADERS.iter().for_each(|(_, text)| key.add(text.as_bytes()));
        let file = cache_folder().map(|dir| dir.join(format!("{}-{:032x}.cubin", self.name, key.0)));
        if let Some(cubin) = file.as_deref().and_then(read_cached) {
            return Ok(cubin);
        }
        let cubin = self.compile(variant, &options)?;
        if let Some(file) = file
            && let Err(e) = write_cached(&file, &cubin)
        {
            tracing::warn!("kernel cache: cannot write {}: {e}", file.display());
        }
        Ok(cubin)
    }

    fn compile(&self, variant: Variant, options: &[String]) -> Result<Vec<u8>> {
        tracing::info!("compiling {}.cu for {} {}", self.name, variant.element, variant.define.unwrap_or(""));
        let text = |s: &str| CString::new(s).map_err(|_| self.failed(variant, "its source holds a zero byte".into()));
        let (source, name) = (text(self.text)?, text(&format!("{}.cu", self.name))?);
        let headers: Vec<CString> = HEADERS.iter().map(|(_, t)| text(t)).collect::<Result<_>>()?;
        let header_names: Vec<CString> = HEADERS.iter().map(|(n, _)| text(n)).collect::<Result<_>>()?;
        let pointers = |v: &[CString]| v.iter().map(|s| s.as_ptr()).collect::<Vec<_>>();
        let (headers, header_names) = (pointers(&headers), pointers(&header_names));
        let refused = |e: nvrtc::NvrtcError| self.failed(variant, format!("NVRTC: {e}"));
        let mut program = std::ptr::null_mut();
        // SAFETY: NVRTC is loaded; every pointer is to a string or array that lives until the program is destroyed.
        unsafe {
            let (n, texts, names) = (headers.len() as i32, headers.as_ptr(), header_names.as_ptr());
            nvrtc_sys::nvrtcCreateProgram(&mut program, source.as_ptr(), name.as_ptr(), n, texts, names)
                .result()
                .map_err(refused)?;
        }
        let compiled = || -> std::result::Result<Vec<u8>, nvrtc::NvrtcError> {
            // SAFETY: the program is alive, and the buffer is as long as NVRTC says that the cubin is.
            unsafe {
                nvrtc::compile_program(program, options)?;
                let mut size = 0;
                nvrtc_sys::nvrtcGetCUBINSize(program, &mut size).result()?;
                let mut cubin = vec![0u8; size];
                nvrtc_sys::nvrtcGetCUBIN(program, cubin.as_mut_ptr().cast()).result()?;
                Ok(cubin)
            }
        };
        let answer = compiled().map_err(|e| {
            // SAFETY: the program is alive.
            let log = unsafe { nvrtc::get_program_log(program) }.unwrap_or_default();
            let log: Vec<u8> = log.into_iter().map(|c| c as u8).take_while(|&c| c != 0).collect();
            let log = String::from_utf8_lossy(&log).lines().map(str::trim).collect::<Vec<_>>().join(" ");
            self.failed(variant, format!("NVRTC: {e}: {log}"))
        });
        // SAFETY: the program is destroyed once, here.
        let _ = unsafe { nvrtc::destroy_program(program) };
        answer
    }
}

/// NVRTC's version, such as "13.0". It must be loaded.
fn nvrtc_version() -> String {
    let (mut major, mut minor) = (0, 0);
    // SAFETY: NVRTC is loaded, and writes two integers to where it is told.
    let _ = unsafe { nvrtc_sys::nvrtcVersion(&mut major, &mut minor) };
    format!("{major}.{minor}")
}

// ---- the cache on disk ----

/// Where cubins are kept: `FELID_CACHE_DIR`, or `felid` in the user's cache folder; `None` where there is neither.
pub fn cache_folder() -> Option<PathBuf> {
    let var = |name: &str| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    let base = var("FELID_CACHE_DIR")
        .or_else(|| var("XDG_CACHE_HOME").map(|d| d.join("felid")))
        .or_else(|| var("HOME").map(|d| d.join(".cache").join("felid")))?;
    Some(base.join("kernels"))
}

/// FNV-1a, 128 bits: a name for a text, the same everywhere.
struct Fnv(u128);

impl Fnv {
    fn new() -> Self {
        Self(0x6c62_272e_07bb_0142_62b8_2175_6295_c58d)
    }
    fn add(&mut self, bytes: &[u8]) {
        // the length closes a part, so that no two lists of parts read alike
        for b in bytes.iter().copied().chain((bytes.len() as u64).to_le_bytes()) {
            self.0 = (self.0 ^ u128::from(b)).wrapping_mul(0x0000_0000_0100_0000_0000_0000_0000_013b);
        }
    }
    fn of(bytes: &[u8]) -> u128 {
        let mut f = Self::new();
        f.add(bytes);
        f.0
    }
}

/// A cached file is the checksum of the cubin, then the cubin.
fn read_cached(file: &Path) -> Option<Vec<u8>> {
    let bytes = std::fs::read(file).ok()?;
    let (sum, cubin) = bytes.split_first_chunk::<16>()?;
    (u128::from_le_bytes(*sum) == Fnv::of(cubin)).then(|| cubin.to_vec())
}

fn write_cached(file: &Path, cubin: &[u8]) -> std::io::Result<()> {
    use std::io::Write;
    let dir = file.parent().unwrap_or(Path::new("."));
    std::fs::create_dir_all(dir)?;
    let mut aside = tempfile::NamedTempFile::new_in(dir)?;
    aside.write_all(&Fnv::of(cubin).to_le_bytes())?;
    aside.write_all(cubin)?;
    aside.persist(file)?;
    Ok(())
}

// ---- loaded modules ----

/// An entry point on a device.
#[derive(Clone, Copy)]
pub(super) struct Function(pub sys::CUfunction);

// SAFETY: functions are handles that the driver lets any thread use; modules are never unloaded.
unsafe impl Send for Function {}

/// The functions loaded on one device, by file, variant and name.
#[derive(Default)]
pub(super) struct Modules {
    functions: Mutex<HashMap<(&'static str, Variant, &'static str), Function>>,
}

impl Gpu {
    /// The entry point `symbol` of the module `variant`, compiled and loaded if it is not yet.
    pub(super) fn function(&self, symbol: Symbol, variant: Variant) -> Result<Function> {
        let mut functions = self.modules.functions.lock().unwrap_or_else(|e| e.into_inner());
        let key = |name| (symbol.source.name, variant, name);
        if let Some(f) = functions.get(&key(symbol.name)) {
            return Ok(*f);
        }
        for (name, f) in self.load(symbol.source, variant)? {
            functions.insert(key(name), f);
        }
        let missing = || symbol.source.failed(variant, format!("has no entry point {}", symbol.name));
        functions.get(&key(symbol.name)).copied().ok_or_else(missing)
    }

    /// All entry points of a module.
    fn load(&self, source: &'static Source, variant: Variant) -> Result<Vec<(&'static str, Function)>> {
        if !source.variants().any(|v| v == variant) {
            return Err(source.failed(variant, "is not one of its variants".into()));
        }
        let cubin = source.cubin(variant, &self.arch())?;
        self.bind()?;
        let refused = |e| source.failed(variant, format!("the driver refuses it: {e}"));
        // SAFETY: the bytes are a cubin that NVRTC made for this architecture.
        let module = unsafe { result::module::load_data(cubin.as_ptr().cast()) }.map_err(refused)?;
        let mut functions = Vec::new();
        for &name in source.symbols {
            let c_name = CString::new(name).map_err(|_| source.failed(variant, format!("bad name {name:?}")))?;
            // SAFETY: the module is loaded and never unloaded.
            let function = unsafe { result::module::get_function(module, c_name) }
                .map_err(|e| source.failed(variant, format!("no entry point {name}: {e}")))?;
            self.allow_shared_memory(function)?;
            functions.push((name, Function(function)));
        }
        Ok(functions)
    }

    /// Let a function ask for all the shared memory that a block may have; without this it is 48 KB.
    fn allow_shared_memory(&self, function: sys::CUfunction) -> Result<()> {
        use sys::CUfunction_attribute as Attribute;
        // SAFETY: the function is loaded.
        let answer = unsafe {
            result::function::get_function_attribute(function, Attribute::CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES).and_then(
                |fixed| {
                    let dynamic = Attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
                    result::function::set_function_attribute(function, dynamic, self.shared_per_block as i32 - fixed)
                },
            )
        };
        check(self.ordinal, "set up a kernel's shared memory", answer)
    }

    /// Compile and load everything, so that nothing waits for a compiler later: the number of modules and of entry
    /// points.
    pub fn warm_up(&self) -> Result<(usize, usize)> {
        let (mut modules, mut symbols) = (0, 0);
        compile_all(&self.arch())?;
        for source in ALL.iter().copied() {
            for variant in source.variants() {
                for &name in source.symbols {
                    self.function(Symbol { source, name }, variant)?;
                    symbols += 1;
                }
                modules += 1;
            }
        }
        Ok((modules, symbols))
    }
}

/// What [`compile_for`] did.
#[derive(Clone, Debug, serde::Serialize)]
pub struct CompileReport {
    /// The architecture, such as `sm_90a`.
    pub arch: String,
    /// Modules compiled or found in the cache.
    pub modules: usize,
    /// Their size together.
    pub bytes: usize,
    /// NVRTC's version.
    pub nvrtc: String,
}

/// Compile every kernel for an architecture such as `sm_80`, whatever device is there or none. Errors tell the first
/// kernels that do not compile, and how many there are.
pub fn compile_for(arch: &str) -> Result<CompileReport> {
    let (modules, bytes) = compile_all(arch)?;
    Ok(CompileReport { arch: arch.into(), modules, bytes, nvrtc: nvrtc_version() })
}

/// As many failures are told; what is wrong with all of them alike need not be said of each.
const MOST_FAILURES: usize = 4;

fn compile_all(arch: &str) -> Result<(usize, usize)> {
    use rayon::prelude::*;
    Library::Nvrtc.load()?;
    let all: Vec<(&Source, Variant)> = ALL.iter().flat_map(|s| s.variants().map(move |v| (*s, v))).collect();
    let sizes: Vec<Result<usize>> = all.par_iter().map(|(s, v)| Ok(s.cubin(*v, arch)?.len())).collect();
    let mut failures: Vec<String> = sizes.iter().filter_map(|r| r.as_ref().err().map(Error::to_string)).collect();
    let count = failures.len();
    if count > MOST_FAILURES {
        failures.truncate(MOST_FAILURES);
        failures.push(format!("and {} more", count - MOST_FAILURES));
    }
    match count {
        0 => Ok((all.len(), sizes.into_iter().flatten().sum())),
        _ => Err(Error::Kernel { kernel: format!("{count} modules for {arch}"), detail: failures.join("; ") }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_damaged_cache_file_is_not_used() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("folder").join("x.cubin");
        assert_eq!(read_cached(&file), None);
        write_cached(&file, b"cubin").unwrap();
        assert_eq!(read_cached(&file).as_deref(), Some(&b"cubin"[..]));
        let mut bytes = std::fs::read(&file).unwrap();
        bytes.pop();
        std::fs::write(&file, &bytes).unwrap();
        assert_eq!(read_cached(&file), None);
        std::fs::write(&file, b"short").unwrap();
        assert_eq!(read_cached(&file), None);
    }

    #[test]
    fn every_entry_point_stands_in_its_file() {
        for source in ALL {
            for name in source.symbols {
                assert!(source.text.contains(name), "{}.cu defines no {name}", source.name);
            }
            // a macro of the file's own may define several
            let defined = source.text.matches("KERNEL ").count();
            assert!(defined >= source.symbols.len() || source.text.contains("#define "), "{}.cu", source.name);
        }
    }
}
