//! safetensors: 8 bytes of header length, a JSON header naming dtype, shape and byte range of each tensor, the bytes.
//! <https://github.com/huggingface/safetensors>, whose types for the header are used here. The checks are our own: they
//! name the tensor and the problem, see names given twice, and hold for sizes that overflow when added up.

use super::{Checked, TensorFile, decode, dense_bytes, file, shown, write_atomically};
use crate::tensor::{DType, Device, Tensor};
use crate::{Error, Result, with_element};
use ::safetensors::{Dtype, tensor::TensorInfo};
use serde::de::{Deserialize, Deserializer, Error as _, MapAccess, Visitor};
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

/// Longer headers are refused, as by the format's own library.
const MAX_HEADER: u64 = 100_000_000;
const METADATA: &str = "__metadata__";

/// All tensors and the metadata of a safetensors file.
///
/// f32, f64, bf16, f16 and i64 stay what they are; smaller integers and booleans become i64. Errors when the header
/// lies about lengths, ranges overlap or leave gaps, a dtype is not supported, a name occurs twice, or bytes are missing
/// or left over.
pub fn read_safetensors(path: &Path) -> Result<TensorFile> {
    let map = file::map(path)?;
    parse(&map).map_err(|detail| Error::format(path, detail))
}

fn parse(file: &[u8]) -> Checked<TensorFile> {
    let Some((length, rest)) = file.split_first_chunk::<8>() else {
        return Err(format!("not safetensors: {} bytes, a header length takes 8", file.len()));
    };
    let length = u64::from_le_bytes(*length);
    if length > MAX_HEADER {
        return Err(format!("not safetensors: its first 8 bytes say a header of {length} bytes"));
    }
    let Some((header, data)) = rest.split_at_checked(length as usize) else {
        return Err(format!("cut short: a header of {length} bytes, {} bytes in the file", file.len()));
    };
    let mut header: Header =
        serde_json::from_slice(header).map_err(|e| format!("broken safetensors header: {}", shown(&e.to_string())))?;

    header.tensors.sort_by_key(|(_, info)| info.data_offsets);
    let mut at = 0;
    for (name, info) in &header.tensors {
        let wrong = |what: String| format!("tensor '{}': {what}", shown(name));
        let (begin, end) = info.data_offsets;
        if begin != at || end < begin {
            let what = if begin < at { "overlap the tensor before" } else { "leave a gap or run backwards" };
            return Err(wrong(format!("its bytes {begin}..{end} {what} (which ends at {at})")));
        }
        if end > data.len() {
            return Err(wrong(format!("its bytes {begin}..{end} lie past the end of the data ({} bytes)", data.len())));
        }
        let need = dense_bytes(info.dtype, &info.shape).map_err(wrong)?;
        if end - begin != need {
            let (dtype, shape, got) = (info.dtype, &info.shape, end - begin);
            return Err(wrong(format!("{dtype} of shape {shape:?} takes {need} bytes, not {got}")));
        }
        at = end;
    }
    if at != data.len() {
        return Err(format!("{} bytes follow the last tensor: they belong to none", data.len() - at));
    }
    let tensor = |(name, info): (String, TensorInfo)| {
        let (begin, end) = info.data_offsets;
        match decode(&data[begin..end], info.dtype, &info.shape) {
            Ok(t) => Ok((name, t)),
            Err(what) => Err(format!("tensor '{}': {what}", shown(&name))),
        }
    };
    let tensors = header.tensors.into_iter().map(tensor).collect::<Checked<_>>()?;
    Ok(TensorFile { tensors, metadata: header.metadata })
}

/// The JSON header as it stands, no name twice.
#[derive(Default)]
struct Header {
    metadata: BTreeMap<String, String>,
    tensors: Vec<(String, TensorInfo)>,
}

