//! What the names in a torch.save pickle stand for: storages, tensors over them, and where the state_dict is.

use super::{Machine, Object, Value};
use crate::model::formats::{Checked, MAX_RANK, element_bytes, shown};
use ::safetensors::Dtype;
use std::rc::Rc;

/// Keys under which training scripts keep a state_dict beside other things.
const WRAPPERS: [&str; 3] = ["state_dict", "model_state_dict", "model"];
/// Wrappers in wrappers end here: a pickle can hold itself.
const MAX_WRAPPED: usize = 4;

/// A tensor as the pickle describes it. Nothing is checked against the storage yet.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(in crate::model::formats) struct TensorRef<'a> {
    /// Name of the zip entry under `data/`.
    pub key: &'a str,
    /// Bytes that the pickle says the storage has.
    pub storage_bytes: usize,
    pub dtype: Dtype,
    /// In elements, as the strides.
    pub offset: usize,
    pub shape: Vec<usize>,
    pub strides: Vec<usize>,
}

/// The names that a pickle may import.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Global {
    OrderedDict,
    /// `(storage, offset, shape, strides, requires_grad, hooks)`
    RebuildTensorV2,
    /// The same with a dtype behind, over a storage of bytes.
    RebuildTensorV3,
    /// `(tensor, requires_grad, hooks)`
    RebuildParameter,
    /// The class of a storage; the one without a dtype counts bytes.
    Storage(Option<Dtype>),
    DType(Dtype),
}

impl Global {
    pub(super) fn find(module: &str, name: &str) -> Checked<Self> {
        Ok(match (module, name) {
            ("collections", "OrderedDict") => Self::OrderedDict,
            ("torch._utils", "_rebuild_tensor_v2") => Self::RebuildTensorV2,
            ("torch._utils", "_rebuild_tensor_v3") => Self::RebuildTensorV3,
            ("torch._utils", "_rebuild_parameter") => Self::RebuildParameter,
            ("torch.storage", "UntypedStorage") => Self::Storage(None),
            ("torch", "FloatStorage") => Self::Storage(Some(Dtype::F32)),
            ("torch", "DoubleStorage") => Self::Storage(Some(Dtype::F64)),
            ("torch", "HalfStorage") => Self::Storage(Some(Dtype::F16)),
            ("torch", "BFloat16Storage") => Self::Storage(Some(Dtype::BF16)),
            ("torch", "LongStorage") => Self::Storage(Some(Dtype::I64)),
            ("torch", "IntStorage") => Self::Storage(Some(Dtype::I32)),
            ("torch", "ShortStorage") => Self::Storage(Some(Dtype::I16)),
            ("torch", "CharStorage") => Self::Storage(Some(Dtype::I8)),
            ("torch", "ByteStorage") => Self::Storage(Some(Dtype::U8)),
            ("torch", "BoolStorage") => Self::Storage(Some(Dtype::BOOL)),
            ("torch", "uint16") => Self::DType(Dtype::U16),
            ("torch", "uint32") => Self::DType(Dtype::U32),
            ("torch", "uint64") => Self::DType(Dtype::U64),
            _ => {
                return Err(format!(
                    "its pickle asks for '{}.{}', which no plain state_dict needs (nothing was executed): \
                     save it again with torch.save(model.state_dict(), path)",
                    shown(module),
                    shown(name)
                ));
            }
        })
    }
}

impl<'a> Machine<'a> {
    fn tuple(&self, value: Value<'a>) -> Checked<&[Value<'a>]> {
        match value {
            Value::Object(i) => match &self.objects[i] {
                Object::Tuple(items) => Ok(items),
                _ => Err("needs a tuple".into()),
            },
            _ => Err("needs a tuple".into()),
        }
    }

    /// `("storage", class, key, location, number of elements)` becomes a storage.
    pub(super) fn persistent(&mut self) -> Checked<()> {
        let id = self.pop()?;
        let &[Value::Str("storage"), Value::Global(Global::Storage(dtype)), Value::Str(key), _, n] = self.tuple(id)? else {
            return Err("a persistent id that describes no storage".into());
        };
        let size = dtype.map_or(Ok(1), element_bytes)?;
        let bytes = size_of_value(n)?.checked_mul(size).ok_or("a storage says more bytes than memory can have")?;
        self.push_object(Object::Storage { key, bytes, dtype })
    }

