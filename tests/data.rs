//! Tokens from text to batches: tokenizers, shards, splits, samplers, through the public interface.

use felid::Error;
use felid::data::*;
use felid::tensor::Tensor;
use proptest::prelude::*;
use std::path::{Path, PathBuf};
use std::sync::LazyLock;

const ROOT: &str = env!("CARGO_MANIFEST_DIR");

static SHAKESPEARE: LazyLock<String> =
    LazyLock::new(|| std::fs::read_to_string(Path::new(ROOT).join("data/shakespeare.txt")).unwrap());
static BPE: LazyLock<Tokenizer> = LazyLock::new(|| train_bpe(&[&SHAKESPEARE[..200_000]], 1000).unwrap());
static GPT2: LazyLock<Tokenizer> =
    LazyLock::new(|| Tokenizer::load(Some(&Path::new(ROOT).join("tests/fixtures/gpt2_tokenizer.json"))).unwrap());

fn tokenizers() -> [&'static Tokenizer; 3] {
    [&Tokenizer::Bytes, &BPE, &GPT2]
}
fn streamed(t: &Tokenizer, ids: &[i64]) -> String {
    let mut stream = t.decode_stream();
    let mut text: String = ids.iter().map(|&id| stream.push(id).unwrap()).collect();
    text.push_str(&stream.finish().unwrap());
    text
}
fn ids(t: &Tensor) -> Vec<i64> {
    t.to_vec::<i64>().unwrap()
}
fn all(shards: &TokenShards) -> Vec<i64> {
    let mut out = Vec::new();
    shards.read(0, shards.len(), &mut out).unwrap();
    out
}
fn write(dir: &Path, split: &str, vocab: usize, per_shard: usize, ids: &[i64]) -> Vec<PathBuf> {
    let mut w = ShardWriter::new(dir, split, vocab, per_shard).unwrap();
    ids.chunks(7).for_each(|c| w.write(c).unwrap());
    w.finish().unwrap()
}
fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<_> = std::fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn gpt2_known_ids() {
    let t = &*GPT2;
    assert_eq!((t.vocab_size(), t.end_of_text()), (50257, Some(50256)));
    assert_eq!(t.encode("The meaning of life is").unwrap(), [464, 3616, 286, 1204, 318]);
    assert_eq!(t.decode(&[464, 3616, 286, 1204, 318]).unwrap(), "The meaning of life is");
    assert!(matches!(t.decode(&[50257]), Err(Error::Index { .. })));
    assert!(matches!(t.encode_bytes(b"ok \xFF"), Err(Error::Format { .. })));
    // An emoji is several tokens: nothing comes out before the last of them.
    let emoji = t.encode("🐈").unwrap();
    let mut stream = t.decode_stream();
    let pieces: Vec<String> = emoji.iter().map(|&id| stream.push(id).unwrap()).collect();
    assert!(pieces[..pieces.len() - 1].iter().all(String::is_empty) && pieces[pieces.len() - 1] == "🐈");
}

#[test]
fn trained_bpe_reloads_identically_and_shortens_text() {
    let t = &*BPE;
    assert_eq!((t.vocab_size(), t.end_of_text()), (1000, Some(999)));
    let dir = tempfile::tempdir().unwrap();
    t.save(dir.path()).unwrap();
    let again = Tokenizer::load(Some(dir.path())).unwrap();
    assert_eq!(again.fingerprint(), t.fingerprint());
    assert_ne!(again.fingerprint(), GPT2.fingerprint());
    let text = &SHAKESPEARE[1_000_000..1_020_000];
    let encoded = t.encode(text).unwrap();
    assert_eq!(again.encode(text).unwrap(), encoded);
    assert_eq!(again.decode(&encoded).unwrap(), text);
    assert!(encoded.len() * 2 < text.len(), "{} tokens for {} bytes", encoded.len(), text.len());
}

