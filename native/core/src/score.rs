//! Scores: what each stream holds of one prompt, by the rules of `kvatlas.score`.
//!
//! A prompt's blocks come in runs with equal holders, so that a stream costs what changes along the prompt, not its length.

use crate::events::{AttentionKind, GroupSpec};
use crate::find::Found;
use crate::promises::StreamName;
use crate::slots::{Item, StreamId, is_held, slot_in, stream_of};
use crate::state::State;
use crate::stream::{Stream, TierId};
use hashbrown::HashMap;
use smallvec::{SmallVec, smallvec};
use std::sync::Arc;

/// A tier's place in the order from best to worst.
type Rank = u16;

/// What a block is worth by where it lies.
#[derive(Clone, Debug)]
pub struct Weights {
    /// By tier name.
    pub by_tier: HashMap<Box<str>, f64>,
    /// Of a tier that has none.
    pub unknown: f64,
}

/// The built-in ways to turn what a cache holds into one number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scorer {
    /// The sum of tier weights over the longest reusable prefix.
    LongestPrefix,
    /// The number of the last block held, gaps or not.
    HighestBlockHit,
    /// The share of blocks held anywhere in the stream, tier-weighted, gaps or not.
    Coverage,
}

/// What is asked beside the keys.
#[derive(Clone, Debug)]
pub struct Question<'a> {
    /// Length of the prompt.
    pub prompt_tokens: u64,
    /// Tokens of an index block.
    pub block_tokens: u64,
    /// Only these pods.
    pub pods: Option<&'a [&'a str]>,
    /// Streams of another model are no candidates, unless they hold something.
    pub model: Option<&'a str>,
    /// Nor are they then: keys do not tell models apart.
    pub is_confined: bool,
    /// How to score.
    pub scorer: Scorer,
    /// Tier weights.
    pub weights: &'a Weights,
    /// Factor on the score of a stream whose entries may be wrong.
    pub stale_weight: f64,
}

/// What one stream holds. As `kvatlas.results.PodScore`, for one rank.
#[derive(Clone, Debug)]
pub struct StreamScore {
    /// Its number, if anything was heard of it.
    pub id: Option<StreamId>,
    /// Whose.
    pub name: Arc<StreamName>,
    /// Its model.
    pub model: Option<Arc<str>>,
    /// The more the better.
    pub score: f64,
    /// Index blocks of the longest prefix that a request could reuse.
    pub matched_blocks: u32,
    /// Its tokens.
    pub matched_tokens: u64,
    /// The same under the engine's rule that the last token is always computed.
    pub cached_tokens: u64,
    /// Matched blocks by tier.
    pub tiers: SmallVec<[(TierId, u32); 2]>,
    /// Matched blocks that rest on a promise only.
    pub speculative: u32,
    /// Why its entries may be wrong.
    pub stale: Option<u8>,
}

/// All candidates, in no order, and how many of the blocks anybody holds or was promised.
#[derive(Clone, Debug, Default)]
pub struct Scores {
    /// One a stream.
    pub streams: Vec<StreamScore>,
    /// Of the prompt's blocks.
    pub blocks_held: u32,
}

/// Blocks that a group holds in one tier.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Held {
    start: u32,
    end: u32,
    rank: Rank,
}

type Runs = SmallVec<[Held; 2]>;

#[derive(Default)]
struct Holding {
    /// By group: what is held, by position; the last one may still be open (its end is `OPEN`).
    groups: SmallVec<[(u32, Runs); 1]>,
    promised: Vec<u32>,
}

const OPEN: u32 = u32::MAX;

/// The order of tiers, best first: by weight, equal ones by name.
struct Order {
    weights: Vec<f64>,
    tiers: Vec<TierId>,
    ranks: Vec<Rank>,
    /// The order of summing: by name.
    by_name: Vec<TierId>,
    gpu: Rank,
}

