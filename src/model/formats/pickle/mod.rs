//! A reader of the pickles that torch.save writes: it knows tensors and nothing else, and runs nothing.
//!
//! A pickle is a program for a stack machine. This machine has no way to call anything: of the names that a pickle may
//! import it knows those by which torch.save describes tensors, and any other name or opcode is an error. Objects lie in
//! one flat list and refer to each other by number, so that nesting and cycles cost no recursion, here or on drop.

#[cfg(test)]
pub(super) mod tests;
mod torch;

use super::Checked;
use ::safetensors::Dtype;
use std::collections::HashMap;
use std::rc::Rc;
use torch::Global;
pub(super) use torch::TensorRef;

/// Longer pickles are refused; a state_dict takes about 250 bytes a tensor.
const MAX_BYTES: usize = 32 << 20;
/// Bounds on what a pickle can make the machine hold: room for about 150,000 tensors.
const MAX_OBJECTS: usize = 1 << 20;
const MAX_STACK: usize = 1 << 20;
const MAX_MEMO: usize = 1 << 21;

/// What stands on the stack; whatever can be long or shared is an [`Object`], by number.
#[derive(Clone, Copy, Debug)]
enum Value<'a> {
    /// None, booleans and floats: nothing that a tensor is described by.
    Other,
    Int(i64),
    Str(&'a str),
    Global(Global),
    Object(usize),
}

#[derive(Debug)]
enum Object<'a> {
    Tuple(Vec<Value<'a>>),
    List,
    Dict(Vec<(Value<'a>, Value<'a>)>),
    Storage { key: &'a str, bytes: usize, dtype: Option<Dtype> },
    Tensor(Rc<TensorRef<'a>>),
}

/// Names of opcodes that are refused, for the message.
fn opcode_name(op: u8) -> &'static str {
    match op {
        b'i' => " (INST)",
        b'o' => " (OBJ)",
        0x81 => " (NEWOBJ)",
        0x92 => " (NEWOBJ_EX)",
        0x82..=0x84 => " (EXT)",
        b'P' => " (PERSID)",
        b'0' | b'1' => " (POP)",
        b'2' => " (DUP)",
        b'B' | b'C' | 0x8e | 0x96 => " (BYTES)",
        0x8f..=0x91 => " (SET)",
        _ => "",
    }
}

/// The state_dict in a pickle: names and tensors, in its order. Other entries are left out.
pub(super) fn state_dict(pickle: &[u8]) -> Checked<Vec<(&str, Rc<TensorRef<'_>>)>> {
    if pickle.len() > MAX_BYTES {
        return Err(format!("its pickle has {} bytes, more than {MAX_BYTES}: save the state_dict alone", pickle.len()));
    }
    let mut machine = Machine::default();
    let mut code = Code { pickle, at: 0 };
    let root = loop {
        let (at, op) = (code.at, code.byte()?);
        match machine.step(op, &mut code).map_err(|e| format!("pickle, byte {at}: {e}"))? {
            None => {}
            Some(root) => break root,
        }
    };
    if code.at != pickle.len() {
        return Err(format!("pickle: {} bytes follow its end", pickle.len() - code.at));
    }
    machine.tensors_under(root)
}

/// The bytes of a pickle, read in order.
struct Code<'a> {
    pickle: &'a [u8],
    at: usize,
}

impl<'a> Code<'a> {
    fn bytes(&mut self, n: usize) -> Checked<&'a [u8]> {
        let bytes = self.pickle[self.at..].get(..n).ok_or("its pickle is cut short")?;
        self.at += n;
        Ok(bytes)
    }
    fn array<const N: usize>(&mut self) -> Checked<[u8; N]> {
        let mut a = [0; N];
        a.copy_from_slice(self.bytes(N)?);
        Ok(a)
    }
    fn byte(&mut self) -> Checked<u8> {
        Ok(self.array::<1>()?[0])
    }
    fn u32(&mut self) -> Checked<u32> {
        Ok(u32::from_le_bytes(self.array()?))
    }
    fn text(&mut self, n: usize) -> Checked<&'a str> {
        std::str::from_utf8(self.bytes(n)?).map_err(|_| "a string is not UTF-8".into())
    }
    /// Text up to a newline.
    fn line(&mut self) -> Checked<&'a str> {
        let n = self.pickle[self.at..].iter().position(|&b| b == b'\n').ok_or("its pickle is cut short")?;
        let line = self.text(n)?;
        self.at += 1;
        Ok(line)
    }
}

