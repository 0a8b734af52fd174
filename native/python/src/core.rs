//! The index and the decoder as Python sees them.

use crate::answers::{self, InfoTuple, LookupTuple, Names, ReportTuple, Scores};
use crate::inputs::{EventTuple, ExtraTuple, Keys, Seconds, Tokens, batch, extra};
use kvatlas_core::decode::{Unusual, Wire, decode as decode_payload};
use kvatlas_core::events::{Batch, Event};
use kvatlas_core::index::{Index, TooManyStreams};
use kvatlas_core::keys::chain::{self, Recipe};
use kvatlas_core::keys::{ChainEnd, KeySchema, Mode};
use kvatlas_core::promises::StreamName;
use kvatlas_core::report::{Limits, Report};
use kvatlas_core::score::{Question, Scorer, Weights};
use kvatlas_core::state::State;
use pyo3::exceptions::{PyRuntimeError, PyValueError};
use pyo3::prelude::*;
use pyo3::pybacked::PyBackedBytes;
use pyo3::types::PyBytes;
use std::sync::Arc;

/// What payloads did to one rank: `(rank, report, stored events, removed events, cleared events, last timestamp, tiers stored to)`
type AppliedTuple = (u32, ReportTuple, u64, u64, u64, Option<f64>, Vec<String>);

/// A payload: `(timestamp, rank, events)`
type DecodedTuple<'py> = (Option<f64>, Option<u32>, Vec<Bound<'py, PyAny>>);

/// What is asked for beside the keys: `(pods, model, scorer, weights by tier, weight of others, stale weight)`
type QuestionTuple = (Option<Vec<String>>, Option<String>, String, Vec<(String, f64)>, f64, f64);

/// As for an engine's block size.
const BLOCK_SIZE_TOKENS_MAX: usize = 1 << 20;

/// Payloads that are decoded before they are applied in one turn: so many, of so many bytes together (but for a single one).
const TURN_PAYLOADS: usize = 16;
const TURN_BYTES: usize = 1 << 20;

fn turns(payloads: &[PyBackedBytes]) -> impl Iterator<Item = &[PyBackedBytes]> {
    let mut rest = payloads;
    std::iter::from_fn(move || {
        let mut bytes = 0;
        let fits = |payload: &&PyBackedBytes| {
            bytes += payload.len();
            bytes <= TURN_BYTES
        };
        let count = rest.iter().take(TURN_PAYLOADS).take_while(fits).count().max(1).min(rest.len());
        let (turn, later) = rest.split_at(count);
        rest = later;
        (count > 0).then_some(turn)
    })
}

fn wire(name: &str) -> PyResult<Wire> {
    match name {
        "vllm" => Ok(Wire::Vllm),
        "sglang" => Ok(Wire::Sglang),
        _ => Err(PyValueError::new_err(format!("wire: {name} is neither vllm nor sglang"))),
    }
}

fn too_many(_: TooManyStreams) -> PyErr {
    PyRuntimeError::new_err("the index follows 1048576 streams and can take no more; forget those that are gone")
}

/// Decode a payload: `(timestamp, rank, events)`, or None for one that the reference decoder has to judge.
#[pyfunction]
pub fn decode<'py>(py: Python<'py>, payload: PyBackedBytes, wire: &str) -> PyResult<Option<DecodedTuple<'py>>> {
    let wire = self::wire(wire)?;
    let mut batch = Batch::default();
    match py.detach(|| decode_payload(&payload, wire, &mut batch)) {
        Err(Unusual) => Ok(None),
        Ok(()) => Ok(Some((batch.timestamp_s, batch.dp_rank, answers::events(py, &batch)?))),
    }
}

/// The keys of a prompt's whole blocks after `root`, by our recipe, an engine's algorithm or llm-d's: the bytes of an array of
/// 64-bit integers. `extras`: `(block, serialized)`, in the order of blocks.
#[pyfunction]
pub fn block_keys<'py>(
    py: Python<'py>,
    recipe: &str,
    root: PyBackedBytes,
    tokens: Tokens,
    block_size_tokens: usize,
    extras: Vec<(usize, Vec<u8>)>,
) -> PyResult<Bound<'py, PyBytes>> {
    let Some(recipe) = Recipe::named(recipe) else {
        return Err(PyValueError::new_err(format!("recipe: {recipe:?} is not known")));
    };
    if !(1..=BLOCK_SIZE_TOKENS_MAX).contains(&block_size_tokens) {
        return Err(PyValueError::new_err(format!("block_size_tokens: expected 1 to {BLOCK_SIZE_TOKENS_MAX}")));
    }
    if recipe.root_bytes().is_some_and(|bytes| bytes != root.len()) {
        return Err(PyValueError::new_err(format!("root: expected 8 bytes, got {}", root.len())));
    }
    if extras.windows(2).any(|two| two[0].0 >= two[1].0) {
        return Err(PyValueError::new_err("extras: expected one a block, in order"));
    }
    Ok(answers::key_bytes(py, &py.detach(|| chain::keys(recipe, &root, &tokens.0, block_size_tokens, &extras))))
}

