//! PyTorch's `state_dict.pt`: a zip of `<root>/data.pkl`, a pickle that describes tensors, and of their storages, raw
//! bytes under `<root>/data/<key>`.

use super::pickle::{TensorRef, state_dict};
use super::zip::{self, Archive};
use super::{Checked, TensorFile, decode, dense_bytes, element_bytes, file, held_as, shown};
use crate::tensor::Tensor;
use crate::{Error, Result};
use std::borrow::Cow;
use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::path::Path;
use std::rc::Rc;

/// Bytes of tensors for each byte of a file. Booleans, widened to i64, take 8; more can only come of views that repeat
/// the same elements again and again.
const MAX_GROWTH: usize = 8;

/// All tensors of a PyTorch file that torch.save wrote: a state_dict, or a dict that keeps one under `state_dict`,
/// `model_state_dict` or `model`.
///
/// Prefixes `module.` and `_orig_mod.` are taken off the names. Strided tensors come contiguous; tensors that are one
/// and the same in the file share their storage. Nothing in the file is executed: a pickle that asks for anything but
/// tensors is an error that names what it asked for. Errors also on PyTorch's old format (not a zip) and on any length,
/// offset or stride that leads out of the file.
pub fn read_pt(path: &Path) -> Result<TensorFile> {
    let map = file::map(path)?;
    let tensors = parse(&map).map_err(|detail| Error::format(path, detail))?;
    Ok(TensorFile { tensors, metadata: BTreeMap::new() })
}

