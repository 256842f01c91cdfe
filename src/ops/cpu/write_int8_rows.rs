//! Writing rows in 8 bits on the CPU.

use crate::ops::{CacheRows, Int8Rows};
use crate::tensor::{Float, Real, Tensor};
use crate::{Result, with_float};

pub(crate) fn write_int8_rows(targets: [&mut Int8Rows; 2], xs: [&Tensor; 2], rows: &CacheRows) -> Result<()> {
    targets.into_iter().zip(xs).try_for_each(|(target, x)| write(target, x, rows))
}

fn write(target: &mut Int8Rows, x: &Tensor, rows: &CacheRows) -> Result<()> {
    let (heads, n, d, all) = (x.dim(1), x.dim(2), x.dim(3), target.numbers.dim(1));
    let x = x.dense_rows()?;
    with_float!(x.dtype(), "write_int8_rows", T => {
        let (src, l) = (x.storage_slice::<T>()?, x.layout());
        let (numbers, scales) = (target.numbers.as_mut_slice::<i8>()?, target.scales.as_mut_slice::<f32>()?);
        for (r, seen) in rows.seen().iter().enumerate() {
            for h in 0..heads {
                let (at, from) = (h * all + seen.end - 1, l.row_offset((r / n * heads + h) * n + r % n));
                scales[at] = in_8_bits(&src[from..from + d], &mut numbers[at * d..(at + 1) * d]);
            }
        }
        Ok(())
    })
}

/// The numbers of a row; returns its scale.
fn in_8_bits<T: Float>(row: &[T], numbers: &mut [i8]) -> f32 {
    // by their bits magnitudes are in order, and NaN is the largest: then the scale is NaN
    let largest = row.iter().map(|x| (x.to_acc().f64() as f32).abs().to_bits()).max().unwrap_or(0);
    let scale = f32::from_bits(largest) / 127.0;
    let step = T::Acc::of(scale.into());
    for (number, x) in numbers.iter_mut().zip(row) {
        // NaN, as of 0 / 0, becomes 0; scales that are no normal numbers may be too small to keep numbers within 127
        *number = (x.to_acc() / step).f64().round_ties_even().clamp(-127.0, 127.0) as i8;
    }
    scale
}
