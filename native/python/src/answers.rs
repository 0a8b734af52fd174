//! Answers out: plain values that Python reads without a copy of the index.

use crate::inputs::kind_name;
use kvatlas_core::events::{Event, Extra};
use kvatlas_core::find::Found;
use kvatlas_core::promises::StreamName;
use kvatlas_core::report::Report;
use kvatlas_core::score::StreamScore;
use kvatlas_core::slots::{copies_in, is_held, slot_in, stream_of};
use kvatlas_core::state::State;
use parking_lot::Mutex;
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict, PyString};
use std::sync::Arc;

/// `(stored, removed, cleared, duplicates, removed_unknown, orphaned, adopted, orphans_dropped, refused)`
pub type ReportTuple = (u64, u64, u64, u64, u64, u64, u64, u64, u64);

/// A report, as `kvatlas.types.ApplyReport` takes it.
pub fn report(report: &Report) -> ReportTuple {
    (
        report.stored,
        report.removed,
        report.cleared,
        report.duplicates,
        report.removed_unknown,
        report.orphaned,
        report.adopted,
        report.orphans_dropped,
        report.refused,
    )
}

/// `(pod, rank)`
pub type NameTuple = (String, u32);

/// `(index, (kind, window, block size))`
pub type GroupTuple = (u32, (&'static str, Option<u64>, Option<u32>));

/// `(name, model, groups, stale, blocks, orphans, last event)`
pub type InfoTuple = (NameTuple, Option<String>, Vec<GroupTuple>, Option<u8>, u64, u64, Option<f64>);

/// `(pod, rank, tier, group, copies)`
pub type HolderTuple = (String, u32, String, u32, u32);

/// `(runs of (start, end, number of the set), sets, promises, streams)`
pub type LookupTuple = (Vec<(u32, u32, usize)>, Vec<Vec<HolderTuple>>, Vec<(u32, NameTuple)>, Vec<InfoTuple>);

/// What is known of the streams of some pods, or of all.
pub fn infos(state: &State, pods: Option<&[String]>) -> Vec<InfoTuple> {
    let wanted = |pod: &str| pods.is_none_or(|pods| pods.iter().any(|other| other == pod));
    let streams = state.streams().filter(|stream| wanted(&stream.name.pod));
    streams
        .map(|stream| {
            let groups = stream
                .groups
                .iter()
                .map(|(index, spec)| (*index, (kind_name(spec.kind), spec.window_tokens, spec.block_size_tokens)));
            (
                (stream.name.pod.to_string(), stream.name.dp_rank),
                stream.model.as_deref().map(str::to_owned),
                groups.collect(),
                stream.stale,
                stream.held,
                stream.orphans_resident,
                stream.last_event_s,
            )
        })
        .collect()
}

/// All that was found, by name.
pub fn lookup(state: &State, found: &Found, pods: Option<&[String]>) -> LookupTuple {
    let wanted = |pod: &str| pods.is_none_or(|pods| pods.iter().any(|other| other == pod));
    let mut numbers: Vec<u32> = Vec::new();
    let mut runs = Vec::with_capacity(found.runs.len());
    for run in &found.runs {
        let number = numbers.iter().rposition(|set| *set == run.set).unwrap_or_else(|| {
            numbers.push(run.set);
            numbers.len() - 1
        });
        runs.push((run.start, run.end, number));
    }
    let tiers = state.tiers.names();
    let sets = numbers.iter().map(|set| {
        let held = state.shared.blocks.sets.items(*set).iter().filter(|item| is_held(**item));
        let holders = held.map(|item| {
            let stream = state.stream(stream_of(slot_in(*item)));
            let (tier, group) = stream.place(slot_in(*item));
            (stream.name.pod.to_string(), stream.name.dp_rank, tiers[tier as usize].0.to_string(), group, copies_in(*item))
        });
        holders.filter(|holder| wanted(&holder.0)).collect()
    });
    let sets = sets.collect();
    let promised = found.promised.iter().filter(|(_, name)| wanted(&name.pod));
    let promised = promised.map(|(position, name)| (*position, (name.pod.to_string(), name.dp_rank))).collect();
    (runs, sets, promised, infos(state, pods))
}

/// `(pod, rank, model, score, matched blocks, matched tokens, cached tokens, tiers, speculative, stale)`
type RowTuple<'a> = (&'a str, u32, Option<&'a str>, f64, u32, u64, u64, Vec<(&'a str, u32)>, u32, Option<u8>);

/// Names of streams as Python strings, made once each.
#[derive(Default)]
pub struct Names(pub Mutex<NameTable>);

/// By the stream's number.
#[derive(Default)]
pub struct NameTable(Vec<Option<(Arc<StreamName>, Py<PyString>)>>);

fn text(py: Python<'_>, name: &StreamName) -> Py<PyString> {
    match name.dp_rank {
        0 => PyString::new(py, &name.pod).unbind(),
        rank => PyString::new(py, &format!("{}#dp{rank}", name.pod)).unbind(),
    }
}