/// Long texts are encoded in pieces; the tokens must be those of one pass of the tokenizers library.
#[test]
fn encoding_in_pieces_changes_nothing() {
    let path = Path::new(ROOT).join("tests/fixtures/gpt2_tokenizer.json");
    let whole = tokenizers::Tokenizer::from_file(path).unwrap();
    let odd = "  two\n\n\nlines \n \u{a0}\nnbsp\u{a0}\r\n\r\nend<|endoftext|>\n é\nñ\n\t'tis\n";
    let text = odd.repeat(200) + &SHAKESPEARE[..400_000] + &odd.repeat(3000);
    let expected: Vec<i64> = whole.encode_fast(text.as_str(), false).unwrap().get_ids().iter().map(|&i| i.into()).collect();
    assert!(GPT2.encode(&text).unwrap() == expected);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn any_bytes_round_trip_and_stream(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        let t = Tokenizer::Bytes;
        let encoded = t.encode_bytes(&bytes).unwrap();
        let back: Vec<u8> = encoded.iter().map(|&id| id as u8).collect();
        prop_assert_eq!(&back, &bytes);
        let text = String::from_utf8_lossy(&bytes);
        prop_assert_eq!(t.decode(&encoded).unwrap(), text.as_ref());
        prop_assert_eq!(streamed(&t, &encoded), text.as_ref());
    }

    #[test]
    fn any_text_round_trips_and_streams_cut_anywhere(text in "\\PC{0,40}[\\x00-\\x7f]{0,20}[🐈é\u{0301}\n ]{0,20}", cut in 0.0..1.0) {
        for t in tokenizers() {
            let encoded = t.encode(&text).unwrap();
            prop_assert_eq!(t.decode(&encoded).unwrap(), text.as_str());
            prop_assert_eq!(streamed(t, &encoded), text.as_str());
            // Ids cut off anywhere, which may leave half a character at either end.
            let (head, tail) = encoded.split_at((cut * encoded.len() as f64) as usize);
            for part in [head, tail] {
                prop_assert_eq!(streamed(t, part), t.decode(part).unwrap());
            }
        }
    }

    #[test]
    fn any_ids_stream_like_the_whole(raw in prop::collection::vec(any::<u32>(), 0..60)) {
        for t in tokenizers() {
            let ids: Vec<i64> = raw.iter().map(|&r| i64::from(r) % t.vocab_size() as i64).collect();
            prop_assert_eq!(streamed(t, &ids), t.decode(&ids).unwrap());
        }
    }

    #[test]
    fn shards_round_trip(tokens in prop::collection::vec(0u32..70_000, 1..200), per_shard in 1usize..60, wide: bool, at in 0.0..1.0) {
        let vocab = if wide { 70_000 } else { 65_536 };
        let tokens: Vec<i64> = tokens.iter().map(|&t| i64::from(t) % vocab as i64).collect();
        let dir = tempfile::tempdir().unwrap();
        let files = write(dir.path(), "train", vocab, per_shard, &tokens);
        prop_assert_eq!(files.len(), tokens.len().div_ceil(per_shard));
        let shards = TokenShards::open(dir.path()).unwrap();
        prop_assert_eq!(&all(&shards), &tokens);
        let start = (at * tokens.len() as f64) as usize;
        let n = (tokens.len() - start) / 2;
        let mut part = vec![-7];
        shards.read(start, n, &mut part).unwrap();
        prop_assert_eq!(&part[1..], &tokens[start..start + n]);
        prop_assert!(shards.read(start, tokens.len() - start + 1, &mut part).is_err());
        let largest = *tokens.iter().max().unwrap() as usize;
        prop_assert!(shards.check_ids(largest + 1).is_ok());
        let found = matches!(shards.check_ids(largest), Err(Error::Format { .. }));
        prop_assert!(found);
    }

    #[test]
    fn batches_shift_by_one_and_never_touch_the_held_out(n in 40usize..400, fraction in 0.1..0.5, len in 1usize..16, b in 1usize..5, seed: u64) {
        // Token i is i, so a batch says where it was read.
        let tokens: Vec<i64> = (0..n as i64).collect();
        let data = Dataset::from_tokens(&tokens, n, fraction).unwrap();
        let held_out = data.train.len() as i64;
        prop_assert_eq!((data.val.len(), data.train.len() + data.val.len()), ((n as f64 * fraction) as usize, n));
        let mut sampler = BatchSampler::new(seed, b, len).unwrap();
        for _ in 0..5 {
            let batch = sampler.next(&data.train).unwrap();
            let (x, y) = (ids(&batch.input_ids), ids(&batch.labels));
            prop_assert_eq!(batch.input_ids.shape(), [b, len]);
            prop_assert!(x.iter().zip(&y).all(|(x, y)| x + 1 == *y && *y < held_out));
            prop_assert!(x.chunks(len).all(|row| row.windows(2).all(|w| w[0] + 1 == w[1])));
        }
        if data.val.len() > len {
            let windows = Windows::new(&data.val, b, len, None).unwrap();
            let total = windows.total();
            let (mut x, mut y) = (Vec::new(), Vec::new());
            for batch in windows.clone() {
                let batch = batch.unwrap();
                x.extend(ids(&batch.input_ids));
                y.extend(ids(&batch.labels));
            }
            // Side by side from the first held-out token on, each predicted once.
            prop_assert_eq!(x.len(), total * len);
            prop_assert!(x.iter().enumerate().all(|(i, &x)| x == held_out + i as i64));
            prop_assert!(x.iter().zip(&y).all(|(x, y)| x + 1 == *y));
            prop_assert!(data.val.len() - x.len() <= len, "a window more would have fitted");
            let few = Windows::new(&data.val, b, len, Some(2)).unwrap();
            prop_assert!((1..few.total()).all(|i| few.start(i) >= few.start(i - 1) + len));
        } else {
            let e = Windows::new(&data.val, b, len, None).unwrap_err().to_string();
            prop_assert!(e.contains(&format!("at least {}", len + 1)), "{}", e);
        }
    }

    #[test]
    fn a_resumed_sampler_goes_on_identically(seed: u64, step in 0u64..1000, far: u64) {
        let data = Dataset::from_tokens(&(0..5000).collect::<Vec<i64>>(), 5000, 0.05).unwrap();
        let mut first = BatchSampler::new(seed, 3, 8).unwrap();
        first.seek(step);
        first.next(&data.train).unwrap();
        let mut resumed = BatchSampler::new(seed, 3, 8).unwrap();
        resumed.seek(first.step());
        let (a, b) = (first.next(&data.train).unwrap(), resumed.next(&data.train).unwrap());
        prop_assert_eq!(ids(&a.input_ids), ids(&b.input_ids));
        prop_assert_eq!(ids(&a.labels), ids(&b.labels));
        prop_assert_eq!(resumed.step(), step + 2);
        prop_assert_ne!(first.starts(&data.train, step).unwrap(), first.starts(&data.train, step + 1).unwrap());
        first.starts(&data.train, far).unwrap();
    }
}

