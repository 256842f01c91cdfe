//! Text to token ids and back: plain bytes by default, or a `tokenizer.json`.

use super::stream::DecodeStream;
use crate::{Error, Result};
use rayon::prelude::*;
use std::borrow::Cow;
use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;
use tokenizers::normalizers::NormalizerWrapper;
use tokenizers::pre_tokenizers::PreTokenizerWrapper;

/// The name that a tokenizer has in a folder.
pub const TOKENIZER_FILE: &str = "tokenizer.json";
/// The token that separates documents, where the vocabulary has it.
pub const END_OF_TEXT: &str = "<|endoftext|>";
/// Texts are encoded in parallel in pieces of about this many bytes.
const PIECE: usize = 128 << 10;

/// Byte b at place b: what the byte tokenizer's ids stand for.
static EVERY_BYTE: [u8; 256] = {
    let mut all = [0; 256];
    let mut b = 0;
    while b < 256 {
        all[b] = b as u8;
        b += 1;
    }
    all
};

/// How text becomes token ids. Cloning is cheap.
#[derive(Clone, Debug, Default)]
pub enum Tokenizer {
    /// One token a byte: ids 0 to 255. Takes any bytes, needs no file.
    #[default]
    Bytes,
    /// A `tokenizer.json` as Hugging Face's tokenizers write it.
    Json(Arc<JsonTokenizer>),
}

/// A loaded `tokenizer.json`, with its text as it was.
#[derive(Debug)]
pub struct JsonTokenizer {
    inner: tokenizers::Tokenizer,
    raw: Vec<u8>,
    vocab_size: usize,
    /// The bytes of each token if its decoder is byte-level (GPT-2, Llama 3): ids then decode one by one.
    token_bytes: Option<HashMap<u32, Box<[u8]>>>,
    cuts: Cuts,
}

/// Where a text can be cut such that the pieces' tokens, joined, are the whole text's.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Cuts {
    /// Nowhere that is known: a normaliser or pre-tokeniser may look across any place.
    Nowhere,
    /// Between an ASCII letter or digit and a newline: no pattern in use (GPT-4's, Llama 3's, Qwen's) joins these.
    AfterWord,
    /// Between any character but white space and a newline: what GPT-2's own pattern never joins.
    AfterLine,
}

