//! Weight files (spec section 6): safetensors, whole or in shards, and PyTorch's `state_dict.pt`.
//!
//! Reading runs nothing that a file says and believes no length in it: every offset is checked against the file's size
//! before memory is taken, and the tensors of a file stay within eight times its size. Writing appears whole or not at all.

mod file;
mod pickle;
mod pt;
mod safetensors;
mod shards;
mod zip;

pub use file::write_atomically;
pub use pt::read_pt;
pub use safetensors::{read_safetensors, write_safetensors};
pub use shards::{read_index, save_sharded};

use crate::tensor::{DType, Tensor};
use crate::{Error, Result};
use ::safetensors::Dtype;
use std::collections::BTreeMap;
use std::path::Path;

/// What a weight file holds.
#[derive(Debug, Default)]
pub struct TensorFile {
    /// Tensors by name, contiguous, on the CPU.
    pub tensors: BTreeMap<String, Tensor>,
    /// Free text by key: the `__metadata__` of safetensors; empty for PyTorch files.
    pub metadata: BTreeMap<String, String>,
}

/// One file of weights in a model folder.
pub const WEIGHTS: &str = "model.safetensors";
/// The index that says which shard holds which tensor.
pub const INDEX: &str = "model.safetensors.index.json";
/// PyTorch's names for its weights.
const PYTORCH: [&str; 2] = ["state_dict.pt", "pytorch_model.bin"];

/// What is wrong with a file, in words; whoever knows the path adds it.
type Checked<T> = std::result::Result<T, String>;

/// The weights of a model folder or of a single file, with the file's metadata.
///
/// A folder is searched for `model.safetensors`, `model.safetensors.index.json`, `state_dict.pt` and
/// `pytorch_model.bin`, in this order. Errors when there is none of them, or when the file is not what it should be.
pub fn load(dir_or_file: &Path) -> Result<TensorFile> {
    if !dir_or_file.is_dir() {
        return load_file(dir_or_file);
    }
    let names = [WEIGHTS, INDEX, PYTORCH[0], PYTORCH[1]];
    match names.iter().map(|n| dir_or_file.join(n)).find(|p| p.is_file()) {
        Some(path) => load_file(&path),
        None => Err(Error::format(dir_or_file, format!("no weights in this folder: it needs one of {}", names.join(", ")))),
    }
}

/// The tensors of [`load`], by name.
pub fn load_tensors(dir_or_file: &Path) -> Result<BTreeMap<String, Tensor>> {
    Ok(load(dir_or_file)?.tensors)
}

fn load_file(path: &Path) -> Result<TensorFile> {
    match path.extension().and_then(|e| e.to_str()) {
        Some("json") => read_index(path),
        Some("pt" | "pth" | "bin") => read_pt(path),
        Some("safetensors") => read_safetensors(path),
        _ if file::map(path)?.starts_with(zip::MAGIC) => read_pt(path),
        _ => read_safetensors(path),
    }
}

/// Deeper shapes than this are no tensors but an attempt to use up memory.
const MAX_RANK: usize = 16;

/// Bytes of a dense tensor, or what is wrong with its shape. Zero sizes count as one against overflow, since strides
/// are products of the sizes behind them.
fn dense_bytes(dtype: Dtype, shape: &[usize]) -> Checked<usize> {
    if shape.len() > MAX_RANK {
        return Err(format!("{} dimensions, more than {MAX_RANK}", shape.len()));
    }
    let size = element_bytes(dtype)?;
    let extent = shape.iter().try_fold(size, |n, &d| n.checked_mul(d.max(1))).filter(|&n| n <= isize::MAX as usize / 8);
    match extent {
        Some(_) if shape.contains(&0) => Ok(0),
        Some(n) => Ok(n),
        None => Err(format!("shape {shape:?} has too many elements")),
    }
}

/// What a tensor holds a file's dtype as; every integer dtype becomes i64.
fn held_as(dtype: Dtype) -> Checked<DType> {
    use Dtype::*;
    Ok(match dtype {
        F32 => DType::F32,
        F64 => DType::F64,
        BF16 => DType::BF16,
        F16 => DType::F16,
        I64 | I32 | I16 | I8 | U64 | U32 | U16 | U8 | BOOL => DType::I64,
        _ => return Err(format!("dtype {dtype} is not supported: convert it to F32, BF16, F16, F64 or an integer dtype")),
    })
}

/// Bytes of one element in a file; errors on dtypes that tensors cannot take.
fn element_bytes(dtype: Dtype) -> Checked<usize> {
    held_as(dtype)?;
    Ok(dtype.bitsize() / 8)
}