/// What payloads did to one rank.
#[derive(Default)]
struct Applied {
    dp_rank: u32,
    report: Report,
    stored: u64,
    removed: u64,
    cleared: u64,
    timestamp_s: Option<f64>,
    tiers: Vec<String>,
}

impl Applied {
    fn note(&mut self, batch: &Batch) {
        self.timestamp_s = batch.timestamp_s.or(self.timestamp_s);
        for event in &batch.events {
            match event {
                Event::Stored(event) => {
                    self.stored += 1;
                    if !self.tiers.iter().any(|tier| **tier == *event.tier.0) {
                        self.tiers.push(event.tier.0.to_string());
                    }
                }
                Event::Removed(_) => self.removed += 1,
                Event::Cleared(_) => self.cleared += 1,
            }
        }
    }

    fn into_tuple(self) -> AppliedTuple {
        (self.dp_rank, answers::report(&self.report), self.stored, self.removed, self.cleared, self.timestamp_s, self.tiers)
    }
}

/// An index.
#[pyclass(frozen, module = "kvatlas._native")]
pub struct Core {
    index: Index,
    schema: KeySchema,
    names: Arc<Names>,
}

#[pymethods]
impl Core {
    #[new]
    #[pyo3(signature = (block_size_tokens, seed, mode="kvatlas", *, ttl_s, blocks_max, bytes_max, orphans_max, retired_max, promises_max))]
    #[expect(clippy::too_many_arguments)]
    fn new(
        block_size_tokens: usize,
        seed: String,
        mode: &str,
        ttl_s: f64,
        blocks_max: usize,
        bytes_max: usize,
        orphans_max: usize,
        retired_max: usize,
        promises_max: usize,
    ) -> PyResult<Self> {
        if !(1..=BLOCK_SIZE_TOKENS_MAX).contains(&block_size_tokens) {
            return Err(PyValueError::new_err(format!("block_size_tokens: expected 1 to {BLOCK_SIZE_TOKENS_MAX}")));
        }
        if ttl_s.is_nan() || ttl_s < 0.0 {
            return Err(PyValueError::new_err(format!("ttl_s: expected 0 or more, got {ttl_s}")));
        }
        let Some(mode) = Mode::named(mode) else {
            return Err(PyValueError::new_err(format!("mode: {mode:?} is not known")));
        };
        let schema = KeySchema { block_size_tokens, seed: seed.into(), mode };
        let limits = Limits { ttl_s, blocks_max, bytes_max, orphans_max, retired_max, promises_max };
        Ok(Self { index: Index::new(State::new(schema.clone(), limits)), schema, names: Arc::default() })
    }

    /// Decode and apply payloads of a stream, in order, up to the first that the reference decoder has to judge.
    ///
    /// Returns how many were taken, and what they did to each rank that they named.
    #[pyo3(signature = (pod, dp_rank, payloads, wire, model, now_s))]
    #[expect(clippy::too_many_arguments)]
    fn apply_payloads(
        &self,
        py: Python<'_>,
        pod: &str,
        dp_rank: u32,
        payloads: Vec<PyBackedBytes>,
        wire: &str,
        model: Option<&str>,
        now_s: Seconds,
    ) -> PyResult<(usize, Vec<AppliedTuple>)> {
        let wire = self::wire(wire)?;
        py.detach(|| {
            let mut applied: Vec<Applied> = Vec::new();
            let mut batches: Vec<Batch> = Vec::new();
            let mut name = StreamName { pod: pod.into(), dp_rank };
            let mut taken = 0;
            for payloads in turns(&payloads) {
                batches.resize_with(payloads.len(), Batch::default);
                let reads = payloads.iter().zip(&mut batches).map(|(payload, batch)| decode_payload(payload, wire, batch));
                let read = reads.take_while(Result::is_ok).count();
                let mut turn = self.index.turn();
                for batch in &batches[..read] {
                    name.dp_rank = batch.dp_rank.unwrap_or(dp_rank);
                    let report = turn.apply(&name, batch, model, now_s.0).map_err(too_many)?;
                    let at = applied.iter().position(|some| some.dp_rank == name.dp_rank).unwrap_or_else(|| {
                        applied.push(Applied { dp_rank: name.dp_rank, ..Applied::default() });
                        applied.len() - 1
                    });
                    applied[at].report.add(&report);
                    applied[at].note(batch);
                    taken += 1;
                }
                if read < payloads.len() {
                    break;
                }
            }
            Ok((taken, applied.into_iter().map(Applied::into_tuple).collect()))
        })
    }

