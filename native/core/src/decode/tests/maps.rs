//! Events as maps: what vLLM 0.32 and the newest SGLang send.

use super::value::{Value, array, ints, map};
use super::{read, read_events, removed, stored};
use crate::decode::Wire;
use crate::events::{AttentionKind, Event, GroupSpec, Tier};

/// A store of two blocks of two tokens, with the keys that are required.
pub fn small() -> Value {
    map(&[
        ("type", "BlockStored".into()),
        ("block_hashes", ints([7, 8])),
        ("parent_block_hash", Value::Nil),
        ("token_ids", ints([1, 200, 60_000, 4_000_000_000])),
        ("block_size", 2.into()),
    ])
}

/// A store with every key.
pub fn full() -> Value {
    small()
        .with("lora_id", Value::Nil)
        .with("medium", "CPU")
        .with("lora_name", "fr")
        .with("extra_keys", array(&[array(&["fr".into(), array(&["image".into(), (-3).into()])]), Value::Nil]))
        .with("group_idx", 3)
        .with("kv_cache_spec_kind", "sliding_window")
        .with("kv_cache_spec_sliding_window", 64)
        .with("locality", "REMOTE")
        .with("ownership", "mine")
        .with("session_id", "session")
        .with("cache_salt", "tenant")
        .with("metadata", map(&[("cache_salt", "tenant".into()), ("more", ints([1]))]))
}

#[test]
fn a_store_is_read_whole() {
    for wire in [Wire::Vllm, Wire::Sglang] {
        let (batch, event) = stored(wire, full());
        assert_eq!((batch.timestamp_s, batch.dp_rank), (Some(1.5), Some(1)));
        assert_eq!(batch.hashes, [7, 8]);
        assert_eq!(batch.tokens, [1, 200, 60_000, 4_000_000_000]);
        assert_eq!((event.hashes, event.tokens), (0..2, 0..4));
        assert_eq!((event.parent, event.block_size_tokens, event.group), (None, Some(2), 3));
        assert_eq!((event.tier, event.lora_name.as_deref()), (Tier::named("cpu"), Some("fr")));
        let spec = GroupSpec { kind: AttentionKind::SlidingWindow, window_tokens: Some(64), block_size_tokens: Some(2) };
        assert_eq!(event.spec, Some(spec));
        let extras = event.extras.unwrap();
        let kinds: Vec<_> = extras.iter().flatten().map(|extra| (&*extra.kind, &*extra.value, extra.offset_tokens)).collect();
        assert_eq!(kinds, [("mm", &b"image"[..], -3), ("salt", b"tenant", 0)]);
        assert_eq!(extras.len(), 1);
    }
}

#[test]
fn optional_keys_may_be_absent() {
    let (_, event) = stored(Wire::Vllm, small());
    assert_eq!((event.tier, event.group, event.lora_name, event.extras), (Tier::gpu(), 0, None, None));
    let spec = GroupSpec { kind: AttentionKind::Full, window_tokens: None, block_size_tokens: Some(2) };
    assert_eq!(event.spec, Some(spec));
}

#[test]
fn keys_come_in_any_order() {
    let Value::Map(mut pairs) = full() else { unreachable!() };
    let expected = read_events(Wire::Vllm, vec![full()]);
    for _ in 0..pairs.len() {
        pairs.rotate_left(1);
        assert_eq!(read_events(Wire::Vllm, vec![Value::Map(pairs.clone())]), expected);
    }
    pairs.reverse();
    assert_eq!(read_events(Wire::Vllm, vec![Value::Map(pairs)]), expected);
}

#[test]
fn unknown_keys_are_skipped_whatever_they_hold() {
    let odd = array(&[
        Value::Nil,
        Value::Bool(true),
        (-70_000).into(),
        Value::Float(2.0),
        Value::Raw(vec![0xCA, 0, 0, 0, 0]),
        Value::Bin(vec![1, 2]),
        map(&[("block_hashes", ints([1]))]),
        Value::Map(vec![(1.into(), Value::Nil)]),
    ]);
    let (batch, _) = stored(Wire::Vllm, small().with("namespaced_block_hashes", ints([1, 2])).with("odd", odd));
    assert_eq!(batch, read_events(Wire::Vllm, vec![small()]).unwrap());
}

