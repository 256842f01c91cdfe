//! Token shards, the format of llm.c's `.bin` files: a header of 256 int32 (magic 20240520, version, number of tokens,
//! then zeros), then the tokens, all little-endian.
//!
//! Version 1 holds uint16 tokens and is what llm.c writes and reads. Version 2 holds uint32 tokens: our own extension,
//! for vocabularies above 65536.

use crate::{Error, Result};
use memmap2::Mmap;
use rayon::prelude::*;
use std::fs::File;
use std::io::{BufWriter, Seek, Write};
use std::path::{Path, PathBuf};
use tempfile::{NamedTempFile, TempPath};

const MAGIC: i32 = 20_240_520;
const HEADER: usize = 256 * 4;
/// Tokens in a shard unless asked otherwise.
pub const SHARD_TOKENS: usize = 100_000_000;

/// Token shards read through memory maps, as one long sequence.
///
/// Files must not be changed while they are open: cutting one short ends the process when the lost part is read.
#[derive(Debug)]
pub struct TokenShards {
    shards: Vec<Shard>,
    /// Tokens up to and with each shard.
    ends: Vec<usize>,
}

#[derive(Debug)]
struct Shard {
    path: PathBuf,
    map: Mmap,
    /// Bytes a token: 2 or 4.
    width: usize,
}

impl Shard {
    fn open(path: &Path) -> Result<Self> {
        let bad = |detail: String| Error::format(path, detail);
        let file = File::open(path).map_err(Error::io("open", path))?;
        let bytes = file.metadata().map_err(Error::io("read", path))?.len();
        if bytes < HEADER as u64 {
            return Err(bad(format!("{bytes} bytes are too few for a token shard's header of {HEADER}: write it again")));
        }
        // SAFETY: the map is only ever read, as plain bytes of which every value is valid; its length is the file's.
        // Others writing to the file meanwhile is excluded by the contract in TokenShards' documentation.
        let map = unsafe { Mmap::map(&file) }.map_err(Error::io("map", path))?;
        let field = |i: usize| i32::from_le_bytes([map[4 * i], map[4 * i + 1], map[4 * i + 2], map[4 * i + 3]]);
        if field(0) != MAGIC {
            return Err(bad(format!("starts with {}, a token shard with {MAGIC}: give a shard or a text file", field(0))));
        }
        let width = match field(1) {
            1 => 2,
            2 => 4,
            v => return Err(bad(format!("token shards of version {v} are unknown (1 and 2 are): tokenize again"))),
        };
        let promised =
            u64::try_from(field(2)).map_err(|_| bad(format!("its header says {} tokens: tokenize again", field(2))))?;
        let expected = HEADER as u64 + promised * width as u64;
        if map.len() as u64 != expected {
            let is = if (map.len() as u64) < expected { "truncated" } else { "too long" };
            let size = map.len();
            return Err(bad(format!(
                "is {is}: {promised} tokens make {expected} bytes, it has {size}: copy or write it again"
            )));
        }
        Ok(Self { path: path.into(), map, width })
    }
    fn len(&self) -> usize {
        (self.map.len() - HEADER) / self.width
    }
    /// Tokens `start..start + n`, which must exist.
    fn read(&self, start: usize, n: usize, out: &mut Vec<i64>) {
        let bytes = &self.map[HEADER + start * self.width..HEADER + (start + n) * self.width];
        match self.width {
            2 => out.extend(bytes.chunks_exact(2).map(|b| i64::from(u16::from_le_bytes([b[0], b[1]])))),
            _ => out.extend(bytes.chunks_exact(4).map(|b| i64::from(u32::from_le_bytes([b[0], b[1], b[2], b[3]])))),
        }
    }
}