    /// Apply one batch of a stream's events, in order.
    #[pyo3(signature = (pod, dp_rank, events, model, timestamp_s, now_s))]
    #[expect(clippy::too_many_arguments)]
    fn apply(
        &self,
        py: Python<'_>,
        pod: &str,
        dp_rank: u32,
        events: Vec<EventTuple>,
        model: Option<&str>,
        timestamp_s: Option<f64>,
        now_s: Seconds,
    ) -> PyResult<ReportTuple> {
        let batch = batch(timestamp_s, events)?;
        let name = StreamName { pod: pod.into(), dp_rank };
        let report = py.detach(|| self.index.apply(&name, &batch, model, now_s.0)).map_err(too_many)?;
        Ok(answers::report(&report))
    }

    /// Find who holds each key.
    #[pyo3(signature = (keys, pods, now_s))]
    fn lookup(&self, py: Python<'_>, keys: Keys, pods: Option<Vec<String>>, now_s: Seconds) -> LookupTuple {
        py.detach(|| self.index.lookup(&keys.0, now_s.0, |state, found| answers::lookup(state, found, pods.as_deref())))
    }

    /// Score a prompt: hash its tokens after `root`, walk, score. `extras`: of the whole prompt.
    #[pyo3(signature = (tokens, root, extras, question, now_s))]
    fn score_tokens(
        &self,
        py: Python<'_>,
        tokens: Tokens,
        root: u64,
        extras: Vec<ExtraTuple>,
        question: QuestionTuple,
        now_s: Seconds,
    ) -> PyResult<Scores> {
        let extras: Vec<_> = extras.into_iter().map(extra).collect();
        let scorer = scorer(&question.2)?;
        Ok(py.detach(|| self.score(&tokens.0, root, &extras, &question, scorer, now_s.0)))
    }

    /// Score prompts, each `(tokens, root, extras)`.
    #[pyo3(signature = (prompts, question, now_s))]
    fn score_prompts(
        &self,
        py: Python<'_>,
        prompts: Vec<(Tokens, u64, Vec<ExtraTuple>)>,
        question: QuestionTuple,
        now_s: Seconds,
    ) -> PyResult<Vec<Scores>> {
        let scorer = scorer(&question.2)?;
        Ok(py.detach(|| {
            let prompts = prompts.into_iter().map(|(tokens, root, extras)| {
                let extras: Vec<_> = extras.into_iter().map(extra).collect();
                self.score(&tokens.0, root, &extras, &question, scorer, now_s.0)
            });
            prompts.collect()
        }))
    }

    /// Score a prompt by the keys of its blocks. `confined`: whoever serves another model is no candidate, whatever it holds.
    #[pyo3(signature = (keys, prompt_tokens, question, now_s, confined=false))]
    fn score_keys(
        &self,
        py: Python<'_>,
        keys: Keys,
        prompt_tokens: u64,
        question: QuestionTuple,
        now_s: Seconds,
        confined: bool,
    ) -> PyResult<Scores> {
        let scorer = scorer(&question.2)?;
        Ok(py.detach(|| self.score_by_keys(keys.0, prompt_tokens, &question, (scorer, confined), now_s.0)))
    }

    /// Note that a stream will soon hold `keys`, until `end_s`.
    #[pyo3(signature = (pod, dp_rank, keys, end_s))]
    fn promise(&self, py: Python<'_>, pod: &str, dp_rank: u32, keys: Keys, end_s: f64) -> PyResult<()> {
        if end_s.is_nan() {
            return Err(PyValueError::new_err("end_s: expected a time, or infinity"));
        }
        py.detach(|| self.index.promise(&StreamName { pod: pod.into(), dp_rank }, &keys.0, end_s));
        Ok(())
    }

    /// Say why a stream's entries may be wrong, by a code, or that they are right.
    #[pyo3(signature = (pod, dp_rank, stale))]
    fn mark(&self, py: Python<'_>, pod: &str, dp_rank: u32, stale: Option<u8>) -> PyResult<()> {
        py.detach(|| self.index.mark(&StreamName { pod: pod.into(), dp_rank }, stale)).map_err(too_many)
    }

