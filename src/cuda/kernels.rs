//! Every kernel by name: the one place where the names of entry points stand, beside the .cu files that define them.
//! A test compiles all of it and loads every symbol.

use super::module::{Source, Symbol};

/// What sources may include, by name.
pub(super) const HEADERS: &[(&str, &str)] = &[
    ("attention.cuh", include_str!("../../kernels/attention.cuh")),
    ("attention_mma.cuh", include_str!("../../kernels/attention_mma.cuh")),
    ("attention_sm90.cuh", include_str!("../../kernels/attention_sm90.cuh")),
    ("cached_attention.cuh", include_str!("../../kernels/cached_attention.cuh")),
    ("common.cuh", include_str!("../../kernels/common.cuh")),
    ("lab_rows.cuh", include_str!("../../kernels/lab/attention/lab_rows.cuh")),
    ("gemm.cuh", include_str!("../../kernels/gemm.cuh")),
    ("rows.cuh", include_str!("../../kernels/rows.cuh")),
    ("sm90.cuh", include_str!("../../kernels/sm90.cuh")),
];

/// `file: [element types] [other defines, one a variant] => entry points`, with `in "folder/"` after the file where it does not
/// lie in `kernels` itself. For each file a module of that name, with a
/// [`Symbol`] for each entry point.
macro_rules! kernels {
    ($($file:ident $(in $folder:literal)?: [$($element:literal)*] [$($define:literal)*] => $($symbol:ident),*;)*) => {
        $(
            #[doc = concat!("`kernels/", $($folder,)? stringify!($file), ".cu`")]
            #[allow(non_upper_case_globals)]
            pub(crate) mod $file {
                use super::*;
                pub(crate) static SOURCE: Source = Source {
                    name: stringify!($file),
                    text: include_str!(concat!("../../kernels/", $($folder,)? stringify!($file), ".cu")),
                    elements: &[$($element),*],
                    defines: &[$($define),*],
                    symbols: &[$(stringify!($symbol)),*],
                };
                $(pub(crate) const $symbol: Symbol = Symbol { source: &SOURCE, name: stringify!($symbol) };)*
            }
        )*
        /// All files.
        pub(super) static ALL: &[&Source] = &[$(&$file::SOURCE),*];
    };
}