impl<'de> Deserialize<'de> for Header {
    fn deserialize<D: Deserializer<'de>>(d: D) -> std::result::Result<Self, D::Error> {
        struct Names;
        impl<'de> Visitor<'de> for Names {
            type Value = Header;
            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("an object of tensor names")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> std::result::Result<Header, A::Error> {
                let mut header = Header::default();
                let mut seen = BTreeSet::new();
                while let Some(name) = map.next_key::<String>()? {
                    if name == METADATA {
                        header.metadata = map.next_value::<UniqueMap>()?.0;
                    } else {
                        header.tensors.push((name.clone(), map.next_value()?));
                    }
                    if let Some(twice) = seen.replace(name) {
                        return Err(A::Error::custom(format_args!("'{twice}' is there twice")));
                    }
                }
                Ok(header)
            }
        }
        d.deserialize_map(Names)
    }
}

/// A JSON object of strings, no key twice (a plain map would keep the last).
pub(super) struct UniqueMap(pub BTreeMap<String, String>);

impl<'de> Deserialize<'de> for UniqueMap {
    fn deserialize<D: Deserializer<'de>>(d: D) -> std::result::Result<Self, D::Error> {
        struct Strings;
        impl<'de> Visitor<'de> for Strings {
            type Value = UniqueMap;
            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("an object of strings")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> std::result::Result<UniqueMap, A::Error> {
                let mut strings = BTreeMap::new();
                while let Some((key, value)) = map.next_entry::<String, String>()? {
                    if strings.contains_key(&key) {
                        return Err(A::Error::custom(format_args!("'{key}' is there twice")));
                    }
                    strings.insert(key, value);
                }
                Ok(UniqueMap(strings))
            }
        }
        d.deserialize_map(Strings)
    }
}

/// Write tensors as one safetensors file, tensor by tensor, appearing whole or not at all.
///
/// Wider elements come first, so that each tensor is aligned to its elements; otherwise the order given is kept, and
/// equal arguments give equal bytes. Read again, i8 is i64 as every smaller integer is. Errors when a name occurs twice or is `__metadata__`, or when the file cannot be
/// written.
pub fn write_safetensors(path: &Path, tensors: &[(&str, &Tensor)], metadata: &BTreeMap<String, String>) -> Result<()> {
    let mut tensors = tensors.to_vec();
    tensors.sort_by_key(|(_, t)| std::cmp::Reverse(t.dtype().size()));
    let header = header_json(&tensors, metadata).map_err(|detail| Error::format(path, detail))?;
    write_atomically(path, |out| {
        let mut put = |bytes: &[u8]| out.write_all(bytes).map_err(Error::io("write", path));
        put(&(header.len() as u64).to_le_bytes())?;
        put(header.as_bytes())?;
        for (_, t) in &tensors {
            let t = t.to_device(Device::Cpu)?.contiguous()?;
            with_element!(t.dtype(), "write_safetensors", T => put(bytemuck::cast_slice(t.as_slice::<T>()?)))?;
        }
        Ok(())
    })
}