    /// Drop all that a stream holds, and forget it if so wished. Returns entries dropped.
    #[pyo3(signature = (pod, dp_rank, forget))]
    fn drop(&self, py: Python<'_>, pod: &str, dp_rank: u32, forget: bool) -> usize {
        py.detach(|| self.index.drop_stream(&StreamName { pod: pod.into(), dp_rank }, forget))
    }

    /// Evict what is due, and clean up. Returns blocks evicted.
    #[pyo3(signature = (now_s))]
    fn expire(&self, py: Python<'_>, now_s: Seconds) -> usize {
        py.detach(|| self.index.expire(now_s.0))
    }

    /// All of the index but its promises.
    #[pyo3(signature = (now_s))]
    fn snapshot<'py>(&self, py: Python<'py>, now_s: f64) -> Bound<'py, PyBytes> {
        PyBytes::new(py, &py.detach(|| self.index.snapshot(now_s)))
    }

    /// Become what the index of a snapshot was. Raises ValueError(problem, remedy).
    #[pyo3(signature = (snapshot, stale_codes, now_s))]
    fn restore(&self, py: Python<'_>, snapshot: PyBackedBytes, stale_codes: u8, now_s: f64) -> PyResult<()> {
        let restored = py.detach(|| self.index.restore(&snapshot, stale_codes, now_s));
        restored.map_err(|error| PyValueError::new_err((error.to_string(), error.remedy())))
    }

    /// What is known of each stream.
    fn streams(&self, py: Python<'_>) -> Vec<InfoTuple> {
        py.detach(|| answers::infos(&self.index.read(), None))
    }

    /// `(blocks, entries, orphans, speculative, streams, pods, bytes, evicted by ttl, by size, by bytes)`
    fn stats(&self, py: Python<'_>) -> [usize; 10] {
        let stats = py.detach(|| self.index.stats());
        let [ttl, size, bytes] = stats.evicted.map(|count| count as usize);
        let [blocks, entries, orphans] = [stats.blocks, stats.entries, stats.orphans];
        [blocks, entries, orphans, stats.speculative, stats.streams, stats.pods, stats.bytes_estimated, ttl, size, bytes]
    }
}

impl Core {
    fn score(
        &self,
        tokens: &[u32],
        root: u64,
        extras: &[kvatlas_core::events::Extra],
        question: &QuestionTuple,
        scorer: Scorer,
        now_s: f64,
    ) -> Scores {
        let mut keys = Vec::with_capacity(tokens.len() / self.schema.block_size_tokens);
        if extras.is_empty() {
            self.schema.keys_after(root, tokens, &mut keys);
        } else {
            self.schema.extend(&ChainEnd::at(root), tokens, extras, &mut keys);
        }
        self.score_by_keys(keys, tokens.len() as u64, question, (scorer, false), now_s)
    }

    fn score_by_keys(
        &self,
        keys: Vec<u64>,
        prompt_tokens: u64,
        question: &QuestionTuple,
        (scorer, is_confined): (Scorer, bool),
        now_s: f64,
    ) -> Scores {
        let (pods, model, _, weights, unknown, stale_weight) = question;
        let pods: Option<Vec<&str>> = pods.as_ref().map(|pods| pods.iter().map(String::as_str).collect());
        let weights = Weights {
            by_tier: weights.iter().map(|(tier, weight)| (tier.as_str().into(), *weight)).collect(),
            unknown: *unknown,
        };
        let question = Question {
            prompt_tokens,
            block_tokens: self.schema.block_size_tokens as u64,
            pods: pods.as_deref(),
            model: model.as_deref(),
            is_confined,
            scorer,
            weights: &weights,
            stale_weight: *stale_weight,
        };
        let mut scores = self.index.lookup(&keys, now_s, |state, found| {
            let scores = kvatlas_core::score::score(state, found, keys.len() as u32, &question);
            Scores {
                streams: scores.streams,
                names: self.names.clone(),
                tiers: state.tiers.names().iter().map(|tier| tier.0.to_string()).collect(),
                keys: Vec::new(),
                blocks: keys.len() as u32,
                blocks_held: scores.blocks_held,
            }
        });
        scores.keys = keys;
        scores
    }
}

fn scorer(name: &str) -> PyResult<Scorer> {
    match name {
        "longest-prefix" => Ok(Scorer::LongestPrefix),
        "highest-block-hit" => Ok(Scorer::HighestBlockHit),
        "coverage" => Ok(Scorer::Coverage),
        _ => Err(PyValueError::new_err(format!("scorer: {name} is not built in"))),
    }
}
