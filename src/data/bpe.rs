//! Byte-level byte-pair encoding (Sennrich et al. 2016; bytes as in GPT-2, Radford et al. 2019): training one, and the
//! printable characters that stand for bytes in its files.

use super::tokenizer::{END_OF_TEXT, Tokenizer};
use crate::{Error, Result};
use std::collections::HashMap;
use std::path::Path;
use tokenizers::AddedToken;
use tokenizers::models::TrainerWrapper;
use tokenizers::models::bpe::{BPE, BpeTrainer};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;

/// GPT-2's alphabet: bytes that print as Latin-1 stand for themselves, the others, in order, are U+0100, U+0101, ...
fn char_of_byte() -> [char; 256] {
    let mut next = 0x100;
    std::array::from_fn(|b| match b {
        0x21..=0x7E | 0xA1..=0xAC | 0xAE..=0xFF => char::from(b as u8),
        _ => {
            next += 1;
            // All below U+0144: far from the surrogates, so never replaced.
            char::from_u32(next - 1).unwrap_or(char::REPLACEMENT_CHARACTER)
        }
    })
}

/// The byte that each character of that alphabet stands for.
pub(super) fn byte_of_char() -> HashMap<char, u8> {
    (0..=255).zip(char_of_byte()).map(|(b, c)| (c, b)).collect()
}

/// The bytes of a token's text: through the alphabet, or as it is if a character lies outside (an added token).
pub(super) fn token_bytes(token: &str, alphabet: &HashMap<char, u8>) -> Box<[u8]> {
    let mapped: Option<Vec<u8>> = token.chars().map(|c| alphabet.get(&c).copied()).collect();
    mapped.unwrap_or_else(|| token.as_bytes().to_vec()).into()
}

/// Train a byte-level BPE of exactly `vocab_size` tokens: 256 bytes, the most frequent merges, `<|endoftext|>` last.
///
/// Any text encodes and decodes without loss. The result depends on the texts only: ties go to the smaller ids, and
/// neither threads nor hash order matter. Errors if `vocab_size` is under 257, or the texts hold too few pairs for it,
/// or come to 2 GiB (pairs are counted in 32 bits; a sample does as well).
pub fn train_bpe<S: AsRef<str>>(texts: &[S], vocab_size: usize) -> Result<Tokenizer> {
    if vocab_size < 257 {
        let need = "256 bytes and <|endoftext|> take 257: ask for at least that";
        return Err(Error::config(format!("a BPE vocabulary of {vocab_size} is too small, {need}")));
    }
    let bytes: usize = texts.iter().map(|t| t.as_ref().len()).sum();
    if bytes == 0 {
        return Err(Error::empty("the text to train a tokenizer on", "give at least one file with text"));
    }
    if bytes > i32::MAX as usize {
        return Err(Error::config(format!(
            "{bytes} bytes are more than a BPE is trained on here: give a sample under 2 GiB"
        )));
    }
    let failed = |e| Error::config(format!("training a BPE failed: {e}"));
    // An untrained tokenizer of the same pre-tokeniser knows where the texts can be cut for the threads.
    let split = untrained()?;
    let pieces: Vec<&str> = texts.iter().flat_map(|t| split.pieces(t.as_ref())).collect();
    let trainer = BpeTrainer::builder()
        .vocab_size(vocab_size - 1)
        .initial_alphabet(char_of_byte().into_iter().collect())
        .show_progress(false)
        .build();
    let mut inner = skeleton();
    inner.train(&mut TrainerWrapper::from(trainer), pieces.into_iter()).map_err(failed)?;
    inner.add_special_tokens(&[AddedToken::from(END_OF_TEXT, true)]);
    let found = inner.get_vocab_size(true);
    if found != vocab_size {
        let fix = format!("ask for at most {found} or give more text");
        return Err(Error::config(format!("{bytes} bytes of text yield {found} tokens, not {vocab_size}: {fix}")));
    }
    reload(&inner)
}

/// A byte-level tokenizer without a vocabulary.
fn skeleton() -> tokenizers::Tokenizer {
    let mut t = tokenizers::Tokenizer::new(BPE::default());
    t.with_pre_tokenizer(Some(ByteLevel::new(false, true, true)));
    t.with_decoder(Some(ByteLevel::new(false, true, true)));
    t
}
fn untrained() -> Result<Tokenizer> {
    let mut t = skeleton();
    t.add_special_tokens(&[AddedToken::from(END_OF_TEXT, true)]);
    reload(&t)
}
/// Through the file's text, so that what is used and what is saved are the same thing.
fn reload(t: &tokenizers::Tokenizer) -> Result<Tokenizer> {
    let json = t.to_string(false).map_err(|e| Error::config(format!("a trained tokenizer cannot be written: {e}")))?;
    Tokenizer::from_json(json.into_bytes(), Path::new("the trained tokenizer"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn alphabet_is_complete() {
        let chars = char_of_byte();
        assert_eq!(byte_of_char().len(), 256);
        // GPT-2's space and newline.
        assert_eq!((chars[b' ' as usize], chars[b'\n' as usize], chars[b'a' as usize]), ('Ġ', 'Ċ', 'a'));
        assert_eq!(chars.into_iter().collect::<std::collections::HashSet<_>>(), ByteLevel::alphabet().into_iter().collect());
    }

    #[test]
    fn sizes_that_cannot_be_met() {
        assert!(train_bpe(&["text"], 256).unwrap_err().to_string().contains("257"));
        assert!(matches!(train_bpe(&[""], 300), Err(Error::Empty { .. })));
        assert!(matches!(train_bpe::<&str>(&[], 300), Err(Error::Empty { .. })));
        let few = train_bpe(&["ab"], 300).unwrap_err().to_string();
        assert!(few.contains("258"), "{few}");
        let smallest = train_bpe(&["ab"], 257).unwrap();
        assert_eq!((smallest.vocab_size(), smallest.end_of_text()), (257, Some(256)));
        assert_eq!(smallest.encode("ab<|endoftext|>").unwrap()[2..], [256]);
    }

    #[test]
    fn training_does_not_depend_on_threads() {
        let text = "the cat sat on the mat; that cat, the fat one.\n\n".repeat(9000);
        let train = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| train_bpe(&[&text], 275)).unwrap().fingerprint()
        };
        assert_eq!(train(1), train(3));
    }
}
