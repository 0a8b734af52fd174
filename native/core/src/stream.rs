//! One stream's cache, beside its blocks: what it is called, where its copies can lie, and what it keeps for itself.

use crate::events::{EngineHash, Extra, GroupSpec, Tier};
use crate::irregular::Irregular;
use crate::keys::BlockKey;
use crate::promises::StreamName;
use crate::slots::{PLACES_MAX, RETIRED, Slot, StreamId, slot};
use crate::table::RecordId;
use hashbrown::HashMap;
use hashlink::LinkedHashMap;
use smallvec::SmallVec;
use std::collections::VecDeque;
use std::sync::Arc;

/// A tier's number.
pub type TierId = u16;

/// A block that waits for its parent, or (without tokens) for any event that says what it holds.
#[derive(Default)]
pub struct Orphan {
    /// The block before it.
    pub parent: Option<EngineHash>,
    /// What it holds.
    pub tokens: Option<Box<[u32]>>,
    /// What its key depends on beyond that.
    pub extras: Box<[Extra]>,
    /// Where it is held.
    pub copies: SmallVec<[(Slot, u32); 1]>,
}

/// One KV cache.
pub struct Stream {
    /// Its number.
    pub id: StreamId,
    /// Its name.
    pub name: Arc<StreamName>,
    /// The served model, as its events (or whoever sent them) named it.
    pub model: Option<Arc<str>>,
    /// The root of that model's chains, if it was needed yet.
    pub root: Option<BlockKey>,
    /// Why its entries may be wrong: a code of the caller's.
    pub stale: Option<u8>,
    /// The engine's clock at the last event.
    pub last_event_s: Option<f64>,
    /// Attention groups, in the order in which they were learnt.
    pub groups: Vec<(u32, GroupSpec)>,
    pub(crate) places: Vec<(TierId, u32)>,
    /// Engine blocks resident.
    pub held: u64,
    /// Engine blocks remembered, by generation.
    pub retired: [u64; 2],
    /// The generation that blocks retire to now.
    pub young: u32,
    /// The record that lost a copy last, if there was one: the next one is likely before it.
    pub removed_last: RecordId,
    /// Blocks whose keys are not known, oldest first.
    pub orphans: LinkedHashMap<EngineHash, Orphan>,
    /// How many of them are held.
    pub orphans_resident: u64,
    /// Orphans by the parent that they wait for.
    pub children: HashMap<EngineHash, VecDeque<EngineHash>>,
    /// Blocks that are not one index block each.
    pub irregular: Irregular,
}

impl Stream {
    /// A stream that nothing is known of.
    pub fn new(id: StreamId, name: Arc<StreamName>) -> Self {
        Self {
            id,
            name,
            model: None,
            root: None,
            stale: None,
            last_event_s: None,
            groups: Vec::new(),
            places: Vec::new(),
            held: 0,
            retired: [0; 2],
            young: 0,
            removed_last: 0,
            orphans: LinkedHashMap::new(),
            orphans_resident: 0,
            children: HashMap::new(),
            irregular: Irregular::default(),
        }
    }

    /// The slot of a place; None if the stream has too many places to keep another one apart.
    pub fn slot(&mut self, tier: TierId, group: u32) -> Option<Slot> {
        let place = match self.places.iter().position(|place| *place == (tier, group)) {
            Some(known) => known,
            None if self.places.len() == PLACES_MAX => return None,
            None => {
                self.places.push((tier, group));
                self.places.len() - 1
            }
        };
        Some(slot(self.id, place as u32 + RETIRED))
    }

    /// The tier and group of one of its slots with copies.
    #[inline]
    pub fn place(&self, slot: Slot) -> (TierId, u32) {
        self.places[(crate::slots::place_of(slot) - RETIRED) as usize]
    }

    /// Its slots in a tier, of one group or all.
    pub fn slots_in(&self, tier: TierId, group: Option<u32>) -> SmallVec<[Slot; 4]> {
        let places = self.places.iter().enumerate();
        let wanted = places.filter(|(_, place)| place.0 == tier && group.is_none_or(|group| group == place.1));
        wanted.map(|(number, _)| slot(self.id, number as u32 + RETIRED)).collect()
    }

    /// Remember how a group caches. One more than there are places is not remembered: no copy could lie in it.
    pub fn learn_group(&mut self, group: u32, spec: GroupSpec) {
        let is_full = self.groups.len() == PLACES_MAX;
        match self.groups.iter_mut().find(|(known, _)| *known == group) {
            None if is_full => {}
            None => self.groups.push((group, spec)),
            // the beginning of a block, cached by itself (vLLM's partial blocks), is not the group's block size
            Some((_, known)) if known.block_size_tokens.unwrap_or(0) > spec.block_size_tokens.unwrap_or(0) => {}
            Some((_, known)) => *known = spec,
        }
    }

    /// A block is no longer remembered, if it was: it is held again, or gone.
    pub fn recall(&mut self, generation: Option<u32>) {
        if let Some(generation) = generation {
            self.retired[generation as usize] -= 1;
        }
    }

    /// Forget that a child waits for its parent.
    pub fn stop_waiting(&mut self, parent: EngineHash, child: EngineHash) {
        if let Some(waiting) = self.children.get_mut(&parent) {
            if let Some(at) = waiting.iter().position(|other| *other == child) {
                waiting.remove(at);
            }
            if waiting.is_empty() {
                self.children.remove(&parent);
            }
        }
    }
}

/// The numbers of tiers.
pub struct Tiers {
    names: Vec<Tier>,
}

impl Default for Tiers {
    /// The device is tier 0. The usual ones are there from the start: no engine can use up the numbers that others need.
    fn default() -> Self {
        Self { names: ["gpu", "cpu", "disk", "storage"].map(Tier::named).into() }
    }
}

impl Tiers {
    /// A tier's number, if it has one.
    pub fn find(&self, tier: &Tier) -> Option<TierId> {
        self.names.iter().position(|known| known == tier).map(|number| number as TierId)
    }

    /// A tier's number; a new one for a new name. None if there are too many names.
    pub fn number(&mut self, tier: &Tier) -> Option<TierId> {
        if let Some(known) = self.find(tier) {
            return Some(known);
        }
        if self.names.len() > TierId::MAX as usize {
            return None;
        }
        self.names.push(tier.clone());
        Some((self.names.len() - 1) as TierId)
    }

    /// All names, by number.
    pub fn names(&self) -> &[Tier] {
        &self.names
    }
}