impl Tokenizer {
    /// From a `tokenizer.json` or a folder that may hold one; bytes if there is none, or for `None`.
    pub fn load(path: Option<&Path>) -> Result<Self> {
        let Some(path) = path else { return Ok(Self::Bytes) };
        let mut file = Cow::Borrowed(path);
        if std::fs::metadata(path).map_err(Error::io("open", path))?.is_dir() {
            file = Cow::Owned(path.join(TOKENIZER_FILE));
            if !file.exists() {
                return Ok(Self::Bytes);
            }
        }
        Self::from_json(std::fs::read(&file).map_err(Error::io("read", &file))?, &file)
    }
    /// From the text of a `tokenizer.json`; `path` is what errors name.
    pub fn from_json(raw: Vec<u8>, path: &Path) -> Result<Self> {
        let bad = |e: &dyn std::fmt::Display| Error::format(path, format!("is no tokenizer.json that can be used: {e}"));
        // The library panics on some damaged files: on what is no JSON at all (told apart here), and on a few tables.
        let text = std::str::from_utf8(&raw).map_err(|e| bad(&e))?;
        serde_json::from_str::<serde::de::IgnoredAny>(text).map_err(|e| bad(&e))?;
        let mut inner = std::panic::catch_unwind(|| tokenizers::Tokenizer::from_bytes(&raw))
            .map_err(|_| bad(&"one of its tables is damaged"))?
            .map_err(|e| bad(&e))?;
        // A file may carry its trainer's cut-off or padding; text is never to be shortened or lengthened silently.
        inner.with_truncation(None).map_err(|e| bad(&e))?;
        inner.with_padding(None);
        let ids: Vec<u32> = inner.get_vocab(true).into_values().collect();
        let vocab_size = ids.iter().max().map(|&id| id as usize + 1).ok_or_else(|| bad(&"its vocabulary is empty"))?;
        let byte_level = matches!(inner.get_decoder(), Some(tokenizers::DecoderWrapper::ByteLevel(_)));
        let token_bytes = byte_level.then(|| {
            let bytes = super::bpe::byte_of_char();
            let of = |id| Some((id, super::bpe::token_bytes(&inner.id_to_token(id)?, &bytes)));
            ids.iter().filter_map(|&id| of(id)).collect()
        });
        let cuts = Cuts::of(&inner);
        Ok(Self::Json(Arc::new(JsonTokenizer { inner, raw, vocab_size, token_bytes, cuts })))
    }
    /// One more than the largest id: the `vocab_size` of a model for these tokens.
    pub fn vocab_size(&self) -> usize {
        match self {
            Self::Bytes => 256,
            Self::Json(t) => t.vocab_size,
        }
    }
    /// The id of a token by its text, e.g. `<|endoftext|>`. None for bytes, whose tokens have no names.
    pub fn token_id(&self, token: &str) -> Option<i64> {
        match self {
            Self::Bytes => None,
            Self::Json(t) => t.inner.token_to_id(token).map(i64::from),
        }
    }
    /// The id of `<|endoftext|>`, if there is one.
    pub fn end_of_text(&self) -> Option<i64> {
        self.token_id(END_OF_TEXT)
    }
    /// What tells two tokenizers apart, for configs: `bytes`, or `json-` and a 64-bit FNV-1a hash of the file.
    pub fn fingerprint(&self) -> String {
        match self {
            Self::Bytes => "bytes".into(),
            Self::Json(t) => {
                let step = |h: u64, &b: &u8| (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3);
                format!("json-{:016x}", t.raw.iter().fold(0xcbf2_9ce4_8422_2325, step))
            }
        }
    }
    /// Write `tokenizer.json` into `dir`, byte for byte as it was loaded; nothing for bytes.
    pub fn save(&self, dir: &Path) -> Result<()> {
        match self {
            Self::Bytes => Ok(()),
            Self::Json(t) => super::shards::write_whole(&dir.join(TOKENIZER_FILE), &t.raw),
        }
    }

    /// Token ids of a text, on all threads if it is long. Nothing is added in front or behind.
    pub fn encode(&self, text: &str) -> Result<Vec<i64>> {
        match self {
            Self::Bytes => Ok(text.bytes().map(i64::from).collect()),
            Self::Json(t) => {
                let parts: Result<Vec<Vec<i64>>> = self.pieces(text).into_par_iter().map(|piece| t.encode(piece)).collect();
                parts.map(|p| p.concat())
            }
        }
    }
    /// Like [`Tokenizer::encode`] of bytes that a `tokenizer.json` needs to be UTF-8, and the byte tokenizer does not.
    pub fn encode_bytes(&self, bytes: &[u8]) -> Result<Vec<i64>> {
        match self {
            Self::Bytes => Ok(bytes.iter().map(|&b| i64::from(b)).collect()),
            Self::Json(_) => {
                self.encode(std::str::from_utf8(bytes).map_err(|e| not_utf8(Path::new("text"), e.valid_up_to() as u64))?)
            }
        }
    }
    /// The text of token ids; bytes that are no UTF-8 become U+FFFD. Errors on ids that are no tokens.
    pub fn decode(&self, ids: &[i64]) -> Result<String> {
        let mut bytes = Vec::with_capacity(ids.len());
        let append = |&id: &i64| Ok(self.bytes_of(id)?.map(|b| bytes.extend_from_slice(b)));
        if ids.iter().map(append).collect::<Result<Option<()>>>()?.is_some() {
            return Ok(String::from_utf8_lossy(&bytes).into_owned());
        }
        let ids = ids.iter().map(|&id| self.check_id(id)).collect::<Result<Vec<u32>>>()?;
        self.decode_together(&ids)
    }
    /// The text of ids that [`Tokenizer::check_id`] let pass, by the file's own decoder.
    pub(super) fn decode_together(&self, ids: &[u32]) -> Result<String> {
        match self {
            Self::Json(t) if !ids.is_empty() => {
                let failed = |e| Error::config(format!("tokenizer.json cannot decode these ids ({e}): check its decoder"));
                t.inner.decode(ids, false).map_err(failed)
            }
            _ => Ok(String::new()),
        }
    }
    /// Decodes ids one at a time, as they are generated.
    pub fn decode_stream(&self) -> DecodeStream {
        DecodeStream::new(self)
    }