impl TokenShards {
    /// One shard file, or all `.bin` files of a folder in the order of their names.
    ///
    /// A folder with both training and validation shards is refused: [`TokenShards::open_split`] tells them apart.
    pub fn open(path: &Path) -> Result<Self> {
        if !path.is_dir() {
            return Self::open_list(&[path]);
        }
        let files = bin_files(path)?;
        if ["train", "val"].iter().all(|split| files.iter().any(|f| is_of_split(f, split))) {
            return Err(Error::format(
                path,
                "holds training and validation shards: ask for one split, or for files by name",
            ));
        }
        match files[..] {
            [] => Err(Error::empty(format!("{} (no .bin files)", path.display()), "run felid tokenize to write shards")),
            _ => Self::open_list(&files),
        }
    }
    /// The shards of one split of a folder: the `.bin` files with `split` between underscores in their names
    /// (`train_000000.bin`, `fineweb_val_000000.bin`). None if there are none.
    pub fn open_split(dir: &Path, split: &str) -> Result<Option<Self>> {
        let files: Vec<PathBuf> = bin_files(dir)?.into_iter().filter(|f| is_of_split(f, split)).collect();
        if files.is_empty() { Ok(None) } else { Self::open_list(&files).map(Some) }
    }
    /// These files, in this order.
    pub fn open_list<P: AsRef<Path>>(files: &[P]) -> Result<Self> {
        let shards = files.iter().map(|f| Shard::open(f.as_ref())).collect::<Result<Vec<_>>>()?;
        let total = |end: &mut usize, s: &Shard| {
            *end += s.len();
            Some(*end)
        };
        let ends: Vec<usize> = shards.iter().scan(0, total).collect();
        match (ends.last(), files.first()) {
            (Some(0) | None, first) => {
                let what = first.map_or("the list of token shards".into(), |f| f.as_ref().display().to_string());
                Err(Error::empty(what, "give shards that hold tokens"))
            }
            _ => Ok(Self { shards, ends }),
        }
    }
    /// Tokens in all shards.
    pub fn len(&self) -> usize {
        self.ends.last().copied().unwrap_or(0)
    }
    /// Never true: opening nothing is an error.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
    /// Append tokens `start..start + n` to `out`, across shards where need be.
    pub fn read(&self, mut start: usize, mut n: usize, out: &mut Vec<i64>) -> Result<()> {
        super::check_range("TokenShards::read", start, n, self.len())?;
        out.reserve(n);
        let mut at = self.ends.partition_point(|&end| end <= start);
        while n > 0 {
            let shard = &self.shards[at];
            let local = start - (self.ends[at] - shard.len());
            let take = n.min(shard.len() - local);
            shard.read(local, take, out);
            (start, n, at) = (start + take, n - take, at + 1);
        }
        Ok(())
    }
    /// Read every token and check that it is below `vocab_size`; the error names the first that is not.
    pub fn check_ids(&self, vocab_size: usize) -> Result<()> {
        const CHUNK: usize = 1 << 20;
        for shard in &self.shards {
            let bad = (0..shard.len().div_ceil(CHUNK)).into_par_iter().find_map_first(|chunk| {
                let start = chunk * CHUNK;
                let mut ids = Vec::with_capacity(CHUNK);
                shard.read(start, CHUNK.min(shard.len() - start), &mut ids);
                ids.iter().position(|&id| id as usize >= vocab_size).map(|i| (start + i, ids[i]))
            });
            if let Some((i, id)) = bad {
                let fix = "tokenize with this model's tokenizer";
                return Err(Error::format(
                    &shard.path,
                    format!("token {i} is {id}, the vocabulary has {vocab_size}: {fix}"),
                ));
            }
        }
        Ok(())
    }
}

fn bin_files(dir: &Path) -> Result<Vec<PathBuf>> {
    let entries = std::fs::read_dir(dir).map_err(Error::io("list", dir))?;
    let mut files = Vec::new();
    for entry in entries {
        let path = entry.map_err(Error::io("list", dir))?.path();
        if path.extension().is_some_and(|e| e == "bin") && path.is_file() {
            files.push(path);
        }
    }
    // Shorter names first, so that number 1000000 follows 999999.
    files.sort_by_cached_key(|p| (p.as_os_str().len(), p.clone()));
    Ok(files)
}
fn is_of_split(file: &Path, split: &str) -> bool {
    file.file_stem().and_then(|s| s.to_str()).is_some_and(|s| s.split('_').any(|part| part == split))
}

/// Writes the shards `<split>_000000.bin`, `<split>_000001.bin`, ... of a folder.
///
/// Shards are temporary files until [`ShardWriter::finish`] gives all of them their names, replacing what that split had
/// there before; a writer that is dropped leaves nothing.
#[derive(Debug)]
pub struct ShardWriter {
    dir: PathBuf,
    split: String,
    vocab_size: usize,
    shard_tokens: usize,
    open: Option<(BufWriter<NamedTempFile>, usize)>,
    closed: Vec<TempPath>,
    tokens: usize,
}

