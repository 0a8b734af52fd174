//! The index, for one writer at a time: what each kind of event does to a stream. As `kvatlas.index.reference`.
//!
//! Every method is a small step, so that whoever drives it can let readers in between two.

use crate::blocks::Blocks;
use crate::keys::{BlockKey, KeySchema};
use crate::promises::{Promises, StreamName};
use crate::recency::{Recency, Tick};
use crate::report::{Limits, Stats};
use crate::secret;
use crate::shared::Shared;
use crate::slots::{STREAMS_MAX, StreamId, is_held};
use crate::stream::{Stream, Tiers};
use crate::table::RecordId;
use crate::victims::Victims;
use hashbrown::HashMap;
use std::sync::Arc;

#[cfg(any(test, fuzzing))]
mod check;
mod evict;
mod naming;
mod remove;
mod store;

pub use store::{Naming, Storing};

/// Blocks that a writer changes before it lets readers in: about 3 microseconds.
pub const STEP_BLOCKS: usize = crate::size(32, 4);
/// Dead records that are too few to look for.
const SWEEP_MIN: usize = crate::size(8192, 5);
/// Estimated bytes of an irregular block with its chunks.
pub const IRREGULAR_BYTES: usize = 500;
/// Estimated bytes of an orphan with 16 tokens.
pub const ORPHAN_BYTES: usize = 320;
/// Estimated bytes of a promise's record.
pub const PROMISE_BYTES: usize = 200;

/// All of the index.
pub struct State {
    /// What streams share.
    pub shared: Shared,
    pub(crate) streams: Vec<Option<Box<Stream>>>,
    pub(crate) by_name: HashMap<Arc<StreamName>, StreamId>,
    pub(crate) free: Vec<StreamId>,
    /// The tiers' names.
    pub tiers: Tiers,
    pub(crate) victims: Victims,
    pub(crate) evicted: [u64; 3],
    /// No key in use was used before this tick.
    not_before: Tick,
    /// The next record to sweep; None while no sweep is under way.
    sweep_at: Option<RecordId>,
}

impl State {
    /// An empty index.
    pub fn new(schema: KeySchema, limits: Limits) -> Self {
        let shared = Shared {
            schema,
            limits,
            blocks: Blocks::new(secret::random()),
            promises: Promises::new(limits.promises_max),
            recency: Recency::new(limits.ttl_s),
            now_s: 0.0,
            irregular: 0,
            orphans: 0,
            content: Vec::new(),
        };
        Self {
            shared,
            streams: Vec::new(),
            by_name: HashMap::new(),
            free: Vec::new(),
            tiers: Tiers::default(),
            victims: Victims::default(),
            evicted: [0; 3],
            not_before: 1,
            sweep_at: None,
        }
    }

    // -- streams ------------------------------------------------------------------------------------------------------

    /// A stream's number; a new one for a new name. None if there are too many.
    pub fn stream_id(&mut self, name: &StreamName) -> Option<StreamId> {
        if let Some(id) = self.by_name.get(name) {
            return Some(*id);
        }
        let id = match self.free.pop() {
            Some(id) => id,
            None if self.streams.len() == STREAMS_MAX => return None,
            None => {
                self.streams.push(None);
                self.streams.len() as StreamId - 1
            }
        };
        let name = Arc::new(name.clone());
        self.streams[id as usize] = Some(Box::new(Stream::new(id, name.clone())));
        self.by_name.insert(name, id);
        Some(id)
    }

    /// A stream's number, if it is known.
    pub fn find_stream(&self, name: &StreamName) -> Option<StreamId> {
        self.by_name.get(name).copied()
    }

    /// A known stream.
    pub fn stream(&self, id: StreamId) -> &Stream {
        self.streams[id as usize].as_ref().expect("a stream's number is used while the stream is known")
    }

    pub(crate) fn stream_mut(&mut self, id: StreamId) -> &mut Stream {
        self.parts(id).1
    }

    /// All streams.
    pub fn streams(&self) -> impl Iterator<Item = &Stream> {
        self.streams.iter().flatten().map(|stream| &**stream)
    }

    fn parts(&mut self, id: StreamId) -> (&mut Shared, &mut Stream) {
        let stream = self.streams[id as usize].as_mut().expect("a stream's number is used while the stream is known");
        (&mut self.shared, stream)
    }

    /// Take note of what a batch says of its stream.
    pub fn begin_batch(&mut self, id: StreamId, model: Option<&str>, timestamp_s: Option<f64>, now_s: f64) {
        let (shared, stream) = self.parts(id);
        shared.now_s = now_s;
        if let Some(model) = model.filter(|model| !model.is_empty())
            && stream.model.as_deref() != Some(model)
        {
            stream.model = Some(model.into());
            stream.root = None;
        }
        if let Some(timestamp_s) = timestamp_s.filter(|timestamp_s| *timestamp_s != 0.0) {
            stream.last_event_s = Some(timestamp_s);
        }
    }

    /// Note that a stream will soon hold those of `keys` that it does not hold.
    pub fn promise(&mut self, name: &Arc<StreamName>, keys: &[BlockKey], end_s: f64) {
        let id = self.find_stream(name);
        let shared = &mut self.shared;
        for key in keys {
            let holds = |id| {
                let blocks = &shared.blocks;
                let primary = blocks.find_key(*key)?;
                blocks.sets.of_stream(blocks.set(primary), id).iter().any(|item| is_held(*item)).then_some(())
            };
            if id.and_then(holds).is_none() {
                shared.promises.make(*key, name, end_s);
            }
        }
    }

    /// Estimated bytes in use.
    pub fn bytes(&self) -> usize {
        self.shared.blocks.bytes()
            + self.shared.irregular * IRREGULAR_BYTES
            + self.shared.orphans * ORPHAN_BYTES
            + self.shared.promises.records() * PROMISE_BYTES
    }

    /// Sizes.
    pub fn stats(&self) -> Stats {
        let mut pods: Vec<&str> = self.streams().map(|stream| &*stream.name.pod).collect();
        pods.sort_unstable();
        pods.dedup();
        Stats {
            blocks: self.shared.blocks.held,
            entries: self.shared.blocks.entries,
            orphans: self.streams().map(|stream| stream.orphans_resident as usize).sum(),
            speculative: self.shared.promises.len(),
            streams: self.by_name.len(),
            pods: pods.len(),
            bytes_estimated: self.bytes(),
            evicted: self.evicted,
        }
    }
}