    /// The bytes that one id stands for, or `None` if this tokenizer's ids decode only together.
    pub(super) fn bytes_of(&self, id: i64) -> Result<Option<&[u8]>> {
        let bytes = match self {
            Self::Bytes => usize::try_from(id).ok().and_then(|id| EVERY_BYTE.get(id)).map(std::slice::from_ref),
            Self::Json(t) => match &t.token_bytes {
                None => return Ok(None),
                Some(table) => u32::try_from(id).ok().and_then(|id| table.get(&id)).map(|b| &b[..]),
            },
        };
        bytes.map(Some).ok_or_else(|| self.no_such_id(id))
    }
    /// The id as the tokenizer's own type, if it names a token.
    pub(super) fn check_id(&self, id: i64) -> Result<u32> {
        let known = |&id: &u32| match self {
            Self::Bytes => id < 256,
            Self::Json(t) => t.inner.id_to_token(id).is_some(),
        };
        u32::try_from(id).ok().filter(known).ok_or_else(|| self.no_such_id(id))
    }
    fn no_such_id(&self, id: i64) -> Error {
        let n = self.vocab_size();
        Error::index("decode", format!("id {id} is no token of this tokenizer (vocabulary {n}): mask ids from {n} on"))
    }

    /// The first place at or after `near` where `text` can be cut without changing its tokens; none at its end.
    pub(super) fn cut(&self, text: &[u8], near: usize) -> Option<usize> {
        let Self::Json(t) = self else { return (near < text.len()).then_some(near) };
        let near = near.max(1);
        let newlines = text.get(near..)?.iter().enumerate().filter(|&(_, &b)| b == b'\n').map(|(i, _)| near + i);
        match t.cuts {
            Cuts::Nowhere => None,
            Cuts::AfterWord => newlines.into_iter().find(|&i| text[i - 1].is_ascii_alphanumeric()),
            Cuts::AfterLine => newlines.into_iter().find(|&i| ends_in_ink(&text[..i])),
        }
    }
    /// `text` in pieces of about 128 KiB whose tokens, joined, are its own.
    pub(super) fn pieces<'t>(&self, mut text: &'t str) -> Vec<&'t str> {
        let mut pieces = Vec::with_capacity(text.len() / PIECE + 1);
        while let Some((piece, rest)) = self.cut(text.as_bytes(), PIECE).and_then(|at| text.split_at_checked(at)) {
            pieces.push(piece);
            text = rest;
        }
        pieces.push(text);
        pieces
    }
}

impl JsonTokenizer {
    fn encode(&self, text: &str) -> Result<Vec<i64>> {
        let failed = |e| Error::config(format!("tokenizer.json cannot encode this text ({e}): use one that covers it"));
        let encoding = self.inner.encode_fast(text, false).map_err(failed)?;
        Ok(encoding.get_ids().iter().map(|&id| i64::from(id)).collect())
    }
}

impl Cuts {
    fn of(t: &tokenizers::Tokenizer) -> Self {
        // Unicode composition stops at a newline; other normalisers may prepend, strip or replace.
        let plain = matches!(t.get_normalizer(), None | Some(NormalizerWrapper::NFC(_)));
        let added = t.get_added_tokens_decoder();
        if !plain || added.values().any(|a| a.rstrip || a.content.contains('\n')) {
            return Self::Nowhere;
        }
        match t.get_pre_tokenizer() {
            Some(PreTokenizerWrapper::ByteLevel(b)) if !b.add_prefix_space && b.use_regex => Self::AfterLine,
            Some(PreTokenizerWrapper::Sequence(s)) => match s.as_ref() {
                [PreTokenizerWrapper::Split(_), PreTokenizerWrapper::ByteLevel(b)] if !b.add_prefix_space => Self::AfterWord,
                _ => Self::Nowhere,
            },
            _ => Self::Nowhere,
        }
    }
}

/// Whether the last character is there, whole, and not white space.
fn ends_in_ink(text: &[u8]) -> bool {
    let start = (1..=4.min(text.len())).map(|n| text.len() - n).find(|&i| text[i] & 0xC0 != 0x80);
    let last = start.and_then(|i| std::str::from_utf8(&text[i..]).ok()).and_then(|s| s.chars().next());
    last.is_some_and(|c| !c.is_whitespace())
}

