//! Pickles made by hand: honest, broken and hostile.

use super::*;

/// Opcodes of an integer of up to 64 bits (LONG1).
fn int(i: i64) -> Vec<u8> {
    [&[0x8a, 8][..], &i.to_le_bytes()].concat()
}
pub(in crate::model::formats) fn text(s: &str) -> Vec<u8> {
    [b"X", &(s.len() as u32).to_le_bytes()[..], s.as_bytes()].concat()
}
fn tuple(items: &[Vec<u8>]) -> Vec<u8> {
    [b"(", &items.concat()[..], b"t"].concat()
}
/// `_rebuild_tensor_v2` over a float storage.
pub(in crate::model::formats) fn tensor(key: &str, numel: i64, offset: i64, shape: &[i64], strides: &[i64]) -> Vec<u8> {
    let sizes = |s: &[i64]| tuple(&s.iter().map(|&i| int(i)).collect::<Vec<_>>());
    let class = b"ctorch\nFloatStorage\n".to_vec();
    let storage = [tuple(&[text("storage"), class, text(key), text("cpu"), int(numel)]), b"Q".to_vec()].concat();
    let hooks = b"ccollections\nOrderedDict\n)R".to_vec();
    let args = tuple(&[storage, int(offset), sizes(shape), sizes(strides), vec![0x89], hooks]);
    [b"ctorch._utils\n_rebuild_tensor_v2\n", &args[..], b"R"].concat()
}
/// A pickle of one dict.
pub(in crate::model::formats) fn dict(items: &[(&str, Vec<u8>)]) -> Vec<u8> {
    let items: Vec<u8> = items.iter().flat_map(|(k, v)| [text(k), v.clone()].concat()).collect();
    [&[0x80, 2], b"}(", &items[..], b"u."].concat()
}
fn refused(pickle: &[u8]) -> String {
    state_dict(pickle).unwrap_err()
}

#[test]
fn tensors_are_described_and_the_rest_left_out() {
    let t = tensor("7", 12, 2, &[2, 3], &[6, 1]);
    let pickle = dict(&[("n", int(-5)), ("a", t), ("none", b"N".to_vec()), ("list", b"](K\x01K\x02e".to_vec())]);
    let found = state_dict(&pickle).unwrap();
    assert_eq!(found.len(), 1);
    assert_eq!(found[0].0, "a");
    let want =
        TensorRef { key: "7", storage_bytes: 48, dtype: Dtype::F32, offset: 2, shape: vec![2, 3], strides: vec![6, 1] };
    assert_eq!(*found[0].1, want);
}

#[test]
fn what_would_run_code_is_refused_by_name() {
    let system = [b"\x80\x02cos\nsystem\n(".as_slice(), &text("echo"), b"tR."].concat();
    let error = refused(&system);
    assert!(error.contains("'os.system'") && error.contains("nothing was executed"), "{error}");
    let stacked = [&[0x80, 4, 0x8c, 8], b"builtins".as_slice(), &[0x8c, 4], b"eval", &[0x93], b"."].concat();
    assert!(refused(&stacked).contains("'builtins.eval'"));
    assert!(refused(b"\x80\x02ctorch\nload\n.").contains("'torch.load'"));
    assert!(refused(b"\x80\x02ctorch._utils\n_rebuild_tensor_v2.__globals__\n.").contains("__globals__"));
    for (op, name) in [(0x81, "NEWOBJ"), (b'i', "INST"), (b'o', "OBJ"), (0x82, "EXT"), (b'P', "PERSID"), (0x92, "NEWOBJ_EX")]
    {
        let error = refused(&[0x80, 2, b'}', op, b'.']);
        assert!(error.contains(name) && error.contains("nothing was executed"), "{error}");
    }
    assert!(refused(&[0x80, 2, 0xff]).contains("0xff"));
    assert!(refused(&[0x80, 9]).contains("protocol 9"));
}

