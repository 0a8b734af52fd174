//! A tokenizer as its JSON describes it.

use std::str::FromStr;
use tokenizers::Tokenizer;

/// Why a text has no tokens, or a description no tokenizer: what the library says.
#[derive(Debug)]
pub struct Failure(pub String);

impl From<tokenizers::Error> for Failure {
    fn from(error: tokenizers::Error) -> Self {
        Self(error.to_string())
    }
}

/// A text's own tokens, without special tokens around it.
#[derive(Debug, Default)]
pub struct Encoding {
    /// Token ids.
    pub ids: Vec<u32>,
    /// Where each token ends in the text. Never falls.
    pub ends: Vec<usize>,
}

/// Turns texts into tokens; any number of threads may use it.
pub struct Encoder(Tokenizer);

impl Encoder {
    /// Read a tokenizer.json. `special_as_text`: marks of special tokens in a text are text like any other.
    pub fn new(json: &str, special_as_text: bool) -> Result<Self, Failure> {
        let mut tokenizer = Tokenizer::from_str(json)?;
        tokenizer.set_encode_special_tokens(special_as_text);
        Ok(Self(tokenizer))
    }

    /// A text's tokens.
    pub fn ids(&self, text: &str) -> Result<Vec<u32>, Failure> {
        Ok(self.0.encode_fast(text, false)?.get_ids().to_vec())
    }

    /// The same, and where they end, in bytes.
    pub fn encode(&self, text: &str) -> Result<Encoding, Failure> {
        Ok(rising(&self.0.encode(text, false)?))
    }

    /// The same, and where they end, in characters.
    pub fn encode_chars(&self, text: &str) -> Result<Encoding, Failure> {
        Ok(rising(&self.0.encode_char_offsets(text, false)?))
    }
}

fn rising(encoded: &tokenizers::Encoding) -> Encoding {
    let ends = encoded.get_offsets().iter().scan(0, |highest, &(_, end)| {
        *highest = end.max(*highest);
        Some(*highest)
    });
    Encoding { ids: encoded.get_ids().to_vec(), ends: ends.collect() }
}

#[cfg(test)]
mod tests {
    #[test]
    fn numbers_are_read_as_they_were_written() {
        for digits in ["-6.0322738908430795", "-3.9119590725999434", "-10.125731267943468"] {
            let read: f64 = serde_json::from_str(digits).unwrap();
            assert_eq!(read.to_bits(), digits.parse::<f64>().unwrap().to_bits());
        }
    }
}