#[test]
fn starts_cover_the_whole_training_part() {
    let data = Dataset::from_tokens(&(0..20).collect::<Vec<i64>>(), 20, 0.25).unwrap();
    let sampler = BatchSampler::new(1, 4, 4).unwrap();
    let mut seen = [false; 11];
    for step in 0..200 {
        sampler.starts(&data.train, step).unwrap().into_iter().for_each(|s| seen[s] = true);
    }
    assert!(seen.iter().all(|&s| s), "15 tokens hold windows of 5 at 11 places: {seen:?}");
    let e = BatchSampler::new(1, 4, 15).unwrap().at(&data.train, 0).unwrap_err().to_string();
    assert!(e.contains("at least 16"), "{e}");
    assert!(BatchSampler::new(1, 0, 4).is_err() && BatchSampler::new(1, 4, 0).is_err());
}

#[test]
fn damaged_shards_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let file = write(dir.path(), "train", 300, 100, &[1, 2, 299, 4]).remove(0);
    let good = std::fs::read(&file).unwrap();
    let opened = |bytes: &[u8]| {
        std::fs::write(&file, bytes).unwrap();
        TokenShards::open(&file).map(|s| s.len())
    };
    let refused = |bytes: &[u8]| {
        let e = opened(bytes).unwrap_err();
        assert!(matches!(e, Error::Format { .. }) && e.to_string().contains("train_000000.bin"), "{e}");
    };
    (0..good.len()).for_each(|n| refused(&good[..n]));
    refused(&[&good[..], &[0]].concat());
    for (field, value) in [(0, 20_240_519), (1, 0), (1, 2), (1, 3), (2, -1), (2, i32::MAX), (2, i32::MIN), (2, 3), (2, 5)] {
        let mut bad = good.clone();
        bad[4 * field..4 * field + 4].copy_from_slice(&i32::to_le_bytes(value));
        refused(&bad);
    }
    assert_eq!(opened(&good).unwrap(), 4);
    // What the format says, byte for byte.
    assert_eq!(good[..12], [20_240_520i32.to_le_bytes(), 1i32.to_le_bytes(), 4i32.to_le_bytes()].concat());
    assert_eq!((good.len(), &good[1024..]), (1024 + 8, &[1u8, 0, 2, 0, 43, 1, 4, 0][..]));
    let mut empty = good[..1024].to_vec();
    empty[8..12].fill(0);
    assert!(matches!(opened(&empty), Err(Error::Empty { .. })));
    std::fs::remove_file(&file).unwrap();
    assert!(matches!(TokenShards::open(&file), Err(Error::Io { .. })));
    assert!(matches!(TokenShards::open(dir.path()), Err(Error::Empty { .. })));
    assert!(matches!(TokenShards::open_list::<PathBuf>(&[]), Err(Error::Empty { .. })));
}