impl ShardWriter {
    /// A writer into the existing folder `dir`; tokens are 2 bytes for vocabularies up to 65536, else 4.
    pub fn new(dir: &Path, split: &str, vocab_size: usize, shard_tokens: usize) -> Result<Self> {
        if shard_tokens == 0 || i32::try_from(shard_tokens).is_err() {
            return Err(Error::Usage(format!("{shard_tokens} tokens a shard: choose from 1 to {}", i32::MAX)));
        }
        if vocab_size == 0 || u32::try_from(vocab_size - 1).is_err() {
            return Err(Error::config(format!("a vocabulary of {vocab_size} cannot be written: ids must fit 32 bits")));
        }
        if split.is_empty() || split.contains(['/', '\\', '.']) {
            return Err(Error::Usage(format!("'{split}' cannot name a split: use letters, e.g. train or val")));
        }
        let (dir, split) = (dir.to_path_buf(), split.to_string());
        Ok(Self { dir, split, vocab_size, shard_tokens, open: None, closed: Vec::new(), tokens: 0 })
    }
    /// Append tokens. Errors on an id outside the vocabulary, before any of these tokens is written.
    pub fn write(&mut self, mut ids: &[i64]) -> Result<()> {
        if let Some(id) = ids.iter().find(|&&id| usize::try_from(id).map_or(true, |id| id >= self.vocab_size)) {
            let n = self.vocab_size;
            return Err(Error::index("ShardWriter::write", format!("id {id} is outside the vocabulary of {n}")));
        }
        while !ids.is_empty() {
            if self.open.is_none() {
                let mut file = BufWriter::with_capacity(1 << 20, stage(&self.dir)?);
                file.write_all(&[0; HEADER]).map_err(Error::io("write a shard in", &self.dir))?;
                self.open = Some((file, 0));
            }
            let Some((file, written)) = &mut self.open else { continue };
            let (now, later) = ids.split_at(ids.len().min(self.shard_tokens - *written));
            let mut bytes = Vec::with_capacity(now.len() * 4);
            match self.vocab_size {
                ..=0x1_0000 => now.iter().for_each(|&id| bytes.extend_from_slice(&(id as u16).to_le_bytes())),
                _ => now.iter().for_each(|&id| bytes.extend_from_slice(&(id as u32).to_le_bytes())),
            }
            file.write_all(&bytes).map_err(Error::io("write a shard in", &self.dir))?;
            *written += now.len();
            self.tokens += now.len();
            ids = later;
            if *written == self.shard_tokens {
                self.close()?;
            }
        }
        Ok(())
    }
    /// Tokens written so far.
    pub fn tokens(&self) -> usize {
        self.tokens
    }
    /// Complete the open shard: its header says how many tokens follow.
    fn close(&mut self) -> Result<()> {
        let Some((file, written)) = self.open.take() else { return Ok(()) };
        let version = if self.vocab_size <= 0x1_0000 { 1 } else { 2 };
        let header: Vec<u8> = [MAGIC, version, written as i32].iter().flat_map(|x| x.to_le_bytes()).collect();
        let complete = || -> std::io::Result<TempPath> {
            let mut file = file.into_inner().map_err(|e| e.into_error())?;
            file.rewind()?;
            file.write_all(&header)?;
            file.as_file().sync_all()?;
            Ok(file.into_temp_path())
        };
        self.closed.push(complete().map_err(Error::io("write a shard in", &self.dir))?);
        Ok(())
    }
    /// Give the shards their names and remove what an earlier, longer run left of this split. Returns the files.
    pub fn finish(mut self) -> Result<Vec<PathBuf>> {
        self.close()?;
        let name = |i: usize| self.dir.join(format!("{}_{i:06}.bin", self.split));
        let files: Vec<PathBuf> = (0..self.closed.len()).map(name).collect();
        for (shard, file) in std::mem::take(&mut self.closed).into_iter().zip(&files) {
            shard.persist(file).map_err(|e| Error::io("write", file)(e.error))?;
        }
        for old in bin_files(&self.dir)?.iter().filter(|f| !files.contains(f) && self.is_numbered(f)) {
            std::fs::remove_file(old).map_err(Error::io("remove", old))?;
        }
        Ok(files)
    }
    /// Whether a file is named as this writer names its shards.
    fn is_numbered(&self, file: &Path) -> bool {
        let stem = file.file_stem().and_then(|s| s.to_str()).unwrap_or_default();
        let number = stem.strip_prefix(&self.split).and_then(|s| s.strip_prefix('_'));
        number.is_some_and(|n| n.len() >= 6 && n.bytes().all(|b| b.is_ascii_digit()))
    }
}

/// A temporary file in `dir`, with the permissions that a plain new file there would have.
fn stage(dir: &Path) -> Result<NamedTempFile> {
    let mut builder = tempfile::Builder::new();
    builder.prefix(".felid-").suffix(".tmp");
    #[cfg(unix)]
    builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
    builder.tempfile_in(dir).map_err(Error::io("write in", dir))
}

/// Write a small file whole or not at all.
pub(super) fn write_whole(path: &Path, bytes: &[u8]) -> Result<()> {
    let dir = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let mut file = stage(dir)?;
    file.write_all(bytes).and_then(|()| file.as_file().sync_all()).map_err(Error::io("write", path))?;
    file.persist(path).map(drop).map_err(|e| Error::io("write", path)(e.error))
}