#[test]
fn a_key_of_another_event_is_unknown_here() {
    let event = map(&[("type", "BlockRemoved".into()), ("block_hashes", ints([1])), ("token_ids", "none".into())]);
    assert_eq!(removed(Wire::Vllm, event).0.hashes, [1]);
    let event = map(&[("type", "AllBlocksCleared".into()), ("block_hashes", 5.into())]);
    assert_eq!(read_events(Wire::Vllm, vec![event]).unwrap().events, [Event::Cleared(None)]);
}

#[test]
fn ranges_of_several_events_follow_each_other() {
    let removal = map(&[("type", "BlockRemoved".into()), ("block_hashes", ints([9])), ("group_idx", 2.into())]);
    let batch = read_events(Wire::Vllm, vec![small(), removal, small()]).unwrap();
    assert_eq!(batch.hashes, [7, 8, 9, 7, 8]);
    let ranges: Vec<_> = batch
        .events
        .iter()
        .map(|event| match event {
            Event::Stored(event) => (event.hashes.clone(), event.tokens.clone()),
            Event::Removed(event) => (event.hashes.clone(), 0..0),
            Event::Cleared(_) => (0..0, 0..0),
        })
        .collect();
    assert_eq!(ranges, [(0..2, 0..4), (2..3, 0..0), (3..5, 4..8)]);
}

#[test]
fn hashes_are_integers_of_either_sign_or_digests() {
    let digest: Vec<u8> = (0..32).collect();
    let hashes = array(&[u64::MAX.into(), (-1).into(), i64::MIN.into(), Value::Bin(digest), Value::Bin(vec![1, 2])]);
    let (batch, event) = stored(Wire::Vllm, small().with("block_hashes", hashes).with("parent_block_hash", -2));
    assert_eq!(batch.hashes, [u64::MAX, u64::MAX, 1 << 63, 0x18191A1B1C1D1E1F, 0x0102]);
    assert_eq!(event.parent, Some(u64::MAX - 1));
}

#[test]
fn tokens_are_read_in_every_form_of_an_integer() {
    let forms: [&[u8]; 9] = [
        &[0x05],
        &[0xCC, 5],
        &[0xCD, 0, 5],
        &[0xCE, 0, 0, 0, 5],
        &[0xCF, 0, 0, 0, 0, 0, 0, 0, 5],
        &[0xD0, 5],
        &[0xD1, 0, 5],
        &[0xD2, 0, 0, 0, 5],
        &[0xD3, 0, 0, 0, 0, 0, 0, 0, 5],
    ];
    let tokens: Vec<_> = forms.iter().map(|form| Value::Raw(form.to_vec())).collect();
    assert_eq!(stored(Wire::Vllm, small().with("token_ids", tokens)).0.tokens, [5; 9]);
}

#[test]
fn a_placeholder_has_no_size() {
    let event = small().with("token_ids", ints([])).with("block_size", 0);
    let (batch, event) = stored(Wire::Vllm, event.with("medium", "STORAGE"));
    assert_eq!((event.block_size_tokens, event.spec, event.tier), (None, None, Tier::named("storage")));
    assert!(batch.tokens.is_empty());
}

#[test]
fn a_sliding_window_group_may_name_fewer_blocks_than_its_tokens_fill() {
    let event = small().with("block_hashes", ints([])).with("kv_cache_spec_kind", "sliding_window");
    let (batch, event) = stored(Wire::Vllm, event.with("kv_cache_spec_sliding_window", 64).with("extra_keys", ints([])));
    assert_eq!((event.hashes, batch.tokens.len(), event.extras), (0..0, 4, Some(vec![])));
}