#[test]
fn shard_writers_replace_a_split_whole_or_not_at_all() {
    let dir = tempfile::tempdir().unwrap();
    write(dir.path(), "train", 300, 2, &[1, 2, 3, 4, 5]);
    write(dir.path(), "val", 300, 2, &[9]);
    std::fs::write(dir.path().join("train_notes.bin"), "mine").unwrap();
    let mut dropped = ShardWriter::new(dir.path(), "train", 300, 2).unwrap();
    dropped.write(&[7; 5]).unwrap();
    assert!(matches!(dropped.write(&[300]), Err(Error::Index { .. })));
    assert!(matches!(dropped.write(&[-1]), Err(Error::Index { .. })));
    drop(dropped);
    let before = ["train_000000.bin", "train_000001.bin", "train_000002.bin", "train_notes.bin", "val_000000.bin"];
    assert_eq!(names(dir.path()), before);
    write(dir.path(), "train", 300, 2, &[6, 7]);
    assert_eq!(names(dir.path()), ["train_000000.bin", "train_notes.bin", "val_000000.bin"]);
    std::fs::remove_file(dir.path().join("train_notes.bin")).unwrap();
    let e = TokenShards::open(dir.path()).unwrap_err().to_string();
    assert!(e.contains("one split"), "{e}");
    assert_eq!(all(&TokenShards::open_split(dir.path(), "train").unwrap().unwrap()), [6, 7]);
    assert!(TokenShards::open_split(dir.path(), "test").unwrap().is_none());
    assert!(ShardWriter::new(dir.path(), "train", 300, 0).is_err());
    assert!(ShardWriter::new(dir.path(), "../x", 300, 9).is_err());
    let data = Dataset::open(dir.path(), &GPT2, 0.5).unwrap();
    assert_eq!((data.train.len(), data.val.len()), (2, 1), "a folder's own validation shards are used");
    // Ids that a tokenizer does not have are found when read.
    let outside = Dataset::open(dir.path(), &Tokenizer::Bytes, 0.5).unwrap();
    assert!(outside.train.read(0, 2, &mut Vec::new()).is_ok());
    write(dir.path(), "train", 300, 2, &[6, 256]);
    let outside = Dataset::open(dir.path(), &Tokenizer::Bytes, 0.5).unwrap();
    assert!(matches!(outside.train.read(0, 2, &mut Vec::new()), Err(Error::Index { .. })));
}