#[test]
fn calls_with_other_arguments_are_refused() {
    for pickle in [
        &b"ccollections\nOrderedDict\n(K\x01tR."[..],
        b"ctorch._utils\n_rebuild_parameter\n(K\x01tR.",
        b"ctorch._utils\n_rebuild_tensor_v2\n)R.",
        b"ctorch\nFloatStorage\n)R.",
        b"K\x01)R.",
        b"})R.",
        b"}K\x01R.",
        b"(K\x01tQ.",
        b"K\x01Q.",
        b"]}b.",
        b"]K\x01K\x02s.",
        b"}K\x01a.",
        b"}(K\x01u.",
        b"K\x01K\x02a.",
    ] {
        assert!(state_dict(pickle).is_err(), "{}", pickle.escape_ascii());
    }
    assert!(refused(&dict(&[("a", tensor("0", -1, 0, &[], &[]))])).contains("a size of -1"));
    assert!(refused(&dict(&[("a", tensor("0", i64::MAX, 0, &[], &[]))])).contains("more bytes than memory"));
    assert!(refused(&dict(&[("a", tensor("0", 1, 0, &[1, 1], &[1]))])).contains("2 dimensions with 1 strides"));
    assert!(refused(&dict(&[("a", tensor("0", 1, 0, &[1; 17], &[1; 17]))])).contains("17 dimensions"));
    assert!(refused(&dict(&[("a", tensor("0", 1, 0, &[-1], &[1]))])).contains("a size of -1"));
}

#[test]
fn a_broken_stack_or_memo_is_refused() {
    for (pickle, what) in [
        (&b"."[..], "empty stack"),
        (b"(.", "empty stack"),
        (b"}(K\x01.", "unfinished"),
        (b"}K\x01.", "unfinished"),
        (b"t.", "mark"),
        (b"K\x01(\x85.", "empty stack"),
        (b"q\x00.", "empty stack"),
        (b"h\x07.", "memo 7"),
        (b"j\xff\xff\xff\xff.", "memo 4294967295"),
        (b"}.x", "1 bytes follow"),
        (b"X\xff\xff\xff\xffab", "cut short"),
        (b"X\x01\0\0\0\xff.", "UTF-8"),
        (b"\x95\xff\xff\xff\xff\xff\xff\xff\xff.", "frame"),
        (b"cos", "cut short"),
        (b"K\x01.", "no dict"),
        (b"}.", "no tensors"),
        (b"", "cut short"),
    ] {
        let error = refused(pickle);
        assert!(error.contains(what), "{}: {error}", pickle.escape_ascii());
    }
}

#[test]
fn depth_and_cycles_cost_no_recursion() {
    // a million tuples in tuples, and as many marks
    assert!(refused(&[&b"}"[..], &[0x85; MAX_OBJECTS - 1], b"."].concat()).contains("no dict"));
    assert!(refused(&[&b"}"[..], &[0x85; MAX_OBJECTS], b"."].concat()).contains("too many objects"));
    assert!(refused(&[b'('; MAX_STACK + 1]).contains("too deep"));
    assert!(refused(&[b'N'; MAX_STACK + 1]).contains("too deep"));
    // a dict that is its own state_dict, and a list in itself
    let cycle = [b"}q\x00(", &text("state_dict")[..], b"h\x00u."].concat();
    assert!(refused(&cycle).contains("no tensors"));
    assert!(refused(b"]q\x00h\x00a.").contains("no dict"));
    assert!(refused(&vec![b'N'; MAX_BYTES + 1]).contains("save the state_dict alone"));
}

#[test]
fn a_state_dict_is_found_under_its_wrappers() {
    let t = tensor("0", 1, 0, &[], &[]);
    let inner = dict(&[("w", t.clone())]);
    let inner = inner[2..inner.len() - 1].to_vec(); // less PROTO and STOP
    for wrapper in ["state_dict", "model_state_dict", "model"] {
        let pickle = dict(&[("epoch", int(3)), (wrapper, inner.clone())]);
        assert_eq!(state_dict(&pickle).unwrap()[0].0, "w");
    }
    // A tensor of that name wraps nothing.
    assert_eq!(state_dict(&dict(&[("model", t)])).unwrap()[0].0, "model");
    assert!(refused(&dict(&[("other", inner)])).contains("no tensors"));
}