fn parse(file: &[u8]) -> Checked<BTreeMap<String, Tensor>> {
    if !file.starts_with(zip::MAGIC) {
        // What old files begin with is a pickle: its PROTO opcode and a version.
        return Err(if let [0x80, 2..=5, ..] = file {
            "PyTorch's old format: load it in PyTorch and save it again with torch.save(state_dict, path)".into()
        } else {
            "not a file that torch.save wrote: it is no zip".into()
        });
    }
    let entries = Archive::parse(file)?.entries;
    let roots = entries.keys().filter_map(|name| name.strip_suffix("data.pkl"));
    let mut roots = roots.filter(|root| root.is_empty() || root.ends_with('/'));
    let root = match (roots.next(), roots.next()) {
        (Some(root), None) => root,
        (Some(_), Some(_)) => return Err("a zip with more than one data.pkl".into()),
        (None, _) => return Err("not a file that torch.save wrote: its zip has no data.pkl".into()),
    };
    if let Some(order) = entries.get(&format!("{root}byteorder"))
        && *order != b"little"
    {
        return Err("its numbers are not little-endian: save it again on a little-endian machine".into());
    }
    // Copied, since strings are borrowed from it and the file could change under its map.
    let pickle = entries.get(&format!("{root}data.pkl")).copied().unwrap_or_default().to_vec();

    let mut budget = file.len().saturating_mul(MAX_GROWTH);
    let (mut tensors, mut known) = (BTreeMap::new(), BTreeMap::<Rc<TensorRef<'_>>, Tensor>::new());
    for (full_name, described) in state_dict(&pickle)? {
        let wrong = |what: String| format!("tensor '{}': {what}", shown(full_name));
        let tensor = match known.get(&described) {
            Some(same) => same.clone(),
            None => {
                let storage = entries.get(&format!("{root}data/{}", described.key));
                let storage = storage.ok_or_else(|| wrong(format!("storage '{}' is missing", shown(described.key))))?;
                let t = read(&described, storage, &mut budget).map_err(wrong)?;
                known.insert(described, t.clone());
                t
            }
        };
        match tensors.entry(bare(full_name).to_string()) {
            Entry::Vacant(free) => free.insert(tensor),
            Entry::Occupied(taken) => return Err(wrong(format!("a second tensor named '{}'", shown(taken.key())))),
        };
    }
    Ok(tensors)
}

/// A name without the prefixes that data-parallel and compiled modules add.
fn bare(mut name: &str) -> &str {
    while let Some(rest) = name.strip_prefix("module.").or_else(|| name.strip_prefix("_orig_mod.")) {
        name = rest;
    }
    name
}

/// A tensor out of its storage. `budget` is what all tensors together may still take, in bytes.
fn read(t: &TensorRef<'_>, storage: &[u8], budget: &mut usize) -> Checked<Tensor> {
    if t.storage_bytes != storage.len() {
        let (key, says, has) = (shown(t.key), t.storage_bytes, storage.len());
        return Err(format!("the pickle says {says} bytes for storage '{key}', the file has {has}"));
    }
    let bytes = dense_bytes(t.dtype, &t.shape)?;
    let size = element_bytes(t.dtype)?;
    let taken = bytes / size * held_as(t.dtype)?.size();
    *budget =
        budget.checked_sub(taken).ok_or("it and those before repeat the file's data too often: save copies of views")?;
    if bytes == 0 {
        return decode(&[], t.dtype, &t.shape);
    }
    // offset + sum (size - 1) * stride is the last element.
    let reach = t.shape.iter().zip(&t.strides).try_fold(t.offset, |at, (&d, &s)| at.checked_add((d - 1).checked_mul(s)?));
    if reach.is_none_or(|last| last >= storage.len() / size) {
        let (shape, strides, offset) = (&t.shape, &t.strides, t.offset);
        let what = format!("shape {shape:?}, strides {strides:?}, offset {offset} reach past its storage's");
        return Err(format!("{what} {} elements", storage.len() / size));
    }
    decode(&dense(t, storage, size, bytes), t.dtype, &t.shape)
}

/// The elements in row-major order: the storage's own bytes where they lie so, else gathered. All checks are done.
fn dense<'s>(t: &TensorRef<'_>, storage: &'s [u8], size: usize, bytes: usize) -> Cow<'s, [u8]> {
    let mut expect = 1;
    let in_order = t.shape.iter().zip(&t.strides).rev().all(|(&d, &s)| {
        let fits = d == 1 || s == expect;
        expect *= d;
        fits
    });
    if in_order {
        return Cow::Borrowed(&storage[t.offset * size..][..bytes]);
    }
    let mut out = Vec::with_capacity(bytes);
    let mut index = vec![0; t.shape.len()];
    let mut at = t.offset;
    while out.len() < bytes {
        out.extend_from_slice(&storage[at * size..][..size]);
        for d in (0..index.len()).rev() {
            index[d] += 1;
            at += t.strides[d];
            if index[d] < t.shape[d] {
                break;
            }
            at -= t.strides[d] * t.shape[d];
            index[d] = 0;
        }
    }
    Cow::Owned(out)
}

#[cfg(test)]
mod tests {
    use super::super::pickle::tests::{dict, tensor};
    use super::super::zip::tests::zip;
    use super::*;

    /// A PyTorch file of this pickle and storage 0 of the floats 0, 1, 2, ..
    fn file(pickle: &[u8], floats: usize) -> Vec<u8> {
        let storage: Vec<u8> = (0..floats).flat_map(|i| (i as f32).to_le_bytes()).collect();
        zip(&[("m/data.pkl", pickle), ("m/byteorder", b"little"), ("m/data/0", &storage)], |_, _| ())
    }
    fn one(floats: i64, offset: i64, shape: &[i64], strides: &[i64]) -> Checked<Tensor> {
        let pickle = dict(&[("t", tensor("0", floats, offset, shape, strides))]);
        parse(&file(&pickle, 12)).map(|mut t| t.remove("t").unwrap())
    }

    #[test]
    fn strides_gather_in_row_major_order() {
        let values = |offset, shape: &[i64], strides: &[i64]| one(12, offset, shape, strides).unwrap().to_f32_vec().unwrap();
        assert_eq!(values(0, &[2, 3], &[3, 1]), [0., 1., 2., 3., 4., 5.]);
        assert_eq!(values(6, &[2, 3], &[3, 1]), [6., 7., 8., 9., 10., 11.]);
        assert_eq!(values(1, &[3, 2], &[1, 4]), [1., 5., 2., 6., 3., 7.]);
        assert_eq!(values(11, &[2, 2], &[0, 0]), [11.; 4]);
        assert_eq!(values(4, &[], &[]), [4.]);
        assert_eq!(values(5, &[1, 2, 1], &[i64::MAX, 2, i64::MAX]), [5., 7.]);
        assert_eq!(one(12, 0, &[0, 5], &[5, 1]).unwrap().shape(), [0, 5]);
    }

    #[test]
    fn what_leads_out_of_the_storage_is_refused() {
        assert!(one(13, 0, &[1], &[1]).unwrap_err().contains("says 52 bytes for storage '0', the file has 48"));
        assert!(one(11, 0, &[1], &[1]).is_err());
        assert!(one(1 << 60, 0, &[1 << 60], &[1]).unwrap_err().contains("says"));
        for (offset, shape, strides) in [
            (12, &[1][..], &[1][..]),
            (0, &[13], &[1]),
            (1, &[2, 6], &[6, 1]),
            (0, &[2], &[12]),
            (0, &[2], &[i64::MAX]),
            (i64::MAX, &[2], &[i64::MAX]),
            (0, &[2, 2, 2, 2], &[i64::MAX; 4]),
        ] {
            let error = one(12, offset, shape, strides).unwrap_err();
            assert!(error.contains("reach past its storage's 12 elements"), "{error}");
        }
        assert!(one(12, 0, &[1 << 40], &[0]).unwrap_err().contains("too often"));
        assert!(one(12, 0, &[1 << 62, 4], &[0, 0]).unwrap_err().contains("too many elements"));
        assert!(one(12, 0, &[0, 1 << 62, 4], &[0, 0, 0]).unwrap_err().contains("too many elements"));
    }

    #[test]
    fn repeated_views_stay_within_the_budget_and_aliases_are_free() {
        let names: Vec<String> = (0..400).map(|i| i.to_string()).collect();
        let many = |shift: bool| {
            let view = |i: i64| tensor("0", 50_000, i * shift as i64, &[49_000], &[1]);
            let items: Vec<_> = (0..).zip(&names).map(|(i, n)| (n.as_str(), view(i))).collect();
            parse(&file(&dict(&items), 50_000))
        };
        assert_eq!(many(false).unwrap().len(), 400);
        assert!(many(true).unwrap_err().contains("too often"));
    }

    #[test]
    fn prefixes_come_off_in_any_order() {
        assert_eq!(bare("module._orig_mod.module.a.module.b"), "a.module.b");
        assert_eq!(bare("_orig_mod.module.a"), "a");
        let t = || tensor("0", 12, 0, &[1], &[1]);
        let two = dict(&[("module.a", t()), ("_orig_mod.a", t())]);
        assert!(parse(&file(&two, 12)).unwrap_err().contains("second tensor named 'a'"));
    }

    #[test]
    fn zips_that_torch_does_not_write_are_refused() {
        let pickle = dict(&[("t", tensor("0", 1, 0, &[1], &[1]))]);
        let refused = |entries: &[(&str, &[u8])]| parse(&zip(entries, |_, _| ())).unwrap_err();
        assert!(refused(&[("m/other", &pickle)]).contains("no data.pkl"));
        assert!(refused(&[("m/data.pkl", &pickle), ("n/data.pkl", &pickle)]).contains("more than one data.pkl"));
        assert!(refused(&[("m/data.pkl", &pickle), ("m/byteorder", b"big")]).contains("little-endian"));
        assert!(refused(&[("m/data.pkl", &pickle)]).contains("storage '0' is missing"));
        assert!(refused(&[("m/data.pkl", &pickle), ("n/data/0", &[0; 4])]).contains("storage '0' is missing"));
        assert!(parse(b"hello").unwrap_err().contains("no zip"));
        assert!(parse(&[0x80, 2, 0x8a]).unwrap_err().contains("old format"));
    }
}
