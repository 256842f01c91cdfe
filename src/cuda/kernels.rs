//! Every kernel by name: the one place where the names of entry points stand, beside the .cu files that define them.
//! A test compiles all of it and loads every symbol.

use super::module::{Source, Symbol};

/// What sources may include, by name.
pub(super) const HEADERS: &[(&str, &str)] = &[
    ("attention.cuh", include_str!("../../kernels/attention.cuh")),
    ("attention_mma.cuh", include_str!("../../kernels/attention_mma.cuh")),
    ("common.cuh", include_str!("../../kernels/common.cuh")),
];

/// `file: [element types] [other defines, one a variant] => entry points`. For each file a module of that name, with a
/// [`Symbol`] for each entry point.
macro_rules! kernels {
    ($($file:ident: [$($element:literal)*] [$($define:literal)*] => $($symbol:ident),*;)*) => {
        $(
            #[doc = concat!("`kernels/", stringify!($file), ".cu`")]
            #[allow(non_upper_case_globals)]
            pub(crate) mod $file {
                use super::*;
                pub(crate) static SOURCE: Source = Source {
                    name: stringify!($file),
                    text: include_str!(concat!("../../kernels/", stringify!($file), ".cu")),
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
    attention_sum: ["float" "bf16" "f16"] [] => attention_backward_sum;
    cast: ["float" "bf16" "f16"] [] => cast_to_float, cast_to_bf16, cast_to_f16;
    copy: ["float" "bf16" "f16" "i64"] [] => copy_strided, copy_packed;
}
