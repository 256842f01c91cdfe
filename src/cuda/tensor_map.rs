//! Tensor maps: how Hopper's copy engine finds boxes of a matrix in device memory.

use super::blas::Kind;
use super::gpu::Gpu;
use super::launch::Arg;
use crate::Result;
use cudarc::driver::sys;

/// A batch of matrices of 16-bit elements as boxes of 64 lines by 64 elements, 16-byte chunks permuted by xor with the line
/// modulo 8 (`gemm_sm90.cu`); zeros outside. `along` elements of each line of memory, `lines` lines `leading` elements apart,
/// `batch` matrices `batch_stride` elements apart. `None` where the engine cannot address it: it wants multiples of 16 bytes.
pub(crate) fn boxes(
    gpu: &Gpu,
    pointer: u64,
    kind: Kind,
    [along, lines, batch]: [usize; 3],
    [leading, batch_stride]: [usize; 2],
) -> Result<Option<Arg>> {
    let data = match kind {
        Kind::BF16 => sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
        Kind::F16 => sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
        Kind::F32 => return Ok(None),
    };
    let bytes = [leading, batch_stride].map(|n| (n * kind.size()) as u64);
    let reach = 1u64 << 40;
    if !(pointer | bytes[0] | bytes[1]).is_multiple_of(16) || bytes.iter().any(|&b| b == 0 || b >= reach) {
        return Ok(None);
    }
    let sizes = [along as u64, lines as u64, batch as u64];
    if sizes.iter().any(|&n| n == 0 || n >= 1 << 31) {
        return Ok(None);
    }
    let mut map = sys::CUtensorMap { opaque: [0; 16] };
    let (tile, one) = ([64u32, 64, 1], [1u32; 3]);
    gpu.bind()?;
    // SAFETY: the map is written whole; the arrays have as many entries as the rank says (strides one fewer). The address is
    // only written down: who launches a kernel with the map answers for what it reaches.
    let answer = unsafe {
        sys::cuTensorMapEncodeTiled(
            &mut map,
            data,
            3,
            pointer as *mut std::ffi::c_void,
            sizes.as_ptr(),
            bytes.as_ptr(),
            tile.as_ptr(),
            one.as_ptr(),
            sys::CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
            sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_128B,
            sys::CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
            sys::CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
    };
    Ok((answer == sys::CUresult::CUDA_SUCCESS).then(|| Arg::from(map.opaque)))
}