    pub(super) fn reduce(&mut self) -> Checked<()> {
        let (args, callee) = (self.pop()?, self.pop()?);
        let args = self.tuple(args)?;
        let (storage, place, dtype) = match (callee, args) {
            (Value::Global(Global::OrderedDict), []) => return self.push_object(Object::Dict(Vec::new())),
            (Value::Global(Global::RebuildParameter), &[Value::Object(t), ..]) if self.is_tensor(t) => {
                return self.push(Value::Object(t));
            }
            (Value::Global(Global::RebuildTensorV2), &[Value::Object(s), offset, shape, strides, _, _, ..]) => {
                (s, [offset, shape, strides], None)
            }
            (
                Value::Global(Global::RebuildTensorV3),
                &[Value::Object(s), offset, shape, strides, _, _, Value::Global(Global::DType(dtype)), ..],
            ) => (s, [offset, shape, strides], Some(dtype)),
            (Value::Global(g), args) => return Err(format!("{g:?} with {} arguments that do not fit it", args.len())),
            _ => return Err("calls what is no imported name".into()),
        };
        let &Object::Storage { key, bytes, dtype: stored } = &self.objects[storage] else {
            return Err("a tensor without a storage".into());
        };
        let (Some(dtype), true) = (dtype.or(stored), dtype.is_none() || stored.is_none()) else {
            return Err("a tensor whose dtype contradicts its storage".into());
        };
        let [offset, shape, strides] = place;
        let (shape, strides) = (self.sizes(shape)?, self.sizes(strides)?);
        if shape.len() != strides.len() {
            return Err(format!("a tensor of {} dimensions with {} strides", shape.len(), strides.len()));
        }
        let offset = size_of_value(offset)?;
        let tensor = TensorRef { key, storage_bytes: bytes, dtype, offset, shape, strides };
        self.push_object(Object::Tensor(Rc::new(tensor)))
    }

    fn sizes(&self, value: Value<'a>) -> Checked<Vec<usize>> {
        let items = self.tuple(value)?;
        if items.len() > MAX_RANK {
            return Err(format!("a tensor of {} dimensions, more than {MAX_RANK}", items.len()));
        }
        items.iter().map(|&i| size_of_value(i)).collect()
    }

    fn is_tensor(&self, object: usize) -> bool {
        matches!(self.objects[object], Object::Tensor(_))
    }

    /// The tensors of a dict, or of the dict that it keeps under one of [`WRAPPERS`].
    pub(super) fn tensors_under(&self, root: Value<'a>) -> Checked<Vec<(&'a str, Rc<TensorRef<'a>>)>> {
        let dict = |value| match value {
            Value::Object(i) => match &self.objects[i] {
                Object::Dict(entries) => Some(entries),
                _ => None,
            },
            _ => None,
        };
        let mut entries = dict(root).ok_or("its pickle is no dict of names to tensors: save a state_dict")?;
        for _ in 0..MAX_WRAPPED {
            let under = |wrapper: &str| {
                let last = entries.iter().rev().find(|(k, _)| matches!(k, Value::Str(k) if *k == wrapper));
                last.and_then(|&(_, v)| dict(v))
            };
            match WRAPPERS.into_iter().find_map(under) {
                Some(inner) => entries = inner,
                None => break,
            }
        }
        let mut tensors = Vec::new();
        for &(key, value) in entries {
            if let (Value::Str(name), Value::Object(i)) = (key, value)
                && let Object::Tensor(t) = &self.objects[i]
            {
                tensors.push((name, t.clone()));
            }
        }
        if tensors.is_empty() {
            let wrappers = WRAPPERS.join("', '");
            return Err(format!("its pickle has no tensors, neither by name nor under '{wrappers}': save a state_dict"));
        }
        Ok(tensors)
    }
}

/// A size, offset or stride.
fn size_of_value(value: Value<'_>) -> Checked<usize> {
    match value {
        Value::Int(i) => usize::try_from(i).map_err(|_| format!("a size of {i}")),
        _ => Err("a size that is no integer".into()),
    }
}
