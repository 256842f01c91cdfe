//! Text files to token shards: the work of `felid tokenize`.

use super::shards::{SHARD_TOKENS, ShardWriter};
use super::tokenizer::{TOKENIZER_FILE, Tokenizer, not_utf8};
use super::{VAL_FRACTION, held_out};
use crate::{Error, Result};
use rayon::prelude::*;
use std::fs::File;
use std::io::Read;
use std::ops::Range;
use std::path::{Path, PathBuf};

/// Bytes read at once: enough work for all threads, little enough memory for any text.
const BLOCK: usize = 16 << 20;

/// How to tokenize. Each file is a document.
#[derive(Clone, Debug)]
pub struct TokenizeOptions {
    /// The part of the input bytes, at its end, that becomes the validation shards. The cut may fall inside a document;
    /// it is exact for the byte tokenizer and falls on the next character otherwise.
    pub val_fraction: f64,
    /// Tokens in a shard.
    pub shard_tokens: usize,
    /// The id that is put in front of each document.
    pub eot: Option<i64>,
    /// Text that separates documents within a file; replaced by `eot`, which it needs.
    pub delimiter: Option<String>,
    /// Replace the shards and tokenizer that the output folder holds; its other files stay.
    pub overwrite: bool,
}

impl Default for TokenizeOptions {
    fn default() -> Self {
        Self { val_fraction: VAL_FRACTION, shard_tokens: SHARD_TOKENS, eot: None, delimiter: None, overwrite: false }
    }
}

/// How far tokenizing has come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// Input bytes done.
    pub bytes: u64,
    /// Input bytes in all.
    pub total: u64,
    /// Tokens so far.
    pub tokens: usize,
}

/// What was written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Summary {
    /// Bytes of text read.
    pub bytes: u64,
    /// Documents found; empty ones do not count.
    pub documents: usize,
    /// Tokens to train on.
    pub train_tokens: usize,
    /// Tokens held out.
    pub val_tokens: usize,
    /// The shards, and `tokenizer.json` if there is one.
    pub files: Vec<PathBuf>,
}

/// Write `train_*.bin`, `val_*.bin` and `tokenizer.json` into the folder `out`, made if need be.
///
/// Tokens are those of each document encoded whole. Files get their names when all of them are complete: a failure or an
/// error that `progress` returns (Ctrl-C) leaves nothing new behind.
pub fn tokenize_files(
    inputs: &[PathBuf],
    tokenizer: &Tokenizer,
    out: &Path,
    options: &TokenizeOptions,
    progress: &mut dyn FnMut(Progress) -> Result<()>,
) -> Result<Summary> {
    let total = check(inputs, tokenizer, options)?;
    let made = make_folder(out, options.overwrite)?;
    let result = Run::new(tokenizer, out, options, total).and_then(|mut run| {
        for input in inputs {
            run.file(input, progress)?;
        }
        run.finish(out)
    });
    if result.is_err() && made {
        // Fails, as it should, if something else has put a file there meanwhile.
        let _ = std::fs::remove_dir(out);
    }
    result
}

/// Bytes of all inputs, if these can be tokenized so.
fn check(inputs: &[PathBuf], tokenizer: &Tokenizer, options: &TokenizeOptions) -> Result<u64> {
    if inputs.is_empty() {
        return Err(Error::empty("the list of files to tokenize", "give at least one text file"));
    }
    let vocab = tokenizer.vocab_size();
    if let Some(id) = options.eot.filter(|&id| usize::try_from(id).map_or(true, |id| id >= vocab)) {
        return Err(Error::index("tokenize", format!("end-of-text id {id} is outside the vocabulary of {vocab}")));
    }
    match options.delimiter.as_deref() {
        Some("") => return Err(Error::Usage("an empty document delimiter: give the text between documents".into())),
        Some(_) if options.eot.is_none() => {
            return Err(Error::Usage("a document delimiter needs an end-of-text id to put in its place: give one".into()));
        }
        _ => {}
    }
    let mut total = 0;
    for path in inputs {
        let meta = std::fs::metadata(path).map_err(Error::io("open", path))?;
        if !meta.is_file() {
            return Err(Error::Usage(format!("{} is not a file: give text files", path.display())));
        }
        total += meta.len();
    }
    match total {
        0 => Err(Error::empty(format!("{} (and all files to tokenize)", inputs[0].display()), "give files with text")),
        _ => Ok(total),
    }
}

/// Whether the folder had to be made.
fn make_folder(out: &Path, overwrite: bool) -> Result<bool> {
    if !out.exists() {
        return std::fs::create_dir_all(out).map_err(Error::io("make", out)).map(|()| true);
    }
    let mut entries = std::fs::read_dir(out).map_err(Error::io("list", out))?;
    match entries.next() {
        Some(_) if !overwrite => {
            Err(Error::Usage(format!("{} is not empty: choose another folder, or overwrite it", out.display())))
        }
        _ => Ok(false),
    }
}

struct Run<'a> {
    tokenizer: &'a Tokenizer,
    options: &'a TokenizeOptions,
    train: ShardWriter,
    val: ShardWriter,
    /// Bytes from here on are held out.
    val_from: u64,
    total: u64,
    bytes: u64,
    documents: usize,
}

/// A run of text that is encoded by itself: whether a document starts with it, where its bytes are in the block, and
/// whether it is held out.
struct Part {
    starts: bool,
    bytes: Range<usize>,
    val: bool,
}