fn header_json(tensors: &[(&str, &Tensor)], metadata: &BTreeMap<String, String>) -> Checked<String> {
    let json = |value: serde_json::Result<String>| value.map_err(|e| e.to_string());
    let mut entries = Vec::with_capacity(tensors.len() + 1);
    if !metadata.is_empty() {
        entries.push(format!("\"{METADATA}\":{}", json(serde_json::to_string(metadata))?));
    }
    let (mut at, mut seen) = (0, BTreeSet::from([METADATA]));
    for &(name, t) in tensors {
        if !seen.insert(name) {
            return Err(format!("cannot write two entries named '{}'", shown(name)));
        }
        let dtype = match t.dtype() {
            DType::F32 => Dtype::F32,
            DType::F64 => Dtype::F64,
            DType::BF16 => Dtype::BF16,
            DType::F16 => Dtype::F16,
            DType::I64 => Dtype::I64,
            DType::I8 => Dtype::I8,
        };
        let end = at + t.numel() * t.dtype().size();
        let info = TensorInfo { dtype, shape: t.shape().to_vec(), data_offsets: (at, end) };
        entries.push(format!("{}:{}", json(serde_json::to_string(name))?, json(serde_json::to_string(&info))?));
        at = end;
    }
    let mut header = format!("{{{}}}", entries.join(","));
    // Padded with spaces, so that the data begins at a multiple of 8.
    header.extend(std::iter::repeat_n(' ', header.len().next_multiple_of(8) - header.len()));
    Ok(header)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn framed(header: &str, data: &[u8]) -> Vec<u8> {
        [&(header.len() as u64).to_le_bytes(), header.as_bytes(), data].concat()
    }
    fn refused(header: &str, data: &[u8]) -> String {
        parse(&framed(header, data)).map(|f| f.tensors).unwrap_err()
    }
    fn f32s(shape: &str, begin: u64, end: u64) -> String {
        format!(r#"{{"dtype":"F32","shape":{shape},"data_offsets":[{begin},{end}]}}"#)
    }

    #[test]
    fn lying_headers_are_refused_by_name() {
        assert!(parse(b"short").unwrap_err().contains("5 bytes"));
        assert!(parse(&u64::MAX.to_le_bytes()).unwrap_err().contains("18446744073709551615"));
        assert!(parse(&[99, 0, 0, 0, 0, 0, 0, 0, b'{', b'}']).unwrap_err().contains("cut short"));
        let one = |info: &str, data: &[u8]| refused(&format!(r#"{{"t":{info}}}"#), data);
        assert!(one(&f32s("[2]", 0, 8), &[0; 7]).contains("past the end"));
        assert!(one(&f32s("[2]", 0, 8), &[0; 9]).contains("1 bytes follow"));
        assert!(one(&f32s("[3]", 0, 8), &[0; 8]).contains("takes 12 bytes, not 8"));
        assert!(one(&f32s("[2]", 4, 12), &[0; 12]).contains("gap"));
        assert!(one(&f32s("[2]", 0, u64::MAX), &[0; 8]).contains("past the end"));
        assert!(one(&f32s("[9223372036854775807,4]", 0, 8), &[0; 8]).contains("too many elements"));
        assert!(one(&f32s("[0,4611686018427387904,4611686018427387904]", 0, 0), &[]).contains("too many elements"));
        assert!(one(&f32s("[-1]", 0, 0), &[]).contains("broken safetensors header"));
        assert!(one(r#"{"dtype":"F31","shape":[],"data_offsets":[0,4]}"#, &[0; 4]).contains("F31"));
        assert!(one(r#"{"dtype":"F8_E4M3","shape":[1],"data_offsets":[0,1]}"#, &[0; 1]).contains("F8_E4M3"));
        let (a, b) = (f32s("[2]", 0, 8), f32s("[2]", 4, 12));
        assert!(refused(&format!(r#"{{"a":{a},"b":{b}}}"#), &[0; 12]).contains("'b': its bytes 4..12 overlap"));
        assert!(refused(&format!(r#"{{"a":{a},"a":{a}}}"#), &[0; 8]).contains("'a' is there twice"));
        assert!(refused(r#"{"__metadata__":{"k":"1","k":"2"}}"#, &[]).contains("'k' is there twice"));
        assert!(refused(&"[".repeat(100_000), &[]).contains("broken safetensors header"));
    }

    #[test]
    fn sizes_that_wrap_around_in_their_sum_are_refused() {
        // Eight tensors of 2^61 bytes: their ends reach 2^64, where an unchecked sum starts again at 0.
        let (size, mut header) = (1u64 << 61, String::from("{"));
        for i in 0..8u64 {
            let end = (i + 1).saturating_mul(size);
            header += &format!(r#""t{i}":{{"dtype":"U8","shape":[{size}],"data_offsets":[{},{end}]}},"#, i * size);
        }
        header.pop();
        assert!(refused(&(header + "}"), &[0; 16]).contains("past the end"));
    }

    #[test]
    fn odd_but_honest_files_are_read() {
        let (a, b) = (f32s("[]", 8, 12), f32s("[2]", 0, 8));
        let file = framed(&format!(r#" {{"a":{a},"z":{},"b":{b}}}  "#, f32s("[0,3]", 8, 8)), &[0; 12]);
        let read = parse(&file).unwrap().tensors;
        assert_eq!(read.keys().collect::<Vec<_>>(), ["a", "b", "z"]);
        assert_eq!(read["z"].shape(), [0, 3]);
        assert!(parse(&framed("{}", &[])).unwrap().tensors.is_empty());
    }
}