kernels! {
    attention: ["bf16" "f16"] ["HEAD_DIM=16" "HEAD_DIM=32" "HEAD_DIM=64" "HEAD_DIM=96" "HEAD_DIM=128" "HEAD_DIM=256"]
        => attention_forward;
    attention_backward: ["bf16" "f16"] ["HEAD_DIM=16" "HEAD_DIM=32" "HEAD_DIM=64" "HEAD_DIM=96" "HEAD_DIM=128" "HEAD_DIM=256"]
        => attention_backward_rows, attention_backward_keys;
    attention_f32: ["float"] ["HEAD_DIM=16" "HEAD_DIM=32" "HEAD_DIM=64" "HEAD_DIM=96" "HEAD_DIM=128" "HEAD_DIM=256"]
        => attention_forward, attention_backward_rows, attention_backward_keys;
    attention_sm90: ["bf16" "f16"] ["HEAD_DIM=64" "HEAD_DIM=128"] => attention_forward_sm90;
    attention_sm90_rows: ["bf16" "f16"] ["HEAD_DIM=64" "HEAD_DIM=128"] => attention_backward_rows_sm90;
    attention_sm90_keys: ["bf16" "f16"] ["HEAD_DIM=64" "HEAD_DIM=128" "WARPGROUPS=3"] => attention_backward_keys_sm90;
    attention_sum: ["float" "bf16" "f16"] [] => attention_backward_sum;
    cached_attention: ["float" "bf16" "f16"] ["CASE=0" "CASE=1" "CASE=2" "CASE=3" "CASE=4" "CASE=5" "CASE=6" "CASE=7" "CASE=8"
        "CASE=9" "CASE=10" "CASE=11"] => cached_attention_one, cached_attention_two, cached_attention_four,
        cached_attention_wide, cached_attention_join;
    cached_step: ["float" "bf16" "f16"] ["CASE=1" "CASE=3" "CASE=5"] => cached_step_one, cached_step_four, cached_step_wide,
        cached_pairs_one, cached_pairs_four, cached_pairs_wide;
    cast: ["float" "bf16" "f16"] [] => cast_to_float, cast_to_bf16, cast_to_f16;
    adamw: ["float" "bf16" "f16"] [] => adamw_squares, adamw_norm, adamw_update;
    advance: ["i64"] [] => advance, fill_chunks;
    assemble_blocks: ["float" "bf16" "f16"] ["PACKED=1" "PACKED=0"] => assemble_blocks, assemble_blocks_backward,
        assemble_blocks_separator;
    cross_entropy: ["float" "bf16" "f16"] ["PACKED=1" "PACKED=0"] => cross_entropy, cross_entropy_backward,
        cross_entropy_in_place, cross_entropy_mean;
    linear_cross_entropy: ["float" "bf16" "f16"] ["PACKED=1" "PACKED=0"] => linear_cross_entropy_scale,
        linear_cross_entropy_rows;
 qk_norm_rope: ["float" "bf16" "f16"] [] => qk_norm_rope, qk_rope, qk_norm_rope_single, qk_norm_rope_backward,
        qk_rope_backward, qk_norm_rope_backward_single;
    rms_norm: ["float" "bf16" "f16"] ["PACKED=1" "PACKED=0"] => rms_norm_1, rms_norm_2, rms_norm_4, rms_norm_8,
        rms_norm_long, rms_norm_backward_short, rms_norm_backward_1, rms_norm_backward_2, rms_norm_backward_long,
        rms_norm_weight;
    rope: ["float" "bf16" "f16"] [] => rope_packed, rope_single;
    swiglu: ["float" "bf16" "f16"] ["PACKED=1" "PACKED=0"] => swiglu, swiglu_backward;
    copy: ["float" "bf16" "f16" "i64" "i8"] [] => copy_strided, copy_packed, copy_transposed;
    elementwise: ["float" "bf16" "f16"] [] => binary, binary_packed, unary, unary_packed, add_to_same, add_to_float,
        add_to_same_packed, add_to_float_packed;
    few_rows: ["float" "bf16" "f16"] ["PACKED=1" "PACKED=0"] => few_rows, few_rows_gated;
    gated_rows: ["bf16" "f16"] [] => gated_rows;
    gather: ["float" "bf16" "f16" "i64" "i8"] [] => gather, gather_packed;
    interpolate: ["float" "bf16" "f16"] [] => interpolate_last, interpolate, interpolate_packed;
    max: ["float" "bf16" "f16"] [] => max_forward, max_backward;
    reduce: ["float" "bf16" "f16"] [] => sum_rows, sum_rows_partial, sum_rows_finish, sum_columns, sum_columns_partial,
        sum_columns_finish;
    sample: ["float" "bf16" "f16"] [] => sample, sample_greedy, penalize, log_probs;
    scatter: ["float" "bf16" "f16"] [] => scatter_add, scatter_add_float, scatter_add_packed, scatter_add_float_packed;
    softmax: ["float" "bf16" "f16"] [] => softmax_forward, softmax_backward;
    write_int8_rows: ["float" "bf16" "f16"] [] => write_int8_rows;
    write_rows: ["float" "bf16" "f16" "i64" "i8"] [] => write_rows, write_rows_packed;
    gemm: ["bf16" "f16"] ["GEMM=0" "GEMM=1" "GEMM=2" "GEMM=3" "GEMM=4" "GEMM=5" "GEMM=6" "GEMM=7"] =>
        gemm_128x256, gemm_128x128, gemm_64x64, gemm_any, gemm_sum;
    gemm_f32: ["float"] ["GEMM=0" "GEMM=1" "GEMM=2" "GEMM=3"] => gemm_128x128, gemm_64x64, gemm_any, gemm_sum;
    gemm_sm90: ["bf16" "f16"] ["GEMM=0" "GEMM=1" "GEMM=2" "GEMM=3" "GEMM=4" "GEMM=5" "GEMM=6" "GEMM=7"] =>
        gemm_tma_256, gemm_tma_128;
    lab_1_definition in "lab/attention/": ["bf16"] [] => lab_1_definition;
    lab_2_indices in "lab/attention/": ["bf16"] [] => lab_2_indices;
    lab_3_tiles in "lab/attention/": ["bf16"] [] => lab_3_tiles;
    lab_4_tensor_cores in "lab/attention/": ["bf16"] [] => lab_4_tensor_cores;
}