/// Files in a folder of their own, and where tokens of them may go.
fn corpus(texts: &[&[u8]]) -> (tempfile::TempDir, Vec<PathBuf>, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let files: Vec<PathBuf> = (0..texts.len()).map(|i| dir.path().join(format!("{i}.txt"))).collect();
    files.iter().zip(texts).for_each(|(f, t)| std::fs::write(f, t).unwrap());
    let out = dir.path().join("out");
    (dir, files, out)
}
fn quiet(_: Progress) -> felid::Result<()> {
    Ok(())
}
fn split(out: &Path, split: &str) -> Vec<i64> {
    TokenShards::open_split(out, split).unwrap().map(|s| all(&s)).unwrap_or_default()
}

#[test]
fn tokenized_files_equal_the_text_in_memory() {
    let text = &SHAKESPEARE.as_bytes()[..300_000];
    let (_dir, files, out) = corpus(&[text]);
    let options = TokenizeOptions { shard_tokens: 70_000, ..Default::default() };
    let mut seen = Vec::new();
    let summary = tokenize_files(&files, &Tokenizer::Bytes, &out, &options, &mut |p| {
        seen.push(p);
        Ok(())
    })
    .unwrap();
    assert_eq!((summary.documents, summary.train_tokens, summary.val_tokens), (1, 285_000, 15_000));
    assert_eq!(summary.files.len(), 5 + 1);
    assert_eq!(seen.last(), Some(&Progress { bytes: 300_000, total: 300_000, tokens: 300_000 }));
    let (memory, disk) =
        (Dataset::open(&files[0], &Tokenizer::Bytes, 0.05).unwrap(), Dataset::open(&out, &Tokenizer::Bytes, 0.9).unwrap());
    for (a, b) in [(memory.train, disk.train), (memory.val, disk.val)] {
        let read = |t: &Tokens| {
            let mut ids = Vec::new();
            t.read(0, t.len(), &mut ids).unwrap();
            ids
        };
        assert!(read(&a) == read(&b));
    }

    let options = TokenizeOptions { val_fraction: 0.0, ..Default::default() };
    assert!(matches!(tokenize_files(&files, &BPE, &out, &options, &mut quiet), Err(Error::Usage(_))), "not empty");
    std::fs::write(out.join("notes.txt"), "kept").unwrap();
    let options = TokenizeOptions { overwrite: true, ..options };
    tokenize_files(&files, &BPE, &out, &options, &mut quiet).unwrap();
    assert_eq!(names(&out), ["notes.txt", "tokenizer.json", "train_000000.bin"]);
    assert!(split(&out, "train") == BPE.encode(std::str::from_utf8(text).unwrap()).unwrap());
    assert_eq!(Tokenizer::load(Some(&out)).unwrap().fingerprint(), BPE.fingerprint());
    tokenize_files(&files, &Tokenizer::Bytes, &out, &options, &mut quiet).unwrap();
    assert!(matches!(Tokenizer::load(Some(&out)).unwrap(), Tokenizer::Bytes), "no stale tokenizer stays behind");
}

