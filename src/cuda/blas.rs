//! Matrix products by cuBLASLt, where it is there.
//!
//! cuBLASLt thinks in columns: a row-major `D = A B` is the column-major `D^T = B^T A^T`, so B goes first. An operand whose
//! rows are dense is then "not transposed", one whose columns are dense "transposed"; nothing is copied for either.

use super::gpu::Gpu;
use super::libraries::Library;
use super::memory::CudaBuffer;
use crate::memory::{Category, counted_as};
use crate::{Error, Result};
use cudarc::cublaslt::{result as lt, sys};
use std::collections::HashMap;
use std::ffi::c_void;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering::Relaxed};
use std::sync::{Mutex, MutexGuard};

/// Who computes matrix products on CUDA devices.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Gemm {
    /// cuBLASLt where it is there and takes the operands, else Felid's own kernel.
    #[default]
    Auto,
    /// Felid's own kernel always.
    Native,
}

impl std::str::FromStr for Gemm {
    type Err = Error;
    fn from_str(s: &str) -> Result<Self> {
        match s {
            "auto" => Ok(Self::Auto),
            "native" => Ok(Self::Native),
            _ => Err(Error::Usage(format!("unknown matrix product '{s}': use auto or native"))),
        }
    }
}

static GEMM: AtomicU8 = AtomicU8::new(0);
static TF32: AtomicBool = AtomicBool::new(false);

/// Choose who computes matrix products, for the whole process.
pub fn set_gemm(gemm: Gemm) {
    GEMM.store(u8::from(gemm == Gemm::Native), Relaxed);
}
/// Who computes matrix products.
pub fn gemm() -> Gemm {
    if GEMM.load(Relaxed) == 0 { Gemm::Auto } else { Gemm::Native }
}
/// Let cuBLASLt round f32 operands to TF32 (10 bits of mantissa) for speed; off unless asked for.
pub fn set_tf32(on: bool) {
    TF32.store(on, Relaxed);
}

/// Element types of products.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Kind {
    F32,
    BF16,
    F16,
}

impl Kind {
    /// Bytes of an element.
    pub fn size(self) -> usize {
        if self == Self::F32 { 4 } else { 2 }
    }
    /// As C++ names it.
    pub fn element(self) -> &'static str {
        match self {
            Self::F32 => "float",
            Self::BF16 => "bf16",
            Self::F16 => "f16",
        }
    }
    fn of_library(self) -> sys::cudaDataType {
        match self {
            Self::F32 => sys::cudaDataType::CUDA_R_32F,
            Self::BF16 => sys::cudaDataType::CUDA_R_16BF,
            Self::F16 => sys::cudaDataType::CUDA_R_16F,
        }
    }
}

/// A matrix in device memory, one of its strides 1, or a batch of them.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Matrix {
    pub pointer: u64,
    pub rows: usize,
    pub cols: usize,
    /// From one row to the next where columns are adjacent, else from one column to the next.
    pub leading: usize,
    /// True where rows are adjacent, not columns.
    pub by_columns: bool,
    /// From one matrix of the batch to the next, in elements.
    pub batch_stride: usize,
}

/// `D = A B + beta D`, D row-major.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Product {
    pub a: Matrix,
    pub b: Matrix,
    pub d: Matrix,
    pub batch: usize,
    pub input: Kind,
    pub output: Kind,
    /// Add to what D holds.
    pub accumulate: bool,
}

/// All that the choice of an algorithm depends on.
#[derive(PartialEq, Eq, Hash)]
struct Key {
    sizes: [usize; 10],
    transposed: [bool; 2],
    kinds: [Kind; 2],
    accumulate: bool,
    alignment: [u32; 3],
    tf32: bool,
}

/// Workspace that algorithms may use: what NVIDIA recommends for Hopper.
const MOST_WORKSPACE: usize = 32 << 20;

/// The library's choice for a product.
#[derive(Clone, Copy)]
struct Algorithm {
    algorithm: sys::cublasLtMatmulAlgo_t,
    /// Bytes of workspace that it needs.
    workspace: usize,
}

/// True where the library is there.
pub(crate) fn has_blas() -> bool {
    Library::CublasLt.search().found.is_some()
}

struct Handle(sys::cublasLtHandle_t);
// SAFETY: the library lets any thread use a handle.
unsafe impl Send for Handle {}
// SAFETY: as above.
unsafe impl Sync for Handle {}

pub(super) struct Blas {
    handle: Handle,
    /// The last is as large as any product has needed so far. Captured work may use those before.
    workspaces: Mutex<Vec<CudaBuffer>>,
    algorithms: Mutex<HashMap<Key, Option<Algorithm>>>,
    /// Held while a product is submitted: one of several kernels must not be parted from its workspace by another's.
    submitting: Mutex<()>,
}

