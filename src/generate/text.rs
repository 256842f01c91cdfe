//! Text out of tokens as they come: whole characters, and nothing that a stop string may still claim.

use crate::data::{DecodeStream, Tokenizer};
use crate::{Error, Result};

/// The text of one row.
#[derive(Clone, Debug)]
pub(super) struct TextStream {
    stream: DecodeStream,
    stops: Vec<String>,
    /// Text that may be the beginning of a stop string.
    held: String,
}

impl TextStream {
    pub fn new(tokenizer: &Tokenizer, stops: &[String]) -> Self {
        Self { stream: tokenizer.decode_stream(), stops: stops.to_vec(), held: String::new() }
    }
    /// The text that a token completes, and whether a stop string ended it. An id that a model may choose but that names no
    /// token (vocabularies have holes) has no text.
    pub fn push(&mut self, token: i64) -> Result<(String, bool)> {
        let more = match self.stream.push(token) {
            Err(Error::Index { .. }) => String::new(),
            more => more?,
        };
        Ok(self.add(&more))
    }
    /// What is left when no further token comes, and whether it ends in a stop string after all.
    pub fn finish(&mut self) -> Result<(String, bool)> {
        let more = self.stream.clone().finish()?;
        let (mut text, stopped) = self.add(&more);
        if !stopped {
            text.push_str(&std::mem::take(&mut self.held));
        }
        Ok((text, stopped))
    }

    fn add(&mut self, more: &str) -> (String, bool) {
        self.held.push_str(more);
        // the first to end, as if characters came one by one; of those that end together the longest
        let found = self.stops.iter().filter_map(|s| Some((self.held.find(s.as_str())?, s.len())));
        if let Some((at, _)) = found.min_by_key(|(at, len)| (at + len, *at)) {
            self.held.truncate(at);
            return (std::mem::take(&mut self.held), true);
        }
        let claimed = |s: &String| {
            let starts = s.char_indices().map(|(i, c)| i + c.len_utf8()).filter(|n| *n < s.len());
            starts.filter(|n| self.held.ends_with(&s[..*n])).max().unwrap_or(0)
        };
        let keep = self.stops.iter().map(claimed).max().unwrap_or(0);
        let rest = self.held.split_off(self.held.len() - keep);
        (std::mem::replace(&mut self.held, rest), false)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn ids_without_a_token_have_no_text() {
        let mut stream = TextStream::new(&Tokenizer::Bytes, &["ab".into()]);
        let pieces = [0xc3, 300, 0xa9, 97, 1000, 98].map(|id| stream.push(id).unwrap());
        assert_eq!(
            pieces.map(|(text, stopped)| format!("{text}{}", if stopped { "|" } else { "" })),
            ["", "", "é", "", "", "|"]
        );
    }

    proptest! {
        /// Pieces joined are the text before the stop string that ends first, however the text is cut into tokens; held text
        /// is never longer than it has to be.
        #[test]
        fn stops_are_found_across_tokens(text in "[abé]{0,14}", stops in prop::collection::vec("[abé]{1,4}", 0..4)) {
            let ends = |n: usize| stops.iter().filter(|s| text[..n].ends_with(s.as_str())).map(|s| s.len()).max();
            let mut cuts = text.char_indices().map(|(i, c)| i + c.len_utf8());
            let want = cuts.find_map(|n| Some(&text[..n - ends(n)?]));
            let mut stream = TextStream::new(&Tokenizer::Bytes, &stops);
            let (mut got, mut stopped) = (String::new(), false);
            for byte in text.bytes() {
                let (piece, stop) = stream.push(byte.into()).unwrap();
                got.push_str(&piece);
                prop_assert!(stream.held.is_empty() || stops.iter().any(|s| s.starts_with(&stream.held)));
                stopped = stop;
                if stop {
                    break;
                }
            }
            if !stopped {
                let (piece, stop) = stream.finish().unwrap();
                got.push_str(&piece);
                stopped = stop;
            }
            prop_assert_eq!(stopped, want.is_some());
            prop_assert_eq!(got.as_str(), want.unwrap_or(&text));
        }
    }
}
