//! Every op, through one harness, from one table.
//!
//! # Adding a row
//!
//! In the module that fits (`elementwise`, `products`, `views`, `layers`), an entry of `table!`:
//!
//! ```text
//! my_op, large [d0, d1, d2, d3], |d| { .. Case::one(inputs, op, formula) };
//! ```
//!
//! - `d: &mut Draw` holds four drawn sizes `d.dims` (1, small, off vector widths; at most one above 7), and draws
//!   inputs (`d.input(shape, low, high)`), indices and numbers. `large` are sizes that make more than one parallel task.
//! - `op: Fn(&[Var]) -> Result<Var>` runs the op on the inputs; indices and the like are captured.
//! - `formula: Fn(&[Array]) -> Array` is the definition, written plainly and apart from the op, on [`num::Num`].
//!   An intermediate result that the op keeps in its dtype is marked `.stored()`.
//!
//! That is all: outputs, gradients and tolerances are derived from the formula. Each draw goes through
//!
//! 1. finite differences in f64;
//! 2. forward and backward in f64, f32, bf16 and f16 against the formula in f64 on the same rounded inputs, each element
//!    within 2 times the error bound of a naive implementation in that dtype (see `num.rs`);
//! 3. two backward passes into the same gradients, against twice the formula's;
//! 4. 1 and 3 threads, bit for bit;
//! 5. on a CUDA device, where there is one: 2, 3 and the layouts of 6 in f32, bf16 and f16 within the same bounds, and
//!    the same bits when run again;
//! 6. strided inputs and output gradients (permuted, narrowed with an offset, every other row, expanded), bit for bit
//!    like contiguous copies.
//!
//! `Case::new` takes ops with several outputs; `.sums_as_stored()` and `.loss()` are exceptions that say why.
//! PROPTEST_CASES sets the number of draws.

#[path = "../common/devices.rs"]
mod devices;
mod harness;
mod num;

/// A test for every row.
macro_rules! table {
    ($($name:ident, large $large:expr, $draw:expr;)*) => { $(
        #[test]
        fn $name() {
            crate::harness::check(crate::harness::Row { name: stringify!($name), large: $large, draw: $draw });
        }
    )* };
}

mod apart;
mod elementwise;
mod errors;
mod layers;
mod products;
mod views;
