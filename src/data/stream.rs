//! Decoding while generating: text as soon as it is complete, never half a character.

use super::tokenizer::Tokenizer;
use crate::Result;

/// How many ids without any text are waited for before the oldest stop serving as context.
const PATIENCE: usize = 64;

/// Takes token ids one at a time and yields text as soon as it is complete.
///
/// For bytes and byte-level files the pieces joined are exactly [`Tokenizer::decode`] of all ids. Other decoders see the
/// ids of the previous piece as context; there the same holds for texts without U+FFFD.
#[derive(Clone, Debug)]
pub struct DecodeStream {
    tokenizer: Tokenizer,
    /// Bytes of a character that is not complete: at most 3.
    pending: Vec<u8>,
    /// Where ids decode only together: `context` ids whose text is out, then those whose text is not.
    ids: Vec<u32>,
    context: usize,
}

impl DecodeStream {
    pub(super) fn new(tokenizer: &Tokenizer) -> Self {
        Self { tokenizer: tokenizer.clone(), pending: Vec::new(), ids: Vec::new(), context: 0 }
    }
    /// The text that this id completes; often empty. Errors, and changes nothing, if the id is no token.
    pub fn push(&mut self, id: i64) -> Result<String> {
        if let Some(bytes) = self.tokenizer.bytes_of(id)? {
            self.pending.extend_from_slice(bytes);
            return Ok(take_complete(&mut self.pending));
        }
        let id = self.tokenizer.check_id(id)?;
        self.ids.push(id);
        self.take_new(false)
    }
    /// What is left: U+FFFD for a character that was never completed, else mostly nothing.
    pub fn finish(mut self) -> Result<String> {
        match self.pending[..] {
            [] => self.take_new(true),
            _ => Ok(char::REPLACEMENT_CHARACTER.into()),
        }
    }

    /// The text of context and new ids, less the text of the context.
    fn take_new(&mut self, last: bool) -> Result<String> {
        let whole = self.tokenizer.decode_together(&self.ids)?;
        if whole.ends_with(char::REPLACEMENT_CHARACTER) && !last && self.ids.len() - self.context < PATIENCE {
            return Ok(String::new());
        }
        let before = self.tokenizer.decode_together(&self.ids[..self.context])?;
        let shared: usize = whole.chars().zip(before.chars()).take_while(|(a, b)| a == b).map(|(a, _)| a.len_utf8()).sum();
        let new = whole[shared..].to_string();
        if !new.is_empty() || self.ids.len() - self.context >= PATIENCE {
            self.ids.drain(..self.context);
            self.context = self.ids.len();
        }
        Ok(new)
    }
}

/// Take what is decided out of `bytes`: characters, and U+FFFD for what no further byte can complete.
fn take_complete(bytes: &mut Vec<u8>) -> String {
    let mut text = String::new();
    let mut done = 0;
    for chunk in bytes.utf8_chunks() {
        text.push_str(chunk.valid());
        done += chunk.valid().len();
        let invalid = chunk.invalid();
        // An invalid run at the very end may be a character's beginning.
        if !invalid.is_empty() {
            let incomplete = std::str::from_utf8(invalid).is_err_and(|e| e.error_len().is_none());
            if incomplete && done + invalid.len() == bytes.len() {
                break;
            }
            text.push(char::REPLACEMENT_CHARACTER);
            done += invalid.len();
        }
    }
    bytes.drain(..done);
    text
}