/// A tensor of dense little-endian bytes; integers and booleans become i64.
fn decode(bytes: &[u8], dtype: Dtype, shape: &[usize]) -> Checked<Tensor> {
    let need = dense_bytes(dtype, shape)?;
    if bytes.len() != need {
        return Err(format!("{} bytes where {dtype} of shape {shape:?} needs {need}", bytes.len()));
    }
    match dtype {
        Dtype::BOOL => widen(bytes, shape, |[b]: [u8; 1]| Some((b != 0) as i64)),
        Dtype::U8 => widen(bytes, shape, |b| Some(u8::from_le_bytes(b) as i64)),
        Dtype::I8 => widen(bytes, shape, |b| Some(i8::from_le_bytes(b) as i64)),
        Dtype::U16 => widen(bytes, shape, |b| Some(u16::from_le_bytes(b) as i64)),
        Dtype::I16 => widen(bytes, shape, |b| Some(i16::from_le_bytes(b) as i64)),
        Dtype::U32 => widen(bytes, shape, |b| Some(u32::from_le_bytes(b) as i64)),
        Dtype::I32 => widen(bytes, shape, |b| Some(i32::from_le_bytes(b) as i64)),
        Dtype::U64 => widen(bytes, shape, |b| i64::try_from(u64::from_le_bytes(b)).ok()),
        _ => Tensor::from_bytes(bytes, held_as(dtype)?, shape).map_err(|e| e.to_string()),
    }
}

fn widen<const N: usize>(bytes: &[u8], shape: &[usize], int: impl Fn([u8; N]) -> Option<i64>) -> Checked<Tensor> {
    let mut t = Tensor::unspecified(shape, DType::I64);
    let out = t.as_mut_slice::<i64>().map_err(|e| e.to_string())?;
    for (x, &b) in out.iter_mut().zip(bytes.as_chunks::<N>().0) {
        *x = int(b).ok_or("a U64 element does not fit i64")?;
    }
    Ok(t)
}

/// Text out of a file as one short line of printable characters.
fn shown(text: &str) -> String {
    const MAX: usize = 200;
    let mut line = String::new();
    for c in text.chars().take(MAX) {
        match c {
            '\'' | '"' => line.push(c),
            _ => line.extend(c.escape_debug()),
        }
    }
    if text.chars().nth(MAX).is_some() {
        line.push_str("...");
    }
    line
}

/// Names out of a file as one line; all of them, short of thousands.
pub(super) fn listed<'a>(names: impl IntoIterator<Item = &'a str>) -> String {
    const MAX: usize = 1000;
    let mut names = names.into_iter();
    let mut line = names.by_ref().take(MAX).map(shown).collect::<Vec<_>>().join(", ");
    match names.count() {
        0 => {}
        more => line.push_str(&format!(" and {more} more")),
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn integers_widen_with_their_sign() {
        let ints = |bytes: &[u8], d| decode(bytes, d, &[bytes.len() / element_bytes(d).unwrap()]).unwrap().to_vec::<i64>();
        assert_eq!(ints(&[0, 1, 2], Dtype::BOOL).unwrap(), [0, 1, 1]);
        assert_eq!(ints(&[255, 1], Dtype::U8).unwrap(), [255, 1]);
        assert_eq!(ints(&[255, 1], Dtype::I8).unwrap(), [-1, 1]);
        assert_eq!(ints(&[255, 255], Dtype::U16).unwrap(), [65535]);
        assert_eq!(ints(&[254, 255], Dtype::I16).unwrap(), [-2]);
        assert_eq!(ints(&[255; 4], Dtype::U32).unwrap(), [u32::MAX as i64]);
        assert_eq!(ints(&[255; 4], Dtype::I32).unwrap(), [-1]);
        assert_eq!(ints(&[5, 0, 0, 0, 0, 0, 0, 0], Dtype::U64).unwrap(), [5]);
        assert!(decode(&[255; 8], Dtype::U64, &[1]).is_err());
        assert!(decode(&[0; 8], Dtype::C64, &[1]).unwrap_err().contains("C64"));
    }

    #[test]
    fn shapes_that_overflow_are_refused_even_when_empty() {
        for shape in [&[usize::MAX, 2][..], &[0, 1 << 62, 1 << 62], &[1 << 62, 1 << 62, 0], &[1; 17]] {
            assert!(dense_bytes(Dtype::F32, shape).is_err(), "{shape:?}");
        }
        assert!(Tensor::zeros(&[0, 1 << 62, 1 << 62], DType::F32, Default::default()).is_err());
        assert_eq!(dense_bytes(Dtype::BF16, &[]), Ok(2));
        assert_eq!(dense_bytes(Dtype::BF16, &[3, 0, 4]), Ok(0));
    }

    #[test]
    fn text_of_a_file_stays_one_line() {
        assert_eq!(shown("'a'\nb\u{1b}["), "'a'\\nb\\u{1b}[");
        assert_eq!(shown(&"x".repeat(999)).len(), 203);
        assert_eq!(listed(["a", "b"]), "a, b");
        assert!(listed(vec!["n"; 1003]).ends_with(" and 3 more"));
    }
}