impl Order {
    fn new(state: &State, weights: &Weights) -> Self {
        let names = state.tiers.names();
        let weight = |id: &TierId| *weights.by_tier.get(&*names[*id as usize].0).unwrap_or(&weights.unknown);
        let mut by_name: Vec<TierId> = (0..names.len() as TierId).collect();
        by_name.sort_by(|one, other| names[*one as usize].cmp(&names[*other as usize]));
        let mut tiers = by_name.clone();
        tiers.sort_by(|one, other| weight(other).total_cmp(&weight(one)));
        let mut ranks = vec![0; names.len()];
        tiers.iter().enumerate().for_each(|(rank, id)| ranks[*id as usize] = rank as Rank);
        Self { weights: tiers.iter().map(weight).collect(), gpu: ranks[0], tiers, ranks, by_name }
    }

    fn weight(&self, rank: Rank) -> f64 {
        self.weights[rank as usize]
    }
}

/// Score every candidate for what was found.
pub fn score(state: &State, found: &Found, blocks: u32, question: &Question) -> Scores {
    let order = Order::new(state, question.weights);
    let is_wanted = |name: &StreamName| question.pods.is_none_or(|pods| pods.contains(&&*name.pod));
    let is_of_model = |stream: &Stream| match (&stream.model, question.model) {
        (Some(model), Some(wanted)) => **model == *wanted,
        _ => true,
    };
    let mut wanted: Vec<bool> = vec![true; state.streams.len()];
    if question.pods.is_some() || question.is_confined {
        let is_asked = |stream: &Stream| is_wanted(&stream.name) && (!question.is_confined || is_of_model(stream));
        state.streams().for_each(|stream| wanted[stream.id as usize] = is_asked(stream));
    }
    let mut holdings: Vec<Holding> = Vec::new();
    holdings.resize_with(state.streams.len(), Holding::default);
    let mut held = collect(state, found, &order, &wanted, &mut holdings);
    let mut strangers: HashMap<&Arc<StreamName>, Holding> = HashMap::new();
    for (position, name) in &found.promised {
        let id = state.find_stream(name);
        if !id.map_or_else(|| is_wanted(name), |id| wanted[id as usize]) {
            continue;
        }
        held.push((*position, *position + 1));
        let holding = match id {
            Some(id) => &mut holdings[id as usize],
            None => strangers.entry(name).or_default(),
        };
        holding.promised.push(*position);
    }
    let mut scores = Scores { streams: Vec::new(), blocks_held: covered(held) };
    let one_full_group = [(0, GroupSpec { kind: AttentionKind::Full, window_tokens: None, block_size_tokens: None })];
    for stream in state.streams().filter(|stream| wanted[stream.id as usize]) {
        let groups = if stream.groups.is_empty() { &one_full_group[..] } else { &stream.groups };
        let holding = &holdings[stream.id as usize];
        let is_candidate = is_of_model(stream);
        let nothing = holding.groups.is_empty() && holding.promised.is_empty();
        if nothing && !is_candidate && groups.iter().any(|(_, spec)| reads_blocks(spec)) {
            continue;
        }
        let mut scored = match plain(groups, holding, question) {
            Some(held) => score_plain(stream.name.clone(), held, blocks, &order, question),
            None => score_stream(stream.name.clone(), groups, holding, blocks, &order, question),
        };
        if stream.stale.is_some() {
            scored.score *= question.stale_weight;
        }
        if is_candidate || scored.score > 0.0 {
            scored.id = Some(stream.id);
            scored.model = stream.model.clone();
            scored.stale = stream.stale;
            scores.streams.push(scored);
        }
    }
    for (name, holding) in strangers {
        scores.streams.push(score_stream(name.clone(), &one_full_group, &holding, blocks, &order, question));
    }
    scores
}