#[test]
fn documents_are_separated() {
    let (_dir, files, out) = corpus(&[b"ab--cd----e", b"", b"-f-"]);
    let options = TokenizeOptions { val_fraction: 0.0, eot: Some(0), delimiter: Some("--".into()), ..Default::default() };
    let summary = tokenize_files(&files, &Tokenizer::Bytes, &out, &options, &mut quiet).unwrap();
    assert_eq!((summary.documents, summary.bytes), (4, 14));
    assert_eq!(Tokenizer::Bytes.decode(&split(&out, "train")).unwrap(), "\0ab\0cd\0e\0-f-");

    // The held-out tail begins inside a document, and inside a character: that one stays in front.
    let (_dir, files, out) = corpus(&["one\ntwo é three".as_bytes()]);
    let options = TokenizeOptions { val_fraction: 7.0 / 16.0, eot: GPT2.end_of_text(), ..Default::default() };
    tokenize_files(&files, &GPT2, &out, &options, &mut quiet).unwrap();
    assert_eq!(GPT2.decode(&split(&out, "train")).unwrap(), "<|endoftext|>one\ntwo é");
    assert_eq!(GPT2.decode(&split(&out, "val")).unwrap(), " three");
}

/// More than one block of reading, so that cuts and carried-over text matter.
#[test]
fn long_files_are_read_in_blocks_without_a_seam() {
    let text = SHAKESPEARE.repeat(4);
    let (_dir, files, out) = corpus(&[text.as_bytes()]);
    let options =
        TokenizeOptions { val_fraction: 0.0, eot: Some(0), delimiter: Some("\n\n\n\n".into()), ..Default::default() };
    let summary = tokenize_files(&files, &Tokenizer::Bytes, &out, &options, &mut quiet).unwrap();
    let expected = "\0".to_string() + &text.replace("\n\n\n\n", "\0");
    let documents: Vec<&str> = text.split("\n\n\n\n").filter(|d| !d.is_empty()).collect();
    assert_eq!(summary.documents, documents.len());
    assert!(Tokenizer::Bytes.decode(&split(&out, "train")).unwrap() == expected.replace("\0\0", "\0"));
}

#[test]
fn failures_leave_nothing_behind() {
    let (dir, files, out) = corpus(&["fine\n".as_bytes(), b"bad \xC3\x28"]);
    let run =
        |files: &[PathBuf], t: &Tokenizer, options: &TokenizeOptions| tokenize_files(files, t, &out, options, &mut quiet);
    let default = TokenizeOptions::default();
    let e = run(&files, &GPT2, &default).unwrap_err();
    assert!(e.to_string().contains("1.txt: byte 4"), "{e}");
    let interrupt = &mut |_| Err(Error::Interrupted("tokenizing".into()));
    assert!(matches!(tokenize_files(&files, &Tokenizer::Bytes, &out, &default, interrupt), Err(Error::Interrupted(_))));
    assert!(matches!(run(&[], &Tokenizer::Bytes, &default), Err(Error::Empty { .. })));
    assert!(matches!(run(&[dir.path().join("none.txt")], &Tokenizer::Bytes, &default), Err(Error::Io { .. })));
    assert!(matches!(run(&[dir.path().into()], &Tokenizer::Bytes, &default), Err(Error::Usage(_))));
    let with = |change: fn(&mut TokenizeOptions)| {
        let mut options = default.clone();
        change(&mut options);
        run(&files, &Tokenizer::Bytes, &options).unwrap_err()
    };
    assert!(matches!(with(|o| o.eot = Some(256)), Error::Index { .. }));
    assert!(matches!(with(|o| o.delimiter = Some("x".into())), Error::Usage(_)));
    assert!(matches!(with(|o| o.val_fraction = 1.0), Error::Usage(_)));
    assert!(matches!(with(|o| o.val_fraction = f64::NAN), Error::Usage(_)));
    assert!(matches!(with(|o| o.shard_tokens = 0), Error::Usage(_)));
    let (_dir2, empty, _) = corpus(&[b"", b""]);
    assert!(matches!(run(&empty, &Tokenizer::Bytes, &default), Err(Error::Empty { .. })));
    assert!(matches!(Dataset::open(&empty[0], &Tokenizer::Bytes, 0.05), Err(Error::Empty { .. })));
    assert_eq!(names(dir.path()), ["0.txt", "1.txt"]);
}