/// Destroys descriptions however a call ends.
struct Descriptions {
    product: sys::cublasLtMatmulDesc_t,
    layouts: Vec<sys::cublasLtMatrixLayout_t>,
}
impl Drop for Descriptions {
    fn drop(&mut self) {
        // SAFETY: each was made by the library and is destroyed once.
        unsafe {
            let _ = lt::destroy_matmul_desc(self.product);
            for &l in &self.layouts {
                let _ = lt::destroy_matrix_layout(l);
            }
        }
    }
}

impl Gpu {
    fn blas(&'static self) -> Result<&'static Blas> {
        static ALL: Mutex<Vec<(usize, &'static Blas)>> = Mutex::new(Vec::new());
        // held while one is made, so that no device gets two
        let mut all = ALL.lock().unwrap_or_else(|e| e.into_inner());
        if let Some((_, blas)) = all.iter().find(|(n, _)| *n == self.ordinal) {
            return Ok(blas);
        }
        Library::CublasLt.load()?;
        self.bind()?;
        let handle =
            Handle(lt::create_handle().map_err(|e| self.refused("cannot start (--gemm native does without it)", e))?);
        let blas = Blas { handle, workspaces: Mutex::default(), algorithms: Mutex::default(), submitting: Mutex::default() };
        let blas: &'static Blas = Box::leak(Box::new(blas));
        all.push((self.ordinal, blas));
        Ok(blas)
    }
    /// Held while others submit work that uses the library's workspace: see [`Blas::submitting`]. None without the library.
    pub(super) fn blas_alone(&'static self) -> Result<Option<MutexGuard<'static, ()>>> {
        if !has_blas() {
            return Ok(None);
        }
        Ok(Some(self.blas()?.submitting.lock().unwrap_or_else(|e| e.into_inner())))
    }
    fn refused(&self, what: &str, e: lt::CublasError) -> Error {
        Error::Device { device: format!("cuda:{}", self.ordinal), detail: format!("cuBLASLt {what}: {e}") }
    }

    /// Compute a product by cuBLASLt. False where the library is not there or has nothing for these operands.
    ///
    /// # Safety
    ///
    /// The matrices are of this device, as large as their sizes and strides say, and D overlaps neither A nor B.
    pub(crate) unsafe fn blas_product(&'static self, p: &Product) -> Result<bool> {
        if !has_blas() {
            return Ok(false);
        }
        let blas = self.blas()?;
        let tf32 = p.input == Kind::F32 && TF32.load(Relaxed);
        let failed = |e| self.refused(&format!("refuses {p:?}"), e);
        let d = self.describe(p, tf32).map_err(failed)?;
        let Some(Algorithm { algorithm, workspace }) = blas.algorithm(p, tf32, &d).map_err(failed)? else {
            return Ok(false);
        };
        let pointer = blas.workspace(self, workspace)?;
        let (one, beta) = (1f32, if p.accumulate { 1f32 } else { 0f32 });
        self.bind()?;
        let _submitting = blas.submitting.lock().unwrap_or_else(|e| e.into_inner());
        // SAFETY: descriptions and algorithm fit each other; the matrices are the caller's obligation; the workspace is
        // used on this stream only, in order.
        unsafe {
            lt::matmul(
                blas.handle.0,
                d.product,
                (&raw const one).cast(),
                (&raw const beta).cast(),
                p.b.pointer as *const c_void,
                d.layouts[0],
                p.a.pointer as *const c_void,
                d.layouts[1],
                p.d.pointer as *const c_void,
                d.layouts[2],
                p.d.pointer as *mut c_void,
                d.layouts[2],
                &algorithm,
                pointer as *mut c_void,
                workspace,
                self.queue().cast(),
            )
            .map_err(failed)?;
        }
        Ok(true)
    }

    fn describe(&self, p: &Product, tf32: bool) -> std::result::Result<Descriptions, lt::CublasError> {
        let compute = match tf32 {
            true => sys::cublasComputeType_t::CUBLAS_COMPUTE_32F_FAST_TF32,
            false => sys::cublasComputeType_t::CUBLAS_COMPUTE_32F,
        };
        let product = lt::create_matmul_desc(compute, sys::cudaDataType::CUDA_R_32F)?;
        let mut all = Descriptions { product, layouts: Vec::with_capacity(3) };
        use sys::cublasLtMatmulDescAttributes_t as Attribute;
        for (attribute, transposed) in [
            (Attribute::CUBLASLT_MATMUL_DESC_TRANSA, p.b.by_columns),
            (Attribute::CUBLASLT_MATMUL_DESC_TRANSB, p.a.by_columns),
        ] {
            let op = i32::from(transposed);
            // SAFETY: the description is alive, and this attribute is a 32-bit integer.
            unsafe { lt::set_matmul_desc_attribute(product, attribute, (&raw const op).cast(), 4)? };
        }
        for (m, kind) in [(&p.b, p.input), (&p.a, p.input), (&p.d, p.output)] {
            // column-major, as it lies: the adjacent elements are a column
            let (rows, cols) = if m.by_columns { (m.rows, m.cols) } else { (m.cols, m.rows) };
            let layout = lt::create_matrix_layout(kind.of_library(), rows as u64, cols as u64, m.leading as i64)?;
            all.layouts.push(layout);
            if p.batch > 1 {
                use sys::cublasLtMatrixLayoutAttribute_t as Attribute;
                let (count, stride) = (p.batch as i32, m.batch_stride as i64);
                // SAFETY: the layout is alive; these attributes are integers of 32 and 64 bits.
                unsafe {
                    let attribute = Attribute::CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT;
                    lt::set_matrix_layout_attribute(layout, attribute, (&raw const count).cast(), 4)?;
                    let attribute = Attribute::CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET;
                    lt::set_matrix_layout_attribute(layout, attribute, (&raw const stride).cast(), 8)?;
                }
            }
        }
        Ok(all)
    }
}

impl Blas {
    /// Where so many bytes of workspace are; all products of a stream use them in turn.
    fn workspace(&self, gpu: &'static Gpu, bytes: usize) -> Result<u64> {
        let mut all = self.workspaces.lock().unwrap_or_else(|e| e.into_inner());
        if bytes == 0 {
            return Ok(0);
        }
        let last = all.last().map_or((0, 0), |last| (last.bytes(), last.pointer()));
        if last.0 >= bytes {
            return Ok(last.1);
        }
        // by doubling, so that all of them together are not many times the largest
        let size = bytes.max((2 * last.0).min(MOST_WORKSPACE));
        let new = super::replay::outside(|| counted_as(Category::Other, || CudaBuffer::new(gpu, size)))?;
        let pointer = new.pointer();
        all.push(new);
        Ok(pointer)
    }
    /// The library's choice for such a product, asked for once; `None` where it has none.
    fn algorithm(
        &self,
        p: &Product,
        tf32: bool,
        d: &Descriptions,
    ) -> std::result::Result<Option<Algorithm>, lt::CublasError> {
        let alignment = |m: &Matrix, kind: Kind| {
            // of every row, and of every matrix of the batch
            let bytes = [m.leading, m.batch_stride].map(|n| (n as u64).wrapping_mul(kind.size() as u64));
            (m.pointer | bytes[0] | bytes[1] | 256).trailing_zeros()
        };
        let key = Key {
            sizes: [
                p.a.rows,
                p.b.cols,
                p.a.cols,
                p.a.leading,
                p.b.leading,
                p.d.leading,
                p.batch,
                // how far apart the matrices of a batch lie matters for alignment only; and whether they are one
                usize::from(p.a.batch_stride == 0),
                usize::from(p.b.batch_stride == 0),
                usize::from(p.d.batch_stride == 0),
            ],
            transposed: [p.a.by_columns, p.b.by_columns],
            kinds: [p.input, p.output],
            accumulate: p.accumulate,
            alignment: [alignment(&p.b, p.input), alignment(&p.a, p.input), alignment(&p.d, p.output)],
            tf32,
        };
        let mut algorithms = self.algorithms.lock().unwrap_or_else(|e| e.into_inner());
        if let Some(found) = algorithms.get(&key) {
            return Ok(*found);
        }
        let preference = lt::create_matmul_pref()?;
        let ask = || {
            use sys::cublasLtMatmulPreferenceAttributes_t as Attribute;
            let (bytes, workspace) = (key.alignment.map(|a| 1u32 << a), MOST_WORKSPACE);
            // partial sums of a split product are added in f32, not rounded to the output's 16 bits first
            let reductions = sys::cublasLtReductionScheme_t::CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE as u32;
            let settings = [
                (Attribute::CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, reductions),
                (Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, bytes[0]),
                (Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, bytes[1]),
                (Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, bytes[2]),
                (Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, bytes[2]),
            ];
            // SAFETY: the preference and the descriptions are alive; the attributes are a size and 32-bit integers.
            unsafe {
                let attribute = Attribute::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES;
                lt::set_matmul_pref_attribute(preference, attribute, (&raw const workspace).cast(), size_of::<usize>())?;
                for (attribute, n) in settings {
                    lt::set_matmul_pref_attribute(preference, attribute, (&raw const n).cast(), 4)?;
                }
                let l = &d.layouts;
                lt::get_matmul_algo_heuristic(self.handle.0, d.product, l[0], l[1], l[2], l[2], preference)
            }
        };
        let answer = ask();
        // SAFETY: the preference is destroyed once, here.
        let _ = unsafe { lt::destroy_matmul_pref(preference) };
        let unsupported =
            [sys::cublasStatus_t::CUBLAS_STATUS_NOT_SUPPORTED, sys::cublasStatus_t::CUBLAS_STATUS_INVALID_VALUE];
        let found = match answer {
            Ok(heuristic) => {
                tracing::debug!("cuBLASLt needs {} bytes of workspace for {p:?}", heuristic.workspaceSize);
                Some(Algorithm { algorithm: heuristic.algo, workspace: heuristic.workspaceSize })
            }
            Err(e) if unsupported.contains(&e.0) => None,
            Err(e) => return Err(e),
        };
        algorithms.insert(key, found);
        Ok(found)
    }
}
