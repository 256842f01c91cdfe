//! Element types. `f64` exists on the CPU only: it is what checks are measured against.

use bytemuck::Pod;
use half::{bf16, f16};
use std::fmt;
use std::ops::{Add, AddAssign, Div, Mul, MulAssign, Neg, Sub, SubAssign};

/// What one element of a tensor is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum DType {
    /// 32-bit float.
    F32,
    /// 16-bit float with the range of f32: 8 bits of exponent, 7 stored bits of mantissa.
    BF16,
    /// 16-bit float of IEEE 754: 5 bits of exponent, 10 stored bits of mantissa.
    F16,
    /// 64-bit float.
    F64,
    /// 64-bit integer: token ids, labels, indices. Has no gradient.
    I64,
    /// 8-bit integer: what a cache keeps of rows beside their scales. It is stored and moved, nothing computes in it.
    I8,
}

impl DType {
    /// Bytes of one element.
    pub const fn size(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::BF16 | Self::F16 => 2,
            Self::F64 | Self::I64 => 8,
            Self::I8 => 1,
        }
    }
    /// True for everything that has gradients.
    pub const fn is_float(self) -> bool {
        !matches!(self, Self::I64 | Self::I8)
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::F32 => "f32",
            Self::BF16 => "bf16",
            Self::F16 => "f16",
            Self::F64 => "f64",
            Self::I64 => "i64",
            Self::I8 => "i8",
        })
    }
}

impl std::str::FromStr for DType {
    type Err = crate::Error;
    fn from_str(s: &str) -> crate::Result<Self> {
        Ok(match s {
            "f32" | "float32" => Self::F32,
            "bf16" | "bfloat16" => Self::BF16,
            "f16" | "float16" => Self::F16,
            "f64" | "float64" => Self::F64,
            "i64" | "int64" => Self::I64,
            "i8" | "int8" => Self::I8,
            _ => return Err(crate::Error::Usage(format!("unknown dtype '{s}': use f32, bf16 or f16"))),
        })
    }
}

/// A Rust type that tensors can hold.
pub trait Element: Pod + Send + Sync + PartialOrd + fmt::Debug + 'static {
    /// Its dtype.
    const DTYPE: DType;
}

/// A float element and the type that arithmetic on it runs in: f32 for 16-bit and f32 elements, f64 for f64.
pub trait Float: Element {
    /// What its arithmetic runs in.
    type Acc: Real;
    /// Widen, exactly.
    fn to_acc(self) -> Self::Acc;
    /// Round to nearest even.
    fn from_acc(a: Self::Acc) -> Self;
}

/// The two types that arithmetic runs in.
pub trait Real:
    Float<Acc = Self>
    + Add<Output = Self>
    + Sub<Output = Self>
    + Mul<Output = Self>
    + Div<Output = Self>
    + Neg<Output = Self>
    + AddAssign
    + SubAssign
    + MulAssign
    + Default
    + std::iter::Sum
{
    /// 0.
    const ZERO: Self;
    /// 1.
    const ONE: Self;
    /// Minus infinity.
    const NEG_INFINITY: Self;
    /// The nearest value to x.
    fn of(x: f64) -> Self;
    /// The same value.
    fn of_i8(x: i8) -> Self;
    /// As f64, exactly.
    fn f64(self) -> f64;
    /// e^x. The f32 form is a polynomial that vectorises (2 ulp), since exponentials dominate softmax and SiLU.
    fn exp(self) -> Self;
    /// Natural logarithm.
    fn ln(self) -> Self;
    /// Square root.
    fn sqrt(self) -> Self;
    /// The larger of the two; `other` if either is NaN.
    fn maximum(self, other: Self) -> Self;
    /// `self * a + b` in one rounding. Meant for code running inside `ops::cpu::simd`, where it is one instruction.
    fn fma(self, a: Self, b: Self) -> Self;
}

macro_rules! elements {
    ($($t:ty => $d:ident),*) => { $(impl Element for $t { const DTYPE: DType = DType::$d; })* };
}
elements!(f32 => F32, bf16 => BF16, f16 => F16, f64 => F64, i64 => I64, i8 => I8);