/// Whether a hit needs any block of a group. A window of one token is the token that is computed.
fn reads_blocks(spec: &GroupSpec) -> bool {
    match spec.kind {
        AttentionKind::Ignored => false,
        AttentionKind::SlidingWindow => spec.window_tokens.is_none_or(|window_tokens| window_tokens > 1),
        AttentionKind::Full | AttentionKind::State => true,
    }
}

/// Turn runs of holder sets into what each stream holds. Returns the ranges that a wanted stream holds.
fn collect(state: &State, found: &Found, order: &Order, wanted: &[bool], holdings: &mut [Holding]) -> Vec<(u32, u32)> {
    let sets = &state.shared.blocks.sets;
    let mut held = Vec::new();
    let mut before: &[Item] = &[];
    let mut position = 0;
    for run in &found.runs {
        if run.start > position {
            change(state, before, &[], position, order, wanted, holdings);
            before = &[];
        }
        let items = sets.items(run.set);
        change(state, before, items, run.start, order, wanted, holdings);
        before = items;
        position = run.end;
        if items.iter().any(|item| is_held(*item) && wanted[stream_of(slot_in(*item)) as usize]) {
            held.push((run.start, run.end));
        }
    }
    change(state, before, &[], position, order, wanted, holdings);
    held
}

/// At a position, other items hold than before: close what ends and open what begins, for each stream that changes.
fn change(
    state: &State,
    before: &[Item],
    after: &[Item],
    position: u32,
    order: &Order,
    wanted: &[bool],
    holdings: &mut [Holding],
) {
    let stream_at = |items: &[Item], at: usize| items.get(at).map_or(StreamId::MAX, |item| stream_of(slot_in(*item)));
    let (mut one, mut other) = (0, 0);
    loop {
        let mut equal = equal_items(&before[one..], &after[other..]);
        // what a stream has counts together: step back to where the stream that differs begins
        let next = stream_at(before, one + equal).min(stream_at(after, other + equal));
        while equal > 0 && stream_at(before, one + equal - 1) == next {
            equal -= 1;
        }
        one += equal;
        other += equal;
        let id = stream_at(before, one).min(stream_at(after, other));
        if id == StreamId::MAX {
            return;
        }
        let count = |items: &[Item], from: usize| (from..items.len()).take_while(|at| stream_at(items, *at) == id).count();
        one += count(before, one);
        let mine = &after[other..other + count(after, other)];
        other += mine.len();
        if wanted[id as usize] {
            holdings[id as usize].update(state.stream(id), mine, position, order);
        }
    }
}

/// How many items two sets have in common before they differ.
fn equal_items(one: &[Item], other: &[Item]) -> usize {
    const TOGETHER: usize = 32;
    let chunks = one.chunks_exact(TOGETHER).zip(other.chunks_exact(TOGETHER));
    let equal = TOGETHER * chunks.take_while(|(one, other)| one == other).count();
    equal + one[equal..].iter().zip(&other[equal..]).take_while(|(one, other)| one == other).count()
}

impl Holding {
    /// From a position on, the stream has these items.
    fn update(&mut self, stream: &Stream, mine: &[Item], position: u32, order: &Order) {
        let mut best: SmallVec<[(u32, Rank); 4]> = SmallVec::new();
        for item in mine.iter().filter(|item| is_held(**item)) {
            let (tier, group) = stream.place(slot_in(*item));
            let rank = order.ranks[tier as usize];
            match best.iter_mut().find(|(other, _)| *other == group) {
                Some((_, known)) => *known = rank.min(*known),
                None => best.push((group, rank)),
            }
        }
        for (group, runs) in &mut self.groups {
            let now = best.iter().position(|(other, _)| other == group).map(|at| best.swap_remove(at).1);
            let open = runs.last_mut().filter(|run| run.end == OPEN);
            if open.as_ref().map(|run| run.rank) == now {
                continue;
            }
            if let Some(open) = open {
                open.end = position;
            }
            if let Some(rank) = now {
                runs.push(Held { start: position, end: OPEN, rank });
            }
        }
        for (group, rank) in best {
            self.groups.push((group, smallvec![Held { start: position, end: OPEN, rank }]));
        }
    }

