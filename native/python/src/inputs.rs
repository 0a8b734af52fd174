//! Python values in: buffers and lists of integers, events as tuples.

use kvatlas_core::events::{AttentionKind, Batch, Event, Extra, GroupSpec, Removed, Stored, Tier};
use pyo3::buffer::{Element, PyBuffer};
use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::ffi;
use pyo3::prelude::*;
use pyo3::types::{PyByteArray, PyBytes, PyList};

/// Token ids: a buffer of 32-bit unsigned integers (taken over in one piece), or a sequence of integers.
pub struct Tokens(pub Vec<u32>);

impl<'a, 'py> FromPyObject<'a, 'py> for Tokens {
    type Error = PyErr;

    fn extract(value: Borrowed<'a, 'py, PyAny>) -> PyResult<Self> {
        integers(&value).map(Self)
    }
}

/// Integers of a one-dimensional buffer of that very type, or of a sequence.
fn integers<'py, T>(value: &Bound<'py, PyAny>) -> PyResult<Vec<T>>
where
    T: for<'a> FromPyObject<'a, 'py, Error = PyErr> + TryFrom<u64> + Element,
{
    if value.is_exact_instance_of::<PyList>() {
        return listed(value); // asking it for its buffer first would make an exception
    }
    if let Ok(buffer) = PyBuffer::<T>::get(value) {
        if buffer.dimensions() != 1 {
            return Err(PyValueError::new_err(format!("expected one dimension, got {}", buffer.dimensions())));
        }
        return buffer.to_vec(value.py());
    }
    if value.is_instance_of::<PyBytes>() || value.is_instance_of::<PyByteArray>() {
        return Err(PyTypeError::new_err("expected integers, got bytes"));
    }
    listed(value)
}

/// A sequence's integers. Those of a list are read in place: three times as fast as by its iterator.
fn listed<'py, T>(value: &Bound<'py, PyAny>) -> PyResult<Vec<T>>
where
    T: for<'a> FromPyObject<'a, 'py, Error = PyErr> + TryFrom<u64>,
{
    let Ok(list) = value.cast_exact::<PyList>() else { return value.extract() };
    let mut found = Vec::with_capacity(list.len());
    for at in 0..list.len() {
        match plain_integer(list, at).and_then(|integer| T::try_from(integer).ok()) {
            Some(integer) => found.push(integer),
            None => found.push(list.get_item(at)?.extract()?),
        }
    }
    Ok(found)
}

/// An item of a list, if it is an `int` of 64 bits.
#[inline]
fn plain_integer(list: &Bound<'_, PyList>, at: usize) -> Option<u64> {
    // SAFETY: the GIL is held (`list` is bound to it), so the list does not change while the borrowed item is read: neither the
    // check nor the conversion of an `int` runs any Python code. `PyList_GetItem` checks its index.
    unsafe {
        let item = ffi::PyList_GetItem(list.as_ptr(), at as ffi::Py_ssize_t);
        if item.is_null() || ffi::PyLong_Check(item) == 0 {
            ffi::PyErr_Clear();
            return None;
        }
        let integer = ffi::PyLong_AsUnsignedLongLong(item);
        if integer == u64::MAX && !ffi::PyErr_Occurred().is_null() {
            ffi::PyErr_Clear();
            return None;
        }
        Some(integer)
    }
}

/// Block keys: a buffer of 64-bit unsigned integers, or a sequence of integers.
pub struct Keys(pub Vec<u64>);

impl<'a, 'py> FromPyObject<'a, 'py> for Keys {
    type Error = PyErr;

    fn extract(value: Borrowed<'a, 'py, PyAny>) -> PyResult<Self> {
        integers(&value).map(Self)
    }
}

/// A time: a finite number of seconds.
pub struct Seconds(pub f64);

impl<'a, 'py> FromPyObject<'a, 'py> for Seconds {
    type Error = PyErr;