macro_rules! floats {
    ($($t:ty: $acc:ty, $x:ident => $to:expr, $y:ident => $from:expr);* $(;)?) => { $(
        impl Float for $t {
            type Acc = $acc;
            #[inline(always)]
            fn to_acc(self) -> $acc { let $x = self; $to }
            #[inline(always)]
            fn from_acc($y: $acc) -> Self { $from }
        }
    )* };
}
floats! {
    f32: f32, x => x, y => y;
    f64: f64, x => x, y => y;
    bf16: f32, x => f32::from_bits((x.to_bits() as u32) << 16), y => bf16_round(y);
    f16: f32, x => x.to_f32(), y => f16::from_f32(y);
}

/// Round to nearest even, without a branch so that it vectorises; NaN stays a (quiet) NaN.
#[inline(always)]
fn bf16_round(y: f32) -> bf16 {
    let b = y.to_bits();
    let rounded = (b.wrapping_add(0x7fff + ((b >> 16) & 1)) >> 16) as u16;
    bf16::from_bits(if y.is_nan() { ((b >> 16) as u16) | 0x40 } else { rounded })
}

macro_rules! reals {
    ($($t:ident, $exp:expr);*) => { $(
        impl Real for $t {
            const ZERO: Self = 0.0;
            const ONE: Self = 1.0;
            const NEG_INFINITY: Self = $t::NEG_INFINITY;
            #[inline(always)]
            fn of(x: f64) -> Self { x as $t }
            #[inline(always)]
            fn of_i8(x: i8) -> Self { x.into() }
            #[inline(always)]
            fn f64(self) -> f64 { self as f64 }
            #[inline(always)]
            fn exp(self) -> Self { $exp(self) }
            #[inline(always)]
            fn ln(self) -> Self { $t::ln(self) }
            #[inline(always)]
            fn sqrt(self) -> Self { $t::sqrt(self) }
            #[inline(always)]
            fn maximum(self, other: Self) -> Self { if self > other { self } else { other } }
            #[inline(always)]
            fn fma(self, a: Self, b: Self) -> Self { $t::mul_add(self, a, b) }
        }
    )* };
}
reals!(f32, exp_f32; f64, f64::exp);

/// e^x = 2^n * e^r with n = round(x / ln 2), |r| <= ln 2 / 2, e^r by its Taylor polynomial of degree 7
/// (the remainder, r^8/8!, is below 6e-9 relative). Saturates to 0 below -87.3 and to infinity above 88.3.
#[inline(always)]
fn exp_f32(x: f32) -> f32 {
    const MAGIC: f32 = 12_582_912.0; // 1.5 * 2^23: adding it rounds to an integer in the low mantissa bits
    let clamped = if x < -87.3 { -87.3 } else { x };
    let clamped = if clamped > 88.3 { 88.3 } else { clamped };
    let n = clamped * std::f32::consts::LOG2_E + MAGIC;
    let k = n - MAGIC;
    // ln 2 in two parts, so that k * ln 2 is subtracted almost exactly
    let r = (clamped - k * 0.693_359_4) - k * -2.121_944_4e-4;
    let mut p = 1.0 / 5040.0;
    for c in [1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0] {
        p = p * r + c;
    }
    let scale = f32::from_bits(n.to_bits().wrapping_add(127).wrapping_shl(23));
    let y = p * scale;
    let y = if x < -87.3 { 0.0 } else { y };
    let y = if x > 88.3 { f32::INFINITY } else { y };
    if x.is_nan() { x } else { y }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_within_two_ulp() {
        let mut x = -87.0f32;
        while x < 88.0 {
            let (got, want) = (exp_f32(x), (x as f64).exp());
            assert!(((got as f64 - want) / want).abs() < 2.4e-7, "{x}: {got} {want}");
            x += 0.00731;
        }
        assert_eq!(exp_f32(0.0), 1.0);
        assert_eq!(exp_f32(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp_f32(f32::INFINITY), f32::INFINITY);
        assert!(exp_f32(f32::NAN).is_nan());
    }

    #[test]
    fn bf16_rounds_as_half_does() {
        for i in 0..200_000u32 {
            let y = f32::from_bits(i.wrapping_mul(0x9e37_79b1));
            if !y.is_nan() {
                assert_eq!(bf16_round(y).to_bits(), bf16::from_f32(y).to_bits());
            }
        }
        assert!(bf16_round(f32::NAN).is_nan());
    }
}