    /// What a group holds. A promised block counts as held in GPU memory, in every group.
    fn held(&self, group: u32, gpu: Rank) -> Vec<Held> {
        let known = self.groups.iter().find(|(other, _)| *other == group).map_or(&[][..], |(_, runs)| runs);
        if self.promised.is_empty() {
            return known.to_vec();
        }
        let is_known = |position: &&u32| run_at(known, **position).is_none();
        let mut all: Vec<Held> = known.to_vec();
        all.extend(self.promised.iter().filter(is_known).map(|at| Held { start: *at, end: at + 1, rank: gpu }));
        all.sort_unstable_by_key(|run| run.start);
        all
    }
}

fn run_at(runs: &[Held], position: u32) -> Option<&Held> {
    let after = runs.partition_point(|run| run.start <= position);
    runs[..after].last().filter(|run| position < run.end)
}

/// How many positions some ranges cover. They may overlap.
fn covered(mut ranges: Vec<(u32, u32)>) -> u32 {
    ranges.sort_unstable();
    let mut count = 0;
    let mut reached = 0;
    for (start, end) in ranges {
        count += end.saturating_sub(start.max(reached));
        reached = reached.max(end);
    }
    count
}

/// One attention group of one stream against one prompt, at its own block boundaries.
struct Group {
    kind: AttentionKind,
    /// Distance of the boundaries that can be checked, in index blocks.
    step_blocks: u64,
    /// How many boundaries before a hit must be held.
    needed: u64,
    held: Vec<Held>,
    /// First and last number of boundaries (counted from 1) at which a hit may end; in order.
    serves: Vec<(u64, u64)>,
}

impl Group {
    fn new(spec: &GroupSpec, held: Vec<Held>, block_tokens: u64) -> Self {
        let own = spec.block_size_tokens.filter(|size| *size > 0).map_or(block_tokens, u64::from);
        let step = lcm(own, block_tokens);
        let reach = match (spec.kind, spec.window_tokens) {
            (AttentionKind::SlidingWindow, Some(window)) => window.saturating_sub(1).div_ceil(own).saturating_mul(own),
            _ => own,
        };
        let mut group =
            Self { kind: spec.kind, step_blocks: step / block_tokens, needed: reach.div_ceil(step), held, serves: Vec::new() };
        if group.kind != AttentionKind::Full {
            group.serves = group.boundaries_served();
        }
        group
    }

    /// How many blocks the group reaches unbroken from 0.
    fn full_blocks(&self, blocks: u64) -> u64 {
        let mut steps = 0;
        while (steps + 1) * self.step_blocks <= blocks {
            match run_at(&self.held, ((steps + 1) * self.step_blocks - 1) as u32) {
                Some(run) => steps = u64::from(run.end).min(blocks) / self.step_blocks,
                None => break,
            }
        }
        steps * self.step_blocks
    }

    fn boundaries_served(&self) -> Vec<(u64, u64)> {
        let mut held: Vec<(u64, u64)> = Vec::new();
        for run in &self.held {
            let first = (u64::from(run.start) + 1).div_ceil(self.step_blocks);
            let last = u64::from(run.end) / self.step_blocks;
            match held.last_mut() {
                _ if first > last => {}
                Some(before) if before.1 + 1 == first => before.1 = last,
                _ => held.push((first, last)),
            }
        }
        let from = |first: u64| if first == 1 { 1 } else { first.saturating_add(self.needed.max(1) - 1) };
        held.into_iter().map(|(first, last)| (from(first), last)).filter(|(first, last)| first <= last).collect()
    }