    fn extract(value: Borrowed<'a, 'py, PyAny>) -> PyResult<Self> {
        let seconds: f64 = value.extract()?;
        if seconds.is_finite() { Ok(Self(seconds)) } else { Err(PyValueError::new_err(format!("{seconds} is not a time"))) }
    }
}

/// `(offset_tokens, kind, value)`, as `kvatlas.types.Extra`.
pub type ExtraTuple = (i64, String, Vec<u8>);

/// An extra, from its tuple.
pub fn extra((offset_tokens, kind, value): ExtraTuple) -> Extra {
    Extra { offset_tokens, kind: kind.into(), value: value.into() }
}

/// `(kind, window_tokens, block_size_tokens)`, as `kvatlas.types.GroupSpec`.
pub type SpecTuple = (String, Option<u64>, Option<u32>);

type StoredTuple =
    (Vec<u64>, Option<u64>, Tokens, Option<u32>, String, u32, Option<SpecTuple>, Option<String>, Option<Vec<Vec<ExtraTuple>>>);

/// An event as a tuple: told apart by what it has.
#[derive(FromPyObject)]
pub enum EventTuple {
    /// `(hashes, parent, tokens, block size, tier, group, spec, lora name, extras)`
    Stored(StoredTuple),
    /// `(hashes, tier, group)`
    Removed((Vec<u64>, String, Option<u32>)),
    /// `(tier,)`
    Cleared((Option<String>,)),
}

/// A batch, from its events.
pub fn batch(timestamp_s: Option<f64>, events: Vec<EventTuple>) -> PyResult<Batch> {
    let mut batch = Batch { timestamp_s, ..Batch::default() };
    for event in events {
        let event = match event {
            EventTuple::Stored((hashes, parent, tokens, size, tier, group, spec, lora_name, extras)) => {
                let first = batch.hashes.len();
                let first_token = batch.tokens.len();
                batch.hashes.extend(hashes);
                batch.tokens.extend(tokens.0);
                if extras.as_ref().is_some_and(|extras| extras.len() != batch.hashes.len() - first) {
                    return Err(PyValueError::new_err("extras: expected one tuple a hash"));
                }
                Event::Stored(Stored {
                    hashes: first..batch.hashes.len(),
                    parent,
                    tokens: first_token..batch.tokens.len(),
                    block_size_tokens: size,
                    tier: Tier::named(&tier),
                    group,
                    spec: spec.map(group_spec).transpose()?,
                    lora_name: lora_name.map(Into::into),
                    extras: extras.map(|extras| extras.into_iter().map(|some| some.into_iter().map(extra).collect()).collect()),
                })
            }
            EventTuple::Removed((hashes, tier, group)) => {
                let first = batch.hashes.len();
                batch.hashes.extend(hashes);
                Event::Removed(Removed { hashes: first..batch.hashes.len(), tier: Tier::named(&tier), group })
            }
            EventTuple::Cleared((tier,)) => Event::Cleared(tier.map(|tier| Tier::named(&tier))),
        };
        batch.events.push(event);
    }
    Ok(batch)
}

fn group_spec((kind, window_tokens, block_size_tokens): SpecTuple) -> PyResult<GroupSpec> {
    let kind = match kind.as_str() {
        "full" => AttentionKind::Full,
        "sliding_window" => AttentionKind::SlidingWindow,
        "state" => AttentionKind::State,
        "ignored" => AttentionKind::Ignored,
        _ => return Err(PyValueError::new_err(format!("spec: unknown kind {kind}"))),
    };
    Ok(GroupSpec { kind, window_tokens, block_size_tokens })
}

/// A group's kind, as `kvatlas.types.AttentionKind` names it.
pub fn kind_name(kind: AttentionKind) -> &'static str {
    match kind {
        AttentionKind::Full => "full",
        AttentionKind::SlidingWindow => "sliding_window",
        AttentionKind::State => "state",
        AttentionKind::Ignored => "ignored",
    }
}