impl NameTable {
    fn of<'a>(&'a mut self, py: Python<'_>, stream: &StreamScore) -> &'a Py<PyString> {
        let place = stream.id.map_or(0, |id| id as usize + 1); // the first place is for a stream that has no number
        if self.0.len() <= place {
            self.0.resize_with(place + 1, || None);
        }
        let known = &mut self.0[place];
        if known.as_ref().is_none_or(|(name, _)| !Arc::ptr_eq(name, &stream.name)) {
            *known = None;
        }
        &known.get_or_insert_with(|| (stream.name.clone(), text(py, &stream.name))).1
    }
}

/// Keys as the bytes of an array of 64-bit integers.
pub fn key_bytes<'py>(py: Python<'py>, keys: &[u64]) -> Bound<'py, PyBytes> {
    let mut bytes = Vec::with_capacity(8 * keys.len());
    keys.iter().for_each(|key| bytes.extend_from_slice(&key.to_ne_bytes()));
    PyBytes::new(py, &bytes)
}

/// What the candidates hold of one prompt.
#[pyclass(frozen, module = "kvatlas._native")]
pub struct Scores {
    /// One a stream.
    pub streams: Vec<StreamScore>,
    /// The tiers' names.
    pub tiers: Vec<String>,
    /// For the streams' names.
    pub names: Arc<Names>,
    /// Of the whole blocks.
    pub keys: Vec<u64>,
    /// Whole blocks of the prompt.
    #[pyo3(get)]
    pub blocks: u32,
    /// Of these, how many anybody holds.
    #[pyo3(get)]
    pub blocks_held: u32,
}

#[pymethods]
impl Scores {
    fn __len__(&self) -> usize {
        self.streams.len()
    }

    /// Matched blocks by stream (as `str(kvatlas.types.Stream)`), of those that hold something.
    fn to_dict<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let found = PyDict::new(py);
        let mut names = self.names.0.try_lock(); // never waited for, since the GIL is held
        for stream in self.streams.iter().filter(|stream| stream.matched_blocks > 0) {
            match &mut names {
                Some(names) => found.set_item(names.of(py, stream), stream.matched_blocks)?,
                None => found.set_item(text(py, &stream.name), stream.matched_blocks)?,
            }
        }
        Ok(found)
    }

    /// The keys of the prompt's whole blocks: the bytes of an array of 64-bit integers.
    fn keys<'py>(&self, py: Python<'py>) -> Bound<'py, PyBytes> {
        key_bytes(py, &self.keys)
    }

    /// All there is to tell of each stream.
    fn rows(&self) -> Vec<RowTuple<'_>> {
        self.streams
            .iter()
            .map(|stream| {
                (
                    &*stream.name.pod,
                    stream.name.dp_rank,
                    stream.model.as_deref(),
                    stream.score,
                    stream.matched_blocks,
                    stream.matched_tokens,
                    stream.cached_tokens,
                    stream.tiers.iter().map(|(tier, count)| (self.tiers[*tier as usize].as_str(), *count)).collect(),
                    stream.speculative,
                    stream.stale,
                )
            })
            .collect()
    }
}

/// A decoded batch: `(timestamp, rank, events)`, events as [`crate::inputs::EventTuple`] has them.
pub fn events<'py>(py: Python<'py>, batch: &kvatlas_core::events::Batch) -> PyResult<Vec<Bound<'py, PyAny>>> {
    let extras = |extras: &Vec<Extra>| -> Vec<(i64, String, Vec<u8>)> {
        extras.iter().map(|extra| (extra.offset_tokens, extra.kind.to_string(), extra.value.to_vec())).collect()
    };
    let tuple = |event: &Event| -> PyResult<Bound<'py, PyAny>> {
        Ok(match event {
            Event::Stored(event) => (
                batch.hashes[event.hashes.clone()].to_vec(),
                event.parent,
                batch.tokens[event.tokens.clone()].to_vec(),
                event.block_size_tokens,
                event.tier.0.to_string(),
                event.group,
                event.spec.map(|spec| (kind_name(spec.kind), spec.window_tokens, spec.block_size_tokens)),
                event.lora_name.as_deref().map(str::to_owned),
                event.extras.as_ref().map(|all| {
                    let mut all: Vec<_> = all.iter().map(extras).collect();
                    all.resize(event.hashes.len(), Vec::new());
                    all
                }),
            )
                .into_pyobject(py)?
                .into_any(),
            Event::Removed(event) => (batch.hashes[event.hashes.clone()].to_vec(), event.tier.0.to_string(), event.group)
                .into_pyobject(py)?
                .into_any(),
            Event::Cleared(tier) => (tier.as_ref().map(|tier| tier.0.to_string()),).into_pyobject(py)?.into_any(),
        })
    };
    batch.events.iter().map(tuple).collect()
}
