//! Texts to tokens as Python sees them: at once, or by threads whose results a mailbox brings.

use crate::mailbox::{Mailbox, Post};
use kvatlas_tokens::{Encoder, Failure, Found, KnownText, Seams, Segments};
use parking_lot::Mutex;
use pyo3::exceptions::{PyRuntimeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::PyBytes;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Instant;

fn failed(failure: Failure) -> PyErr {
    PyValueError::new_err(failure.0)
}

/// 32-bit integers as the bytes of an array('I').
fn packed<'py>(py: Python<'py>, values: &[u32]) -> PyResult<Bound<'py, PyBytes>> {
    PyBytes::new_with(py, 4 * values.len(), |bytes| {
        for (four, value) in bytes.as_chunks_mut().0.iter_mut().zip(values) {
            *four = value.to_ne_bytes();
        }
        Ok(())
    })
}

/// A tokenizer as the JSON of one that was loaded describes it.
#[pyclass(frozen, module = "kvatlas._native")]
pub struct TextEncoder(Arc<Encoder>);

#[pymethods]
impl TextEncoder {
    #[new]
    fn new(py: Python<'_>, json: &str, special_as_text: bool) -> PyResult<Self> {
        let encoder = py.detach(|| Encoder::new(json, special_as_text)).map_err(failed)?;
        Ok(Self(Arc::new(encoder)))
    }

    /// A text's tokens.
    fn ids<'py>(&self, py: Python<'py>, text: &str) -> PyResult<Bound<'py, PyBytes>> {
        let ids = py.detach(|| self.0.ids(text)).map_err(failed)?;
        packed(py, &ids)
    }

    /// The same, and where they end in the text, in characters.
    fn encode<'py>(&self, py: Python<'py>, text: &str) -> PyResult<(Bound<'py, PyBytes>, Bound<'py, PyBytes>)> {
        let (ids, ends) = py
            .detach(|| {
                let made = self.0.encode_chars(text)?;
                Ok((made.ids, made.ends.iter().map(|&end| end as u32).collect::<Vec<_>>()))
            })
            .map_err(failed)?;
        Ok((packed(py, &ids)?, packed(py, &ends)?))
    }
}

/// Tokens of what lies between seams, of any number of tokenizers.
#[pyclass(frozen, module = "kvatlas._native")]
pub struct SegmentStore(Arc<Segments>);

#[pymethods]
impl SegmentStore {
    #[new]
    fn new(bytes_max: usize) -> Self {
        Self(Arc::new(Segments::new(bytes_max)))
    }

    /// `(entries, bytes of text, tokens, estimated memory in bytes, evicted entries)`
    fn held(&self) -> (usize, usize, usize, usize, usize) {
        let held = self.0.held();
        (held.entries, held.text_bytes, held.tokens, held.bytes, held.evicted)
    }
}

/// `(token ids, how many of them were known, why nothing known is used from here on)`
type FoundTuple<'py> = (Bound<'py, PyBytes>, usize, Option<&'static str>);

fn found_tuple<'py>(py: Python<'py>, found: &Found) -> PyResult<FoundTuple<'py>> {
    Ok((packed(py, &found.ids)?, found.known, found.off))
}

/// A tokenizer that remembers segments of texts.
#[pyclass(frozen, module = "kvatlas._native")]
pub struct SegmentEncoder(Arc<KnownText>);

#[pymethods]
impl SegmentEncoder {
    #[new]
    fn new(
        encoder: &TextEncoder,
        store: &SegmentStore,
        letters: &str,
        newlines: bool,
        specials: Vec<(String, u32)>,
        audit_every: u64,
    ) -> Self {
        let seams = Seams::new(letters, newlines, specials);
        Self(Arc::new(KnownText::new(encoder.0.clone(), seams, store.0.clone(), audit_every)))
    }

    /// A text's tokens.
    fn tokens<'py>(&self, py: Python<'py>, text: &str) -> PyResult<FoundTuple<'py>> {
        let found = py.detach(|| self.0.tokens(text)).map_err(failed)?;
        found_tuple(py, &found)
    }

    /// The known ones of a text's first tokens: those of every text that begins so.
    fn prefix<'py>(&self, py: Python<'py>, text: &str) -> PyResult<Bound<'py, PyBytes>> {
        let ids = py.detach(|| self.0.prefix(text));
        packed(py, &ids)
    }

    /// `(full, assisted, tokens known, mismatches, audits, audit failures)`
    fn stats(&self) -> (u64, u64, u64, u64, u64, u64) {
        let stats = self.0.stats();
        (stats.full, stats.assisted, stats.tokens_known, stats.mismatches, stats.audits, stats.audit_failures)
    }

    /// Why nothing known is used any more.
    #[getter]
    fn off(&self) -> Option<&'static str> {
        self.0.off()
    }
}

/// A text that is to become tokens.
struct Work {
    encoder: Arc<KnownText>,
    text: String,
    post: Post,
    ticket: u64,
}

impl Work {
    fn run(self) {
        let began = Instant::now();
        // A letter comes whatever happens: a panic would end the thread, and who asked would wait in vain.
        let made = catch_unwind(AssertUnwindSafe(|| self.encoder.tokens(&self.text)));
        let found = made.unwrap_or_else(|_| Err(Failure("the tokenizer panicked".into())));
        let seconds = began.elapsed().as_secs_f64();
        let letter = move |py: Python<'_>| match found {
            Ok(found) => Ok((found_tuple(py, &found)?, seconds).into_pyobject(py)?.into_any().unbind()),
            Err(failure) => Ok(failure.0.into_pyobject(py)?.into_any().unbind()),
        };
        self.post.put(self.ticket, Box::new(letter));
    }
}

/// Threads that make tokens without ever taking the interpreter.
#[pyclass(frozen, module = "kvatlas._native")]
pub struct EncoderThreads(Mutex<Option<Sender<Work>>>);

#[pymethods]
impl EncoderThreads {
    #[new]
    fn new(threads: usize) -> PyResult<Self> {
        let (sender, receiver) = channel::<Work>();
        let receiver = Arc::new(Mutex::new(receiver));
        for _ in 0..threads {
            let receiver = receiver.clone();
            std::thread::Builder::new().name("kvatlas-encode".into()).spawn(move || work(&receiver))?;
        }
        Ok(Self(Mutex::new(Some(sender))))
    }

    /// Make a text's tokens: `((token ids, known, off), seconds of work)` comes as a letter for the ticket, or, for a text that has
    /// none, why. Whoever asks bounds how much waits.
    fn submit(&self, encoder: &SegmentEncoder, text: String, mailbox: &Mailbox, ticket: u64) -> PyResult<()> {
        let work = Work { encoder: encoder.0.clone(), text, post: mailbox.post(), ticket };
        let sent = self.0.lock().as_ref().is_some_and(|sender| sender.send(work).is_ok());
        if sent { Ok(()) } else { Err(PyRuntimeError::new_err("the threads are closed")) }
    }

    /// Take nothing new. Threads end when what waits is done.
    fn close(&self) {
        self.0.lock().take();
    }
}

fn work(receiver: &Mutex<Receiver<Work>>) {
    loop {
        let next = receiver.lock().recv();
        match next {
            Ok(work) => work.run(),
            Err(_) => return,
        }
    }
}