impl<'a> Run<'a> {
    fn new(tokenizer: &'a Tokenizer, out: &Path, options: &'a TokenizeOptions, total: u64) -> Result<Self> {
        let writer = |split| ShardWriter::new(out, split, tokenizer.vocab_size(), options.shard_tokens);
        let val_from = total - held_out(total, options.val_fraction)?;
        let (train, val) = (writer("train")?, writer("val")?);
        Ok(Self { tokenizer, options, train, val, val_from, total, bytes: 0, documents: 0 })
    }

    fn file(&mut self, path: &Path, progress: &mut dyn FnMut(Progress) -> Result<()>) -> Result<()> {
        let mut file = File::open(path).map_err(Error::io("open", path))?;
        // `block` is text that is not encoded yet; `offset` is where in the file it begins.
        let (mut block, mut offset, mut wanted) = (Vec::new(), 0, BLOCK);
        let mut starts = true;
        loop {
            let missing = wanted.saturating_sub(block.len()) as u64;
            let got = file.by_ref().take(missing).read_to_end(&mut block).map_err(Error::io("read", path))?;
            let last = (got as u64) < missing;
            let (parts, done) = self.parts(&block, last, &mut starts);
            self.encode(path, offset, &block, &parts)?;
            block.drain(..done);
            offset += done as u64;
            self.bytes += done as u64;
            let tokens = self.train.tokens() + self.val.tokens();
            progress(Progress { bytes: self.bytes, total: self.total.max(self.bytes), tokens })?;
            if last {
                return Ok(());
            }
            // A text without a place to cut grows until it has one.
            wanted = block.len() + BLOCK;
        }
    }

    /// Cut a block into parts, and say how many of its bytes they and the delimiters between them take.
    fn parts(&mut self, block: &[u8], last: bool, starts: &mut bool) -> (Vec<Part>, usize) {
        let delimiter = self.options.delimiter.as_deref().unwrap_or_default().as_bytes();
        let (mut parts, mut at) = (Vec::new(), 0);
        while let Some(length) = find(&block[at..], delimiter) {
            self.part(block, at..at + length, starts, &mut parts);
            at += length + delimiter.len();
            *starts = true;
        }
        // What follows the last delimiter is complete at the end of the file; before that it is cut where tokens allow,
        // clear of the block's end, where a delimiter or a character may be cut in two.
        let clear = (block.len() - at).saturating_sub(delimiter.len().max(4));
        let rest = match last {
            true => block.len() - at,
            false => self.tokenizer.cut(&block[at..at + clear], clear - clear / 8).unwrap_or(0),
        };
        self.part(block, at..at + rest, starts, &mut parts);
        (parts, at + rest)
    }
    /// Add a part, or two where the held-out text begins within it; none for no bytes.
    fn part(&mut self, block: &[u8], bytes: Range<usize>, starts: &mut bool, parts: &mut Vec<Part>) {
        if bytes.is_empty() {
            return;
        }
        let new = std::mem::take(starts);
        self.documents += usize::from(new);
        let to_val = usize::try_from(self.val_from.saturating_sub(self.bytes)).unwrap_or(usize::MAX);
        let mut cut = to_val.clamp(bytes.start, bytes.end);
        // Bytes 10xxxxxx continue a character.
        while matches!(self.tokenizer, Tokenizer::Json(_)) && cut < bytes.end && block[cut] & 0xC0 == 0x80 {
            cut += 1;
        }
        for (range, val) in [(bytes.start..cut, false), (cut..bytes.end, true)] {
            if !range.is_empty() {
                parts.push(Part { starts: new && range.start == bytes.start, bytes: range, val });
            }
        }
    }

    fn encode(&mut self, path: &Path, offset: u64, block: &[u8], parts: &[Part]) -> Result<()> {
        let encode = |part: &Part| {
            let bytes = &block[part.bytes.clone()];
            let at = offset + part.bytes.start as u64;
            match (self.tokenizer, std::str::from_utf8(bytes)) {
                (Tokenizer::Json(_), Err(e)) => Err(not_utf8(path, at + e.valid_up_to() as u64)),
                (Tokenizer::Json(_), Ok(text)) => self.tokenizer.encode(text),
                (Tokenizer::Bytes, _) => self.tokenizer.encode_bytes(bytes),
            }
        };
        let encoded = parts.par_iter().map(encode).collect::<Result<Vec<_>>>()?;
        for (part, ids) in parts.iter().zip(encoded) {
            let shards = if part.val { &mut self.val } else { &mut self.train };
            shards.write(self.options.eot.filter(|_| part.starts).as_slice())?;
            shards.write(&ids)?;
        }
        Ok(())
    }

    fn finish(self, out: &Path) -> Result<Summary> {
        let (train_tokens, val_tokens) = (self.train.tokens(), self.val.tokens());
        let json = out.join(TOKENIZER_FILE);
        // Shards beside another run's tokenizer would be read wrongly, so that one goes first.
        match std::fs::remove_file(&json) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(Error::io("remove", &json)(e)),
            _ => {}
        }
        let mut files = self.train.finish()?;
        files.extend(self.val.finish()?);
        self.tokenizer.save(out)?;
        files.extend(json.exists().then_some(json));
        Ok(Summary { bytes: self.bytes, documents: self.documents, train_tokens, val_tokens, files })
    }
}

/// Where `needle` first occurs; nowhere if it is empty.
fn find(text: &[u8], needle: &[u8]) -> Option<usize> {
    let first = *needle.first()?;
    let mut from = 0;
    while let Some(i) = text[from..].iter().position(|&b| b == first) {
        if text[from + i..].starts_with(needle) {
            return Some(from + i);
        }
        from += i + 1;
    }
    None
}