/// The error for text that a `tokenizer.json` cannot take; `at` counts bytes.
pub(super) fn not_utf8(path: &Path, at: u64) -> Error {
    Error::format(
        path,
        format!("byte {at} is not UTF-8, which a tokenizer.json needs: convert it, or use the byte tokenizer"),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A word-level vocabulary whose decoder joins tokens and strips the first space: nothing byte-level about it.
    fn metaspace() -> Tokenizer {
        let json = r#"{"version":"1.0","truncation":{"direction":"Right","max_length":2,"strategy":"LongestFirst","stride":0},
            "padding":null,"added_tokens":[],"normalizer":null,
            "pre_tokenizer":{"type":"Metaspace","replacement":"▁","prepend_scheme":"always","split":true},
            "post_processor":null,
            "decoder":{"type":"Sequence","decoders":[{"type":"ByteFallback"},{"type":"Metaspace","replacement":"▁","prepend_scheme":"always","split":true}]},
            "model":{"type":"WordLevel","vocab":{"▁the":0,"▁cat":1,"▁sat":2,"<0xC3>":3,"<0xA9>":4,"?":9},"unk_token":"?"}}"#;
        Tokenizer::from_json(json.into(), Path::new("metaspace.json")).unwrap()
    }

    #[test]
    fn bytes_take_anything_and_check_ids() {
        let t = Tokenizer::load(None).unwrap();
        assert_eq!((t.vocab_size(), t.fingerprint().as_str()), (256, "bytes"));
        assert_eq!(t.encode("é").unwrap(), [0xC3, 0xA9]);
        assert_eq!(t.encode_bytes(&[255, 0]).unwrap(), [255, 0]);
        assert_eq!(t.decode(&[104, 105, 255, 33]).unwrap(), "hi\u{FFFD}!");
        for bad in [256, -1, i64::MAX] {
            assert!(matches!(t.decode(&[bad]), Err(Error::Index { .. })));
        }
    }

    #[test]
    fn decoders_that_need_context_stream_like_the_whole() {
        let t = metaspace();
        assert_eq!(t.encode("the cat sat").unwrap(), [0, 1, 2], "a file's truncation is not applied");
        let ids = [0, 1, 3, 4, 2, 2];
        let mut stream = t.decode_stream();
        let mut pieces: Vec<String> = ids.iter().map(|&id| stream.push(id).unwrap()).collect();
        assert_eq!(pieces, ["the", " cat", "", "é", " sat", " sat"]);
        pieces.push(stream.finish().unwrap());
        assert_eq!(pieces.concat(), t.decode(&ids).unwrap());
        let mut stream = t.decode_stream();
        assert_eq!(stream.push(3).unwrap(), "");
        assert_eq!(stream.finish().unwrap(), "\u{FFFD}");
        // Ids 5 to 8 are holes in this vocabulary.
        assert_eq!(t.vocab_size(), 10);
        assert!(matches!(t.decode(&[5]), Err(Error::Index { .. })));
        assert!(matches!(t.decode_stream().push(5), Err(Error::Index { .. })));
        assert_eq!(t.pieces(&"a\n".repeat(PIECE)).len(), 1, "no place is known where this one could be cut");
    }

    #[test]
    fn bad_files_are_named() {
        let dir = tempfile::tempdir().unwrap();
        assert!(matches!(Tokenizer::load(Some(dir.path())).unwrap(), Tokenizer::Bytes));
        assert!(matches!(Tokenizer::load(Some(&dir.path().join("none"))), Err(Error::Io { .. })));
        let file = dir.path().join(TOKENIZER_FILE);
        for text in
            ["", "{", "[]", "{\"model\":{\"type\":\"BPE\",\"vocab\":{},\"merges\":[]}}", "\u{0}", "{\"decoder\":{\"a"]
        {
            std::fs::write(&file, text).unwrap();
            let e = Tokenizer::load(Some(dir.path())).unwrap_err();
            assert!(matches!(e, Error::Format { .. }) && e.to_string().contains(TOKENIZER_FILE), "{text}: {e}");
        }
    }
}
