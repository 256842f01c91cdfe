//! Tensor maps: how Hopper's copy engine finds boxes of a matrix in device memory.

use super::blas::Kind;
use super::gpu::Gpu;
use super::launch::Arg;
use crate::Result;
use cudarc::driver::sys;

/// Most dimensions that a map has here.
const RANK: usize = 4;

/// A tensor of 16-bit elements as boxes of `lines` lines (at most 256) by 64 elements, 16-byte chunks permuted by xor with the
/// line modulo 8 (`sm90.cuh`); zeros outside. `sizes`: the elements of a line, the lines, then what else there is, outermost last; `strides`:
/// elements from one line to the next, and so on. A stride over one line means nothing. `None` where the engine cannot address
/// it: it wants multiples of 16 bytes, and no stride of 0.
pub(crate) fn boxes<const N: usize>(
    gpu: &Gpu,
    pointer: u64,
    kind: Kind,
    sizes: [usize; N],
    strides: [usize; N],
    lines: usize,
) -> Result<Option<Arg>> {
    const { assert!(N >= 2 && N <= RANK) };
    let data = match kind {
        Kind::BF16 => sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
        Kind::F16 => sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
        Kind::F32 => return Ok(None),
    };
    let (mut bytes, mut lengths) = ([0u64; RANK], [0u64; RANK]);
    for i in 0..N {
        lengths[i] = sizes[i] as u64;
        bytes[i] = if sizes[i] == 1 { 16 } else { (strides[i] * kind.size()) as u64 };
    }
    let reach = 1u64 << 40;
    let bytes = &bytes[1..N];
    if !pointer.is_multiple_of(16) || bytes.iter().any(|&b| b == 0 || b >= reach || !b.is_multiple_of(16)) {
        return Ok(None);
    }
    if lengths[..N].iter().any(|&n| n == 0 || n >= 1 << 31) {
        return Ok(None);
    }
    let mut map = sys::CUtensorMap { opaque: [0; 16] };
    let (tile, one) = ([64u32, lines as u32, 1, 1], [1u32; RANK]);
    gpu.bind()?;
    // SAFETY: the map is written whole; the arrays have as many entries as the rank says (strides one fewer). The address is
    // only written down: who launches a kernel with the map answers for what it reaches.
    let answer = unsafe {
        sys::cuTensorMapEncodeTiled(
            &mut map,
            data,
            N as u32,
            pointer as *mut std::ffi::c_void,
            lengths.as_ptr(),
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