#[derive(Default)]
struct Machine<'a> {
    stack: Vec<Value<'a>>,
    /// Heights of the stack at which a MARK stands.
    marks: Vec<usize>,
    memo: HashMap<u32, Value<'a>>,
    objects: Vec<Object<'a>>,
}

impl<'a> Machine<'a> {
    /// One opcode. The value that the pickle stands for, at its end.
    fn step(&mut self, op: u8, code: &mut Code<'a>) -> Checked<Option<Value<'a>>> {
        match op {
            // PROTO, FRAME, MARK, STOP
            0x80 => match code.byte()? {
                2..=5 => {}
                v => return Err(format!("protocol {v} is not supported: torch.save writes protocol 2")),
            },
            0x95 => {
                let length = u64::from_le_bytes(code.array()?);
                if length > (code.pickle.len() - code.at) as u64 {
                    return Err(format!("a frame says {length} bytes, more than there are"));
                }
            }
            b'(' => {
                if self.marks.len() >= MAX_STACK {
                    return Err("too deep a stack".into());
                }
                self.marks.push(self.stack.len());
            }
            b'.' => {
                let root = self.pop()?;
                return if self.stack.is_empty() && self.marks.is_empty() {
                    Ok(Some(root))
                } else {
                    Err("it ends with an unfinished stack".into())
                };
            }
            // NONE, NEWTRUE, NEWFALSE, BINFLOAT
            b'N' | 0x88 | 0x89 => self.push(Value::Other)?,
            b'G' => {
                code.bytes(8)?;
                self.push(Value::Other)?;
            }
            // BININT, BININT1, BININT2, LONG1 (two's complement of any length)
            b'J' => {
                let i = i32::from_le_bytes(code.array()?);
                self.push(Value::Int(i as i64))?;
            }
            b'K' => {
                let i = code.byte()?;
                self.push(Value::Int(i as i64))?;
            }
            b'M' => {
                let i = u16::from_le_bytes(code.array()?);
                self.push(Value::Int(i as i64))?;
            }
            0x8a => {
                let n = code.byte()? as usize;
                let bytes = code.bytes(n)?;
                // An integer past 64 bits is a seed or the like: no size of a tensor.
                let wide = bytes.len() > 8;
                let mut le = if bytes.last().is_some_and(|b| b >> 7 == 1) { [0xff; 8] } else { [0; 8] };
                le[..n.min(8)].copy_from_slice(&bytes[..n.min(8)]);
                self.push(if wide { Value::Other } else { Value::Int(i64::from_le_bytes(le)) })?;
            }
            // BINUNICODE, SHORT_BINUNICODE
            b'X' => {
                let n = code.u32()?;
                let s = code.text(n as usize)?;
                self.push(Value::Str(s))?;
            }
            0x8c => {
                let n = code.byte()?;
                let s = code.text(n as usize)?;
                self.push(Value::Str(s))?;
            }
            // EMPTY_DICT, EMPTY_LIST, EMPTY_TUPLE, TUPLE, TUPLE1 to TUPLE3
            b'}' => self.push_object(Object::Dict(Vec::new()))?,
            b']' => self.push_object(Object::List)?,
            b')' => self.push_object(Object::Tuple(Vec::new()))?,
            b't' => {
                let items = self.pop_to_mark()?;
                self.push_object(Object::Tuple(items))?;
            }
            0x85..=0x87 => {
                let items = self.pop_many((op - 0x84) as usize)?;
                self.push_object(Object::Tuple(items))?;
            }
            // SETITEM, SETITEMS, APPEND, APPENDS
            b's' => {
                let items = self.pop_many(2)?;
                self.set_items(&items)?;
            }
            b'u' => {
                let items = self.pop_to_mark()?;
                self.set_items(&items)?;
            }
            b'a' | b'e' => {
                if op == b'a' {
                    self.pop_many(1)?
                } else {
                    self.pop_to_mark()?
                };
                let Object::List = self.top_object()? else { return Err("appends to what is no list".into()) };
            }
            // BINPUT, LONG_BINPUT, MEMOIZE, BINGET, LONG_BINGET
            b'q' | b'r' | 0x94 => {
                let slot = match op {
                    b'q' => code.byte()? as u32,
                    b'r' => code.u32()?,
                    _ => self.memo.len() as u32,
                };
                let top = self.top()?;
                if self.memo.len() >= MAX_MEMO {
                    return Err("too many objects".into());
                }
                self.memo.insert(slot, top);
            }
            b'h' | b'j' => {
                let slot = if op == b'h' { code.byte()? as u32 } else { code.u32()? };
                let value = *self.memo.get(&slot).ok_or_else(|| format!("memo {slot} was never written"))?;
                self.push(value)?;
            }
            // GLOBAL, STACK_GLOBAL
            b'c' => {
                let (module, name) = (code.line()?, code.line()?);
                self.push(Value::Global(Global::find(module, name)?))?;
            }
            0x93 => {
                let (name, module) = (self.pop()?, self.pop()?);
                let (Value::Str(module), Value::Str(name)) = (module, name) else {
                    return Err("an imported name is no string".into());
                };
                self.push(Value::Global(Global::find(module, name)?))?;
            }
            // BINPERSID, REDUCE, BUILD
            b'Q' => self.persistent()?,
            b'R' => self.reduce()?,
            b'b' => {
                // State beside a dict's entries: a state_dict's versions, say.
                self.pop()?;
                let Object::Dict(_) = self.top_object()? else { return Err("sets the state of what is no dict".into()) };
            }
            _ => {
                return Err(format!(
                    "opcode {op:#04x}{} is none that a state_dict needs (nothing was executed)",
                    opcode_name(op)
                ));
            }
        }
        Ok(None)
    }

    // ---- the stack, of which nothing below the last mark can be taken ----

    fn floor(&self) -> usize {
        self.marks.last().copied().unwrap_or(0)
    }
    fn push(&mut self, value: Value<'a>) -> Checked<()> {
        if self.stack.len() >= MAX_STACK {
            return Err("too deep a stack".into());
        }
        self.stack.push(value);
        Ok(())
    }
    fn push_object(&mut self, object: Object<'a>) -> Checked<()> {
        if self.objects.len() >= MAX_OBJECTS {
            return Err("too many objects".into());
        }
        self.objects.push(object);
        self.push(Value::Object(self.objects.len() - 1))
    }
    fn pop_many(&mut self, n: usize) -> Checked<Vec<Value<'a>>> {
        if self.stack.len() - self.floor() < n {
            return Err("takes from an empty stack".into());
        }
        Ok(self.stack.split_off(self.stack.len() - n))
    }
    fn pop(&mut self) -> Checked<Value<'a>> {
        let top = self.top()?;
        self.stack.pop();
        Ok(top)
    }
    fn pop_to_mark(&mut self) -> Checked<Vec<Value<'a>>> {
        let mark = self.marks.pop().ok_or("goes back to a mark that is not there")?;
        Ok(self.stack.split_off(mark))
    }
    fn top(&self) -> Checked<Value<'a>> {
        self.stack[self.floor()..].last().copied().ok_or_else(|| "takes from an empty stack".into())
    }
    fn top_object(&mut self) -> Checked<&mut Object<'a>> {
        match self.top()? {
            Value::Object(i) => Ok(&mut self.objects[i]),
            _ => Err("changes what cannot be changed".into()),
        }
    }
    fn set_items(&mut self, items: &[Value<'a>]) -> Checked<()> {
        let Object::Dict(entries) = self.top_object()? else { return Err("sets items of what is no dict".into()) };
        let (pairs, rest) = items.as_chunks::<2>();
        entries.extend(pairs.iter().map(|&[k, v]| (k, v)));
        if rest.is_empty() { Ok(()) } else { Err("sets a key without a value".into()) }
    }
}
