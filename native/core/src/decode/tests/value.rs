//! msgpack written by hand, so that tests choose its forms.

/// A value to be written.
#[derive(Clone, Debug)]
pub enum Value {
    Nil,
    Bool(bool),
    Int(i128),
    Float(f64),
    Str(String),
    Bin(Vec<u8>),
    Array(Vec<Value>),
    /// Pairs in order; keys may repeat.
    Map(Vec<(Value, Value)>),
    /// Bytes as they are.
    Raw(Vec<u8>),
}

impl Value {
    pub fn packed(&self) -> Vec<u8> {
        let mut out = Vec::new();
        self.pack(&mut out);
        out
    }

    fn pack(&self, out: &mut Vec<u8>) {
        match self {
            Self::Nil => out.push(0xC0),
            Self::Bool(value) => out.push(0xC2 | u8::from(*value)),
            Self::Int(value) => pack_int(*value, out),
            Self::Float(value) => {
                out.push(0xCB);
                out.extend(value.to_be_bytes());
            }
            Self::Str(text) if text.len() < 32 => {
                out.push(0xA0 | text.len() as u8);
                out.extend(text.as_bytes());
            }
            Self::Str(text) => {
                out.push(0xDA);
                out.extend((text.len() as u16).to_be_bytes());
                out.extend(text.as_bytes());
            }
            Self::Bin(bytes) => {
                out.extend([0xC4, bytes.len() as u8]);
                out.extend(bytes);
            }
            Self::Array(items) => {
                pack_length(items.len(), 0x90, 0xDC, out);
                items.iter().for_each(|item| item.pack(out));
            }
            Self::Map(pairs) => {
                pack_length(pairs.len(), 0x80, 0xDE, out);
                for (key, value) in pairs {
                    key.pack(out);
                    value.pack(out);
                }
            }
            Self::Raw(bytes) => out.extend(bytes),
        }
    }

    /// A map with `key` set to `value`, in its place or at the end.
    pub fn with(self, key: &str, value: impl Into<Value>) -> Self {
        let Self::Map(mut pairs) = self else { panic!("no map") };
        match pairs.iter_mut().find(|(name, _)| matches!(name, Self::Str(name) if name == key)) {
            Some((_, old)) => *old = value.into(),
            None => pairs.push((key.into(), value.into())),
        }
        Self::Map(pairs)
    }

    /// A map without `key`.
    pub fn without(self, key: &str) -> Self {
        let Self::Map(mut pairs) = self else { panic!("no map") };
        pairs.retain(|(name, _)| !matches!(name, Self::Str(name) if name == key));
        Self::Map(pairs)
    }

    /// An array with more at its end.
    pub fn and(self, more: &[Value]) -> Self {
        let Self::Array(mut items) = self else { panic!("no array") };
        items.extend_from_slice(more);
        Self::Array(items)
    }
}

fn pack_int(value: i128, out: &mut Vec<u8>) {
    match value {
        0..=0x7F => out.push(value as u8),
        -32..0 => out.push(value as i8 as u8),
        0x80..=0xFF => out.extend([0xCC, value as u8]),
        0x100..=0xFFFF => {
            out.push(0xCD);
            out.extend((value as u16).to_be_bytes());
        }
        0x1_0000..=0xFFFF_FFFF => {
            out.push(0xCE);
            out.extend((value as u32).to_be_bytes());
        }
        0x1_0000_0000.. => {
            out.push(0xCF);
            out.extend((value as u64).to_be_bytes());
        }
        _ => {
            out.push(0xD3);
            out.extend((value as i64).to_be_bytes());
        }
    }
}

fn pack_length(length: usize, short: u8, long: u8, out: &mut Vec<u8>) {
    if length < 16 {
        out.push(short | length as u8);
    } else {
        out.push(long);
        out.extend((length as u16).to_be_bytes());
    }
}

macro_rules! from_int {
    ($($int:ty),*) => {
        $(impl From<$int> for Value {
            fn from(value: $int) -> Self {
                Self::Int(value.into())
            }
        })*
    };
}
from_int!(i32, i64, u32, u64);

impl From<&str> for Value {
    fn from(text: &str) -> Self {
        Self::Str(text.into())
    }
}

impl From<Vec<Value>> for Value {
    fn from(items: Vec<Value>) -> Self {
        Self::Array(items)
    }
}

/// An array of integers.
pub fn ints(values: impl IntoIterator<Item = i128>) -> Value {
    Value::Array(values.into_iter().map(Value::Int).collect())
}

/// A map with string keys.
pub fn map(pairs: &[(&str, Value)]) -> Value {
    Value::Map(pairs.iter().map(|(key, value)| ((*key).into(), value.clone())).collect())
}

/// An array.
pub fn array(items: &[Value]) -> Value {
    Value::Array(items.to_vec())
}