#[test]
fn kinds_of_attention_are_told_apart() {
    let window = 64;
    for (kind, window, expected) in [
        (Value::Nil, window, AttentionKind::Full),
        ("full_attention".into(), window, AttentionKind::Full),
        ("chunked_local_attention".into(), window, AttentionKind::Full),
        ("sliding_window".into(), window, AttentionKind::SlidingWindow),
        ("sliding_window_mla".into(), window, AttentionKind::SlidingWindow),
        ("sliding_window".into(), 0, AttentionKind::Full),
        ("sliding_window".into(), -1, AttentionKind::Full),
        ("mamba".into(), window, AttentionKind::State),
        ("encoder_only_attention".into(), window, AttentionKind::Ignored),
        ("cross_attention".into(), window, AttentionKind::Ignored),
    ] {
        let event = small().with("kv_cache_spec_kind", kind).with("kv_cache_spec_sliding_window", window);
        let spec = stored(Wire::Vllm, event).1.spec.unwrap();
        assert_eq!(spec.kind, expected);
        assert_eq!(spec.window_tokens, (expected == AttentionKind::SlidingWindow).then_some(64));
    }
}

#[test]
fn an_adapter_without_a_name_is_known_by_its_number() {
    for (id, name, expected) in [
        (Value::Nil, Value::Nil, None),
        (0.into(), "".into(), None),
        ("".into(), Value::Nil, None),
        (3.into(), Value::Nil, Some("lora:3")),
        ((-3).into(), "".into(), Some("lora:-3")),
        (u64::MAX.into(), Value::Nil, Some("lora:18446744073709551615")),
        ("x".into(), Value::Nil, Some("lora:x")),
        (3.into(), "fr".into(), Some("fr")),
        (Value::Nil, map(&[("cache_salt", "tenant".into())]), None),
    ] {
        let (_, event) = stored(Wire::Vllm, small().with("lora_id", id).with("lora_name", name));
        assert_eq!(event.lora_name.as_deref(), expected);
        assert_eq!(event.extras, None);
    }
}

#[test]
fn media_become_tiers() {
    for (medium, tier) in [
        (Value::Nil, "gpu"),
        ("".into(), "gpu"),
        ("GPU".into(), "gpu"),
        ("CPU_PINNED".into(), "cpu"),
        ("host".into(), "cpu"),
        ("External".into(), "storage"),
        ("CXL-2".into(), "cxl-2"),
    ] {
        let event = map(&[("type", "BlockRemoved".into()), ("block_hashes", ints([1])), ("medium", medium)]);
        assert_eq!(removed(Wire::Vllm, event).1.tier, Tier::named(tier));
    }
}

#[test]
fn a_removal_of_no_group_is_of_every_group() {
    let event = map(&[("type", "BlockRemoved".into()), ("block_hashes", ints([1, 2]))]);
    assert_eq!(removed(Wire::Vllm, event.clone()).1.group, None);
    assert_eq!(removed(Wire::Vllm, event.with("group_idx", 0)).1.group, Some(0));
}

#[test]
fn a_clear_is_of_the_device_unless_it_names_a_medium() {
    let event = map(&[("type", "AllBlocksCleared".into())]);
    for (event, tier) in [
        (event.clone(), None),
        (event.clone().with("medium", Value::Nil), None),
        (event.clone().with("medium", ""), None),
        (event.with("medium", "Host"), Some(Tier::named("cpu"))),
    ] {
        assert_eq!(read_events(Wire::Vllm, vec![event]).unwrap().events, [Event::Cleared(tier)]);
    }
}

#[test]
fn times_and_ranks_may_be_integers_nil_or_absent() {
    let header = |items: &[Value]| {
        let batch = read(Wire::Vllm, &array(items).packed()).unwrap();
        (batch.timestamp_s, batch.dp_rank)
    };
    assert_eq!(header(&[Value::Nil, ints([])]), (None, None));
    assert_eq!(header(&[(-3).into(), ints([]), Value::Nil]), (Some(-3.0), None));
    assert_eq!(header(&[u64::MAX.into(), ints([]), 0xFFFF.into()]), (Some(18446744073709551616.0), Some(0xFFFF)));
    assert_eq!(header(&[Value::Raw(vec![0xCA, 0x3F, 0x80, 0, 0]), ints([]), 0.into(), "more".into()]), (Some(1.0), Some(0)));
}

#[test]
fn a_batch_is_emptied_first() {
    let mut batch = read_events(Wire::Vllm, vec![full()]).unwrap();
    crate::decode::decode(&array(&[Value::Nil, ints([])]).packed(), Wire::Vllm, &mut batch).unwrap();
    assert_eq!(batch, crate::events::Batch::default());
}