    /// The longest hit of at most so many blocks that the group can serve.
    fn longest(&self, blocks: u64) -> u64 {
        if self.kind == AttentionKind::Full || self.needed == 0 {
            return blocks;
        }
        let boundary = blocks / self.step_blocks;
        let before = self.serves.partition_point(|(first, _)| *first <= boundary);
        self.serves[..before].last().map_or(0, |(_, last)| (*last).min(boundary) * self.step_blocks)
    }
}

fn lcm(one: u64, other: u64) -> u64 {
    let (mut a, mut b) = (one, other);
    while b != 0 {
        (a, b) = (b, a % b);
    }
    (one / a).saturating_mul(other)
}

/// What a stream with one full-attention group in index blocks holds: the usual case. None in any other.
fn plain<'a>(specs: &[(u32, GroupSpec)], holding: &'a Holding, question: &Question) -> Option<&'a [Held]> {
    let [(group, spec)] = specs else { return None };
    let is_plain = spec.kind == AttentionKind::Full
        && spec.block_size_tokens.is_none_or(|size| size == 0 || u64::from(size) == question.block_tokens)
        && holding.promised.is_empty()
        && question.scorer == Scorer::LongestPrefix;
    match &holding.groups[..] {
        _ if !is_plain => None,
        [] => Some(&[]),
        [(only, runs)] if only == group => Some(runs),
        _ => None,
    }
}

/// As [`score_stream`], for the usual case.
fn score_plain(name: Arc<StreamName>, held: &[Held], blocks: u32, order: &Order, question: &Question) -> StreamScore {
    let limit = |tokens: u64| u64::from(blocks).min(tokens / question.block_tokens) as u32;
    let most = limit(question.prompt_tokens);
    let mut reach = 0;
    let mut tiers: SmallVec<[(TierId, u32); 2]> = SmallVec::new();
    for run in held.iter().take_while(|run| run.start <= most) {
        if run.start != reach {
            break;
        }
        reach = run.end.min(most);
        let (tier, count) = (order.tiers[run.rank as usize], reach - run.start);
        match tiers.iter_mut().find(|(other, _)| *other == tier) {
            _ if count == 0 => {}
            Some((_, known)) => *known += count,
            None => tiers.push((tier, count)),
        }
    }
    let score = match &tiers[..] {
        [] => 0.0,
        [(tier, count)] => order.weight(order.ranks[*tier as usize]) * f64::from(*count),
        _ => order.by_name.iter().fold(0.0, |sum, id| {
            let count = tiers.iter().find(|(tier, _)| tier == id).map_or(0, |(_, count)| *count);
            if count == 0 { sum } else { sum + order.weight(order.ranks[*id as usize]) * f64::from(count) }
        }),
    };
    StreamScore {
        id: None,
        name,
        model: None,
        score,
        matched_blocks: reach,
        matched_tokens: u64::from(reach) * question.block_tokens,
        cached_tokens: u64::from(reach.min(limit(question.prompt_tokens.saturating_sub(1)))) * question.block_tokens,
        tiers,
        speculative: 0,
        stale: None,
    }
}

fn score_stream(
    name: Arc<StreamName>,
    specs: &[(u32, GroupSpec)],
    holding: &Holding,
    blocks: u32,
    order: &Order,
    question: &Question,
) -> StreamScore {
    let size = question.block_tokens;
    let groups: Vec<Group> = specs
        .iter()
        .filter(|(_, spec)| spec.kind != AttentionKind::Ignored)
        .map(|(group, spec)| Group::new(spec, closed(holding.held(*group, order.gpu), blocks), size))
        .collect();
    let step = groups.iter().fold(1, |step, group| lcm(step, group.step_blocks));
    let full: Vec<&Group> = groups.iter().filter(|group| group.kind == AttentionKind::Full).collect();
    let reach = full.iter().map(|group| group.full_blocks(blocks.into())).min().unwrap_or(blocks.into());
    let longest = |limit_tokens: u64| {
        let mut hit = reach.min(limit_tokens / size) / step * step;
        loop {
            let shorter = groups.iter().map(|group| group.longest(hit)).min().unwrap_or(0) / step * step;
            if shorter == hit {
                return hit;
            }
            hit = shorter;
        }
    };
    let matched = longest(question.prompt_tokens) as u32;
    let read: Vec<&Group> = if full.is_empty() { groups.iter().collect() } else { full };
    let counts = counts_by_rank(&read, matched, order);
    let tier = |rank: usize| order.tiers[rank];
    let score = match question.scorer {
        Scorer::LongestPrefix => {
            let by_name = order.by_name.iter().map(|id| order.ranks[*id as usize]);
            by_name
                .filter(|rank| counts[*rank as usize] > 0)
                .fold(0.0, |sum, rank| sum + order.weight(rank) * f64::from(counts[rank as usize]))
        }
        Scorer::HighestBlockHit => f64::from(highest(holding, blocks, order)),
        Scorer::Coverage => coverage(holding, blocks, order),
    };
    StreamScore {
        id: None,
        name,
        model: None,
        score,
        matched_blocks: matched,
        matched_tokens: u64::from(matched) * size,
        cached_tokens: longest(question.prompt_tokens.saturating_sub(1)) * size,
        tiers: counts.iter().enumerate().filter(|(_, count)| **count > 0).map(|(rank, count)| (tier(rank), *count)).collect(),
        speculative: holding.promised.iter().filter(|position| **position < matched).count() as u32,
        stale: None,
    }
}

/// End the runs that were still open at the prompt's end.
fn closed(mut runs: Vec<Held>, blocks: u32) -> Vec<Held> {
    runs.iter_mut().for_each(|run| run.end = run.end.min(blocks));
    runs
}

/// Matched blocks by the slowest tier that any group would have to read; what no group has to read costs nothing.
fn counts_by_rank(groups: &[&Group], matched: u32, order: &Order) -> Vec<u32> {
    let mut counts = vec![0; order.tiers.len()];
    let mut position = 0;
    while position < matched {
        let mut next = matched;
        let mut slowest = None;
        for group in groups {
            let after = group.held.partition_point(|run| run.start <= position);
            match group.held[..after].last().filter(|run| position < run.end) {
                Some(run) => {
                    slowest = slowest.max(Some(run.rank));
                    next = next.min(run.end);
                }
                None => next = group.held.get(after).map_or(next, |run| next.min(run.start)),
            }
        }
        counts[slowest.unwrap_or(order.gpu) as usize] += next - position;
        position = next;
    }
    counts
}

fn highest(holding: &Holding, blocks: u32, order: &Order) -> u32 {
    let held = holding.groups.iter().flat_map(|(_, runs)| runs).filter(|run| order.weight(run.rank) > 0.0);
    let held = held.map(|run| run.end.min(blocks));
    held.chain(holding.promised.iter().map(|position| position + 1)).max().unwrap_or(0)
}

fn coverage(holding: &Holding, blocks: u32, order: &Order) -> f64 {
    if blocks == 0 {
        return 0.0;
    }
    let mut best = vec![0.0_f64; blocks as usize];
    holding.promised.iter().for_each(|position| best[*position as usize] = 1.0);
    for run in holding.groups.iter().flat_map(|(_, runs)| runs) {
        let weight = order.weight(run.rank);
        best[run.start as usize..run.end.min(blocks) as usize].iter_mut().for_each(|known| *known = known.max(weight));
    }
    let mut counts: Vec<(f64, u32)> = Vec::new();
    best.sort_unstable_by(f64::total_cmp);
    for weight in best {
        match counts.last_mut() {
            Some((known, count)) if *known == weight => *count += 1,
            _ => counts.push((weight, 1)),
        }
    }
    counts.iter().fold(0.0, |sum, (weight, count)| sum + weight * f64::from(*count)) / f64::from(blocks)
}
